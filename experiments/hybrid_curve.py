"""The whole curve: DELVE against what else the same parameters and the same tokens could be.

Command: python experiments/hybrid_curve.py [--sizes X ...] [--seeds N ...]; repeat it to go on.
At N = X times the largest parent: DELVE; each single parent compressed to N (itself, dense, where N
is more than it has) and healed with the same tokens and the same teacher pool; each parent at the
keep ratio of the whole, healed so (part-NAME), and the ensemble of these four, pooled with weights
fitted afterwards; a Qwen3 of size N by the Delphi recipe from scratch on the same tokens. Choices
that could favour DELVE: none was tuned here; the rate is that of the quickstart for all but the
model from scratch, which takes the recipe's. Nats a token on the report split, three seeds.
Cost: about 25 minutes of a core a size and seed.
Result: experiments/results/hybrid_curve.json and README, the losing region included.
"""

import dataclasses
import sys

import hybrid
import numpy as np

from delve_jax import checkpoint, data, fuse, models, parallel, presets
from delve_jax.config import DelveError
from delve_jax.delphi import recipe
from delve_jax.report import ACCENT, INK, KINDS, MUTED
from delve_jax.train import run

SIZES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
# at rank 1 everywhere mamba has more than its share of 0.25
CANNOT = ("part-mamba 0.25", "ensemble 0.25")


def delve(N, seed):
    """The healed DELVE of N parameters."""
    if (place := hybrid.WORK / "healed" / f"delve-{N}-s{seed}").exists():
        return checkpoint.restore(place)
    return hybrid.healed(place.name, *hybrid.hybrid(N, seed)[:2], seed)


def of_delve(N, seed):
    before = hybrid.nats(*hybrid.hybrid(N, seed)[:2], "report").mean()
    return hybrid.scored(*delve(N, seed), step_0=float(before))


def of_single(N, seed, name):
    cfg, params = hybrid.single(name, N, seed)
    before = float(hybrid.nats(cfg, params, "report").mean())
    cfg, params = hybrid.healed(f"curve-{name}-{N}-s{seed}", cfg, params, seed)
    return hybrid.scored(cfg, params, step_0=before)


def part(N, seed, name):
    """A parent at the keep ratio at which all four together have N parameters, healed alone."""
    total = sum(models.count(hybrid._source(n).cfg) for n in hybrid.NAMES)
    own = int(models.count(hybrid._source(name).cfg) / total * (N - len(hybrid.NAMES)))
    cfg, params = hybrid.single(name, own, seed)
    return hybrid.healed(f"curve-part-{name}-{N}-s{seed}", cfg, params, seed)


def ensemble(N, seed):
    """The four healed parts side by side, pooled afterwards on calibration tokens."""
    made = [(name, *part(N, seed, name)) for name in hybrid.NAMES]
    rows = hybrid.calibration(seed)[: len(hybrid.calibration(seed)) // 2]
    cfg, params, _ = fuse.fuse(made, rows, connectors="none", seed=seed)
    cfg = dataclasses.replace(cfg, gate_proj=0, gate_hidden=0)
    return cfg, {k: v for k, v in params.items() if k != "gate"}


def of_scratch(N, seed):
    """Qwen3 by the recipe's shape rules at the nearest size of at most N parameters."""
    vocab = hybrid.dense("rwkv")[0].vocab_size
    rules = dataclasses.replace(
        recipe.DELPHI, vocab_size=vocab, head_dim=16, min_hidden=16, seq_len=hybrid.WINDOW,
        depth_base=1,
    )  # fmt: skip
    fits = [presets.delphi(w, rules) for w in range(32, 513, 16)]
    cfg = max((c for c in fits if models.count(c) <= N), key=models.count)
    settings = run.Settings(
        tokens=hybrid.HEAL, batch=hybrid.BATCH, window=hybrid.WINDOW, optimizer="adamh", lr=0.01,
        adam_lr=0.015, schedule="linear", seed=seed,
    )  # fmt: skip
    work = hybrid.WORK / "healed" / f"curve-scratch-{N}-s{seed}.partial"
    params, _ = run.pretrain(
        cfg,
        lambda T, batch, shard, shards: data.batches(
            hybrid.healing_rows(), batch, seed, shard, shards
        ),
        settings, mesh=parallel.make_mesh(None), workdir=work,
        eot=data.eot_of(hybrid.tokenizer()),
    )  # fmt: skip
    return hybrid.scored(cfg, params)


MAKERS = {
    "delve": of_delve, "scratch": of_scratch,
    "ensemble": lambda N, seed: hybrid.scored(*ensemble(N, seed)),
    **{f"part-{n}": (lambda N, seed, n=n: hybrid.scored(*part(N, seed, n))) for n in hybrid.NAMES},
    **{n: (lambda N, seed, n=n: of_single(N, seed, n)) for n in hybrid.NAMES},
}  # fmt: skip


def main():
    parser = hybrid.flags(__doc__, MAKERS, "KIND")
    parser.add_argument("--sizes", nargs="+", type=float, default=SIZES, metavar="X")
    parser.add_argument("--out", default="hybrid_curve", help="name of the results")
    args = parser.parse_args()
    results = hybrid.Results(args.out, "python experiments/hybrid_curve.py",
                             largest=hybrid.LARGEST)  # fmt: skip
    for name in hybrid.NAMES:
        results.row(f"dense {name}", 0, lambda n=name: hybrid.scored(*hybrid.dense(n)[:2]))
    with hybrid.metrics.progress(
        len(args.sizes) * len(args.seeds) * len(args.only), "curve", "cell"
    ) as bar:
        for seed in args.seeds:
            for size in args.sizes:
                for kind in args.only:
                    N, make, cell = int(size * hybrid.LARGEST), MAKERS[kind], f"{kind} {size:g}"
                    if cell not in CANNOT:
                        results.row(cell, seed, lambda m=make, n=N, s=seed: m(n, s))
                    bar.update(1)
    results.save(**derived(results))
    picture(results.rows, results.path.with_suffix(".png"))


def derived(results):
    """DELVE minus every rival of its size, and minus the dense parents, with paired intervals."""
    sizes = {r["cell"].split()[1] for r in results.rows if r["cell"].startswith("delve ")}
    sizes = sorted(sizes, key=float)
    rivals = [kind for kind in MAKERS if kind != "delve"]
    dense = results.at_every_seed("dense ")
    against = {
        size: {k: results.difference(f"delve {size}", f"{k} {size}") for k in rivals
               if results.cell(f"{k} {size}")} for size in sizes
    }  # fmt: skip
    return {
        "intervals": hybrid.INTERVALS,
        "delve_minus": {s: {k: gap for k, gap in x.items() if gap} for s, x in against.items()},
        "delve_minus_dense": {s: {n: dense.difference(f"delve {s}", f"dense {n}")
                                  for n in hybrid.NAMES} for s in sizes},
    }  # fmt: skip


def colour_of(kind):
    own = kind.removeprefix("part-")
    return (KINDS[3 + hybrid.NAMES.index(own)] if own in hybrid.NAMES
            else {"delve": ACCENT, "ensemble": INK}.get(kind, MUTED))  # fmt: skip


def draw(ax, rows, kinds, gap, whole=False):
    """Lines through the means of each kind, a mark a seed -> {kind: [x of each N, mean nats]}.

    gap: least distance of two labels, nats. whole: x is N, not the parameters of the row's model.
    """
    paths = {}
    for kind in kinds:
        mine = [dict(r, x=int(float(r["cell"].split()[1]) * hybrid.LARGEST) if whole
                     else r["parameters"])
                for r in rows if r["cell"].rpartition(" ")[0] == kind]  # fmt: skip
        if not mine:
            continue
        cells = sorted({r["cell"] for r in mine}, key=lambda c: float(c.split()[1]))
        x, y = (
            [np.mean([r[key] for r in mine if r["cell"] == c]) / by for c in cells]
            for key, by in (("x", 1e6), ("report", 1))
        )
        paths[kind] = np.array([x, y])
        marker = "D" if kind == "delve" else "v" if kind.startswith("part-") else "s"
        colour = colour_of(kind)
        ax.plot([r["x"] / 1e6 for r in mine], [r["report"] for r in mine], marker, color=colour,
                ms=5, alpha=0.6)  # fmt: skip
        ax.plot(x, y, "-", color=colour, lw=2 if kind == "delve" else 1)
    last = -np.inf
    for kind in sorted(paths, key=lambda k: paths[k][1][0]):  # labels pushed apart, upwards
        x, y = paths[kind][:, 0]
        last = max(y, last + gap)
        name = kind.removeprefix("part-").replace("delve", "DELVE")
        ax.annotate(name, (x, y), xytext=(x - 0.06, last), ha="right", va="center", fontsize=9,
                    color=colour_of(kind))  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    return paths


def picture(rows, path):
    """Left: DELVE and single parents at equal parameters, what it loses shaded; right: at equal
    keep ratio, where each parent alone has its share of N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.8), dpi=150, layout="constrained")
    paths = draw(left, rows, ["delve", "ensemble", *hybrid.NAMES], 0.03)
    ours = paths["delve"]
    grid = np.linspace(ours[0, 0], ours[0, -1], 200)
    singles = {k: v for k, v in paths.items() if k in hybrid.NAMES}
    for name, (x, y) in singles.items():  # more parameters than it has are of no use to it
        if x[-1] < grid[-1]:
            left.plot([x[-1], grid[-1]], [y[-1]] * 2, ":", color=colour_of(name), lw=1)
    if singles:
        best = np.min([np.interp(grid, *xy, left=np.inf) for xy in singles.values()], axis=0)
        delve = np.interp(grid, *ours)
        left.fill_between(
            grid, best, delve, where=np.isfinite(best) & (delve > best), color=ACCENT, alpha=0.1,
            lw=0, label="DELVE loses to the best single parent",
        )  # fmt: skip
    for row in rows:
        if row["cell"].startswith("dense "):
            left.plot(row["parameters"] / 1e6, row["report"], "o", mfc="white", ms=7,
                      color=colour_of(row["cell"].split()[1]))  # fmt: skip
    left.plot([], [], "s", color=MUTED, ms=5, label="one parent compressed to N, healed\n"
              "(dotted: N is more than it has)")  # fmt: skip
    left.plot([], [], "o", mfc="white", color=MUTED, ms=7, label="dense parent, not healed")
    left.set_title("Equal parameters", fontsize=10)
    left.set(xlabel="parameters (millions, all counted)", ylabel="nats per token, report split")
    draw(right, rows, ["delve", "ensemble", *(f"part-{n}" for n in hybrid.NAMES)], 0.075, True)
    right.plot([], [], "v", color=MUTED, ms=5, label="one parent at the keep ratio of the whole,"
               "\nhealed (each has its share of N)")  # fmt: skip
    right.set_title("Equal keep ratio", fontsize=10)
    right.set(xlabel="N of the whole (millions)")
    for ax in (left, right):
        ax.legend(fontsize=8, frameon=False, loc="upper right")
        ax.set_xlim(left=ax.get_xlim()[0] - 0.3)
    scratch = [r["report"] for r in rows if r["cell"].startswith("scratch")]
    more = f"; from scratch {min(scratch):.1f} to {max(scratch):.1f}, not shown" if scratch else ""
    fig.suptitle(f"{hybrid.HEAL:,} healing tokens each; marks are seeds{more}", fontsize=10)
    fig.savefig(path)


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
