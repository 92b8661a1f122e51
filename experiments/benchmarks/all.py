"""Run every benchmark of this folder, one after the other, and make the tables anew.

taskset -c 0,1 python experiments/benchmarks/all.py [--only NAME ...]
Each script's docstring says its question, its cost and its result. compress_memory.py takes hours
and is run only when named. Leave the machine alone meanwhile: a row's `load` tells.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ("scans", "attention", "forms", "training", "prefill", "decode", "generate", "growth",
         "loading", "data", "loop", "memory", "planning")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=(*NAMES, "compress_memory"), default=NAMES)
    failed = []
    for name in parser.parse_args().only:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, HERE / f"{name}.py"], cwd=HERE.parents[1]).returncode:
            failed.append(name)
    subprocess.run([sys.executable, HERE.parent / "tables.py"], check=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
