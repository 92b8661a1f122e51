"""Is one layer all that `delve compress` holds? Bars: 6 GiB at 1.4 B, 8 GiB for a block of 7B.

python experiments/benchmarks/compress_memory.py [--only ROW ...] [--fresh] [--accelerator N]
Parents have the real shapes, random weights and Hugging Face's files, made here in a temporary
folder. mamba-1.4b: all 48 layers are in the files, 6 are run, and the times of 48 are extrapolated;
the 7B parents have one layer and both tables. Keep 0.5, 4,096 calibration tokens (7B: 1,024; their
activations are on disk), the command line in a process of its own: ru_maxrss is its peak, of which
`anonymous` is what it really holds and `mapped` files that the system can drop. Rows that stand in
the results are not run again. --accelerator runs N layers of mamba-1.4b (48: all) on JAX's default
device with the command line's own 65,536 tokens; its rows go to results/compress_accelerator.json.
Stages are printed as they end; a row has their seconds, of which compiling, how often each ran, and
the median of its layers, which is what the layers that were not run would take (`per_layer`).
Result: mamba-1.4b 3.56 GiB, 7B blocks at most 7.53 GiB; 264 s on an H200. Rows
that were stopped before their end: results/compress_memory_tries.json.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np

from delve_jax import checkpoint, metrics, parents, presets
from delve_jax.parents import stock
from delve_jax.parents.io import write_safetensors

RESULTS = Path(__file__).resolve().parents[1] / "results" / "compress_memory.json"
GIB = 2**30
ACCELERATOR = RESULTS.with_name("compress_accelerator.json")
KEEP, TOKENS, WHOLE = 0.5, 65_536, "mamba-1.4b"  # TOKENS: the default of `delve compress`
BAR_SECONDS = 240  # of the whole WHOLE on an accelerator
# row: (preset, layers in the files, layers that are run, calibration tokens, bar in GiB)
ROWS = {
    "mamba-1.4b": ("mamba-1.4b", 48, 6, 4096, 6),
    "mamba-7b-rw, one block": ("mamba-7b-rw", 1, 1, 1024, 8),
    "rwkv-4-7b, one block": ("rwkv-4-7b", 1, 1, 1024, 8),
    "redpajama-incite-7b, one block": ("redpajama-incite-7b", 1, 1, 1024, 8),
}


# ---- a parent of random weights ------------------------------------------------------------------


def values(path, shape, rng):
    """Values of the size that a model starts from, so that activations stay of order one."""
    name = path.rsplit("/", 1)[-1]
    if name in ("scale", "D"):
        return np.ones(shape, np.float32)
    if name == "A_log":
        return np.broadcast_to(np.log(np.arange(1, shape[1] + 1, dtype=np.float32)), shape)
    if name == "time_decay":
        return rng.uniform(-5, 1, shape).astype(np.float32)
    if name.startswith("mix_"):
        return rng.uniform(0, 1, shape).astype(np.float32)
    if name == "bias":
        return np.full(shape, -4.0 if "dt_proj" in path else 0.0, np.float32)
    x = rng.standard_normal(shape, np.float32)
    x *= 0.02 if path.startswith("embed") else 1 / math.sqrt(shape[-1])
    return x


def make(folder, preset, layers, tokens):
    """Write the parent, its tokenizer and a text of its words; -> bytes of the weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    cfg = dataclasses.replace(presets.preset(preset), n_layers=layers)
    dtype, rows = np.dtype(cfg.dtype), stock.FAMILIES[cfg.family].rows(cfg)
    owner = {
        row.name.format(i=i): row for row in rows for i in (range(layers) if row.stacked else (0,))
    }

    def tensor(name):
        row = owner[name]
        return values(row.path, row.shape, np.random.default_rng(zlib.crc32(name.encode()))).astype(
            dtype
        )

    folder.mkdir()
    write_safetensors(folder, [(n, row.shape, dtype) for n, row in owner.items()], tensor)
    (folder / "config.json").write_text(json.dumps(stock.hf_config(cfg, cfg.dtype)))
    words = {f"w{i}": i for i in range(cfg.vocab_size)}
    tok = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "tokenizer.json").write_text(tok.to_str())
    ids = np.random.default_rng(0).zipf(1.2, 2 * tokens) % cfg.vocab_size
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


# ---- the process that is measured ----------------------------------------------------------------


def status():
    """Bytes of anonymous and of file-mapped memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return 1024 * int(found["RssAnon"]), 1024 * int(found["RssFile"])


class Clock:
    """Seconds, layers and the largest anonymous memory of every stage that has a bar."""

    def __init__(self):
        self.stages, self.now, self.peak, self.mapped = {}, "start", {}, 0
        self.compiling, self.calls = 0.0, {}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while True:
            anonymous, mapped = status()
            self.peak[self.now] = max(self.peak.get(self.now, 0), anonymous)
            self.mapped = max(self.mapped, mapped)
            time.sleep(0.02)

    def compiled(self, event, seconds, **_):
        """What JAX tells of its compiler."""
        if event == "/jax/core/compile/backend_compile_duration":
            self.compiling += seconds

    def inside(self, module, name):
        """Count the calls of a function of the package, and their seconds."""
        real, key = getattr(module, name), f"{module.__name__.split('.')[-1]}.{name}"
        self.calls[key] = 0, 0.0

        def timed(*args, **more):
            start = time.time()
            try:
                return real(*args, **more)
            finally:
                calls, seconds = self.calls[key]
                self.calls[key] = calls + 1, round(seconds + time.time() - start, 2)

        setattr(module, name, timed)

    def stage(self, name, layers=0):
        """A context of this name."""
        clock = self

        class Stage:
            def __enter__(self):
                clock.now = name
                self.start, self.cpu = time.time(), time.process_time()
                self.compiling, self.ticks = clock.compiling, [self.start]
                return self

            def update(self, n=1):
                self.ticks.append(time.time())
                if layers:
                    print(f"{name}: {self.ticks[-1] - self.start:.1f} s", file=sys.stderr,
                          flush=True)  # fmt: skip

            def __exit__(self, *_):
                clock.now = f"after {name}"
                seconds, cpu = time.time() - self.start, time.process_time() - self.cpu
                each = [b - a for a, b in itertools.pairwise(self.ticks)]
                median = statistics.median(each) if len(each) > 2 else seconds / max(layers, 1)
                facts = {
                    "seconds": seconds, "cpu_seconds": cpu, "calls": 1,
                    "compile_seconds": clock.compiling - self.compiling,
                    "per_layer": median if layers else 0.0,
                }  # fmt: skip
                before = clock.stages.get(name, {})  # "assemble" and "check" come several times
                sums = {key: round(a + before.get(key, 0), 2) for key, a in facts.items()}
                clock.stages[name] = sums | {"layers": layers}
                print(f"{name}: {seconds:.1f} s of {sums}, {clock.calls}, "
                      f"anonymous {clock.peak.get(name, 0) / GIB:.2f} GiB, peak "
                      f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB:.2f} GiB",
                      file=sys.stderr, flush=True)  # fmt: skip

        return Stage()


def child(src, dst, run, tokens):
    """Compress with `run` layers and print what it took."""
    import jax

    from delve_jax import cli
    from delve_jax.compress import behind, device, factorize

    clock, opened, save = Clock(), parents.open_layers, checkpoint.save
    jax.monitoring.register_event_duration_secs_listener(clock.compiled)
    for module, names in ((device, ("two_sided", "anchored", "eigh")), (behind, ("_next",)),
                          (factorize, ("eigh", "factor"))):  # fmt: skip
        for name in names:
            clock.inside(module, name)

    def first_layers(src):
        source = opened(src)
        source.cfg = dataclasses.replace(source.cfg, n_layers=run)
        return source

    def timed_save(*args, **more):
        with clock.stage("save", run):
            return save(*args, **more)

    parents.open_layers, checkpoint.save = first_layers, timed_save
    metrics.progress = lambda total, desc, unit="step", hide=False: clock.stage(
        desc, run if unit == "layer" else 0
    )
    start = time.time()
    code = cli.main(["compress", src, dst, "--keep", str(KEEP), "--calibrate", f"{src}/text.txt",
                     "--calibrate-tokens", str(tokens)])  # fmt: skip
    print(json.dumps({
        "exit": code,
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - start, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_rss": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "peak_anonymous": max(clock.peak.values()),
        "peak_mapped": clock.mapped,
        "anonymous_by_stage": clock.peak,
        "stages": clock.stages,
        "calls": {name: list(of) for name, of in clock.calls.items()},
        "peak_device": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }))  # fmt: skip
    return code


# ---- rows ----------------------------------------------------------------------------------------


def measure(name, place, row=None):
    """One row of the results; `row`, like one of ROWS, runs on JAX's default device."""
    preset, layers, run, tokens, bar = row or ROWS[name]
    src, dst = place / "parent", place / "small"
    size = make(src, preset, run if row else layers, tokens)
    env = os.environ if row else {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(src), str(dst), str(run),
         str(tokens)],
        stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name}: exit {done.returncode}")
    out = json.loads(done.stdout.splitlines()[-1])
    facts = json.loads((dst / "compress.json").read_text())

    def all_layers(which):
        """Stages that go through layers grow with them; the rest stays what it is."""
        if which == "seconds":  # a first layer compiles, and some stages end with other work
            each = sum(s["per_layer"] for s in out["stages"].values())
            return round(out[which] + each * (layers - run))
        growing = sum(s[which] for s in out["stages"].values() if s["layers"])
        return round(out[which] + growing * (layers - run) / run)

    return {
        "row": name, "preset": preset, "layers": layers, "layers_run": run, "file_bytes": size,
        "keep": KEEP, "tokens": tokens, "bar": bar * GIB, "met": out["peak_rss"] < bar * GIB, **out,
        "seconds_all_layers": all_layers("seconds"),
        "cpu_seconds_all_layers": all_layers("cpu_seconds"),
        "parameters_run": facts["parameters_before"], "kl": facts["measured"]["kl"],
        "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
        "versions": metrics.versions(),
    }  # fmt: skip


def accelerated(run):
    """One row more of the time that an accelerator takes for `run` layers of WHOLE."""
    preset, layers, _, _, bar = ROWS[WHOLE]
    with tempfile.TemporaryDirectory(prefix="delve-memory-") as place:
        row = measure(f"{WHOLE}, {run} layers", Path(place), (preset, layers, run, TOKENS, bar))
    row |= {"bar_seconds": BAR_SECONDS, "met": row["seconds_all_layers"] <= BAR_SECONDS}
    known = json.loads(ACCELERATOR.read_text())["rows"] if ACCELERATOR.exists() else []
    rows = [r for r in known if r["row"] != row["row"]] + [row]
    command = f"python experiments/benchmarks/compress_memory.py --accelerator {run}"
    ACCELERATOR.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    print(f"{row['row']} on {row['device']}: {row['seconds']:.0f} s, all {layers} layers "
          f"{row['seconds_all_layers']} s (bar {BAR_SECONDS})")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--fresh", action="store_true", help="run rows anew that stand there")
    parser.add_argument("--accelerator", type=int, metavar="N", help="layers to run there")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        return child(*flags.child[:2], *map(int, flags.child[2:]))
    if flags.accelerator:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit ends the child too
        return accelerated(flags.accelerator)
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    for name in flags.only:
        if not flags.fresh and any(row["row"] == name for row in result["rows"]):
            continue
        with tempfile.TemporaryDirectory(prefix="delve-memory-") as place:
            row = measure(name, Path(place))
        rows = [r for r in result["rows"] if r["row"] != name] + [row]
        rows.sort(key=lambda r: list(ROWS).index(r["row"]))
        result = {"command": "python experiments/benchmarks/compress_memory.py", "rows": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for r in result["rows"]:
        print(f"{r['row']}: peak {r['peak_rss'] / GIB:.2f} GiB (anonymous "
              f"{r['peak_anonymous'] / GIB:.2f}), bar {r['bar'] / GIB:.0f}; {r['seconds']:.0f} s, "
              f"{r['cpu_seconds']:.0f} CPU s; all {r['layers']} layers about "
              f"{r['cpu_seconds_all_layers'] / 3600:.1f} CPU h")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
