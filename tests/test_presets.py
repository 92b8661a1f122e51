"""The presets have the shapes of the models that they are named after: exact parameter counts.

Counts: design notes, parents.md section 1, hybrid.md section 2, delphi.md sections 2 and 5.
"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from compiled import forward

from delve_jax import config, models, parents, upcycle
from delve_jax.config import DelveError
from delve_jax.delphi.recipe import DELPHI as RECIPE
from delve_jax.presets import DELPHI_WIDTHS, PRESETS, TIERS, preset

PARENTS = {
    "mamba-370m": 371_516_416,
    "mamba-1.4b": 1_372_178_432,
    "mamba-7b-rw": 6_946_557_952,
    "rwkv-4-430m": 430_397_440,
    "rwkv-4-1b5": 1_515_106_304,
    "rwkv-4-7b": 7_392_649_216,
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "redpajama-incite-7b": 6_857_302_016,
}
V = 50277  # valid ids
TIER_SUMS = {"delve-0.4b": 1_207_189_504, "delve-1.4b": 5_313_486_848, "delve-7b": 21_194_604_544}
LAYERS = {
    512: 6, 640: 7, 768: 8, 896: 10, 1024: 11, 1152: 12, 1280: 13, 1408: 15, 1536: 16, 1664: 17,
    1792: 18, 1920: 19, 2048: 21, 2176: 22, 2304: 23, 2560: 26, 2816: 28, 3072: 30, 3328: 33,
    3584: 35, 3840: 37, 4096: 40, 5376: 51,
}  # fmt: skip
DELPHI = {
    512: 156_508_160, 896: 358_306_688, 1280: 669_160_448, 2560: 3_383_110_656,
    3840: 9_714_698_752, 4096: 11_788_433_408, 5376: 24_963_098_112,
}  # fmt: skip


@pytest.mark.parametrize("name", PARENTS)
def test_parents_have_their_published_size(name):
    assert models.count(preset(name)) == PARENTS[name]


def test_all_parents_in_one():
    """The card's twelve, each under its own name, are the sum of themselves and the joints."""
    cfg = preset("delve-all", keep=1.0)
    assert cfg.names == tuple(TIERS["delve-all"]) and set(cfg.names) == set(PARENTS)
    assert len({sub.family for _, sub in cfg.streams}) == 3
    assert {sub.d_model for _, sub in cfg.streams} == {128, 256, 1024, 2048, 4096}
    assert {sub.n_layers for _, sub in cfg.streams} == {6, 16, 24, 32, 48, 64}
    sums = 0
    for name, sub in cfg.streams:
        dense = dataclasses.replace(preset(name), vocab_rows=V)
        assert sub == dense
        sums += models.count(dense)
    # parents.md section 8 counts stored rows: a tied table once, padding rows with it
    padded = sum(
        (preset(n).vocab_rows - V) * preset(n).d_model * (1 if preset(n).tie_embeddings else 2)
        for n in cfg.names
    )
    assert sums + padded == sum(PARENTS.values()) == 27_762_033_664
    K, width = 12, sum(c.d_model for _, c in cfg.streams)
    gate = cfg.gate_proj * width + K * cfg.gate_proj * cfg.gate_hidden + cfg.gate_hidden * K
    assert models.count(cfg) == sums + gate + K
    half = preset("delve-all")
    assert 0.45 < models.count(half) / sums <= 0.5
    for _, sub in half.streams:
        assert sub.ranks and all(ranks[0] % 32 == 0 for _, ranks in sub.ranks)


@pytest.mark.parametrize("name", TIER_SUMS)
def test_tiers_keep_what_is_asked_of_the_sum_of_their_parents(name):
    """Dense, a tier is its parents and the joints; else uniform ranks just within the ratio."""
    dense = preset(name, keep=1.0)
    assert sum(models.count(sub) for _, sub in dense.streams) == TIER_SUMS[name]
    width = dense.streams[0][1].d_model
    assert (dense.n_superblocks, dense.hub_rank) == (8, width // 16)
    assert "hub" not in models.abstract_params(dense)
    joints = models.count(dense) - TIER_SUMS[name]
    assert preset(name) == preset(name, keep=0.5) != preset(name, keep=0.3)
    for keep in (0.5, 0.3):
        cfg = preset(name, keep=keep)
        share = (models.count(cfg) - joints) / TIER_SUMS[name]
        assert 0.9 * keep < share <= keep, keep
        for _, sub in cfg.streams:
            assert sub.ranks and sub.vocab_rows == sub.vocab_size == V
            for _, ranks in sub.ranks:
                step = 64 if width >= 2048 else 32
                assert len(set(ranks)) == 1 and ranks[0] % step == 0 < ranks[0]


def test_delphi_of_every_width():
    assert set(DELPHI_WIDTHS) == set(LAYERS)
    for width in DELPHI_WIDTHS:
        cfg = preset(f"delphi-{width}")
        assert cfg.n_layers == LAYERS[width] and cfg.n_heads * 128 == width
        rows, H, L = 128256, width, cfg.n_layers
        assert models.count(cfg) == 2 * rows * H + L * (16 * H * H + 2 * H + 256) + H
        assert models.count(cfg) == DELPHI.get(width, models.count(cfg))
    large = RECIPE.select(1e24).hidden  # what `delve delphi recipe --flops 1e24` says to train
    assert large not in DELPHI_WIDTHS and preset(f"delphi-{large}").d_model == large
    with pytest.raises(DelveError, match="delphi-500: the width must be a multiple of 128"):
        preset("delphi-500")


def test_the_first_loss_of_delphi():
    """ln V and half the logits' variance, 12.25 nats: averaged over every next token, not drawn.

    At a sixteenth of the vocabulary, whose tables take half a minute to draw; the variance is that
    of every vocabulary.
    """
    cfg = preset("delphi-512")
    assert cfg.vocab_size == 128256
    half = 12.25 - math.log(cfg.vocab_size)
    cfg = dataclasses.replace(cfg, vocab_size=8016, vocab_rows=8016)
    params = jax.jit(lambda key: models.init_params(cfg, key))(jax.random.key(0))
    tokens_BT = np.random.default_rng(0).integers(1, cfg.vocab_size, (1, 32))
    logits_BTV = forward(cfg, params, tokens_BT)[0]
    loss = jax.nn.logsumexp(logits_BTV, -1) - logits_BTV.mean(-1)
    assert float(loss.mean()) == pytest.approx(math.log(8016) + half, abs=0.02)


@pytest.mark.parametrize("name", ["mamba", "rwkv", "neox", "incite"])
def test_proxies_are_the_embedded_ones(name):
    """But for the record of the source; a Mamba's does not say how long its windows were."""
    cfg, _, _ = parents.load(upcycle.PROXIES / name)
    assert cfg.context_length == (2048 if name == "mamba" else 256)
    same = dataclasses.replace(cfg, hf_config="", context_length=256)
    assert preset(f"proxy-{name}") == same


def test_every_preset_goes_through_json_and_others_are_refused():
    for name in PRESETS:
        cfg = preset(name)
        back = config.from_json(json.loads(json.dumps(config.to_json(cfg))))
        assert back == cfg and hash(back) == hash(cfg)
        assert cfg.context_length in (256, 1024, 2048, 4096)
    with pytest.raises(DelveError, match="gpt-2.*mamba-370m.*delphi-5376"):
        preset("gpt-2")
    with pytest.raises(DelveError, match="mamba-370m.*--keep.*delve-7b"):
        preset("mamba-370m", keep=0.5)
