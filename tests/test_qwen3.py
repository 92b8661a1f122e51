"""Qwen3 against the installed transformers class, and the initialisation that Delphi trains from.

Bar: |logit difference| <= 1e-5 max|logit|, whole texts, single steps, left padding, packed rows.
"""

import dataclasses
import functools
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delve_jax import models
from delve_jax.config import Qwen3Config, RopeScaling
from delve_jax.models import qwen3
from delve_jax.parents.stock import export_stock

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BAR = 1e-5
V, T = 211, 48
GQA = Qwen3Config(
    vocab_size=V, vocab_rows=V, d_model=48, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16,
    d_ffn=80, rope_theta=10000.0,
)  # fmt: skip
# some wavelengths lie below, some between, some beyond the limits of each scaling
CASES = {
    "grouped": GQA,
    "multi-head, llama3 rope": dataclasses.replace(
        GQA, n_kv_heads=4, rope_theta=500000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)
    ),
    "grouped, llama3 rope, tied": dataclasses.replace(
        GQA, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 48), tie_embeddings=True, norm_eps=1e-6
    ),
}


def torch_model(cfg, params):
    """The transformers model of this config with these weights, by the converter."""
    with tempfile.TemporaryDirectory() as folder:
        export_stock(cfg, params, Path(folder) / "model")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=torch.float32
        )
    assert isinstance(model, transformers.Qwen3ForCausalLM)
    return model.eval()


@functools.cache
def jitted(cfg):
    return jax.jit(functools.partial(models.forward, cfg))


def case(name, randomised):
    """config, params, tokens and a function tokens, mask -> transformers' logits."""
    cfg = CASES[name]
    params = randomised(cfg, 1)
    if cfg.tie_embeddings:
        params["embed"]["kernel"] *= 3 / cfg.d_model**0.5
    model = torch_model(cfg, params)

    def reference(tokens, mask=None):
        extra = {}
        if mask is not None:
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
            extra["attention_mask"] = torch.tensor(mask.astype(np.int64))
            extra["position_ids"] = torch.tensor(positions)
        with torch.no_grad():
            return model(torch.tensor(tokens), use_cache=False, **extra).logits.numpy()

    return cfg, params, np.random.default_rng(0).integers(0, V, (2, T)), reference


def difference(got, want):
    """Largest difference relative to the largest entry."""
    assert got.shape == want.shape
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, randomised, record_property):
    """Whole texts, a prefill and single steps, and rows behind left padding."""
    cfg, params, tokens, reference = case(name, randomised)
    want = reference(tokens)
    assert want.std() > 1
    errors = {"whole": difference(jitted(cfg)(params, tokens)[0], want)}
    state = models.init_state(cfg, 2, 4)  # grown twice and more on the way
    first, state = jitted(cfg)(params, tokens[:, :20], models.grow(cfg, state, 20))
    out = [first]
    for t in range(20, T):
        state = models.grow(cfg, state, 1)
        logits, state = jitted(cfg)(params, tokens[:, t : t + 1], state)
        out.append(logits)
    assert state["valid_BS"].shape[1] > T
    errors["steps"] = difference(np.concatenate(out, axis=1), want)
    mask = np.arange(T) >= np.array([[0], [13]])
    padded = jitted(cfg)(params, tokens, None, mask)[0]
    errors["padded"] = difference(np.asarray(padded)[mask], reference(tokens, mask)[mask])
    segments = np.repeat([[0, 1, 2]], 2, axis=0).repeat([7, 11, T - 18], axis=1)
    packed = jitted(cfg)(params, tokens, None, None, segments)[0]
    alone = [reference(part) for part in np.split(tokens, [7, 18], axis=1)]
    errors["packed"] = difference(packed, np.concatenate(alone, axis=1))
    for what, error in errors.items():
        record_property(what, error)
    assert max(errors.values()) <= BAR, errors
    if cfg.rope_scaling:
        plain = dataclasses.replace(cfg, rope_scaling=None)
        assert difference(jitted(plain)(params, tokens)[0], want) > 100 * BAR


def test_llama3_scaling_of_delphi():
    """Of 64 pairs 29 keep their frequency, 29 are divided by 8, 6 lie between (parents.md 3.4)."""
    cfg = dataclasses.replace(
        GQA, head_dim=128, rope_theta=500000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)
    )
    plain = qwen3.rope_frequencies(dataclasses.replace(cfg, rope_scaling=None))
    ratio = qwen3.rope_frequencies(cfg) / plain
    assert (ratio == 1).sum() == 29 and (ratio == 1 / 8).sum() == 29
    between = ratio[(ratio < 1) & (ratio > 1 / 8)]
    assert len(between) == 6 and (np.diff(between) < 0).all()


def test_initialisation_is_delphis(record_property):
    """Truncated at 3 deviations, 1/sqrt(d_in) (embedding 1/H); step-0 loss is ln V + 0.9733 / 2."""
    H, vocab = 256, 4096
    cfg = Qwen3Config(
        vocab_size=vocab, vocab_rows=vocab, d_model=H, n_layers=2, n_heads=2, n_kv_heads=2,
        head_dim=128, d_ffn=4 * H,
    )  # fmt: skip
    params = jax.jit(functools.partial(models.init_params, cfg))(jax.random.key(0))
    fan_in = {"down": 4 * H}
    for path, leaf in jax.tree.leaves_with_path(params):
        where = [k.key for k in path]
        if where[-1] == "scale":
            assert (np.asarray(leaf) == 1).all()
            continue
        std = 1 / H if where[0] == "embed" else fan_in.get(where[-2], H) ** -0.5
        assert abs(float(leaf.std()) / (0.98658 * std) - 1) < 0.01, where
        assert 2.9 * std < float(jnp.abs(leaf).max()) <= 3.0001 * std, where
    tokens = np.random.default_rng(0).integers(0, vocab, (4, 129))

    @jax.jit
    def nll(params):
        logits, _ = models.forward(cfg, params, tokens[:, :-1])
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -logp.mean()

    loss = float(nll(params))
    record_property("loss", loss)
    assert abs(loss - (math.log(vocab) + 0.9733 / 2)) < 0.13  # 512 tokens of deviation 0.99
