"""Tokenizers and token ids: tokenizers.Tokenizer from JSON text, raw bytes, a small BPE trainer.

Shapes: ids [n] int32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import DelveError
from ..metrics import progress
from .text import EOT, read_text

PADDING = "<|padding|>"
_BATCH_BYTES = 4 << 20  # text given to the tokenizer at a time: enough for every core


@dataclass(frozen=True)
class Encoding:
    """What `ByteTokenizer.encode` returns: the part of tokenizers.Encoding that we read."""

    ids: list[int]


class ByteTokenizer:
    """Raw UTF-8 bytes as ids 0 to 255, with the method names of tokenizers.Tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        return Encoding(list(text.encode("utf-8")))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def token_to_id(self, token: str) -> int | None:
        """The id of a one-byte token; None for the special tokens, which bytes do not have."""
        raw = token.encode("utf-8")
        return raw[0] if len(raw) == 1 else None

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return 256


def read_tokenizer(source: str | Path | None) -> str | None:
    """The JSON text of a tokenizer: a tokenizer.json, a folder that holds one, or the text itself.

    None stays None: raw bytes.
    """
    if source is None or str(source).lstrip().startswith("{"):
        return source
    path = Path(source)
    return read_text(path / "tokenizer.json" if path.is_dir() else path)


def same_ids(a: str | None, b: str | None) -> bool:
    """Whether two tokenizers (JSON text, or None for raw bytes) give the same ids for any text."""
    return a == b or None not in (a, b) and _spelled(a) == _spelled(b)


@functools.lru_cache(maxsize=2)  # a third of a second for 50,000 words, and each part asks
def _spelled(json_str: str) -> str:
    """The library's own JSON: files leave defaults out, and write merges in two ways."""
    return load_tokenizer(json_str, 0).to_str()


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


def ids_of(tok, docs: Sequence[str]) -> list:
    """The ids of each document, without special tokens around them; on every core."""
    if isinstance(tok, ByteTokenizer):
        return [np.frombuffer(doc.encode("utf-8"), np.uint8) for doc in docs]
    # the fast way leaves the offsets out; the ids are those of encode_batch
    return [e.ids for e in tok.encode_batch_fast(docs, add_special_tokens=False)]


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
            for ids in ids_of(tok, group):
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
