"""Which way of running the two recurrences is fastest here? (sets models/scan.py DEFAULT)

python experiments/benchmarks/scans.py [--repeats 7] [--out experiments/results/scans_cpu.json]
2 shared CPU cores, 9.5 minutes. Gradient against the plain scan (impl sequential): Mamba fused/16
0.5 to 0.7 of its time for batches, 1.2 for one long row; chunked 1.6 to 3.4, associative 3 to 5.
RWKV: sequential is best, chunked takes 2.3 to 4.8, unrolling by 8 1.4 to 2.2 of its time.
On a GPU the same command adds impl pallas (not yet run there), the shapes `WIDE` with bfloat16
inputs, and times over the floor: bytes in and out at the bandwidth of a measured copy. There the
backward pass is gradient minus forward, so keeping states for it and the loss are counted with it.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from delve_jax.models import scan

MIB = 2**20
# the proxies' training step, one wide layer, one long text
SHAPES = {
    "mamba": [(16, 256, 256, 16), (2, 1024, 1024, 16), (1, 2048, 512, 16)],  # B, T, E, N
    "wkv": [(16, 256, 128), (2, 1024, 1024), (1, 2048, 512)],  # B, T, A
}
# on a GPU also: one wide layer in bfloat16
WIDE = {"mamba": [(8, 4096, 4096, 16)], "wkv": [(8, 4096, 4096)]}
COPIED = 2**30  # bytes of the array whose copy gives the bandwidth
# implementation, chunk, unroll
WAYS = {
    "mamba": [
        ("sequential", 16, 1), ("sequential", 64, 1), ("fused", 8, 1), ("fused", 16, 1),
        ("fused", 64, 1), ("chunked", 16, 1), ("chunked", 64, 1), ("associative", 0, 1),
    ],
    "wkv": [
        ("sequential", 16, 1), ("sequential", 64, 1), ("sequential", 16, 8), ("chunked", 16, 1),
        ("chunked", 64, 1),
    ],
}  # fmt: skip
# only on a GPU: interpret mode's time says nothing. 0: the kernel's own chunk
KERNELS = {"mamba": [("pallas", 4, 1), ("pallas", 0, 1)], "wkv": [("pallas", 0, 1)]}


def inputs(name, shape, dtype=jnp.float32):
    """Random inputs in the range that trained models use; what has a T in `dtype`."""
    r = np.random.default_rng(0)
    normal = lambda *s: r.normal(size=s)  # noqa: E731
    if name == "mamba":
        B, T, E, N = shape
        dt = np.exp(r.uniform(-7, -2, size=(B, T, E)))
        A = -np.tile(np.arange(1.0, N + 1), (E, 1))
        args = (normal(B, T, E), dt, A, normal(B, T, N), normal(B, T, N), normal(E))
    else:
        B, T, A = shape
        args = (normal(B, T, A), normal(B, T, A), -np.exp(r.uniform(-5, 1, size=A)), normal(A))
    return tuple(jnp.asarray(a, dtype if a.ndim == 3 else jnp.float32) for a in args)


def copy_bandwidth():
    """Bytes a second of copying one array to another on this device: read and write counted."""
    x = jax.block_until_ready(jnp.zeros(COPIED // 4, jnp.float32))
    copy, calls, seconds = jax.jit(lambda a: a + 1), 10, []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(calls):  # queued: a launch is no part of a copy
            y = copy(x)
        jax.block_until_ready(y)
        seconds.append((time.perf_counter() - start) / calls)
    return 2 * COPIED / statistics.median(seconds[2:])


def floor_bytes(args):
    """Bytes that (forward, backward) must move: inputs and y; inputs, dy and all gradients."""
    given, y = sum(a.nbytes for a in args), args[0].nbytes
    return given + y, 2 * given + y


def error(program, reference, args):
    """Largest difference of what two programs give, over the reference's largest number."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(program(*args)), reference, strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        worst = max(worst, float(jnp.abs(a - b).max() / jnp.abs(b).max()))
    return worst


def compiled(name, way, args, gradient):
    """The compiled program, how long that took [s], and its scratch memory [MiB]."""
    impl, chunk, unroll = way
    run = functools.partial(
        scan.selective_scan if name == "mamba" else scan.wkv, impl=impl, chunk=chunk or None
    )
    loss = lambda *a: jnp.sum(jnp.sin(run(*a)[0].astype(jnp.float32)))  # noqa: E731
    fn = jax.grad(loss, argnums=tuple(range(len(args)))) if gradient else lambda *a: run(*a)[0]
    where, before = scan._platform(), dict(scan.UNROLL)
    scan.UNROLL[where] = unroll
    start = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile()
    seconds = time.perf_counter() - start
    scan.UNROLL.update(before)
    return program, seconds, program.memory_analysis().temp_size_in_bytes / MIB


def measure(name, shape, repeats, dtype=jnp.float32, bandwidth=None):
    """One row per way; the ways take turns, so that a busy machine slows all of them alike.

    With a `bandwidth` (a GPU) the kernels take part and rows say their times over the floor. A way
    that does not fit into the memory has its error in its row and no times.
    """
    args = inputs(name, shape, dtype)
    ways = WAYS[name] + (KERNELS[name] if bandwidth else [])
    rows = [
        {
            "recurrence": name, "shape": shape, "dtype": jnp.dtype(dtype).name,
            "impl": i, "chunk": c, "unroll": u,
        }
        for i, c, u in ways
    ]  # fmt: skip
    for kind in ("forward", "gradient"):
        programs, reference = {}, None
        for k, (row, way) in enumerate(zip(rows, ways, strict=True)):
            try:
                program, row[f"{kind}_compile_s"], row[f"{kind}_temp_mib"] = compiled(
                    name, way, args, kind == "gradient"
                )
                if reference is None:  # the plain scan, where it fits
                    reference = jax.tree.leaves(program(*args))
                row[f"{kind}_error"] = error(program, reference, args)
                programs[k] = program
            except jax.errors.JaxRuntimeError as failure:
                row[f"{kind}_failed"] = str(failure).splitlines()[0][:200]
        del reference
        times = {k: [] for k in programs}
        for _ in range(repeats):
            for k, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*args))
                times[k].append(1e3 * (time.perf_counter() - start))
        for k, seen in times.items():
            rows[k][f"{kind}_ms"] = statistics.median(seen)
            rows[k][f"{kind}_ms_all"] = [round(t, 3) for t in seen]
    if bandwidth:
        forward_ms, backward_ms = (1e3 * n / bandwidth for n in floor_bytes(args))
        for row in rows:
            if "gradient_ms" in row and "forward_ms" in row:
                row["forward_over_floor"] = row["forward_ms"] / forward_ms
                row["backward_over_floor"] = (row["gradient_ms"] - row["forward_ms"]) / backward_ms
    return rows


def table(rows):
    """The rows as text; `x` is the gradient's time over the fastest one's of the same shape."""
    best = {}
    for row in rows:
        key = (row["recurrence"], row["shape"])
        best[key] = min(best.get(key, np.inf), row.get("gradient_ms", np.inf))
    lines = [
        f"{'recurrence':10} {'shape':18} {'impl':12} {'chunk':>5} {'unroll':>6}"
        f" {'fwd ms':>8} {'grad ms':>8} {'x':>5} {'grad MiB':>8} {'compile s':>9}"
    ]
    for row in rows:
        told = lambda key, row=row: row.get(key, np.nan)  # noqa: E731
        ratio = told("gradient_ms") / best[row["recurrence"], row["shape"]]
        chosen = (row["impl"], row["chunk"]) == scan.DEFAULT[scan._platform()][row["recurrence"]]
        lines.append(
            f"{row['recurrence']:10} {'x'.join(map(str, row['shape'])):18} {row['impl']:12}"
            f" {row['chunk'] or '-':>5} {row['unroll']:6} {told('forward_ms'):8.1f}"
            f" {told('gradient_ms'):8.1f} {ratio:5.2f} {told('gradient_temp_mib'):8.1f}"
            f" {told('gradient_compile_s'):9.1f}"
            + (" <- default" if chosen and row["unroll"] == scan.UNROLL[scan._platform()] else "")
            + "".join(
                f" {kind} {row[f'{kind}_over_floor']:.1f} x floor"
                for kind in ("forward", "backward")
                if f"{kind}_over_floor" in row
            )
        )
    return "\n".join(lines)


def main():
    where = jax.default_backend()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="at least 5; medians are reported")
    parser.add_argument("--out", type=Path, default=Path(f"experiments/results/scans_{where}.json"))
    flags = parser.parse_args()
    load, start, rows = os.getloadavg()[0], time.time(), []
    bandwidth = copy_bandwidth() if where == "gpu" else None
    for name, shapes in SHAPES.items():
        cases = [(shape, jnp.float32) for shape in shapes]
        if where == "gpu":
            cases += [(shape, jnp.bfloat16) for shape in WIDE[name]]
        for shape, dtype in cases:
            new = measure(name, shape, flags.repeats, dtype, bandwidth)
            rows += new
            print(table(new), flush=True)
    result = {
        "command": "python " + " ".join(sys.argv),
        "versions": {
            "python": platform.python_version(), "jax": jax.__version__,
            "jaxlib": jaxlib.__version__, "numpy": np.__version__,
        },
        "machine": {
            "platform": where, "device": jax.devices()[0].device_kind, "cores": os.cpu_count(),
            "load_before": load, "load_after": os.getloadavg()[0],
            "copy_bytes_per_second": bandwidth,
        },
        "minutes": round((time.time() - start) / 60, 1),
        "default": scan.DEFAULT,
        "rows": rows,
    }  # fmt: skip
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{flags.out}: {len(rows)} rows in {result['minutes']} minutes, load {load:.1f}")


if __name__ == "__main__":
    main()
