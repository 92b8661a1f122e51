"""How long does `delve plan` compile, and does it say the same without XLA's fusion emitters?

taskset -c 0,1 python experiments/benchmarks/planning.py [--only NAME ...]
Two CPU cores, 7.5 minutes with --repeats 5; batches of 8 x 1,024 tokens of three presets, nothing
cached. Both sides are `plan.plan` with its child process, one with `plan.FLAGS`, one with the
emitters that are XLA's default. A row fails where their bytes per device are 1 kB apart.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # the child's too

import resource
import statistics

from turns import add_row, arguments, old_rows, summary, turns, write

from delve_jax import plan
from delve_jax.train.run import Settings

OFF = "--xla_cpu_use_fusion_emitters=false"
SIDES = {"ours": plan.FLAGS, "with emitters": plan.FLAGS.replace(OFF, "")}
SETTINGS = Settings(tokens=10**9, batch=8, window=1024)
NAMES = ("mamba-370m", "pythia-410m", "delve-0.4b")


def measure(preset: str, repeats: int) -> dict:
    """Seconds, CPU seconds and the bytes that both sides plan."""
    cpu = {side: [] for side in SIDES}

    def planned(side):
        plan.FLAGS = SIDES[side]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = plan.plan(preset, SETTINGS)["bytes_per_device"]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu[side].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return found

    seconds, given = turns({side: lambda s=side: planned(s) for side in SIDES}, repeats)
    apart = max(abs(given["ours"][k] - given["with emitters"][k]) for k in given["ours"])
    if apart >= 1000:
        raise SystemExit(f"{preset}: the plans are {apart:,} bytes apart")
    row = {"preset": preset, "bytes_per_device": given, "bytes_apart": apart, **summary(seconds)}
    row["cpu_seconds"] = {side: statistics.median(s[1:]) for side, s in cpu.items()}
    for name in ("seconds", "cpu_seconds"):
        row[f"ratio_of_{name}"] = row[name]["ours"] / row[name]["with emitters"]
    return row


def main():
    flags = arguments(__doc__, "planning_cpu", NAMES).parse_args()
    rows = old_rows(flags.out)
    for preset in flags.only:
        rows = add_row(rows, ("preset",), lambda: measure(preset, flags.repeats))  # noqa: B023
        write(flags.out, rows, batch=8, window=1024, repeats=flags.repeats)


if __name__ == "__main__":
    main()
