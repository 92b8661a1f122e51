"""Refinement: a compressed parent is trained towards its dense one on few tokens, seen often.

All weights move (factors, tables, biases, norms); the loss is KL(dense || compressed), and a tenth
of the cross-entropy. The teacher's whole distribution at every position lets the same text be read
several times, where next-token labels alone would be learned by heart; beside it stands text that
the parent wrote itself (as LLM-QAT does, arXiv 2305.17888), which costs none. The labels' share is
for what KL hardly sees: a parent gives too little to what does follow, and there the compressed one
loses most (neox proxy: 0.008 nats of KL, 0.028 on text). Chosen by experiments/refinement.py.
rows_NT: N windows of T + 1 ids: positions 0..T-1 are read, 1..T predicted.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from .. import data, models, parallel
from ..config import ParentConfig, read_json
from ..lm import LM
from ..metrics import progress
from ..train import objective, run

CE = 0.1  # weight of cross-entropy, beside 1 of KL
PASSES = 4  # over the text
WRITTEN = 4  # rows that the parent writes, times those of the text; each is read once
RATE = 2.5e-3  # of the learning rate, times the root of the divergence; at most 1e-3
PROMPT, WRITERS = 8, 64  # ids of the text that a written row begins with; rows written at a time
STATES = 2**31  # bytes of the caches that they may need
FIRST = 64  # rows on which the divergence before training is measured


def settings_for(rows_NT: np.ndarray, seed: int, divergence: float) -> run.Settings:
    """One pass over all rows, the text's repeated among them.

    divergence: KL of the parent from its compressed form [nats a token]. The rate falls with its
    root: steps of a large one would cost a parent that lost little more than it can win.
    """
    N, width = rows_NT.shape
    T = width - 1
    return run.Settings(
        tokens=N * T, window=T, lr=min(1e-3, RATE * divergence**0.5), weight_decay=0.0,
        warmup=0.05, decay=0.5, seed=seed,
    )  # fmt: skip


def refine(
    cfg: ParentConfig,
    params: dict,
    dense: tuple[ParentConfig, dict],
    rows_NT: np.ndarray,
    *,
    workdir: Path,
    eot: int | None = None,
    seed: int = 0,
    passes: int = PASSES,
    written: int = WRITTEN,
    ce: float = CE,
) -> tuple[dict, dict]:
    """-> (trained parameters, report); an interrupted call goes on from `workdir`, bit for bit.

    What it needs for that is in the folders `state` and `written`. dense: (config, parameters) of
    the parent. eot: the id that opens a document; what comes before one is not seen after it. seed:
    of the order of the rows and of what the parent writes.
    """
    notes = workdir / "written"
    notes.mkdir(parents=True, exist_ok=True)
    own_NT = write(*dense, rows_NT, written, seed, notes)
    all_NT = np.concatenate([np.asarray(rows_NT)] * passes + [own_NT])
    divergence = divergence_of(cfg, params, dense, rows_NT[:FIRST], notes / "divergence.json")

    def open_data(T, batch, shard, shards):
        return data.batches(all_NT, batch, seed, shard, shards)

    params, report = run.heal(
        cfg, lambda: jax.tree.map(jnp.copy, params),  # a step donates, and may share with `dense`
        open_data, [dense], settings_for(all_NT, seed, divergence), mesh=parallel.make_mesh(None),
        workdir=workdir, eot=eot, terms=objective.Terms(ce=ce, kl=1.0), weights=[1.0],
    )  # fmt: skip
    return params, report | {
        "passes": passes, "distinct_tokens": int(rows_NT.size), "written_tokens": int(own_NT.size),
        "divergence_before": divergence, "weights": {"ce": ce, "kl": 1.0},
    }  # fmt: skip


def write(cfg, params, rows_NT, times: int, seed: int, folder: Path) -> np.ndarray:
    """`times` N rows [.., T + 1] of the parent's own text, sampled as it is.

    Batches are kept in `folder`; a repeated call writes only those that are not there.
    """
    N, width = rows_NT.shape
    rows_NT, wanted = np.asarray(rows_NT, np.int32), times * N
    if not times or width <= PROMPT:
        return np.zeros((0, width), np.int32)
    state = jax.eval_shape(lambda: models.init_state(cfg, 1, width))
    batch = STATES // sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    batch = max(1, min(WRITERS, batch))
    rng, model, out = np.random.default_rng(seed), LM(cfg, params), []
    with progress(wanted * width, "write", "token", hide=wanted * width < 10_000) as bar:
        for i in range(0, wanted, batch):
            row_B = rng.integers(0, N, batch)
            at_BP = rng.integers(0, width - PROMPT, batch)[:, None] + np.arange(PROMPT)
            file = folder / f"rows-{i}.npy"
            if not file.exists():
                made = model.generate(
                    rows_NT[row_B[:, None], at_BP], width - PROMPT, temperature=1.0,
                    seed=seed * 1_000_003 + i,
                )  # fmt: skip
                half = file.with_suffix(".writing")
                with half.open("wb") as handle:
                    np.save(handle, np.asarray(made, np.int32))
                half.replace(file)
            out.append(np.load(file)[: wanted - i])
            bar.update(out[-1].size)
    return np.concatenate(out)


def divergence_of(cfg, params, dense, rows_NT, file: Path) -> float:
    """Mean KL(dense || compressed) on some rows, nats a token; kept: a repeated call reads it."""
    if file.exists():
        return read_json(file)["kl"]

    @jax.jit
    def measured(theirs, ours, rows_BT):
        logits = (
            models.forward(c, p, rows_BT[:, :-1])[0] for c, p in ((dense[0], theirs), (cfg, ours))
        )
        return objective.kl(*logits).mean()

    parts = [measured(dense[1], params, rows_NT[i : i + 1]) for i in range(len(rows_NT))]
    value = float(np.mean(parts))
    half = file.with_suffix(".writing")
    half.write_text(json.dumps({"kl": value}))
    half.replace(file)
    return value
