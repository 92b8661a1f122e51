"""The verbs that leave something and train nothing: convert, compress, fuse, export.

Each reads a source, does one thing and leaves a checkpoint directory. Work stands in DST.partial
with `run.json` (the arguments, and a hash of each text); the same call resumes it, a finished one
says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import checkpoint, data, lineage, models, parallel, parents
from . import compress as compression
from . import fuse as fusion
from .compress.refine import WRITTEN, refine
from .compress.storage import convert as convert_storage
from .config import STORAGES, Config, DelveError, read_json, write_json
from .look import info, texts_of
from .metrics import SINKS, versions
from .report import ranks_picture

CALIBRATION_WINDOW = 512  # longest calibration window; shorter where the context is


def begin(
    dst: str | Path, command: dict, overwrite: bool = False, text: Sequence[str | Path] = ()
) -> bool:
    """Claim DST for `command`; True where it stands there finished already.

    text: files and token folders that the work reads. DelveError where DST or DST.partial holds the
    work of other arguments or of text that has changed since (unless overwrite), or cannot be made.
    """
    dst = Path(dst)
    if not dst.name:
        raise DelveError(f"{dst}: name a directory to make, not one that is there")
    try:
        return parallel.on_main(_begin, dst, command, overwrite, text)
    except OSError as err:
        raise DelveError(f"{dst}: cannot be written ({err.strerror or err})") from None


def _begin(dst: Path, command: dict, overwrite: bool, text: Sequence[str | Path]) -> bool:
    partial = partial_of(dst)
    command, hashes = json.loads(json.dumps(command, default=str)), data.text_hashes(text)
    if overwrite:
        checkpoint.check_replaceable(dst)  # now, not when the work is done
    if dst.exists() and not overwrite:
        if (known := _record(dst)) and known.get("command") == command:
            if changed := _changed(known, hashes):
                raise DelveError(
                    f"{changed}: has changed since {dst} was made from it; name another DST or "
                    "--overwrite"
                )
            return True
        raise DelveError(
            f"{dst}: exists and was made with other arguments; name another DST or --overwrite"
        )
    known = _record(partial, damaged_is_none=overwrite)
    same = known is not None and known.get("command") == command
    changed = _changed(known, hashes) if same else None
    if partial.exists() and (changed or not same):
        if not overwrite and _has_work(partial):
            if known is None:
                raise DelveError(
                    f"{partial}: is in the way and not ours (no run.json); move it, or --overwrite"
                )
            if changed:
                raise DelveError(
                    f"{changed}: has changed since {partial} was begun with it; put it back, or "
                    "--overwrite to begin anew"
                )
            raise DelveError(
                f"{partial}: holds unfinished work of other arguments; repeat those, or --overwrite"
            )
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    record = {"command": command, "text": hashes, "versions": versions()}
    write_json(partial / "run.json", record, indent=2)
    return False


def _record(folder: Path, damaged_is_none: bool = False) -> dict | None:
    """run.json of a folder, None where there is none; DelveError where it is damaged."""
    file = folder / "run.json"
    try:
        return read_json(file) if file.exists() else None
    except DelveError as err:
        if damaged_is_none:
            return None
        raise DelveError(f"{err}; name another DST or --overwrite") from None


def _changed(known: dict, hashes: dict[str, str]) -> str | None:
    """The first text that is not what it was; what is not there now is for the reader to name."""
    before = known.get("text", {})  # records of earlier versions have none
    return next((path for path, now in hashes.items() if before.get(path, now) != now), None)


def _has_work(partial: Path) -> bool:
    """Whether more stands there than what a command that failed at once leaves."""
    notes = {"run.json", "config.json", "tokenizer.json", "metrics.jsonl", "teachers.json", *SINKS}
    notes |= {"run.json.writing"}  # of a kill before the record was whole
    return any(p.name not in notes for p in partial.iterdir())


def already(dst: str | Path) -> dict:
    """What a repeated verb answers."""
    return {"path": str(dst), "already": True, **info(dst)}


def calibration_windows(
    cfg: Config, tokenizer_json: str | None, documents: Sequence[str], tokens: int, seed: int = 0
) -> np.ndarray:
    """Random windows [N, T] of the text's ids, about `tokens` in all."""
    tok = data.load_tokenizer(tokenizer_json, cfg.vocab_size)
    ids = data.encode_documents(tok, documents)
    T = min(cfg.context_length, CALIBRATION_WINDOW, len(ids))
    if T < 2:
        raise DelveError("--calibrate: the text has fewer than 2 tokens; give more text")
    windows = data.windows(ids, T)
    order = np.random.default_rng(seed).permutation(len(windows))
    return windows[np.sort(order[: max(1, tokens // T)])]


def refinement_rows(
    cfg: Config, tokenizer_json: str | None, documents: Sequence[str], tokens: int, seed: int = 0
) -> np.ndarray:
    """Random rows [N, T + 1] of the text, at most `tokens` ids in all (but one row at least).

    Drawn like calibration windows, each with the id that follows: at one seed the smaller of the
    two sets lies in the larger, so that the distinct tokens of both are those of the larger.
    """
    ids = data.encode_documents(data.load_tokenizer(tokenizer_json, cfg.vocab_size), documents)
    T = min(cfg.context_length, CALIBRATION_WINDOW, len(ids) - 1)
    rows = data.windows(ids, T + 1, T)
    order = np.random.default_rng(seed).permutation(len(data.windows(ids, T)))
    order = order[order < len(rows)]  # the text's last window may have no id after it
    return rows[np.sort(order[: max(1, tokens // (T + 1))])]


def name_of(src: str | Path) -> str:
    """A short name of a source: its directory, file or repository name without revision."""
    if Path(src).exists():  # a path may hold "@", and "." has no name of its own
        return Path(os.path.abspath(src)).name.removesuffix(".pth")
    return re.sub(r"@.*$", "", str(src).rstrip("/")).rsplit("/", 1)[-1].removesuffix(".pth")


def convert(
    src, dst, *, dtype: str | None = None, storage: str | None = None, keep: float | None = None,
    streams: Sequence[str] = (), mesh: str | None = None, overwrite=False,
):  # fmt: skip
    """Any source -> checkpoint directory (sharded Orbax, in the source's dtype unless given).

    storage: uv, pivot or int8, another form of the factors (default: as they are). keep, streams:
    a part of the model (`parents.part`). -> `info` of it and its path. DelveError: an unreadable
    source, DST taken by other arguments.

    >>> import delve_jax
    >>> out = delve_jax.convert(delve_jax.upcycle.embedded_parents()[-1], "rwkv", dtype="float32")
    >>> out["path"], out["dtype"], delve_jax.load("rwkv").config.n_layers
    ('rwkv', 'float32', 3)
    """
    command = {"verb": "convert", "src": src, "dtype": dtype, "storage": storage, "keep": keep,
               "streams": list(streams), "mesh": mesh}  # fmt: skip
    if begin(dst, command, overwrite):
        return already(dst)
    on = parallel.make_mesh(mesh) if mesh else None
    cfg, params, tokenizer = parents.load(src, dtype=dtype, mesh=on, keep=keep, streams=streams)
    if dtype:
        cfg = dataclasses.replace(cfg, dtype=dtype)
    if storage:
        cfg, params = convert_storage(cfg, params, storage)
    commit = parents.commit(parents.resolve(src))
    extra = {"source.json": {"source": str(src), "commit": commit}}
    extra |= lineage.step("convert", [src], {k: command[k] for k in ("dtype", "storage", "keep")})
    checkpoint.save(dst, cfg, params, tokenizer, overwrite, extra)
    return {"path": str(dst), **info(dst)}


def compress(
    src,
    dst,
    *,
    keep: float | None = None,
    budget: int | None = None,
    method: str = "delve",
    calibrate: Sequence[str] = (),
    documents: Sequence[str] | None = None,
    calibrate_tokens: int = 65536,
    refine_tokens: int = 0,
    refine_written: int = WRITTEN,
    storage: str = "uv",
    seed: int = 0,
    overwrite: bool = False,
):
    """Parent -> factored checkpoint; `keep` is the kept share of ALL parameters.

    calibrate: text files, or `documents` themselves. refine_tokens: train what is left, towards
    the dense parent, on so many distinct tokens of that text in several passes (the calibration
    tokens are among them) and on refine_written times as many that the parent writes. storage: the
    form of the factors in DST (pivot and int8 are for running, not for training). Without these two
    the parent is read layer by layer from its files, and memory does not depend on its depth.
    Leaves DST/compress.json (ranks, errors, divergence), DST/compress.png and DST/spectra.npz
    (sigma^2 of every map). A killed call goes on where it was, layer by layer. DelveError: a ratio
    that cannot be met (says which can).

    >>> import delve_jax
    >>> parent = delve_jax.upcycle.embedded_parents()[2]
    >>> small = delve_jax.compress(parent, "small", keep=0.6, method="svd")
    >>> small["parameters"] <= 0.6 * delve_jax.info(parent)["parameters"]
    True
    """
    command = {"verb": "compress", "src": src, "keep": keep, "budget": budget, "method": method,
               "calibrate": list(map(str, calibrate)), "calibrate_tokens": calibrate_tokens,
               "refine_tokens": refine_tokens, "refine_written": refine_written,
               "storage": storage,
               "data_hash": data.data_hash(documents) if documents else None,
               "seed": seed}  # fmt: skip
    if method not in compression.METHODS:
        raise DelveError(f"--method {method}: available are {', '.join(compression.METHODS)}")
    if refine_written < 0:
        raise DelveError(f"--refine-written {refine_written}: must not be below 0")
    if storage not in STORAGES:
        raise DelveError(f"--storage {storage}: choose one of {', '.join(STORAGES)}")
    if begin(dst, command, overwrite, calibrate):
        return already(dst)
    source = parents.open_layers(src) if not refine_tokens and storage == "uv" else None
    if source is None:
        cfg, params, tokenizer = parents.load(src, dtype="float32")
    else:
        cfg, params, tokenizer = source.cfg, source, source.tokenizer
    dense, stored = (cfg, params), source.stored if source else cfg
    work = partial_of(dst) / "work"
    try:
        compression.plan_for(cfg, keep=keep, budget=budget)  # a ratio that fails, fails at once
        windows = None
        if method != "svd" and keep != 1.0 or refine_tokens:
            if documents is None:
                documents = texts_of(calibrate)
            if not documents:
                needs = "--refine-tokens" if method == "svd" else f"--method {method}"
                raise DelveError(
                    f"--calibrate TEXT is missing: {needs} needs it (--method svd alone does not)"
                )
            windows = calibration_windows(cfg, tokenizer, documents, calibrate_tokens, seed)
        cfg, params, report = compression.compress(
            cfg, params, windows, keep=keep, budget=budget, method=method, work=work, seed=seed,
            check=True,
        )  # fmt: skip
    except DelveError as err:
        raise DelveError(f"{name_of(src)}: {err}") from None
    facts = {"source": source_of(src), **report.to_json(), "storage": storage}
    stored = dataclasses.replace(stored, vocab_rows=cfg.vocab_size)
    facts |= {
        "dtype_before": stored.dtype,
        "parameter_bytes_before": models.parameter_bytes(stored),
    }
    cfg = dataclasses.replace(cfg, dtype="float32")
    if refine_tokens:
        rows = refinement_rows(cfg, tokenizer, documents, refine_tokens, seed)
        tok = data.load_tokenizer(tokenizer, cfg.vocab_size)
        params, facts["refine"] = refine(
            cfg, params, dense, rows, workdir=partial_of(dst), eot=data.eot_of(tok), seed=seed,
            written=refine_written,
        )  # fmt: skip
    cfg, params = convert_storage(cfg, params, storage)
    facts |= {"dtype_after": cfg.dtype, "parameter_bytes_after": models.parameter_bytes(cfg)}
    spectra = {k.replace("/", "."): v for k, v in report.spectra.items()}
    np.savez(partial_of(dst) / "spectra.npz", **spectra)
    if report.plan.neurons:
        facts["neurons_before"] = stored.d_ffn
    if facts["maps"]:
        ranks_picture(facts, spectra, partial_of(dst) / "compress.png")
    asked = {"keep": keep, "calibration_tokens": 0 if windows is None else int(windows.size),
             "seed": seed}  # fmt: skip
    extra = {"compress.json": facts} | lineage.step("compress", [src], asked | facts)
    checkpoint.save(dst, cfg, params, tokenizer, overwrite, extra,
                    served=("work", "state", "written"))  # fmt: skip
    return {"path": str(dst), **info(dst)}


def source_of(src) -> str:
    """How a source is recorded: a local one as an absolute path, a hub id as it is."""
    return str(Path(src).resolve()) if Path(src).exists() else str(src)


def same_tokenizer(named: list[tuple[str, str | None]]) -> None:
    """DelveError unless all (source, tokenizer JSON) pairs give every id the same meaning."""
    first, reference = named[0]
    meaning = lambda text: data.load_tokenizer(text, 0).get_vocab(with_added_tokens=True)  # noqa: E731
    for name, text in named[1:]:
        if (text is None) != (reference is None):
            lacks, has = (name, first) if text is None else (first, name)
            raise DelveError(
                f"{lacks}: has no tokenizer.json and {has} has one; put one beside its weights"
            )
        if text != reference and meaning(text) != meaning(reference):
            raise DelveError(
                f"{name}: its tokenizer differs from that of {first}; parents must share one"
            )


def fuse(
    sources,
    dst,
    *,
    calibrate: Sequence[str] = (),
    documents: Sequence[str] | None = None,
    calibrate_tokens: int = 32768,
    latents: int = 1,
    connectors: str = "none",
    hub_rank: int | None = None,
    ffn_skip: float = 0.0,
    warm_hub: bool = False,
    codes: int | None = None,
    teachers: Sequence[str] | None = None,
    seed: int = 0,
    overwrite: bool = False,
):
    """Parents (compressed or dense) -> DELVE at step 0.

    latents: 1 (log-linear pool) to one per parent (mixture; 0 for short). connectors: hub, cross,
    self or none (`models.delve.heard`); warm_hub: their maps start as the best prediction of what
    the streams lost (`fuse.warm_hub`; reads the teachers). ffn_skip: routers of this threshold, for
    `heal --ffn-share` (`models.delve.router`). codes: rank of vocabulary tables that all streams
    share (None: each keeps its own). Pool weights are fitted on the text, equal without it.
    `teachers` defaults to the dense sources that the compressed parents recorded. DelveError:
    tokenizers differ, a source is a DELVE itself.

    >>> import delve_jax
    >>> incite, _, neox, _ = delve_jax.upcycle.embedded_parents()
    >>> delve_jax.fuse([incite, neox], "fused")["pool"]  # fitted with calibrate=[...]
    {'incite': 0.5, 'neox': 0.5}
    """
    sources = [str(s) for s in sources]
    command = {"verb": "fuse", "sources": sources, "calibrate": list(map(str, calibrate)),
               "calibrate_tokens": calibrate_tokens, "latents": latents, "connectors": connectors,
               "hub_rank": hub_rank, "ffn_skip": ffn_skip, "warm_hub": warm_hub, "codes": codes,
               "data_hash": data.data_hash(documents) if documents else None,
               "seed": seed}  # fmt: skip
    if teachers is not None:  # they are read from the sources otherwise
        command["teachers"] = list(map(str, teachers))
    if warm_hub and not (calibrate or documents):
        raise DelveError("--warm-hub: name text with --calibrate; the maps are fitted on it")
    if begin(dst, command, overwrite, calibrate):
        return already(dst)
    loaded = [(s, *parents.load(s, dtype="float32")) for s in sources]
    if odd := [s for s, cfg, _, _ in loaded if cfg.family == "delve"]:
        raise DelveError(f"{odd[0]}: is a DELVE already; fuse takes parents")
    same_tokenizer([(s, text) for s, _, _, text in loaded])
    tokenizer = loaded[0][3]
    parts, taken = [], []
    for s, cfg, params, _ in loaded:
        name = name_of(s)
        taken.append(name)
        if taken.count(name) > 1:
            name = f"{name}-{taken.count(name)}"
        # padding rows of the vocabulary end here: all streams share the valid ids
        cfg, params, _ = compression.compress(cfg, params, None, keep=1.0, method="svd") if (
            cfg.vocab_rows != cfg.vocab_size
        ) else (cfg, params, None)  # fmt: skip
        parts.append((name, dataclasses.replace(cfg, dtype="float32"), params))
    if teachers is None:
        teachers = [teacher_of(s) for s in sources]
    if documents is None and calibrate:
        documents = texts_of(calibrate)
    windows = None
    if documents:
        shortest = min((c for _, c, _ in parts), key=lambda c: c.context_length)
        windows = calibration_windows(shortest, tokenizer, documents, calibrate_tokens, seed)
    cfg, params, report = fusion.fuse(
        parts, windows, latents=latents or len(parts), connectors=connectors, hub_rank=hub_rank,
        ffn_skip=ffn_skip, codes=codes, teachers=tuple(map(str, teachers)), seed=seed,
    )  # fmt: skip
    if warm_hub:
        dense = [parents.load(t, dtype="float32")[:2] for t in teachers]
        params, report["warm_hub"] = fusion.warm_hub(cfg, params, dense, windows)
    made = {"parameters": models.count(cfg), "connectors": connectors, "latents": cfg.latents}
    extra = {"fuse.json": report} | lineage.step("fuse", sources, report | made | {"seed": seed})
    checkpoint.save(dst, cfg, params, tokenizer, overwrite, extra)
    return {"path": str(dst), **info(dst), "fit": report}


def teacher_of(src: str) -> str:
    """The dense source that a compressed checkpoint came from, else the source itself."""
    facts = Path(src) / "compress.json"
    if facts.exists():
        return read_json(facts)["source"]
    return source_of(src)


def load_teacher(
    src: str, tokenizer: str | None, recorded: bool = False, mesh=None, dtype: str = "float32"
):
    """(config, parameters) of a dense parent, `recorded` in a config or named by the user.

    DelveError: it cannot be read; its tokenizer differs from the model's, where both have one; only
    its name was recorded (what an export tells of a local parent): any folder may be called so.
    """
    if recorded and "/" not in src:
        raise DelveError(f"{src}: is known by its name only (a local directory of somebody's)")
    cfg, params, text = parents.load(src, dtype=dtype, mesh=mesh)
    if text is not None and tokenizer is not None:
        same_tokenizer([("the model", tokenizer), (src, text)])
    return cfg, params


def partial_of(dst: str | Path) -> Path:
    return Path(dst).with_name(Path(dst).name + ".partial")


def export(
    src, dst, *, layout: str | None = None, results: Sequence = (), overwrite: bool = False
) -> dict:
    """Checkpoint -> Hugging Face directory, reloaded and compared where torch is installed.

    results: what `delve eval --json` printed or the report of `delve upcycle`, as files or objects,
    for the model card. What else the card says comes from SRC. layout: dense or factored (default:
    factored for a DELVE, stock classes for a parent). -> path, verified (False where torch is
    missing), max_abs_diff and max_abs_logit. DelveError: SRC is no checkpoint, the export differs.
    """
    from .parents.export import export_hf

    if parents.detect(src) != "checkpoint":
        raise DelveError(f"{src}: not a checkpoint directory; run `delve convert {src} DST` first")
    read = [r if isinstance(r, dict) else read_json(r) for r in results]
    return export_hf(src, dst, layout, overwrite=overwrite, results=read)
