"""How much of what compression loses does refinement give back, on 5 % of a parent's own tokens?

Command: python experiments/refinement.py [--only PARENT ...] [--seeds N ...] [--out FILE]; run it
again to resume, row by row (rows of other code are run again); --picture draws what is there.
Four proxies at keep 0.5, refined towards their dense parent on 150,937 tokens of the calibrate
split at most (a proxy was trained on 3,018,752), the 65,536 calibration tokens among them, and on
text that the parent writes itself, begun by 8 ids of the same; the seed draws all of them and the
order of the rows. Variants are compared on the choose split, one proxy, seed 0; what they chose is
scored on the report split. Recovered: (compressed - refined) / (compressed - dense) in nats a token
over 128 sequences of 256 tokens. The text is new to the parent, so that labels teach what the
parent did not know: CONTROL gives the dense parent itself the same training (seed 0), and what it
gains stands beside the result. Tries on the way to this (results/refinement_tries.json): more
passes, other rates, optimisers and divergences, spliced or noisy rows and hidden match did not
bring neox and incite to 60 %; a share of cross-entropy did.
Cost: 7 to 15 minutes of a core a row.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from delve_jax import compress, data, metrics, models, parallel, road
from delve_jax.compress.refine import CE, FIRST, PASSES, WRITTEN, divergence_of, refine
from delve_jax.config import DelveError
from delve_jax.train import objective, optim, run

spec = importlib.util.spec_from_file_location("study", Path(__file__).with_name("compression.py"))
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
NAMES, SEEDS, KEEP = ("mamba", "rwkv", "neox", "incite"), (0, 1, 2), 0.5
TRAINED_ON = 3_018_752  # tokens of every proxy
TOKENS = TRAINED_ON // 20
KL_ONLY = f"KL, {PASSES} passes + {WRITTEN} x written"
CHOSEN = f"KL + {CE} CE, {PASSES} passes + {WRITTEN} x written"
CONTROL = "the dense parent, trained alike"


# ---- variants ------------------------------------------------------------------------------------


def whole(passes, written=0, ce=0.0):
    """What the verb does, with other numbers of passes and of written rows, and another loss."""

    def train(cfg, params, parent, rows, eot, seed):
        with tempfile.TemporaryDirectory() as folder:
            return refine(cfg, params, (parent.cfg, parent.params), rows, workdir=Path(folder),
                          eot=eot, seed=seed, passes=passes, written=written,
                          ce=ce)[0]  # fmt: skip

    return train


def control(cfg, params, parent, rows, eot, seed):
    """The verb on the dense parent, at the learning rate of the compressed one."""
    dense = parent.cfg, parent.params
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "written"
        notes.mkdir()
        # `refine` reads it again; the parent's own divergence is 0, and so would be its rate
        divergence_of(cfg, params, dense, rows[:FIRST], notes / "divergence.json")
        return refine(*dense, dense, rows, workdir=Path(folder), eot=eot, seed=seed)[0]


def labels(cfg, params, parent, rows, eot, seed):
    """As `delve heal` does it: half cross-entropy, half KL, one pass."""
    settings = run.Settings(tokens=len(rows) * (rows.shape[1] - 1), window=rows.shape[1] - 1)
    with tempfile.TemporaryDirectory() as folder:
        return run.heal(
            cfg, lambda: jax.tree.map(jnp.copy, params),
            lambda T, batch, shard, shards: data.batches(rows, batch, seed, shard, shards),
            [(parent.cfg, parent.params)], settings, mesh=parallel.make_mesh(None),
            workdir=Path(folder), eot=eot,
        )[0]  # fmt: skip


def blocks(passes, batch=8, rate=1e-3):
    """Layer by layer: inputs of the student's own prefix, the parent's outputs as the target.

    Squared error, relative to the outputs' energy; AdamW on all weights of the layer
    (compression.md section 9B). One compiled step serves every layer.
    """

    def train(cfg, params, parent, rows, eot, seed):
        tokens = np.asarray(rows[:, :-1], np.int32)
        steps = passes * len(tokens) // batch
        optimizer = optim.adamw(optim.wsd(rate, steps, 0.05, 0.5), weight_decay=0.0)

        def apply(cfg, layer, x_BTD, tokens_BT):
            seg = objective.segments(tokens_BT, eot)
            ctx, _ = models.FAMILY[cfg.family].context(cfg, x_BTD, segments_BT=seg)
            block = models.FAMILY[cfg.family].Block(cfg)
            return block.apply({"params": layer}, x_BTD, None, ctx)[0]

        def error(layer, x_BTD, tokens_BT, y_BTD):
            return ((apply(cfg, layer, x_BTD, tokens_BT) - y_BTD) ** 2).sum() / (y_BTD**2).sum()

        @jax.jit
        def step(layer, state, x_BTD, tokens_BT, y_BTD):
            grads = jax.grad(error)(layer, x_BTD, tokens_BT, y_BTD)
            updates, state = optimizer.update(grads, state, layer)
            return jax.tree.map(jnp.add, layer, updates), state

        forward = jax.jit(apply, static_argnums=0)
        embed = jax.jit(models.embed_tokens, static_argnums=0)

        def over(fn, *arrays):
            return np.concatenate([
                fn(*(a[i : i + batch] for a in arrays)) for i in range(0, len(tokens), batch)
            ])  # fmt: skip

        x_NTD = over(lambda t: embed(cfg, params, t), tokens)
        y_NTD = over(lambda t: embed(parent.cfg, parent.params, t), tokens)
        order, layers = data.batches(np.arange(len(tokens))[:, None], batch, seed), []
        for index in range(cfg.n_layers):
            ours, theirs = (jax.tree.map(lambda a, i=index: a[i], tree["layers"])
                            for tree in (params, parent.params))  # fmt: skip
            y_NTD = over(lambda y, t, w=theirs: forward(parent.cfg, w, y, t), y_NTD, tokens)
            state = optimizer.init(ours)
            for i in range(steps):
                at = np.asarray(order[i])[:, 0]
                ours, state = step(ours, state, x_NTD[at], tokens[at], y_NTD[at])
            x_NTD = over(lambda x, t, w=ours: forward(cfg, w, x, t), x_NTD, tokens)
            layers.append(ours)
        return {**params, "layers": jax.tree.map(lambda *a: jnp.stack(a), *layers)}

    return train


VARIANTS = {
    "CE + KL, 1 pass": labels,
    "KL, 4 passes": whole(4),
    "KL, 8 passes": whole(8),
    KL_ONLY: whole(PASSES, WRITTEN),
    CHOSEN: whole(PASSES, WRITTEN, CE),
    "blocks, 8 passes": blocks(8),
}
VARIED = {"rwkv": list(VARIANTS), "neox": [KL_ONLY, CHOSEN]}  # compared on the choose split, seed 0


# ---- rows ----------------------------------------------------------------------------------------


class Compressed:
    """A proxy compressed by one seed, and the rows it may be refined on."""

    def __init__(self, parent, seed):
        began = time.perf_counter()
        self.parent, self.seed = parent, seed
        calibration = parent.calibration(seed)
        self.cfg, self.params, _ = compress.compress(
            parent.cfg, parent.params, calibration, keep=KEEP, seed=seed, progress=False
        )
        self.seconds = round(time.perf_counter() - began, 1)
        documents = study.documents()["calibrate"]
        self.rows = road.refinement_rows(parent.cfg, parent.tokenizer, documents, TOKENS, seed)
        # what calibration has read is part of what may be read
        rows = {row[:-1].tobytes() for row in np.asarray(self.rows, np.int32)}
        if any(w.tobytes() not in rows for w in np.asarray(calibration, np.int32)):
            raise RuntimeError(f"{parent.name}: calibration windows that are not among the rows")
        self.distinct = int(self.rows.size)
        self.eot = data.eot_of(data.load_tokenizer(parent.tokenizer, parent.cfg.vocab_size))

    def measure(self, variant, split):
        """One row: refine and score on a split."""
        parent = self.parent
        means = lambda cfg, params: float(  # noqa: E731
            parent.scores(cfg, params, split).sum() / (study.SEQUENCES * study.WINDOW)
        )
        dense, before = means(parent.cfg, parent.params), means(self.cfg, self.params)
        began = time.perf_counter()
        train = control if variant == CONTROL else VARIANTS[variant]
        params = train(self.cfg, self.params, parent, self.rows, self.eot, self.seed)
        seconds = round(time.perf_counter() - began, 1)
        after = means(parent.cfg if variant == CONTROL else self.cfg, params)
        return {
            "dense": dense, "compressed": before, "refined": after,
            "recovered": (before - after) / (before - dense), "left": after - dense,
            "parameters": models.count(self.cfg), "distinct_tokens": self.distinct,
            "share_of_training": self.distinct / TRAINED_ON,
            "seconds": {"compress": self.seconds, "refine": seconds},
        }  # fmt: skip


def code_hash():
    """Of the code that decides a row."""
    here = ROOT / "delve_jax"
    files = sorted(
        p for room in ("compress", "train", "models") for p in (here / room).glob("*.py")
    )
    return hashlib.sha256(
        b"".join(p.read_bytes() for p in [*files, here / "road.py", Path(__file__)])
    ).hexdigest()[:12]


def key_of(row):
    return row["split"], row["parent"], row["variant"], row["seed"]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="PARENT")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS / "refinement.json")
    parser.add_argument("--picture", action="store_true", help="draw what is there, run nothing")
    args = parser.parse_args(argv)
    result = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    if args.picture:
        return picture(result, args.out.with_suffix(".png"))
    code = code_hash()
    done = {key_of(r) for r in result["rows"] if r["code"] == code}
    jobs = [("report", name, CHOSEN, seed) for name in args.only for seed in args.seeds]
    if 0 in args.seeds:
        jobs += [("report", name, CONTROL, 0) for name in args.only]
        jobs += [("choose", name, v, 0) for name in args.only for v in VARIED.get(name, ())]
    # a proxy's rows in a row: it is loaded, and each seed compressed, once
    jobs = sorted((j for j in jobs if j not in done), key=lambda j: (NAMES.index(j[1]), j[3]))
    parent = small = None
    with metrics.progress(len(jobs), "refinement", "row") as bar:
        for split, name, variant, seed in jobs:
            if parent is None or parent.name != name:
                parent, small = study.Parent(name), None
            if small is None or small.seed != seed:
                small = Compressed(parent, seed)
            row = {"split": split, "parent": name, "variant": variant, "seed": seed, "code": code}
            row |= small.measure(variant, split)
            print(json.dumps(row), flush=True)
            rows = [r for r in result["rows"] if key_of(r) != key_of(row)] + [row]
            result = {
                "command": "python experiments/refinement.py", "seeds": SEEDS, "keep": KEEP,
                "chosen": CHOSEN, "control": CONTROL, "passes": PASSES, "written": WRITTEN,
                "trained_on": TRAINED_ON, "tokens": TOKENS,
                "calibrate_tokens": study.CALIBRATE,
                "scored": study.SEQUENCES * study.WINDOW, "versions": metrics.versions(),
                "data_hash": {s: data.data_hash(d) for s, d in study.documents().items()},
                "rows": sorted(rows, key=key_of),
            }  # fmt: skip
            write(args.out, result)
            bar.update(1)
    return picture(result, args.out.with_suffix(".png"))


def write(path, result):
    """One line a row, so that versions of the file can be compared."""
    rows = ",\n".join(json.dumps(row) for row in result["rows"])
    rest = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1)[:-2]
    partial = path.with_suffix(".partial")
    partial.write_text(f'{rest},\n "rows": [\n{rows}\n ]\n}}\n')
    partial.replace(path)


def picture(result, path):
    """Left: what every seed got back, and the control; right: variants on the choose split."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    of = lambda split, **want: [  # noqa: E731
        r for r in result["rows"] if r["split"] == split and want.items() <= r.items()
    ]
    for way, mark, color in ((CHOSEN, "o", "C0"), (CONTROL, "^", "C1")):
        rows = of("report", variant=way)
        left.plot([NAMES.index(r["parent"]) for r in rows], [100 * r["recovered"] for r in rows],
                  mark, color=color, label=way)  # fmt: skip
    left.axhline(60, color="k", ls="--", lw=1)
    left.axhline(100, color="0.7", lw=1)
    left.set_xticks(range(len(NAMES)), NAMES)
    left.set(ylim=(0, None), ylabel="% of what compression lost", title="report split, every seed")
    left.legend(loc="lower left")
    rows = [r for name in VARIED for v in VARIANTS for r in of("choose", parent=name, variant=v)]
    names = [f"{r['parent']}: {r['variant']}" for r in rows]
    right.barh(names, [100 * r["recovered"] for r in rows],
               color=[f"C{2 * list(VARIED).index(r['parent'])}" for r in rows])  # fmt: skip
    for name, r in zip(names, rows, strict=True):
        right.text(100 * r["recovered"], name, f" {r['seconds']['refine']:.0f} s",
                   va="center", fontsize=8)  # fmt: skip
    right.axvline(60, color="k", ls="--", lw=1)
    right.invert_yaxis()
    right.set(xlabel="% of the loss recovered", xlim=(0, 100), title="choose split, seed 0")
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
