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

from delve_jax import models
from delve_jax.config import (
    DelveConfig,
    DelveError,
    MambaConfig,
    NeoxConfig,
    Qwen3Config,
    RwkvConfig,
)

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


def test_unknown_remat_is_named():
    with pytest.raises(DelveError, match="remat 'full'.*none, layer or dots"):
        models.Compute(remat="full")
