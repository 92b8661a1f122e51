"""A parent read layer by layer from its files: no more of it is in memory than is asked for.

A source has `cfg`, `outer()` (everything but the layers) and `layer(i)`: float32 on the default
device, the vocabulary cut to its valid ids, the same bits as `parents.load(src, "float32")`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from .. import checkpoint
from ..config import ParentConfig
from . import stock

VOCABULARY = {"embed/kernel": 0, "head/kernel": 1}  # table -> its axis of ids


class _Source:
    """What sources of both kinds share: a subclass reads one array of one layer, or of none."""

    def __init__(self, cfg: ParentConfig, tokenizer: str | None, paths: list[str]):
        self.cfg = dataclasses.replace(cfg, vocab_rows=cfg.vocab_size, dtype="float32")
        self.stored, self.tokenizer = cfg, tokenizer
        self._paths = paths
        self._last: tuple[int | None, dict] = (None, {})  # layers are asked for twice in a row

    def outer(self) -> dict:
        """Everything but the layers."""
        self._last = (None, {})
        return self._tree([p for p in self._paths if not p.startswith("layers/")], None)

    def layer(self, index: int) -> dict:
        """The parameters of one layer."""
        if self._last[0] != index:
            self._last = (None, {})
            tree = self._tree([p for p in self._paths if p.startswith("layers/")], index)
            self._last = (index, tree["layers"])
        return self._last[1]

    def _tree(self, paths: list[str], index: int | None) -> dict:
        tree: dict = {}
        for path in paths:
            stock._put(tree, path, jax.device_put(self._read(path, index)))
        return tree


class Files(_Source):
    """A stock directory or `.pth`. DelveError names file and tensor where one is NaN or Inf."""

    def __init__(self, path: Path):
        self._files, stored, tokenizer = stock.describe(path)
        self._rows = {row.path: row for row in stock.FAMILIES[stored.family].rows(stored)}
        super().__init__(stored, tokenizer, [*self._rows])
        self._path, self._sizes = path, {}

    def layer(self, index: int) -> dict:
        """The parameters of one layer."""
        layer = super().layer(index)
        if self.cfg.family == "rwkv" and len(self._sizes) < self.cfg.n_layers:
            maps = (layer["att"]["output"]["kernel"], layer["ffn"]["value"]["kernel"])
            self._sizes[index] = [np.linalg.norm(a) for a in maps]
            if len(self._sizes) == self.cfg.n_layers:
                size_L2 = np.array([self._sizes[i] for i in range(self.cfg.n_layers)])
                stock.warn_rescaled(self.cfg, size_L2, self._path)
        return layer

    def _read(self, path: str, index: int | None) -> np.ndarray:
        row = self._rows[path]
        read = stock._reader(self._files, row, self.cfg.n_layers, np.dtype(np.float32))
        shape = list(row.ours)
        if path in VOCABULARY:
            shape[VOCABULARY[path]] = self.cfg.vocab_size
        inside = tuple(slice(0, n) for n in shape)
        return read(inside) if index is None else read((slice(index, index + 1), *inside))[0]


class Saved(_Source):
    """A finished checkpoint directory of ours, dense or factored."""

    def __init__(self, path: Path, arrays: dict):
        cfg, tokenizer = checkpoint.load_config(path), checkpoint.load_tokenizer(path)
        super().__init__(cfg, tokenizer, [*arrays])
        self._arrays = arrays

    def _read(self, path: str, index: int | None) -> np.ndarray:
        array = self._arrays[path]
        if index is not None:
            array = array[index]
        elif path in VOCABULARY:
            cut = slice(0, self.cfg.vocab_size)
            array = array[cut] if VOCABULARY[path] == 0 else array[:, cut]
        return array.read().result().astype(np.float32)
