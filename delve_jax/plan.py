"""`delve plan`: what a run will need, before anything is allocated and without the devices.

State bytes are exact (shapes and sharding rules). Activations, gradients and buffers are what XLA
assigns to the very step of the run, compiled for as many virtual CPU devices as the mesh has: an
accelerator's compiler may fuse more, and keeps bfloat16 where a CPU widens it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax

from . import VerbModule, models, parallel, parents, presets
from .config import Config, DelveError, from_json, to_json
from .parents.stock import dense_parents
from .train import cache
from .train.objective import Terms
from .train.run import Settings, check, shapes_of, step_of

# dense bfloat16 FLOP/s and bytes of memory of one device, from the vendors' data sheets
DEVICES = {
    "a100": (312e12, 80e9), "h100": (989e12, 80e9), "h200": (989e12, 141e9),
    "b200": (2250e12, 180e9), "v4": (275e12, 32e9), "v5e": (197e12, 16e9), "v5p": (459e12, 95e9),
    "v6e": (918e12, 32e9),
}  # fmt: skip


def _matmul_size(cfg, tree: dict) -> int:
    """Elements of all weights that a token is multiplied with, at true ranks and MLP widths."""
    total, mlp = 0, models.FAMILY[cfg.family].MLP if cfg.neurons else ()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *above, name = parallel.path_of(keys).split("/")
        if name not in ("kernel", "v", "u") or above[-1] in ("embed", "conv"):
            continue
        where = "/".join(above[1:] if above[0] == "layers" else above)
        layers = leaf.shape[0] if leaf.ndim == 3 else 1
        ins, outs = ((n,) * layers for n in leaf.shape[-2:])
        if where in mlp[:-1] and name != "v":
            outs = cfg.neurons
        elif where in mlp[-1:] and name != "u":
            ins = cfg.neurons
        if name != "kernel":
            ins, outs = (ins, cfg.rank(where)) if name == "v" else (cfg.rank(where), outs)
        total += sum(i * o for i, o in zip(ins, outs, strict=True))
    return total


def forward_flops(cfg: Config, T: int) -> int:
    """Forward FLOPs a token in rows of T: 2 a weight, attention over the full T, scans.

    The count of delphi.md §1 (verified there on 81 runs) for Qwen3, the same terms for the others;
    embeddings and norms are not counted.
    """
    if cfg.family == "delve":
        hub = 0
        if cfg.n_superblocks > 1 and cfg.connectors != "none":
            width = sum(s.d_model for _, s in cfg.streams)
            hub = 4 * (cfg.n_superblocks - 1) * cfg.hub_rank * width
        total = hub + sum(forward_flops(sub, T) for _, sub in cfg.streams)
        if cfg.latents == 1 and "head" in cfg.codes:  # pooled before the long side of the head
            (rank,) = cfg.streams[0][1].rank("head")
            total -= 2 * (len(cfg.streams) - 1) * rank * cfg.vocab_size
        return total
    tree = models.abstract_params(cfg)
    total = 2 * _matmul_size(cfg, tree)
    if cfg.tie_embeddings:
        total += 2 * sum(x.size for x in jax.tree.leaves(tree["embed"]))
    return total + cfg.n_layers * models.FAMILY[cfg.family].mixer_flops(cfg, T)


def train_flops(cfg: Config, T: int, teachers: tuple = (), passes: int = 1) -> int:
    """FLOPs a token of training: three times forward, and each teacher's forward once.

    passes: 2 where a smaller model inside is trained in every step as well (`--rank-drop`).
    """
    return 3 * passes * forward_flops(cfg, T) + sum(forward_flops(t, T) for t in teachers)


def plan(
    target: str | None,
    settings: Settings,
    *,
    mesh: str | None = None,
    keep: float | None = None,
    objective: str | Terms | None = None,
    teacher_cache: bool = False,
    device: str = "h200",
    mfu: float = 0.4,
    no_compile: bool = False,
) -> dict:
    """Parameters, FLOPs, bytes per device, steps and time of training a preset or a source.

    objective: "ce", "ce+kl" (a DELVE's default) or the Terms of a healing run; the dense parents
    are held as its teachers. teacher_cache: what they say is written before the first step (`heal
    --teacher-cache`), so that they are in memory before it alone: `teacher_cache` of the result has
    the bytes of that file and of their weights on a device. Their FLOPs count in either case; that
    healing leaves out parents without weight in their pool cannot be known before.
    device: whose peak rate and memory; mfu: share of it that is assumed. no_compile: without the
    activations, in a moment. DelveError: an unknown preset or device, settings that do not fit.

    >>> import delve_jax
    >>> settings = delve_jax.Settings(tokens=500_000_000, batch=64)
    >>> r = delve_jax.plan("pythia-31m", settings, mesh="data=8", no_compile=True)
    >>> r["parameters"], r["devices"], r["steps"]
    (30494720, 8, 15259)
    """
    if target is None:
        raise DelveError("name a preset (`delve plan --list`) or a source")
    if device not in DEVICES:
        raise DelveError(f"--device {device}: choose one of {', '.join(DEVICES)}")
    if not 0 < mfu <= 1:
        raise DelveError(f"--mfu {mfu}: must lie in (0, 1]")
    cfg = _config_of(target, keep)
    terms = objective or ("ce+kl" if cfg.family == "delve" else "ce")
    if not isinstance(terms, Terms):
        if terms not in ("ce", "ce+kl"):
            raise DelveError(f"objective {terms}: must be ce, ce+kl or Terms")
        terms = Terms() if terms == "ce+kl" else Terms(ce=1.0, kl=0.0)
    teachers = dense_parents(cfg) if any(map(terms.has, ("kl", "streams", "hidden"))) else ()
    sizes = parallel.parse_mesh(mesh or "data=1")
    abstract_mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), parallel.AXES)
    T = settings.row_length(cfg)
    if settings.tokens < 0:
        raise DelveError(f"--tokens {settings.tokens}: must not be negative")
    some = dataclasses.replace(settings, tokens=max(settings.tokens, 1))
    cached = teacher_cache and bool(teachers)
    check(cfg, tuple(teachers), some, abstract_mesh, terms, cached)
    steps = settings.steps(T)
    shapes = shapes_of(cfg, settings)
    optimizer = settings.make_optimizer(max(steps, 1))
    state_bytes = {
        "parameters": _bytes(abstract_mesh, shapes),
        "optimizer": _bytes(abstract_mesh, jax.eval_shape(optimizer.init, shapes)),
        "teachers": sum(_bytes(abstract_mesh, models.abstract_params(t)) for t in teachers),
    }
    teacher_bytes = state_bytes["teachers"]
    if cached:
        state_bytes["teachers"] = 0
    forward = forward_flops(cfg, T)
    train = train_flops(cfg, T, teachers, passes=1 if terms.rank_drop == 1 else 2)
    count = math.prod(sizes.values())
    rate = mfu * DEVICES[device][0] * count
    tokens = steps * settings.batch * T
    out = {
        "target": target, "family": cfg.family, "parameters": models.count(cfg),
        "teacher_parameters": sum(map(models.count, teachers)), "objective": terms.name,
        "forward_flops_per_token": forward, "train_flops_per_token": train,
        "mesh": sizes, "devices": count, "batch": settings.batch, "window": T,
        "compute": settings.compute, "optimizer": settings.optimizer,
        "bytes_per_device": state_bytes,
        "steps": steps, "tokens": tokens, "train_flops": tokens * train,
        "device": device, "mfu": mfu, "tokens_per_second": rate / train,
        "hours": tokens * train / rate / 3600,
    }  # fmt: skip
    if cached:
        each = cache.token_bytes(cache.id_dtype_of(cfg.vocab_size))
        out["teacher_cache"] = {
            "file_bytes": tokens * each,
            "teachers_bytes_per_device": teacher_bytes,
        }
    if not no_compile:
        found = _compiled(cfg, teachers, settings, terms, sizes, cached)
        state_bytes["activations"] = found["temp"] + found["other"]
        state_bytes["peak"] = sum(state_bytes.values())
        out["fits"] = bool(max(state_bytes["peak"], teacher_bytes) < DEVICES[device][1])
    return out


def _config_of(target: str, keep: float | None) -> Config:
    if target in presets.PRESETS:
        return presets.preset(target, **({} if keep is None else {"keep": keep}))
    if Path(target).exists() or "/" in target:
        if keep is not None:
            raise DelveError(f"--keep {keep}: is for presets; {target} is planned as it is")
        return parents.peek(target)[0]
    return presets.preset(target)  # its error lists the names


def _bytes(mesh, tree) -> int:
    """Bytes of a tree on one device of a mesh that need not exist."""
    shards = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize,
        tree,
        parallel.shardings(mesh, tree),
    )
    return sum(jax.tree.leaves(shards))


# Buffers are assigned before LLVM runs, so its optimisation may be left out; XLA's new emitters of
# loops change their sizes by less than 1 kB and take time (results/planning_cpu.json).
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def _compiled(cfg, teachers, settings: Settings, terms: Terms, sizes: dict, cached: bool) -> dict:
    """Bytes per device that XLA assigns to the step beside its state, found in a process of its
    own: the number of virtual devices is fixed when JAX starts."""
    what = {
        "cfg": to_json(cfg), "teachers": [to_json(t) for t in teachers],
        "settings": dataclasses.asdict(dataclasses.replace(settings)), "sizes": sizes,
        "terms": dataclasses.asdict(terms), "cached": cached,
    }  # fmt: skip
    flags = f"--xla_force_host_platform_device_count={math.prod(sizes.values())} {FLAGS}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-m", "delve_jax.plan"], input=json.dumps(what), text=True, env=env,
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DelveError(f"plan: the step cannot be compiled ({lines[-1][:200]}); --no-compile")
    return json.loads(done.stdout.splitlines()[-1])


def _child() -> None:
    what = json.load(sys.stdin)
    saving = what["settings"].pop("saving")
    settings = Settings(**what["settings"])
    del saving
    cfg = from_json(what["cfg"])
    teachers = tuple(from_json(t) for t in what["teachers"])
    mesh = parallel.make_mesh(",".join(f"{a}={n}" for a, n in what["sizes"].items()))
    terms = Terms(**{k: tuple(v) if isinstance(v, list) else v for k, v in what["terms"].items()})
    step, arguments = step_of(cfg, teachers, settings, mesh, terms, what["cached"])
    memory = step.lower(*arguments).compile().memory_analysis()
    # what is neither the state (which goes in and comes out in place) nor a temporary
    other = memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(json.dumps({"temp": memory.temp_size_in_bytes, "other": max(0, other)}))


def listing() -> dict:
    """The presets and their parameters."""
    return {"presets": {name: models.count(presets.preset(name)) for name in presets.PRESETS}}


if __name__ == "__main__":
    _child()
else:
    sys.modules[__name__].__class__ = VerbModule
