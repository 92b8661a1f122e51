"""`delve delphi sweep`: a ladder of runs, trained, scored and gathered in one file of points.

Two ladders: the recipe's candidates at several budgets, from random weights, or the healing of
given checkpoints (one per keep ratio) for several numbers of tokens. Every run is a checkpoint
directory DST/runs/NAME made by `training.train` or `heal` and scored on text that no run sees.
DST/points.csv holds what is finished; the same call goes on, other budgets or seeds are added. One
process on any devices; several hosts share a DST when each is given budgets or seeds of its own.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import (
    checkpoint,
    data,
    evaluate,
    lm,
    metrics,
    models,
    parallel,
    parents,
    presets,
    road,
    training,
)
from .config import Config, DelveError, read_json, write_json
from .delphi import recipe as recipes
from .delphi.recipe import Candidate, Recipe
from .parents.stock import dense_parents
from .plan import train_flops
from .train.loop import Saving
from .train.run import Settings

# of points.csv, in this order; flops is the budget where there is one, loss nats a token
COLUMNS = (
    "flops", "params", "tokens", "loss", "batch_size", "steps", "hidden", "layers", "seed", "keep",
    "train_flops", "bits_per_byte", "train_loss", "lr", "run",
)  # fmt: skip
SCORE = "score.json"


class Job(NamedTuple):
    """One run: its name, what makes DST/runs/NAME, and its columns as far as they are known."""

    name: str
    make: Callable[[Path], dict]
    facts: dict


def sweep(
    dst,
    *,
    text: Sequence[str],
    report_text: Sequence[str],
    flops: Sequence[float] = (),
    widths: Sequence[int] = (),
    recipe: str | None = None,
    tokenizer: str | None = None,
    heal: Sequence[str] = (),
    tokens: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    given: dict | None = None,
    mesh: str | None = None,
    track: Sequence[str] = (),
) -> dict:
    """Train and score what DST lacks -> {"path", "points", "rows"}.

    flops, widths, recipe (a JSON file of constants that differ): the ladder of candidates, all
    widths unless some are named. heal, tokens: instead the ladder of healing. given: fields of
    `Settings` in the place of the recipe's (or of the defaults). track: sinks of every run's log
    (`metrics.SINKS`). DelveError: neither or both ladders, no report text or one that is trained
    on, two runs of one name, DST of other data, an unfinished run of other settings.
    """
    flops, heal, tokens, seeds = (tuple(dict.fromkeys(v)) for v in (flops, heal, tokens, seeds))
    if bool(flops) == bool(heal) or bool(heal) != bool(tokens):
        raise DelveError("name the ladder: --flops C..., or --heal SRC... with --tokens N...")
    if not report_text:
        raise DelveError("--report-text: name text to score on that no run is trained on")
    dst, given = Path(dst), given or {}
    scored = data.data_hash(documents := _documents(report_text))
    _check_unseen(text, documents)
    rules = recipes.read(recipe) if flops else None
    how = given | {"saving": Saving(track=tuple(track))}
    if rules:
        jobs = _candidates(rules, flops, widths, seeds, how, text, tokenizer, mesh)
        common = {"tokenizer": tokenizer and str(tokenizer)}
    else:
        jobs, common = _healings(heal, tokens, seeds, how, text, mesh), {}
    _check_names(jobs)
    # a folder's tokenizer is a file in it
    read = [*text, *([tokenizer, Path(tokenizer) / "tokenizer.json"] if tokenizer else [])]
    _claim(dst, {"text": list(map(str, text)), "report_text": scored, "given": given,
                 "recipe": rules and dataclasses.asdict(rules), **common},
           data.text_hashes(read))  # fmt: skip
    _check_older(dst, rules, given)
    left = [job for job in jobs if not _scored(dst / "runs" / job.name / SCORE, job)]
    with metrics.progress(sum(job.facts["train_flops"] for job in left), "sweep", "FLOP") as bar:
        for job in left:
            bar.set_postfix_str(job.name)
            folder = dst / "runs" / job.name
            job.make(folder)
            _score(folder, job, documents, mesh)
            bar.update(job.facts["train_flops"])
    rows = gather(dst)
    return {"path": str(dst), "points": str(dst / "points.csv"), "rows": rows}


def _scored(file: Path, job: Job) -> bool:
    """Whether this run is done; DelveError where another one, or one of another source, is."""
    if not file.exists():
        return False
    row, key = read_json(file), _origin(job)
    now, before = job.facts[key], row.get(key)
    if before not in (None, now):
        raise DelveError(f"{file.parent}: is the run of {key} {before}, not {now}; rename one, or "
                         "name another DST")  # fmt: skip
    if row.get("src_hash") not in (None, job.facts.get("src_hash")):
        raise DelveError(f"{now}: has changed since {file.parent} was healed from it; put it back, "
                         "or name another DST")  # fmt: skip
    return True


def _origin(job: Job) -> str:
    """The fact that two runs of one name may differ in."""
    return "src" if "src" in job.facts else "flops"


def _check_names(jobs: list[Job]) -> None:
    """DelveError where two of these runs have one name: budgets that print alike, or sources."""
    known = {}
    for job in jobs:
        key = _origin(job)
        now = job.facts[key]
        if (before := known.setdefault(job.name, now)) != now:
            flag = "--heal" if key == "src" else "--flops"
            raise DelveError(f"{flag}: {before} and {now} would both be the run {job.name}; name "
                             "another DST for one of them")  # fmt: skip


def _check_unseen(text: Sequence[str], report: list[str]) -> None:
    """DelveError where a file of the training text has a document of the report text.

    Token folders are passed over: they do not tell what they were made from.
    """
    held_back = set(report)
    for item in text:
        path = Path(item)
        if not path.exists():  # PATH=WEIGHT
            path = Path(str(item).rpartition("=")[0] or item)
        if path.is_file() and (shared := held_back.intersection(data.read_documents(path))):
            raise DelveError(f"--report-text: {len(shared)} of its documents are also in --data "
                             f"{path}; give text that no run is trained on")  # fmt: skip


def _check_older(dst: Path, rules: Recipe | None, given: dict) -> None:
    """DelveError where an earlier version left points that this one would have made otherwise.

    Their rows have no "window": they were scored on `evaluate`'s own, and a batch that was given
    had the rates of the recipe's.
    """
    for file in sorted(dst.glob(f"runs/*/{SCORE}")):
        folder = file.parent
        if "window" in read_json(file):
            continue
        T = read_json(folder / ("train.json" if rules else "heal.json"))["window"]
        window = min(checkpoint.load_config(folder).context_length, evaluate.WINDOW)
        if T != window:
            raise DelveError(f"{folder}: was scored on windows of {window} tokens and has rows of "
                             f"{T}; name another DST")  # fmt: skip
        if rules and "batch" in given and _by_recipe(given):
            raise DelveError(f"{folder}: has the rates of another batch than the one that it was "
                             "given; name another DST")  # fmt: skip


def _documents(files: Sequence[str]) -> list[str]:
    return [document for file in files for document in data.read_documents(file)]


def _claim(dst: Path, command: dict, hashes: dict[str, str]) -> None:
    """What all points of a folder have in common; DelveError where DST has something else.

    hashes: of data and tokenizer. What an earlier version did not record is not compared.
    """
    record = dst / "sweep.json"
    if record.exists():
        known = read_json(record)
        before, was = known["command"], known.get("text", {})
        given = json.loads(json.dumps(command))
        odd = [k for k, v in given.items() if k in before and before[k] != v]
        if odd:
            raise DelveError(f"{dst}: holds runs of another {odd[0]}; name another DST")
        if changed := [path for path, now in hashes.items() if was.get(path, now) != now]:
            raise DelveError(f"{changed[0]}: has changed since {dst} was begun with it; put it "
                             "back, or name another DST")  # fmt: skip
        return
    if dst.exists() and any(dst.iterdir()):
        raise DelveError(f"{dst}: exists and is no sweep; name another DST")
    dst.mkdir(parents=True, exist_ok=True)
    facts = {"command": command, "text": hashes, "versions": metrics.versions()}
    record.write_text(json.dumps(facts, indent=1))


def _candidates(rules: Recipe, flops, widths, seeds, given, text, tokenizer, mesh) -> list[Job]:
    """The recipe's candidates, small budgets first, so that a fit can start early."""
    jobs = []
    for C in sorted(flops):
        found = [c for c in rules.candidates(C) if not widths or c.hidden in widths]
        if not found:
            raise DelveError(
                f"--hidden {' '.join(map(str, widths))}: none is a candidate at {C:g} FLOPs; see "
                "`delve delphi candidates`"
            )
        for c in found:
            cfg = presets.delphi(c.hidden, rules)
            for seed in seeds:
                settings = _checked(settings_of(rules, C, c, seed, given), mesh)
                T = settings.row_length(cfg)
                steps = settings.steps(T)
                run = steps * settings.batch * T
                spent = dataclasses.replace(rules, seq_len=T).train_flops(c.hidden, run)
                facts = {
                    "flops": C, "params": models.count(cfg), "tokens": run, "steps": steps,
                    "batch_size": settings.batch, "hidden": c.hidden, "layers": c.layers,
                    "seed": seed, "train_flops": spent, "lr": settings.peak, "window": T,
                }  # fmt: skip

                def make(folder, cfg=cfg, settings=settings):
                    return training.train(
                        cfg, folder, settings, text=text, tokenizer=tokenizer, mesh=mesh
                    )

                jobs.append(Job(f"C{C:.3g}-h{c.hidden}-s{seed}", make, facts))
    return jobs


def settings_of(rules: Recipe, C: float, run: Candidate, seed: int, given: dict) -> Settings:
    """The recipe's configuration of a candidate as the settings of its run.

    A batch in `given` brings the rates that the recipe has for it. Another optimiser there takes
    the sizes and the schedule, and rates of its own.
    """
    r = rules.config(C, run.hidden, given.get("batch") if _by_recipe(given) else None)
    settings = Settings(
        tokens=r["tokens"], batch=r["batch_size"], window=rules.seq_len, z_loss=r["z_loss"],
        warmup=r["warmup"], decay=r["decay"], seed=seed,
    )  # fmt: skip
    if _by_recipe(given):
        settings = dataclasses.replace(
            settings, optimizer="adamh", lr=r["lr"], adam_lr=r["adam_lr"], b2=r["beta2"],
            eps=r["epsilon"], clip=r["max_grad_norm"],
        )  # fmt: skip
    return dataclasses.replace(settings, **given)


def _by_recipe(given: dict) -> bool:
    """Whether the runs have the recipe's optimiser, and so its rates."""
    return given.get("optimizer", "adamh") == "adamh"


def _checked(settings: Settings, mesh: str | None) -> Settings:
    """Flags that contradict each other are named before the first run."""
    return settings.checked(parallel.make_mesh(mesh))


def _healings(sources, tokens, seeds, given, text, mesh) -> list[Job]:
    """Each checkpoint healed for each number of tokens, few tokens first."""
    jobs = []
    for N in sorted(tokens):
        for src in sources:
            cfg, _ = parents.peek(src)
            if cfg.family != "delve" and not cfg.ranks:
                raise DelveError(f"{src}: not compressed; the ladder of healing takes checkpoints "
                                 "of `delve compress` or `delve fuse`")  # fmt: skip
            for seed in seeds:
                settings = dataclasses.replace(Settings(tokens=N, seed=seed), **given)
                settings = _checked(settings, mesh)
                T = settings.row_length(cfg)
                steps = settings.steps(T)
                run, params = steps * settings.batch * T, models.count(cfg)
                dense = dense_parents(cfg)
                spent = run * train_flops(cfg, T, dense)
                facts = {
                    "flops": spent, "params": params, "tokens": run, "steps": steps,
                    "batch_size": settings.batch, "hidden": _width(cfg), "layers": _depth(cfg),
                    "seed": seed, "keep": round(params / sum(map(models.count, dense)), 4),
                    "train_flops": spent, "lr": settings.peak, "window": T, "src": str(src),
                    "src_hash": checkpoint.fingerprint(parents.resolve(src)),
                }  # fmt: skip

                def make(folder, src=src, settings=settings):
                    return training.heal(src, folder, settings, text=text, mesh=mesh)

                jobs.append(Job(f"{road.name_of(src)}-{N}-s{seed}", make, facts))
    return jobs


def _width(cfg: Config) -> int:
    return sum(s.d_model for _, s in cfg.streams) if cfg.family == "delve" else cfg.d_model


def _depth(cfg: Config) -> int:
    return max(s.n_layers for _, s in cfg.streams) if cfg.family == "delve" else cfg.n_layers


def _score(folder: Path, job: Job, documents: list[str], mesh: str | None) -> None:
    """Evaluate a finished run and leave its row beside it, whole or not at all.

    On the run's mesh, which may hold what one device does not, in windows of the run's rows.
    """
    model = lm.load(folder, mesh=parallel.make_mesh(mesh))
    found = evaluate.evaluate(model, documents, window=job.facts["window"])
    log = metrics.read_metrics(folder / "metrics.jsonl")
    row = job.facts | {
        "loss": found["nll_per_token"], "bits_per_byte": found["bits_per_byte"],
        "train_loss": log[-1]["loss"], "run": job.name,
    }  # fmt: skip
    write_json(folder / SCORE, row)


def gather(dst: str | Path) -> list[dict]:
    """All finished runs of a sweep, smallest first; DST/points.csv is written anew from them."""
    dst = Path(dst)
    rows = [read_json(file) for file in sorted(dst.glob(f"runs/*/{SCORE}"))]
    rows.sort(key=lambda r: (r["flops"], r["params"], r["tokens"], r["seed"]))
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows({k: r[k] for k in COLUMNS if k in r} for r in rows)
    half = dst / "points.csv.writing"
    half.write_text(out.getvalue())
    half.replace(dst / "points.csv")
    return rows
