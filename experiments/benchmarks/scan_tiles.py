"""Which tiles and chunks make the scan kernels fast on a GPU? (sets models/kernels.py TUNED)

python experiments/benchmarks/scan_tiles.py [--only mamba wkv] [--repeats 5]
One GPU, one wide layer in bfloat16 (`scans.WIDE`). All variants are compiled first, side by side,
then timed one after the other with nothing else on the device: 10 queued calls a turn, medians.
`keep` is the forward pass that keeps states for the backward one.
"""

import concurrent.futures
import functools
import statistics
import threading
import time

import jax
import jax.numpy as jnp
import scans
from turns import add_row, arguments, old_rows, write

from delve_jax.models import kernels, scan

ALL_N = (1, 4, 4)  # a thread has all 16 of N
# forward tile, backward tile, tokens of a turn, tokens of a kept state, what reads ahead
VARIANTS = {
    "mamba": [
        ((1, 32, ALL_N), (1, 32, ALL_N), 8, 4, (False, False)),
        ((1, 32, ALL_N), (1, 32, ALL_N), 16, 2, (True, True)),
        ((1, 32, ALL_N), (4, 8, (4, 1, 4)), 4, 4, (False, False)),
        ((1, 128, ALL_N), (1, 128, ALL_N), 8, 4, (False, False)),
        ((2, 32, ALL_N), (2, 8, (4, 1, 4)), 4, 4, (False, False)),
    ],
    "wkv": [
        ((1, 32), (1, 32), 16, 8, (True, True)),
        ((1, 32), (1, 32), 16, 16, (True, True)),
        ((1, 32), (1, 32), 24, 4, (True, True)),
        ((1, 32), (1, 32), 16, 16, (False, False)),
        ((1, 128), (1, 128), 16, 8, (True, True)),
    ],
}
FIELDS = ("forward", "backward", "unroll", "chunk", "ahead")
CALLS = 10


def built(name, how, args, lock):
    """{what: (compiled program, seconds of compiling)} of a variant."""
    run = functools.partial({"mamba": scan.selective_scan, "wkv": scan.wkv}[name], impl="pallas")
    keep = jax.jit(lambda *a: jax.vjp(lambda *b: run(*b)[0], *a))
    with lock:  # the variant is read while it is traced
        kernels.TUNED[name] = how
        y, pull = jax.eval_shape(keep, *args)
        lowered = {
            "forward": jax.jit(lambda *a: run(*a)[0]).lower(*args),
            "keep": keep.lower(*args),
            "backward": jax.jit(lambda pull, dy: pull(dy)).lower(pull, y),
        }
    out = {}
    for what, program in lowered.items():
        start = time.perf_counter()
        out[what] = program.compile(), time.perf_counter() - start
    return out


def milliseconds(call, repeats):
    """Of one call, several times."""
    jax.block_until_ready(call())
    seen = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(CALLS):
            out = call()
        jax.block_until_ready(out)
        seen.append(1e3 * (time.perf_counter() - start) / CALLS)
    return seen


def measure(name, how, made, args, repeats, bandwidth):
    """One row."""
    y, pull = made["keep"][0](*args)
    calls = {
        "forward": lambda: made["forward"][0](*args),
        "keep": lambda: made["keep"][0](*args),
        "backward": lambda: made["backward"][0](pull, y),
    }
    all_ms = {what: milliseconds(call, repeats) for what, call in calls.items()}
    ms = {what: statistics.median(seen) for what, seen in all_ms.items()}
    floors = [1e3 * n / bandwidth for n in scans.floor_bytes(args)]
    return {
        "recurrence": name, "variant": how, "ms": ms, "ms_all": all_ms,
        "compile_s": {what: seconds for what, (_, seconds) in made.items()},
        "forward_over_floor": ms["forward"] / floors[0],
        "backward_over_floor": (ms["backward"] + ms["keep"] - ms["forward"]) / floors[1],
    }  # fmt: skip


def main():
    parser = arguments(__doc__, "scan_tiles_gpu", VARIANTS)
    flags = parser.parse_args()
    bandwidth, rows, lock = scans.copy_bandwidth(), old_rows(flags.out), threading.Lock()
    jobs = []
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for name in flags.only:
            args = scans.inputs(name, scans.WIDE[name][0], jnp.bfloat16)
            for values in VARIANTS[name]:
                how = dict(zip(FIELDS, values, strict=True))
                jobs.append((name, how, args, pool.submit(built, name, how, args, lock)))
    for name, how, args, job in jobs:
        make = functools.partial(measure, name, how, job.result(), args, flags.repeats, bandwidth)
        rows = add_row(rows, ("recurrence", "variant"), make)
        write(flags.out, rows, calls=CALLS, copy_bytes_per_second=bandwidth)


if __name__ == "__main__":
    main()
