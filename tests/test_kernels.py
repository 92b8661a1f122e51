"""The Pallas kernels (impl="pallas") against the sequential reference, in interpret mode.

What a machine without an accelerator can say: values, last states and gradients of every input,
what is kept for the backward pass, and that the kernels lower for a GPU and for a TPU. How fast
they are there: `experiments/benchmarks/scan_{tiles,peers}.py`.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from delve_jax.models import kernels, scan

B = 2
# T, channels, N (mamba), chunk, whether documents start inside: T is no multiple of the chunk,
# channels none of a block, N no power of two; then T shorter than a chunk, all else even. Chunks
# are short because interpret mode compiles every token of one.
CASES = {
    "mamba": [(7, 40, 3, 3, True), (2, 32, 16, None, False)],
    "wkv": [(7, 40, 0, 3, True), (2, 64, 0, None, False)],
}
ALL = [(name, case) for name, cases in CASES.items() for case in cases]


def arrays(name, T, E, N, dtype=np.float32):
    """The arguments of one random problem, a state among them."""
    r = np.random.default_rng(T)
    normal = lambda *s: r.normal(size=s)  # noqa: E731
    if name == "mamba":
        made = {
            "u_BTE": normal(B, T, E),
            "dt_BTE": np.exp(r.uniform(-5, 0.5, size=(B, T, E))),
            "A_EN": -np.exp(r.uniform(-1, 2, size=(E, N))),
            "B_BTN": normal(B, T, N),
            "C_BTN": normal(B, T, N),
            "D_E": normal(E),
            "state_BEN": normal(B, E, N),
        }
    else:
        made = {
            "k_BTA": normal(B, T, E),
            "v_BTA": normal(B, T, E),
            "w_A": -np.exp(r.uniform(-4, 1, size=E)),
            "u_A": normal(E),
            "state": {"a": normal(B, E), "b": np.exp(normal(B, E)), "p": normal(B, E)},
        }
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), made)


def starts(T):
    """Row 0 starts at tokens 3 (a chunk's first) and 5, row 1 at its first and at its last."""
    made = np.zeros((B, T), bool)
    made[0, [3, 5]] = made[1, [0, T - 1]] = True
    return jnp.asarray(made)


def projected(name, impl, chunk, starts_BT=None):
    """arguments -> (outputs, gradient of a fixed random projection of all of them), jitted."""
    fn = scan.selective_scan if name == "mamba" else scan.wkv

    def loss(args):
        outputs, r = fn(**args, starts_BT=starts_BT, impl=impl, chunk=chunk), np.random.default_rng
        leaves = jax.tree.leaves(outputs)
        return sum(jnp.sum(o * r(7).normal(size=o.shape)) for o in leaves), outputs

    grad = jax.grad(loss, has_aux=True)
    return jax.jit(lambda args: grad(args)[::-1])


def close(got, want, rtol=1e-5):
    """Within rtol of the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * max(np.abs(want).max(), 1e-6))


@pytest.mark.parametrize("name,case", ALL)
def test_values_states_and_all_gradients_are_the_reference(name, case):
    T, E, N, chunk, packed = case
    args, begin = arrays(name, T, E, N), starts(T) if packed else None
    got = projected(name, "pallas", chunk, begin)(args)
    want = projected(name, "sequential", 8, begin)(args)
    jax.tree.map(close, got, want)
    if packed:  # nothing of the state before a first document is read
        state = got[1]["state_BEN" if name == "mamba" else "state"]
        assert not any(np.asarray(leaf)[1].any() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_in_and_out_with_a_float32_state(name):
    """Both forms round the same float32 sums once; gradients come back in bfloat16."""
    args = arrays(name, 4, 32, 4, jnp.bfloat16)  # two whole chunks
    del args["state_BEN" if name == "mamba" else "state"]
    got = projected(name, "pallas", 2)(args)
    want = projected(name, "sequential", 2)(args)
    assert got[0][0].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(got[0][1])} == {jnp.dtype("float32")}
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, want)
    jax.tree.map(lambda a, b: close(a, b, 2**-7), got, want)


def test_a_model_gives_dt_in_float32():
    """Beside 16-bit rows: dt is not rounded, its gradient neither."""
    args = arrays("mamba", 4, 32, 4, jnp.bfloat16)
    args["dt_BTE"] = arrays("mamba", 4, 32, 4)["dt_BTE"]
    del args["state_BEN"]
    got, want = (projected("mamba", impl, 2)(args) for impl in ("pallas", "sequential"))
    assert got[1]["dt_BTE"].dtype == jnp.float32
    close(got[0][1], want[0][1])  # the last state is float32: a rounded dt would show in it
    close(got[1]["dt_BTE"], want[1]["dt_BTE"], 1e-3)


def test_wkv_of_extreme_keys():
    """Keys of +-80 and a key of no weight at all: only the running maximum survives."""
    args = arrays("wkv", 3, 32, 0)
    args["k_BTA"] = (80.0 * jnp.sign(args["k_BTA"])).at[:, 0].set(scan.NEG)
    outputs, grads = projected("wkv", "pallas", 2)(args)
    want_outputs, want_grads = projected("wkv", "sequential", 2)(args)
    jax.tree.map(close, outputs, want_outputs)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), grads, want_grads)


def sizes(jaxpr):
    """Numbers in every array of a program, those inside of kernels (registers) left out."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        if eqn.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(eqn.params):
                yield from sizes(inner)


@pytest.mark.parametrize("impl", ["pallas", "sequential"])
def test_memory_never_holds_a_state_for_every_token(impl):
    """The sequential form does while it differentiates a chunk of all T: the count would see it."""
    T, E, N = 64, 32, 16
    args = arrays("mamba", T, E, N)
    fn = projected("mamba", impl, 8 if impl == "pallas" else T)
    largest = max(sizes(jax.make_jaxpr(fn)(args).jaxpr))
    assert (largest >= B * T * E * N) == (impl == "sequential")
    if impl == "pallas":
        assert largest == B * T * E * N // 8  # one state a chunk


# What a text must hold: the Triton program is XLA's custom call, the Mosaic one the TPU's
TARGETS = {"gpu": ("cuda", "triton"), "tpu": ("tpu", "tpu_custom_call")}


@pytest.mark.parametrize("where", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_both_kernels_lower_for_accelerators(name, where):
    """Forward and backward become a GPU's and a TPU's program here; compiling them needs theirs."""
    platform, call = TARGETS[where]
    fn = functools.partial(
        kernels.selective_scan if name == "mamba" else kernels.wkv, chunk=2, where=where
    )
    args = arrays(name, 5, 32, 4)

    def loss(args):
        y, state = fn(**args, starts_BT=starts_BT)
        return jnp.sum(y) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state))

    starts_BT = jnp.zeros((B, 5), bool).at[:, 3].set(True)
    kind = jax.sharding.AbstractDevice("NVIDIA H200", None, "gpu")  # JAX 0.11 asks for one
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=kind if where == "gpu" else None)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(jax.grad(loss)).trace(args).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count(f"{call}") >= 2


@pytest.mark.parametrize(
    "T,dtype,devices,impl",
    [
        (64, jnp.bfloat16, 1, "pallas"),
        (64, jnp.float64, 1, "chunked"),  # measured in 16 and 32 bits only
        (1, jnp.float32, 1, "chunked"),  # a step of decoding
        (64, jnp.float32, 8, "chunked"),  # XLA would gather what it cannot split
    ],
)
def test_the_kernels_are_the_default_of_one_nvidia_gpu(monkeypatch, T, dtype, devices, impl):
    monkeypatch.setattr(scan, "on_cuda", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    x_BTE = jax.ShapeDtypeStruct((2, T, 32), dtype)
    assert scan._choice("mamba", None, None, x_BTE)[0] == impl
    assert scan._choice("mamba", "sequential", None, x_BTE) == ("sequential", 64)
    monkeypatch.setattr(scan, "on_cuda", lambda: False)  # AMD, TPU
    assert scan._choice("mamba", None, None, x_BTE) == ("chunked", 64)


@pytest.mark.parametrize("name", CASES)
def test_the_tiles_of_a_tpu(monkeypatch, name):
    """Channels last, 128 of them: the same values and gradients."""
    args = arrays(name, 5, 40, 3)
    want = projected(name, "sequential", 8, starts(5 + 2)[:, :5])(args)
    monkeypatch.setattr(kernels, "where_now", lambda: "interpret-tpu")
    jax.tree.map(close, projected(name, "pallas", 2, starts(5 + 2)[:, :5])(args), want)


def test_pallas_is_not_imported_for_nothing():
    code = "import sys, delve_jax.models; print('jax.experimental.pallas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("tile", [(1, 32, (1, 4, 4)), (4, 8, (4, 1, 4)), (2, 16, (2, 2, 4))])
@pytest.mark.parametrize("ahead", [(False, False), (True, True)])
def test_every_tile_gives_the_same(monkeypatch, tile, ahead):
    """What is tuned changes who computes what, not what is computed."""
    how = {"forward": tile, "backward": tile, "unroll": 2, "chunk": 2, "ahead": ahead}
    args = arrays("mamba", 5, 32, 16)
    want = projected("mamba", "pallas", 2, None)(args)
    monkeypatch.setitem(kernels.TUNED, "mamba", how)
    jax.tree.map(close, projected("mamba", "pallas", 2, None)(args), want)
