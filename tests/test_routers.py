"""Routers: a token may do without a superblock's stateless sub-layers (hybrid.md §10)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delve_jax import checkpoint, lm, models
from delve_jax.config import DelveConfig, DelveError, MambaConfig, NeoxConfig, RwkvConfig
from delve_jax.fuse import joint_config
from delve_jax.models import delve
from delve_jax.parents.export import export_hf
from delve_jax.train import objective
from delve_jax.train.objective import Terms

V, T = 40, 12
both = {"vocab_size": V, "vocab_rows": V}
STREAMS = (
    ("m", MambaConfig(n_layers=2, d_model=24, d_inner=48, d_state=4, dt_rank=2, **both)),
    ("r", RwkvConfig(n_layers=2, d_model=16, d_att=16, d_ffn=48, **both)),
    ("n", NeoxConfig(n_layers=2, d_model=32, n_heads=2, d_ffn=64, parallel_residual=False, **both)),
)
CFG = DelveConfig(STREAMS, n_superblocks=2, connectors="hub", hub_rank=4, ffn_skip=0.9)
PLAIN = dataclasses.replace(CFG, ffn_skip=0.0)
TEXT = np.random.default_rng(0).integers(0, V, size=(2, T))


@functools.cache
def whole(cfg):
    """jit of params -> (logits, what was on the way)."""

    def run(params):
        f, _, way = delve.traced(cfg, params, TEXT)
        return delve.head(cfg, params, f), way

    return jax.jit(run)


def without_routers(params):
    keep = lambda p: {k: a for k, a in p.items() if not k.startswith("skip")}  # noqa: E731
    return params | {"hub": {n: keep(p) for n, p in params["hub"].items()}}


@pytest.fixture(scope="module")
def params(randomised):
    """Routers at work: of either kind of stream some tokens are spared and some are not."""
    out = randomised(CFG, 1)
    for n in ("r", "n"):
        out["hub"][n]["skip_c"] = jnp.zeros(1)
        out["hub"][n]["skip_v"] = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4)), "f")
    return out


def test_at_step_0_they_do_nothing(params):
    bare = without_routers(params)
    fresh = delve.init_joints(CFG, jax.random.key(0))["hub"]
    assert {n for n, p in fresh.items() if "skip_v" in p} == {"r", "n"}  # mamba has no FFN
    routed = {n: p | {k: fresh[n][k] for k in fresh[n] if k.startswith("skip")}
              for n, p in bare["hub"].items()}  # fmt: skip
    got, way = whole(CFG)(bare | {"hub": routed})
    np.testing.assert_allclose(got, whole(PLAIN)(bare)[0], rtol=1e-6, atol=2e-5)
    assert all((np.asarray(share_S) == 1).all() for share_S in way["ffn"].values())


def test_weights_by_hand(params):
    """2 sigmoid(z v + c), 0 below the threshold, at each stream's FFN behind the hub alone."""
    (_, before), (_, way) = whole(PLAIN)(without_routers(params)), whole(CFG)(params)
    h = {q: np.asarray(x[0], np.float64) for q, x in before["h"].items()}
    rms = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
    hub = jax.tree.map(lambda a: np.asarray(a[0], np.float64), params["hub"])
    z = sum(rms(h[q]) @ hub[q]["a"] for q in h)
    for n, sub in STREAMS[1:]:
        m = 2 / (1 + np.exp(-(z @ hub[n]["skip_v"] + hub[n]["skip_c"])))
        share = (m >= 0.9).mean()
        p = jax.tree.map(lambda a: a[0], params["hub"][n])
        got, mean = delve.router(CFG, p, jnp.asarray(z, jnp.float32))
        np.testing.assert_allclose(got[..., 0], np.where(m >= 0.9, m, 0), rtol=0, atol=1e-5)
        assert float(mean) == pytest.approx(share) and 0.1 < share < 0.9
        share_S = way["ffn"][n]
        assert share_S[0] == 1 and float(share_S[1]) == pytest.approx(share, abs=1e-6)
        # the block itself: x + att, and then the weighted FFN
        layer = jax.tree.map(lambda a: a[1], params["streams"][n]["layers"])
        block, x = models.FAMILY[sub.family], jnp.asarray(h[n], jnp.float32)
        run = jax.jit(functools.partial(weighted, block, sub))
        ones, none, each = (run(layer, x, w) for w in (jnp.ones_like(got), 0 * got, got))
        np.testing.assert_allclose(each, none + got * (ones - none), rtol=0, atol=1e-4)
        assert np.abs(np.asarray(ones - none)).max() > 0.1


def weighted(family, sub, layer, x_BTD, weight_BT1):
    ctx = family.context(sub, x_BTD)[0] | {"ffn_BT1": weight_BT1}
    return family.Block(sub).apply({"params": layer}, x_BTD, None, ctx)[0]


def test_steps_equal_the_whole_text(params):
    """One token at a time takes the branch that computes nothing; the token shift is kept."""
    model, want = lm.LM(CFG, params), np.asarray(whole(CFG)(params)[0])
    state, parts = model.init_state(len(TEXT), T), []
    for t in range(T):
        logits, state = model.step(TEXT[:, t : t + 1], state)
        parts.append(np.asarray(logits))
    np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=0, atol=1e-4)


def test_heal_is_fined_for_the_share(params):
    """Loss: nll + the fine; its slope moves routers towards the share that was asked for."""
    rows = np.random.default_rng(1).integers(0, V, size=(2, T + 1))
    terms = Terms(ce=1.0, kl=0.0, ffn_share=0.2)
    loss, got = jax.jit(objective.healing(CFG, (), terms))(params, (), rows)
    fine = objective.FFN_WEIGHT * (float(got["ffn_share"]) - 0.2) ** 2
    assert float(loss) == pytest.approx(float(got["nll"]) + fine, rel=1e-5) and fine > 0.01
    z = jnp.asarray(np.random.default_rng(3).normal(size=(2, T, 4)), jnp.float32)
    p = {"skip_v": jnp.zeros(4), "skip_c": jnp.zeros(())}
    slope = jax.jit(jax.grad(lambda p: (delve.router(CFG, p, z)[1] - 0.2) ** 2))
    for _ in range(100):
        p = jax.tree.map(lambda a, g: a - 0.5 * g, p, slope(p))
    assert abs(float(delve.router(CFG, p, z)[1]) - 0.2) < 0.1


def test_subsets_keep_their_routers(params):
    cfg, kept = delve.subset(CFG, params, ("m", "n"))
    shapes = jax.tree.map(jnp.shape, models.abstract_params(cfg))
    assert jax.tree.map(jnp.shape, kept) == shapes and "skip_v" in kept["hub"]["n"]


def test_export_has_them(params, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    checkpoint.save(tmp_path / "c", CFG, params)
    assert export_hf(tmp_path / "c", tmp_path / "hf")["verified"]
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    want = np.asarray(whole(CFG)(params)[0])
    with torch.no_grad():
        got = hf(torch.tensor(TEXT)).logits.numpy()
        steps, cache = [], None
        for t in range(T):
            out = hf(torch.tensor(TEXT[:1, t : t + 1]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values if hasattr(out, "past_key_values") else out.cache
            steps.append(out.logits.numpy())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    np.testing.assert_allclose(
        np.concatenate(steps, 1), want[:1], rtol=0, atol=1e-4 * np.abs(want).max()
    )
    back, tree, _ = delve_of(tmp_path / "hf")
    assert back.ffn_skip == CFG.ffn_skip
    np.testing.assert_array_equal(tree["hub"]["n"]["skip_v"], params["hub"]["n"]["skip_v"])


def delve_of(path):
    from delve_jax.parents.delve import read_exported_delve

    return read_exported_delve(path)


def test_what_cannot_have_them_is_named():
    named = list(STREAMS)
    for kw, said in (({"ffn_skip": 1.0}, "--ffn-skip 1.0"), ({"ffn_skip": -0.1}, "--ffn-skip"),
                     ({"ffn_skip": 0.5, "connectors": "none"}, "there is none")):  # fmt: skip
        with pytest.raises(DelveError, match=said):
            joint_config(named, **kw)
    with pytest.raises(DelveError, match="--ffn-share 0"):
        Terms(ffn_share=0.0).checked()
    with pytest.raises(DelveError, match="has no routers"):
        objective.healing(PLAIN, (), Terms(ffn_share=0.5))
