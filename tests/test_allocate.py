"""Rank allocation: any total budget is met exactly, from real parents' shapes and random ones."""

import dataclasses

import numpy as np
import pytest

from delve_jax import models
from delve_jax.compress import plan_for
from delve_jax.compress.allocate import TABLE_SHARE, Map, allocate, parent_maps
from delve_jax.config import DelveError, MambaConfig, NeoxConfig, RwkvConfig

V = 50_277
REAL = {  # dense parameters at V valid rows: design notes, hybrid.md section 2
    "mamba-370m": (MambaConfig(V, 50_280, 1024, 48, tie_embeddings=True, d_inner=2048, dt_rank=64),
                   371_513_344),
    "mamba-7b-rw": (MambaConfig(V, 50_432, 4096, 64, tie_embeddings=True, d_inner=8192,
                                dt_rank=256), 6_945_923_072),
    "rwkv-4-430m": (RwkvConfig(V, V, 1024, 24, d_att=1024, d_ffn=4096), 430_397_440),
    "rwkv-4-1b5": (RwkvConfig(V, V, 2048, 24, d_att=2048, d_ffn=8192), 1_515_106_304),
    "pythia-410m": (NeoxConfig(V, 50_304, 1024, 24, n_heads=16, d_ffn=4096), 405_278_720),
    "pythia-14m": (NeoxConfig(V, 50_304, 128, 6, n_heads=4, d_ffn=512), 14_060_800),
    "incite-7b": (NeoxConfig(V, 50_432, 4096, 32, n_heads=32, d_ffn=16384), 6_856_032_256),
}  # fmt: skip
PYTHIA, _ = REAL["pythia-14m"]


def check_plan(maps, plan):
    """Never over; the gap is smaller than the smallest step left; ranks even out over layers."""
    assert plan.parameters <= plan.budget
    gap, steps = plan.budget - plan.parameters, []
    for m in maps:
        if m.name not in plan.ranks:
            continue
        ranks = plan.ranks[m.name]
        assert len(ranks) == m.layers and 1 <= min(ranks) and max(ranks) - min(ranks) <= 1
        assert max(ranks) * m.step < m.dense  # else dense would be cheaper
        if min(ranks) < m.max_rank:
            steps.append(m.step)
        else:
            steps.append(m.layers * m.dense - m.step * sum(ranks))
    if steps:
        assert gap < min(steps)
    else:
        assert plan.parameters == plan.total


@pytest.mark.parametrize("name", REAL)
def test_real_parents_meet_the_keep_ratio(name):
    cfg, total = REAL[name]
    body, tables, counted = parent_maps(cfg)
    assert counted == total
    for keep in (0.8, 0.6, 0.5, 0.4, 0.25, 0.1):
        plan, _ = plan_for(cfg, keep=keep)
        check_plan([*tables, *body], plan)
        new = dataclasses.replace(cfg, vocab_rows=V, ranks=tuple(plan.ranks.items()))
        assert models.count(new) == plan.parameters
        assert total - plan.parameters >= (1 - keep) * total - 1e-6
        if plan.tables == "dense":
            assert (
                not {"embed", "head"} & plan.ranks.keys() and plan.rho >= 0.99 * TABLE_SHARE * keep
            )
        else:  # the tables ask for their share: dense ones would starve the body
            body_size = sum(m.layers * m.dense for m in body)
            assert (body_size - (total - plan.budget)) / body_size < TABLE_SHARE * keep


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes_meet_any_budget(seed):
    rng = np.random.default_rng(seed)
    body = [
        Map(f"m{i}", int(rng.integers(1, 7)), *map(int, rng.integers(1, 90, 2))) for i in range(4)
    ]
    tables = [Map("embed", 1, 200, 16), Map("head", 1, 16, 200)][: rng.integers(1, 3)]
    total = sum(m.layers * m.dense for m in [*body, *tables]) + int(rng.integers(0, 3000))
    least = allocate_least(body, tables, total)
    for budget in [least, least + 1, total - 1, total, *map(int, rng.integers(least, total, 12))]:
        plan = allocate(body, tables, total, budget)
        check_plan([*tables, *body], plan)
        cost = sum(
            m.step * sum(plan.ranks[m.name]) - m.layers * m.dense
            for m in [*body, *tables]
            if m.name in plan.ranks
        )
        assert plan.parameters == total + cost
        assert plan == allocate(body, tables, total, budget)


def allocate_least(body, tables, total):
    return total - sum(m.layers * max(0, m.dense - m.step) for m in [*body, *tables])


@pytest.mark.parametrize("name", ["mamba-370m", "rwkv-4-430m", "pythia-14m"])
def test_smallest_possible_ratio_is_named_and_works(name):
    cfg, _ = REAL[name]
    with pytest.raises(DelveError, match="smallest possible --keep is") as err:
        plan_for(cfg, keep=0.001)
    smallest = float(str(err.value).rsplit(" ", 1)[1])
    plan, maps = plan_for(cfg, keep=smallest)
    check_plan(maps.values(), plan)
    with pytest.raises(DelveError, match="smallest possible"):
        plan_for(cfg, keep=smallest - 2e-4)


def test_absolute_budget_is_the_same_rule():
    _, _, total = parent_maps(PYTHIA)
    by_ratio, _ = plan_for(PYTHIA, keep=0.5)
    by_number, _ = plan_for(PYTHIA, budget=total // 2)
    assert by_ratio.ranks == by_number.ranks
    for wrong in ({}, {"keep": 0.5, "budget": 10}, {"keep": 0.0}, {"keep": 1.2},
                  {"keep": float("nan")}):  # fmt: skip
        with pytest.raises(DelveError, match="keep"):
            plan_for(PYTHIA, **wrong)
