"""Is a model at a quarter of its parameters, in factors, 2.5 times as fast to decode as dense?

python experiments/benchmarks/decode_keep.py --sweep --jobs 3 --batch 1 8
Greedy `LM.generate` (compiled: prefill of 128 tokens, then a loop of 128 single steps), random
bfloat16 weights of the parents' real shapes made on the device, dense beside keep 0.25 (one rank a
map, `presets.tier`'s). Ratio of tokens a second, and each side's over its bound: bytes that a step
must touch at the bandwidth of a measured copy. --check: every token's logit in one uncached pass
over the text. A 7B model holds up to 35 GB (a call has the layers twice): two at once, not four.
`step_bytes` counts them once.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from mfu import READY, kernels_of, run, sweep_flags, tiny

from delve_jax import models, presets
from delve_jax.lm import LM

CASES = {
    "mamba-1.4b": "mamba-1.4b", "rwkv-1b5": "rwkv-4-1b5", "pythia-1.4b": "pythia-1.4b",
    "incite-7b": "redpajama-incite-7b", "mamba-7b": "mamba-7b-rw", "rwkv-7b": "rwkv-4-7b",
}  # fmt: skip
KEEP, PROMPT, NEW, BAR = 0.25, 128, 128, 2.5
TINY = (8, 8)  # prompt and new tokens
LOST = {"bfloat16": 0.03, "float32": 1e-3}  # of the largest logit: ties of rounded numbers
SWEPT = ("batch", "compute", "storage", "xla")


def weights(cfg, dtype):
    """Random parameters in `dtype` (`models.cast`), so that a signal keeps its size on its way."""
    shapes = models.cast(models.abstract_params(cfg), dtype)
    leaves, form = jax.tree_util.tree_flatten_with_path(shapes)

    def one(i, path, like):
        name = path[-1].key
        if name in ("scale", "D"):
            return jnp.ones(like.shape, like.dtype)
        if like.dtype == jnp.int8:
            return jax.random.randint(jax.random.key(i), like.shape, -127, 128, like.dtype)
        if not jnp.issubdtype(like.dtype, jnp.floating):
            raise SystemExit("--storage pivot: its permutations are not random")
        std = 0.02
        if like.ndim > 1 and name != "bias":
            wide = path[0].key == "embed" or name == "q_scale"
            std = like.shape[-1 if wide else -2] ** -0.5
        if name == "q_scale":
            return jnp.full(like.shape, std / 73**2, like.dtype)  # 73: deviation of the integers
        key = jax.random.key(i, impl="rbg")
        return std * jax.random.normal(key, like.shape, like.dtype)

    make = lambda: form.unflatten(one(i, *leaf) for i, leaf in enumerate(leaves))  # noqa: E731
    return jax.jit(make)()


def step_bytes(cfg, params, batch, length):
    """Bytes that a step of `batch` rows must touch with caches of `length` tokens.

    All parameters but the rows of untied tables that no token looks up; states read and written,
    caches read.
    """
    moved = sum(a.nbytes for a in jax.tree.leaves(params))
    if not cfg.tie_embeddings:
        table = params["embed"]
        rows = table[next(name for name in ("kernel", "v", "v_q") if name in table)]
        moved -= (rows.shape[0] - batch) * rows.nbytes // rows.shape[0]
    state = jax.eval_shape(lambda: models.init_state(cfg, batch, length, jnp.bfloat16))["layers"]
    of_state = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    return moved + of_state * (1 if "k" in state else 2)


def ahead(lm, hlo=None):
    """Compiles what `lm.generate` runs at its first call, once -> (facts, as they become known).

    compile_s is of prefill and loop, "program" the loop, whose text is written to `hlo`.
    """
    known, programs = {"compile_s": 0.0}, {}
    static = ("room", "n", "stop", "sample", "top_k")

    def call(name, jitted, *args, **how):
        if name not in programs:
            at = time.perf_counter()
            programs[name] = jitted.lower(*args, **how).compile()
            known["compile_s"] += time.perf_counter() - at
            known["program"] = programs[name]
            if hlo and name == "_decode":
                hlo.parent.mkdir(parents=True, exist_ok=True)
                hlo.write_text(programs[name].as_text())
        return programs[name](*args, **{k: v for k, v in how.items() if k not in static})

    for name in ("_prefill", "_decode"):
        setattr(lm, name, functools.partial(call, name, getattr(lm, name)))
    return known


def checked(lm, text_BT, prompt):
    """How far the chosen tokens' logits lie below the largest in one uncached forward pass, over
    the largest in absolute value, and the share of tokens that are its very choice."""
    logits_BTV = lm.logits(text_BT)[:, prompt - 1 : -1]
    new_BT1 = jnp.asarray(text_BT)[:, prompt:, None]
    below = logits_BTV.max(-1) - jnp.take_along_axis(logits_BTV, new_BT1, -1)[..., 0]
    lost = float(below.max() / jnp.abs(logits_BTV).max())
    return {"lost": lost, "same": float((logits_BTV.argmax(-1) == new_BT1[..., 0]).mean())}


def measure(name, flags):
    """One row: dense and kept in turn."""
    begun = time.perf_counter()
    if flags.tiny:
        dense, (prompt, new) = tiny(name.replace("incite", "pythia")), TINY
    else:
        dense, prompt, new = presets.preset(CASES[name]), PROMPT, NEW
    kept = presets._uniform(dense, 0.9 if flags.tiny else KEEP)
    kept = dataclasses.replace(kept, storage=flags.storage)
    ids = np.random.default_rng(0).integers(1, dense.vocab_size, (flags.batch, prompt))
    row, lms, known = {"prompt": prompt, "new": new}, {}, {}
    for side, cfg in (("dense", dense), ("kept", kept)):
        compute = None if flags.compute == "default" else flags.compute
        lms[side] = LM(cfg, weights(cfg, "bfloat16"), compute=compute)
        known[side] = ahead(lms[side], flags.hlo and flags.hlo / f"{name}-{side}-{os.getpid()}.txt")
    make = {side: lambda lm=lm: np.asarray(lm.generate(ids, new)) for side, lm in lms.items()}
    text = {side: call() for side, call in make.items()}
    found = {}
    if flags.check:
        found = {side: checked(lm, text[side], prompt) for side, lm in lms.items()}
    if flags.wait:  # until the others do not compile either
        print(READY, flush=True)
        input()
    seconds = {side: [] for side in make}
    for k in range(1 + flags.repeats):
        for side, call in make.items():
            at = time.perf_counter()
            again = call()
            seconds[side].append(time.perf_counter() - at)
            if (again != text[side]).any():
                row["failed"] = f"{side}: another text at repeat {k}"
    seconds = {side: s[1:] for side, s in seconds.items()}
    for side, lm in lms.items():
        median = statistics.median(seconds[side])
        row[side] = {
            "parameters": models.count(lm.config), "compute": lm.how.dtype,
            "tokens_per_second": flags.batch * new / median, "step_ms": 1e3 * median / new,
            "spread": (max(seconds[side]) - min(seconds[side])) / median,
            "seconds_all": [round(s, 5) for s in seconds[side]],
            "step_bytes": step_bytes(lm.config, lm.params, flags.batch, prompt + new),
            "compile_s": known[side]["compile_s"],
            "temp_bytes": known[side]["program"].memory_analysis().temp_size_in_bytes,
            "distinct": min(len(set(r)) for r in text[side][:, prompt:].tolist()),
        }  # fmt: skip
        if flags.trace:
            row[side]["kernels"] = kernels_of(make[side])
        if side in found:
            row[side]["check"] = found[side]
            if not found[side]["lost"] <= LOST[lm.how.dtype]:
                row["failed"] = f"{side}: a logit {found[side]['lost']:.2g} below the largest"
    row["ratio"] = row["kept"]["tokens_per_second"] / row["dense"]["tokens_per_second"]
    if jax.default_backend() != "cpu":
        from scans import copy_bandwidth

        row["bandwidth"] = copy_bandwidth()
        for side in lms:
            bound_ms = 1e3 * row[side]["step_bytes"] / row["bandwidth"]
            row[side] |= {"bound_ms": bound_ms, "of_bound": bound_ms / row[side]["step_ms"]}
    return row | {"device": jax.devices()[0].device_kind, "row_s": time.perf_counter() - begun}


def short(row):
    """A line of the table."""
    head = " ".join(str(row.get(k, "")) for k in ("case", *SWEPT))
    if "failed" in row and "ratio" not in row:
        return f"{head}: FAILED {row['failed'][-300:]}"
    sides = "; ".join(
        f"{side} {s['step_ms']:.3f} ms {s['tokens_per_second']:.0f} tok/s, bound "
        f"{s.get('bound_ms', 0):.3f} ms, compile {s['compile_s']:.0f} s, temp "
        f"{s['temp_bytes'] / 2**20:.0f} MiB, {s.get('check', '')}"
        for side, s in row.items() if side in ("dense", "kept")
    )  # fmt: skip
    bad = f" FAILED {row['failed']}" if "failed" in row else ""
    return f"{head}: ratio {row['ratio']:.2f}{bad}; {sides}; row {row['row_s']:.0f} s"


def parser():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="these shapes")
    p.add_argument("--batch", nargs="+", type=int, default=[1], help="rows")
    p.add_argument("--compute", nargs="+", default=["default"], help="dtype of activations")
    p.add_argument("--storage", nargs="+", choices=("uv", "int8"), default=["uv"])
    p.add_argument("--hlo", type=Path, help="folder for the compiled programs' text")
    p.add_argument("--check", action="store_true", help="compare with one uncached pass")
    sweep_flags(p, "decode_keep")
    return p


def main():
    passed = (*SWEPT[:-1], "repeats", "hlo")
    run(parser().parse_args(), __file__, measure, SWEPT, passed, ("tiny", "check", "trace"), short)


if __name__ == "__main__":
    main()
