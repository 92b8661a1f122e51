"""Does training take the memory that `delve plan` prints? Bar: at most 1.15 of it.

taskset -c 0,1 python experiments/benchmarks/memory.py [--out experiments/results/memory.json]
Two shared CPU cores, 9 minutes; a DELVE of 147 M parameters (state 1.6 GiB, teachers 0.8 GiB),
three steps of the real loop of 4 x 256 tokens. CE: planned 2.95 GiB, took 3.03 (1.03); CE + KL with
three dense teachers: planned 3.72, took 4.14 (1.11). Counted from after import and compilation,
heap trimmed.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts

import argparse
import ctypes
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from delve_jax import data, fuse, models, parallel, parents, plan, presets
from delve_jax.config import MambaConfig, NeoxConfig, RwkvConfig, from_json, to_json
from delve_jax.metrics import read_metrics, versions
from delve_jax.train import loop
from delve_jax.train.run import Settings, step_of

GIB = 2**30
V, D, KEEP, STEPS = presets.V, 512, 0.75, 3
SETTINGS = Settings(tokens=STEPS * 4 * 256, batch=4, window=256)


def config():
    """Three factored streams: with Adam's moments 1.6 GiB."""
    parents = {
        "mamba": MambaConfig(
            V, V, D, 16, tie_embeddings=True, d_inner=2 * D, dt_rank=D // 16
        ),
        "rwkv": RwkvConfig(V, V, D, 8, d_att=D, d_ffn=4 * D),
        "pythia": NeoxConfig(V, V, D, 8, n_heads=8, d_ffn=4 * D),
    }  # fmt: skip
    factored = [(n, presets._uniform(p, KEEP)) for n, p in parents.items()]
    return fuse.joint_config(factored, connectors="hub")


def status(field):
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def child(objective):
    """Run the real loop with a step compiled before, and print what it took [bytes]."""
    cfg, mesh = from_json(json.load(sys.stdin)), parallel.make_mesh("data=1")
    teachers = parents.dense_parents(cfg) if objective == "ce+kl" else ()
    step, arguments = step_of(cfg, teachers, SETTINGS, mesh)
    program = step.lower(*arguments).compile()

    def maker(of, seed):  # as run.pretrain makes weights; compiled here, run when it is called
        make = jax.jit(
            functools.partial(models.init_params, of),
            out_shardings=parallel.shardings(mesh, models.abstract_params(of)),
        )
        return functools.partial(make.lower(jax.random.key(0)).compile(), jax.random.key(seed))

    make, *make_teachers = (maker(of, k) for k, of in enumerate((cfg, *teachers)))
    rows = np.random.default_rng(0).integers(1, V, (4 * STEPS, SETTINGS.window + 1), np.int32)
    dataset = data.batches(rows, SETTINGS.batch, 0)
    loop.make_step = lambda *_: program  # the same function: only its compilation is left out

    ctypes.CDLL(None).malloc_trim(0)  # heap that compilation left free would hide an increase
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    frozen = ()
    if teachers:
        weights = jnp.full(len(teachers), 1 / len(teachers), jnp.float32)
        frozen = {"weights": weights, "teachers": tuple(made() for made in make_teachers)}
    with tempfile.TemporaryDirectory() as place:
        loop.fit(
            (models.abstract_params(cfg), make), None, dataset, SETTINGS.make_optimizer(STEPS),
            steps=STEPS, workdir=Path(place), frozen=frozen, mesh=mesh, log_every=1,
        )  # fmt: skip
        loss = [row["loss"] for row in read_metrics(Path(place) / "metrics.jsonl")]
    print(json.dumps({"before": before, "increase": status("VmHWM") - before, "loss": loss}))


def measure(cfg, objective):
    """Planned and measured bytes of one objective."""
    presets.PRESETS["benchmark"] = lambda: cfg
    planned = plan.plan("benchmark", SETTINGS, objective=objective)
    done = subprocess.run(
        [sys.executable, __file__, "--child", objective], input=json.dumps(to_json(cfg)),
        text=True, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    row = json.loads(done.stdout.splitlines()[-1])
    assert len(row["loss"]) == STEPS and np.isfinite(row["loss"]).all()
    want = planned["bytes_per_device"]
    return {
        "objective": objective, "parameters": planned["parameters"],
        "teacher_parameters": planned["teacher_parameters"], "planned": want, **row,
        "ratio": row["increase"] / want["peak"],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", choices=("ce", "ce+kl"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/memory.json"))
    flags = parser.parse_args()
    if flags.child:
        return child(flags.child)
    start, rows, cfg = time.time(), [], config()
    for objective in ("ce", "ce+kl"):
        rows.append(measure(cfg, objective))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": "taskset -c 0,1 python " + " ".join(sys.argv),
        "versions": versions(),
        "minutes": round((time.time() - start) / 60, 1),
        "batch": SETTINGS.batch, "window": SETTINGS.window, "steps": STEPS,
        "ratio": max(row["ratio"] for row in rows),
        "rows": rows,
        "config": to_json(cfg),
    }  # fmt: skip
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['objective']}: planned {row['planned']['peak'] / GIB:.2f} GiB, "
              f"took {row['increase'] / GIB:.2f} GiB, ratio {row['ratio']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
