"""How much of the accelerator does a training step use? (model FLOPs utilisation, one row a case)

python experiments/benchmarks/mfu.py --sweep --attention cudnn --remat layer dots --batch 8
The step is that of a run (`train.run.step_of`): bfloat16 activations, float32 weights, AdamW, from
random weights on random ids of one document a row, a constant rate. FLOPs a token by
`plan.train_flops`: 3 times forward (2 a weight that a token meets, attention over the full T, the
scans), teachers' forward once; nothing that is recomputed, no lookups, of factored maps the
factors'. `mfu_causal` counts half the attention, which is what a causal kernel computes;
`mfu_6n` is PaLM's 6 N + 12 L H h T. Peak: `plan.DEVICES`. --trace (what each kernel took) costs
minutes a case.
"""

import argparse
import collections
import concurrent.futures
import functools
import gzip
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from delve_jax import fuse, models, parallel, plan, presets
from delve_jax.config import MambaConfig, NeoxConfig, Qwen3Config, RwkvConfig
from delve_jax.metrics import versions
from delve_jax.models import attention, scan
from delve_jax.parents.stock import dense_parents
from delve_jax.train import objective
from delve_jax.train.loop import init_state
from delve_jax.train.run import Settings, step_of

# preset, whether its dense parents teach, rows, T
CASES = {
    "qwen3-1b": ("delphi-1536", False, 8, 4096),  # 0.998 billion parameters
    "delve-0.4b": ("delve-0.4b", True, 16, 1024),
    "delve-0.4b-ce": ("delve-0.4b", False, 16, 1024),
    "mamba-370m": ("mamba-370m", False, 8, 2048),
    "rwkv-430m": ("rwkv-4-430m", False, 16, 1024),
    "pythia-410m": ("pythia-410m", False, 8, 2048),
    "pythia-1.4b": ("pythia-1.4b", False, 8, 2048),
}
ATTENTIONS = ("default", "cudnn", "blocks")
REMATS = ("auto", "none", "dots", "layer")
TINY_T = 32
READY = "compiled"
CHECK = (2, 1024, 8, 128)  # B, T, H, h of the attention that is compared with the plain form


def tiny(name):
    """A model of the case's family small enough for a CPU (the same code, no numbers)."""
    shared = {"vocab_size": 128, "vocab_rows": 128, "d_model": 32, "n_layers": 2}
    of = {
        "qwen3": Qwen3Config(**shared, n_heads=2, n_kv_heads=2, head_dim=16, d_ffn=64),
        "mamba": MambaConfig(**shared, d_inner=64, dt_rank=2, tie_embeddings=True),
        "rwkv": RwkvConfig(**shared, d_att=32, d_ffn=64),
        "pythia": NeoxConfig(**shared, n_heads=2, d_ffn=64),
    }
    family = name.split("-")[0]
    if family != "delve":
        return of[family]
    parts = [(n, presets._uniform(of[n], 0.9)) for n in ("mamba", "rwkv", "pythia")]
    return fuse.joint_config(parts)


def attention_flops(cfg, T):
    """Forward FLOPs a token of the attention's two products over the full T; 0 of recurrences."""
    if cfg.family == "delve":
        return sum(attention_flops(sub, T) for _, sub in cfg.streams)
    if cfg.family not in ("neox", "qwen3"):
        return 0
    h = cfg.head_dim if cfg.family == "qwen3" else cfg.d_model // cfg.n_heads
    return 4 * T * cfg.n_layers * cfg.n_heads * h


def flops(cfg, T, teachers):
    """FLOPs a token by three counts: `plan`'s, with half the attention, PaLM's."""
    ours = plan.train_flops(cfg, T, teachers)
    attend = 3 * attention_flops(cfg, T) + sum(attention_flops(t, T) for t in teachers)
    # N: parameters without those that are only looked up
    matter = lambda c: models.count(c) - (not c.tie_embeddings) * c.vocab_size * c.d_model  # noqa: E731
    palm = None if cfg.family == "delve" else 6 * matter(cfg) + 3 * attention_flops(cfg, T)
    return {"mfu": ours, "mfu_causal": ours - attend // 2, "mfu_6n": palm}


def peak_flops():
    """Dense bfloat16 FLOP/s of this device, or None where `plan` does not know it."""
    kind = jax.devices()[0].device_kind.lower()
    return next((rate for name, (rate, _) in plan.DEVICES.items() if name in kind), None)


def set_choices(flags):
    """The module constants that the flags name."""
    if flags.attention != "default":
        attention.DEFAULT[jax.default_backend()] = flags.attention
    if flags.scan != "default":
        places = ("cpu",) if jax.default_backend() == "cpu" else ("cuda", "accelerator")
        for ways in map(scan.DEFAULT.get, places):  # the kernels have chunks of their own
            own = flags.scan == "pallas"
            ways.update({n: (flags.scan, None if own else chunk) for n, (_, chunk) in ways.items()})
    if flags.logits_mib:
        objective.LOGITS_BYTES[jax.default_backend()] = flags.logits_mib * 2**20


def attention_error():
    """Relative distance of the chosen attention and its gradients from our own form in float32."""
    B, T, H, h = CHECK
    keys = jax.random.split(jax.random.key(0), 4)
    q, g = (jax.random.normal(k, (B, T, H, h), jnp.bfloat16) for k in keys[:2])
    k, v = (jax.random.normal(k, (B, H // 2, T, h), jnp.bfloat16) for k in keys[2:])
    documents_BT = (jnp.arange(T) // 300)[None].repeat(B, 0)
    causal = jnp.tri(T, dtype=bool)[None, None]
    apart_B1TT = causal & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    out = {}
    for name, mask in (("causal", None), ("documents", apart_B1TT)):

        def both(q, k, v, g, impl, mask=mask):
            y, back = jax.vjp(lambda *a: attention.weighted(*a, mask, True, impl), q, k, v)
            return [a.astype(jnp.float32) for a in (y, *back(g.astype(y.dtype)))]

        got = jax.jit(functools.partial(both, impl=None))(q, k, v, g)
        wide = [a.astype(jnp.float32) for a in (q, k, v, g)]
        with jax.default_matmul_precision("highest"):
            true = jax.jit(functools.partial(both, impl="blocks"))(*wide)
        pairs = zip(("y", "dq", "dk", "dv"), got, true, strict=True)
        out[name] = {n: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for n, a, b in pairs}
    return out


def kernels_of(call, most=40):
    """What the device did in one call: [[name, times, microseconds in all]], longest first.

    A profile runs command buffers kernel by kernel, so that the gaps between them are not those of
    an ordinary call.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    named = {e["pid"]: e["args"].get("name", "") for e in events if e.get("name") == "process_name"}
    total, count = collections.Counter(), collections.Counter()
    for e in events:
        if e.get("ph") == "X" and "GPU" in named.get(e["pid"], ""):
            total[e["name"]] += e["dur"]
            count[e["name"]] += 1
    return [[name, count[name], round(us, 1)] for name, us in total.most_common(most)]


def measure(name, flags):
    """One row: the step of a case, its time, memory and losses."""
    set_choices(flags)
    begun = time.perf_counter()
    preset, taught, rows, T = CASES[name]
    rows = flags.batch or rows
    cfg, T = (tiny(name), TINY_T) if flags.tiny else (presets.preset(preset), flags.T or T)
    teachers = dense_parents(cfg) if taught else ()
    steps = flags.warmup + flags.repeats
    settings = Settings(
        tokens=1000 * rows * T, batch=rows, window=T, lr=1e-3, warmup=0.0, decay=0.0,
        compute="bfloat16", remat=flags.remat, accumulate=flags.accumulate,
        across_documents=bool(flags.across),
    )  # fmt: skip
    mesh = parallel.make_mesh("data=1")
    step, arguments = step_of(cfg, teachers, settings, mesh)
    abstract, frozen, like, _ = arguments
    traced = time.perf_counter()
    program = step.lower(*arguments).compile()
    compile_s = time.perf_counter() - traced
    optimizer = settings.make_optimizer(settings.steps(T))

    def drawn():
        params = tuple(models.init_params(t, jax.random.key(1)) for t in teachers)
        state = init_state(models.init_params(cfg, jax.random.key(0)), optimizer)
        if not teachers:
            return state, ()
        return state, {"weights": jnp.full(len(params), 1 / len(params)), "teachers": params}

    shards = tuple(parallel.shardings(mesh, tree) for tree in (abstract, frozen))
    made = jax.jit(drawn, out_shardings=shards).lower().compile()
    if flags.wait:  # until the others do not compile either
        print(READY, flush=True)
        input()
    state, frozen = made()
    # id 0 would open a document
    ids = np.random.default_rng(0).integers(1, cfg.vocab_size, like.shape).astype(np.int32)
    tokens, index = jax.device_put(ids, like.sharding), np.int32(0)
    seconds, losses = [], []
    for _ in range(steps):
        at = time.perf_counter()
        state, metrics = jax.block_until_ready(program(state, frozen, tokens, index))
        seconds.append(time.perf_counter() - at)
        losses.append(float(metrics["loss"]))
    timed = seconds[flags.warmup :]
    median = statistics.median(timed)
    rate, peak = rows * T / median, peak_flops()
    memory, stats = program.memory_analysis(), jax.devices()[0].memory_stats() or {}
    counts = flops(cfg, T, teachers)
    known = {k: v for k, v in counts.items() if v}
    row = {
        "rows": rows, "T": T, "parameters": models.count(cfg),
        "teachers": [t.family for t in teachers],
        "tokens_per_second": rate, "step_s": median,
        "spread": (max(timed) - min(timed)) / median, "seconds_all": [round(s, 5) for s in seconds],
        "flops_per_token": known,
        **({k: rate * v / peak for k, v in known.items()} if peak else {}),
        "peak_bytes": stats.get("peak_bytes_in_use"), "temp_bytes": memory.temp_size_in_bytes,
        "state_bytes": memory.argument_size_in_bytes, "compile_s": compile_s,
        "losses": [round(x, 4) for x in losses],
        "losses_fall": bool(np.isfinite(losses).all() and losses[-1] < losses[0]),
        "row_s": time.perf_counter() - begun,
    }  # fmt: skip
    row["device"] = jax.devices()[0].device_kind
    if flags.trace:
        row["kernels"] = kernels_of(lambda: program(state, frozen, tokens, index))
    if flags.check:
        row["attention_error"] = attention_error()
    if not row["losses_fall"]:
        row["failed"] = f"losses {row['losses']}"
    return row


def parser():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="these cases")
    p.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["default"])
    p.add_argument("--remat", nargs="+", choices=REMATS, default=["auto"])
    p.add_argument("--batch", nargs="+", type=int, default=[0], help="rows (0: the case's)")
    p.add_argument("--across", nargs="+", type=int, choices=(0, 1), default=[0],
                   help="1: documents of a row see each other, so that causal is all")  # fmt: skip
    p.add_argument("--scan", nargs="+", default=["default"], help="impl of both recurrences")
    p.add_argument("--logits-mib", nargs="+", type=int, default=[0],
                   help="bytes of a chunk's logits (0: as it is)")  # fmt: skip
    p.add_argument("--T", type=int, help="tokens of a row instead of the case's")
    p.add_argument("--accumulate", type=int, default=1)
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--check", action="store_true", help="also the attention against our own form")
    sweep_flags(p, "mfu")
    return p


SWEPT = ("attention", "remat", "batch", "across", "scan", "logits_mib", "xla")


def short(row):
    """A line of the table."""
    keys = ("case", *SWEPT)
    head = " ".join(str(row.get(k, "")) for k in keys)
    if "failed" in row:
        return f"{head}: FAILED {row['failed'][-300:]}"
    share = "".join(f" {k} {row[k]:.3f}" for k in ("mfu", "mfu_causal", "mfu_6n") if k in row)
    gib = (row["peak_bytes"] or row["temp_bytes"] + row["state_bytes"]) / 2**30
    return (
        f"{head}: {row['tokens_per_second']:.0f} tok/s, step {1e3 * row['step_s']:.1f} ms,{share}, "
        f"{gib:.1f} GiB, compile {row['compile_s']:.0f} s, row {row['row_s']:.0f} s, "
        f"loss {row['losses'][0]:.2f} -> {row['losses'][-1]:.2f}"
    )


def append(file, row, line):
    """The row to the file's; one row a write, so that none is lost."""
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    result = {
        "command": "python " + " ".join(sys.argv), "seed": 0, "versions": versions(),
        "machine": {"device": row.get("device"), "cores": os.cpu_count()},
        "rows": [*known, row],
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(line(row), flush=True)


def start(script, case, flags, passed, switches):
    """One combination in a process of its own, which waits once it has compiled."""
    command = [sys.executable, script, "--only", case, "--out", "-", "--wait"]
    for name in passed:
        if (value := getattr(flags, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    command += [f"--{name}" for name in switches if getattr(flags, name)]
    # those that wait hold little; the one that runs may take almost all
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    if flags.xla:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flags.xla}".strip()
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe that nobody reads would fill)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=log, text=True), log


def limited(process, seconds):
    """A clock that ends the process unless it is cancelled before."""
    clock = threading.Timer(seconds, process.kill)
    clock.start()
    return clock


def together(script, cases, passed, switches):
    """Rows of some combinations: they compile side by side, then run one after the other."""
    running = [start(script, *case, passed, switches) for case in cases]

    def compiled(process, seconds):
        clock = limited(process, seconds)
        said = process.stdout.readline().strip()  # empty: it has ended
        clock.cancel()
        return said == READY

    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        limits = [flags.limit for _, flags in cases]
        ready = list(pool.map(compiled, [process for process, _ in running], limits))
    for (process, log), (_, flags), go in zip(running, cases, ready, strict=True):
        clock = limited(process, flags.limit)
        said = process.communicate("\n" if go else None)[0]
        clock.cancel()
        if process.returncode:
            log.seek(0)
            late = f"not {'run' if go else 'compiled'} within {flags.limit:.0f} s (--limit)"
            yield {"failed": late if process.returncode == -9 else why(log.read())}
        else:
            yield json.loads(said.splitlines()[-1])


def run(flags, script, measure, swept, passed, switches, line):
    """The command line of a sweep: rows of every combination, one after the other, into --out.

    swept: flags that take several values; passed, switches: those that a process is handed; line:
    row -> a line of the table.
    """
    begun = time.time()
    flags.out = Path("-") if flags.tiny else flags.out
    grid = itertools.product(flags.only, *(getattr(flags, name) for name in swept))
    cases = [
        (case, argparse.Namespace(**{**vars(flags), **dict(zip(swept, values, strict=True))}))
        for case, *values in grid
    ]
    if not flags.sweep and len(cases) > len(flags.only):
        raise SystemExit("error: several values of a flag: add --sweep, or name one of each")
    size = flags.jobs if flags.sweep else 1
    for at in range(0, len(cases), size):
        batch = cases[at : at + size]
        if time.time() - begun > flags.total:
            print(f"--total {flags.total:.0f} s: no time left for {[c for c, _ in batch]}")
            continue
        rows = (measure(*case) for case in batch)
        if flags.sweep:
            rows = together(script, batch, passed, switches)
        for (case, chosen), row in zip(batch, rows, strict=True):
            row = {"case": case} | row | {name: getattr(chosen, name) for name in swept}
            if str(flags.out) == "-":
                print(json.dumps(row), flush=True)
            else:
                append(flags.out, row, line)


def sweep_flags(p, out):
    """Adds the flags of `run` to a parser."""
    p.add_argument("--xla", nargs="+", default=[""],
                   help="sets of XLA_FLAGS, with --sweep: --xla ' ' ' --a=1 --b=2'")  # fmt: skip
    p.add_argument("--repeats", type=int, default=5, help="at least 5; the median is reported")
    p.add_argument("--sweep", action="store_true", help="every combination, in processes")
    p.add_argument("--jobs", type=int, default=1, help="processes that compile side by side")
    p.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--limit", type=float, default=120, help="seconds to compile, and to run")
    p.add_argument("--total", type=float, default=1e9, help="seconds after which none is started")
    p.add_argument("--trace", action="store_true", help="also the device's longest kernels")
    p.add_argument("--tiny", action="store_true", help="small models, on any machine")
    p.add_argument("--out", type=Path, default=Path(f"experiments/results/{out}_gpu.json"),
                   help="rows are added to it (-: on stdout, as always with --tiny)")  # fmt: skip


def why(text):
    """The line of an output that says what went wrong."""
    lines = [line for line in text.splitlines() if line.strip()]
    said = [line for line in lines if "Error" in line or "RESOURCE_EXHAUSTED" in line]
    return (said or lines or [""])[-1][:400]


def main():
    passed = (*SWEPT[:-1], "T", "accumulate", "warmup", "repeats")
    run(parser().parse_args(), __file__, measure, SWEPT, passed, ("tiny", "check", "trace"), short)


if __name__ == "__main__":
    main()
