"""Windows to batches: a pure function of (seed, step), so that a run resumes from its step number.

A source is any random-access object of windows: len() and [i] -> int32 [T + 1]. Several are pooled
(every window once an epoch) or mixed by weights (exact counts in every block of 2048 windows).
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import DelveError, read_json
from .build import MIXTURE
from .text import data_hash, read_documents
from .tokenizer import encode_documents, load_tokenizer, same_ids
from .tokens import MANIFEST, TokenFiles, open_tokens, sha256_of

_MASK = (1 << 64) - 1
_ENDLESS = 1 << 56  # windows of a mixture: more than any run reads


def windows(ids: np.ndarray, length: int, stride: int | None = None) -> np.ndarray:
    """windows_NT: every `length` ids from every `stride`-th place on, the remainder dropped.

    A view of `ids`, no copy. `stride` is `length` unless given; with windows of T + 1 ids and
    stride T each id is a target once. DelveError when the text is shorter than one window.
    """
    if len(ids) < length:
        raise DelveError(f"text has {len(ids)} tokens, a window needs {length}; give more text")
    return np.lib.stride_tricks.sliding_window_view(ids, length)[:: stride or length]


def batches(source, batch: int, seed: int, shard: int = 0, shards: int = 1):
    """A grain dataset with `ds[step]` -> [batch / shards, T]: a pure function of (seed, step).

    Windows are shuffled anew in each epoch and repeated without end. Nothing of it is saved: a run
    resumes with `ds[step]` at its step number, on any number of hosts (host `shard` of `shards`
    reads rows shard::shards of the global batch).
    """
    import grain

    _check(batch, shards)
    ds = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    return ds[shard::shards].batch(batch // shards, drop_remainder=True)


def _check(batch: int, shards: int) -> None:
    if batch < 1 or batch % shards:
        raise DelveError(f"batch {batch}: must be a positive multiple of the {shards} hosts")


@dataclass(frozen=True, eq=False)
class Pool:
    """Several sources one after another, as one."""

    sources: tuple

    @functools.cached_property
    def ends(self) -> list[int]:
        return np.cumsum([len(source) for source in self.sources]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(i)
        which = bisect.bisect_right(self.ends, i)
        return self.sources[which][i - (self.ends[which - 1] if which else 0)]


# ---- mixtures ------------------------------------------------------------------------------------


def permuted(i: int, n: int, key: int) -> int:
    """Where a pseudo-random permutation of range(n) puts i; `key` (64 bits) chooses it.

    A Feistel network on the next power of two, walked until the value lies below n (two steps on
    average). No table: memory does not grow with n, and no library's generator decides the order.
    """
    bits = max(4, (n - 1).bit_length())  # fewer bits have too few networks to be even
    left = bits // 2
    right = bits - left
    while True:
        high, low = i >> right, i & ((1 << right) - 1)
        for turn in range(8):  # the halves take turns; 4 would do for large n, not for tiny ones
            x = (high if turn % 2 else low) + key + turn * 0x9E3779B97F4A7C15 & _MASK
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK  # splitmix64
            x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
            x ^= x >> 31
            if turn % 2:
                low ^= x & ((1 << right) - 1)
            else:
                high ^= x & ((1 << left) - 1)
        i = high << right | low
        if i < n:
            return i


@functools.lru_cache(maxsize=256)
def _key(*parts: int | str) -> int:
    """64 bits that depend on all of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def block_counts(weights: Sequence[float], block: int) -> list[int]:
    """Windows of each component in every block: int(share * block), the rest to the largest."""
    total = sum(weights)
    counts = [int(weight / total * block) for weight in weights]
    counts[max(range(len(weights)), key=weights.__getitem__)] += block - sum(counts)
    return counts


@dataclass(frozen=True, eq=False)
class Mixture:
    """Windows without end: number g is at place g % block of block g // block.

    Places of a block are permuted by (seed, block). The j-th window of component i in block b is
    window b * count_i + j of that component, which starts anew when it is used up, each time in a
    permutation by (seed, component's key, epoch).
    """

    keys: tuple[str, ...]
    sources: tuple
    counts: tuple[int, ...]
    seed: int

    @functools.cached_property
    def ends(self) -> list[int]:
        return np.cumsum(self.counts).tolist()

    def __len__(self) -> int:
        return _ENDLESS

    def place(self, g: int) -> tuple[int, int]:
        """(component, its window) of window number g."""
        block, at = divmod(g, self.ends[-1])
        at = permuted(at, self.ends[-1], _key(self.seed, "block", block))
        i = bisect.bisect_right(self.ends, at)
        j = at - (self.ends[i] - self.counts[i])
        n = len(self.sources[i])
        epoch, element = divmod(block * self.counts[i] + j, n)
        return i, permuted(element, n, _key(self.seed, self.keys[i], epoch))

    def __getitem__(self, g: int) -> np.ndarray:
        i, element = self.place(int(g))
        return self.sources[i][element]


def mixture(
    parts: Sequence[tuple[str, object, float]],
    batch: int,
    seed: int,
    shard: int = 0,
    shards: int = 1,
    block: int = 2048,
    keys: Sequence[str] | None = None,
):
    """A grain dataset like that of `batches`, of (name, source, weight) in exact proportions.

    The block-deterministic rule of the Delphi suite (`Mixture`, `block_counts`): every `block`
    windows in a row that begin at a multiple of it hold the same count of each component.
    keys: what the order of each part's windows depends on beside the seed (default: its name).
    DelveError: a weight that is not positive, or too small for one window a block.
    """
    import grain

    _check(batch, shards)
    names, sources, weights = zip(*parts, strict=True)
    for name, weight in zip(names, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise DelveError(f"{name}: weight {weight} must be positive; leave the part out")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DelveError(f"{twice[0]}: named twice in the mixture; add its weights")
    counts = block_counts(weights, block)
    if 0 in counts:
        raise DelveError(
            f"{names[counts.index(0)]}: its weight is less than one window in a block of {block}; "
            "raise it or leave the part out"
        )
    ds = grain.MapDataset.source(Mixture(tuple(keys or names), sources, tuple(counts), seed))
    return ds[shard::shards].batch(batch // shards, drop_remainder=True)


# ---- what a run trains on ------------------------------------------------------------------------


def training_set(
    items: Sequence[str | Path],
    tokenizer_json: str | None,
    vocab_size: int,
    window: int,
    batch: int,
    seed: int,
    shard: int = 0,
    shards: int = 1,
):
    """(dataset, facts) of text files, token folders and prepared mixtures.

    ds[step] -> int32 [batch / shards, window]; `window` = T + 1 ids, one more than the model reads.
    Without weights all windows are pooled; with "PATH=WEIGHT" (each item, or none) they are mixed.
    A prepared mixture brings the weights of its parts (times its own). facts: "data_hash",
    "tokens", "parts": {path: {"tokens", "windows", "weight", "data_hash"}}.
    DelveError: tokens of another tokenizer; ids outside the vocabulary; too little text; weights
    for some only.
    """
    parts, plain = [], []
    for path, weight in _items(items):
        if (path / MANIFEST).is_file():
            parts.append(_folder_part(path, weight, tokenizer_json, window))
        elif weight is None:
            plain.append(path)  # text without weights is one stream, as its files are one text
        else:
            parts.append(_text_part([path], weight, tokenizer_json, vocab_size, window))
    if plain:
        parts.append(_text_part(plain, None, tokenizer_json, vocab_size, window))
    for part in parts:
        if part.max_id >= vocab_size:
            raise DelveError(
                f"{part.name}: has the token id {part.max_id}, the model's vocabulary is "
                f"{vocab_size}; another tokenizer made it"
            )
    given = [part for part in parts if part.weight is not None]
    if given and len(given) < len(parts):
        name = next(part.name for part in parts if part.weight is None)
        raise DelveError(f"{name}: has no weight and others have; give each PATH=WEIGHT, or none")
    if given:
        named = [(p.name, p.source, p.weight) for p in parts]
        # names are paths: elsewhere the same text must come in the same order; i sets copies apart
        keys = [f"{i} {p.hash}" for i, p in enumerate(parts)]
        ds = mixture(named, batch, seed, shard, shards, keys=keys)
    else:
        source = parts[0].source if len(parts) == 1 else Pool(tuple(p.source for p in parts))
        ds = batches(source, batch, seed, shard, shards)
    rows = {
        p.name: {
            "tokens": p.tokens, "windows": len(p.source), "weight": p.weight, "data_hash": p.hash,
        }
        for p in parts
    }  # fmt: skip
    pinned = [(p.hash, p.weight) for p in parts]
    one = parts[0].hash if len(parts) == 1 else _hash(pinned)
    return ds, {"data_hash": one, "tokens": sum(p.tokens for p in parts), "parts": rows}


@dataclass(frozen=True, eq=False)
class _Part:
    name: str
    source: object
    weight: float | None
    tokens: int
    max_id: int
    hash: str


def _items(items: Sequence[str | Path]) -> list[tuple[Path, float | None]]:
    """(path, weight or None) of each item; a prepared mixture is its parts."""
    if not items:
        raise DelveError("no training data; name text files or token folders")
    out: list[tuple[Path, float | None]] = []
    for item in items:
        name, _, number = str(item).rpartition("=")
        weight = None
        if name and not Path(item).exists():
            try:
                weight = float(number)
            except ValueError:
                raise DelveError(f"{item}: the weight '{number}' is not a number") from None
        path = Path(item if weight is None else name)
        if not path.exists():
            raise DelveError(f"{path}: no such text file or token folder")
        if (path / MIXTURE).is_file():
            shares = _weights(path / MIXTURE)
            total, weight = sum(shares.values()), 1.0 if weight is None else weight
            out += [(path / part, weight * w / total) for part, w in shares.items()]
        elif path.is_dir() and not (path / MANIFEST).is_file():
            raise DelveError(f"{path}: is a folder without {MANIFEST}; `delve data prepare` it")
        else:
            out.append((path, weight))
    if twice := [path for path, _ in out if sum(path == other for other, _ in out) > 1]:
        raise DelveError(f"{twice[0]}: named twice; name it once, with a weight if need be")
    return out


def _weights(file: Path) -> dict[str, float]:
    """{part: weight} of a prepared mixture."""
    weights = read_json(file).get("weights")
    given = weights.values() if isinstance(weights, dict) else ()
    if not given or not all(isinstance(w, int | float) and w > 0 for w in given):
        raise DelveError(
            f"{file}: field 'weights' must give each part a number above 0; prepare it again "
            "(--overwrite)"
        )
    return weights


def text_hashes(items: Sequence[str | Path]) -> dict[str, str]:
    """{path: sha256} by which a resumed run knows its text: of files the bytes, of token folders
    (those of a prepared mixture too) the shards, as the manifest says.

    What is missing or damaged is left out: who reads the text names it.
    """
    out = {}
    for item in items:
        path = Path(item)
        if not path.exists():  # PATH=WEIGHT
            path = Path(str(item).rpartition("=")[0] or item)
        for file in (path, path / MIXTURE, path / MANIFEST, *sorted(path.glob(f"*/{MANIFEST}"))):
            if not file.is_file():
                continue
            with contextlib.suppress(DelveError, KeyError, TypeError, OSError):
                if file.name == MANIFEST:
                    out[str(file.parent)] = _hash([s["sha256"] for s in read_json(file)["shards"]])
                else:
                    out[str(file)] = sha256_of(file)
    return out


def _folder_part(path: Path, weight, tokenizer_json: str | None, window: int) -> _Part:
    files: TokenFiles = open_tokens(path)
    try:
        same = same_ids(files.tokenizer_json, tokenizer_json)
    except DelveError as err:
        raise DelveError(f"{path}: {err}") from None
    if not same:
        raise DelveError(
            f"{path}: was prepared with another tokenizer than the model's; prepare it again with "
            "the tokenizer.json beside the model's weights"
        )
    digests = [row["sha256"] for row in files.manifest["shards"]]
    source, top = files.windows(window), files.manifest["max_id"]
    return _Part(str(path), source, weight, files.tokens, top, _hash(digests))


def _text_part(paths: list[Path], weight, tokenizer_json, vocab_size: int, window: int) -> _Part:
    documents = [document for path in paths for document in read_documents(path)]
    ids = encode_documents(load_tokenizer(tokenizer_json, vocab_size), documents)
    name = ", ".join(map(str, paths))
    try:
        source = windows(ids, window, window - 1)
    except DelveError as err:
        raise DelveError(f"{name}: {err}") from None
    top = int(ids.max(initial=0))
    return _Part(name, source, weight, len(ids), top, data_hash(documents))


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
