"""The parent families against the installed transformers classes, and their own properties.

Bars: |logit difference| <= 1e-4 max|logit|, full length, chunked prefill and single steps alike;
gradients of the loss within 1e-3 for every tensor. Every weight is random, logits vary by units.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delve_jax import models
from delve_jax.config import DelveConfig, MambaConfig, NeoxConfig, Qwen3Config, RwkvConfig
from delve_jax.models import neox

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from delve_jax import parents  # noqa: E402

BAR, GRAD_BAR = 1e-4, 1e-3
V = 211
COMMON = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}


def mamba(d, L, **more):
    cfg = transformers.MambaConfig(hidden_size=d, num_hidden_layers=L, **COMMON, **more)
    return transformers.MambaForCausalLM(cfg)


def rwkv(d, L, **more):
    cfg = transformers.RwkvConfig(hidden_size=d, num_hidden_layers=L, **COMMON, **more)
    assert cfg.rescale_every == 6  # acts (in place) on layers from 6 on
    return transformers.RwkvForCausalLM(cfg)


def gpt_neox(d, L, heads, **more):
    rope = ROPE | more.pop("rope", {})
    cfg = transformers.GPTNeoXConfig(
        hidden_size=d, num_hidden_layers=L, num_attention_heads=heads, rope_parameters=rope,
        max_position_embeddings=512, intermediate_size=more.pop("ffn", 4 * d), **COMMON, **more,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(cfg)


def qwen3(d, L, **more):
    cfg = transformers.Qwen3Config(
        hidden_size=d, num_hidden_layers=L, head_dim=16, max_position_embeddings=512,
        **{**COMMON, "pad_token_id": None}, **more,  # torch gives a padding id no gradient
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(cfg)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
FULL = {"rope": {"partial_rotary_factor": 1.0}}
# name: (constructor, T, valid ids)
VARIANTS = {
    "mamba-tied": (lambda: mamba(64, 3), 257, V),
    "mamba-untied-expand3-bias-noconvbias": (
        lambda: mamba(
            96, 2, expand=3, state_size=8, time_step_rank=10, conv_kernel=3, use_bias=True,
            use_conv_bias=False, tie_word_embeddings=False, layer_norm_epsilon=1e-4,
        ), 256, V - 20,
    ),
    "mamba-512": (lambda: mamba(512, 1, use_bias=True, tie_word_embeddings=False), 64, V),
    "rwkv-rescale": (
        lambda: rwkv(64, 8, attention_hidden_size=96, intermediate_size=160),
        256, V,
    ),
    "rwkv-512": (
        lambda: rwkv(512, 2, attention_hidden_size=256, layer_norm_epsilon=0.1), 64, V - 1
    ),
    "neox-parallel": (lambda: gpt_neox(64, 3, 4), 512, V - 8),
    "neox-sequential-full": (
        lambda: gpt_neox(128, 3, 4, use_parallel_residual=False, **FULL), 256, V
    ),
    "neox-sequential-nobias": (
        lambda: gpt_neox(96, 2, 3, use_parallel_residual=False, attention_bias=False, ffn=160,
                         rope={"rope_theta": 500.0}),
        256, V,
    ),
    "qwen3-grouped-llama3": (
        lambda: qwen3(64, 2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=160,
                      tie_word_embeddings=False, rope_parameters=LLAMA3),
        256, V - 4,
    ),
    "qwen3-tied": (
        lambda: qwen3(48, 3, num_attention_heads=4, num_key_value_heads=4, intermediate_size=80,
                      tie_word_embeddings=True),
        128, V,
    ),
    "neox-512-nobias-full": (lambda: gpt_neox(512, 2, 8, attention_bias=False, **FULL), 64, V),
}  # fmt: skip


def randomise_torch(model, seed):
    """Every tensor random, nothing left at 0 or 1, logits that vary by several units."""
    gen = torch.Generator().manual_seed(seed)
    normal = lambda p: torch.randn(p.shape, generator=gen)  # noqa: E731
    uniform = lambda p, lo, hi: lo + (hi - lo) * torch.rand(p.shape, generator=gen)  # noqa: E731
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, p in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if "embed" in name and "out" not in name:
                new = normal(p) * (3 / p.shape[1] ** 0.5 if tied else 1)
            elif name in ("lm_head.weight", "head.weight", "embed_out.weight"):
                new = normal(p) * 3 / p.shape[1] ** 0.5
            elif last == "time_decay":
                new = uniform(p, -5, 1)
            elif last.startswith("time_mix"):
                new = uniform(p, 0, 1)
            elif last == "A_log":
                new = 0.5 + 0.7 * normal(p)
            elif last in ("D", "time_first"):
                new = normal(p)
            elif "conv1d.weight" in name:
                new = 0.5 * normal(p)
            elif last == "bias":
                new = 0.2 * normal(p) - (2 if "dt_proj" in name else 0)
            elif p.ndim == 1:
                new = 1 + 0.2 * normal(p)
            else:
                new = normal(p) / p.shape[1] ** 0.5
            p.copy_(new)


@dataclasses.dataclass(frozen=True)
class Case:
    """One variant: the torch model's logits and both sides of the weights."""

    cfg: object
    params: dict
    tokens_BT: np.ndarray
    logits_BTV: np.ndarray  # torch's, valid ids only
    fresh: Callable  # makes the torch model, in training mode
    weights: dict  # torch's, before its first forward


def to_tree(model, tensors, valid):
    """Torch tensors under their names -> our tree, by the converter that users use."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=dict(tensors))  # it empties the dict
        cfg, params, _ = parents.load(folder)
    return dataclasses.replace(cfg, vocab_size=valid), params


@functools.cache
def case(name) -> Case:
    build, T, valid = VARIANTS[name]
    model = build().float()
    randomise_torch(model, seed=sum(map(ord, name)))
    # RWKV's first eval forward divides late layers' weights in place: copy before it
    weights = {k: t.detach().clone() for k, t in model.state_dict().items()}
    cfg, params = to_tree(model, weights, valid)
    tokens = np.random.default_rng(0).integers(0, valid, size=(3, T))
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(tokens), use_cache=False).logits
    return Case(cfg, params, tokens, out[..., :valid].numpy(), build, weights)


@functools.cache
def jitted(cfg):
    return jax.jit(functools.partial(models.forward, cfg))


def difference(got, want):
    """Largest difference relative to the largest entry."""
    assert got.shape == want.shape
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def in_pieces(cfg, params, tokens_BT, lengths, mask_BT=None):
    """Logits of consecutive pieces, the state carried; the last length repeats."""
    B, T = tokens_BT.shape
    state, out, at = models.init_state(cfg, B, T), [], 0
    lengths = list(lengths)
    while at < T:
        n = min(lengths.pop(0) if len(lengths) > 1 else lengths[0], T - at)
        mask = None if mask_BT is None else mask_BT[:, at : at + n]
        logits, state = jitted(cfg)(params, tokens_BT[:, at : at + n], state, mask)
        out.append(logits)
        at += n
    return np.concatenate([np.asarray(o) for o in out], axis=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name, record_property):
    """Full length, uneven chunks, and single steps (our steps against torch's whole text)."""
    c = case(name)
    T = c.tokens_BT.shape[1]
    assert c.logits_BTV.std() > 2
    full = difference(jitted(c.cfg)(c.params, c.tokens_BT)[0], c.logits_BTV)
    pieces = (100, 1, T - 201, 100) if T > 201 else (31, 1, 1, T - 33)
    chunked = difference(in_pieces(c.cfg, c.params, c.tokens_BT, pieces), c.logits_BTV)
    few = c.tokens_BT[:, :256]
    steps = difference(in_pieces(c.cfg, c.params, few, [1]), c.logits_BTV[:, :256])
    record_property("full", full)
    record_property("chunked", chunked)
    record_property("steps", steps)
    assert max(full, chunked, steps) <= BAR


def cross_entropy(logits_BTV, tokens_BT):
    """Mean nll of each next token."""
    logp = jax.nn.log_softmax(logits_BTV[:, :-1])
    return -jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1).mean()


def torch_gradients(c: Case, tokens_BT):
    """Gradient of the loss for every tensor of the state dict, in training mode."""
    model = c.fresh()  # RWKV's eval forward has changed the weights of the other one
    model.load_state_dict(c.weights)
    tokens = torch.from_numpy(tokens_BT)
    logits = model(tokens, use_cache=False).logits[:, :-1, : c.cfg.vocab_size]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters(remove_duplicate=False)}
    assert grads.keys() == c.weights.keys()
    return grads


@pytest.mark.parametrize("name", [n for n in VARIANTS if "512" not in n])
def test_gradient_of_every_tensor_equals_autograd(name, record_property):
    c = case(name)
    tokens = c.tokens_BT[:, :48]
    _, want = to_tree(c.fresh(), torch_gradients(c, tokens), c.cfg.vocab_size)
    loss = lambda p: cross_entropy(models.forward(c.cfg, p, tokens)[0], tokens)  # noqa: E731
    got = jax.jit(jax.grad(loss))(c.params)
    worst = 0.0
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert g.shape == w.shape
        stacked = path[0].key == "layers"
        for layer in range(len(g)) if stacked else [slice(None)]:
            where = f"{jax.tree_util.keystr(path)} layer {layer}"
            assert np.abs(w[layer]).max() > 0, where
            error = difference(g[layer], w[layer])
            assert error <= GRAD_BAR, where
            worst = max(worst, error)
    record_property("worst", worst)


@pytest.mark.parametrize("name", ["neox-parallel", "neox-sequential-full"])
def test_the_bar_tells_the_exact_gelu_from_its_tanh_form(name, monkeypatch, record_property):
    c = case(name)
    monkeypatch.setattr(neox, "gelu", functools.partial(jax.nn.gelu, approximate=True))
    logits = jax.jit(functools.partial(models.forward, c.cfg))(c.params, c.tokens_BT)[0]
    error = difference(logits, c.logits_BTV)
    record_property("tanh", error)
    assert error > BAR


# ---- properties of our own models: small random ones, a DELVE of them included ----

small = {"vocab_size": 50, "vocab_rows": 56, "n_layers": 3}
MAMBA = MambaConfig(d_model=24, d_inner=40, d_state=4, dt_rank=3, use_bias=True, **small)
RWKV = RwkvConfig(d_model=24, d_att=32, d_ffn=40, **small)
PARALLEL = NeoxConfig(d_model=32, n_heads=2, d_ffn=48, **small)
SEQUENTIAL = dataclasses.replace(PARALLEL, rotary_pct=1.0, parallel_residual=False)
STREAMS = tuple(
    (n, dataclasses.replace(cfg, vocab_rows=50))
    for n, cfg in (("mamba", MAMBA), ("rwkv", RWKV), ("neox", SEQUENTIAL))
)
QWEN3 = Qwen3Config(d_model=24, n_heads=4, n_kv_heads=2, head_dim=8, d_ffn=40, **small)
PARENTS = {"mamba": MAMBA, "rwkv": RWKV, "neox": PARALLEL, "qwen3": QWEN3}
OURS = PARENTS | {
    "delve": DelveConfig(STREAMS, n_superblocks=3, latents=3, connectors="hub", hub_rank=4)
}


@pytest.mark.parametrize("name", OURS)
def test_left_padding_leaves_no_trace(name, randomised):
    """Rows behind padding (of any token ids) equal the unpadded rows, whole or with a state.

    Padding ends inside the first, inside the second chunk; the third goes on without a mask.
    """
    cfg, T, pads = OURS[name], 24, [0, 5, 11]
    params = randomised(cfg, 1)
    r, fn = np.random.default_rng(1), jitted(cfg)
    tokens = r.integers(0, cfg.vocab_size, size=(3, T))
    mask = np.arange(T)[None] >= np.array(pads)[:, None]
    whole = fn(params, tokens, None, mask)[0]
    state, chunks = models.init_state(cfg, 3, T), []
    for at in (0, 8, 16):
        part = slice(at, at + 8)
        logits, state = fn(params, tokens[:, part], state, mask[:, part] if at < 16 else None)
        chunks.append(logits)
    # the unpadded rows, all at once: what follows a text does not act on it (next test)
    shifted = np.stack([np.roll(row, -pad) for row, pad in zip(tokens, pads, strict=True)])
    want = np.asarray(fn(params, shifted)[0])
    for row, pad in enumerate(pads):
        assert difference(np.asarray(whole)[row, pad:], want[row, : T - pad]) <= 1e-5
        got = np.concatenate(chunks, axis=1)[row, pad:]
        assert difference(got, want[row, : T - pad]) <= 1e-5


def test_half_precision_reads_what_is_kept_wide(randomised):
    """A step of the bias of dt that bfloat16 has not: it moves the decay."""
    params = randomised(MAMBA, 3)
    bias = params["layers"]["dt_proj"]["bias"]
    run = jax.jit(functools.partial(models.features, MAMBA, how=models.Compute(dtype="bfloat16")))

    def features(by):
        layers = params["layers"] | {"dt_proj": params["layers"]["dt_proj"] | {"bias": by}}
        return np.asarray(run(params | {"layers": layers}, np.arange(12)[None])[0], np.float32)

    off = jnp.full_like(bias, -4.0)
    assert (off + 2**-7).astype(jnp.bfloat16).tolist() == off.tolist()
    assert (features(off) != features(off + 2**-7)).any()


@functools.cache
def jitted_gradient(cfg, remat):
    """Gradient of a sum over positions weighted by w_T, of every parameter."""

    def loss(params, tokens_BT, w_T):
        logits_BTV = models.forward(cfg, params, tokens_BT, how=models.Compute(remat=remat))[0]
        return jnp.einsum("btv,t->", jnp.sin(logits_BTV), w_T)

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("name", PARENTS)
def test_causality_by_gradients(name, randomised):
    """Logits at t have a gradient from every token up to t and exactly none from later ones."""
    cfg, T, t = OURS[name], 9, 5
    tokens = np.arange(T)[None]  # each id once: row i of the table is the token at position i
    _, grads = jitted_gradient(cfg, "none")(randomised(cfg, 2), tokens, jnp.eye(T)[t])
    used = np.abs(np.asarray(grads["embed"]["kernel"])).max(axis=1)
    assert (used[: t + 1] > 0).all()
    assert (used[t + 1 :] == 0).all()


@pytest.mark.parametrize("how", ["layer", "dots"])
@pytest.mark.parametrize("name", PARENTS)
def test_rematerialised_layers_change_nothing(name, how, randomised):
    cfg = OURS[name]
    args = randomised(cfg, 3), np.arange(9)[None], jnp.ones(9)
    plain, remat = (jitted_gradient(cfg, way)(*args) for way in ("none", how))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, remat)


def test_attention_is_not_computed_again_where_products_are_kept(randomised):
    """ "dots" keeps its outputs: exponentials stand in the forward and in the backward pass."""
    cfg, exponentials = PARALLEL, {}
    for way in ("none", "dots"):
        jaxpr = jax.make_jaxpr(jitted_gradient(cfg, way))
        text = str(jaxpr(randomised(cfg, 3), np.arange(9)[None], jnp.ones(9)))
        exponentials[way] = text.count("= exp ")
    assert exponentials["dots"] == exponentials["none"] > 0


@pytest.mark.parametrize("name", OURS)
def test_module_and_free_functions_are_one_model(name, randomised):
    """`LM` declares the tree of `abstract_params` and computes `forward`; padding ids are cut."""
    cfg, tokens = OURS[name], np.arange(72).reshape(3, 24) % 50
    module = models.LM(cfg)
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens))["params"]
    shape = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
    for part in models.abstract_params(cfg).values():
        part.clear()  # traced once, but every caller's own
    assert shape(made) == shape(models.abstract_params(cfg))
    params = randomised(cfg, 4)
    logits, state = jax.jit(module.apply)({"params": params}, tokens)
    assert logits.shape == (3, 24, cfg.vocab_size) and logits.dtype == jnp.float32
    assert state is None
    assert difference(logits, np.asarray(jitted(cfg)(params, tokens)[0])) <= 1e-5


def test_random_factors_are_zero_beyond_the_rank_of_their_layer():
    cfg = NeoxConfig(
        vocab_size=V, vocab_rows=V, d_model=16, n_layers=3, n_heads=2, d_ffn=24,
        ranks=(("mlp/up", (2, 5, 3)), ("embed", (4,))),
    )  # fmt: skip
    params = models.init_params(cfg, jax.random.key(0))
    leaf = params["layers"]["mlp"]["up"]
    for layer, rank in enumerate((2, 5, 3)):
        assert (
            np.abs(leaf["v"][layer, :, :rank]).min() > 0 == np.abs(leaf["v"][layer, :, rank:]).sum()
        )
        assert np.abs(leaf["u"][layer, :rank]).min() > 0 == np.abs(leaf["u"][layer, rank:]).sum()
    stored = sum(int(np.count_nonzero(a)) for a in (leaf["v"], leaf["u"]))
    assert stored == (2 + 5 + 3) * (16 + 24)
