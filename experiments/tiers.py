"""Do the DELVE tiers fit the machines that their scripts name? Full shapes, no weights.

Command: taskset -c 0 python experiments/tiers.py [--only TEXT ...] [--fresh]
Half an hour on one shared core, at most 4 GiB of RAM. Result: experiments/results/tiers.json, a row
a line; rows that stand there are not made again. Each is a process of its own: every program of
`fuse.fuse`, the healing step of `delve upcycle` on each mesh, one decode step of `LM`, lowered from
shapes and compiled for virtual CPU devices; XLA's bytes beside the exact bytes of the state. The
program is the accelerator's (its scans, its chunks of logits); the buffers are those of XLA:CPU,
which has no bfloat16 and fuses less. Ranks are uniform: those of a real run differ by layer and are
padded to the largest of their map. Nothing here ran on an accelerator: hours and dollars follow
from FLOPs and the constants below. The scripts upcycle_{04b,14b,7b}.py are made of `main_of`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results" / "tiers.json"
GIB = 2**30
KEEP = 0.5
CACHE = 2048  # tokens that the decode step's attention caches hold
MFU = 0.15  # assumed share of the bfloat16 peak; the 0.4B tier has 0.156 on an H200 (mfu_gpu.json)
DOLLARS = {"h200": 3.5, "v5e": 1.2}  # assumed, a device and hour


class Healing(NamedTuple):
    """One way to heal a tier."""

    device: str
    mesh: str
    batch: int
    keep: float = KEEP
    objective: str = "ce+kl"


class Tier(NamedTuple):
    """A preset, the hub ids of its parents (no commit could be looked up here), how to heal it."""

    parents: tuple[str, ...]
    tokens: int
    healings: tuple[Healing, ...]
    decode: tuple[str, ...] = ("data=1",)  # meshes


MAMBA = {d: f"state-spaces/mamba-{d}-hf" for d in ("370m", "1.4b")}
RWKV = {d: f"RWKV/rwkv-4-{d}-pile" for d in ("430m", "1b5", "7b")}
PYTHIA = {d: f"EleutherAI/pythia-{d}" for d in ("14m", "31m")}
PYTHIA |= {d: f"EleutherAI/pythia-{d}-deduped" for d in ("410m", "1b", "1.4b")}
MAMBA_7B, INCITE = "TRI-ML/mamba-7b-rw", "togethercomputer/RedPajama-INCITE-7B-Base"
TIERS = {
    "delve-0.4b": Tier(
        (MAMBA["370m"], RWKV["430m"], PYTHIA["410m"]), 200_000_000,
        (Healing("h200", "data=1", 32), Healing("v5e", "data=8", 32)),
    ),
    "delve-1.4b": Tier(
        (MAMBA["1.4b"], RWKV["1b5"], PYTHIA["1.4b"], PYTHIA["1b"]), 400_000_000,
        (Healing("h200", "data=1", 16), Healing("v5e", "data=16", 32)),
    ),
    "delve-7b": Tier(
        (MAMBA_7B, RWKV["7b"], INCITE), 1_000_000_000,
        (Healing("h200", "data=4", 32), Healing("h200", "data=1", 32),
         Healing("h200", "data=1", 8, 0.25, "ce"), Healing("v5e", "data=32,model=2", 32)),
        ("data=1", "data=2,model=4"),
    ),
    "delve-all": Tier(
        (*MAMBA.values(), MAMBA_7B, *RWKV.values(), *PYTHIA.values(), INCITE), 1_000_000_000,
        (Healing("h200", "data=8", 32), Healing("v5e", "data=32,model=8", 32)),
        ("data=1", "data=2,model=4"),
    ),
}  # fmt: skip


# ---- in a process of its own ---------------------------------------------------------------------


def sized(compiled) -> int:
    """Bytes on a device beside the arguments, donated ones counted once."""
    memory = compiled.memory_analysis()
    more = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + max(0, more)


def fusion(cfg, _settings, _mesh, _teachers) -> dict:
    """`fuse.fuse` of parents that are shapes: each program compiled, zeros for what it gives."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from delve_jax import fuse, models

    spent, seconds = {}, 0.0
    names = {"<lambda>": "features", "chosen": "nll", "pass_over": "newton"}
    struct = jax.ShapeDtypeStruct

    def jit(function):
        known = {}

        def call(*args):
            nonlocal seconds
            leaves, tree = jax.tree.flatten(args)
            shapes = [struct(np.shape(x), x.dtype) for x in leaves]
            key = tuple((x.shape, x.dtype) for x in shapes)
            shapes = jax.tree.unflatten(tree, shapes)
            if key not in known:
                began = time.perf_counter()
                # the weights are there for all programs; tokens and features for this one
                size = sized(jax.jit(function).lower(*shapes).compile())
                size += sum(x.nbytes for x in leaves if not isinstance(x, struct))
                name = names.get(function.__name__, function.__name__)
                spent[name] = max(size, spent.get(name, 0))
                known[key] = jax.eval_shape(function, *shapes)
                seconds += time.perf_counter() - began
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), known[key])

        return call

    parents = [(n, sub, models.abstract_params(sub)) for n, sub in cfg.streams]
    fuse.jax = SimpleNamespace(**{**vars(jax), "jit": jit})
    windows = np.zeros((8, 513), np.int32)  # 4,096 tokens
    fused, params, _ = fuse.fuse(parents, windows)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)  # noqa: E731
    # the tier's own number of superblocks differs where its depths have no common divisor of 8
    same = dataclasses.replace(fused, n_superblocks=cfg.n_superblocks) == cfg
    assert same and shapes(params) == shapes(models.abstract_params(fused))
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    bytes_ = {"parameters": weights, **spent, "peak": weights + max(spent.values())}
    return {"superblocks": fused.n_superblocks, "bytes": bytes_, "compile_seconds": seconds}


def teachers_of(name: str, objective: str) -> tuple:
    """The dense parents as their files hold them: padded tables, which a mesh's model axis divides
    where it does not divide the 50,277 valid ids."""
    from delve_jax import presets

    return tuple(map(presets.preset, presets.TIERS[name].values())) if objective != "ce" else ()


def step(cfg, settings, mesh, teachers) -> dict:
    """The healing step."""
    from delve_jax.train.run import step_of

    began = time.perf_counter()
    function, arguments = step_of(cfg, teachers, settings, mesh)
    size = sized(function.lower(*arguments).compile())
    return {"activations": size, "compile_seconds": time.perf_counter() - began}


def decode(cfg, _settings, mesh, _teachers) -> dict:
    """One token of one row: bfloat16 weights, activations and state float32, as `LM` computes.

    "activations" are without, "converted" with what XLA:CPU's loop-invariant code motion adds: all
    stacked weights as float32 before the loop over layers starts.
    """
    import jax
    import jax.numpy as jnp

    from delve_jax import models, parallel, plan

    began = time.perf_counter()
    params = models.cast(models.abstract_params(cfg), "bfloat16")
    state = jax.eval_shape(lambda: models.init_state(cfg, 1, CACHE))
    run = jax.jit(lambda p, t, s: models.forward(cfg, p, t, s), donate_argnums=2)
    placed = parallel.abstract(mesh, params)
    lowered = run.lower(placed, jax.ShapeDtypeStruct((1, 1), jnp.int32), state)
    converted = sized(lowered.compile())
    seconds = time.perf_counter() - began
    off = ("while-loop-invariant-code-motion", "while-loop-expensive-invariant-code-motion")
    kept = lowered.compile({"xla_disable_hlo_passes": ",".join(off)})
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    found = {"parameters": plan._bytes(mesh, params), "state": state_bytes,
             "activations": sized(kept)}  # fmt: skip
    found["peak"] = sum(found.values())
    found["converted"] = found["peak"] - found["activations"] + converted
    return {"bytes": found, "compile_seconds": seconds}


def child() -> None:
    """One row's compilation, asked for on stdin and answered on stdout."""
    from delve_jax import parallel
    from delve_jax.config import from_json
    from delve_jax.models import scan
    from delve_jax.train import objective
    from delve_jax.train.run import Settings

    scan._platform = lambda: "accelerator"  # its program, compiled on a CPU
    objective.LOGITS_BYTES = {}
    job = json.load(sys.stdin)
    mesh = parallel.make_mesh(job["mesh"])
    settings = Settings(tokens=job["tokens"], batch=job["batch"])
    what = {"fusion": fusion, "step": step, "decode": decode}[job["what"]]
    out = what(from_json(job["cfg"]), settings, mesh, tuple(map(from_json, job["teachers"])))
    out["compile_seconds"] = round(out["compile_seconds"], 1)
    out["peak_rss"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(out))


def compiled(what: str, cfg, mesh: str, batch: int = 1, tokens: int = 1, teachers=()) -> dict:
    """What `child` says of it. DelveError: it cannot be compiled."""
    from delve_jax import parallel
    from delve_jax.config import DelveError, to_json

    count = 1
    for size in parallel.parse_mesh(mesh).values():
        count *= size
    # buffers are assigned before LLVM runs, so its optimisation may be left out
    flags = f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
           "JAX_ENABLE_COMPILATION_CACHE": "false"}  # fmt: skip
    job = {"what": what, "cfg": to_json(cfg), "mesh": mesh, "batch": batch, "tokens": tokens,
           "teachers": list(map(to_json, teachers))}  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, "--child"], input=json.dumps(job), text=True, env=env,
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DelveError(f"{what} cannot be compiled ({lines[-1][:200]}); --no-compile")
    return json.loads(done.stdout.splitlines()[-1])


# ---- rows ----------------------------------------------------------------------------------------


def healing(name: str, how: Healing, tokens: int, no_compile: bool = False) -> dict:
    """What healing a tier needs: bytes a device, hours and dollars."""
    import jax

    from delve_jax import models, parallel, plan, presets
    from delve_jax.train.run import Settings

    settings = Settings(tokens=tokens, batch=how.batch)  # as `upcycle` heals: float32, remat
    r = plan.plan(
        name, settings, mesh=how.mesh, keep=how.keep, objective=how.objective, device=how.device,
        mfu=MFU, no_compile=True,
    )  # fmt: skip
    size, limit = r["bytes_per_device"], plan.DEVICES[how.device][1]
    teachers = teachers_of(name, how.objective)
    mesh = jax.sharding.AbstractMesh(tuple(r["mesh"].values()), parallel.AXES)
    size["teachers"] = sum(plan._bytes(mesh, models.abstract_params(t)) for t in teachers)
    out = {
        **how._asdict(), "devices": r["devices"], "window": r["window"], "tokens": tokens,
        "parameters": r["parameters"], "bytes": size, "device_bytes": int(limit), "fits": None,
        "hours": r["hours"], "mfu": MFU, "dollars_per_hour": DOLLARS[how.device],
        "dollars": r["hours"] * r["devices"] * DOLLARS[how.device],
    }  # fmt: skip
    if not no_compile:
        cfg = presets.preset(name, how.keep)
        found = compiled("step", cfg, how.mesh, how.batch, tokens, teachers)
        size["activations"] = found.pop("activations")
        size["peak"] = sum(size.values())
        out |= found | {"fits": bool(size["peak"] < limit)}
    return out


def step_name(name: str, how: Healing) -> str:
    """Name of the row of a way to heal."""
    other = f" keep {how.keep} {how.objective}"
    usual = (how.keep, how.objective) == (KEEP, "ce+kl")
    return f"{name} step {how.device} {how.mesh} batch {how.batch}" + ("" if usual else other)


def jobs() -> dict:
    """Row name -> what makes it."""
    from delve_jax import models, presets

    def of(name: str, what: str, mesh: str):
        def row():
            cfg = presets.preset(name, KEEP)
            return {"keep": KEEP, "mesh": mesh, "parameters": models.count(cfg),
                    **compiled(what, cfg, mesh)}  # fmt: skip

        return row

    out = {}
    for name, tier in TIERS.items():
        out[f"{name} fusion"] = of(name, "fusion", "data=1")
        for how in tier.healings:
            out[step_name(name, how)] = lambda n=name, how=how, t=tier: healing(n, how, t.tokens)
        for mesh in tier.decode:
            out[f"{name} decode {mesh}"] = of(name, "decode", mesh)
    return out


def recorded() -> dict:
    """The rows that stand in the results, by name."""
    if not RESULTS.exists():
        return {}
    return {row["row"]: row for row in json.loads(RESULTS.read_text())["rows"]}


def write(rows: dict, order: list[str]) -> None:
    """A row a line, in order, so that a diff shows what changed."""
    from delve_jax.metrics import versions

    lines = ",\n".join(json.dumps(rows[name]) for name in order if name in rows)
    head = json.dumps({"command": "python experiments/tiers.py", "versions": versions()})
    half = RESULTS.with_suffix(".writing")
    half.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')
    half.replace(RESULTS)


def summary(name: str, rows: dict) -> list[str]:
    """A tier's rows as the lines that its script's docstring shows."""
    gib = lambda n: f"{n / GIB:.1f} GiB"  # noqa: E731
    lines = []
    for row, r in rows.items():
        if not row.startswith(f"{name} "):
            continue
        if row.startswith(f"{name} step"):
            other = "" if (r["keep"], r["objective"]) == (KEEP, "ce+kl") else (
                f", keep {r['keep']}, {r['objective']}")  # fmt: skip
            verdict = (
                f"{r['tokens'] / 1e6:,.0f} M tokens in {r['hours']:.1f} h, ${r['dollars']:,.0f}"
                if r["fits"] else "does not fit"
            )  # fmt: skip
            lines.append(
                f"{r['devices']} x {r['device']}, {r['mesh']}, batch {r['batch']}{other}: "
                f"{gib(r['bytes']['peak'])} of {gib(r['device_bytes'])}; {verdict}"
            )
        else:
            more = r["bytes"].get("converted")
            lines.append(
                f"{row[len(name) + 1 :]}: {gib(r['bytes']['peak'])} a device"
                + (f" ({gib(more)} if XLA first converts all weights)" if more else "")
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows that hold it")
    parser.add_argument("--fresh", action="store_true", help="make recorded rows again")
    flags = parser.parse_args()
    if flags.child:
        return child()
    rows, todo = recorded(), jobs()
    for name, make in todo.items():
        if (name in rows and not flags.fresh) or not all(text in name for text in flags.only):
            continue
        began = time.perf_counter()
        rows[name] = {"row": name, **make(), "seconds": round(time.perf_counter() - began, 1)}
        write(rows, list(todo))
        print(json.dumps(rows[name]), flush=True)
    for tier in TIERS:
        print(tier, *summary(tier, {n: rows[n] for n in todo if n in rows}), sep="\n    ")


# ---- the scripts ---------------------------------------------------------------------------------


def main_of(name: str, about: str, argv: list[str]) -> int:
    """`delve upcycle` of a tier's hub ids; all its flags pass through. Returns the exit code."""
    from delve_jax import cli
    from delve_jax.config import DelveError

    tier = TIERS[name]
    own = cli.Parser(description=about, add_help=False, allow_abbrev=False)
    own.add_argument("--dry-run", action="store_true", help="print the plan; nothing is fetched")
    own.add_argument("--no-compile", action="store_true", help="of it: leave the activations out")
    own.add_argument("--device", default="h200", choices=tuple(DOLLARS))
    mine, rest = own.parse_known_args(argv)
    how = next(h for h in tier.healings if h.device == mine.device)
    defaults = ["--parents", *tier.parents, "--keep", KEEP, "--heal-tokens", tier.tokens,
                "--batch", how.batch, "--lr", 1e-4, "--out", f"out/{name}"]  # fmt: skip
    flags = ["upcycle", *map(str, defaults), *rest]
    args = cli.parser().parse_args(flags)
    try:
        if not mine.dry_run:
            if not args.data and (args.heal_tokens or not (args.calibrate and args.report_text)):
                raise DelveError("--data: name the text; without it the standard library's is read")
            return cli.main(flags)
        if args.parents != list(tier.parents):
            raise DelveError("--dry-run: plans the tier's own parents; leave --parents out")
        how = how._replace(mesh=args.mesh or how.mesh, batch=args.batch, keep=args.keep)
        plan = healing(name, how, args.heal_tokens, mine.no_compile)
    except DelveError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    print(json.dumps(plan) if args.json else show(name, plan))
    return 0


def show(name: str, r: dict) -> str:
    """A plan for people."""
    size = ", ".join(f"{k} {v / GIB:.1f}" for k, v in r["bytes"].items())
    fits = {True: "fits", False: "does NOT fit", None: "not compiled"}[r["fits"]]
    return "\n".join((
        f"{name}: {r['parameters']:,} parameters at keep {r['keep']} of",
        *(f"    {source}" for source in TIERS[name].parents),
        f"healing on {r['devices']} x {r['device']} ({r['mesh']}), {r['batch']} x {r['window']} "
        f"tokens a step, {r['objective']}",
        f"GiB a device: {size}; {fits} {r['device_bytes'] / GIB:.1f}",
        f"{r['tokens']:,} tokens: {r['hours']:.1f} hours, ${r['dollars']:,.0f}, assuming "
        f"{r['mfu']:.0%} of the peak rate and ${r['dollars_per_hour']:.2f} a device and hour",
        "compression, fusion, scores and export come on top",
    ))  # fmt: skip


if __name__ == "__main__":
    main()
