"""Missing cells of hybrid_curve.py and hybrid_parts.py side by side on one big accelerator.

Command: python experiments/hybrid_cells.py [--workers 12] [--cpu 4] [--sizes X ...] [--parts CELL
... ] [--seeds N ...]; repeat it to go on. Proxies leave a large GPU idle: --workers processes share
it, --cpu more compress parents together, which runs on the host. Rows go into the results of the
two studies one by one; afterwards run the studies: they find all rows and compute the intervals.
Without a GPU use one or two workers.
Measured: 66 cells in 470 s on one H200 with 12 workers and 4 for the host, by a longer script of
the same cells that also shared fits between workers; this one was run on a CPU alone.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import sys

import hybrid
import hybrid_curve
import hybrid_parts
import jax

from delve_jax import fuse
from delve_jax.config import DelveError

SHARED = {  # a new process reads these as it starts
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip


def begin(platform):
    """In a new process, before JAX looks for devices; what it prints goes to out/hybrid/log."""
    (hybrid.WORK / "log").mkdir(parents=True, exist_ok=True)
    log = os.open(hybrid.WORK / "log" / f"{os.getpid()}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    jax.config.update("jax_default_matmul_precision", "highest")
    if platform:
        jax.config.update("jax_platforms", platform)


def make(study, cell, seed):
    """One row."""
    if study == "hybrid_curve":
        kind, size = cell.split()
        fields = hybrid_curve.MAKERS[kind](int(float(size) * hybrid.LARGEST), seed)
    else:
        fields = hybrid_parts.make(cell, seed)
    return hybrid.as_row(cell, seed, fields)


def join(*task):
    """Parents compressed together, left in out/hybrid; nothing is handed back."""
    hybrid.together(*task)


@functools.cache
def budget(N, latents, names):
    """Parameters of the streams of a DELVE of N, as `hybrid.hybrid` has them."""
    streams = [(n, hybrid.dense(n)[0]) for n in names]
    return N - fuse.joints_count(fuse.joint_config(streams, latents, None, connectors="hub"))


def needs(study, cell, seed):
    """What must be there before: (tasks of `hybrid.together`, cells of the curve)."""
    if study == "hybrid_parts":
        built = hybrid_parts.CELLS[cell][0]
        names = built.get("names", hybrid.NAMES)
        size = budget(built.get("N", hybrid_parts.N), built.get("latents", 1), names)
        same = {("hybrid_curve", "delve 1.25", seed)} if cell == "base" else set()
        return {(size, seed, names)}, same
    kind, size = cell.split()
    if kind == "delve":
        own = budget(int(float(size) * hybrid.LARGEST), 1, hybrid.NAMES)
        return {(own, seed, hybrid.NAMES)}, set()
    if kind == "ensemble":
        return set(), {(study, f"part-{n} {size}", seed) for n in hybrid.NAMES}
    return set(), set()


def run(cells, results, gpu, cpu):
    """Make all cells -> tasks that failed, with the cells that needed them.

    Of one seed and set of parents one joint compression runs at a time: all of them go on from the
    same folder.
    """
    waits = {c: set.union(*needs(*c)) for c in cells}
    joints = {j for c in cells for j in needs(*c)[0]}
    todo = {*cells, *joints}  # not yet done; what is neither running nor failed is still to start
    running, failed = {}, set()
    with hybrid.metrics.progress(len(cells), "cells", "cell") as bar:
        while True:
            for task in sorted(joints):
                started = task not in todo or task in running.values()
                if not started and task[1:] not in {t[1:] for t in running.values()}:
                    running[cpu.submit(join, *task)] = task
            for task in cells:
                started = task not in todo or task in running.values()
                if not started and not waits[task] & todo:
                    running[gpu.submit(make, *task)] = task
            if not running:
                return failed
            done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in done:
                task, error = running.pop(future), future.exception()
                todo.discard(task)
                if isinstance(error, concurrent.futures.BrokenExecutor):
                    raise DelveError(
                        "a worker died, maybe for want of memory: repeat with fewer --workers"
                    )
                if error:
                    print(f"{task}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    lost = {task, *(c for c in cells if c in todo and task in waits[c])}
                    failed |= lost
                    todo -= lost
                elif task in waits:
                    results[task[0]].rows.append(future.result())
                    results[task[0]].save()
                bar.update(task in waits)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=12, help="processes that heal and score")
    parser.add_argument("--cpu", type=int, default=4, help="processes that compress together")
    parser.add_argument("--sizes", nargs="*", type=float, default=hybrid_curve.SIZES, metavar="X")
    parser.add_argument("--only", nargs="+", choices=hybrid_curve.MAKERS, metavar="KIND",
                        default=list(hybrid_curve.MAKERS), help="of the curve")  # fmt: skip
    parser.add_argument("--parts", nargs="*", choices=hybrid_parts.CELLS, metavar="CELL",
                        default=list(hybrid_parts.CELLS))  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=hybrid.SEEDS, metavar="N")
    args = parser.parse_args()
    if min(args.workers, args.cpu) < 1:
        raise DelveError("--workers and --cpu: at least 1")
    results = {
        "hybrid_curve": hybrid.Results("hybrid_curve", "python experiments/hybrid_curve.py",
                                       largest=hybrid.LARGEST),
        "hybrid_parts": hybrid.Results("hybrid_parts", "python experiments/hybrid_parts.py",
                                       parameters=hybrid_parts.N),
    }  # fmt: skip
    wanted = [
        *(("hybrid_curve", f"{kind} {size:g}", seed)
          for seed in args.seeds for size in args.sizes for kind in args.only),
        *(("hybrid_parts", cell, seed) for seed in args.seeds for cell in args.parts),
    ]  # fmt: skip
    stand = {(study, r["cell"], r["seed"]) for study, x in results.items() for r in x.rows}
    cells = [c for c in wanted if c not in stand]
    os.environ |= SHARED
    jax.config.update("jax_platforms", "cpu")  # of this process alone, which computes nothing
    spawn = multiprocessing.get_context("spawn")
    pool = functools.partial(concurrent.futures.ProcessPoolExecutor, mp_context=spawn,
                             initializer=begin)  # fmt: skip
    with pool(args.workers, initargs=("",)) as gpu, pool(args.cpu, initargs=("cpu",)) as cpu:
        failed = run(cells, results, gpu, cpu)
    if failed:
        raise DelveError(f"{len(failed)} tasks failed, see above; repeat the command to go on")


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
