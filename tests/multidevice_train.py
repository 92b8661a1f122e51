"""Own process, 8 virtual devices: losses of some training steps of each family on several meshes.

python tests/multidevice_train.py --family neox --meshes data=1 data=4,model=2 --dtype float64
prints one JSON line {"losses": {mesh: [...]}, "sharded": leaves split over devices}.
"""

import argparse
import json
import os

import numpy as np

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

V, T, B = 64, 16, 16


def config(family):
    from delve_jax.config import DelveConfig, MambaConfig, NeoxConfig, RwkvConfig

    shared = dict(vocab_size=V, vocab_rows=V, d_model=16, context_length=T, n_layers=2)
    parents = {
        "mamba": MambaConfig(**shared, d_inner=32, dt_rank=2, tie_embeddings=True),
        "rwkv": RwkvConfig(**shared, d_att=16, d_ffn=32),
        # a factored map with layers of unequal rank
        "neox": NeoxConfig(**shared, n_heads=4, d_ffn=32, ranks=(("mlp/up", (8, 4)),)),
    }
    if family != "delve":
        return parents[family]
    return DelveConfig(tuple((n, parents[n]) for n in ("mamba", "rwkv", "neox")), 2, hub_rank=4)


def losses(family, mesh_spec, dtype, steps, optimizer="adamh"):
    """Losses of `steps` steps in `dtype`, and how many leaves of the state are split."""
    import jax
    import jax.numpy as jnp

    from delve_jax import models, parallel
    from delve_jax.models import Compute
    from delve_jax.train import objective, optim
    from delve_jax.train.loop import init_state, make_step

    cfg = config(family)
    mesh = parallel.make_mesh(mesh_spec)
    how = Compute(dtype=dtype, residual=parallel.residual_sharding(mesh))
    loss = objective.language_model(cfg, how, eot=0, z_loss=1e-4)
    # epsilon keeps Adam's first steps from turning gradients of round-off size into full ones
    opt = {
        "adamh": lambda: optim.adamh(lambda _: 1e-2, lambda _: 1e-3, eps=1e-6),
        "adamw": lambda: optim.adamw(lambda _: 1e-3),
    }[optimizer]()
    params = models.init_params(cfg, jax.random.key(0))
    state = jax.tree.map(
        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, params
    )
    state = init_state(state, opt)
    where = parallel.shardings(mesh, state)
    state = jax.device_put(state, where)
    step = make_step(loss, opt, mesh, state, ())
    ids = np.random.default_rng(0)
    out = []
    for _ in range(steps):
        # text with structure: each id follows from the one before; id 0 opens a document
        rows = np.cumsum(ids.integers(0, 3, (B, T + 1)), axis=1) % V
        state, metrics = step(state, (), parallel.global_batch(mesh, rows.astype(np.int32)))
        out.append(float(metrics["loss"]))
    split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    return out, split


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", required=True)
    parser.add_argument("--meshes", nargs="+", required=True)
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    if args.dtype == "float64":
        os.environ["JAX_ENABLE_X64"] = "1"
    found = {m: losses(args.family, m, args.dtype, args.steps) for m in args.meshes}
    print(json.dumps({
        "losses": {m: x for m, (x, _) in found.items()},
        "sharded": {m: n for m, (_, n) in found.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
