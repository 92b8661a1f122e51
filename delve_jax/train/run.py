"""Runs: what stands around the loop when a model is healed or trained from scratch.

`Settings` are all the choices of a run. Healing objective: (1 - w) cross-entropy + w KL(log-linear
pool of the dense parents || model).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .. import fuse, models, parallel
from ..config import Config, DelveError
from ..models import Compute
from . import objective, optim
from .loop import Saving, fit, init_state, make_step

FIT_WINDOWS = 32
LONGEST_WINDOW = 512  # tokens of a row unless asked for; the context where that is shorter


@dataclass(frozen=True)
class Settings:
    """How a run is made; every field has a flag of `delve train` and `delve heal`."""

    tokens: int
    batch: int = 8  # rows of a step, over all devices
    accumulate: int = 1  # microbatches that a step's rows are cut into
    window: int | None = None  # T, tokens of a row
    weight_decay: float = 0.01  # adamw
    optimizer: str = "adamw"  # or adamh (Delphi): lr turns matrices, adam_lr moves the rest
    lr: float | None = None  # peak; default 1e-3 (adamw) or 1e-2 (adamh)
    adam_lr: float | None = None  # adamh: of embeddings, norms, factors; default lr / 10
    schedule: str = "wsd"  # or cosine, linear
    warmup: float = 0.1  # share of the steps
    decay: float = 0.2  # share of the steps (wsd)
    b2: float | None = None  # second moment's decay; the optimiser's own unless given
    eps: float | None = None
    clip: float | None = None
    z_loss: float = 0.0
    compute: str = "float32"  # of activations and matmuls; bfloat16 keeps float32 weights
    remat: str = "auto"  # none, layer, dots; auto: layer for models above 1e8 parameters
    shard_sequence: bool = False  # T of the residual stream over the mesh's "model" axis
    across_documents: bool = False  # let documents in a row see each other
    seed: int = 0
    saving: Saving = Saving()

    def checked(self, mesh: Mesh) -> Settings:
        """Itself; DelveError names the flag that does not fit the others or the mesh."""
        groups = parallel.row_groups(mesh)
        if self.tokens < 1:
            raise DelveError(f"--tokens {self.tokens}: must be at least 1")
        if self.batch < 1 or self.accumulate < 1 or self.batch % (groups * self.accumulate):
            raise DelveError(
                f"--batch {self.batch}: must be a multiple of {groups * self.accumulate} (the "
                f"mesh's replica x data = {groups}, times --accumulate {self.accumulate})"
            )
        for flag, value, known in (
            ("--optimizer", self.optimizer, ("adamw", "adamh")),
            ("--schedule", self.schedule, ("wsd", "cosine", "linear")),
            ("--compute", self.compute, ("float32", "bfloat16", "float64")),
            ("--remat", self.remat, ("auto", "none", "layer", "dots")),
        ):
            if value not in known:
                raise DelveError(f"{flag} {value}: choose one of {', '.join(known)}")
        if self.compute == "float64" and not jax.config.jax_enable_x64:
            raise DelveError("--compute float64: set the environment variable JAX_ENABLE_X64=1")
        share = 0 <= self.warmup <= 1 and 0 <= self.decay <= 1
        share = share and (self.schedule != "wsd" or self.warmup + self.decay <= 1)
        keep = self.saving.keep_every
        for flag, value, fits, must in (  # written so that nan fits nowhere
            ("--lr", self.lr, 0 < self.peak < math.inf, "be positive"),
            ("--adam-lr", self.adam_lr, _none_or(self.adam_lr, 0, math.inf), "be positive"),
            (
                "--weight-decay",
                self.weight_decay,
                0 <= self.weight_decay < math.inf,
                "not be below 0",
            ),
            ("--z-loss", self.z_loss, 0 <= self.z_loss < math.inf, "not be below 0"),
            ("--b2", self.b2, _none_or(self.b2, 0, 1), "lie between 0 and 1"),
            ("--eps", self.eps, _none_or(self.eps, 0, math.inf), "be positive"),
            ("--clip", self.clip, _none_or(self.clip, 0, math.inf), "be positive"),
            ("--warmup", self.warmup, share, f"lie in [0, 1], with --decay {self.decay} at most 1"),
            ("--save-every", self.saving.every, self.saving.every >= 1, "be at least 1"),
            ("--keep-every", keep, keep is None or keep >= 1, "be at least 1"),
        ):
            if not fits:
                raise DelveError(f"{flag} {value}: must {must}")
        return self

    def row_length(self, cfg: Config) -> int:
        """T of this run: what was asked for, else the context, at most 512."""
        if self.window is not None and self.window < 1:
            raise DelveError(f"--window {self.window}: must be at least 1")
        return self.window or min(cfg.context_length, LONGEST_WINDOW)

    def steps(self, T: int) -> int:
        """Optimiser steps: ceil(tokens / (batch T))."""
        return -(-self.tokens // (self.batch * T))

    def how(self, cfg: Config, mesh: Mesh) -> Compute:
        """The forward pass of this run on `mesh`."""
        return Compute(
            dtype=self.compute,
            remat=objective.default_remat(cfg) if self.remat == "auto" else self.remat,
            residual=parallel.residual_sharding(mesh, self.shard_sequence),
        )

    @property
    def peak(self) -> float:
        """Learning rate at its highest; the defaults did best in experiments/factored_optim.py."""
        return {"adamw": 1e-3, "adamh": 1e-2}[self.optimizer] if self.lr is None else self.lr

    @property
    def master(self) -> str:
        """dtype of weights, gradients and moments."""
        return "float64" if self.compute == "float64" else "float32"

    def make_optimizer(self, steps: int):
        """The optax transformation, its schedules over `steps`."""
        given = {"b2": self.b2, "eps": self.eps, "clip": self.clip}
        given = {k: v for k, v in given.items() if v is not None}
        shapes = {
            "wsd": lambda peak: optim.wsd(peak, steps, self.warmup, self.decay),
            "cosine": lambda peak: optim.cosine(peak, steps, self.warmup),
            "linear": lambda peak: optim.linear(peak, steps, self.warmup),
        }
        schedule = shapes[self.schedule]
        if self.optimizer == "adamw":
            return optim.adamw(schedule(self.peak), weight_decay=self.weight_decay, **given)
        return optim.adamh(schedule(self.peak), schedule(self.adam_lr or self.peak / 10), **given)


def _none_or(value: float | None, low: float, high: float) -> bool:
    return value is None or low < value < high


def _train(cfg, params, loss, dataset, settings, mesh, T, workdir, frozen=(), desc="train"):
    steps = settings.steps(T)
    params = fit(
        params, loss, dataset, settings.make_optimizer(steps), steps=steps, workdir=workdir,
        frozen=frozen, mesh=mesh, accumulate=settings.accumulate, saving=settings.saving,
        log_every=min(10, max(1, steps // 20)), desc=desc,
    )  # fmt: skip
    return params, {
        "steps": steps, "tokens": steps * settings.batch * T, "batch": settings.batch, "window": T,
        "optimizer": settings.optimizer, "lr": settings.peak, "schedule": settings.schedule,
        "seed": settings.seed, "parameters": models.count(cfg),
    }  # fmt: skip


def _loss(cfg, teachers, settings: Settings, mesh: Mesh, eot, kl_weight: float = 0.5):
    rows = settings.batch // settings.accumulate // parallel.row_groups(mesh)
    return objective.healing(
        cfg, teachers, kl_weight, how=settings.how(cfg, mesh), z_loss=settings.z_loss, rows=rows,
        eot=None if settings.across_documents else eot,
    )  # fmt: skip


def _cast(params: dict, settings: Settings) -> dict:
    return jax.tree.map(lambda a: a.astype(settings.master), params)


def shapes_of(cfg: Config, settings: Settings) -> dict:
    """Shapes and dtypes of the weights that a run trains; DelveError: they are not trained so."""
    for sub in [s for _, s in cfg.streams] if cfg.family == "delve" else [cfg]:
        if sub.storage != "uv":
            raise DelveError(
                f"storage {sub.storage} is for a model that is done: train the uv form of it "
                "(delve convert --storage uv) and convert afterwards"
            )
    return jax.eval_shape(lambda p: _cast(p, settings), models.abstract_params(cfg))


def step_of(cfg: Config, teachers: tuple, settings: Settings, mesh: Mesh):
    """(the step of a run, its abstract arguments): to be lowered where nothing is allocated."""
    T = settings.row_length(cfg)
    optimizer = settings.make_optimizer(max(1, settings.steps(T)))
    state = jax.eval_shape(lambda p: init_state(p, optimizer), shapes_of(cfg, settings))
    frozen = ()
    if teachers:
        frozen = {
            "weights": jax.ShapeDtypeStruct((len(teachers),), jnp.float32),
            "teachers": tuple(models.abstract_params(t) for t in teachers),
        }
    rows, leading = settings.batch // settings.accumulate, ()
    if settings.accumulate > 1:
        leading = (settings.accumulate,)
    tokens = jax.ShapeDtypeStruct(
        (*leading, rows, T + 1), jnp.int32,
        sharding=parallel.batch_sharding(mesh, len(leading)),
    )  # fmt: skip
    loss = _loss(cfg, teachers, settings, mesh, eot=0)
    step = make_step(loss, optimizer, mesh, state, frozen, settings.accumulate)
    return step, (parallel.abstract(mesh, state), parallel.abstract(mesh, frozen), tokens)


def heal(
    cfg: Config,
    make: Callable[[], dict],
    open_data: Callable,
    teachers: list[tuple],
    settings: Settings,
    *,
    mesh: Mesh,
    workdir: Path,
    eot: int | None = None,
    kl_weight: float = 0.5,
    weights: list[float] | None = None,
) -> tuple[dict, dict]:
    """-> (healed parameters, report); an interrupted run resumes from `workdir`.

    make() -> float32 parameters on `mesh`, called unless there is a state to resume.
    open_data(T, batch, shard, shards) -> grain dataset. teachers: (config, params) each; weights:
    of their log-linear pool (None: fitted on the first windows, which can sharpen a lone teacher).
    """
    settings = settings.checked(mesh)
    T = settings.row_length(cfg)
    frozen, report, configs = (), {"objective": "ce"}, ()
    if teachers:
        configs = tuple(c for c, _ in teachers)
        if len({cfg.vocab_size, *(c.vocab_size for c in configs)}) > 1:
            raise DelveError("--teachers: their vocabulary is not that of the model to heal")
        how_fitted = {"teacher_weights_from": "given"}
        if weights is None:
            weights, how_fitted = _teacher_weights(configs, teachers, open_data, T)
        frozen = {
            "weights": jnp.asarray(weights, jnp.float32),
            "teachers": tuple(p for _, p in teachers),
        }
        report = {"objective": "kl" if kl_weight == 1 else "ce+kl", "kl_weight": kl_weight,
                  "teacher_weights": list(weights), **how_fitted}  # fmt: skip
    loss = _loss(cfg, configs, settings, mesh, eot, kl_weight)
    dataset = open_data(T, settings.batch, *parallel.feed(mesh, settings.batch))
    params, facts = _train(
        cfg, (shapes_of(cfg, settings), lambda: _cast(make(), settings)), loss, dataset, settings,
        mesh, T, workdir, frozen, "heal",
    )  # fmt: skip
    return params, report | facts


def _teacher_weights(configs, teachers, open_data, T) -> tuple[list[float], dict]:
    """Weights of the teachers' pool, fitted on the first windows of the training text."""
    if jax.process_count() > 1:
        # the fit reads features on one host; over several the pool is even
        return [1 / len(configs)] * len(configs), {"teacher_weights_from": "equal"}
    windows = np.asarray(open_data(T, FIT_WINDOWS, 0, 1)[0])
    weights, fitted = fuse.fit_weights(list(configs), [p for _, p in teachers], windows)
    return weights.tolist(), {"teacher_weights_from": "fit", "teacher_nll_fit": fitted["nll"]}


def pretrain(
    cfg: Config,
    open_data: Callable,
    settings: Settings,
    *,
    mesh: Mesh,
    workdir: Path,
    eot: int | None = None,
) -> tuple[dict, dict]:
    """Train from random weights -> (parameters, report); resumes from `workdir`."""
    settings = settings.checked(mesh)
    T = settings.row_length(cfg)
    shapes = shapes_of(cfg, settings)
    # compiled with sharded outputs: no device ever holds the whole model
    make = jax.jit(
        lambda: _cast(models.init_params(cfg, jax.random.key(settings.seed)), settings),
        out_shardings=parallel.shardings(mesh, shapes),
    )
    loss = _loss(cfg, (), settings, mesh, eot)
    dataset = open_data(T, settings.batch, *parallel.feed(mesh, settings.batch))
    return _train(cfg, (shapes, make), loss, dataset, settings, mesh, T, workdir)
