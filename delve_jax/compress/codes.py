"""Common codes: one long factor [V, r] for the input tables of parents, one for their heads.

Parents with one tokenizer describe the same words, so that their tables side by side have far
fewer directions than columns: at equal parameters what is lost to factoring is halved
(experiments/shared_tables.py). Closed forms: `vocab.shared_embed`, `vocab.shared_head`; here their
moments, by whole passes with labels sampled from each parent's own predictions.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import models
from ..config import DelveError, ParentConfig
from ..metrics import progress
from ..models import Compute
from ..models.linear import HIGHEST, lookup, materialise, wide
from . import vocab
from .moments import merge
from .spectra import InMemory

LOGITS_BYTES = 2**27  # of the float32 logits that a batch may hold


class TableMoments(NamedTuple):
    """What the tables of one parent are weighed with, per token, float64."""

    gram_DD: np.ndarray  # E[f f^T] of the head's inputs
    grad_DD: np.ndarray  # E[g g^T], g = d nll / d looked-up row
    predicted_V: np.ndarray  # mean prediction


def untied(cfg: ParentConfig, params: dict) -> tuple[ParentConfig, dict]:
    """The same parent with dense tables of its own for input and head, valid rows only."""
    V = cfg.vocab_size
    table_VD = materialise(params["embed"])[:V]
    head_DV = table_VD.T if cfg.tie_embeddings else materialise(params["head"])[:, :V]
    tables = {"embed": {"kernel": table_VD}, "head": {"kernel": head_DV}}
    cfg = dataclasses.replace(_without(cfg, tables), vocab_rows=V, tie_embeddings=False)
    return cfg, {**params, **tables}


def _without(cfg: ParentConfig, tables: dict) -> ParentConfig:
    """The config with these tables dense: no rank, nor one at half the size."""
    ranks, nested = (
        tuple((name, r) for name, r in sizes if name not in tables)
        for sizes in (cfg.ranks, cfg.nested)
    )
    return dataclasses.replace(cfg, ranks=ranks, nested=nested)


def measure(cfg: ParentConfig, params: dict, tokens_NT, seed: int = 0) -> TableMoments:
    """Moments of an untied parent's tables on the windows tokens_NT."""

    @jax.jit
    def sums(params, tokens_BT, key):
        rows_nD = lookup(params["embed"], tokens_BT.reshape(-1))

        def run(rows_nD):  # the looked-up rows as a table: its gradient is theirs
            inside = {**params, "embed": {"kernel": rows_nD}}
            ids_BT = jnp.arange(len(rows_nD)).reshape(tokens_BT.shape)
            f_BTD, _ = models.features(cfg, inside, ids_BT, how=Compute(remat="layer"))
            f_nD = f_BTD.reshape(-1, cfg.d_model)
            return models.head(cfg, inside, f_nD), f_nD

        logits_nV, pull, f_nD = jax.vjp(run, rows_nD, has_aux=True)
        label_n = jax.random.categorical(key, logits_nV, axis=-1)
        p_nV = jax.nn.softmax(logits_nV)
        (g_nD,) = pull(p_nV - jax.nn.one_hot(label_n, p_nV.shape[-1], dtype=p_nV.dtype))
        square = lambda a: jnp.matmul(wide(a).T, wide(a), precision=HIGHEST)  # noqa: E731
        return {"gram": square(f_nD), "grad": square(g_nD), "predicted": p_nV.sum(0)}

    T = tokens_NT.shape[1]
    rows = max(1, LOGITS_BYTES // (4 * T * cfg.vocab_size))
    batches = [tokens_NT[i : i + rows] for i in range(0, len(tokens_NT), rows)]
    with progress(len(batches), "codes", "batch") as bar, jax.default_matmul_precision("highest"):

        def passes():
            for i, tokens_BT in enumerate(batches):
                yield sums(params, jnp.asarray(tokens_BT), jax.random.key(seed * 2**16 + i))
                bar.update()

        total = merge(passes())
    mean = {name: a / tokens_NT.size for name, a in total.items()}
    if not all(np.isfinite(a).all() for a in mean.values()):
        raise DelveError("--codes: activations are not finite; check the weights for NaN or Inf")
    return TableMoments(mean["gram"], mean["grad"], mean["predicted"])


class Codes(NamedTuple):
    """Common tables at every rank up to `most`: a slice is the optimum of its rank."""

    embed_VK: np.ndarray  # float32, as all of them
    embed_KD: list[np.ndarray]  # of each parent
    head_DK: list[np.ndarray]
    head_KV: np.ndarray
    energy: np.ndarray  # sigma^2 of both tables, in nats when halved, [sum D] float64

    @property
    def vocab_size(self) -> int:
        return len(self.embed_VK)

    @property
    def width(self) -> int:
        """Sum of the parents' widths."""
        return sum(u.shape[1] for u in self.embed_KD)

    @property
    def most(self) -> int:
        return self.embed_VK.shape[1]

    @property
    def step(self) -> int:
        """Parameters of one rank, both tables."""
        return 2 * (self.vocab_size + self.width)

    def tails(self, ranks) -> np.ndarray:
        """Half the energy beyond each rank."""
        beyond = np.concatenate([np.cumsum(self.energy[::-1])[::-1], [0.0]])
        return 0.5 * beyond[np.asarray(ranks)]

    def at(self, rank: int) -> list[dict]:
        """{"embed": {"v", "u"}, "head": {"v", "u"}} of each parent; long factors are one array."""
        v_VK, u_KV = jnp.asarray(self.embed_VK[:, :rank]), jnp.asarray(self.head_KV[:rank])
        return [
            {"embed": {"v": v_VK, "u": jnp.asarray(u[:rank])},
             "head": {"v": jnp.asarray(v[:, :rank]), "u": u_KV}}
            for u, v in zip(self.embed_KD, self.head_DK, strict=True)
        ]  # fmt: skip


def of(parents: list[tuple], most: int | None = None) -> Codes:
    """Codes of parents given as (source, TableMoments, windows [N, T]).

    most: largest rank that is kept (None: where they cost what the dense tables do, at most half
    the sum of the widths, which with real vocabularies is beyond any budget).
    """
    tables, heads = [], []
    for source, _, _ in parents:
        outer = source.outer()
        tables.append(np.asarray(outer["embed"]["kernel"]))
        tied = source.cfg.tie_embeddings
        heads.append(tables[-1].T if tied else np.asarray(outer["head"]["kernel"]))
    width = sum(t.shape[1] for t in tables)
    if most is None:
        dense = sum(t.size * (1 if s.cfg.tie_embeddings else 2)
                    for t, (s, _, _) in zip(tables, parents, strict=True))  # fmt: skip
        most = max(1, min(width // 2, dense // (2 * (len(tables[0]) + width))))
    V = len(tables[0])
    seen_V = vocab.weights(np.mean([vocab.frequencies(t, V) for _, _, t in parents], axis=0))
    predicted_V = vocab.weights(np.mean([m.predicted_V for _, m, _ in parents], axis=0))
    grads, grams = ([getattr(m, name) for _, m, _ in parents] for name in ("grad_DD", "gram_DD"))
    c_VK, u_KD, lookups = vocab.shared_embed(tables, seen_V, most, grads)
    v_DK, c_KV, logits = vocab.shared_head(heads, grams, predicted_V, most)
    f32 = lambda a: np.ascontiguousarray(a, np.float32)  # noqa: E731
    return Codes(f32(c_VK), [f32(u) for u in u_KD], [f32(v) for v in v_DK], f32(c_KV),
                 lookups + logits)  # fmt: skip


def common(
    parents: list[tuple[str, ParentConfig, dict]], tokens_NT, rank: int, seed: int = 0
) -> list[tuple[str, ParentConfig, dict]]:
    """The parents with tables factored at `rank`, whose long factors are the same arrays.

    embed: {"v" common [V, r], "u" own [r, D]}; head: {"v" own [D, r], "u" common [r, V]}. Tied
    tables are untied first. DelveError: a rank that is not in 1 .. sum of the widths (or the
    vocabulary, where that is smaller), a parent in pivot or int8 form.
    """
    width, V = sum(cfg.d_model for _, cfg, _ in parents), parents[0][1].vocab_size
    if not 1 <= rank <= min(width, V):
        most = "the sum of the widths" if width <= V else "the size of the vocabulary"
        raise DelveError(f"--codes {rank}: must lie in 1 .. {min(width, V)}, {most}")
    if odd := [(name, cfg.storage) for name, cfg, _ in parents if cfg.storage != "uv"]:
        raise DelveError(
            f"--codes: {odd[0][0]} is stored as {odd[0][1]}, common tables have the uv form alone; "
            "`delve convert --storage uv` first, or fuse without --codes"
        )
    parents = [(name, *untied(cfg, params)) for name, cfg, params in parents]
    known = [
        (InMemory(cfg, params), measure(cfg, params, tokens_NT, seed), tokens_NT)
        for _, cfg, params in parents
    ]
    return [
        (name, shared(cfg, rank), {**params, **own})
        for (name, cfg, params), own in zip(parents, of(known, rank).at(rank), strict=True)
    ]


def shared(cfg: ParentConfig, rank: int, nested: int | None = None) -> ParentConfig:
    """The config of a parent whose tables are common codes of this rank.

    nested: their rank in the model of half the size inside.
    """
    tables = ("embed", "head")
    ranks = (*cfg.ranks, *((name, (rank,)) for name in tables))
    inside = cfg.nested if nested is None else (*cfg.nested, *((n, (nested,)) for n in tables))
    return dataclasses.replace(cfg, ranks=ranks, nested=inside, tie_embeddings=False)


def alone(cfg: ParentConfig, params: dict) -> tuple[ParentConfig, dict]:
    """A parent with common tables that stands alone: they are dense where that is smaller."""
    (rank,) = cfg.rank("embed")
    if rank * (cfg.vocab_size + cfg.d_model) < cfg.vocab_size * cfg.d_model:
        return cfg, params
    dense = {name: {"kernel": materialise(params[name])} for name in ("embed", "head")}
    return _without(cfg, dense), {**params, **dense}
