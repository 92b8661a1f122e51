"""Own process: three healing steps of a small DELVE on one device and on a 4 x 2 mesh of eight."""

import json
import os
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from delve_jax import data, models, parallel  # noqa: E402
from delve_jax.config import DelveConfig, MambaConfig, NeoxConfig, RwkvConfig  # noqa: E402
from delve_jax.metrics import read_metrics  # noqa: E402
from delve_jax.train import objective, optim  # noqa: E402
from delve_jax.train.loop import fit  # noqa: E402

V = 64
SHARED = dict(vocab_size=V, vocab_rows=V, d_model=16, context_length=16)
PARENTS = (
    ("m", MambaConfig(**SHARED, n_layers=4, d_inner=32, dt_rank=2, tie_embeddings=True)),
    ("r", RwkvConfig(**SHARED, n_layers=2, d_att=16, d_ffn=32)),
    ("x", NeoxConfig(**SHARED, n_layers=2, n_heads=2, d_ffn=32, ranks=(("mlp/up", (4, 4)),))),
)
CFG = DelveConfig(PARENTS, 2, hub_rank=4)


def main():
    params = models.init_params(CFG, jax.random.key(0))
    teacher = PARENTS[2][1].__class__(**SHARED, n_layers=2, n_heads=2, d_ffn=32)
    frozen = {
        "weights": np.ones(1, np.float32),
        "teachers": (models.init_params(teacher, jax.random.key(1)),),
    }
    windows = np.random.default_rng(0).integers(0, V, (64, 17)).astype(np.int32)
    out, logs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for spec in ("data=1", "data=4,model=2"):
            mesh = parallel.make_mesh(spec)
            work = Path(folder) / spec
            out.append(
                fit(
                    params,
                    objective.healing(CFG, (teacher,)),
                    data.batches(windows, 8, 0),
                    optim.adamw(optim.wsd(1e-3, 3)),
                    steps=3,
                    workdir=work,
                    frozen=frozen,
                    mesh=mesh,
                    log_every=1,
                )  # fmt: skip
            )
            logs.append([m["loss"] for m in read_metrics(work / "metrics.jsonl")])
    leaves = [jax.tree.leaves(tree) for tree in out]
    diff = max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(*leaves, strict=True)
    )
    result = {
        "devices": jax.device_count(),
        "sharded_leaves": sum(not a.sharding.is_fully_replicated for a in leaves[1]),
        "max_loss_diff": float(np.abs(np.subtract(*logs)).max()),
        "max_param_diff": diff,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
