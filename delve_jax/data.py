"""Text to documents, splits, token ids, windows and a grain pipeline that needs no saved state.

A document is a piece between `<|endoftext|>` lines (the line and the newline before it belong to
neither neighbour). Its split is decided by its own hash, so it is the same in every file it is in.
Shapes: ids [n] int32, windows_NT [N windows, T tokens].
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .config import DelveError
from .metrics import progress

EOT = "<|endoftext|>"
PADDING = "<|padding|>"
SPLITS = ("train", "calibrate", "choose", "report")
_SEPARATOR = re.compile(r"(?:\A|\n)<\|endoftext\|>(?=\n|\Z)")
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_BATCH_BYTES = 4 << 20  # text given to the tokenizer at a time: enough for every core


# ---- documents -----------------------------------------------------------------------------------


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file (plain, .gz or .xz), byte for byte (no newline translation).

    DelveError, naming the file: missing, damaged archive, binary, or not UTF-8.
    """
    path = Path(path)
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        raise DelveError(f"{path}: no such text file") from None
    except IsADirectoryError:
        raise DelveError(f"{path}: is a directory; name the text files in it") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as err:
        raise DelveError(f"{path}: cannot be read ({err}); is it damaged or cut short?") from None
    if b"\0" in raw:
        raise DelveError(
            f"{path}: binary (byte {raw.index(0)} is NUL); text must be UTF-8, plain, .gz or .xz"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise DelveError(f"{path}: not UTF-8 at byte {err.start}; convert it with iconv") from None


def read_documents(path: str | Path) -> list[str]:
    """Documents of a text file, empty ones left out; without separator lines it is one document.

    DelveError as in `read_text`, and where there is no text.
    """
    documents = split_documents(read_text(path))
    if not documents:
        raise DelveError(f"{path}: holds no text; name a file with at least one document")
    return documents


def split_documents(text: str) -> list[str]:
    """The non-empty pieces of `text` between `<|endoftext|>` lines."""
    first, *rest = _SEPARATOR.split(text)
    # the newline that ends a separator line stays outside the match, so that two separators in a
    # row are both seen; here it is taken off
    return [d for d in (first, *(piece.removeprefix("\n") for piece in rest)) if d]


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


# ---- tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoding:
    """What `ByteTokenizer.encode` returns: the part of tokenizers.Encoding that we read."""

    ids: list[int]


class ByteTokenizer:
    """Raw UTF-8 bytes as ids 0 to 255, with the method names of tokenizers.Tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        return Encoding(list(text.encode("utf-8")))

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False):
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def token_to_id(self, token: str) -> int | None:
        """The id of a one-byte token; None for the special tokens, which bytes do not have."""
        raw = token.encode("utf-8")
        return raw[0] if len(raw) == 1 else None

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return 256


def load_tokenizer(json_str: str | None, vocab_size: int):
    """A tokenizers.Tokenizer from its JSON text, or raw bytes for a vocabulary of 256 without one.

    DelveError: damaged JSON; no tokenizer and a vocabulary that is not that of bytes.
    """
    if json_str is None:
        if vocab_size != 256:
            raise DelveError(
                f"no tokenizer.json, and a vocabulary of {vocab_size} is not raw bytes (256); "
                "text needs a tokenizer.json beside the weights"
            )
        return ByteTokenizer()
    import tokenizers

    try:
        tok = tokenizers.Tokenizer.from_str(json_str)
    except Exception as err:  # tokenizers raises the bare class
        raise DelveError(f"tokenizer.json: cannot be read ({err})") from None
    tok.no_truncation()  # a file may bring either, and would cut or fill documents in silence
    tok.no_padding()
    return tok


def eot_of(tok) -> int | None:
    """The id of `<|endoftext|>`; None where the vocabulary has no such token (raw bytes)."""
    return tok.token_to_id(EOT)


def encode_documents(tok, docs: Sequence[str], eot_id: int | None = None) -> np.ndarray:
    """Token ids [n] int32 of the documents, joined by `<|endoftext|>` where there is such a token.

    `eot_id` overrides the id found in the vocabulary. Raw bytes are joined by nothing, so that ids
    and bytes of text correspond one to one. On every core, with a bar when there is much.
    """
    eot = eot_of(tok) if eot_id is None or isinstance(tok, ByteTokenizer) else eot_id
    parts: list[np.ndarray] = []
    total = sum(map(len, docs))
    with progress(total, "tokens", "char", hide=total < 2 * _BATCH_BYTES) as bar:
        for group in _groups(docs):
            if isinstance(tok, ByteTokenizer):
                encoded = [np.frombuffer(d.encode("utf-8"), np.uint8) for d in group]
            else:
                encoded = [e.ids for e in tok.encode_batch(group, add_special_tokens=False)]
            for ids in encoded:
                if eot is not None and parts:
                    parts.append(np.array([eot], np.int32))
                parts.append(np.asarray(ids, np.int32))
            bar.update(sum(map(len, group)))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _groups(docs: Sequence[str]) -> Iterable[list[str]]:
    """Runs of documents of about _BATCH_BYTES characters."""
    group: list[str] = []
    size = 0
    for doc in docs:
        group.append(doc)
        size += len(doc)
        if size >= _BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def train_bpe(documents: Iterable[str], vocab_size: int = 3840) -> str:
    """JSON of a byte-level BPE learned on `documents`: `<|endoftext|>` 0, `<|padding|>` 1.

    No normaliser and no prefix space, and all 256 bytes are in the alphabet, so that decoding an
    encoded text returns it unchanged. Too little text gives fewer than `vocab_size` entries.
    """
    if vocab_size < 258:
        raise DelveError(f"vocab_size {vocab_size}: 256 bytes and 2 special tokens need 258")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(documents, trainer)
    return tok.to_str(pretty=False)


# ---- windows and batches -------------------------------------------------------------------------


def windows(ids: np.ndarray, length: int, stride: int | None = None) -> np.ndarray:
    """windows_NT: every `length` ids from every `stride`-th place on, the remainder dropped.

    A view of `ids`, no copy. `stride` is `length` unless given; with windows of T + 1 ids and
    stride T each id is a target once. DelveError when the text is shorter than one window.
    """
    if len(ids) < length:
        raise DelveError(f"text has {len(ids)} tokens, a window needs {length}; give more text")
    return np.lib.stride_tricks.sliding_window_view(ids, length)[:: stride or length]


def batches(windows_NT: np.ndarray, batch: int, seed: int, shard: int = 0, shards: int = 1):
    """A grain dataset with `ds[step]` -> [batch / shards, T]: a pure function of (seed, step).

    Windows are shuffled anew in each epoch and repeat without end. Nothing of it is saved: a run
    resumes with `ds[step]` at its step number, on any number of hosts (host `shard` of `shards`
    reads rows shard::shards of the global batch).
    """
    import grain

    if batch < 1 or batch % shards:
        raise DelveError(f"batch {batch}: must be a positive multiple of the {shards} hosts")
    ds = grain.MapDataset.source(windows_NT).seed(seed).shuffle().repeat()
    return ds[shard::shards].batch(batch // shards, drop_remainder=True)
