"""Own process, float64: logits and gradients against finite differences and against float32.

Prints one JSON object: family -> what was measured.
"""

import json
import os

os.environ["JAX_ENABLE_X64"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from delve_jax import models  # noqa: E402
from delve_jax.config import (  # noqa: E402
    DelveConfig,
    MambaConfig,
    NeoxConfig,
    Qwen3Config,
    RwkvConfig,
)

V, T = 20, 9
small = {"vocab_size": V, "vocab_rows": V + 2, "d_model": 8, "n_layers": 2}
CONFIGS = {
    "mamba": MambaConfig(d_inner=12, d_state=3, dt_rank=2, tie_embeddings=True, **small),
    "rwkv": RwkvConfig(d_att=12, d_ffn=12, **small),
    "neox": NeoxConfig(n_heads=2, d_ffn=12, **small),
    "qwen3": Qwen3Config(
        n_heads=2, n_kv_heads=1, head_dim=4, d_ffn=12, ranks=(("mlp/up", (3, 2)),), **small
    ),
}
STREAMS = tuple((n, CONFIGS[n]) for n in ("rwkv", "qwen3"))
CONFIGS["delve"] = DelveConfig(
    STREAMS, 2, latents=2, connectors="hub", hub_rank=2, gate_proj=3, gate_hidden=4
)
EPS = 1e-4
STENCIL = {1: 8 / 12, -1: -8 / 12, 2: -1 / 12, -2: 1 / 12}  # slope up to EPS^4


def measure(cfg) -> dict:
    """Dtypes, float64 against float32, and the worst error of a gradient along a direction."""
    r = np.random.default_rng(0)
    made = jax.jit(lambda key: models.init_params(cfg, key))(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    params = jax.tree.map(lambda a: a + 0.3 * r.normal(size=a.shape), jax.device_get(made))
    tokens = r.integers(0, V, (2, T))
    segments = np.repeat([[0, 0, 0, 0, 1, 1, 1, 2, 2]], 2, axis=0)

    def loss(params, dtype):
        how = models.Compute(dtype)
        logits, _ = models.forward(cfg, params, tokens[:, :-1], None, None, segments[:, :-1], how)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -logp.mean(), logits

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, logits), grads = run(params, "float64")
    single = jax.jit(loss, static_argnums=1)
    _, logits32 = single(jax.tree.map(np.float32, params), "float32")
    assert logits32.dtype == jnp.float32
    dtypes = {str(leaf.dtype) for leaf in [logits, *jax.tree.leaves(grads)]}
    worst, leaves = 0.0, jax.tree.leaves_with_path(params)
    for i, ((path, p), g) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
        if path[-1].key == "sigma":
            continue  # frozen: no gradient by design
        direction = r.normal(size=p.shape)
        slope = 0.0
        for steps, weight in STENCIL.items():
            moved = [
                q + steps * EPS * direction if i == j else q for j, (_, q) in enumerate(leaves)
            ]
            tree = jax.tree.unflatten(jax.tree.structure(params), moved)
            slope += weight / EPS * float(run(tree, "float64")[0][0])
        got = (np.asarray(g) * direction).sum()
        scale = np.linalg.norm(g) * np.linalg.norm(direction) / p.size**0.5
        assert scale > 0, path
        worst = max(worst, abs(got - slope) / scale)
    state = models.init_state(cfg, 2, T, jnp.float64)
    stepped = jax.eval_shape(
        lambda p, s: models.forward(cfg, p, tokens, s, how=models.Compute("float64")), params, state
    )
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, stepped[1], state)
    return {
        "dtypes": sorted(dtypes | {str(stepped[0].dtype)}),
        "state_keeps_its_dtypes": all(jax.tree.leaves(same)),
        "float32_error": float(jnp.abs(logits - logits32).max() / jnp.abs(logits).max()),
        "gradient_error": float(worst),
    }


if __name__ == "__main__":
    print(json.dumps({name: measure(cfg) for name, cfg in CONFIGS.items()}))
