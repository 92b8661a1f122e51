"""Healing: train a compressed or fused model back towards its dense parents.

Objective: (1 - w) cross-entropy + w KL(log-linear pool of the dense parents || model); the pool's
weights are fitted on the first windows of the training text.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from .. import data, fuse, models
from ..config import Config, DelveError
from . import objective, optim
from .loop import fit

FIT_WINDOWS = 32


def heal(
    cfg: Config,
    params: dict,
    windows_NT: np.ndarray,
    teachers: list[tuple],
    *,
    tokens: int,
    workdir: Path,
    batch: int = 8,
    lr: float = 1e-3,
    kl_weight: float = 0.5,
    seed: int = 0,
    mesh=None,
    save_every: int = 200,
) -> tuple[dict, dict]:
    """-> (healed parameters, report). windows_NT: ids [N, T+1]; teachers: (config, params) each.

    Runs ceil(tokens / (batch T)) steps; an interrupted run resumes from `workdir`.
    """
    per_step = batch * (windows_NT.shape[1] - 1)
    steps = -(-tokens // per_step)
    frozen, report, configs = (), {"objective": "ce"}, ()
    if teachers:
        configs = tuple(c for c, _ in teachers)
        if len({cfg.vocab_size, *(c.vocab_size for c in configs)}) > 1:
            raise DelveError("--teachers: their vocabulary is not that of the model to heal")
        weights, fitted = fuse.fit_weights(
            list(configs), [p for _, p in teachers], windows_NT[:FIT_WINDOWS]
        )
        frozen = {
            "weights": jnp.asarray(weights, jnp.float32),
            "teachers": tuple(p for _, p in teachers),
        }
        report = {"objective": "ce+kl", "kl_weight": kl_weight, "teacher_weights": weights.tolist(),
                  "teacher_nll_fit": fitted["nll"]}  # fmt: skip
    params = fit(
        params,
        objective.healing(cfg, configs, kl_weight),
        data.batches(windows_NT, batch, seed),
        optim.adamw(optim.wsd(lr, steps), weight_decay=0.01),
        steps=steps,
        workdir=workdir,
        frozen=frozen,
        mesh=mesh,
        save_every=save_every,
        log_every=min(10, max(1, steps // 20)),
        desc="heal",
    )
    report |= {"steps": steps, "tokens": steps * per_step, "batch": batch, "lr": lr, "seed": seed,
               "parameters": models.count(cfg)}  # fmt: skip
    return params, report
