"""Text to documents, one at a time; splits by hash; the hash that results are pinned to.

Readers: text (documents between `<|endoftext|>` lines; the line and the newline before it belong to
neither neighbour), JSON lines, parquet, and rows of the Hugging Face hub. By suffix, plain or
packed (.gz, .xz, .zst). A document's split is decided by its own hash: the same in every file.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..config import DelveError

EOT = "<|endoftext|>"
SPLITS = ("train", "calibrate", "choose", "report")
_PACKED = (".gz", ".xz", ".zst", ".zstd")
_LINES = (".jsonl", ".json", ".ndjson")
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_MISSING = object()


# ---- bytes ---------------------------------------------------------------------------------------


class _Zstd(io.RawIOBase):
    """A .zst file unpacked: any number of frames. EOFError where the last one is cut short."""

    def __init__(self, raw):
        import zstandard

        # long windows: published dumps are packed with --long=31
        self._open = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._raw, self._frame, self._left, self._error = raw, None, b"", zstandard.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left:
            packed = self._frame.unused_data if self._frame and self._frame.eof else b""
            if not (packed := packed or self._raw.read(1 << 18)):
                if self._frame and not self._frame.eof:
                    raise EOFError("compressed file ended before its last frame did")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._open()
            try:
                self._left = self._frame.decompress(packed)
            except self._error as err:
                raise OSError(err) from None
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


@contextmanager
def _unpacked(path: Path) -> Iterator[tuple]:
    """(bytes of the file, unpacked; share of it read so far, a function). DelveError names it."""
    try:
        with path.open("rb") as raw:
            size = max(1, path.stat().st_size)
            file = {
                ".gz": lambda: io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20),
                ".xz": lambda: io.BufferedReader(lzma.LZMAFile(raw), 1 << 20),
                ".zst": lambda: io.BufferedReader(_Zstd(raw), 1 << 20),
                ".zstd": lambda: io.BufferedReader(_Zstd(raw), 1 << 20),
            }.get(path.suffix, lambda: raw)()
            yield file, lambda: raw.tell() / size
    except FileNotFoundError:
        raise DelveError(f"{path}: no such text file") from None
    except IsADirectoryError:
        raise DelveError(f"{path}: is a directory; name the text files in it") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as err:
        raise DelveError(f"{path}: cannot be read ({err}); is it damaged or cut short?") from None


def _decode(path: Path, raw: bytes, start: int = 0) -> str:
    """UTF-8 text of `raw`, which stands at byte `start` of the (unpacked) file; else DelveError."""
    if b"\0" in raw:
        raise DelveError(
            f"{path}: binary (byte {start + raw.index(0)} is NUL); text must be UTF-8, plain or "
            f"packed ({', '.join(_PACKED[:3])})"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise DelveError(
            f"{path}: not UTF-8 at byte {start + err.start}; convert it with iconv"
        ) from None


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file (plain or packed), byte for byte (no newline translation).

    DelveError, naming the file: missing, damaged archive, binary, or not UTF-8.
    """
    with _unpacked(Path(path)) as (file, _):
        raw = file.read()
    return _decode(Path(path), raw)


# ---- documents -----------------------------------------------------------------------------------


def kind(path: str | Path) -> str:
    """How a file is read: "parquet", "jsonl" or "text", by its suffix under that of a packer."""
    path = Path(path)
    suffix = Path(path.stem).suffix if path.suffix in _PACKED else path.suffix
    return "parquet" if suffix == ".parquet" else "jsonl" if suffix in _LINES else "text"


def stream(path: str | Path, fields: Sequence[str] = ("text",)) -> Iterator[tuple[str, float]]:
    """(document, share of the file read so far) of each document, empty ones left out.

    One document is in memory at a time (of a parquet file: 256). `fields`: where the text of a JSON
    or parquet row stands; the first one that the row has; "a.b" is field b of the object in field
    a, and null is an empty document. DelveError names the file, and the line or row and field.
    """
    path = Path(path)
    if kind(path) == "parquet":
        yield from _parquet(path, fields)
        return
    with _unpacked(path) as (file, share):
        read = _json_lines if kind(path) == "jsonl" else _between_separators
        for document in read(path, file, fields):
            if document:
                yield document, share()


def _between_separators(path: Path, file, _) -> Iterator[str]:
    """The pieces between separator lines; each without the newline that a separator follows."""
    mark, lines = EOT.encode(), []
    start = position = 0
    for line in file:
        position += len(line)
        if line in (mark, mark + b"\n", mark + b"\r\n"):
            document = b"".join(lines).removesuffix(b"\n")
            if line.endswith(b"\r\n"):  # of a file from Windows
                document = document.removesuffix(b"\r")
            yield _decode(path, document, start)
            lines, start = [], position
        else:
            lines.append(line)
    yield _decode(path, b"".join(lines), start)


def _json_lines(path: Path, file, fields: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(_decode(path, line))
        except DelveError as err:
            raise DelveError(f"{where}:{str(err).removeprefix(str(path) + ':')}") from None
        except ValueError as err:
            raise DelveError(f"{where}: not JSON ({err}); one object a line is expected") from None
        if not isinstance(row, dict):
            raise DelveError(f"{where}: not a JSON object; one object a line is expected")
        yield pick(row, fields, where)


def _parquet(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, float]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DelveError(f"{path}: parquet needs a package; pip install pyarrow") from None
    if not path.is_file():
        raise DelveError(f"{path}: no such file")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names, rows, done = file.schema_arrow.names, max(1, file.metadata.num_rows), 0
            wanted = [f for f in fields if f in names or f.split(".")[0] in names]
            if not wanted:
                raise DelveError(
                    f"{path}: no field '{fields[0]}'; its fields are {_some(names)}; name the one "
                    "that holds the text"
                )
            for batch in file.iter_batches(256, columns=wanted):
                for row in batch.to_pylist():
                    done += 1
                    if document := pick(row, wanted, f"{path}: row {done}"):
                        yield document, done / rows
    except (pyarrow.ArrowException, OSError) as err:
        reason = " ".join(str(err).split())[:160]
        raise DelveError(
            f"{path}: cannot be read ({reason}); is it damaged or cut short?"
        ) from None


def stream_hub(
    name: str, hub: str, config: str | None, split: str, fields: Sequence[str]
) -> Iterator[tuple[str, None]]:
    """(document, None) of each row of a data set on the Hugging Face hub, streamed.

    Needs the package `datasets` (not among our requirements). DelveError names the data set.
    """
    try:
        import datasets
    except ImportError:
        raise DelveError(
            f"{name}: the hub is read with a package; pip install datasets, or give a local copy "
            f"as {name}=DIR"
        ) from None
    number = 0
    try:
        for row in datasets.load_dataset(hub, config, split=split, streaming=True):
            number += 1
            if document := pick(row, fields, f"{name} ({hub}): row {number}"):
                yield document, None
    except DelveError:
        raise
    except Exception as err:  # no network, gated, a loading script: each in types of its own
        reason = " ".join(f"{type(err).__name__}: {err}".split())[:200]
        raise DelveError(
            f"{name}: the hub's {hub} stopped at row {number} ({reason}); repeat the command, or "
            f"give a local copy as {name}=DIR"
        ) from None


def pick(row: dict, fields: Sequence[str], where: str) -> str:
    """The text of a row: the first of `fields` that it has; null is "". Else DelveError."""
    for field in fields:
        value = row.get(field, _MISSING)
        if value is _MISSING and "." in field:
            value = row
            for key in field.split("."):
                value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
        if value is None:
            return ""
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise DelveError(f"{where}: field '{field}' has half a surrogate pair") from None
            return value
        if value is not _MISSING:
            raise DelveError(
                f"{where}: field '{field}' is {type(value).__name__}, text is expected; name the "
                f"field that holds the text (there are {_some(row)})"
            )
    raise DelveError(
        f"{where}: no field '{fields[0]}'; there are {_some(row)}; name the one that holds the text"
    )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "none"


def read_documents(path: str | Path, fields: Sequence[str] = ("text",)) -> list[str]:
    """All documents of a file that `stream` reads; a text without separator lines is one.

    DelveError as there, and where there is no text.
    """
    documents = [document for document, _ in stream(path, fields)]
    if not documents:
        raise DelveError(f"{path}: holds no text; name a file with at least one document")
    return documents


def stdlib_documents() -> list[str]:
    """The running Python's own library: its .py files in the order of their relative paths.

    Left out: installed packages, test folders, empty files and files that are not UTF-8.
    DelveError where the library is not on disk as files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts[:-1]):
            try:
                documents.append(path.read_bytes().decode("utf-8"))
            except (OSError, UnicodeDecodeError):
                continue  # a few encodings' own test files; a dangling link
    documents = [d for d in documents if d and "\0" not in d]
    if not documents:
        raise DelveError(f"{root}: no Python files to read; name text with --data and --calibrate")
    return documents


def shared_documents(root: str | Path = "../shared/data/text") -> list[str]:
    """All documents of the shared development text, file by file in the order of their names."""
    files = sorted(Path(root).glob("*.txt.xz"))
    if not files:
        raise DelveError(f"{root}: no *.txt.xz files; run from the project's root or name a folder")
    return [document for path in files for document in read_documents(path)]


# ---- splits --------------------------------------------------------------------------------------


def split_of(document: str) -> str:
    """The split that a document belongs to, by the first byte of its sha256 modulo 64."""
    bucket = hashlib.sha256(document.encode("utf-8")).digest()[0] % 64
    return "train" if bucket < 58 else SPLITS[1 + (bucket - 58) // 2]


def split(documents: Iterable[str], name: str) -> list[str]:
    """The documents of one split: train, calibrate, choose or report."""
    if name not in SPLITS:
        raise DelveError(f"split '{name}' is unknown; choose one of {', '.join(SPLITS)}")
    return [document for document in documents if split_of(document) == name]


def data_hash(documents: Iterable[str]) -> str:
    """sha256 (hex) of the documents in their order; what a result table is pinned to."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode("utf-8"))
        digest.update(b"\n<|endoftext|>\n")
    return digest.hexdigest()
