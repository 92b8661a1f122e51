"""Kill a training run again and again, on changing numbers of devices: is the result the same?

Question: does a run that is killed (SIGKILL, also while it saves) at random moments and started
again on 8, 4 and 2 devices end with the parameters of the run that was left alone, and does a run
of two processes equal one process, and end when one of the two dies?
Command: python experiments/interruption.py [--kills 20]; about 10 minutes on 2 cores.
Result: experiments/results/interruption.json. `--worker` is one process of such a run.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "experiments" / "results" / "interruption.json"
STEPS, BATCH, WINDOW = 120, 16, 16
MESHES = {8: "data=4,model=2", 4: "data=4", 2: "data=2"}


def worker(args) -> None:
    """`delve train` of a tiny NeoX on its share of the devices."""
    import delve_jax
    from delve_jax import data, presets
    from delve_jax.config import NeoxConfig
    from delve_jax.train.loop import Saving

    presets.PRESETS["tiny"] = lambda: NeoxConfig(
        vocab_size=256, vocab_rows=256, d_model=16, n_layers=2, n_heads=4, d_ffn=32,
        context_length=WINDOW,
    )  # fmt: skip
    if args.die is not None:
        plain = data.pipeline.batches

        def dying(*a, **kw):
            def one(i, rows):
                if i == args.die:
                    os.kill(os.getpid(), signal.SIGKILL)
                return rows

            return plain(*a, **kw).map_with_index(one)

        data.pipeline.batches = dying
    settings = delve_jax.Settings(
        tokens=args.steps * BATCH * WINDOW, batch=BATCH, window=WINDOW, lr=3e-3,
        compute="float64" if os.environ.get("JAX_ENABLE_X64") else "float32",
        saving=Saving(every=args.save_every),
    )  # fmt: skip
    try:
        delve_jax.train("tiny", args.out, settings, text=[args.text], mesh=args.mesh,
                        distributed=args.distributed)  # fmt: skip
    except delve_jax.DelveError as err:
        sys.exit(f"error: {err}")


def start(out: Path, devices: int, *, x64=False, distributed="off", mesh=None, **flags):
    """A worker process; its output goes to OUT.log."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = (
        f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    )
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".studies" / "jax"))
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    if x64:
        env["JAX_ENABLE_X64"] = "1"
    text = out.parent / "text.txt"
    if not text.exists():
        text.write_text((ROOT / "LICENSE").read_text())
    command = [sys.executable, __file__, "--worker", "--out", str(out), "--text", str(text),
               "--mesh", mesh or MESHES[devices], "--distributed", distributed]  # fmt: skip
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT)


def result(out: Path, x64=False):
    """({path: array}, [(step, loss)]) of a finished run; read in a process of its own."""
    code = (
        "import sys, numpy as np, jax; from delve_jax import checkpoint, parallel;"
        "cfg, p = checkpoint.restore(sys.argv[1]);"
        "np.savez(sys.argv[2], **{parallel.path_of(k): np.asarray(v)"
        " for k, v in jax.tree_util.tree_flatten_with_path(p)[0]})"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **({"JAX_ENABLE_X64": "1"} if x64 else {})}
    subprocess.run([sys.executable, "-c", code, str(out), f"{out}.npz"], check=True, env=env)
    import numpy as np

    from delve_jax.metrics import read_metrics

    lines = [(m["step"], m["loss"]) for m in read_metrics(out / "metrics.jsonl")]
    return dict(np.load(f"{out}.npz")), lines


def difference(a, b) -> dict:
    """How far two results are apart: parameters (relative to the largest of each) and losses."""
    import numpy as np

    worst = max(float(np.abs(a[0][k] - b[0][k]).max() / np.abs(b[0][k]).max()) for k in b[0])
    losses = max(abs(x - y) / y for (_, x), (_, y) in zip(a[1], b[1], strict=True))
    assert [s for s, _ in a[1]] == [s for s, _ in b[1]], "a step is missing or logged twice"
    return {"parameters": worst, "losses": losses}


def reached(out: Path) -> int:
    """The last step that a run has logged or saved."""
    partial = out.with_name(out.name + ".partial")
    steps = [int(p.name[:8]) for p in (partial / "state").glob("0*") if p.name[:8].isdigit()]
    try:
        lines = (partial / "metrics.jsonl").read_text().splitlines()
        steps += [json.loads(line)["step"] for line in lines[-1:]]
    except (OSError, ValueError):
        pass
    return max(steps, default=0)


def killed_run(out: Path, kills: int, devices: list[int], rng, steps: int, x64=False) -> dict:
    """Run to the end through `kills` SIGKILLs at random steps, devices taking turns."""
    done, while_saving = 0, 0
    while True:
        count = devices[done % len(devices)]
        process = start(out, count, x64=x64, save_every=3, steps=steps)
        if done >= kills:
            if process.wait():
                raise SystemExit(
                    f"{out}: the run was lost\n" + Path(f"{out}.log").read_text()[-2000:]
                )
            return {"kills": done, "while_saving": while_saving}
        goal = reached(out) + rng.randint(1, max(1, 2 * steps // kills // 2))
        goal = min(goal, steps - 2)
        while process.poll() is None and reached(out) < goal:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)  # some fall into a save, some between
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            state = out.with_name(out.name + ".partial") / "state"
            while_saving += bool(list(state.glob("*.orbax-checkpoint-tmp*")))
            done += 1
            print(f"{out.name}: kill {done} at step {reached(out)} on {count} devices",
                  file=sys.stderr, flush=True)  # fmt: skip
        elif process.returncode:
            raise SystemExit(f"{out}: the run was lost\n" + Path(f"{out}.log").read_text()[-2000:])
        else:
            return {"kills": done, "while_saving": while_saving}


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def two_processes(out: Path, mesh: str, steps: int, x64=False, die: int | None = None) -> dict:
    """2 x 4 devices over one coordinator; with `die` process 1 is lost at that batch."""
    address, began = free_address(), time.time()
    both = [
        start(out, 4, x64=x64, distributed=f"{address},2,{i}", mesh=mesh, steps=steps,
              **({"die": die} if die is not None and i == 1 else {}))
        for i in range(2)
    ]  # fmt: skip
    both[1].wait()
    lost = time.time()
    codes = [p.wait(timeout=300) for p in both]
    return {"codes": codes, "seconds": round(time.time() - began),
            "seconds_after_the_loss": round(time.time() - lost)}  # fmt: skip


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", choices=("same", "across", "processes", "death"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.name}")
    worker_flags = parser.add_argument_group("worker")
    worker_flags.add_argument("--worker", action="store_true")
    for name in ("out", "text", "mesh", "distributed"):
        worker_flags.add_argument(f"--{name}")
    worker_flags.add_argument("--save-every", type=int, default=4)
    worker_flags.add_argument("--die", type=int)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args)
    work, rng, found = Path(tempfile.mkdtemp()), random.Random(args.seed), {}
    if args.only in (None, "same"):
        start(work / "left", 8, steps=args.steps).wait()
        facts = killed_run(work / "same", args.kills, [8], rng, args.steps)
        apart = difference(result(work / "same"), result(work / "left"))
        found["killed, 8 devices, float32"] = facts | apart
    if args.only != "same":
        start(work / "left64", 8, x64=True, steps=args.steps).wait()
        alone = result(work / "left64", True)
    if args.only in (None, "across"):
        facts = killed_run(work / "across", args.kills, [8, 4, 2], rng, args.steps, True)
        found["killed, 8, 4, 2 devices in turn, float64"] = facts | difference(
            result(work / "across", True), alone
        )
    if args.only in (None, "processes"):
        for mesh in ("data=8", "data=4,model=2", "model=8"):
            out = work / f"two-{mesh}".replace("=", "").replace(",", "-")
            facts = two_processes(out, mesh, args.steps, x64=True)
            found[f"2 processes x 4, {mesh}, float64"] = facts | difference(
                result(out, True), alone
            )
    if args.only in (None, "death"):
        out, die = work / "death", args.steps // 3
        facts = two_processes(out, "data=8", args.steps, x64=True, die=die)
        facts["state_left"] = reached(out)
        start(out, 8, x64=True, steps=args.steps, mesh="data=4").wait()  # one process goes on
        found["process 1 of 2 dies, one goes on, float64"] = facts | difference(
            result(out, True), alone
        )
    from delve_jax.metrics import versions

    command = "python experiments/interruption.py " + " ".join(sys.argv[1:])
    record = {"command": command, "seed": args.seed, "steps": args.steps, "rows": found}
    record["versions"] = versions()
    if args.record:
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
