"""How many tokens a second does a compressed model generate, beside its dense parent?

taskset -c 0 python experiments/benchmarks/generate.py [--only NAME ...] [--repeats 7]
Batch 1, greedy, 32 tokens of prompt and 64 new ones, float32, keep 0.25 of all parameters: factors
(uv), the same in the pivot form and in int8. Published widths and vocabulary, fewer layers; the
parents' weights are 0.6 to 1.0 GB, so that a token's time is that of reading them. Weights are
random: only shapes matter here, and pivot is checked to give the tokens of uv. All forms of a
family take turns in one process; medians. Result, on one core: uv 4.0 to 5.0, pivot 4.1 to 5.1,
int8 5.1 to 5.8 times the dense parent (bar: 2.5).
What the loop still loses, all forms alike: the scan over layers copies each layer's weights before
it reads them (12 GB/s here; 19 where every layer is an array of its own, which would compile every
layer anew and hold the weights twice); int8 is widened to float32 one map at a time, the head's
once a call.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from delve_jax import compress, evaluate, models, presets
from delve_jax.compress import storage
from delve_jax.lm import LM
from delve_jax.metrics import versions

PARENTS = {"mamba-370m": 16, "rwkv-4-430m": 10, "pythia-410m": 10}  # preset -> layers
KEEP, PROMPT, NEW = 0.25, 32, 64
BAR = 2.5


def variants(name, layers):
    """{form: LM} of the dense parent and of its factors in every form."""
    dense = dataclasses.replace(presets.preset(name), n_layers=layers)
    plan, _ = compress.plan_for(dense, keep=KEEP)
    ranks = tuple(plan.ranks.items())
    small = dataclasses.replace(dense, vocab_rows=dense.vocab_size, ranks=ranks)
    init = lambda cfg: jax.jit(functools.partial(models.init_params, cfg))(jax.random.key(0))  # noqa: E731
    out = {"dense": (dense, init(dense)), "uv": (small, init(small))}
    for form in ("pivot", "int8"):
        out[form] = storage.convert(*out["uv"], form)
    return {form: LM(*pair) for form, pair in out.items()}


def measure(name, layers, repeats):
    """One row per form; the forms take turns, so that a busy machine slows all of them alike."""
    lms, seconds, made = variants(name, layers), {}, {}
    prompt = np.random.default_rng(0).integers(1, 50_000, (1, PROMPT))
    logits = {form: lms[form].logits(prompt) for form in ("uv", "pivot")}
    apart = float(abs(logits["uv"] - logits["pivot"]).max() / abs(logits["uv"]).max())
    for _ in range(repeats + 1):  # the first compiles
        for form, lm in lms.items():
            start = time.perf_counter()
            made[form] = np.asarray(lm.generate(prompt, NEW))
            seconds.setdefault(form, []).append(time.perf_counter() - start)
    rates = {form: NEW / statistics.median(times[1:]) for form, times in seconds.items()}
    return [
        {
            "parent": name, "layers": layers, "form": form,
            "parameters": models.count(lm.config),
            "parameter_bytes": evaluate.parameter_bytes(
                dataclasses.replace(lm.config, dtype="float32")
            ),
            "tokens_per_second": rates[form], "ratio": rates[form] / rates["dense"],
            "seconds": [round(s, 3) for s in seconds[form][1:]], "pivot_apart": apart,
            "pivot_same_tokens": bool((made["uv"] == made["pivot"]).all()),
        }
        for form, lm in lms.items()
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARENTS, default=list(PARENTS))
    parser.add_argument("--repeats", type=int, default=7, help="medians are reported")
    out = Path("experiments/results/generate_cpu.json")
    parser.add_argument("--out", type=Path, default=out)
    flags = parser.parse_args()
    rows = json.loads(flags.out.read_text())["rows"] if flags.out.exists() else []
    for name in flags.only:
        load = os.getloadavg()[0]
        new = measure(name, PARENTS[name], flags.repeats)
        for row in new:
            row["load"] = [round(load, 2), round(os.getloadavg()[0], 2)]
            print(
                f"{name:12} {row['form']:6} {row['parameters'] / 1e6:6.1f} M "
                f"{row['parameter_bytes'] / 1e6:7.1f} MB {row['tokens_per_second']:7.2f} tokens/s "
                f"x{row['ratio']:.2f}",
                flush=True,
            )
        rows = [row for row in rows if row["parent"] != name] + new
        result = {
            "command": "python " + " ".join(sys.argv), "versions": versions(), "seed": 0,
            "keep": KEEP, "prompt": PROMPT, "new": NEW, "repeats": flags.repeats, "bar": BAR,
            "machine": {"device": jax.devices()[0].device_kind,
                        "cores": len(os.sched_getaffinity(0))},
            "rows": rows,
        }  # fmt: skip
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
