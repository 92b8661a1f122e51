"""The two recurrences against their defining sums in float64, and every way of running them.

Values: each implementation against O(T^2) sums written from the definition (no recurrence).
Gradients: against central differences of those sums, and the implementations against each other.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delve_jax.models.scan import NEG, selective_scan, wkv

B, E, N, A = 2, 5, 3, 6
MAMBA = [("sequential", 8), ("fused", 8), ("chunked", 8), ("associative", 8)]
WKV = [("sequential", 8), ("chunked", 8)]
LENGTHS = [1, 8, 20]  # one token, one whole chunk, two chunks and a remainder


def mamba_inputs(T, seed=0):
    """u, dt, A, B, C, D, state of one random problem, float64."""
    r = np.random.default_rng(seed)
    return {
        "u_BTE": r.normal(size=(B, T, E)),
        "dt_BTE": np.exp(r.uniform(-5, 0.5, size=(B, T, E))),
        "A_EN": -np.exp(r.uniform(-1, 2, size=(E, N))),
        "B_BTN": r.normal(size=(B, T, N)),
        "C_BTN": r.normal(size=(B, T, N)),
        "D_E": r.normal(size=E),
        "state_BEN": r.normal(size=(B, E, N)),
    }


def mamba_sums(u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, state_BEN):
    """s_t = sum_{i<=t} exp(A (dt_{i+1} + .. + dt_t)) dt_i u_i B_i + exp(A (dt_0 + .. + dt_t)) s."""
    total = np.cumsum(dt_BTE, axis=1)
    y, s = np.zeros_like(u_BTE), state_BEN
    for t in range(u_BTE.shape[1]):
        s = np.exp(total[:, t, :, None] * A_EN) * state_BEN
        for i in range(t + 1):
            decay = np.exp((total[:, t] - total[:, i])[..., None] * A_EN)
            s = s + decay * (dt_BTE[:, i] * u_BTE[:, i])[..., None] * B_BTN[:, i, None]
        y[:, t] = (s * C_BTN[:, t, None]).sum(-1) + D_E * u_BTE[:, t]
    return y, s


def wkv_inputs(T, spread=1.0, seed=1):
    """k, v, w, u and a state of one random problem, float64; `spread` scales the keys."""
    r = np.random.default_rng(seed)
    return {
        "k_BTA": spread * r.normal(size=(B, T, A)),
        "v_BTA": r.normal(size=(B, T, A)),
        "w_A": -np.exp(r.uniform(-4, 1, size=A)),
        "u_A": r.normal(size=A),
        "a": r.normal(size=(B, A)),
        "b": np.exp(r.normal(size=(B, A))),
        "p": r.normal(size=(B, A)),
    }


def wkv_sums(k_BTA, v_BTA, w_A, u_A, a, b, p):
    """The quotient of sums of the definition; the state counts as one token of weight e^p b.

    Returns wkv and the last state as (a / b, p + log b): a, b, p alone have a common factor free.
    """
    T = k_BTA.shape[1]
    keys = [p + np.log(b)] + [k_BTA[:, i] for i in range(T)]
    values = [a / b] + [v_BTA[:, i] for i in range(T)]

    def mean(log_weights, values):
        log_weights = np.stack(log_weights)
        top = log_weights.max(0)
        weights = np.exp(log_weights - top)
        return (weights * np.stack(values)).sum(0) / weights.sum(0), top + np.log(weights.sum(0))

    y = np.zeros_like(v_BTA)
    for t in range(T):
        past = [key + w_A * (t - j) for j, key in enumerate(keys[: t + 1])]
        y[:, t] = mean([*past, u_A + k_BTA[:, t]], values[: t + 2])[0]
    ratio, log_b = mean([key + w_A * (T - j) for j, key in enumerate(keys)], values)
    return y, np.stack([ratio, log_b])


def run_mamba(inputs, impl, chunk, starts_BT=None):
    return selective_scan(**inputs, starts_BT=starts_BT, impl=impl, chunk=chunk)


def run_wkv(inputs, impl, chunk, starts_BT=None):
    inputs = dict(inputs)
    state = {name: inputs.pop(name) for name in "abp"}
    y, new = wkv(**inputs, state=state, starts_BT=starts_BT, impl=impl, chunk=chunk)
    return y, jnp.stack([new["a"] / new["b"], new["p"] + jnp.log(new["b"])])


RUN = {"mamba": run_mamba, "wkv": run_wkv}
SUMS = {"mamba": mamba_sums, "wkv": wkv_sums}
INPUTS = {"mamba": mamba_inputs, "wkv": wkv_inputs}
WAYS = [("mamba", *way) for way in MAMBA] + [("wkv", *way) for way in WKV]


def weights(outputs):
    """Fixed random weights that turn outputs into one scalar."""
    r = np.random.default_rng(7)
    return [r.normal(size=np.shape(o)) for o in outputs]


@functools.cache
def value_and_grad(name, impl, chunk):
    def loss(inputs, ws):
        outputs = RUN[name](inputs, impl, chunk)
        return sum(jnp.sum(o * w) for o, w in zip(outputs, ws, strict=True)), outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def evaluate(name, impl, chunk, inputs):
    """Outputs and gradients (of a random projection of them) in float32."""
    shapes = jax.eval_shape(lambda i: RUN[name](i, impl, chunk), to32(inputs))
    ws = to32(weights(shapes))
    (_, outputs), grads = value_and_grad(name, impl, chunk)(to32(inputs), ws)
    return outputs, grads


def to32(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def to64(tree):
    """The float64 copy of what the float32 run really saw."""
    return jax.tree.map(lambda a: np.asarray(jnp.asarray(a, jnp.float32), np.float64), tree)


def close(got, want, rtol):
    """Within rtol of the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * max(np.abs(want).max(), 1e-6))


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("name,impl,chunk", WAYS)
def test_value_equals_the_defining_sum(name, impl, chunk, T):
    inputs = INPUTS[name](T)
    outputs, _ = evaluate(name, impl, chunk, inputs)
    for got, want in zip(outputs, SUMS[name](**to64(inputs)), strict=True):
        close(got, want, 3e-6)


@pytest.mark.parametrize("name,impl,chunk", WAYS)
def test_gradient_of_every_input_is_the_slope_of_the_defining_sum(name, impl, chunk):
    inputs, eps = INPUTS[name](20), 1e-5
    _, grads = evaluate(name, impl, chunk, inputs)
    inputs, r = to64(inputs), np.random.default_rng(3)
    ws = to64(weights(SUMS[name](**inputs)))

    def loss(**changed):
        outputs = SUMS[name](**{**inputs, **changed})
        return sum((o * w).sum() for o, w in zip(outputs, ws, strict=True))

    for key, x in inputs.items():
        direction = r.normal(size=x.shape)
        plus, minus = (loss(**{key: x + side * eps * direction}) for side in (1, -1))
        got = (np.asarray(grads[key], np.float64) * direction).sum()
        scale = np.linalg.norm(grads[key]) * np.linalg.norm(direction) / x.size**0.5
        assert scale > 0, key
        assert abs(got - (plus - minus) / (2 * eps)) <= 2e-5 * scale, key


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("name,impl,chunk", [w for w in WAYS if w[1] != "sequential"])
def test_parallel_forms_equal_the_sequential_reference(name, impl, chunk, T):
    inputs = INPUTS[name](T, seed=5)
    outputs, grads = evaluate(name, impl, chunk, inputs)
    ref_outputs, ref_grads = evaluate(name, "sequential", 8, inputs)
    jax.tree.map(lambda a, b: close(a, b, 5e-6), (outputs, grads), (ref_outputs, ref_grads))


STARTS = [[8, 13], [0, 1, 19]]  # of each row: a chunk's first token, a row's, a row's last


@functools.cache
def each_alone(name):
    """Outputs and gradients of every document run by itself; only a row that does not start one
    (row 0 here) reads the state."""

    def run(inputs):
        rows, last = [], []
        for b, starts in enumerate(STARTS):
            cuts, parts = sorted({0, *starts, 20}), []
            for start, stop in itertools.pairwise(cuts):
                part = {
                    k: v[b : b + 1, start:stop] if v.ndim == 3 and k != "state_BEN"
                    else v[b : b + 1] if k in STATE[name] else v
                    for k, v in inputs.items()
                }  # fmt: skip
                if start in starts:
                    part |= EMPTY[name]
                out, state = RUN[name](part, "sequential", 8)
                parts.append(out)
            rows.append(jnp.concatenate(parts, axis=1))
            last.append(state)
        return jnp.concatenate(rows), jnp.concatenate(last, axis=0 if name == "mamba" else 1)

    return projected(run)


STATE = {"mamba": ("state_BEN",), "wkv": ("a", "b", "p")}
EMPTY = {
    "mamba": {"state_BEN": jnp.zeros((1, E, N))},
    "wkv": {"a": jnp.zeros((1, A)), "b": jnp.zeros((1, A)), "p": jnp.full((1, A), NEG)},
}


def projected(run):
    """inputs -> outputs and the gradient of a fixed random projection of them, jitted."""

    def loss(inputs):
        outputs = run(inputs)
        return sum(jnp.sum(o * w) for o, w in zip(outputs, weights(outputs), strict=True)), outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("name,impl,chunk", WAYS)
def test_documents_in_a_row_equal_documents_alone(name, impl, chunk):
    """Values, last state and gradients; nothing reaches the state before a first document."""
    inputs = to32(INPUTS[name](20, seed=9))
    starts_BT = np.zeros((B, 20), bool)
    for row, starts in zip(starts_BT, STARTS, strict=True):
        row[starts] = True
    run = projected(lambda i: RUN[name](i, impl, chunk, starts_BT=jnp.asarray(starts_BT)))
    (_, outputs), grads = run(inputs)
    (_, ref_outputs), ref_grads = each_alone(name)(inputs)
    jax.tree.map(lambda a, b: close(a, b, 5e-6), (outputs, grads), (ref_outputs, ref_grads))
    for key in STATE[name]:
        assert not np.asarray(grads[key])[1].any()  # row 1 starts with a document


@pytest.mark.parametrize("impl,chunk", WKV)
def test_wkv_of_extreme_keys(impl, chunk):
    """Keys of +-80: e^80 summed with e^-80 is beyond float32, only the running maximum survives.

    Log weights near 80 have a spacing of 7.6e-6, hence the wider tolerance.
    """
    inputs = wkv_inputs(20)
    inputs["k_BTA"] = 80.0 * np.sign(inputs["k_BTA"])
    outputs, grads = evaluate("wkv", impl, chunk, inputs)
    for got, want in zip(outputs, wkv_sums(**to64(inputs)), strict=True):
        close(got, want, 5e-5)
    _, ref = evaluate("wkv", "sequential", 8, inputs)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), grads, ref)


@pytest.mark.parametrize("name,impl,chunk", WAYS)
def test_state_continues_the_sequence(name, impl, chunk):
    """Pieces of 10, 1 and 9 tokens give the outputs and the last state of 20 at once."""
    inputs = to32(INPUTS[name](20))
    carried = ("state_BEN",) if name == "mamba" else ("a", "b", "p")
    fixed = {k: v for k, v in inputs.items() if k not in carried}
    fn = jax.jit(
        functools.partial(selective_scan if name == "mamba" else wkv, impl=impl, chunk=chunk)
    )
    key = "state_BEN" if name == "mamba" else "state"
    first = inputs["state_BEN"] if name == "mamba" else {n: inputs[n] for n in "abp"}
    y, last = fn(**fixed, **{key: first})
    pieces, state = [], first
    for start, stop in ((0, 10), (10, 11), (11, 20)):
        part = {k: v[:, start:stop] if v.ndim == 3 else v for k, v in fixed.items()}
        out, state = fn(**part, **{key: state})
        pieces.append(out)
    close(jnp.concatenate(pieces, axis=1), y, 3e-6)
    jax.tree.map(lambda a, b: close(a, b, 3e-6), state, last)


@pytest.mark.parametrize("impl,chunk", WKV)
def test_wkv_tokens_of_no_weight_leave_no_trace(impl, chunk):
    """Left padding is k = NEG, v = 0: the rest must not notice, in value or gradient."""
    inputs = to32(wkv_inputs(12))
    k, v, w, u = (inputs[name] for name in ("k_BTA", "v_BTA", "w_A", "u_A"))

    def loss(w, u, k, v):
        y = wkv(k, v, w, u, impl=impl, chunk=chunk)[0][:, -12:]
        return jnp.sum(jnp.sin(y)), y

    fn = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    pad = ((0, 0), (9, 0), (0, 0))
    padded = fn(w, u, jnp.pad(k, pad, constant_values=NEG), jnp.pad(v, pad))
    jax.tree.map(lambda a, b: close(a, b, 5e-6), padded, fn(w, u, k, v))


@pytest.mark.parametrize("name,impl,chunk", WAYS)
def test_bfloat16_in_and_out_with_a_float32_state(name, impl, chunk):
    """The state is kept in float32 whatever the inputs are, so long texts do not drift."""
    inputs = {k: jnp.asarray(v, jnp.bfloat16) for k, v in INPUTS[name](20).items()}
    if name == "mamba":
        args = {k: v for k, v in inputs.items() if k != "state_BEN"}
        fn, want = selective_scan, mamba_sums(**to64(args), state_BEN=np.zeros((B, E, N)))[0]
    else:
        args = {k: v for k, v in inputs.items() if k not in ("a", "b", "p")}
        zero = np.zeros((B, A))
        fn, want = wkv, wkv_sums(**to64(args), a=zero, b=zero + 1, p=zero - 1e9)[0]
    y, state = jax.jit(functools.partial(fn, impl=impl, chunk=chunk))(**args)
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
    close(y.astype(jnp.float32), want, 2**-8)


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="fast"):
        run_mamba(to32(mamba_inputs(3)), "fast", 8)
    with pytest.raises(ValueError, match="fast"):
        run_wkv(to32(wkv_inputs(3)), "fast", 8)
