"""One healed DELVE at many sizes: what does it lose beside one that was made for each?

Command: python experiments/hybrid_elastic.py [--only CELL ...] [--seeds N ...]; repeat it to go on.
Cells, all with 204,800 healing tokens and the quickstart's rate: `whole` (N = 1.25 x the largest
parent, healed as every DELVE is), `elastic` (the same with rank-drop: each step trains a smaller
model inside as well), `half` (made and healed at N / 2 alone). `whole` and `elastic` are scored at
every share of SHARES of N, cut as `--keep` cuts them. Bar: `elastic` at half is within 0.03 nats
of `half`. Cost: about half an hour of two cores a seed. Result:
experiments/results/hybrid_elastic.json and .png.
"""

import sys

import hybrid
import numpy as np

from delve_jax import models
from delve_jax.config import DelveError
from delve_jax.models import elastic
from delve_jax.train.objective import Terms

N = int(1.25 * hybrid.LARGEST)
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5)  # of N
LEAST = 0.48  # rank-drop: half of N needs 0.49 of what shrinks
CELLS = {
    "whole": (N, Terms()),
    "elastic": (N, Terms(rank_drop=LEAST)),
    "half": (N // 2, Terms()),
}


def make(cell, seed):
    """One row: scores at every size; those of the smallest are the row's own."""
    size, terms = CELLS[cell]
    cfg, params, _ = hybrid.hybrid(N=size, seed=seed)
    key = f"delve-{N}-s{seed}" if cell == "whole" else f"elastic-{cell}-s{seed}"
    before = float(hybrid.nats(cfg, params, "report").mean())
    cfg, params = hybrid.healed(key, cfg, params, seed, terms=terms)
    at = []
    for share in SHARES if size == N else (0.5,):
        small = elastic.shrink(cfg, params, int(share * N))
        at.append({"share": share, "parameters": models.count(small[0]),
                   "report": float(hybrid.nats(*small, "report").mean())})  # fmt: skip
    return {**hybrid.scored(*small), "step_0": before, "at": at}


def picture(rows, file):
    """Nats over parameters: one line a cell, its seeds as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(5.2, 3.6))
    for cell, colour in zip(CELLS, ("#4477aa", "#228833", "#ee6677"), strict=True):
        mine = [r["at"] for r in rows if r["cell"] == cell]
        if not mine:
            continue
        x = np.mean([[p["parameters"] for p in at] for at in mine], 0) / 1e6
        y = np.array([[p["report"] for p in at] for at in mine])
        ax.plot(x, y.mean(0), "o-", color=colour, label=cell)
        ax.plot(np.tile(x, len(y)), y.ravel(), ".", color=colour, alpha=0.4)
    ax.set_xlabel("parameters, millions")
    ax.set_ylabel("nats per token")
    ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(file, dpi=150)


def main():
    args = hybrid.flags(__doc__, CELLS).parse_args()
    results = hybrid.Results("hybrid_elastic", "python experiments/hybrid_elastic.py",
                             parameters=N, rank_drop=LEAST, bar=0.03)  # fmt: skip
    with hybrid.metrics.progress(len(args.seeds) * len(args.only), "elastic", "cell") as bar:
        for seed in args.seeds:
            for cell in args.only:
                results.row(cell, seed, lambda c=cell, s=seed: make(c, s))
                bar.update(1)
    results.save(**derived(results))
    picture(results.rows, results.path.with_suffix(".png"))


def derived(results):
    """The half inside minus the model made for that size, with paired intervals."""
    splits = ("choose", "report")
    return {
        "intervals": hybrid.INTERVALS,
        "elastic_minus_half": {s: results.difference("elastic", "half", s) for s in splits},
    }


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
