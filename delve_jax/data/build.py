"""Text to a token folder: in parallel, resumable, and the same bytes however it was made.

One process reads documents and writes shards in their order; groups of documents are encoded
meanwhile, by the library's threads or by worker processes. What a shard holds depends on the text
alone, so that neither an interruption nor the number of workers shows in the result.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import DelveError, read_json, write_json
from ..metrics import progress
from . import catalog
from .text import SPLITS, split_of
from .tokenizer import eot_of, ids_of, load_tokenizer, read_tokenizer
from .tokens import DTYPES, MANIFEST, open_tokens, sha256_of

MIXTURE = "mixture.json"
_PLAN = "prepare.json"  # in DST.partial: the arguments that the work there belongs to
_SHARD_BYTES = 256 << 20  # text of a shard: what an interruption can cost
_GROUP_BYTES = 4 << 20  # text encoded at a time


def prepare(
    sources: Sequence[str | Path],
    dst: str | Path,
    *,
    tokenizer: str | Path | None,
    text_field: str | None = None,
    split: str | None = None,
    workers: int | None = None,
    limit_bytes: int | None = None,
    overwrite: bool = False,
) -> dict:
    """Text -> token folder DST; its manifest, with `path` and `already` (it stood there finished).

    sources: files, folders, data sets (`catalog.resolve`), or one mixture (a folder for each part
    and mixture.json with the weights). tokenizer: see `read_tokenizer`. text_field: of JSON lines
    and parquet. split: keep its documents only. limit_bytes: stop after the document with which the
    text kept reaches it (a mixture: shared out by its weights). workers: processes that encode
    (default 1, whose threads keep up with some ten cores); the result does not depend on it.
    Work stands in DST.partial, shard by shard; the same call goes on after the last whole one.
    DelveError: bad text; DST of other arguments, unless overwrite; no space; nothing is left half.
    """
    if split not in (None, *SPLITS):
        raise DelveError(f"split '{split}' is unknown; choose one of {', '.join(SPLITS)}")
    if not sources:
        raise DelveError("no text to prepare; name files or a data set (`delve data list`)")
    if limit_bytes is not None and limit_bytes < 1:
        raise DelveError(f"--limit-bytes {limit_bytes}: must be at least 1; leave it out for all")
    options = {"text_field": text_field, "split": split, "workers": workers}
    json_str, dst = read_tokenizer(tokenizer), Path(dst)
    if mixture := catalog.mixture_of(sources):
        try:
            return _prepare_mixture(*mixture, dst, json_str, options, limit_bytes, overwrite)
        except OSError as err:
            raise DelveError(f"{dst}: cannot be written ({err.strerror or err})") from None
    found = [s for source in sources for s in catalog.resolve(source, text_field)]
    plan = _plan(found, json_str, split, limit_bytes)
    try:
        partial = _claim(dst, MANIFEST, plan, overwrite)
    except OSError as err:
        raise DelveError(f"{dst}: cannot be written ({err.strerror or err})") from None
    if partial is None:
        return {"path": str(dst), "already": True, **read_json(dst / MANIFEST)}
    try:
        if not (partial / MANIFEST).exists():
            tok = load_tokenizer(json_str, 256)
            shards = _write_shards(found, partial, tok, json_str, plan, workers)
            _finish(partial, shards, tok, json_str, plan)
        for leftover in (*partial.glob("tokens-*.json"), partial / _PLAN):
            leftover.unlink(missing_ok=True)
        if dst.exists():
            shutil.rmtree(dst)
        partial.rename(dst)
    except OSError as err:
        raise DelveError(
            f"{partial}: cannot be written ({err.strerror or err}); make room and repeat the "
            "command, whole shards are kept"
        ) from None
    return {"path": str(dst), "already": False, **read_json(dst / MANIFEST)}


def _prepare_mixture(name, parts, dst, json_str, options, limit_bytes, overwrite) -> dict:
    """Each part of a mixture in DST/PART, each finished one kept; then mixture.json.

    Parts of another mixture in DST go when all of these are whole.
    """
    record = {"mixture": name, "weights": {part: weight for part, _, weight in parts}}
    partial = _claim(dst, MIXTURE, record, overwrite)
    already, place = partial is None, partial or dst
    total = sum(weight for *_, weight in parts)
    for part, source, weight in parts:
        limit = None if limit_bytes is None else max(1, int(limit_bytes * weight / total))
        part_options = {**options, "limit_bytes": limit, "overwrite": overwrite}
        done = prepare([source], place / part, tokenizer=json_str, **part_options)
        already = already and done["already"]
    if partial:
        write_json(partial / MIXTURE, record, indent=1)
        (partial / _PLAN).unlink(missing_ok=True)
        if dst.exists():
            shutil.rmtree(dst)
        partial.rename(dst)
    return {"path": str(dst), "already": already, **read_json(dst / MIXTURE)}


def _plan(found: Sequence[catalog.Source], json_str, split, limit_bytes) -> dict:
    """What the folder is made from: the arguments, and the sha256 of every file."""
    total = sum(s.path.stat().st_size for s in found if s.path)
    with progress(total, "checking", "B", hide=total < 1 << 30) as bar, ThreadPoolExecutor() as run:
        rows = []
        for source, digest in zip(found, run.map(_digest, found), strict=True):
            size = source.path.stat().st_size if source.path else None
            row = {"path": source.label, "fields": list(source.fields), "size": size}
            rows.append(row | {"sha256": digest})
            bar.update(size or 0)
    digest = None if json_str is None else hashlib.sha256(json_str.encode()).hexdigest()
    return {
        "sources": rows,
        "tokenizer": {"file": None if json_str is None else "tokenizer.json", "sha256": digest},
        "split": split,
        "limit_bytes": limit_bytes,
        "shard_bytes": _SHARD_BYTES,
    }


def _digest(source: catalog.Source) -> str | None:
    try:
        return None if source.path is None else sha256_of(source.path)
    except OSError as err:
        raise DelveError(f"{source.path}: cannot be read ({err.strerror})") from None


def _claim(dst: Path, record: str, plan: dict, overwrite: bool) -> Path | None:
    """DST.partial, begun or to be gone on with; None where DST is what `plan` makes already.

    record: the file, MANIFEST or MIXTURE, with which DST is whole.
    """
    if dst.exists():
        ours = (dst / record).is_file()
        if ours and _made_from(dst / record, plan):
            try:
                if record == MANIFEST:
                    open_tokens(dst)  # a shard may have been lost since
                return None
            except DelveError:
                if not overwrite:
                    raise
        if not (ours and overwrite):
            way = "--overwrite" if ours else f"it has no {record}, so --overwrite leaves it alone"
            raise DelveError(f"{dst}: exists and was not made like this; name another DST ({way})")
    partial = dst.with_name(dst.name + ".partial")
    records = [f for f in (partial / record, partial / _PLAN) if f.is_file()]
    if partial.exists() and not (records and _made_from(records[0], plan)):
        if not records and any(partial.iterdir()):
            raise DelveError(f"{partial}: is in the way and not ours; move it")
        if any(partial.rglob("tokens-*")) and not overwrite:
            raise DelveError(
                f"{partial}: holds unfinished work of other arguments or of sources that changed "
                "since; repeat those, or --overwrite"
            )
        shutil.rmtree(partial)
        records = []
    partial.mkdir(parents=True, exist_ok=True)
    if not records:
        write_json(partial / _PLAN, plan, indent=1)
    return partial


def _made_from(record: Path, plan: dict) -> bool:
    """Whether a manifest, or the plan of unfinished work, is that of `plan`."""
    try:
        made = read_json(record)
    except DelveError:
        return False  # damaged: --overwrite replaces it
    return all(made.get(key) == value for key, value in plan.items())


@dataclass
class _Group:
    """Documents to encode together, and where the next one stands: (source, documents read)."""

    documents: int
    bytes: int
    position: tuple[int, int]
    share: float | None  # of all sources' files, read so far
    closes: bool  # the shard ends with it


def _groups(
    found: Sequence[catalog.Source], plan: dict, position: tuple[int, int], kept_bytes: int
) -> Iterator[tuple[list[str], _Group]]:
    """(documents, group) from `position` on, where a shard begins and `kept_bytes` are kept.

    Cuts depend on the text alone: between groups by _GROUP_BYTES, between shards by _SHARD_BYTES.
    """
    sizes = [s.path.stat().st_size if s.path else None for s in found]
    total = None if None in sizes else max(1, sum(sizes))
    limit, split = plan["limit_bytes"], plan["split"]
    docs: list[str] = []
    in_group = in_shard = 0

    def group(closes: bool, share: float | None) -> tuple[list[str], _Group]:
        done = None if total is None else (sum(sizes[:i]) + share * sizes[i]) / total
        return docs, _Group(len(docs), in_group, (i, number), done, closes)

    i = number = 0
    for i in range(position[0], len(found)):
        number, skip = 0, position[1] if i == position[0] else 0
        for number, (document, share) in enumerate(found[i].stream(), 1):
            if number <= skip or (split and split_of(document) != split):
                continue
            size = len(document.encode("utf-8"))
            docs.append(document)
            in_group, in_shard, kept_bytes = in_group + size, in_shard + size, kept_bytes + size
            closes = in_shard >= _SHARD_BYTES
            last = limit is not None and kept_bytes >= limit
            if in_group >= _GROUP_BYTES or closes or last:
                yield group(closes, share)
                docs, in_group, in_shard = [], 0, 0 if closes else in_shard
            if last:
                return
    if docs:
        yield group(False, 1.0)


def _write_shards(found, partial: Path, tok, json_str, plan: dict, workers) -> list[dict]:
    """Every shard not yet in `partial`; the rows of all of them."""
    for leftover in partial.glob("*.writing"):
        leftover.unlink()
    shards: list[dict] = []
    while (row := partial / f"tokens-{len(shards):05d}.json").is_file():
        shards.append(read_json(row))
    position = tuple(shards[-1]["position"]) if shards else (0, 0)
    kept = sum(row["bytes"] for row in shards)
    eot, dtype = eot_of(tok), _dtype(tok)
    if plan["limit_bytes"] is not None and kept >= plan["limit_bytes"]:
        return shards
    groups = _groups(found, plan, position, kept)
    with progress(None, "tokens", "B") as bar, _executor(workers, json_str) as executor:
        bar.initial = bar.n = kept
        ahead = 2 + (workers or 1)  # groups in the making while one is written
        encode = _encode_here if workers and workers > 1 else lambda docs: _joined(tok, eot, docs)
        shard = None
        try:
            for ids, group in _in_order(executor, encode, groups, ahead):
                shard = shard or _Shard(partial / f"tokens-{len(shards):05d}.bin")
                shard.add(ids.astype(dtype), group)
                kept += group.bytes
                if group.share:
                    bar.total = max(kept, int(kept / group.share))
                if plan["limit_bytes"]:
                    bar.total = min(bar.total or plan["limit_bytes"], plan["limit_bytes"])
                bar.update(group.bytes)
                if group.closes:
                    shards.append(shard.close(group.position))
                    shard = None
            if shard:
                shards.append(shard.close(group.position))
        except BrokenProcessPool:
            raise DelveError(
                f"{partial}: a worker process died (memory?); repeat with fewer workers"
            ) from None
        finally:
            if shard:
                shard.drop()
    if not shards:
        shutil.rmtree(partial)
        of = f" in split '{plan['split']}'" if plan["split"] else ""
        raise DelveError(f"{found[0].label}: holds no text{of}; name files with documents")
    return shards


def _dtype(tok) -> np.dtype:
    """uint16 where every id fits, else uint32; little-endian."""
    get = getattr(tok, "get_vocab", None)  # raw bytes have none
    top = max(get(with_added_tokens=True).values(), default=0) if get else 255
    return DTYPES["uint16" if top < 1 << 16 else "uint32"]


def _joined(tok, eot: int | None, docs: Sequence[str]) -> np.ndarray:
    """Ids [n] uint32 of the documents, each opened by `eot`."""
    flat: list[int] = []
    for ids in ids_of(tok, docs):
        if eot is not None:
            flat.append(eot)
        flat.extend(ids)
    return np.array(flat, np.uint32)


def _in_order(
    executor: Executor, encode, groups: Iterable[tuple[list[str], _Group]], ahead: int
) -> Iterator[tuple[np.ndarray, _Group]]:
    """(ids, group) in the order of `groups`, of which `ahead` are being encoded meanwhile."""
    pending: deque = deque()
    for docs, group in groups:
        pending.append((executor.submit(encode, docs), group))
        if len(pending) > ahead:
            future, group = pending.popleft()
            yield future.result(), group
    while pending:
        future, group = pending.popleft()
        yield future.result(), group


def _executor(workers: int | None, json_str: str | None) -> Executor:
    """One process: two threads, so that one group is encoded while another becomes an array.

    The library works on every core, but turns ids into Python numbers on one; above some ten cores
    that is the bound, and processes of one core each pay.
    """
    if workers is None or workers <= 1:
        return ThreadPoolExecutor(2)
    context = multiprocessing.get_context("spawn")  # fork is unsafe beside JAX's threads
    return ProcessPoolExecutor(workers, context, _start_worker, (json_str,))


def _start_worker(json_str: str | None) -> None:
    global _worker
    os.environ["RAYON_NUM_THREADS"] = "1"  # read when the library encodes for the first time
    tok = load_tokenizer(json_str, 256)
    _worker = tok, eot_of(tok)


def _encode_here(docs: Sequence[str]) -> np.ndarray:
    return _joined(*_worker, docs)


class _Shard:
    """A shard in the making: FILE.writing until it is closed, then FILE and its row beside it."""

    def __init__(self, path: Path):
        self.path, self.aside = path, path.with_name(path.name + ".writing")
        self.file, self.sha256 = self.aside.open("wb"), hashlib.sha256()
        self.row = {"file": path.name, "tokens": 0, "documents": 0, "bytes": 0, "max_id": 0}

    def add(self, ids: np.ndarray, group: _Group) -> None:
        self.file.write(ids.data)
        self.sha256.update(ids.data)
        self.row["tokens"] += len(ids)
        self.row["documents"] += group.documents
        self.row["bytes"] += group.bytes
        self.row["max_id"] = max(self.row["max_id"], int(ids.max(initial=0)))

    def close(self, position: tuple[int, int]) -> dict:
        """The shard takes its name; its row, with where the next shard begins, says it is whole."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.aside.replace(self.path)
        row = {**self.row, "sha256": self.sha256.hexdigest(), "position": position}
        write_json(self.path.with_suffix(".json"), row, indent=1)
        return row

    def drop(self) -> None:
        self.file.close()
        self.aside.unlink(missing_ok=True)


def _finish(partial: Path, shards: Sequence[dict], tok, json_str: str | None, plan: dict) -> None:
    """The tokenizer and, last, the manifest."""
    if json_str is not None:
        aside = partial / "tokenizer.json.writing"
        aside.write_bytes(json_str.encode("utf-8"))
        aside.replace(partial / "tokenizer.json")
    sums = {key: sum(row[key] for row in shards) for key in ("documents", "tokens", "bytes")}
    rows = [{key: value for key, value in row.items() if key != "position"} for row in shards]
    write_json(partial / MANIFEST, {
        **plan, "eot": eot_of(tok), "dtype": _dtype(tok).name, **sums,
        "max_id": max(row["max_id"] for row in shards), "shards": rows,
    }, indent=1)  # fmt: skip
