"""The hybrid studies' own arithmetic: FLOPs of a DELVE and of one that skips FFNs."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from delve_jax import models
from delve_jax.config import DelveConfig, NeoxConfig, RwkvConfig
from delve_jax.models import delve

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import hybrid  # noqa: E402
import hybrid_parts  # noqa: E402

V, T, S = 40, 16, 2
tables = (("embed", (4,)), ("head", (4,)))
both = {"vocab_size": V, "vocab_rows": V, "n_layers": 4, "tie_embeddings": False}
STREAMS = (
    ("r", RwkvConfig(d_model=16, d_att=16, d_ffn=48, ranks=(("ffn/key", (3,) * 4), *tables),
                     **both)),
    ("n", NeoxConfig(d_model=32, n_heads=2, d_ffn=64, ranks=(("att/qkv", (5,) * 4), *tables),
                     **both)),
)  # fmt: skip
CFG = DelveConfig(STREAMS, S, connectors="hub", hub_rank=3, codes=("embed", "head"), ffn_skip=0.5)


def products(jaxpr, times=1):
    """FLOPs of all matrix products of a traced program."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (over, _), _ = eqn.params["dimension_numbers"]
            depth = np.prod([eqn.invars[0].aval.shape[i] for i in over])
            total += times * 2 * depth * np.prod(eqn.outvars[0].aval.shape)
        repeats = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        inner = (getattr(p, "jaxpr", p) for p in jax.tree.leaves(list(eqn.params.values())))
        total += sum(products(j, repeats) for j in inner if hasattr(j, "eqns"))
    return total


def test_flops_are_those_of_the_program(monkeypatch):
    monkeypatch.setattr(hybrid, "WINDOW", T)

    def run(params):
        return delve.head(CFG, params, delve.features(CFG, params, np.zeros((1, T), int))[0])

    traced = jax.make_jaxpr(run)(models.abstract_params(CFG)).jaxpr
    hub_before_0 = sum(2 * 2 * sub.d_model * CFG.hub_rank + CFG.hub_rank * 2
                       for _, sub in STREAMS)  # fmt: skip
    # the scan over superblocks runs a hub of zeros before the first
    assert products(traced) / T - hub_before_0 == pytest.approx(hybrid_parts.flops(CFG))


def test_skipped_ffns_cost_nothing():
    key = {"r": 3 * (16 + 48) + 48 * 16 + 16 * 16, "n": 2 * 32 * 64}  # an FFN's weights
    share = {"r": [1.0, 0.25], "n": [1.0, 0.5]}
    saved = 2 * 2 * (0.75 * key["r"] + 0.5 * key["n"])  # 2 layers behind the hub
    got = hybrid_parts.flops(CFG) - hybrid_parts.flops(CFG, share)
    assert got == pytest.approx(saved)


def test_neurons_and_ranks_count_as_they_are():
    """Padding of ragged layers is no work."""
    neox = dataclasses.replace(STREAMS[1][1], neurons=(64, 64, 10, 64))
    cut = dataclasses.replace(CFG, streams=(STREAMS[0], ("n", neox)))
    assert hybrid_parts.flops(CFG) - hybrid_parts.flops(cut) == 2 * 2 * 32 * 54
    rwkv = dataclasses.replace(STREAMS[0][1], ranks=(("ffn/key", (3, 1, 3, 3)), *tables))
    cut = dataclasses.replace(CFG, streams=(("r", rwkv), STREAMS[1]))
    assert hybrid_parts.flops(CFG) - hybrid_parts.flops(cut) == 2 * 2 * (16 + 48)
