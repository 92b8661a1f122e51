"""How do time and memory grow with length, batch, width, depth and kept share?

taskset -c 0,1 python experiments/benchmarks/growth.py [--only AXIS ...] [--families NAME ...]
Two CPU cores, random weights, vocabulary 512, no other side: a forward pass (the loss alone) and a
training step (AdamW) of each family, from D 128 (512 for the kept share), 2 layers, one row. Bar:
the slope of log time over log T is at most 1.1 in the recurrent families (no super-linear
surprise). Memory is XLA's own count of the compiled program: temporaries, arguments and outputs,
less what they share; a backward pass that keeps a constant number of bytes a token makes it linear
in T. It takes 25 quiet minutes.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts

import dataclasses
import functools
import itertools
import time

import decode
import jax
import numpy as np
from turns import COLOURS, add_row, arguments, old_rows, summary, turns, write

from delve_jax import models, parallel, presets
from delve_jax.train import objective
from delve_jax.train.loop import init_state
from delve_jax.train.run import Settings, step_of

V, MIB = 512, 2**20
RECURRENT, ATTENTION = ("mamba", "rwkv"), ("neox", "qwen3")
BASE = {"T": 1024, "batch": 1, "width": 128, "depth": 2, "keep": 1.0}
LONGEST = {"attention": 8192, "recurrent": 65536}
AXES = {
    "T": [2**n for n in range(10, 17)],
    "batch": [1, 4, 16],
    "width": [128, 256, 512],
    "depth": [2, 4, 8],
    "keep": [0.25, 0.5, 0.75, 1.0],
}
SHORT_T = 256  # of every axis but T
KEEP_WIDTH = 512  # of the kept share: at 128 a quarter has the same ranks as a half
MAX_SLOPE = 1.1
LONG_S, LONG_REPEATS = 8, 3  # steps that take longer are repeated less


def config(family, at):
    """The family's config at one point; keep below 1: all maps factored."""
    cfg = decode.config(family, at["width"])
    cfg = dataclasses.replace(cfg, n_layers=at["depth"], vocab_size=V, vocab_rows=V)
    return presets._uniform(cfg, at["keep"]) if at["keep"] < 1 else cfg


def bytes_of(program):
    """Temporary, argument and output bytes of a compiled program, and their sum without aliases."""
    m = program.memory_analysis()
    parts = {"temp": m.temp_size_in_bytes, "argument": m.argument_size_in_bytes,
             "output": m.output_size_in_bytes, "alias": m.alias_size_in_bytes}  # fmt: skip
    return parts | {"total": sum(parts.values()) - 2 * parts["alias"]}


def programs(cfg, B, T):
    """{kind: (function that runs it once and gives its loss, compiled program, seconds)}."""
    settings = Settings(tokens=1000 * B * T, batch=B, window=T, lr=1e-4, warmup=0.0, decay=0.0)
    mesh = parallel.make_mesh("data=1")
    step, arguments = step_of(cfg, (), settings, mesh)
    abstract, _, like, _ = arguments
    tokens = np.random.default_rng(0).integers(1, V, (B, T + 1)).astype(np.int32)
    tokens, index = jax.device_put(tokens, like.sharding), np.int32(0)
    make = lambda key: init_state(  # noqa: E731
        models.init_params(cfg, key), settings.make_optimizer(settings.steps(T))
    )
    state = jax.jit(make, out_shardings=parallel.shardings(mesh, abstract))(jax.random.key(0))
    # the loss of the step, without its gradient
    loss = objective.language_model(cfg, settings.how(cfg, mesh), eot=0, rows=B)
    forward = jax.jit(lambda params, tokens, index: loss(params, (), tokens, index)[0])
    start = time.perf_counter()
    first = forward.lower(state["params"], tokens, index).compile()
    between = time.perf_counter()
    second = step.lower(*arguments).compile()
    end = time.perf_counter()

    def run_forward():
        return float(first(state["params"], tokens, index))

    def run_step():
        nonlocal state
        state, metrics = jax.block_until_ready(second(state, (), tokens, index))
        return float(metrics["loss"])

    return {"forward": (run_forward, first, between - start), "step": (run_step, second, end - between)}  # noqa: E501  # fmt: skip


def measure(axis, family, value, repeats):
    """One row: seconds and bytes of both programs at this point of the axis."""
    at = BASE | ({} if axis == "T" else {"T": SHORT_T}) | {axis: value}
    at |= {"width": KEEP_WIDTH} if axis == "keep" else {}
    cfg = config(family, at)
    made = programs(cfg, at["batch"], at["T"])
    row = {"axis": axis, "family": family, "value": value, "at": at,
           "parameters": models.count(cfg)}  # fmt: skip
    losses = {}
    for kind, (run, program, compile_s) in made.items():
        start = time.perf_counter()
        losses[kind] = run()  # before any update
        long = time.perf_counter() - start > LONG_S
        seconds, _ = turns({kind: run}, LONG_REPEATS if long else repeats)
        found = summary(seconds)
        row[kind] = {
            "seconds": found["seconds"][kind], "spread": found["spread"][kind],
            "seconds_all": found["seconds_all"][kind], "compile_s": compile_s,
            "bytes": bytes_of(program),
        }  # fmt: skip
    if not abs(losses["step"] / losses["forward"] - 1) <= 1e-5:
        raise SystemExit(f"{family}, {axis} {value}: losses {losses} differ")
    row["loss"] = losses["forward"]
    return row


def slopes(rows):
    """{axis: {family: {kind: exponents of growth}}}: least squares of logs, and the last two."""
    out = {}
    for axis, family in itertools.product(AXES, decode.FAMILIES):
        mine = [r for r in rows if (r["axis"], r["family"]) == (axis, family)]
        if len(mine) < 3:
            continue
        x = np.log([r["value"] for r in mine])
        fit = lambda values, x=x: float(np.polyfit(x, np.log(values), 1)[0])  # noqa: E731
        out.setdefault(axis, {})[family] = {
            kind: {
                "seconds": fit([r[kind]["seconds"] for r in mine]),
                "bytes": fit([r[kind]["bytes"]["total"] for r in mine]),
                # of the last doubling alone: an overhead for each call flattens the fit
                "last": float(
                    np.log(mine[-1][kind]["seconds"] / mine[-2][kind]["seconds"]) / (x[-1] - x[-2])
                ),
            }
            for kind in ("forward", "step")
        }
    return out


def picture(rows, file):
    """A column an axis: seconds above, MiB below; solid: a step, dashed: a forward pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [axis for axis in AXES if any(r["axis"] == axis for r in rows)]
    fig, axes = plt.subplots(2, len(shown), figsize=(3.2 * len(shown), 6), squeeze=False)
    for column, axis in enumerate(shown):
        for family, colour in zip(decode.FAMILIES, COLOURS, strict=True):
            mine = [r for r in rows if (r["axis"], r["family"]) == (axis, family)]
            if not mine:
                continue
            x = [r["value"] for r in mine]
            for kind, style in (("step", "-"), ("forward", "--")):
                label = family if kind == "step" else None
                how = {"color": colour, "linestyle": style, "marker": ".", "label": label}
                axes[0][column].plot(x, [r[kind]["seconds"] for r in mine], **how)
                axes[1][column].plot(x, [r[kind]["bytes"]["total"] / MIB for r in mine], **how)
        for ax, unit in zip(axes[:, column], ("seconds", "MiB"), strict=True):
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xlabel({"T": "tokens of a row", "keep": "kept share"}.get(axis, axis))
            ax.set_ylabel(unit)
    axes[0][0].legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(file, dpi=150)


def main():
    parser = arguments(__doc__, "growth_cpu", AXES, "AXIS")
    parser.set_defaults(repeats=5)  # 3 of what takes over 8 s
    parser.add_argument("--families", nargs="+", choices=decode.FAMILIES, default=decode.FAMILIES)
    parser.add_argument("--longest", type=int, default=LONGEST["recurrent"], help="tokens of a row")
    flags = parser.parse_args()
    rows, start = old_rows(flags.out), time.time()
    for axis, family in itertools.product(flags.only, flags.families):
        for value in AXES[axis]:
            most = LONGEST["attention" if family in ATTENTION else "recurrent"]
            if axis == "T" and value > min(most, flags.longest):
                continue
            make = functools.partial(measure, axis, family, value, flags.repeats)
            rows = add_row(rows, ("axis", "family", "value"), make)
        rows.sort(key=lambda r: (list(AXES).index(r["axis"]),
                                 decode.FAMILIES.index(r["family"]), r["value"]))  # fmt: skip
        found = slopes(rows)
        write(
            flags.out, rows, seed=0, repeats=flags.repeats, base=BASE, short_T=SHORT_T,
            max_slope=MAX_SLOPE, slopes=found, minutes=round((time.time() - start) / 60, 1),
        )  # fmt: skip
    picture(rows, flags.out.with_suffix(".png"))
    steepest = [max(k["seconds"] for k in found["T"][f].values())
                for f in RECURRENT if f in found.get("T", {})]  # fmt: skip
    print(f"{flags.out}: steepest recurrent slope {max(steepest, default=float('nan')):.2f}")


if __name__ == "__main__":
    main()
