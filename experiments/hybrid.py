"""The bench of the hybrid studies: parents, text, cells that are made once, scores, intervals.

Not a study itself: hybrid_diversity.py, hybrid_parts.py and hybrid_curve.py are. A cell is one
model that was made and healed; its row (nats of every scored sequence) stands in the results and
its checkpoint in out/hybrid, so that a repeated command goes on. Text, all from ../shared by
document hash: calibrate (compression, pool weights), train (healing), choose (what is decided),
report (what is shown). All models are counted whole: tables, hub, gate and pool included.
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np

from delve_jax import (
    checkpoint,
    compress,
    data,
    evaluate,
    fuse,
    metrics,
    models,
    parallel,
    parents,
    road,
    upcycle,
)
from delve_jax.compress import joint
from delve_jax.compress.spectra import InMemory
from delve_jax.models import delve
from delve_jax.train import run
from delve_jax.train.objective import Terms

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
WORK = ROOT / "out" / "hybrid"
TEXT = ROOT.parent / "shared" / "data" / "text"
NAMES = ("incite", "mamba", "neox", "rwkv")
SEEDS = (0, 1, 2)
LARGEST = 1_578_112  # parameters of the largest parent (neox): N is a multiple of it
CALIBRATE, HEAL = 32_768, 204_800  # tokens
WINDOW, SEQUENCES, BATCH, LR = 256, 128, 8, 2e-3
TRAIN_BYTES = 6_000_000
RESAMPLES = 10_000
INTERVALS = "95 %, paired bootstrap over documents and seeds"


@functools.cache
def documents(split):
    """The documents of a split; of the train split as many as healing can read."""
    some = data.split(data.shared_documents(TEXT), split)
    return upcycle.cut_documents(some, TRAIN_BYTES) if split == "train" else some


@functools.cache
def dense(name):
    """(config, parameters, tokenizer) of a proxy, float32."""
    cfg, params, tokenizer = parents.load(upcycle.PROXIES / name, dtype="float32")
    return dataclasses.replace(cfg, dtype="float32"), params, tokenizer


@functools.cache
def tokenizer():
    return data.load_tokenizer(dense("rwkv")[2], dense("rwkv")[0].vocab_size)


@functools.cache
def ids(split):
    return data.encode_documents(tokenizer(), documents(split))


def scored_windows(tok, texts, fresh=False):
    """(the fixed windows [SEQUENCES, WINDOW + 1] of documents that are scored, document of each).

    A window is cut from the documents joined together and belongs to that of its first token.
    fresh: instead all windows that have no document in common with those.
    """
    rows = data.windows(data.encode_documents(tok, texts), WINDOW + 1)
    between = data.eot_of(tok) is not None  # one token, counted to the document before it
    ends = np.cumsum([len(data.encode_documents(tok, [text])) + between for text in texts])
    first_N = np.searchsorted(ends, np.arange(len(rows)) * (WINDOW + 1), side="right")
    last_N = np.searchsorted(ends, np.arange(len(rows)) * (WINDOW + 1) + WINDOW, side="right")
    at = np.sort(np.random.default_rng(0).permutation(len(rows))[:SEQUENCES])
    if fresh:
        seen = {d for i in at for d in range(first_N[i], last_N[i] + 1)}
        each = enumerate(zip(first_N, last_N, strict=True))
        at = [i for i, (a, b) in each if seen.isdisjoint(range(a, b + 1))]
    return rows[at], first_N[at]


@functools.cache
def scored_of(split):
    """Of a split; `fresh`: of the report split, without the documents of its scored windows."""
    if split == "fresh":
        return scored_windows(tokenizer(), documents("report"), fresh=True)
    return scored_windows(tokenizer(), documents(split))


def sequences(split):
    """The fixed windows [N, WINDOW + 1] of a split that are scored."""
    return scored_of(split)[0]


@functools.cache
def calibration(seed):
    cfg, _, text = dense("rwkv")
    return road.calibration_windows(cfg, text, documents("calibrate"), CALIBRATE, seed)


@functools.cache
def healing_rows():
    """All rows [N, WINDOW + 1] that healing draws from."""
    return data.windows(ids("train"), WINDOW + 1, WINDOW)


# ---- models --------------------------------------------------------------------------------------


def together(budget, seed, names=NAMES):
    """Parents compressed within one budget, tables in common -> [(name, config, parameters)]."""
    place = WORK / "together" / f"{budget}-s{seed}-{'+'.join(names)}"
    if not place.exists():
        parts = [joint.Part(name, _source(name), calibration(seed)) for name in names]
        out = joint.compress(parts, budget, spectra_folder(seed, names), seed=seed)
        made = [(n, dataclasses.replace(c, dtype="float32"), p) for n, c, p in out.parents]
        cfg, params, _ = fuse.fuse(made, shared=True, connectors="none")
        checkpoint.save(place, cfg, params, dense(names[0])[2], extra={"joint.json": out.report})
    cfg, params = checkpoint.restore(place)
    streams = delve.whole(cfg, params)
    return [(name, sub, streams[name]) for name, sub in cfg.streams]


def spectra_folder(seed, names=NAMES):
    """Where what `joint.compress` goes on from stands; its curve of the codes is of all `names`."""
    return WORK / "spectra" / "-".join([f"s{seed}", *(names if tuple(names) != NAMES else ())])


def _source(name):
    return InMemory(*plain(name))


def plain(name):
    """(config, parameters) of a proxy in the form of a compressed one, nothing compressed."""
    cfg, params, _ = dense(name)
    return compress.compress(cfg, params, None, keep=1.0, method="svd")[:2]


def hybrid(N, seed, names=NAMES, connectors="hub", latents=1, gate=True, hub_rank=None, warm=False):
    """A DELVE of N parameters at step 0 -> (config, parameters, report)."""
    as_if = fuse.joint_config(
        [(n, dense(n)[0]) for n in names], latents, hub_rank, connectors="hub"
    )
    budget = N - fuse.joints_count(as_if)  # the same streams whatever joins them
    made = together(budget, seed, names)
    half = calibration(seed)[: len(calibration(seed)) // 2]
    cfg, params, report = fuse.fuse(
        made, half, latents=latents, shared=True, connectors=connectors, hub_rank=hub_rank,
        seed=seed,
    )  # fmt: skip
    if not gate:
        cfg = dataclasses.replace(cfg, gate_proj=0, gate_hidden=0)
        params = {k: v for k, v in params.items() if k != "gate"}
    if warm:
        whole = [dense(n)[:2] for n in cfg.names]
        params, report["warm_hub"] = fuse.warm_hub(cfg, params, whole, calibration(seed))
    return cfg, params, report


def single(name, N, seed):
    """One parent compressed to N parameters; itself where it is smaller."""
    cfg, params, _ = dense(name)
    place = WORK / "single" / f"{name}-{N}-s{seed}"
    if N >= models.count(dataclasses.replace(cfg, vocab_rows=cfg.vocab_size)):
        return plain(name)
    if not place.exists():
        out, made, _ = compress.compress(
            cfg, params, calibration(seed), budget=N, seed=seed, progress=False
        )
        checkpoint.save(place, out, made, dense(name)[2])
    return checkpoint.restore(place)


# ---- healing and scoring -------------------------------------------------------------------------


def healed(key, cfg, params, seed, names=NAMES, tokens=HEAL, terms=Terms(), stages=None, **how):  # noqa: B008
    """The model after healing, made once: out/hybrid/healed/KEY.

    Teachers: dense parents `names`, their pool's weights fitted on calibration tokens. how: further
    fields of `run.Settings`.
    """
    place = WORK / "healed" / key
    if place.exists():
        return checkpoint.restore(place)
    settings = run.Settings(
        **{"tokens": tokens, "batch": BATCH, "lr": LR, "window": WINDOW, "seed": seed} | how
    )
    teachers = [dense(n)[:2] for n in names]
    weights = teacher_weights(seed, names)
    plan = run.STAGES if stages == "hybrid" else stages or (run.Stage("heal", 1.0, terms),)
    used = 0
    for part in plan:
        own = part.settings(settings) if len(plan) > 1 else settings

        def open_data(T, batch, shard, shards, skip=used):
            rows = data.batches(healing_rows(), batch, seed, shard, shards)
            return rows[skip:] if skip else rows

        work = place.with_name(f"{place.name}.{part.name}.partial")
        # a copy of the list: healing forgets teachers without weight
        params, facts = run.heal(
            cfg, lambda p=params: jax.tree.map(jax.numpy.copy, p), open_data, list(teachers), own,
            mesh=parallel.make_mesh(None), workdir=work, eot=data.eot_of(tokenizer()),
            terms=part.terms, weights=weights,
        )  # fmt: skip
        used += facts["steps"]
        shutil.rmtree(work)
    checkpoint.save(place, cfg, params, dense(names[0])[2])
    return cfg, params


@functools.cache
def teacher_weights(seed, names=NAMES):
    """Of the dense parents' pool, fitted on half of the calibration tokens."""
    rows = calibration(seed)[: len(calibration(seed)) // 2]
    _, report = fuse.fit_weights([dense(n)[0] for n in names], [dense(n)[1] for n in names], rows)
    return report["weights"]


def nats(cfg, params, split):
    """Nats a token of every scored sequence, [N] float64."""
    score, rows, out = evaluate.as_scorer(evaluate.Model(cfg, params)).score, sequences(split), []
    for i in range(0, len(rows), BATCH):
        nll_BT, _ = score(rows[i : i + BATCH, :-1], rows[i : i + BATCH, 1:])
        out.append(np.asarray(nll_BT, np.float64).mean(1))
    return np.concatenate(out)


def scored(cfg, params, splits=("choose", "report"), **more):
    """The fields of a row: parameters, bytes, and of each split the nats a token."""
    row = {"parameters": models.count(cfg), "bytes": evaluate.parameter_bytes(cfg)} | more
    for split in splits:
        each = nats(cfg, params, split)
        row |= {split: float(each.mean()), f"{split}_each": [round(float(x), 5) for x in each]}
    return row


# ---- intervals -----------------------------------------------------------------------------------


def drawn(n, rng):
    """How often each of n is in each draw of n with replacement, [RESAMPLES, n]."""
    return np.stack([np.bincount(d, minlength=n) for d in rng.integers(0, n, (RESAMPLES, n))])


def resampled(document_N, rng):
    """What each window counts in the mean of each draw of documents, [RESAMPLES, N].

    Windows of one document err alike, so that drawn one by one they would pass for more text than
    they are. A draw's mean is that of all windows of its documents: its sum over its number.
    """
    names, of_N = np.unique(document_N, return_inverse=True)
    times = drawn(len(names), rng)[:, of_N]
    return times / times.sum(1, keepdims=True)


# ---- flags and results ---------------------------------------------------------------------------


def flags(doc, cells, metavar="CELL"):
    """The flags that the studies share: which cells, which seeds."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=cells, default=list(cells), metavar=metavar)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N")
    return parser


def as_row(cell, seed, fields):
    """A row of results: what was made, by which code, on which device, with which versions."""
    versions = metrics.versions()
    return {
        "cell": cell, "seed": seed, **fields, "code": code_hash(),
        "device": jax.devices()[0].device_kind,
        "made_with": {k: versions[k] for k in ("python", "jax", "numpy")},
    }  # fmt: skip


class Results:
    """Rows of one study, saved one by one; a row that is there is not made again."""

    def __init__(self, name, command, **facts):
        self.path = RESULTS / f"{name}.json"
        self.rows = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        self.facts = {
            "command": command, "seeds": SEEDS, "healing_tokens": HEAL, "lr": LR,
            "calibration_tokens": CALIBRATE, "scored_tokens": SEQUENCES * WINDOW, **facts,
        }  # fmt: skip

    def row(self, cell, seed, make):
        """The row of a cell and seed; make() -> its fields where it is not there yet."""
        for row in self.rows:
            if (row["cell"], row["seed"]) == (cell, seed):
                return row
        row = as_row(cell, seed, make())
        self.rows.append(row)
        self.save()
        print(json.dumps({k: v for k, v in row.items() if not k.endswith("_each")}), flush=True)
        return row

    def fill(self, todo, cells, desc):
        """The rows of all (cell, seed) of `todo`; cells: {cell: function of the seed}."""
        with metrics.progress(len(todo), desc, "cell") as bar:
            for cell, seed in todo:
                self.row(cell, seed, lambda c=cell, s=seed: cells[c](s))
                bar.update(1)

    def save(self, **facts):
        """Write everything, one line a row."""
        self.facts |= facts
        head = self.facts | {
            "versions": metrics.versions(),
            "data_hash": {s: data.data_hash(documents(s))
                          for s in ("calibrate", "train", "choose", "report")},
        }  # fmt: skip
        rows = ",\n".join(
            json.dumps(r) for r in sorted(self.rows, key=lambda r: (r["cell"], r["seed"]))
        )
        half = self.path.with_suffix(".writing")
        half.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
        half.replace(self.path)

    def cell(self, cell, split="report"):
        """{seed: nats of every sequence} of a cell."""
        each = f"{split}_each"
        return {r["seed"]: np.array(r[each]) for r in self.rows if r["cell"] == cell and each in r}

    def at_every_seed(self, start):
        """A copy in which cells that begin so, which no seed drew, stand at every seed."""
        out = copy.copy(self)
        out.rows = self.rows + [
            {**row, "seed": seed} for row in self.rows if row["cell"].startswith(start)
            for seed in SEEDS if seed != row["seed"]
        ]  # fmt: skip
        return out

    def difference(self, one, other, split="report"):
        """Mean of one - other, nats a token, over their common seeds, with a 95 % interval.

        Paired bootstrap over the documents that the windows are cut from and, at once, over seeds:
        with three of them the interval says how it would look with other draws of these.
        """
        a, b = self.cell(one, split), self.cell(other, split)
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            return None
        gap_SN = np.stack([a[s] - b[s] for s in seeds])
        rng = np.random.default_rng(0)
        share_RS = drawn(len(seeds), rng) / len(seeds)  # R: a resample, S: a seed
        each_RS = resampled(scored_of(split)[1], rng) @ gap_SN.T
        means = (each_RS * share_RS).sum(1)
        low, high = np.percentile(means, (2.5, 97.5))
        return {"mean": float(gap_SN.mean()), "low": float(low), "high": float(high),
                "by_seed": [float(x) for x in gap_SN.mean(1)], "seeds": seeds}  # fmt: skip


def code_hash():
    """Of the code that decides a row."""
    files = sorted(
        p
        for room in ("compress", "models", "train")
        for p in (ROOT / "delve_jax" / room).glob("*.py")
    )
    return hashlib.sha256(
        b"".join(p.read_bytes() for p in [*files, ROOT / "delve_jax/fuse.py"])
    ).hexdigest()[:12]
