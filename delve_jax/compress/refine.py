"""Refinement: a compressed parent is trained towards its dense one on few tokens, seen often.

All weights move (factors, tables, biases, norms); the loss is KL(dense || compressed) alone. The
teacher's whole distribution at every position lets the same text be read several times, where
next-token labels would be learned by heart (experiments/refinement.py). rows_NT: N windows of T + 1
ids: positions 0..T-1 are read, 1..T predicted.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from .. import data, parallel
from ..config import ParentConfig
from ..train import run
from ..train.objective import Terms

PASSES = 4  # over the rows


def settings_for(rows_NT: np.ndarray, seed: int, passes: int = PASSES) -> run.Settings:
    """The choices of a refinement, made by experiments/refinement.py on the choose split."""
    N, width = rows_NT.shape
    T = width - 1
    return run.Settings(
        tokens=passes * N * T, window=T, lr=1e-3, weight_decay=0.0, warmup=0.05, decay=0.5,
        seed=seed,
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
) -> tuple[dict, dict]:
    """-> (trained parameters, report); an interrupted call goes on from `workdir`, bit for bit.

    dense: (config, parameters) of the parent. eot: the id that opens a document; what comes before
    one is not seen after it. seed: of the order of the rows, anew in each pass.
    """

    def open_data(T, batch, shard, shards):
        return data.batches(rows_NT, batch, seed, shard, shards)

    params, report = run.heal(
        cfg, lambda: jax.tree.map(jnp.copy, params),  # a step donates, and may share with `dense`
        open_data, [dense], settings_for(rows_NT, seed, passes), mesh=parallel.make_mesh(None),
        workdir=workdir, eot=eot, terms=Terms(ce=0.0, kl=1.0), weights=[1.0],
    )  # fmt: skip
    return params, report | {"passes": passes, "distinct_tokens": int(rows_NT.size)}
