"""Are weights loaded at the rate of a plain read, and does the command line start at once?

taskset -c 0,1 python experiments/benchmarks/loading.py [--repeats 7] [--out ...]
Two CPU cores. `parents.load` of safetensors directories and of checkpoints, arrays on the device,
beside `read_bytes` of the same files; all in the page cache, sides in turn, float32 weights of 0.4
to 0.5 GB (and one directory of half of it in bfloat16, kept so). Bar: 0.7 of the plain read.
One reader instead of two (`parents.stock.READERS`), two calls of each in turn: qwen3 0.96 and 0.99
instead of 1.04 and 1.10, rwkv 0.75 and 0.65 instead of 0.88 and 0.78, bfloat16 0.38 and 0.71
instead of 0.80 and 1.00.
Start-up in processes of their own beside one that does nothing; bars: `import delve_jax` 0.3 s,
`delve --help` 0.5 s.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts

import contextlib
import dataclasses
import functools
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import decode
import jax
import jax.numpy as jnp
import numpy as np
from turns import add_row, arguments, bars, old_rows, summary, turns, write

from delve_jax import checkpoint, models, parents

D, DEEPER = 1024, 2  # times the layers of decode.py
BAR = 0.7
SECONDS = {"import": 0.3, "help": 0.5}
# name -> (family, dtype, whether it is a checkpoint of ours)
CASES = {
    **{f"{family}, safetensors": (family, "float32", False) for family in decode.FAMILIES},
    "neox, safetensors, bfloat16": ("neox", "bfloat16", False),
    "neox, checkpoint": ("neox", "float32", True),
    "delve, checkpoint": ("delve", "float32", True),
}
# start-up: what is run, and what must not have been imported when it ends
STARTS = {"import": "import delve_jax", "help": "from delve_jax import cli; cli.main(['--help'])"}
HEAVY = ("jax", "torch", "transformers", "orbax")


def made(family, dtype, ours, place):
    """Write the case's weights -> (directory, the parameters)."""
    cfg = decode.config(family, D)
    if family != "delve":
        cfg = dataclasses.replace(cfg, n_layers=DEEPER * cfg.n_layers, dtype=dtype)
    init = jax.jit(functools.partial(models.init_params, cfg))
    params = models.cast(init(jax.random.key(0)), jnp.dtype(dtype))
    if ours:
        return checkpoint.save(place / "weights", cfg, params), params
    return parents.export_stock(cfg, params, place / "weights"), params


def measure(name, repeats):
    """One row: the plain read of all weight files and our load, in turn."""
    family, dtype, ours = CASES[name]
    with tempfile.TemporaryDirectory(prefix="delve-loading-") as place:
        folder, params = made(family, dtype, ours, Path(place))
        files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != ".json"]
        size = sum(f.stat().st_size for f in files)

        def plain():
            for file in files:
                file.read_bytes()

        def load():
            with contextlib.redirect_stderr(io.StringIO()):  # what it says of memory
                return jax.block_until_ready(parents.load(folder, dtype=dtype)[1])

        seconds, given = turns({"plain read": plain, "load": load}, repeats)
    want = jax.tree.leaves_with_path(params)
    for (path, a), b in zip(want, jax.tree.leaves(given["load"]), strict=True):
        if a.dtype != b.dtype or not np.array_equal(np.asarray(a), np.asarray(b)):
            raise SystemExit(f"{name}: {jax.tree_util.keystr(path)} is not what was written")
    found = summary(seconds)
    return {
        "case": name, "dtype": dtype, "bytes": size, "files": len(files),
        "bar": None if ours else BAR,  # checkpoints check their sums and decompress: no bar
        "ratio": found["seconds"]["plain read"] / found["seconds"]["load"],
        "bytes_per_second": {side: size / s for side, s in found["seconds"].items()}, **found,
    }  # fmt: skip


def starts(repeats):
    """Seconds of processes that import the package and print the command line's help."""
    script = shutil.which("delve", path=str(Path(sys.executable).parent))
    commands = {
        "python alone": [sys.executable, "-c", "pass"],
        "import": [sys.executable, "-c", STARTS["import"]],
        "help": [script, "--help"] if script else [sys.executable, "-m", "delve_jax", "--help"],
    }
    for line in STARTS.values():
        check = (
            f"import sys\ntry:\n {line}\nexcept SystemExit:\n pass\n"
            f"sys.exit(' '.join(m for m in {HEAVY} if m in sys.modules) or 0)"
        )
        done = subprocess.run([sys.executable, "-c", check], text=True, capture_output=True)
        if done.returncode:
            raise SystemExit(f"{line}: imports {done.stderr.strip()}")

    def run(command):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    seconds, _ = turns({k: functools.partial(run, c) for k, c in commands.items()}, repeats)
    found = summary(seconds)
    return {"case": "start-up", "bars": SECONDS, "script": bool(script), **found}


def picture(rows, file):
    """Bars of load over plain read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loads = [r for r in rows if "ratio" in r]
    fig, ax = plt.subplots(figsize=(max(6, 1.4 * len(loads)), 3.6))
    labels = [r["case"].replace(", ", "\n") for r in loads]
    bars(ax, labels, {"load": [r["ratio"] for r in loads]}, "bytes/s, load / plain read",
         [r["bar"] for r in loads])  # fmt: skip
    fig.tight_layout()
    fig.savefig(file, dpi=150)


def main():
    every = (*CASES, "start-up")
    flags = arguments(__doc__, "loading_cpu", every, "CASE").parse_args()
    rows = old_rows(flags.out)
    for name in flags.only:
        make = functools.partial(measure, name, flags.repeats)
        if name == "start-up":
            make = functools.partial(starts, flags.repeats)
        rows = add_row(rows, ("case",), make)
        rows.sort(key=lambda r: every.index(r["case"]))
        write(flags.out, rows, page_cache="warm: both sides read the file before", seed=0,
              repeats=flags.repeats)  # fmt: skip
    loads = [r for r in rows if "ratio" in r]
    if loads:
        picture(rows, flags.out.with_suffix(".png"))
        print(f"{flags.out}: slowest load {min(r['ratio'] for r in loads):.2f} of a plain read")


if __name__ == "__main__":
    main()
