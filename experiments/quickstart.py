"""The main job on the embedded proxy parents: compress, fuse, heal, evaluate, export, reload.

Command: make quickstart (or `delve upcycle`, which this calls; flags are passed on). With --record
the report and its time become experiments/results/quickstart.json and the README's table.
Expected: the numbers at the top of README.md. Needs no network and no ../shared: its text is the
running Python's own standard library, split by document hash.
"""

import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import tables

from delve_jax import cli

ROOT = Path(__file__).resolve().parents[1]


def main(flags: list[str]) -> int:
    """Run the road; the time is everything after installation, compilation included."""
    record = "--record" in flags
    flags = [f for f in flags if f != "--record"]
    if "--out" not in flags:
        flags += ["--out", str(ROOT / "out" / "quickstart")]
    out = Path(flags[flags.index("--out") + 1])
    began = time.time()
    code = cli.main(["upcycle", *flags])
    seconds = time.time() - began
    print(f"[quickstart] {seconds:.0f} s; picture: {out / 'report.png'}", file=sys.stderr)
    if record and code == 0:
        report = json.loads((out / "report.json").read_text())
        report |= {
            "seconds": round(seconds),
            "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
            "make": " ".join(["make quickstart ARGS=--record", *flags[:-2]]).strip(),
        }
        report["command"]["parents"] = [Path(p).name for p in report["command"]["parents"]]
        results = ROOT / "experiments" / "results"
        (results / "quickstart.json").write_text(json.dumps(report, indent=1) + "\n")
        shutil.copy(out / "report.png", results / "quickstart.png")
        tables.main([])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
