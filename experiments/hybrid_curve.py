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

import argparse
import dataclasses
import sys

import hybrid
import numpy as np

from delve_jax import checkpoint, data, fuse, models, parallel, presets
from delve_jax.config import DelveError
from delve_jax.delphi import recipe
from delve_jax.report import ACCENT, INK, KINDS, MUTED
from delve_jax.train import run

SIZES = (0.5, 1.0, 1.25)


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=float, default=SIZES, metavar="X")
    parser.add_argument("--seeds", nargs="+", type=int, default=hybrid.SEEDS, metavar="N")
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=list(MAKERS), metavar="KIND")
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
                    N = int(size * hybrid.LARGEST)
                    make = MAKERS[kind]
                    results.row(f"{kind} {size:g}", seed, lambda m=make, n=N, s=seed: m(n, s))
                    bar.update(1)
    against = {}
    for ours in {row["cell"] for row in results.rows if row["cell"].startswith("delve ")}:
        size = ours.split()[1]
        against[size] = {
            kind: results.difference(ours, f"{kind} {size}")
            for kind in MAKERS
            if kind != "delve" and results.cell(f"{kind} {size}")
        }
    results.save(delve_minus=against)
    picture(results.rows, results.path.with_suffix(".png"))


UP = {"incite": 3, "neox": -8}  # points: their labels would lie on each other


def picture(rows, path):
    """Parameters against nats a token: every model, a mark a seed, a line through the means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    kinds = [k for k in MAKERS if any(row["cell"].rpartition(" ")[0] == k for row in rows)]
    top = 1 + min(row["report"] for row in rows)  # a model from scratch learns little so soon
    off = sorted({f"{r['cell']}: {r['report']:.1f}" for r in rows if r["report"] > top})
    rows = [row for row in rows if row["report"] <= top]
    for name in hybrid.NAMES:  # dense ones are hollow, each in the colour of its compressed form
        (row,) = (row for row in rows if row["cell"] == f"dense {name}")
        x, y = row["parameters"] / 1e6, row["report"]
        colour = KINDS[3 + hybrid.NAMES.index(name)]
        ax.plot(x, y, "o", mfc="white", color=colour, ms=7)
        ax.annotate(f"dense {name}", (x, y), xytext=(7, UP.get(name, -3)), fontsize=8,
                    textcoords="offset points", color=colour)  # fmt: skip
    for kind in kinds:
        if not (mine := [row for row in rows if row["cell"].rpartition(" ")[0] == kind]):
            continue
        own = kind.removeprefix("part-")
        colour = (
            KINDS[3 + hybrid.NAMES.index(own)] if own in hybrid.NAMES
            else {"delve": ACCENT, "ensemble": INK}.get(kind, MUTED)
        )  # fmt: skip
        cells = sorted({row["cell"] for row in mine}, key=lambda c: float(c.split()[1]))
        means = [
            (np.mean([r["parameters"] for r in mine if r["cell"] == c]) / 1e6,
             np.mean([r["report"] for r in mine if r["cell"] == c])) for c in cells
        ]  # fmt: skip
        marker = "D" if kind == "delve" else "v" if kind.startswith("part-") else "s"
        ax.plot([r["parameters"] / 1e6 for r in mine], [r["report"] for r in mine], marker,
                color=colour, ms=5, alpha=0.6)  # fmt: skip
        ax.plot(*zip(*means, strict=True), "-", color=colour, lw=1)
        label = f"{own} compressed, healed" if kind.startswith("part-") else kind
        label = f"{kind} healed" if kind in hybrid.NAMES else label
        ax.annotate(label.replace("delve", "DELVE"), means[0], xytext=(7, UP.get(own, -3)),
                    fontsize=8, textcoords="offset points", color=colour)  # fmt: skip
    ax.set(xlabel="parameters (millions, all counted)", ylabel="nats per token, report split")
    more = f"\noff the picture: {', '.join(off)}" if off else ""
    ax.set_title(f"{hybrid.HEAL:,} tokens for each but the dense{more}", fontsize=9)
    ax.margins(x=0.2)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
