"""Parts of a DELVE are models: subsets of streams, smaller ranks; other connectors and heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delve_jax import config, models
from delve_jax.config import DelveConfig, DelveError, MambaConfig, NeoxConfig, RwkvConfig
from delve_jax.models import delve, elastic
from delve_jax.train import objective

V, T = 40, 12
both = {"vocab_size": V, "vocab_rows": V}
STREAMS = (
    ("m", MambaConfig(n_layers=2, d_model=24, d_inner=48, d_state=4, dt_rank=2, **both)),
    ("r", RwkvConfig(n_layers=2, d_model=16, d_att=16, d_ffn=48, **both)),
    ("n", NeoxConfig(n_layers=2, d_model=32, n_heads=2, d_ffn=64, **both)),
)
CFG = DelveConfig(
    STREAMS, n_superblocks=2, connectors="hub", hub_rank=4, teachers=("tm", "tr", "tn")
)
CODES = (("embed", (9,)), ("head", (9,)))
FORMS = {
    "J=1": CFG,
    "J=2": dataclasses.replace(CFG, latents=2),
    "J=K": dataclasses.replace(CFG, latents=3),
    "J=2, codes, cross": dataclasses.replace(
        CFG, latents=2, connectors="cross", codes=("embed", "head"),
        streams=tuple((n, dataclasses.replace(s, ranks=CODES)) for n, s in STREAMS),
    ),
}  # fmt: skip
TEXT = np.random.default_rng(0).integers(0, V, size=(2, T))


@functools.cache
def jitted(cfg):
    return jax.jit(functools.partial(models.forward, cfg))


@functools.cache
def with_present(cfg):
    def run(params, tokens, present):
        f, _ = delve.features(cfg, params, tokens, present_BTK=present)
        return delve.head(cfg, params, f, present)

    return jax.jit(run)


def log_p(logits):
    return np.asarray(jax.nn.log_softmax(logits))


@pytest.mark.parametrize("form", ["J=1", "J=2, codes, cross", "J=K"])
@pytest.mark.parametrize("names", [("n", "m"), ("r",)])
def test_a_subset_is_the_whole_model_whose_other_streams_are_absent(form, names, randomised):
    """Cut out, or masked as in stream-drop: the same distribution; and a model of its own."""
    cfg = FORMS[form]
    params = randomised(cfg, 1)
    params["pool"] = jax.tree.map(jnp.abs, params["pool"])
    if 1 < cfg.latents < 3 and len(names) <= cfg.latents:
        with pytest.raises(DelveError, match="latents needs more than"):
            delve.subset(cfg, params, names)
        return
    part, kept = delve.subset(cfg, params, names)
    assert part.names == tuple(n for n in cfg.names if n in names)  # the order of the whole
    assert part.teachers == tuple("t" + n for n in part.names)
    shapes = jax.tree.map(jnp.shape, models.abstract_params(part))
    assert jax.tree.map(jnp.shape, kept) == shapes
    got = log_p(jitted(part)(kept, TEXT)[0])
    here = jnp.array([float(n in names) for n in cfg.names]).reshape(1, 1, 3)
    want = log_p(with_present(cfg)(params, TEXT, jnp.tile(here, (2, 1, 1))))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-5)
    assert np.abs(got - log_p(jitted(cfg)(params, TEXT)[0])).max() > 0.1


def test_rows_of_a_batch_may_have_different_streams(randomised):
    params = randomised(CFG, 2)
    params["pool"] = jax.tree.map(jnp.abs, params["pool"])
    present = jnp.array([[[1.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]]])
    got = with_present(CFG)(params, TEXT, present)
    for row, names in enumerate([("m", "n"), ("r",)]):
        want = jitted(delve.subset(CFG, params, names)[0])
        want = want(delve.subset(CFG, params, names)[1], TEXT[row : row + 1])[0]
        np.testing.assert_allclose(got[row : row + 1], want, rtol=0, atol=2e-5)


def test_absent_streams_give_no_nan_and_get_no_gradient_from_a_mixture(randomised):
    cfg = FORMS["J=K"]
    params = randomised(cfg, 2)
    present = jnp.array([[[1.0, 0.0, 1.0]]] * 2)

    def nll(params):
        return -with_present(cfg)(params, TEXT, present)[:, :, 0].mean()

    grads = jax.grad(nll)(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert not np.asarray(grads["streams"]["r"]["head"]["kernel"]).any()
    assert np.asarray(grads["streams"]["m"]["head"]["kernel"]).any()


@pytest.mark.parametrize("depths", [(2, 2, 2), (2, 3, 2)], ids=["scanned", "uneven"])
def test_absent_streams_leave_the_others_in_16_bits(depths):
    streams = [(n, dataclasses.replace(s, n_layers=d))
               for (n, s), d in zip(STREAMS, depths, strict=True)]  # fmt: skip
    cfg = dataclasses.replace(CFG, streams=tuple(streams))
    how, present = models.Compute(dtype="bfloat16"), jnp.ones((2, 1, 3))
    run = lambda p: delve.features(cfg, p, TEXT, how=how, present_BTK=present)[0]  # noqa: E731
    f = jax.eval_shape(run, models.abstract_params(cfg))
    assert {a.dtype.name for a in f.values()} == {"bfloat16"}


def test_a_subset_whose_static_weights_are_all_zero_shares_the_temperature(randomised):
    params = randomised(CFG, 3)
    params["pool"] = {"a": jnp.array([0.0, 1.2, 0.0])}
    _, kept = delve.subset(CFG, params, ("m", "n"))
    np.testing.assert_allclose(kept["pool"]["a"], [0.6, 0.6], rtol=1e-6)


def test_unknown_and_no_streams_are_named(randomised):
    params = randomised(CFG, 3)
    for names, said in ((("x",), "--streams x: the streams are m, r, n"), ((), "at least one")):
        with pytest.raises(DelveError, match=said):
            delve.subset(CFG, params, names)


def test_connectors_by_hand(randomised):
    """One joint in float64: hub hears all, cross the others, self only itself."""
    r = np.random.default_rng(4)
    h = {n: r.normal(size=(2, 3, s.d_model)) for n, s in STREAMS}
    shape = lambda n, *s: r.normal(size=s)  # noqa: E731
    p = {n: {"a": shape(n, s.d_model, 4), "b": shape(n, 4, s.d_model), "g": shape(n, 4),
             "sigma": abs(r.normal())} for n, s in STREAMS}  # fmt: skip
    rms = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
    said = {n: rms(h[n]) @ p[n]["a"] for n in h}
    for kind, hears in (
        ("hub", lambda n: sum(said.values())),
        ("cross", lambda n: sum(z for q, z in said.items() if q != n)),
        ("self", lambda n: said[n]),
    ):
        cfg = dataclasses.replace(CFG, connectors=kind)
        f32 = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))
        got = delve.hub(cfg, f32(p), f32(h))
        for n in h:
            want = h[n] + p[n]["sigma"] * ((p[n]["g"] * hears(n)) @ p[n]["b"])
            np.testing.assert_allclose(got[n], want, rtol=0, atol=1e-4)


def test_without_connectors_there_are_no_joints_between_the_streams(randomised):
    cfg = dataclasses.replace(CFG, connectors="none")
    assert "hub" not in models.abstract_params(cfg)
    params = randomised(CFG, 5)
    still = params | {"hub": jax.tree.map(jnp.zeros_like, params["hub"])}
    bare = {k: v for k, v in params.items() if k != "hub"}
    np.testing.assert_allclose(
        jitted(cfg)(bare, TEXT)[0], jitted(CFG)(still, TEXT)[0], rtol=1e-6, atol=1e-5
    )


def test_two_latents_are_a_mixture_of_two_pools(randomised):
    """Against float64 from the streams' own logits, the gate written again."""

    def soft(z):
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    cfg = FORMS["J=2"]
    params = randomised(cfg, 6)
    f, _ = jax.jit(functools.partial(delve.features, cfg))(params, TEXT)
    ell = np.stack([np.asarray(x, np.float64) for x in delve.stream_logits(cfg, params, f)], -2)
    rms = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
    g = jax.tree.map(lambda a: np.asarray(a, np.float64), params["gate"])
    x = [rms(np.asarray(f[n], np.float64)) @ g["p"][n] for n in cfg.names]
    x = np.concatenate(x, -1) @ g["w1"]
    delta = (x / (1 + np.exp(-x))) @ g["w2"]
    assert delta.shape == (2, T, 5)  # three streams, two latents
    a = np.asarray(params["pool"]["a"]) * np.exp(2 * np.tanh(delta[..., None, :3] / 2))
    pi = soft(np.asarray(params["pool"]["log_pi"]) + delta[..., 3:])
    want = np.log(sum(np.exp(pi[..., j, None] + soft(np.einsum("btk,btkv->btv", a[..., j, :], ell)))
                      for j in range(2)))  # fmt: skip
    np.testing.assert_allclose(jitted(cfg)(params, TEXT)[0], want, rtol=0, atol=1e-4)


# ---- elastic ranks -------------------------------------------------------------------------------

RANKS = {
    "m": (("in_proj", (6, 9)), ("out_proj", (5, 5))),
    "r": (("att/key", (4, 8)), ("ffn/value", (10, 3))),
    "n": (("att/qkv", (9, 9)), ("mlp/down", (2, 7))),
}
ELASTIC = dataclasses.replace(
    CFG, codes=("embed", "head"),
    streams=tuple((n, dataclasses.replace(s, ranks=RANKS[n] + CODES)) for n, s in STREAMS),
)  # fmt: skip


NESTED = {
    "m": (("in_proj", (6, 2)), ("out_proj", (0, 1)), ("embed", (3,)), ("head", (3,))),
    "r": (("att/key", (1, 8)), ("ffn/value", (3, 3)), ("embed", (3,)), ("head", (3,))),
    "n": (("att/qkv", (2, 5)), ("neurons", (11, 3)), ("embed", (3,)), ("head", (3,))),
}


def nested():
    """ELASTIC with sizes of its own at half, and one MLP that is pruned."""
    streams = {n: dataclasses.replace(s, nested=NESTED[n]) for n, s in ELASTIC.streams}
    n = streams["n"]
    ranks = tuple((name, r) for name, r in n.ranks if not name.startswith("mlp/"))
    streams["n"] = dataclasses.replace(n, ranks=ranks, neurons=(30, 17), d_ffn=30)
    return dataclasses.replace(ELASTIC, streams=tuple(streams.items()))


def trimmed(cfg, params):
    """Zeros beyond each layer's own rank, as factored checkpoints have them."""
    return elastic.masked(cfg, params, jnp.float32(1.0)) if cfg.family != "delve" else {
        **params,
        "streams": {n: elastic._tidy(s, params["streams"][n], cfg.codes) for n, s in cfg.streams},
    }  # fmt: skip


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_smaller_checkpoint_is_the_masked_one(share, randomised):
    """What rank-drop trains is what `--keep` loads, and the budget is kept."""
    params = trimmed(ELASTIC, randomised(ELASTIC, 7))
    small = elastic.config_at(ELASTIC, share)
    for (_, s), (_, old) in zip(small.streams, ELASTIC.streams, strict=True):
        for (_, ranks), (_, before) in zip(s.ranks, old.ranks, strict=True):
            assert ranks == tuple(max(1, int(np.ceil(share * r - 1e-6))) for r in before)
    got_cfg, cut = elastic.shrink(ELASTIC, params, models.count(small))
    assert models.count(got_cfg) <= models.count(small)
    shapes = jax.tree.map(jnp.shape, models.abstract_params(got_cfg))
    assert jax.tree.map(jnp.shape, cut) == shapes
    found = max(s for s in range(1, 1025)
                if elastic.config_at(ELASTIC, s / 1024) == got_cfg) / 1024  # fmt: skip
    masked = elastic.masked(ELASTIC, params, jnp.float32(found))
    np.testing.assert_allclose(
        jitted(got_cfg)(cut, TEXT)[0], jitted(ELASTIC)(masked, TEXT)[0], rtol=0, atol=1e-5
    )
    whole = np.asarray(jitted(ELASTIC)(params, TEXT)[0])
    moved = np.abs(np.asarray(jitted(got_cfg)(cut, TEXT)[0]) - whole).max()
    assert moved < 1e-5 if share == 1.0 else moved > 0.1


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_sizes_between_the_whole_and_the_half_that_is_named(share, randomised):
    """Ranks and neurons lie on lines; masked, cut out, cut twice: the same model."""
    cfg = nested()
    params = trimmed(cfg, randomised(cfg, 7))
    small = elastic.config_at(cfg, share)
    sizes = {n: dict(s.ranks) | {"neurons": s.neurons} for n, s in small.streams}
    at = {0.3: [(4, 2), (0, 1), (1, 5), (7, 2)], 0.5: [(6, 2), (0, 1), (1, 8), (11, 3)],
          0.75: [(6, 6), (3, 3), (3, 8), (21, 10)]}[share]  # fmt: skip
    got = [sizes["m"]["in_proj"], sizes["m"]["out_proj"], sizes["r"]["att/key"],
           sizes["n"]["neurons"]]  # fmt: skip
    assert got == at
    assert dict(small.streams)["n"].d_ffn == max(at[-1])
    masked = jitted(cfg)(elastic.masked(cfg, params, jnp.float32(share)), TEXT)[0]
    cut = elastic._cut(cfg, small, params)
    np.testing.assert_allclose(jitted(small)(cut, TEXT)[0], masked, rtol=0, atol=1e-5)
    if share == 0.5:  # what is cut out says its own half
        again = elastic.config_at(small, 0.5)
        assert [s.ranks for _, s in again.streams] == [
            s.ranks for _, s in elastic.config_at(cfg, 0.25).streams
        ]
        assert config.from_json(config.to_json(small)) == small
        for wrong in ([3], [3, 99], [-1, 2]):
            data = config.to_json(small)
            data["streams"][0]["nested"]["in_proj"] = wrong
            with pytest.raises(
                DelveError, match="x.json: field 'nested' gives 'in_proj' the sizes"
            ):
                config.from_json(data, "x.json")


def test_what_is_masked_gets_no_gradient(randomised):
    params = trimmed(ELASTIC, randomised(ELASTIC, 8))

    def loss(p):
        return jnp.sin(jitted(ELASTIC)(elastic.masked(ELASTIC, p, jnp.float32(0.5)), TEXT)[0]).sum()

    grads = jax.grad(loss)(params)
    g = grads["streams"]["n"]["layers"]["att"]["qkv"]
    assert not g["v"][:, :, 5:].any() and not g["u"][:, 5:].any()  # ceil(9 / 2)
    assert g["v"][:, :, :5].any() and g["u"][:, :5].any()
    long = grads["codes"]["head"]["u"]
    assert not long[5:].any() and long[:5].any()


def test_rank_drop_trains_the_whole_and_a_smaller_model(randomised):
    params = trimmed(ELASTIC, randomised(ELASTIC, 8))
    plain = jax.jit(jax.value_and_grad(objective.healing(ELASTIC), has_aux=True))
    both = objective.healing(ELASTIC, terms=objective.Terms(rank_drop=0.3), seed=4)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(both, has_aux=True))(params, (), TEXT, 2)
    share = jnp.float32(0.3)
    (whole, said), g = plain(params, (), TEXT)
    (small, _), g_small = plain(elastic.masked(ELASTIC, params, share), (), TEXT)
    assert small != pytest.approx(float(whole), rel=1e-4)
    assert loss == pytest.approx(float(whole + 2 * small) / 3, rel=1e-5)
    assert metrics["nll"] == pytest.approx(float(said["nll"]), rel=1e-5)
    assert metrics["nll_cut"] == pytest.approx(float(small), rel=1e-5)
    g_small = elastic.masked(ELASTIC, g_small, share)  # what is cut gets no gradient
    for got, a, b in zip(*map(jax.tree.leaves, (grads, g, g_small)), strict=True):
        np.testing.assert_allclose(got, (a + 2 * b) / 3, rtol=0, atol=2e-6)


def test_what_cannot_be_smaller_says_so(randomised):
    with pytest.raises(DelveError, match="factored checkpoint in uv form"):
        elastic.shrink(CFG, randomised(CFG, 1), 100)
    least = models.count(elastic.config_at(ELASTIC, 1 / 1024))
    with pytest.raises(DelveError, match=f"the smallest ranks need {least:,}"):
        elastic.shrink(ELASTIC, randomised(ELASTIC, 1), least - 1)
    assert elastic.shrink(ELASTIC, {}, models.count(ELASTIC)) == (ELASTIC, {})


def test_a_single_compressed_parent_is_elastic_too(randomised):
    cfg = dataclasses.replace(STREAMS[2][1], ranks=RANKS["n"] + (("embed", (8,)),))
    params = elastic._tidy(cfg, randomised(cfg, 9), ("embed",))
    small = elastic.config_at(cfg, 0.5)
    got_cfg, cut = elastic.shrink(cfg, params, models.count(small))
    assert dict(got_cfg.ranks) == dict(small.ranks)
    masked = elastic.masked(cfg, params, jnp.float32(0.5))
    np.testing.assert_allclose(
        jitted(got_cfg)(cut, TEXT)[0], jitted(cfg)(masked, TEXT)[0], rtol=0, atol=1e-5
    )
