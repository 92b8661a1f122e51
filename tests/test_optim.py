"""Schedules at every step; AdamH against float64 NumPy loops, its groups, norms, state, factors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh

from delve_jax import DelveError, checkpoint, models, parallel
from delve_jax.config import DelveConfig, MambaConfig, NeoxConfig, RwkvConfig
from delve_jax.train import optim
from delve_jax.train.loop import update_if

LR, ADAM_LR = 0.02, 0.003
SHARED = dict(vocab_size=11, vocab_rows=11, d_model=8)
MAMBA = MambaConfig(**SHARED, n_layers=2, d_inner=16, dt_rank=2, tie_embeddings=True)
RWKV = RwkvConfig(**SHARED, n_layers=2, d_att=8, d_ffn=16)
NEOX = NeoxConfig(
    **SHARED, n_layers=2, n_heads=2, d_ffn=16,
    ranks=(("embed", (3,)), ("head", (3,)), ("att/out", (3, 5)), ("mlp/up", (4, 2))),
)  # fmt: skip
DELVE = DelveConfig((("m", MAMBA), ("u", RWKV), ("x", NEOX)), 2, connectors="hub", hub_rank=2)


def flat(tree):
    return flatten_dict(tree, sep="/")


def nest(tree):
    return unflatten_dict(tree, sep="/")


# ---- schedules -----------------------------------------------------------------------------------


def delphi(k, N):
    w, d = int(0.1 * N), int(0.2 * N)
    stable = N - w - d
    if k < w:
        return k / w
    return 1.0 if k < w + stable else 1 - (k - w - stable) / d


def half_cosine(k, N):
    w = int(0.1 * N)
    return k / w if k < w else 0.1 + 0.9 * (1 + math.cos(math.pi * (k - w) / (N - w))) / 2


def straight(k, N):
    w = int(0.1 * N)
    return k / w if k < w else 1 - (k - w) / (N - w)


@pytest.mark.parametrize("N", [37335, 1000, 37, 4, 1])
@pytest.mark.parametrize(
    "make, want", [(optim.wsd, delphi), (optim.cosine, half_cosine), (optim.linear, straight)]
)
def test_schedules_at_every_step(make, want, N):
    rate = make(3e-3, N)
    got = np.asarray(rate(jnp.arange(N + 3)), np.float64)
    np.testing.assert_allclose(got[:N], [3e-3 * want(k, N) for k in range(N)], rtol=2e-6, atol=1e-9)
    assert float(rate(N // 2)) == pytest.approx(float(got[N // 2]), rel=1e-6)
    # a run that goes on past its schedule: nothing negative, nothing that rises again
    if make is optim.cosine:
        np.testing.assert_allclose(got[N:], 3e-4, rtol=1e-6)
    elif N >= 5:
        assert not got[N:].any()


def test_wsd_of_delphi():
    rate = optim.wsd(1.0, 37335)
    w, d = 3733, 7467
    assert float(rate(0)) == 0 and float(rate(1)) == pytest.approx(1 / w)
    assert float(rate(w - 1)) < 1 == float(rate(w)) == float(rate(37335 - d))
    assert float(rate(37335 - d + 1)) < 1
    assert float(rate(37334)) == pytest.approx(1 / d, rel=1e-6)
    with pytest.raises(DelveError, match="warmup 0.7 and decay 0.5"):
        optim.wsd(1.0, 100, warmup=0.7, decay=0.5)


# ---- groups --------------------------------------------------------------------------------------

FAMILIES = {
    "mamba": (MAMBA, {
        "adamh": {"layers/in_proj/kernel", "layers/x_proj/kernel", "layers/dt_proj/kernel",
                  "layers/out_proj/kernel"},
        "factor": set(),
        "adam": {"embed/kernel", "norm_f/scale", "layers/norm/scale", "layers/conv/kernel",
                 "layers/conv/bias", "layers/dt_proj/bias", "layers/A_log", "layers/D"},
    }),
    "rwkv": (RWKV, {
        "adamh": {"head/kernel", *(f"layers/att/{n}/kernel" for n in
                                   ("key", "value", "receptance", "output")),
                  *(f"layers/ffn/{n}/kernel" for n in ("key", "value", "receptance"))},
        "factor": set(),
        "adam": {"embed/kernel", "norm_f/scale", "norm_f/bias", "ln0/scale", "ln0/bias",
                 "layers/ln1/scale", "layers/ln1/bias", "layers/ln2/scale", "layers/ln2/bias",
                 *(f"layers/att/{n}" for n in
                   ("time_decay", "time_first", "mix_k", "mix_v", "mix_r")),
                 "layers/ffn/mix_k", "layers/ffn/mix_r"},
    }),
    "neox": (NEOX, {
        "adamh": {"layers/att/qkv/kernel", "layers/mlp/down/kernel"},
        "factor": {"head/v", "head/u", "layers/att/out/v", "layers/att/out/u", "layers/mlp/up/v",
                   "layers/mlp/up/u"},
        "adam": {"embed/v", "embed/u", "norm_f/scale", "norm_f/bias",
                 "layers/ln1/scale", "layers/ln1/bias", "layers/ln2/scale", "layers/ln2/bias",
                 *(f"layers/{n}/bias" for n in ("att/qkv", "att/out", "mlp/up", "mlp/down"))},
    }),
}  # fmt: skip
JOINTS = {
    "pool/a", "gate/w1", "gate/w2",
    *(f"gate/p/{n}" for n in "mux"),  # one stream is called "u", as a factor is
    *(f"hub/{n}/{leaf}" for n in "mux" for leaf in ("a", "b", "g", "sigma")),
}  # fmt: skip


def by_group(cfg):
    labels = flat(optim.groups(models.abstract_params(cfg)))
    return {g: {p for p, label in labels.items() if label == g} for g in set(labels.values())}


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_of_a_family(name):
    cfg, want = FAMILIES[name]
    assert by_group(cfg) == {g: paths for g, paths in want.items() if paths}


def test_groups_of_a_delve():
    want = {g: set() for g in ("adamh", "factor", "adam")}
    for stream, name in (("m", "mamba"), ("u", "rwkv"), ("x", "neox")):
        for g, paths in FAMILIES[name][1].items():
            want[g] |= {f"streams/{stream}/{p}" for p in paths}
    want["adam"] |= JOINTS
    assert by_group(DELVE) == want
    assert optim.layer_axes("streams/layers/head/kernel") == 0  # a stream may have any name
    assert optim.layer_axes("streams/embed/layers/att/key/kernel") == 1
    assert optim.group_of("streams/embed/layers/att/key/kernel") == "adamh"


def test_groups_of_names_to_come():
    """Separate q, k, v maps (one of them called v, as a factor is) and a gated MLP."""
    maps = [f"layers/att/{n}" for n in "qkvo"] + [f"layers/mlp/{n}" for n in ("gate", "up", "down")]
    assert {optim.group_of(f"{m}/kernel") for m in maps} == {"adamh"}
    assert {optim.group_of(f"{m}/{f}") for m in maps for f in "uv"} == {"factor"}
    rest = ("layers/att/q_norm/scale", "layers/att/q/bias", "embed/kernel", "layers/conv/kernel")
    assert {optim.group_of(p) for p in rest} == {"adam"}


# ---- AdamH against NumPy -------------------------------------------------------------------------

# path -> (shape, leading layer axes of a constrained matrix or None)
LEAVES = {
    "embed/kernel": ((11, 4), None),
    "head/kernel": ((4, 11), 0),
    "norm_f/scale": ((4,), None),
    "layers/att/q/kernel": ((3, 4, 2, 2), 1),  # [L, D, H, h]: one norm over D, H and h
    "layers/att/q/bias": ((3, 4), None),
    "layers/att/out/v": ((3, 4, 2), 1),
    "layers/att/out/u": ((3, 2, 4), 1),
    "layers/conv/kernel": ((3, 2, 4), None),
    "layers/mlp/up/kernel": ((3, 4, 6), 1),  # layer 1 is all zero
}
B1, B2, EPS, CLIP = 0.9, 0.9999, 1.85e-8, 0.1


def case(steps):
    """Parameters and gradients, float64; the two groups' gradients differ by 1000 in size."""
    rng = np.random.default_rng(0)
    w = {p: rng.normal(size=shape) for p, (shape, _) in LEAVES.items()}
    w["layers/mlp/up/kernel"][1] = 0
    size = {p: 1e-3 if lead is None else 1.0 for p, (_, lead) in LEAVES.items()}
    g = [{p: size[p] * rng.normal(size=s) for p, (s, _) in LEAVES.items()} for _ in range(steps)]
    return w, g


def rates(k):
    return LR * min(1, k / 5), ADAM_LR * min(1, k / 5)


def reference(w, gradients, factored):
    """AdamH by explicit loops over steps, parameters and layers (delphi.md §3)."""
    w = {p: x.copy() for p, x in w.items()}
    m, v = ({p: np.zeros_like(x) for p, x in w.items()} for _ in range(2))
    radius = {}
    ball = {p: lead for p, (_, lead) in LEAVES.items() if lead is not None}
    if factored == "adam":
        ball = {p: lead for p, lead in ball.items() if p[-2:] not in ("/u", "/v")}
    cuts = {p: range(3) if lead else [...] for p, lead in ball.items()}
    zero = {(p, i) for p in ball for i in cuts[p] if not w[p][i].any()}
    assert zero == {("layers/mlp/up/kernel", 1)}
    for k, g in enumerate(gradients):
        lr, adam_lr = rates(k)
        for group in (set(ball), set(w) - set(ball)):
            norm = math.sqrt(sum((g[p] ** 2).sum() for p in group))
            g = g | {p: g[p] * min(1, CLIP / norm) for p in group}
        for p in w:
            m[p] = B1 * m[p] + (1 - B1) * g[p]
            v[p] = B2 * v[p] + (1 - B2) * g[p] ** 2
            u = m[p] / (1 - B1 ** (k + 1)) / (np.sqrt(v[p] / (1 - B2 ** (k + 1))) + EPS)
            if p not in ball:
                w[p] -= adam_lr * u
                continue
            for i in cuts[p]:
                old = w[p][i].copy()
                if (p, i) in zero:
                    w[p][i] = old - adam_lr * u[i]
                    continue
                norm = np.sqrt((old**2).sum())
                new = old - lr * u[i] * norm / max(np.sqrt((u[i] ** 2).sum()), 1e-10)
                w[p][i] = new * norm / max(np.sqrt((new**2).sum()), 1e-10)
                if factored == "scaled" and p.endswith("/u"):
                    slope = (g[p][i] * old).sum()
                    a, b = radius.get((p, i), (0.0, 0.0))
                    a, b = B1 * a + (1 - B1) * slope, B2 * b + (1 - B2) * slope**2
                    radius[p, i] = a, b
                    a, b = a / (1 - B1 ** (k + 1)), b / (1 - B2 ** (k + 1))
                    w[p][i] *= np.exp(-adam_lr * a / (np.sqrt(b) + EPS))
    return w


def optimised(w, gradients, factored, dtype):
    cast = lambda tree: nest({p: jnp.asarray(x, dtype) for p, x in tree.items()})  # noqa: E731
    ramp = lambda peak: lambda k: peak * jnp.minimum(1.0, jnp.asarray(k, float) / 5)  # noqa: E731
    opt = optim.adamh(ramp(LR), ramp(ADAM_LR), factored=factored)
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *[cast(g) for g in gradients])

    def step(carry, g):
        updates, state = opt.update(g, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    @jax.jit
    def run(params, gradients):
        return jax.lax.scan(step, (params, opt.init(params)), gradients)[0]

    params, state = run(cast(w), stacked)
    assert all(x.dtype == dtype for x in jax.tree.leaves((params, state.mu, state.nu)))
    return flat(params), state


@pytest.mark.parametrize("factored", optim.FACTORED)
def test_adamh_against_numpy(factored):
    w, g = case(30)
    want = reference(w, g, factored)
    got, state = optimised(w, g, factored, jnp.float32)
    for p in w:
        assert np.abs(want[p] - w[p]).max() > 1e-3, p  # it moved
        assert np.abs(got[p] - want[p]).max() <= 1e-6 * np.abs(want[p]).max(), p
    assert int(state.count) == 30
    with jax.enable_x64(True):
        got, _ = optimised(w, g, factored, jnp.float64)
        for p in w:
            assert np.abs(got[p] - want[p]).max() <= 1e-12 * np.abs(want[p]).max(), p


def lengths(x, lead):
    return np.sqrt((np.asarray(x, np.float64) ** 2).sum(axis=tuple(range(lead, x.ndim))))


def test_norms_are_kept_for_1000_steps():
    w, _ = case(1)
    params = nest({p: jnp.asarray(x, jnp.float32) for p, x in w.items()})
    opt = optim.adamh(lambda k: LR, lambda k: ADAM_LR, factored="sphere")

    def step(carry, key):
        params, state = carry
        keys = iter(jax.random.split(key, len(LEAVES)))
        # a pull that is felt: against the weights themselves, and noise
        g = jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape), params)
        updates, state = opt.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda c, keys: jax.lax.scan(step, c, keys)[0])
    params, state = run((params, opt.init(params)), jax.random.split(jax.random.key(0), 1000))
    got = flat(params)
    for p, (_, lead) in LEAVES.items():
        assert np.isfinite(got[p]).all()
        if lead is not None:
            keep = lengths(w[p], lead) > 0
            drift = np.abs(lengths(got[p], lead)[keep] / lengths(w[p], lead)[keep] - 1)
            assert drift.max() <= 1e-5, (p, drift)
            turned = (np.asarray(got[p]) * w[p]).sum() / (w[p] ** 2).sum()
            assert turned < 0.9, p
    free = flat(state.free)
    assert free["layers/mlp/up/kernel"].tolist() == [False, True, False]
    assert lengths(got["layers/mlp/up/kernel"], 1)[1] > 0.01


def test_the_step_is_the_angle():
    rng = np.random.default_rng(0)
    w, u = rng.normal(size=(2, 3, 4, 2, 2))
    u -= w * ((u * w).sum((1, 2, 3)) / (w * w).sum((1, 2, 3)))[:, None, None, None]
    for lr in (0.5, 0.01):
        new = np.asarray(optim.hyperball(jnp.array(w), jnp.array(100 * u), lr, 1), np.float64)
        cosine = (new * w).sum((1, 2, 3)) / lengths(w, 1) / lengths(new, 1)
        sine = np.sqrt(((new - w * cosine[:, None, None, None]) ** 2).sum((1, 2, 3)))
        np.testing.assert_allclose(sine / cosine / lengths(w, 1), lr, rtol=1e-5)
    along = optim.hyperball(jnp.array(w), jnp.array(w), 0.5, 1)
    np.testing.assert_allclose(along, w, rtol=1e-6)


def run_steps(opt, params, gradients):
    @jax.jit
    def step(g, state, params):
        updates, state = opt.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(opt.init)(params)
    for g in gradients:
        params, state = step(g, state, params)
    return params, state


def test_stacked_equals_unstacked():
    rng = np.random.default_rng(0)
    w, *g = rng.normal(size=(4, 3, 4, 6)).astype(np.float32)
    g = [x * np.float32([0.01, 1, 100])[:, None, None] for x in g]
    opt = optim.adamh(lambda k: LR, lambda k: ADAM_LR)
    stack = lambda x: {"layers": {"mlp": {"up": {"kernel": x}}}}  # noqa: E731
    parts = lambda x: {f"mlp{i}": {"up": {"kernel": x[i]}} for i in range(3)}  # noqa: E731
    one, _ = run_steps(opt, stack(w), [stack(x) for x in g])
    many, _ = run_steps(opt, parts(w), [parts(x) for x in g])
    for i in range(3):
        np.testing.assert_allclose(
            one["layers"]["mlp"]["up"]["kernel"][i], many[f"mlp{i}"]["up"]["kernel"], rtol=2e-6
        )
    # a matrix [3, 4, 6] that is not stacked has one norm: another step
    whole, _ = run_steps(opt, {"up": {"kernel": w}}, [{"up": {"kernel": x}} for x in g])
    assert np.abs(whole["up"]["kernel"] - one["layers"]["mlp"]["up"]["kernel"]).max() > 1e-3


def test_each_group_has_its_own_clip():
    w, (g,) = case(1)
    opt = optim.adamh(lambda k: LR, lambda k: ADAM_LR, factored="sphere")
    params, grads = (nest({p: jnp.asarray(x, jnp.float32) for p, x in t.items()}) for t in (w, g))
    mu = flat(run_steps(opt, params, [grads])[1].mu)
    for inside, bound in ((True, CLIP), (False, None)):
        group = [p for p, (_, lead) in LEAVES.items() if (lead is not None) == inside]
        norm = math.sqrt(sum((g[p] ** 2).sum() for p in group))
        assert norm > 10 * CLIP if inside else norm < CLIP
        for p in group:
            want = (1 - B1) * g[p] * (bound / norm if bound else 1)
            np.testing.assert_allclose(mu[p], want, rtol=1e-5, atol=1e-12)


def test_bfloat16_keeps_float32_moments():
    w, g = case(20)
    half = [nest({p: jnp.asarray(x, jnp.bfloat16) for p, x in t.items()}) for t in (w, *g)]
    opt = optim.adamh(lambda k: LR, lambda k: ADAM_LR, factored="scaled")
    params, state = run_steps(opt, half[0], half[1:])
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    moments = jax.tree.leaves((state.mu, state.nu, state.radius_mu, state.radius_nu))
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(params))
    assert np.abs(flat(state.nu)["embed/kernel"]).max() < 1e-6  # 1e-10 a step: bf16 would hold it
    assert len(jax.tree.leaves(state.radius_mu)) == 1


def test_no_gradient_no_harm():
    """Zero gradients, also of an all-zero matrix: nothing moves, nothing is NaN."""
    w, _ = case(1)
    params = nest({p: jnp.asarray(x, jnp.float32) for p, x in w.items()})
    zero = jax.tree.map(jnp.zeros_like, params)
    for factored in optim.FACTORED:
        opt = optim.adamh(lambda k: LR, lambda k: ADAM_LR, factored=factored)
        got, _ = run_steps(opt, params, [zero, zero])
        for p, x in flat(got).items():
            np.testing.assert_allclose(x, w[p], rtol=1e-6, err_msg=p)


# ---- factored maps -------------------------------------------------------------------------------

RANKS = (2, 3, 0)  # of 3: a map padded in two layers, in one of them wholly


def factored_problem():
    """Regression on a map [3 layers, 5, 4] whose product must double: loss(params)."""
    rng = np.random.default_rng(0)
    v, u = rng.normal(size=(3, 5, 3)), rng.normal(size=(3, 3, 4))
    for layer, r in enumerate(RANKS):
        v[layer, :, r:] = u[layer, r:] = 0
    x = rng.normal(size=(3, 16, 5))
    y = 2 * x @ v @ u
    leaf = {"v": jnp.array(v, jnp.float32), "u": jnp.array(u, jnp.float32)}
    x, y = jnp.array(x, jnp.float32), jnp.array(y, jnp.float32)

    def loss(params):
        p = params["layers"]["att"]["out"]
        return ((x @ p["v"] @ p["u"] - y) ** 2).mean()

    return {"layers": {"att": {"out": leaf}}}, loss


def train(opt, params, loss, steps):
    def step(carry, _):
        updates, state = opt.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, opt.init(p)), length=steps)[0][0])
    return run(params)["layers"]["att"]["out"]


@pytest.mark.parametrize("how", [*optim.FACTORED, "adamw"])
def test_padding_of_unequal_ranks_stays_zero(how):
    params, loss = factored_problem()
    rate = lambda k: 0.01  # noqa: E731
    opt = optim.adamw(rate) if how == "adamw" else optim.adamh(rate, rate, factored=how)
    old, new = params["layers"]["att"]["out"], train(opt, params, loss, 200)
    for layer, r in enumerate(RANKS):
        assert not np.asarray(new["v"][layer, :, r:]).any()
        assert not np.asarray(new["u"][layer, r:]).any()
    for name in "vu":
        moved = np.abs(new[name] - old[name]).max(axis=(1, 2))
        assert (moved > 0.01).tolist() == [True, True, False]
        ratio = lengths(new[name], 1)[:2] / lengths(old[name], 1)[:2]
        kept = how == "sphere" or (how == "scaled" and name == "v")
        assert (np.abs(ratio - 1) < 1e-5).all() == kept
    after = float(loss({"layers": {"att": {"out": new}}}))
    # the product must grow: only a sphere forbids it
    assert (after < 0.05 * float(loss(params))) == (how != "sphere")


def test_both_factors_have_the_same_radial_gradient():
    """Why one learned radius a pair is enough."""
    params, loss = factored_problem()
    p, g = params["layers"]["att"]["out"], jax.grad(loss)(params)["layers"]["att"]["out"]
    v, u = ((p[n] * g[n]).sum((1, 2)) for n in "vu")
    np.testing.assert_allclose(v, u, rtol=1e-4)
    assert np.abs(v[:2]).min() > 0.1


def test_unknown_treatment():
    with pytest.raises(DelveError, match="factored ball: choose one of adam, sphere, scaled"):
        optim.adamh(lambda k: LR, lambda k: LR, factored="ball")


# ---- state and AdamW -----------------------------------------------------------------------------


def test_state_is_placed_like_the_parameters():
    sizes = {"data": 4, "model": 2}
    mesh = AbstractMesh(tuple(sizes.get(a, 1) for a in parallel.AXES), parallel.AXES)
    params = models.abstract_params(DELVE)
    opt = optim.adamh(lambda k: LR, lambda k: ADAM_LR, factored="scaled")
    state = jax.eval_shape(opt.init, params)
    want = {p: s.spec for p, s in flat(parallel.shardings(mesh, params)).items()}
    assert sum(any(spec) for spec in want.values()) > 20
    placed = parallel.shardings(mesh, state)
    for moments in (placed.mu, placed.nu):
        assert {p: s.spec for p, s in flat(moments).items()} == want
    for small in (placed.free, placed.radius_mu, placed.radius_nu):
        assert len(jax.tree.leaves(small)) > 2
        assert not any(any(s.spec) for s in jax.tree.leaves(small))
    # leaf paths end with the parameter's path: what the rules go by
    for keys, _ in jax.tree.leaves_with_path(state):
        path = parallel.path_of(keys)
        assert path == "count" or path.split("/", 1)[1] in want


@pytest.mark.parametrize("factored", ["sphere", "scaled"])
def test_state_is_saved_and_restored(factored, tmp_path):
    """Also trees that hold some leaves only, or none; no two arrays are alike."""
    w, _ = case(1)
    params = nest({p: jnp.asarray(x, jnp.float32) for p, x in w.items()})
    opt = optim.adamh(lambda k: LR, lambda k: ADAM_LR, factored=factored)
    state, count = jax.eval_shape(opt.init, params), iter(range(100))
    state = jax.tree.map(lambda x: jnp.asarray(np.full(x.shape, next(count), x.dtype)), state)
    assert bool(jax.tree.leaves(state.radius_mu)) == (factored == "scaled")
    steps = checkpoint.Steps(tmp_path)
    steps.save(2, {"opt": state})
    steps.wait()
    step, back = steps.restore(parallel.abstract(parallel.make_mesh(None), {"opt": state}))
    assert step == 2 and jax.tree.structure(back["opt"]) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back["opt"], state)


@pytest.mark.parametrize("size", [1e-3, 0.5, 30.0])
def test_clipping_is_that_of_optax(size):
    r = np.random.default_rng(0)
    grads = {"a": r.normal(size=(7, 3)), "b": {"c": r.normal(size=5)}}
    grads = jax.tree.map(lambda x: jnp.asarray(size * x, jnp.float32), grads)
    grads["b"]["c"] = grads["b"]["c"].astype(jnp.bfloat16)
    both = (clip.update(grads, clip.init(grads))[0]
            for clip in (optim.clipped(1.5), optax.clip_by_global_norm(1.5)))  # fmt: skip
    for got, want in zip(*map(jax.tree.leaves, both), strict=True):
        assert got.dtype == want.dtype
        rtol = 1e-6 if want.dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(np.float64(got), np.float64(want), rtol=rtol)
    nothing = jax.tree.map(jnp.zeros_like, grads)
    assert not any(np.any(np.float64(x)) for x in
                   jax.tree.leaves(optim.clipped(1.5).update(nothing, ())[0]))  # fmt: skip


@pytest.mark.parametrize("branch", [True, False])
def test_a_step_is_left_out_alike_by_a_branch_and_element_by_element(branch):
    """The one is for CPUs, the other for accelerators: update_if."""
    optimizer = optim.adamw(lambda _: 0.1)
    params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    old = {"params": params, "opt": optimizer.init(params)}

    def update(old, grads):
        updates, opt = optimizer.update(grads, old["opt"], old["params"])
        return {"params": optax.apply_updates(old["params"], updates), "opt": opt}

    step = jax.jit(lambda good, old, grads: update_if(good, update, old, grads, branch))
    for good, grad in ((True, 1.0), (False, np.nan), (False, 1.0), (True, -2.0)):
        grads = jax.tree.map(lambda a, g=grad: jnp.full_like(a, g), params)
        new, want = step(good, old, grads), update(old, grads) if good else old
        rtol = 1e-6 if good else 0
        for got, expected in zip(*map(jax.tree.leaves, (new, want)), strict=True):
            np.testing.assert_allclose(got, expected, rtol=rtol)
        old = new


def test_adamw_decays_kernels_and_factors_only():
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), models.abstract_params(NEOX)
    )
    opt = optim.adamw(lambda _: 1.0, weight_decay=0.5)
    zero = jax.tree.map(np.zeros_like, params)
    updates = jax.jit(lambda p, g: opt.update(g, opt.init(p), p)[0])(params, zero)
    decayed = {p for p, x in flat(updates).items() if np.asarray(x).any()}
    assert decayed == {p for p in flat(params) if p.rsplit("/", 1)[1] in ("kernel", "u", "v")}
    for p in decayed:
        np.testing.assert_allclose(flat(updates)[p], -0.5 * flat(params)[p], rtol=1e-6)
