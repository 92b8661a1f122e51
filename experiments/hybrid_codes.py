"""What do common vocabulary tables cost once the hybrid is healed (H8 of its design)?

Command: python experiments/hybrid_codes.py [--only CELL ...] [--seeds N ...]; repeat it to go on.
A DELVE of the four proxies, bodies dense, no hub, differs in its tables alone: `own` (whole ones of
each parent), `own 1/4` (each factored for itself, ours), `common 1/4` (codes of all four, as
`upcycle` and `fuse --codes` make them). The latter two have a quarter of the tables' parameters.
All are healed with the same tokens towards the same pool, at 5e-4, which for every arm is better on
the choose split at seed 0 than the quickstart's 2e-3 ("try" cells). Bar: `common 1/4` within 0.01
nats of `own` after healing. Cost: 6 minutes of a core a cell and seed, 17 for `longer`.
Result: experiments/results/hybrid_codes.json and .png.
"""

import dataclasses
import sys

import hybrid
import numpy as np

from delve_jax import fuse, models
from delve_jax.compress import codes, vocab
from delve_jax.config import DelveError
from delve_jax.models.linear import materialise

SHARE = 0.25  # of the parameters in tables
LONGER = 4 * hybrid.HEAL
LR, TRIED = 5e-4, 2e-3
TABLES = ("own", "own 1/4", "common 1/4")


def ranks(group):
    """(rank of tables of their own, of common ones): the largest within the same parameters."""
    V = group[0][1].vocab_size
    sides = [(c.d_model, 1 if c.tie_embeddings else 2) for _, c, _ in group]
    budget = SHARE * V * sum(D * n for D, n in sides)
    own, common = sum((V + D) * n for D, n in sides), 2 * (V + sum(D for D, _ in sides))
    return int(budget // own), int(budget // common)


def factored(cfg, params, tokens_NT, rank, seed):
    """One parent with tables of its own at this rank, in the metric of its loss."""
    known = codes.measure(*codes.untied(cfg, params), tokens_NT, seed)
    seen_V, V = vocab.frequencies(tokens_NT, cfg.vocab_size), cfg.vocab_size
    embed_VD = np.asarray(materialise(params["embed"]))[:V]
    as_map = lambda fit: {"v": np.float32(fit.v_IK), "u": np.float32(fit.u_KO)}  # noqa: E731
    if cfg.tie_embeddings:
        w_V = vocab.weights((seen_V + known.predicted_V) / 2)
        fit = vocab.factor_tied(embed_VD, known.gram_DD, w_V, rank, known.grad_DD)
        made = {"embed": as_map(fit)}
    else:
        head_DV = np.asarray(materialise(params["head"]))[:, :V]
        embed = vocab.factor_embed(embed_VD, vocab.weights(seen_V), rank, known.grad_DD)
        head = vocab.factor_head(head_DV, known.gram_DD, vocab.weights(known.predicted_V), rank)
        made = {"embed": as_map(embed), "head": as_map(head)}
    table_ranks = tuple((table, (rank,)) for table in made)
    return dataclasses.replace(cfg, ranks=(*cfg.ranks, *table_ranks)), {**params, **made}


def delve(tables, seed):
    """(config, parameters) of the hybrid at step 0, pool weights fitted with these tables."""
    group, tokens_NT = [(n, *hybrid.plain(n)) for n in hybrid.NAMES], hybrid.calibration(seed)
    own, common = ranks(group)
    if tables == "common 1/4":
        group = codes.common(group, tokens_NT, common, seed)
    elif tables == "own 1/4":
        group = [(n, *factored(c, p, tokens_NT, own, seed)) for n, c, p in group]
    half = tokens_NT[: len(tokens_NT) // 2]
    return fuse.fuse(group, half, shared=tables == "common 1/4", seed=seed)[:2]


def make(tables, seed, lr=LR, tokens=hybrid.HEAL, key=""):
    """One row: the hybrid at step 0 and healed."""
    cfg, params = delve(tables, seed)
    before = hybrid.scored(cfg, params)
    key = f"codes-{tables.replace('/', '').replace(' ', '-')}{key}-lr{lr:g}-s{seed}"
    healed = hybrid.healed(key, cfg, params, seed, tokens=tokens, lr=lr)
    tree = models.abstract_params(cfg)
    size = sum(a.size for p in (tree.get("codes", {}), *tree["streams"].values())
               for t in ("embed", "head") if t in p for a in p[t].values())  # fmt: skip
    return hybrid.scored(*healed, step_0=before["report"], step_0_choose=before["choose"],
                         table_parameters=int(size), lr=lr)  # fmt: skip


CELLS = {
    **{t: (lambda s, t=t: make(t, s)) for t in TABLES},
    **{f"try {t}, lr {TRIED:g}": (lambda s, t=t: make(t, s, TRIED)) for t in TABLES},
    **{f"{t}, longer": (lambda s, t=t: make(t, s, tokens=LONGER, key="-longer")) for t in TABLES},
}  # fmt: skip


def main():
    args = hybrid.flags(__doc__, CELLS).parse_args()
    results = hybrid.Results("hybrid_codes", "python experiments/hybrid_codes.py", share=SHARE,
                             longer=LONGER, lr=LR)  # fmt: skip
    todo = [(c, s) for s in args.seeds for c in args.only if s == 0 or not c.startswith("try")]
    results.fill(todo, CELLS, "codes")
    results.save(**derived(results))
    picture(results, results.path.with_suffix(".png"))


def derived(results):
    """What smaller tables cost beside whole ones, at each length, with paired intervals."""
    gap = {}
    for end in ("", ", longer"):
        for one, other in (("common 1/4", "own"), ("own 1/4", "own"), ("common 1/4", "own 1/4")):
            if found := results.difference(one + end, other + end):
                gap[f"{one} - {other}{end}"] = found
    return {"intervals": hybrid.INTERVALS, "difference": gap}


def picture(results, file):
    """Nats above the whole tables that were healed as long, over healing tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(5.2, 3.4), dpi=150, layout="constrained")
    for tables, colour in (("own 1/4", "#ee6677"), ("common 1/4", "#4477aa")):
        points = []
        for at, (cell, field) in enumerate(
            (("{}", "step_0"), ("{}", "report"), ("{}, longer", "report"))
        ):
            rows = {t: {r["seed"]: r[field] for r in results.rows if r["cell"] == cell.format(t)}
                    for t in (tables, "own")}  # fmt: skip
            both = sorted(rows[tables].keys() & rows["own"].keys())
            each = [rows[tables][s] - rows["own"][s] for s in both]
            ax.plot([at] * len(each), each, "o", color=colour, ms=4, alpha=0.6)
            if each:
                points.append((at, np.mean(each)))
        ax.plot(*zip(*points, strict=True), color=colour, lw=1.8, label=tables)
    ax.axhline(0.01, color="#888888", ls=":", lw=1, label="bar of the design, 0.01")
    ax.set_yscale("log")
    ax.set_xticks(range(3), ["before", f"{hybrid.HEAL:,}", f"{LONGER:,}"])
    ax.set(xlabel="healing tokens", ylabel="nats above whole tables of their own")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    fig.savefig(file)


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
