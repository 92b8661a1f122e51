"""Data: text in, batches of token windows out; this face has the names that others use.

text       readers and documents, splits by hash, the hash that results are pinned to
tokenizer  tokenizers.Tokenizer or raw bytes, token ids in memory, a small BPE trainer
catalog    the named data sets and mixtures, and what a source on the command line means
build      `prepare`: text -> token folder, in parallel and resumable
tokens     token folders: memory-mapped, checked, cut into windows
pipeline   windows -> batches: a pure function of (seed, step); pools and mixtures

Arrows point up this list. The pipeline carries ids only: `<|endoftext|>` opens the document that
follows it, and the training step derives the segments from that.
"""

from .build import prepare
from .catalog import listing
from .pipeline import batches, mixture, text_hashes, training_set, windows
from .text import (
    EOT,
    SPLITS,
    data_hash,
    read_documents,
    read_text,
    shared_documents,
    split,
    split_of,
    stdlib_documents,
)
from .tokenizer import (
    PADDING,
    ByteTokenizer,
    encode_documents,
    eot_of,
    load_tokenizer,
    read_tokenizer,
    train_bpe,
)
from .tokens import TokenFiles, open_tokens

__all__ = [
    "EOT",
    "PADDING",
    "SPLITS",
    "ByteTokenizer",
    "TokenFiles",
    "batches",
    "data_hash",
    "encode_documents",
    "eot_of",
    "listing",
    "load_tokenizer",
    "mixture",
    "open_tokens",
    "prepare",
    "read_documents",
    "read_text",
    "read_tokenizer",
    "shared_documents",
    "split",
    "split_of",
    "stdlib_documents",
    "text_hashes",
    "train_bpe",
    "training_set",
    "windows",
]
