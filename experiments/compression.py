"""Does our compression lose less than every published SVD method, at equal counted parameters?

Command: python experiments/compression.py [--only NAME ...] [--keep R ...] [--seeds N ...]
Rows that stand in the results are not run again (--fresh runs the named ones anew). --ablation
switches the parts of our method on and off instead; --table prints the tables and draws the
pictures from what is there. Calibration: 65,536 tokens of the calibrate split, drawn by the seed.
Scored: 128 fixed sequences of 256 tokens of the report split; only the ablation also scores, and
decides by, the choose split. Intervals: 95 %, paired bootstrap over the documents that the
sequences are cut from, seeds averaged.
rwkv-660k is nearly empty (layers 1 to 3 and every FFN add nothing): it tells methods apart only
where the budget is tiny. Result (docs/results.md): ours is ahead of every method on the proxies at
every ratio; the gap of SVD-LLM to the dense parent shrinks by 17 to 51 %.
Cost: about an hour on 2 cores; asvd+strs, which searches by perplexity, takes a third of it.
"""

# Python 3.14 has a module of this name that jax asks for. To every script in this folder it must
# stay what it is to older Pythons: missing. (tables.py reads the tables from the results.)
if __name__ == "compression":
    raise ModuleNotFoundError("No module named 'compression'", name="compression")

import argparse
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import hybrid
import jax
import jax.numpy as jnp
import numpy as np
import rivals

from delve_jax import compress, data, evaluate, metrics, models, parents, road
from delve_jax.config import DelveError
from delve_jax.models.linear import materialise

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
SHARED = ROOT.parent / "shared" / "data"
PARENTS = {
    **{name: ROOT / "delve_jax/proxies" / name for name in ("mamba", "rwkv", "neox", "incite")},
    "rwkv-660k": SHARED / "weights" / "tiny-rwkv-4v0-660K.pth",
}
OURS, REFERENCE = "delve", "svd-llm"
METHODS = ("svd", "asvd", "asvd+strs", REFERENCE, "svd-llm+allocation", "modegpt", OURS)
BLIND = "svd"  # sees no text: its one row, seed 0, stands for every seed
KEEPS, SEEDS = (0.8, 0.6, 0.4, 0.2), (0, 1, 2)
CALIBRATE, BATCH = 65_536, 16
SEQUENCES, WINDOW = hybrid.SEQUENCES, hybrid.WINDOW
INTERVALS = "95 %, paired bootstrap over documents, seeds averaged"
LOST = 1e-4
SPLITS = ("calibrate", "choose", "report")
# parts of our method: keywords of compress.compress, in the order they are added
PARTS = ("bias", "metric", "allocation", "pruning", "anchor")
ABLATION_KEEPS, ABLATION_SEEDS = (0.6, 0.4), (0,)


class Variant(NamedTuple):
    """One line of a table: a method, and the parts of it that are set."""

    label: str
    method: str
    parts: dict


def variants(ablation):
    """The methods; or our parts added one by one to the bare form, and each that is on by default
    taken away alone."""
    if not ablation:
        return [Variant(m, m, {}) for m in METHODS]
    known = inspect.signature(compress.compress).parameters
    ours = {part: known[part].default is not False for part in PARTS}
    sums = dict.fromkeys(PARTS, False)
    out = [Variant("bare", OURS, dict(sums))]
    for part in PARTS:
        sums[part] = True
        out.append(Variant(f"+ {part}", OURS, dict(sums)))
    # without the last of them ours is the sum before it
    *some, _ = [part for part in PARTS if ours[part]]
    return out + [Variant(f"all - {p}", OURS, ours | {p: False}) for p in some]


# ---- parents and data ----------------------------------------------------------------------------


@functools.cache
def documents():
    """{split: its documents} of the shared text."""
    everything = data.shared_documents(SHARED / "text")
    return {name: data.split(everything, name) for name in SPLITS}


@functools.cache
def hashes():
    return {name: data.data_hash(docs) for name, docs in documents().items()}


@functools.cache
def scored(tokenizer_json, vocab_size, split):
    """(the fixed windows [SEQUENCES, WINDOW + 1] of a split that are scored, document of each)."""
    tok = data.load_tokenizer(tokenizer_json, vocab_size)
    return hybrid.scored_windows(tok, documents()[split])


def as_dense(params, like):
    """The tree in the shapes of the dense parent `like`: factors multiplied out, pruned neurons
    zero. The same function up to float32 rounding, but one compiled program scores every row.
    None where the parent has no place for something, say a bias that was added."""
    if not isinstance(like, dict):
        grow = [(0, n - m) for n, m in zip(like.shape, params.shape, strict=True)]
        return jnp.pad(params, grow) if any(after for _, after in grow) else params
    if "kernel" in like:
        params = {"kernel": materialise(params)} | {k: params[k] for k in params if k == "bias"}
    if set(params) != set(like):
        return None
    out = {name: as_dense(params[name], sub) for name, sub in like.items()}
    return None if any(sub is None for sub in out.values()) else out


class Parent:
    """A dense parent with its calibration windows and its scores."""

    def __init__(self, name):
        self.name = name
        self.cfg, self.params, self.tokenizer = parents.load(PARENTS[name], dtype="float32")
        self.cfg = dataclasses.replace(self.cfg, dtype="float32")  # bytes are those of factors
        # what is counted and scored has no padding rows in the vocabulary
        self.cfg, self.params, _ = compress.compress(
            self.cfg, self.params, None, keep=1.0, method="svd"
        )
        self.total = models.count(self.cfg)
        self.like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), self.params)
        self.calibration = functools.cache(self._calibration)
        self._place = tempfile.TemporaryDirectory(prefix="delve-study-")

    def _calibration(self, seed):
        return road.calibration_windows(
            self.cfg, self.tokenizer, documents()["calibrate"], CALIBRATE, seed
        )

    def _work(self, variant, seed):
        """The folder whose factors all keep ratios of a variant slice."""
        parts = "-".join(f"{part}.{value}" for part, value in sorted(variant.parts.items()))
        return Path(self._place.name) / f"{variant.method}-{parts}-{seed}"

    def scores(self, cfg, params, split):
        """Nats of every sequence of a split, [SEQUENCES] float64."""
        dense = as_dense(params, self.like)
        model = evaluate.Model(cfg, params) if dense is None else evaluate.Model(self.cfg, dense)
        score = evaluate.as_scorer(model).score
        rows, out = scored(self.tokenizer, self.cfg.vocab_size, split)[0], []
        for i in range(0, len(rows), BATCH):
            nll_BT, _ = score(rows[i : i + BATCH, :-1], rows[i : i + BATCH, 1:])
            out.append(np.asarray(nll_BT, np.float64).sum(1))
        return np.concatenate(out)

    def measure(self, variant, keep, seed, splits):
        """One row: compress and score; a ratio that the method cannot meet is a row as well."""
        began, work = time.perf_counter(), self._work(variant, seed)
        try:
            if variant.method in rivals.RIVALS:
                cfg, params, row = rivals.counted(
                    variant.method, self.cfg, self.params, self.calibration(seed), keep, work
                )
            else:
                cfg, params, report = compress.compress(
                    self.cfg, self.params, self.calibration(seed), keep=keep, work=work,
                    method=variant.method, progress=False, **variant.parts,
                )  # fmt: skip
                row = {"parameters": models.count(cfg), "bytes": evaluate.parameter_bytes(cfg)}
                row |= {"neurons": list(report.plan.neurons)} if report.plan.neurons else {}
        except DelveError as err:
            return {"refused": str(err)}
        if row["parameters"] > math.floor(keep * self.total * (1 + 1e-12)):
            raise RuntimeError(f"{self.name}, {variant.label}, keep {keep}: over the budget: {row}")
        for split in splits:
            row |= _sums(split, self.scores(cfg, params, split))
        return row | {"seconds": round(time.perf_counter() - began, 1)}


def _sums(split, nats_N):
    """Fields of a split: mean nats per token, and the sums that the bootstrap resamples."""
    return {split: float(nats_N.sum() / (len(nats_N) * WINDOW)),
            f"{split}_sums": [round(float(x), 4) for x in nats_N]}  # fmt: skip


# ---- running -------------------------------------------------------------------------------------


def code_hash():
    """Of the compression code: rows of different code are told apart."""
    files = [*sorted((ROOT / "delve_jax/compress").glob("*.py")), Path(rivals.__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def key_of(row):
    return row["study"], row["parent"], row["label"], row["keep"], row["seed"]


def read(path):
    """The results so far; DelveError where they are not of the text that is here."""
    result = json.loads(path.read_text()) if path.exists() else {"dense": {}, "rows": []}
    if result.get("data_hash", hashes()) != hashes():
        raise DelveError(f"{path}: holds rows of other text; name another file with --out")
    return result


def write(path, result):
    """One line a row, so that versions of the file can be compared."""
    rows = ",\n".join(json.dumps(row) for row in sorted(result["rows"], key=key_of))
    rest = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1)[:-2]
    partial = path.with_suffix(".partial")
    partial.write_text(f'{rest},\n "rows": [\n{rows}\n ]\n}}\n')
    partial.replace(path)


def run(args):
    """Every row that was asked for and is not there yet, parent by parent, saved one by one."""
    study = "ablation" if args.ablation else "methods"
    lines = variants(args.ablation)
    if args.only and (named := [v for v in lines if v.label in args.only]):
        lines = named
    names = [n for n in PARENTS if n in (args.only or ())] or list(PARENTS)
    if unknown := set(args.only or ()) - set(PARENTS) - {v.label for v in variants(args.ablation)}:
        raise DelveError(f"--only {unknown.pop()}: neither a parent nor a line of the table")
    if missing := {v.method for v in lines} - {*compress.METHODS, *rivals.RIVALS}:
        print(f"left out, compress lacks them: {', '.join(sorted(missing))}", file=sys.stderr)
        lines = [v for v in lines if v.method not in missing]
    result = read(args.out) | {
        "command": "python experiments/compression.py (in parts, by --only), then --table",
        "seeds": SEEDS,
        "tokens": {"calibrate": CALIBRATE, "scored": SEQUENCES * WINDOW, "window": WINDOW},
        "versions": metrics.versions(),
        "data_hash": hashes(),
    }
    done = {key_of(row) for row in result["rows"]}
    keeps = args.keep or (ABLATION_KEEPS if args.ablation else KEEPS)
    seeds = args.seeds if args.seeds is not None else ABLATION_SEEDS if args.ablation else SEEDS
    splits = ("choose", "report") if args.ablation else ("report",)
    jobs = [
        ({"study": study, "parent": name, "label": v.label, "keep": keep, "seed": seed}, v)
        for name in names for keep in keeps for v in lines
        for seed in ((0,) if v.method == BLIND else seeds)
    ]  # fmt: skip
    jobs, parent = [j for j in jobs if args.fresh or key_of(j[0]) not in done], None
    with metrics.progress(len(jobs), study, "row") as bar:
        for facts, variant in jobs:
            if parent is None or parent.name != facts["parent"]:
                parent = Parent(facts["parent"])
                dense = {"parameters": parent.total}
                for split in ("choose", "report"):
                    dense |= _sums(split, parent.scores(parent.cfg, parent.params, split))
                result["dense"][parent.name] = dense
            row = facts | parent.measure(variant, facts["keep"], facts["seed"], splits)
            row |= {"parts": variant.parts, "code": code_hash()}
            result["rows"] = [r for r in result["rows"] if key_of(r) != key_of(row)] + [row]
            write(args.out, result)
            bar.set_postfix_str(f"{row['parent']} {row['label']} {row['keep']}")
            bar.update(1)


# ---- comparing -----------------------------------------------------------------------------------


def by_seed(result, study, parent, label, keep, split="report"):
    """{seed: nats per token of every sequence, [SEQUENCES]} of one cell."""
    key = study, parent, label, keep
    rows = [row for row in result["rows"] if key_of(row)[:4] == key and "refused" not in row]
    return {row["seed"]: np.array(row[f"{split}_sums"]) / WINDOW for row in rows}


def paired(result, parent, keep, rival):
    """Ours and the rival's nats per token of every sequence, means over the seeds of both."""
    ours, theirs = (by_seed(result, "methods", parent, label, keep) for label in (OURS, rival))
    if rival == BLIND:
        theirs = dict.fromkeys(ours, theirs.get(0)) if theirs else {}
    seeds = sorted(ours.keys() & theirs.keys())
    return [np.mean([cell[s] for s in seeds], 0) if seeds else None for cell in (ours, theirs)]


@functools.cache
def resamples(parent):
    """What each report sequence counts in every draw of documents, [RESAMPLES, SEQUENCES]."""
    cfg, _, tokenizer = parents.load(PARENTS[parent], dtype="float32")
    document_N = scored(tokenizer, cfg.vocab_size, "report")[1]
    return hybrid.resampled(document_N, np.random.default_rng(0))


def interval(a_N, b_N, w_RN):
    """(mean, low, high) of a - b: 95 % of the paired bootstrap with these `resamples`."""
    drawn = w_RN @ (a_N - b_N)
    return float(np.mean(a_N - b_N)), *map(float, np.percentile(drawn, (2.5, 97.5)))


def closed(ours_N, theirs_N, dense_N, w_RN):
    """(share, low, high) of the gap between theirs and the dense parent that ours closes.

    None where theirs loses too little (LOST nats a token) for a share of it to mean anything.
    """
    if np.mean(theirs_N - dense_N) < LOST:
        return None
    drawn = (w_RN @ (theirs_N - ours_N)) / (w_RN @ (theirs_N - dense_N))
    share = np.mean(theirs_N - ours_N) / np.mean(theirs_N - dense_N)
    return float(share), *map(float, np.percentile(drawn, (2.5, 97.5)))


def comparisons(result):
    """Ours against every other method: one row per parent, keep and rival."""
    out = []
    for parent, dense in result["dense"].items():
        dense_N, w_RN = np.array(dense["report_sums"]) / WINDOW, resamples(parent)
        for keep in KEEPS:
            for rival in METHODS[:-1]:
                ours_N, theirs_N = paired(result, parent, keep, rival)
                if ours_N is None:
                    continue
                out.append({"parent": parent, "keep": keep, "rival": rival,
                            "difference": interval(ours_N, theirs_N, w_RN),
                            "gap_closed": closed(ours_N, theirs_N, dense_N, w_RN)})  # fmt: skip
    return out


def table(result):
    """Markdown: nats per token by parent, keep and method; what ours gains on SVD-LLM."""
    compared = {(c["parent"], c["keep"], c["rival"]): c for c in comparisons(result)}
    refusals = {key_of(row)[1:4] for row in result["rows"] if "refused" in row}
    fewest = len(SEEDS)  # calibration seeds behind a cell, at least
    lines = [
        "| parent (dense) | keep | "
        + " | ".join(METHODS)
        + f" | {OURS} - {REFERENCE}, 95 % | gap closed |",
        "|---|---:|" + "---:|" * (len(METHODS) + 2),
    ]
    beaten = True
    for parent, dense in result["dense"].items():
        for keep in KEEPS:
            cells = []
            for method in METHODS:
                cell = by_seed(result, "methods", parent, method, keep)
                if cell and method != BLIND:
                    fewest = min(fewest, len(cell))
                c = compared.get((parent, keep, method))
                low, high = (-1, -1) if c is None else c["difference"][1:]
                sign = "!" if low > 0 else "=" if high >= 0 else ""
                beaten &= not sign
                nats = f"{np.mean([*cell.values()]):.4f}{sign}" if cell else ""
                cells.append(nats or "n/a" * ((parent, method, keep) in refusals))
            if not any(cells):
                continue
            if c := compared.get((parent, keep, REFERENCE)):
                mean, low, high = c["difference"]
                cells += [
                    f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]",
                    f"{c['gap_closed'][0]:.0%}" if c["gap_closed"] else "",
                ]
            else:
                cells += ["", ""]
            lines.append(f"| {parent} ({dense['report']:.4f}) | {keep} | {' | '.join(cells)} |")
    caption = (
        f"Training-free, nats per token on {SEQUENCES * WINDOW:,} report tokens, mean of {fewest} "
        "calibration seeds; the keep ratio counts every parameter, tables included; intervals "
        "resample documents:"
    )
    lines = [caption, "", *lines]
    if refusals:
        lines += ["", "n/a: the method cannot do it (the budget is too small, or there is no MLP)."]
    if not beaten:
        lines += ["", "= : the interval of ours minus it contains zero; ! : it is better."]
    if len({row["code"] for row in result["rows"] if row["study"] == "methods"}) > 1:
        lines += ["", "Rows were made by more than one version of the compression code."]
    return "\n".join(lines)


def ablation_table(result):
    """Markdown: our parts on and off, nats per token lost to the dense parent."""
    columns = sorted({(r["parent"], r["keep"]) for r in result["rows"] if r["study"] == "ablation"})
    if not columns:
        return ""
    lines = [
        "Nats per token above the dense parent, choose split (report split):",
        "",
        "| parts | " + " | ".join(f"{parent}, {keep}" for parent, keep in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for variant in variants(ablation=True):
        cells = []
        for parent, keep in columns:
            lost = [_lost(result, parent, variant.label, keep, s) for s in ("choose", "report")]
            cells.append("" if None in lost else f"{lost[0]:.4f} ({lost[1]:.4f})")
        lines.append(f"| {variant.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _lost(result, parent, label, keep, split):
    cell = by_seed(result, "ablation", parent, label, keep, split)
    return np.mean([*cell.values()]) - result["dense"][parent][split] if cell else None


# ---- pictures ------------------------------------------------------------------------------------


def pictures(result, path):
    """PATH.png: nats per token against the keep ratio; PATH_ablation.png: bars of the parts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(result["dense"])
    fig, axes = plt.subplots(
        1, len(names), figsize=(3.2 * len(names), 3.6), layout="constrained", squeeze=False
    )
    for ax, parent in zip(axes[0], names, strict=True):
        dense = result["dense"][parent]["report"]
        ax.axhline(dense, color="0.6", linestyle="--", label="dense")
        for i, method in enumerate(METHODS):
            cells = {k: by_seed(result, "methods", parent, method, k) for k in KEEPS}
            style = {"color": "k", "lw": 2} if method == OURS else {"color": f"C{i}"}
            x, y = [*cells], [np.mean([*c.values()]) if c else np.nan for c in cells.values()]
            ax.plot(x, y, "o-", ms=3, label=method, **style)
        ax.set(title=parent, xlabel="keep, share of all parameters")
        ax.set_xticks(KEEPS)
    axes[0][0].set_ylabel("nats per token, report split")
    axes[0][0].legend(fontsize=7)
    fig.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(fig)

    columns = sorted({(r["parent"], r["keep"]) for r in result["rows"] if r["study"] == "ablation"})
    if not columns:
        return
    labels = [variant.label for variant in variants(ablation=True)]
    fig, axes = plt.subplots(
        1, len(columns), figsize=(2.2 * len(columns), 3.6), layout="constrained", squeeze=False,
        sharey=True,
    )  # fmt: skip
    for ax, (parent, keep) in zip(axes[0], columns, strict=True):
        lost = [_lost(result, parent, label, keep, "choose") for label in labels]
        ax.barh(labels, [x or 0.0 for x in lost], color=["C0"] * (1 + len(PARTS)) + ["C1"] * 99)
        ax.set(title=f"{parent}, keep {keep}", xlabel="nats above dense")
    axes[0][0].invert_yaxis()
    fig.savefig(path.with_name(path.stem + "_ablation.png"), dpi=110)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parents, lines of the table")
    parser.add_argument("--keep", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--ablation", action="store_true", help="our parts instead of methods")
    parser.add_argument("--fresh", action="store_true", help="run rows that are there again")
    parser.add_argument("--table", action="store_true", help="only tables and pictures")
    parser.add_argument("--out", type=Path, default=RESULTS / "compression.json")
    args = parser.parse_args()
    try:
        if not args.table:
            run(args)
        if not args.out.exists():
            raise DelveError(f"{args.out}: no results yet; run without --table first")
        result = read(args.out) | {"intervals": INTERVALS}
        result["comparisons"] = comparisons(result)
        result["markdown"] = {"methods": table(result), "ablation": ablation_table(result)}
        write(args.out, result)
        pictures(result, args.out)
        print(*result["markdown"].values(), sep="\n\n")
    except DelveError as err:
        sys.exit(f"error: {err}")


if __name__ == "__main__":
    main()
