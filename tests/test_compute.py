"""`Compute`: float64, bfloat16 on float32 weights, placement; and what the head reads."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from delve_jax import lm, models
from delve_jax.config import (
    DelveConfig,
    DelveError,
    MambaConfig,
    NeoxConfig,
    Qwen3Config,
    RwkvConfig,
)
from delve_jax.models import attention
from delve_jax.models.linear import few_rows, linear, product, transposed

V, T = 40, 16
small = {"vocab_size": V, "vocab_rows": V, "d_model": 32, "n_layers": 2}
STREAMS = {
    "mamba": MambaConfig(d_inner=48, d_state=4, dt_rank=3, **small),
    "rwkv": RwkvConfig(d_att=32, d_ffn=48, **small),
    "neox": NeoxConfig(n_heads=2, d_ffn=48, **small),
    "qwen3": Qwen3Config(n_heads=4, n_kv_heads=2, head_dim=8, d_ffn=48, **small),
}
PAIR = tuple((n, STREAMS[n]) for n in ("mamba", "qwen3"))
DELVE = DelveConfig(PAIR, 2, latents=2, connectors="hub", hub_rank=4)


def test_float64_is_float64_throughout(record_property):
    """Finite differences agree to 1e-6: nothing on the way is rounded to float32."""
    script = Path(__file__).parent / "float64_models.py"
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert out.returncode == 0, out.stderr[-2000:]
    rows = json.loads(out.stdout)
    assert rows.keys() == {"mamba", "rwkv", "neox", "qwen3", "delve"}
    for family, row in rows.items():
        record_property(family, row)
        assert row["dtypes"] == ["float64"], family
        assert row["state_keeps_its_dtypes"], family
        assert 0 < row["float32_error"] < 1e-4, family
        assert row["gradient_error"] < 1e-6, family


@pytest.mark.parametrize("cfg", [*STREAMS.values(), DELVE], ids=[*STREAMS, "delve"])
def test_bfloat16_compute_on_float32_weights(cfg, randomised, record_property):
    """Logits and gradients near those of float32; weights, gradients and logits are float32."""
    params = randomised(cfg, 1)
    tokens = np.random.default_rng(2).integers(0, V, (2, T))
    results = {}
    for dtype in ("float32", "bfloat16"):
        how = models.Compute(dtype)

        def loss(params, how=how):
            f, _ = models.features(cfg, params, tokens, how=how)
            logits = models.head(cfg, params, f)
            logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
            return -logp.mean(), (logits, f)

        results[dtype] = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    (_, (want, _)), want_grads = results["float32"]
    (_, (got, f)), grads = results["bfloat16"]
    assert {leaf.dtype for leaf in jax.tree.leaves(f)} == {jnp.dtype("bfloat16")}
    assert got.dtype == jnp.float32
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    record_property("logits", error)
    assert 1e-5 < error < 0.05
    squares, total = 0.0, 0.0
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert g.dtype == jnp.float32 and np.isfinite(g).all()
        squares, total = squares + float(((g - w) ** 2).sum()), total + float((w**2).sum())
    record_property("gradients", (squares / total) ** 0.5)
    assert (squares / total) ** 0.5 < 0.1


def test_the_head_reads_head_params_only(randomised):
    """`head` of the sub-tree is `head` of the tree, so a loss may differentiate that alone."""
    for cfg in (STREAMS["mamba"], DELVE):
        params = randomised(cfg, 3)
        f, _ = jax.eval_shape(
            lambda p, cfg=cfg: models.features(cfg, p, np.zeros((1, 3), int)), params
        )
        f = jax.tree.map(lambda a: np.random.default_rng(4).normal(size=a.shape).astype(a.dtype), f)
        part = models.head_params(cfg, params)
        assert len(jax.tree.leaves(part)) < len(jax.tree.leaves(params))
        np.testing.assert_array_equal(models.head(cfg, part, f), models.head(cfg, params, f))


@pytest.mark.parametrize("cfg", [*STREAMS.values(), DELVE], ids=[*STREAMS, "delve"])
def test_the_residual_stream_is_placed_after_the_embedding_and_every_layer(cfg):
    """Once per stream outside the scans over layers, once in the body of each."""
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    how = models.Compute(residual=NamedSharding(mesh, PartitionSpec("data")))
    run = lambda p, how: models.forward(cfg, p, np.zeros((2, 4), int), how=how)[0]  # noqa: E731
    params = models.abstract_params(cfg)
    streams = len(cfg.streams) if cfg.family == "delve" else 1
    placed = str(jax.make_jaxpr(functools.partial(run, how=how))(params))
    assert placed.count("sharding_constraint") == 2 * streams
    plain = str(jax.make_jaxpr(functools.partial(run, how=models.F32))(params))
    assert "sharding_constraint" not in plain


@pytest.mark.parametrize("rows", [8, 64])
def test_few_rows_are_multiplied_without_packing(rows):
    """Of a large matrix on a CPU: no product in YNNPACK's fusions, the same numbers, gradients."""
    rng = np.random.default_rng(0)
    w_IO = rng.standard_normal((512, 4096), np.float32) / 16
    x = rng.standard_normal((2, rows // 2, 512), np.float32)
    maps = {"v": w_IO, "u": np.ascontiguousarray(w_IO.T)}

    def fn(x, maps, of):
        y = of(of(x, maps["v"]), maps["u"])
        return (y * y).sum(), y

    both = jax.value_and_grad(fn, argnums=(0, 1), has_aux=True)
    found, want = (jax.jit(functools.partial(both, of=of))(x, maps) for of in (product, jnp.matmul))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * float(jnp.abs(b).max()))
    text = jax.jit(functools.partial(fn, of=product)).lower(x, maps).compile().as_text()
    fused = text[: text.index("ENTRY")]  # what the fusions do stands above
    assert (" dot(" in fused) == (not few_rows(x, w_IO)) == (rows == 64)


def test_unknown_remat_is_named():
    with pytest.raises(DelveError, match="remat 'full'.*none, layer or dots"):
        models.Compute(remat="full")


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_bfloat16_logits(tied):
    """Logits are float32 sums; their cotangent is rounded to bfloat16, the weights' gradient not:
    summed over many tokens it keeps digits that bfloat16 has not."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 8, 64), jnp.bfloat16)
    w = jax.random.normal(keys[1], (96, 64) if tied else (64, 96))
    g = jax.random.normal(keys[2], (2, 8, 96))
    run = transposed if tied else linear
    y, back = jax.vjp(lambda x, w: run({"kernel": w}, x, jnp.float32), x, w)
    dx, dw = back(g)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    g64, x64 = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (g, x))
    want = np.einsum("bti,bto->io", x64, g64)
    np.testing.assert_allclose(dw.T if tied else dw, want, rtol=1e-5, atol=1e-4)
    w64 = np.asarray((w.T if tied else w).astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(np.asarray(dx, np.float64), g64 @ w64.T, rtol=2e-2, atol=0.2)


def test_int8_factors_pass_a_gradient_on():
    """They have none themselves: integers, whatever dtype the product is summed up in."""
    x = jax.random.normal(jax.random.key(0), (3, 8), jnp.bfloat16)
    p = {
        "v_q": jnp.arange(-16, 16, dtype=jnp.int8).reshape(8, 4), "q_scale": jnp.full(4, 0.01),
        "u_q": jnp.arange(-12, 12, dtype=jnp.int8).reshape(4, 6),
    }  # fmt: skip
    dx = jax.grad(lambda x: linear(p, x, jnp.float32).sum())(x)
    w = (np.asarray(p["v_q"], float) * 0.01) @ np.asarray(p["u_q"], float)
    np.testing.assert_allclose(
        np.asarray(dx, float), np.broadcast_to(w.sum(1), (3, 8)), rtol=2e-2, atol=0.05
    )


def test_activations_follow_weights_on_an_accelerator(monkeypatch, tmp_path):
    """All weights in bfloat16: so are the activations there, and a saved state comes back."""
    cfg = NeoxConfig(vocab_size=V, vocab_rows=V, d_model=16, n_layers=1, n_heads=2, d_ffn=32)
    params = models.init_params(cfg, jax.random.key(0))
    rounded = models.cast(params, jnp.bfloat16)
    assert lm.compute_of(rounded) == lm.compute_of(params) == "float32"  # a CPU widens them again
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert lm.compute_of(rounded) == "bfloat16" and lm.compute_of(params) == "float32"
    monkeypatch.undo()
    model = lm.LM(cfg, rounded, compute="bfloat16")
    _, state = model.step([[1, 2, 3]], model.init_state(1, 8))
    assert state["layers"]["k"].dtype == jnp.bfloat16
    model.save_state(tmp_path / "state", state)
    again = model.load_state(tmp_path / "state")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), again, state)
    wide = lm.LM(cfg, rounded).load_state(tmp_path / "state")  # and in the dtype of who reads it
    assert wide["layers"]["k"].dtype == jnp.float32


def test_a_causal_text_needs_no_mask():
    """What a kernel that knows causal is given (`attention.DEFAULT`) means the same without one."""
    r = np.random.default_rng(0)
    q = jnp.asarray(r.normal(size=(2, 12, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(r.normal(size=(2, 2, 12, 8)), jnp.float32) for _ in range(2))
    mask = jnp.tri(12, dtype=bool)[None, None]
    want = attention.weighted(q, k, v, mask, True)
    np.testing.assert_array_equal(attention.weighted(q, k, v, None, True), want)
    assert attention.choice(jnp.bfloat16) == "blocks"
    assert attention.choice(jnp.bfloat16, "cudnn") == "cudnn"
    assert attention.choice(jnp.float32, "cudnn") == "blocks"  # it takes 16 bits only
    with pytest.raises(ValueError, match="impl 'flash'"):
        attention.choice(jnp.bfloat16, "flash")
