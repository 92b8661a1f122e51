"""Do 50 training steps give the same losses on 1, 4 and 8 devices, however the state is split?

Command: python experiments/sharding.py (8 virtual CPU devices, about 10 minutes on 2 cores).
Result: experiments/results/sharding.json, the largest relative difference of any step's loss to the
single device, per family, mesh and dtype. With --family one family is run and its losses printed.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parent / "results" / "sharding.json"
V, T, B = 64, 16, 16
MESHES = (
    "data=1", "data=4", "data=8", "model=4", "model=8", "data=4,model=2", "replica=2,data=2,model=2"
)  # fmt: skip
FAMILIES = ("mamba", "rwkv", "neox", "qwen3", "delve")


def config(family):
    from delve_jax.config import DelveConfig, MambaConfig, NeoxConfig, Qwen3Config, RwkvConfig

    shared = dict(vocab_size=V, vocab_rows=V, d_model=16, context_length=T, n_layers=2)
    parents = {
        "mamba": MambaConfig(**shared, d_inner=32, dt_rank=2, tie_embeddings=True),
        "rwkv": RwkvConfig(**shared, d_att=16, d_ffn=32),
        # a factored map with layers of unequal rank
        "neox": NeoxConfig(**shared, n_heads=4, d_ffn=32, ranks=(("mlp/up", (8, 4)),)),
        "qwen3": Qwen3Config(**shared, n_heads=4, n_kv_heads=4, head_dim=8, d_ffn=64),
    }
    if family != "delve":
        return parents[family]
    streams = tuple((n, parents[n]) for n in ("mamba", "rwkv", "neox"))
    return DelveConfig(streams, 2, connectors="hub", hub_rank=4)


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
        "adamh": lambda: optim.adamh(lambda _: 1e-2, lambda _: 1e-3, eps=1e-6, factored="scaled"),
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
        tokens = parallel.global_batch(mesh, rows.astype(np.int32))
        state, metrics = step(state, (), tokens, np.int32(0))
        out.append(float(metrics["loss"]))
    split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    return out, split


def one(args) -> None:
    """Losses of one family, printed."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
    if args.dtype == "float64":
        os.environ["JAX_ENABLE_X64"] = "1"
    found = {m: losses(args.family, m, args.dtype, args.steps) for m in args.meshes}
    print(json.dumps({
        "losses": {m: x for m, (x, _) in found.items()},
        "sharded": {m: n for m, (_, n) in found.items()},
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--meshes", nargs="+", default=MESHES)
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    if args.family:
        return one(args)
    from delve_jax.metrics import versions

    rows = []
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    for dtype in ("float64", "float32"):
        for family in FAMILIES:
            done = subprocess.run(
                [sys.executable, __file__, "--family", family, "--dtype", dtype,
                 "--steps", str(args.steps), "--meshes", *args.meshes],
                env={**os.environ, "XLA_FLAGS": flags}, stdout=subprocess.PIPE, check=True,
            )  # fmt: skip
            got = json.loads(done.stdout)
            single = np.array(got["losses"]["data=1"])
            for mesh in args.meshes[1:]:
                worst = float(np.abs(np.array(got["losses"][mesh]) / single - 1).max())
                rows.append({"family": family, "dtype": dtype, "mesh": mesh, "difference": worst,
                             "split_leaves": got["sharded"][mesh]})  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
            rows[-1]["first_and_last_loss"] = [single[0], single[-1]]
    out = {"command": "python experiments/sharding.py", "steps": args.steps, "rows": rows}
    RESULT.write_text(json.dumps({**out, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
