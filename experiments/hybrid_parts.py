"""What is each part of a DELVE worth: connectors, pooling, gate, objective, order, every parent?

Command: python experiments/hybrid_parts.py [--only CELL ...] [--seeds N ...]; repeat it to go on.
N = 1.25 x the largest parent, 204,800 healing tokens for every cell, all else as in `base` (hub
that hears all, J = 1, gate, half cross-entropy and half KL to the pool of the dense parents). The
learning rate is that of the quickstart for all cells; nothing was tuned per cell. Connectors: self
has the same parameters as hub and cross and reads only its own stream, so that what it gains is
adapter capacity. Cost: about six minutes of a core a cell and seed.
Result: experiments/results/hybrid_parts.json and docs/results.md; the rule for defaults: a part
that does not help at 95 % on three seeds is off by default.
"""

import argparse
import dataclasses
import sys

import hybrid

from delve_jax import fuse, models
from delve_jax.config import DelveError
from delve_jax.models import delve, elastic
from delve_jax.train.objective import Terms

N = int(1.25 * hybrid.LARGEST)
ELASTIC = 0.4  # least share of the ranks under rank-drop

# cell: (what is built, how it is healed)
CELLS = {
    "base": ({}, {}),
    "none": ({"connectors": "none"}, {}),
    "self": ({"connectors": "self"}, {}),
    "cross": ({"connectors": "cross"}, {}),
    "warm hub": ({"warm": True}, {}),
    "no gate": ({"gate": False}, {}),
    "J=2": ({"latents": 2}, {}),
    "J=K": ({"latents": 4}, {}),
    "CE": ({}, {"terms": Terms(ce=1.0, kl=0.0)}),
    "KL": ({}, {"terms": Terms(ce=0.0, kl=1.0)}),
    "+ streams": ({}, {"terms": Terms(streams=0.3)}),
    "+ streams, hidden": ({}, {"terms": Terms(streams=0.3, hidden=1.0)}),
    "+ streams, stream-drop": ({}, {"terms": Terms(streams=0.3, stream_drop=0.1)}),
    "joints lr x5": ({}, {"joints_lr": 5.0}),
    "hybrid stages": ({}, {"stages": "hybrid"}),
    "alone": ({}, {"terms": Terms(ce=0.0, kl=0.0, streams=1.0), "trains": "experts"}),
    "elastic": ({}, {"terms": Terms(rank_drop=ELASTIC)}),
    "half": ({"N": N // 2}, {}),
    **{f"lr {lr:g}": ({}, {"lr": lr}) for lr in (1e-3, 4e-3)},
    **{f"half, lr {lr:g}": ({"N": N // 2}, {"lr": lr}) for lr in (1e-3, 4e-3)},
    **{f"without {n}": ({"names": tuple(m for m in hybrid.NAMES if m != n)}, {})
       for n in hybrid.NAMES},
}  # fmt: skip


def make(cell, seed):
    """One row: the model at step 0 and healed, and what is asked of this cell beside."""
    built, how = CELLS[cell]
    cfg, params, report = hybrid.hybrid(**{"N": N, "seed": seed} | built)
    before = hybrid.scored(cfg, params)
    key = f"parts-{cell.replace(' ', '-').replace(',', '')}-s{seed}"
    if cell == "base":
        key = f"delve-{N}-s{seed}"  # hybrid_curve.py's model of this size is the same
    names = built.get("names", hybrid.NAMES)
    cfg, params = hybrid.healed(key, cfg, params, seed, names, **how)
    row = hybrid.scored(cfg, params, step_0=before["report"], step_0_choose=before["choose"])
    if "warm_hub" in report:
        row["warm_hub"] = report["warm_hub"]
    if cell in ("base", "+ streams", "+ streams, stream-drop"):
        row["subsets"] = {"+".join(s): subset(cfg, params, s, seed) for s in SUBSETS}
    if cell in ("base", "elastic"):
        half = elastic.shrink(cfg, params, N // 2)
        row["half"] = hybrid.scored(*half)["report"]
        row["half_parameters"] = models.count(half[0])
    return row


SUBSETS = (("mamba", "rwkv"), ("incite", "neox"), ("rwkv",))


def subset(cfg, params, names, seed):
    """A subset of the streams, and the ensemble of its own: the same streams with a pool fitted
    anew on calibration tokens, hub and gate left out."""
    part = delve.subset(cfg, params, names)
    streams = delve.whole(*part)
    made = [(n, sub, streams[n]) for n, sub in part[0].streams]
    rows = hybrid.calibration(seed)[: len(hybrid.calibration(seed)) // 2]
    pool = fuse.fuse(made, rows, connectors="none", shared=True)
    bare = dataclasses.replace(pool[0], gate_proj=0, gate_hidden=0)
    tree = {k: v for k, v in pool[1].items() if k != "gate"}
    return {"subset": float(hybrid.nats(*part, "report").mean()),
            "ensemble": float(hybrid.nats(bare, tree, "report").mean())}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL")
    parser.add_argument("--seeds", nargs="+", type=int, default=hybrid.SEEDS, metavar="N")
    parser.add_argument("--out", default="hybrid_parts", help="name of the results")
    args = parser.parse_args()
    results = hybrid.Results(args.out, "python experiments/hybrid_parts.py", parameters=N)
    with hybrid.metrics.progress(len(args.only) * len(args.seeds), "parts", "cell") as bar:
        for seed in args.seeds:
            for cell in args.only:
                results.row(cell, seed, lambda c=cell, s=seed: make(c, s))
                bar.update(1)
    against = {
        cell: {split: results.difference(cell, "base", split) for split in ("choose", "report")}
        for cell in CELLS
        if results.cell(cell) and cell != "base"
    }
    if results.cell("self") and results.cell("cross"):
        against["cross - self"] = {s: results.difference("cross", "self", s)
                                   for s in ("choose", "report")}  # fmt: skip
    results.save(against_base=against)


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
