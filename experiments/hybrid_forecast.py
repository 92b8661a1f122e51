"""Can a short healing run tell where a ten times longer one lands? Delphi's loss law on healing.

Command: python experiments/hybrid_forecast.py STAGE, in this order; repeat a stage to go on:
  small      DELVE (N = 1.25 x the largest parent, as `base` of hybrid_parts.py but rows of 4),
             healed for 10 to 40 thousand tokens, three seeds
  forecast   E + A C^-alpha by Huber on log loss through the seeds' means; refuses once a long run
             exists. Commit what it writes
  long       409,600 tokens, three seeds, and how far off the forecast was
The method was fixed before any long run: seeds and budgets are resampled for the interval, to which
the error of forecasting the longest of the small budgets from the others is added in squares.
Loss: nats a token on the report split. Cost: about 80 minutes of a core.
"""

import argparse
import json
import sys

import hybrid
import numpy as np

from delve_jax.config import DelveError, read_json
from delve_jax.delphi import fit
from delve_jax.parents import dense_parents
from delve_jax.plan import train_flops

SMALL = (10_240, 14_336, 20_480, 28_672, 40_960)
LONG = 409_600
N = int(1.25 * hybrid.LARGEST)
FORECAST = hybrid.RESULTS / "hybrid_forecast_told.json"
SAMPLES, Z = 1000, 1.96


def runs():
    return hybrid.Results("hybrid_forecast", "python experiments/hybrid_forecast.py STAGE",
                          parameters=N, batch=4)  # fmt: skip


def healed(tokens, seed):
    cfg, params, _ = hybrid.hybrid(N, seed)
    key = f"forecast-{tokens}-s{seed}"
    cfg, params = hybrid.healed(key, cfg, params, seed, tokens=tokens, batch=4)
    spent = tokens * train_flops(cfg, hybrid.WINDOW, dense_parents(cfg))
    return hybrid.scored(cfg, params, tokens=tokens, flops=spent)


def small():
    results = runs()
    for seed in hybrid.SEEDS:
        for tokens in SMALL:
            results.row(f"{tokens}", seed, lambda t=tokens, s=seed: healed(t, s))


def losses(results):
    """(FLOPs [K], loss [K, seeds]) of the small runs."""
    found = {t: [r for r in results.rows if r["cell"] == f"{t}"] for t in SMALL}
    if any(len(rows) < len(hybrid.SEEDS) for rows in found.values()):
        raise DelveError("run the stage `small` to its end first")
    C_K = np.array([rows[0]["flops"] for rows in found.values()], float)
    return C_K, np.array([[r["report"] for r in rows] for rows in found.values()])


def forecast():
    results = runs()
    if any(r["cell"] == f"{LONG}" for r in results.rows):
        raise DelveError("a long run exists; a forecast comes before")
    C_K, L_KS = losses(results)
    target = C_K[-1] / SMALL[-1] * LONG
    (law,) = fit.loss_laws(C_K, L_KS.mean(1))
    loss = float(fit.loss_at(law, target))
    rng = np.random.default_rng(0)
    K, S = L_KS.shape
    drawn = np.stack([L_KS[np.arange(K)[:, None], rng.integers(0, S, (K, S))].mean(1)
                      for _ in range(SAMPLES)])  # fmt: skip
    low, high = np.percentile(fit.loss_at(fit.loss_laws(C_K, drawn), target), (2.5, 97.5))
    (part,) = fit.loss_laws(C_K[:-1], L_KS[:-1].mean(1))
    missed = float(fit.loss_at(part, C_K[-1]) / L_KS[-1].mean() - 1)
    below, above = (float(np.hypot(abs(end - loss), Z * abs(missed) * loss)) for end in (low, high))
    told = {
        "command": "python experiments/hybrid_forecast.py forecast",
        "versions": hybrid.metrics.versions(), "seeds": {"bootstrap": 0}, "tokens": LONG,
        "flops": float(target), "law": dict(zip(("E", "A", "alpha"), map(float, law), strict=True)),
        "small": {"flops": C_K.tolist(), "loss": L_KS.tolist()},
        "leave_largest_out": missed, "loss": loss, "interval": [loss - below, loss + above],
    }  # fmt: skip
    FORECAST.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps({k: told[k] for k in ("loss", "interval", "law", "leave_largest_out")}))


def long():
    if not FORECAST.exists():
        raise DelveError("run the stage `forecast` first, and commit what it writes")
    told, results = read_json(FORECAST), runs()
    for seed in hybrid.SEEDS:
        results.row(f"{LONG}", seed, lambda s=seed: healed(LONG, s))
    found = np.array([r["report"] for r in results.rows if r["cell"] == f"{LONG}"])
    low, high = told["interval"]
    results.save(comparison={
        "forecast": told["loss"], "interval": told["interval"], "loss": float(found.mean()),
        "spread_of_seeds": float(found.std(ddof=1)), "error": told["loss"] / found.mean() - 1,
        "inside": [bool(low <= x <= high) for x in found],
    })  # fmt: skip
    print(json.dumps(results.facts["comparison"]))


STAGES = {"small": small, "forecast": forecast, "long": long}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    STAGES[parser.parse_args().stage]()


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
