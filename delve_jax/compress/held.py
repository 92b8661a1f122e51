"""A parent that is read once and stays on the accelerator, where it fits there.

`compress` asks for every layer some eight times, and reading one takes longer than running it. A
CPU holds one layer at a time, as ever.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from .. import models
from . import device

AHEAD = 4  # layers that are read at a time, on as many threads


def held(source):
    """The source itself, or one that holds it on the accelerator (half of `device.room`)."""
    tree = models.abstract_params(source.cfg)
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(tree))
    return Held(source) if size <= device.room() / 2 else source


class Held:
    """A source of layers whose arrays stay where they are; those to come are read ahead."""

    def __init__(self, source):
        self.cfg = source.cfg
        self._source, self._read = source, {}
        self._threads = ThreadPoolExecutor(AHEAD, "read")

    def outer(self) -> dict:
        """Everything but the layers."""
        return self._get(-1, self._source.outer)

    def layer(self, index: int) -> dict:
        """The parameters of one layer."""
        for i in range(index, min(index + AHEAD, self.cfg.n_layers)):
            if i not in self._read:
                # a source remembers what it read last: one for each
                read = functools.partial(copy.copy(self._source).layer, i)
                self._read[i] = self._threads.submit(read)
        return self._get(index, None)

    def _get(self, index: int, read: Callable | None) -> dict:
        tree = self._read.get(index)
        if tree is None:
            tree = read()
        elif isinstance(tree, Future):
            tree = tree.result()
        self._read[index] = tree
        return jax.tree.map(_again, tree)


def _again(a: jax.Array) -> jax.Array:
    """The array as another object: one keeps what the host asked of it, and would never let go."""
    return jax.make_array_from_single_device_arrays(a.shape, a.sharding, [a])
