"""Teachers' answers on disk: samples of their pool at every position a run will read.

64 draws with replacement from T, stored as (id, count): the loss -sum counts/64 log p(id) has the
gradient of KL(T || p) in expectation, which the top-k of T has not (arXiv 2503.16870). With an
entropy estimate from the same draws it also reads as an unbiased KL. 64 x (2 + 1) + 2 bytes a token
for vocabularies up to 65,536. Made before training, step by step in the order of the run; a killed
call goes on. Teachers then need not be in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from .. import models
from ..config import DelveError, read_json, to_json, write_json
from ..metrics import progress
from ..models import Compute, delve
from .objective import segments

SAMPLES = 64


@dataclasses.dataclass(frozen=True)
class Cache:
    """Samples of `steps` steps of this process's `rows` rows of T positions each."""

    folder: Path
    steps: int
    rows: int
    T: int
    id_dtype: str

    def array(self, name: str, mode: str = "r") -> np.ndarray:
        """ids and counts [steps, rows, T, SAMPLES]; entropy [steps, rows, T]: memory-mapped."""
        tail, dtype = layout(self.id_dtype)[name]
        shape = (self.steps, self.rows, self.T, *tail)
        return np.memmap(self.folder / f"{name}.bin", dtype, mode, shape=shape)

    def joined(self, dataset):
        """The run's dataset with what the teachers said beside its rows: one dict a step."""
        arrays = {name: self.array(name) for name in layout(self.id_dtype)}
        return dataset.map_with_index(
            lambda step, rows: {"tokens": rows, **{k: a[step] for k, a in arrays.items()}}
        )


def id_dtype_of(vocab_size: int) -> str:
    """The dtype that ids of a vocabulary are stored in."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def layout(id_dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """{file: (shape, dtype) of what it has of a token}."""
    return {"ids": ((SAMPLES,), id_dtype), "counts": ((SAMPLES,), "uint8"),
            "entropy": ((), "float16")}  # fmt: skip


def token_bytes(id_dtype: str) -> int:
    """Bytes of a token in all files."""
    return sum(math.prod(n) * np.dtype(d).itemsize for n, d in layout(id_dtype).values())


def sampled(logits_nV: jax.Array, key: jax.Array) -> dict:
    """SAMPLES draws of each row, sorted: {"ids" [n, SAMPLES], "counts", "entropy" [n]}.

    An id stands once, with its count, at its first place; the places after it have count 0.
    """
    log_p = jax.nn.log_softmax(logits_nV)
    draws_nS = jnp.sort(
        jax.random.categorical(key, log_p[:, None], axis=-1, shape=(len(log_p), SAMPLES)), axis=-1
    )
    first_nS = jnp.concatenate(
        [jnp.ones_like(draws_nS[:, :1], bool), draws_nS[:, 1:] != draws_nS[:, :-1]], axis=1
    )
    ends_nS = jax.vmap(lambda row: jnp.searchsorted(row, row, side="right"))(draws_nS)
    counts_nS = jnp.where(first_nS, ends_nS - jnp.arange(SAMPLES), 0)
    chosen = jnp.take_along_axis(log_p, draws_nS, axis=-1)
    return {"ids": draws_nS, "counts": counts_nS, "entropy": -chosen.mean(-1)}


def make(
    folder: Path,
    dataset,
    steps: int,
    teachers: tuple,
    frozen: dict,
    *,
    eot: int | None = None,
    how: Compute = models.F32,
    seed: int = 0,
    data_hash: str | None = None,
) -> Cache:
    """The cache of a run, made or finished: what `frozen`'s pool says to dataset[0 .. steps - 1].

    data_hash: of all text that the dataset is drawn from. DelveError: the folder holds the cache of
    another run: other text or order (which the rows at step 0 tell), other teachers, weights,
    document boundaries or dtype.
    """
    folder = Path(folder)
    first = np.ascontiguousarray(dataset[0], np.int32)
    rows, T, V = len(first), first.shape[1] - 1, teachers[0].vocab_size
    id_dtype = id_dtype_of(V)
    said_by = [list(map(float, frozen["weights"])), [to_json(t) for t in teachers], eot, how.dtype]
    digest = hashlib.sha256(json.dumps(said_by, sort_keys=True).encode())
    for leaf in jax.tree.leaves(frozen["teachers"]):  # another parent of the same sizes differs
        digest.update(np.asarray(leaf.reshape(-1)[:64], np.float32).tobytes())
    facts = {
        "data": data_hash,
        "first_rows": hashlib.sha256(first.tobytes()).hexdigest(),
        "teachers": digest.hexdigest(),
        "rows": rows, "T": T, "samples": SAMPLES, "seed": seed, "id_dtype": id_dtype,
    }  # fmt: skip
    record = folder / "cache.json"
    known = read_json(record) if record.exists() else facts | {"steps": 0}
    if odd := sorted(k for k in facts if k not in known or known[k] != facts[k]):
        raise DelveError(
            f"{folder}: holds the teachers' answers of another run (its {odd[0]} differ); name "
            "another --teacher-cache"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # a longer run takes over what a shorter one made: its steps are the first ones of this
    cache = Cache(folder, max(steps, known["steps"]), rows, T, id_dtype)
    _check_room(cache, cache.steps - known["steps"])
    for name in layout(id_dtype):
        _grown(cache, name)
    pool = delve.plain_pool(map(str, range(len(teachers))), list(teachers))

    @jax.jit
    def answer(frozen, tokens_BT, key):
        tree = {"streams": dict(zip(pool.names, frozen["teachers"], strict=True)),
                "pool": {"a": frozen["weights"]}}  # fmt: skip
        f, _ = delve.features(pool, tree, tokens_BT, segments_BT=segments(tokens_BT, eot), how=how)
        keys = jax.random.split(key, len(tokens_BT))

        def row(carry, slot):  # one row's logits at a time
            f_TD, key = slot
            return carry, sampled(delve.head(pool, tree, f_TD), key)

        return jax.lax.scan(row, None, (f, keys))[1]

    if known["steps"] < steps:
        arrays = {name: cache.array(name, "r+") for name in ("ids", "counts", "entropy")}
        with progress(steps, "teachers", "step") as bar:
            bar.update(known["steps"])
            for step in range(known["steps"], steps):
                tokens = jnp.asarray(np.asarray(dataset[step], np.int32)[:, :-1])
                said = answer(frozen, tokens, jax.random.fold_in(jax.random.key(seed), step))
                for name, array in arrays.items():
                    array[step] = np.asarray(said[name])
                if (step + 1) % 50 == 0 or step + 1 == steps:
                    for array in arrays.values():
                        array.flush()
                    write_json(record, facts | {"steps": step + 1})
                bar.update(1)
    return cache


def _check_room(cache: Cache, steps: int) -> None:
    """DelveError where the disk has no room for `steps` more: a write to a mapped file that finds
    none ends the process without a word."""
    need = steps * cache.rows * cache.T * token_bytes(cache.id_dtype)
    if need > (free := shutil.disk_usage(cache.folder).free):
        raise DelveError(
            f"{cache.folder}: the teachers' answers need {need / 2**30:.2f} GiB, "
            f"{free / 2**30:.2f} are free; make room, or name another --teacher-cache"
        )


def _grown(cache: Cache, name: str) -> None:
    """The file in the length of the cache; what it holds stays."""
    path = cache.folder / f"{name}.bin"
    tail, dtype = layout(cache.id_dtype)[name]
    size = cache.steps * cache.rows * cache.T * math.prod(tail) * np.dtype(dtype).itemsize
    with path.open("ab") as file:
        if file.tell() != size:
            file.truncate(size)
