"""The verbs that train: heal and train. Each leaves a checkpoint directory, resumed when repeated.

What stands in DST.partial and when a call is done already: see `road`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import checkpoint, data, lineage, parallel, parents
from .config import Config, DelveError, read_json, to_json
from .look import info
from .metrics import SINKS
from .road import already, begin, load_teacher, partial_of, teacher_of
from .train import run
from .train.objective import Terms
from .train.run import Settings


def heal(
    src,
    dst,
    settings: Settings,
    *,
    text: Sequence[str] = (),
    documents: Sequence[str] | None = None,
    teachers: Sequence[str] | None = None,
    terms: Terms = Terms(),  # noqa: B008  (frozen)
    stages: str | None = None,
    teacher_cache: str | None = None,
    mesh: str | None = None,
    distributed: str | None = None,
    overwrite: bool = False,
):
    """Train a compressed or fused checkpoint on text, against its dense parents.

    text: files or token folders, each optionally PATH=WEIGHT; or `documents` themselves. teachers:
    default the sources recorded in the config, in the order of the streams; one that is missing is
    a DelveError (terms of cross-entropy alone need none). stages: "hybrid" or a JSON file
    (`run.read_stages`), in the place of `terms`. teacher_cache: folder of samples of what the
    teachers' pool says, made before training (`train.cache`). Leaves a checkpoint directory with
    metrics.jsonl; a repeated call resumes. -> `info` of it, its path and the report. DelveError:
    also settings that do not fit the mesh, unreadable text, steps that keep being not finite.
    """
    if stages:
        _check_alone(settings, terms, teacher_cache)
    parts = run.read_stages(stages) if stages else (run.Stage("heal", 1.0, terms.checked()),)
    if parallel.start(distributed) > 1 and teacher_cache:
        raise DelveError("--teacher-cache: is made by one process; heal with one, or without")
    command = {"verb": "heal", "src": src, "text": list(map(str, text)),
               "data_hash": data.data_hash(documents) if documents else None,
               "teachers": teachers and list(map(str, teachers)),
               "stages": list(map(dataclasses.asdict, parts)), **_what(settings)}  # fmt: skip
    if teacher_cache:  # samples are another loss than the teachers themselves
        command["teacher_cache"] = True
    on = parallel.make_mesh(mesh)
    settings.checked(on)
    own = [part.settings(settings) for part in parts] if stages else [settings]
    if begin(dst, command, overwrite, text):
        return already(dst)
    cfg, tokenizer = parents.peek(src)
    tok = data.load_tokenizer(tokenizer, cfg.vocab_size)
    loaded = []
    if any(part.terms.name != "ce" for part in parts):
        recorded = teachers is None and cfg.family == "delve"
        if teachers is None:
            teachers = cfg.teachers if recorded else [teacher_of(str(src))]
        for teacher in teachers:
            try:
                loaded.append(load_teacher(str(teacher), tokenizer, recorded, on))
            except DelveError as err:
                raise DelveError(
                    f"teacher {err}; name it with --teachers, or --objective ce"
                ) from None
    cfg = dataclasses.replace(cfg, dtype=settings.master)
    for its, part in zip(own, parts, strict=True):  # the last stage, too, before the first runs
        needed = tuple(c for c, _ in loaded) if part.terms.name != "ce" else ()
        run.check(cfg, needed, its, on, part.terms, teacher_cache is not None and bool(needed))
    opener, read = _opener(text, documents, tokenizer, cfg.vocab_size, settings.seed)
    how = {"mesh": on, "eot": data.eot_of(tok), "tokenizer": tokenizer, "teachers": loaded,
           "teacher_cache": teacher_cache, "read": read}  # fmt: skip
    if not stages:
        params, report = _stage(src, cfg, parts[0], settings, opener, partial_of(dst), **how)
        report |= {"data": read}
        return _finish(dst, cfg, params, tokenizer, overwrite, "heal", report, [src])
    first, report, used, weights = src, {"stages": {}}, 0, None
    for number, (part, its) in enumerate(zip(parts, own, strict=True)):
        place = partial_of(dst) / "stages" / f"{number + 1}-{part.name}"
        if not place.exists():  # else it is done
            # a copy: a stage forgets teachers without weight, whom the next one may ask
            params, facts = _stage(
                src, cfg, part, its, opener, partial_of(place), skip=used, weights=weights,
                **how | {"teachers": list(loaded)},
            )  # fmt: skip
            checkpoint.save(place, cfg, params, tokenizer, extra={"heal.json": facts},
                            served=("state",))  # fmt: skip
        report["stages"][part.name] = facts = read_json(place / "heal.json")
        weights = facts.get("teacher_weights", weights)  # fitted once: one pool teaches all stages
        used += facts["steps"]
        src = place
    params = parents.load(src, dtype=None, mesh=on)[1]
    report |= {k: sum(s[k] for s in report["stages"].values()) for k in ("steps", "tokens")}
    report["data"] = read
    parallel.on_main(_join_metrics, partial_of(dst), report["stages"])
    return _finish(dst, cfg, params, tokenizer, overwrite, "heal", report, [first])


def _check_alone(settings: Settings, terms: Terms, teacher_cache) -> None:
    """DelveError: beside --stages stands what the stages themselves say, or cannot be done."""
    if teacher_cache:
        raise DelveError("--teacher-cache: for one objective, not for --stages")
    said = {"trains": settings.trains, "joints_lr": settings.joints_lr, **dataclasses.asdict(terms)}
    usual = {f.name: f.default for of in (Settings, Terms) for f in dataclasses.fields(of)}
    beside_stages(name for name, value in said.items() if value != usual[name])


def beside_stages(names: Iterable[str]) -> None:
    """DelveError where anything is given that every stage says for itself."""
    flags = {"trains": "train", "ce": "kl-weight", "kl": "kl-weight", "streams": "stream-kl",
             "hidden": "hidden-match"}  # fmt: skip
    for name in sorted(names):
        flag = flags.get(name, name.replace("_", "-"))
        raise DelveError(f"--{flag}: not beside --stages, whose file says it for each stage")


def _stage(
    src, cfg, part: run.Stage, settings, opener, workdir, *, mesh, eot, tokenizer, teachers,
    teacher_cache, read, skip: int = 0, weights=None,
):  # fmt: skip
    """One stage of healing from its source -> (params, report); skip: batches used before it."""

    def rest(T, batch, shard, shards):
        dataset = opener(T, batch, shard, shards)
        return dataset[skip:] if skip else dataset

    workdir.mkdir(parents=True, exist_ok=True)
    checkpoint.describe_run(workdir, cfg, tokenizer)
    needed = teachers if part.terms.name != "ce" else []
    return run.heal(
        cfg, lambda: parents.load(src, dtype="float32", mesh=mesh)[1], rest, needed, settings,
        mesh=mesh, workdir=workdir, eot=eot, terms=part.terms, weights=weights if needed else None,
        teacher_cache=teacher_cache, read=read,
    )  # fmt: skip


def _join_metrics(partial: Path, stages: dict) -> None:
    """One metrics.jsonl of all stages, steps and tokens counted through."""
    lines, steps, tokens = [], 0, 0
    for number, (name, facts) in enumerate(stages.items()):
        file = partial / "stages" / f"{number + 1}-{name}" / "metrics.jsonl"
        for line in file.read_text().splitlines():
            row = json.loads(line)
            row["step"] += steps
            row["tokens"] += tokens
            lines.append(json.dumps(row | {"stage": name}))
        steps, tokens = steps + facts["steps"], tokens + facts["tokens"]
    (partial / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for sink in SINKS:  # a folder of each stage, which goes with the stages unless it moves
        for folder in sorted((partial / "stages").glob(f"*/{sink}")):
            (partial / sink).mkdir(exist_ok=True)
            folder.rename(partial / sink / folder.parent.name)


def train(
    preset: str | Config,
    dst,
    settings: Settings,
    *,
    text: Sequence[str],
    tokenizer: str | None = None,
    mesh: str | None = None,
    distributed: str | None = None,
    overwrite: bool = False,
):
    """Train a preset of any family, or a configuration, from random weights.

    text: files or token folders, each optionally PATH=WEIGHT. tokenizer: a tokenizer.json or any
    source that has one; default that of the first token folder. Leaves a checkpoint directory with
    metrics.jsonl; a repeated call resumes. -> `info` of it, its path and the report. DelveError:
    an unknown preset, more ids than it has, settings that do not fit the mesh, unreadable text.
    """
    from . import presets

    parallel.start(distributed)
    named = isinstance(preset, str)
    cfg = presets.preset(preset) if named else preset
    command = {"verb": "train", "preset": preset if named else to_json(cfg),
               "text": list(map(str, text)),
               "tokenizer": tokenizer, **_what(settings)}  # fmt: skip
    on = parallel.make_mesh(mesh)
    settings.checked(on)
    cfg = dataclasses.replace(cfg, dtype=settings.master)
    tokenizer_json = _tokenizer_for(cfg, tokenizer, text)
    if begin(dst, command, overwrite, text):
        return already(dst)
    tok = data.load_tokenizer(tokenizer_json, cfg.vocab_size)
    checkpoint.describe_run(partial_of(dst), cfg, tokenizer_json)
    opener, read = _opener(text, None, tokenizer_json, cfg.vocab_size, settings.seed)
    params, report = run.pretrain(
        cfg, opener, settings, mesh=on, workdir=partial_of(dst), eot=data.eot_of(tok)
    )
    return _finish(dst, cfg, params, tokenizer_json, overwrite, "train", report | {"data": read})


def _what(settings: Settings) -> dict:
    """What of the settings decides the result, but for round-off: not how often states are saved,
    nor, like the mesh, how a step is cut and what it keeps, so that a run may go on elsewhere."""
    what = dataclasses.asdict(settings)
    for name in ("saving", "accumulate", "remat", "shard_sequence"):
        del what[name]
    return what


def _tokenizer_for(cfg: Config, tokenizer: str | None, text: Sequence[str]) -> str | None:
    """tokenizer.json of a run as text; None is raw bytes."""
    path = Path(tokenizer or ".")
    if tokenizer is None:
        named = [Path(str(t).rpartition("=")[0] or t) for t in text]
        inside = [p for f in named for p in (f, *sorted(f.glob("*")))]  # a mixture's parts too
        folders = [p for p in inside if (p / "manifest.json").is_file()]
        found = data.open_tokens(folders[0]).tokenizer_json if folders else None
    elif path.suffix == ".json" or (path / "tokenizer.json").is_file():
        found = data.read_tokenizer(tokenizer)
    else:
        found = parents.peek(tokenizer)[1]
    if found is None and cfg.vocab_size != 256:
        raise DelveError(
            "--tokenizer: name a tokenizer.json, or a source that has one (a vocabulary of "
            f"{cfg.vocab_size:,} is not raw bytes)"
        )
    size = data.load_tokenizer(found, cfg.vocab_size).get_vocab_size(with_added_tokens=True)
    if size > cfg.vocab_size:
        raise DelveError(
            f"--tokenizer {tokenizer or folders[0]}: has {size:,} ids, the preset's vocabulary is "
            f"{cfg.vocab_size:,}; choose another of the two"
        )
    return found


def _opener(text, documents, tokenizer_json, vocab_size: int, seed: int):
    """(open_data(T, batch, shard, shards) of a run, facts of its text: hash, tokens, parts).

    Text files are tokenised at each call; the facts stand once it was called.
    """
    facts: dict = {}
    if documents is None:

        def open_data(T, batch, shard, shards):
            dataset, found = data.training_set(
                text, tokenizer_json, vocab_size, T + 1, batch, seed, shard, shards
            )
            facts.update(found)
            return dataset

        return open_data, facts
    ids = data.encode_documents(data.load_tokenizer(tokenizer_json, vocab_size), documents)
    facts |= {"data_hash": data.data_hash(documents), "tokens": len(ids)}
    return lambda T, batch, shard, shards: data.batches(
        data.windows(ids, T + 1, T), batch, seed, shard, shards
    ), facts


def _finish(dst, cfg, params, tokenizer, overwrite, verb: str, report: dict, sources=()) -> dict:
    extra = {f"{verb}.json": report} | lineage.step(verb, sources, report)
    checkpoint.save(dst, cfg, params, tokenizer, overwrite, extra)
    for name in ("state", "stages"):  # which serve resuming only
        parallel.on_main(shutil.rmtree, Path(dst) / name, True)
    parallel.on_main((Path(dst) / run.FITTED).unlink, True)
    return {"path": str(dst), **parallel.on_main(info, dst), verb: report}
