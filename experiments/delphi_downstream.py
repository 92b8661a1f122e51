"""Benchmark scores ahead of a run, in two steps, on real evaluations of Pythia and of Gadre et al.

Question: how far off are soft -> hard forecasts of larger models, and do the intervals hold?
Command: python experiments/delphi_downstream.py   (reads ../shared/data/scaling)
Soft metric: neither set has log-probabilities of answers. Pythia: log-perplexity of LAMBADA's last
word (zero-shot) stands in for every task; Gadre: loss on C4's validation text.
Cost: 20 seconds on a shared CPU core.
Result (results/delphi_downstream.json, .png): mean error of accuracy 1.6 points over 96 forecasts
for Pythia (standing still: 3.9), 2.5 over 92 for Gadre's 411M models (5.6); 83 and 89 inside their
95 % intervals. Where it fails: compute alone misses the soft metric of models trained on equal
tokens by 17 %, and a cosine schedule bends the later part of a run (410m: 6.7 %), both outside the
intervals; arc_challenge, which starts below chance, is covered in 10 of 16. The form of the sigmoid
is chosen on the pool (`downstream.choose_form`); that rule and the interval's width were written
after a first look at these errors, so they are no blind test of it.
"""

import csv
import hashlib
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np

from delve_jax import metrics
from delve_jax.config import DelveError
from delve_jax.delphi import downstream, fit, plots, points

ROOT = Path(__file__).resolve().parents[1]
SCALING = ROOT.parent / "shared" / "data" / "scaling"
RESULT = ROOT / "experiments" / "results" / "delphi_downstream.json"
SAMPLES = 300
# total parameters and width; the embedding table (50,304 rows) is looked up, not multiplied
PYTHIA = {
    "70m": (70_426_624, 512), "160m": (162_322_944, 768), "410m": (405_334_016, 1024),
    "1b": (1_011_781_632, 2048), "1.4b": (1_414_647_808, 2048),
}  # fmt: skip
STEP_TOKENS = 2_097_152
LAST = 143_000
# task: (metric of Pythia's file, chance)
PYTHIA_TASKS = {
    "lambada_openai": ("acc", 0.0), "sciq": ("acc", 0.25), "arc_easy": ("acc", 0.25),
    "piqa": ("acc", 0.5), "winogrande": ("acc", 0.5), "arc_challenge": ("acc", 0.25),
}  # fmt: skip
GADRE_TASKS = {"lambada_openai": 0.0, "hellaswag": 0.25, "arc_easy": 0.25, "piqa": 0.5}


def pythia(path):
    """Zero-shot checkpoints of the standard runs: one dict each."""
    found = defaultdict(dict)
    with path.open() as file:
        for r in csv.DictReader(file):
            if r["shot"] == "zero-shot" and "BS" not in r["model"] and int(r["step"]) >= 1000:
                key = r["model"], int(r["step"])
                found[key][r["task"], r["metric"]] = float(r["value"])
    out = []
    for (model, step), values in found.items():
        total, width = PYTHIA[model.split("-")[1]]
        N, T = float(total - 50304 * width), float(step * STEP_TOKENS)
        row = {"model": model, "size": model.split("-")[1], "step": step, "N": N, "T": T,
               "C": 6 * N * T, "soft": float(np.log(values["lambada_openai", "ppl"]))}  # fmt: skip
        out.append(row | {t: values[t, m] for t, (m, _) in PYTHIA_TASKS.items()})
    return out


def gadre(path):
    """Runs: one dict each."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [
        {"model": r["name"], "dataset": r["dataset"], "N": float(r["params"]),
         "T": float(r["tokens"]), "C": 6 * float(r["params"]) * float(r["tokens"]),
         "multiplier": float(r["chinchilla_multiplier"]), "soft": float(r["loss_c4_val"]),
         **{t: float(r[f"acc_{t}"]) for t in GADRE_TASKS}}
        for r in rows
    ]  # fmt: skip


def column(rows, name):
    return np.array([r[name] for r in rows])


def by_size_and_tokens(rows, targets, seed=0):
    """(soft, draws_SM) of step 1 by L(N, D); whole models are redrawn, not their checkpoints."""
    runs = points.Points(*(column(rows, k) for k in ("C", "N", "T", "soft")))
    p = fit.parametric(runs)[0]
    rng = np.random.default_rng(seed)
    names, index = np.unique(column(rows, "model"), return_inverse=True)
    size = [next(r["N"] for r in rows if r["model"] == n) for n in names]
    weight = downstream.redrawn(rng, SAMPLES, size)[:, index]
    laws = fit.parametric(runs, weight, p)
    N, T = column(targets, "N"), column(targets, "T")
    at = fit.parametric_at(p, N, T)
    rest = np.log(runs.L / fit.parametric_at(p, runs.N, runs.T))
    draws = np.stack([fit.parametric_at(q, N, T) for q in laws])
    return at, draws * np.exp(rng.choice(rest, draws.shape))


def by_compute(rows, targets):
    """(soft, draws_SM) of step 1 by the power law of compute."""
    C = column(rows, "C")
    at, draws, _ = downstream.soft_draws(C, column(rows, "soft"), column(targets, "C"), SAMPLES)
    return at, draws


def study(name, step1, rows, pool, targets, tasks):
    """Both steps and their composition on every target and task."""
    soft, draws = step1(rows, targets)
    truth = column(targets, "soft")
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    best = min(rows, key=lambda r: r["soft"])
    out, curves = [], {}
    for task, floor in tasks.items():
        x, y = column(pool, "soft"), column(pool, task)
        both = downstream.compose(soft, draws, x, y, floor)
        known = downstream.sigmoid_at(both["law"], both["form"].x(truth))
        curves[task] = {"law": both["law"].tolist(), "form": asdict(both["form"]),
                        "pool": np.stack([x, y], 1).round(4).tolist()}  # fmt: skip
        for i, t in enumerate(targets):
            out.append({
                "task": task, "model": t["model"], "flops": t["C"],
                "soft": t["soft"], "soft_forecast": float(soft[i]),
                "soft_interval": [float(low[i]), float(high[i])],
                "hard": t[task], "forecast": float(both["hard"][i]),
                "interval": [float(both["low"][i]), float(both["high"][i])],
                "error": float(both["hard"][i] - t[task]),
                "error_of_step_2": float(known[i] - t[task]),
                "no_change": float(best[task] - t[task]),
                "covered": bool(both["low"][i] <= t[task] <= both["high"][i]),
            })  # fmt: skip

    return {
        "study": name, "fitted_on": sorted({r["model"] for r in rows}), "runs": len(rows),
        "pool": len(pool), "soft_mean_abs_error": float(np.mean(np.abs(soft / truth - 1))),
        "soft_covered": int(np.sum((low <= truth) & (truth <= high))), "targets": len(targets),
        "tasks": {t: summary([r for r in out if r["task"] == t]) for t in tasks},
        "rows": out, "curves": curves,
    }  # fmt: skip


def summary(mine):
    """Mean absolute errors of some forecasts, and how many lie inside their interval."""
    mean = lambda key: float(np.mean([abs(r[key]) for r in mine]))  # noqa: E731
    return {"forecasts": len(mine), "mean_abs_error": mean("error"),
            "step_2_alone": mean("error_of_step_2"), "no_change": mean("no_change"),
            "covered": sum(r["covered"] for r in mine)}  # fmt: skip


def studies():
    p = pythia(SCALING / "pythia_evals_le1.4b.csv")
    chance = {t: floor for t, (_, floor) in PYTHIA_TASKS.items()}
    small = [r for r in p if r["size"] in ("70m", "160m", "410m")]
    settled = [r for r in small if r["step"] >= 3000]
    final = [r for r in small if r["step"] == LAST]
    large = [r for r in p if r["size"] in ("1b", "1.4b") and r["step"] == LAST]
    out = [
        study("Pythia: smaller models, L(N, D)", by_size_and_tokens, settled, small, large, chance),
        study("Pythia: smaller models, final checkpoints, L(C)", by_compute, final, small, large,
              chance),
        study("Pythia: smaller models, L(N, D), pool with larger models of other runs",
              by_size_and_tokens, settled, [r for r in p if "deduped" in r["model"]],
              [r for r in large if "deduped" not in r["model"]], chance),
    ]  # fmt: skip
    early = [r for r in p if r["step"] <= 33_000]
    for model in ("pythia-410m", "pythia-1.4b"):
        mine = [r for r in early if r["model"] == model and r["step"] >= 3000]
        later = [r for r in p if r["model"] == model and r["step"] in (63_000, 103_000, LAST)]
        name = f"{model}: steps to 33,000, L(C)"
        out.append(study(name, by_compute, mine, early, later, chance))
    g = gadre(SCALING / "gadre_small_lt500M.csv")
    for dataset in sorted({r["dataset"] for r in g}):
        mine = [r for r in g if r["dataset"] == dataset]
        few = [r for r in mine if r["N"] < 4e8]
        out.append(study(f"Gadre, {dataset}: up to 154M, L(N, D)", by_size_and_tokens, few, few,
                         [r for r in mine if r["N"] > 4e8], GADRE_TASKS))  # fmt: skip
    return out


def main():
    start = time.time()
    if not SCALING.exists():
        sys.exit(f"error: {SCALING}: the evaluations are not there")
    files = [SCALING / n for n in ("pythia_evals_le1.4b.csv", "gadre_small_lt500M.csv")]
    result = {
        "command": "python experiments/delphi_downstream.py",
        "seeds": {"soft": 0, "hard": 1},
        "versions": metrics.versions(),
        "data_hash": {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in files},
        "soft_metric": {"Pythia": "log-perplexity of LAMBADA's last word, zero-shot",
                        "Gadre": "loss on C4's validation text"},
        "studies": studies(),
    }  # fmt: skip
    result["summary"] = {
        name: summary([r for s in result["studies"] if s["study"].lower().startswith(name)
                       for r in s["rows"]])
        for name in ("pythia", "gadre")
    }  # fmt: skip
    result["seconds"] = round(time.time() - start)
    RESULT.write_text(json.dumps(result) + "\n")
    plots.draw("downstream", result, RESULT.with_suffix(".png"))
    for s in result["studies"]:
        print(f"{s['study']}: soft off by {s['soft_mean_abs_error']:.1%}, "
              f"{s['soft_covered']}/{s['targets']} covered")  # fmt: skip
        for task, x in s["tasks"].items():
            print(f"  {task:16} error {x['mean_abs_error']:.3f}, step 2 alone "
                  f"{x['step_2_alone']:.3f}, no change {x['no_change']:.3f}, covered "
                  f"{x['covered']}/{x['forecasts']}")  # fmt: skip
    print(result["summary"], f"{result['seconds']} s")


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
