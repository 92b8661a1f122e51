"""Token folders as `prepare` leaves them: memory-mapped, checked, cut into windows.

A folder holds tokens-00000.bin ... (uint16, or uint32 for vocabularies above 65536), manifest.json
and the tokenizer. The shards are one stream: every document, the first too, is opened by
`<|endoftext|>` and followed by its tokens. Raw bytes have no such token and nothing between them.
"""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..config import DelveError, read_json
from .tokenizer import read_tokenizer

MANIFEST = "manifest.json"
_AGAIN = "; prepare the folder again (--overwrite)"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of `length` = T + 1 ids and stride T over all shards: each id is a target once.

    Random access: len() and [i] -> int32 [length]; a window may span shards. The rest is dropped.
    """

    files: TokenFiles
    length: int

    def __len__(self) -> int:
        return (self.files.tokens - 1) // (self.length - 1)

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start = int(i) * (self.length - 1)
        return self.files.read(start, start + self.length)


@dataclass(frozen=True, eq=False)
class TokenFiles:
    """An opened token folder; nothing is read before it is asked for."""

    path: Path
    manifest: dict
    shards: tuple[np.ndarray, ...] = field(repr=False)
    starts: tuple[int, ...] = field(repr=False)  # of each shard in the stream, then the end

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    @property
    def tokenizer_json(self) -> str | None:
        """The tokenizer's text; None for raw bytes."""
        name = self.manifest["tokenizer"]["file"]
        return read_tokenizer(self.path / name) if name else None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [stop - start] int32 of the stream."""
        first = bisect.bisect_right(self.starts, start) - 1
        parts = []
        for shard, at in zip(self.shards[first:], self.starts[first:-1], strict=True):
            if at >= stop:
                break
            parts.append(shard[max(0, start - at) : stop - at])
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return ids.astype(np.int32)

    def windows(self, length: int) -> Windows:
        """The windows of `length` ids; DelveError where there are fewer tokens than one needs."""
        if not 2 <= length <= self.tokens:
            raise DelveError(
                f"{self.path}: has {self.tokens} tokens, a window needs {length}; give more text"
            )
        return Windows(self, length)

    def verify(self) -> None:
        """Read every shard and compare its sha256; DelveError names the one that changed."""
        for row in self.manifest["shards"]:
            file = self.path / row["file"]
            if not file.is_file() or sha256_of(file) != row["sha256"]:
                raise DelveError(f"{file}: differs from {MANIFEST} (sha256){_AGAIN}")


def open_tokens(path: str | Path) -> TokenFiles:
    """The token folder at `path`, its shards mapped.

    DelveError: no manifest or a damaged one; a shard or the tokenizer that vanished or has another
    size. Changed contents of the right size are found by `verify`.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise DelveError(f"{path}: not a token folder (no {MANIFEST}); `delve data prepare` it")
    manifest = read_json(path / MANIFEST)
    try:
        dtype = DTYPES[manifest["dtype"]]
        rows = [(path / s["file"], int(s["tokens"]), s["sha256"]) for s in manifest["shards"]]
        tokens, _, name = manifest["tokens"], manifest["eot"], manifest["tokenizer"]["file"]
        if type(manifest["max_id"]) is not int:
            raise TypeError("'max_id'")
    except (KeyError, TypeError, ValueError) as err:
        raise DelveError(f"{path / MANIFEST}: field {err} is missing or wrong") from None
    if tokens != sum(count for _, count, _ in rows):
        raise DelveError(f"{path / MANIFEST}: 'tokens' is {tokens}, its shards have another sum")
    if name and not (path / name).is_file():
        raise DelveError(f"{path / name}: the tokenizer is gone{_AGAIN}")
    shards, starts = [], [0]
    for file, count, _ in rows:
        size = file.stat().st_size if file.is_file() else None
        if size != (want := count * dtype.itemsize):
            state = "is gone" if size is None else f"has {size} bytes"
            raise DelveError(f"{file}: {state}, {MANIFEST} says {want}{_AGAIN}")
        # an empty file cannot be mapped
        ids = np.memmap(file, dtype, "r") if count else np.zeros(0, dtype)
        shards.append(ids.view(np.ndarray))
        starts.append(starts[-1] + count)
    return TokenFiles(path, manifest, tuple(shards), tuple(starts))


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
