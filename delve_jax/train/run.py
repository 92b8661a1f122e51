"""Runs: what stands around the loop when a model is healed or trained from scratch.

`Settings` are the choices of a run, `objective.Terms` what it is trained for, a `Stage` both of one
part of it (hybrid.md §12).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from .. import fuse, metrics, models, parallel
from ..config import Config, DelveError, read_json, write_json
from ..models import Compute
from . import cache, objective, optim
from .loop import Saving, fit, init_state, make_step
from .objective import Terms

FIT_WINDOWS = 32
FITTED = "teachers.json"  # in the folder of a run under way: the weights that it teaches with
TRAINS = ("all", "experts", "joints")
LONGEST_WINDOW = 512  # tokens of a row unless asked for; the context where that is shorter


@dataclass(frozen=True)
class Settings:
    """How a run is made; every field has a flag of `delve train` and `delve heal`.

    >>> import delve_jax
    >>> settings = delve_jax.Settings(tokens=100_000, batch=8, window=128)
    >>> settings.steps(T=128), settings.peak
    (98, 0.001)
    """

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
    remat: str = "auto"  # none, layer, dots; auto: layer above 1e8 parameters, dots on a CPU
    shard_sequence: bool = False  # T of the residual stream over the mesh's "model" axis
    across_documents: bool = False  # let documents in a row see each other
    trains: str = "all"  # of a DELVE: or only "experts", or only "joints" (hub, gate, pool)
    joints_lr: float = 1.0  # of a DELVE: times the rate, for hub, gate and pool
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
            ("--train", self.trains, TRAINS),
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
            ("--joints-lr", self.joints_lr, 0 < self.joints_lr < math.inf, "be positive"),
            ("--warmup", self.warmup, share, f"lie in [0, 1], with --decay {self.decay} at most 1"),
            ("--seed", self.seed, 0 <= self.seed < 2**32, "lie in [0, 2^32)"),
            ("--save-every", self.saving.every, self.saving.every >= 1, "be at least 1"),
            ("--keep-every", keep, keep is None or keep >= 1, "be at least 1"),
        ):
            if not fits:
                raise DelveError(f"{flag} {value}: must {must}")
        metrics.check_sinks(self.saving.track)
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
            out = optim.adamw(schedule(self.peak), weight_decay=self.weight_decay, **given)
        else:
            slow = schedule(self.adam_lr or self.peak / 10)
            out = optim.adamh(schedule(self.peak), slow, **given)
        joints = self.joints_lr if self.trains != "experts" else 0.0
        experts = 0.0 if self.trains == "joints" else 1.0
        if joints == experts == 1.0:
            return out
        return optax.chain(out, optim.scaled(dict.fromkeys(objective.JOINTS, joints), experts))


@dataclass(frozen=True)
class Stage:
    """A part of a healing run: its share of the tokens, what it trains and for what."""

    name: str
    share: float
    terms: Terms = Terms()
    trains: str = "all"
    lr: float = 1.0  # times the run's
    joints_lr: float = 1.0

    def settings(self, whole: Settings) -> Settings:
        """The run's settings for this stage."""
        return dataclasses.replace(
            whole, tokens=max(1, round(self.share * whole.tokens)), trains=self.trains,
            joints_lr=self.joints_lr, lr=self.lr * whole.peak,
            adam_lr=self.adam_lr_of(whole),
        )  # fmt: skip

    def adam_lr_of(self, whole: Settings) -> float | None:
        return None if whole.adam_lr is None else self.lr * whole.adam_lr


# each stream alone to its parent; hub, gate and pool alone; all (hybrid.md §12, 1b, 2a and 3)
STAGES = (
    Stage("alone", 0.2, Terms(ce=0.0, kl=0.0, streams=1.0, hidden=(1.0, 0.5)), "experts"),
    Stage("couple", 0.1, Terms(ce=0.1, kl=0.9), "joints"),
    Stage("joint", 0.7, Terms(ce=(0.1, 0.5), kl=(0.9, 0.5), streams=(0.3, 0.1), stream_drop=0.1),
          joints_lr=5.0),
)  # fmt: skip


def read_stages(source: str) -> tuple[Stage, ...]:
    """The stages of a JSON file: a list of objects with the fields of `Stage`, the terms' among
    them; "hybrid" names STAGES. DelveError names the stage and the field."""
    if source == "hybrid":
        return STAGES
    try:
        rows = json.loads(Path(source).read_text())
    except (OSError, ValueError) as err:  # also bytes that are no text
        raise DelveError(f"--stages {source}: a JSON list of stages is expected ({err})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not rows:
        raise DelveError(f"--stages {source}: a JSON list of stages is expected")
    of_terms = {f.name for f in dataclasses.fields(Terms)}
    of_stage = {f.name for f in dataclasses.fields(Stage)} - {"terms"}
    out = []
    for i, row in enumerate(rows):
        where = f"--stages {source}: stage {i + 1}"
        if unknown := sorted(set(row) - of_terms - of_stage):
            raise DelveError(f"{where}: unknown field '{unknown[0]}'")
        terms = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k in of_terms}
        stage = {"name": f"stage-{i + 1}"} | {k: v for k, v in row.items() if k in of_stage}
        try:
            out.append(Stage(terms=Terms(**terms).checked(), **stage))
        except (TypeError, ValueError, DelveError) as err:
            raise DelveError(f"{where}: {err}") from None
        for field, most in (("share", 1), ("lr", math.inf), ("joints_lr", math.inf)):
            value = getattr(out[-1], field)
            if not isinstance(value, (int, float)) or not 0 < value <= most:
                raise DelveError(f"{where}: field '{field}' must lie in (0, {most}]")
        if out[-1].trains not in TRAINS:
            raise DelveError(f"{where}: field 'trains' must be one of {', '.join(TRAINS)}")
    if not math.isclose(sum(s.share for s in out), 1, abs_tol=1e-6):
        raise DelveError(f"--stages {source}: the shares must sum to 1")
    if len({s.name for s in out}) < len(out) or not all(
        re.fullmatch(r"[\w-]+", str(s.name)) for s in out
    ):
        raise DelveError(f"--stages {source}: names must differ and be plain words")
    return tuple(out)


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


def _loss(cfg, teachers, settings, mesh, eot, terms: Terms = Terms(), cached=False):  # noqa: B008
    rows = settings.batch // settings.accumulate // parallel.row_groups(mesh)
    return objective.healing(
        cfg, teachers, terms, how=settings.how(cfg, mesh), z_loss=settings.z_loss, rows=rows,
        eot=None if settings.across_documents else eot, seed=settings.seed, trains=settings.trains,
        steps=settings.steps(settings.row_length(cfg)), cached=cached,
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


def step_of(
    cfg: Config,
    teachers: tuple,
    settings: Settings,
    mesh: Mesh,
    terms: Terms = Terms(),  # noqa: B008  (frozen)
    cached: bool = False,
):
    """(the step of a run, its abstract arguments): to be lowered where nothing is allocated.

    cached: of one whose teachers' answers are read beside the rows (`cache`).
    """
    T = settings.row_length(cfg)
    optimizer = settings.make_optimizer(max(1, settings.steps(T)))
    state = jax.eval_shape(lambda p: init_state(p, optimizer), shapes_of(cfg, settings))
    frozen = ()
    if teachers and not cached:
        frozen = {
            "weights": jax.ShapeDtypeStruct((len(teachers),), jnp.float32),
            "teachers": tuple(models.abstract_params(t) for t in teachers),
        }
    rows, leading = settings.batch // settings.accumulate, ()
    if settings.accumulate > 1:
        leading = (settings.accumulate,)
    split = parallel.batch_sharding(mesh, len(leading))

    def fed(shape, dtype):
        return jax.ShapeDtypeStruct((*leading, rows, *shape), dtype, sharding=split)

    batch = fed((T + 1,), jnp.int32)
    if cached:
        files = cache.layout(cache.id_dtype_of(cfg.vocab_size))
        said = {name: fed((T, *tail), dtype) for name, (tail, dtype) in files.items()}
        batch = {"tokens": batch, **said}
    loss = _loss(cfg, teachers, settings, mesh, 0, terms, cached)
    step = make_step(loss, optimizer, mesh, state, frozen, settings.accumulate)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    return step, (parallel.abstract(mesh, state), parallel.abstract(mesh, frozen), batch, index)


def check(
    cfg: Config,
    teachers: tuple[Config, ...],
    settings: Settings,
    mesh: Mesh,
    terms: Terms = Terms(),  # noqa: B008  (frozen)
    cached: bool = False,
) -> None:
    """DelveError where `heal` cannot do this; nothing is read or allocated for it."""
    settings.checked(mesh), terms.checked()
    if settings.trains != "all" and cfg.family != "delve":
        raise DelveError(f"--train {settings.trains}: only a DELVE has experts and joints")
    if any(t.vocab_size != cfg.vocab_size for t in teachers):
        raise DelveError("--teachers: their vocabulary is not that of the model to heal")
    _loss(cfg, teachers, settings, mesh, None, terms, cached)


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
    terms: Terms = Terms(),  # noqa: B008  (frozen)
    weights: list[float] | None = None,
    teacher_cache: Path | None = None,
    read: dict | None = None,
) -> tuple[dict, dict]:
    """-> (healed parameters, report); an interrupted run resumes from `workdir`.

    make() -> float32 parameters on `mesh`, called unless there is a state to resume.
    open_data(T, batch, shard, shards) -> grain dataset. teachers: (config, params) each; weights:
    of their log-linear pool (None: fitted on the first windows, which can sharpen a lone teacher).
    The list of teachers is shortened: those without weight go where only the pool is asked, and all
    where teacher_cache, a folder of samples of what they say (`cache`), is made before the first
    step; they are no part of the compiled step. read: facts of the text that open_data leaves when
    it is called; by its data_hash a cache knows the text.
    """
    cached = teacher_cache is not None and bool(teachers)
    configs = tuple(c for c, _ in teachers)
    check(cfg, configs, settings, mesh, terms, cached)
    T = settings.row_length(cfg)
    frozen, report = (), {"objective": "ce"}
    if teachers:
        how_fitted = {"teacher_weights_from": "given"}
        if weights is None:
            weights, how_fitted = _teacher_weights(configs, teachers, open_data, T, Path(workdir))
        report = {"objective": terms.name, "terms": dataclasses.asdict(terms),
                  "teacher_weights": list(weights), **how_fitted}  # fmt: skip
        if any(weights) and not (terms.has("streams") or terms.has("hidden")):
            # only their pool is asked: a parent without weight in it need not be run
            teachers[:] = [t for t, w in zip(teachers, weights, strict=True) if w]
            configs, weights = tuple(c for c, _ in teachers), [w for w in weights if w]
        frozen = {
            "weights": jnp.asarray(weights, jnp.float32),
            "teachers": tuple(p for _, p in teachers),
        }
    shard, shards = parallel.feed(mesh, settings.batch)
    dataset = open_data(T, settings.batch, shard, shards)
    loss = _loss(cfg, configs, settings, mesh, eot, terms, cached)
    if cached:
        found = cache.make(
            Path(teacher_cache) / f"{shard}-of-{shards}", dataset, settings.steps(T), configs,
            frozen, eot=None if settings.across_documents else eot,
            how=Compute(dtype=settings.compute), seed=settings.seed,
            data_hash=(read or {}).get("data_hash"),
        )  # fmt: skip
        dataset, frozen = found.joined(dataset), ()
        teachers.clear()  # their weights are freed
        report |= {"teacher_samples": cache.SAMPLES}
    params, facts = _train(
        cfg, (shapes_of(cfg, settings), lambda: _cast(make(), settings)), loss, dataset, settings,
        mesh, T, workdir, frozen, "heal",
    )  # fmt: skip
    return params, report | facts


def _teacher_weights(configs, teachers, open_data, T, workdir) -> tuple[list[float], dict]:
    """Weights of the teachers' pool, fitted on the first windows of the training text.

    Those that a run began with stay its own (`workdir/FITTED`), whatever machine it goes on with.
    """
    record = workdir / FITTED
    if known := parallel.on_main(lambda: read_json(record) if record.exists() else None):
        return known["weights"], known["facts"]
    if jax.process_count() > 1:
        # the fit reads features on one host; over several the pool is even
        weights, facts = [1 / len(configs)] * len(configs), {"teacher_weights_from": "equal"}
    else:
        windows = np.asarray(open_data(T, FIT_WINDOWS, 0, 1)[0])
        _, fitted = fuse.fit_weights(list(configs), [p for _, p in teachers], windows)
        weights = [float(w) for w in fitted["weights"]]
        facts = {"teacher_weights_from": "fit", "teacher_nll_fit": float(fitted["nll"])}
    parallel.on_main(_record, record, {"weights": weights, "facts": facts})
    return weights, facts


def _record(file: Path, what: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, what)


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
