"""Are our scan kernels on a GPU near the memory's limit, and ahead of the kernels people use?

python experiments/benchmarks/scan_peers.py [--mamba-ssm DIR] [--repeats 7]
One GPU, one wide layer, bfloat16 in and out. Peers, each where it is there: flash-linear-attention
(`pip install --no-deps flash-linear-attention fla-core`): fused_recurrent_rwkv4; mamba-ssm: its
CUDA kernels, built from source (DIR is its csrc/selective_scan; nvcc takes two minutes). Forward
and backward pass apart: the forward one of a call without gradients; a backward one is given what
the forward one of a call with gradients kept, whose time stands beside. The floor is
what must move (forward: inputs and output; backward: inputs, dy, gradients) at the bandwidth of a
copy. Gradients of w, u, A, D and of the state are part of both sides' time.
"""

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room, too

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scans
from turns import add_row, arguments, bars, old_rows, summary, turns, write

from delve_jax.models import scan

CASES = {"mamba": (8, 4096, 4096, 16), "wkv": (8, 4096, 4096)}  # B, T, E, N; B, T, A
SMALL = {"mamba": (2, 64, 128, 16), "wkv": (2, 64, 128)}  # with --small: does it run?
PASSES = ("forward", "forward keeping", "backward")
BARS = {("mamba", "forward"): 2.5, ("mamba", "backward"): 3.5}  # times the floor
CALLS = 10  # of a timed turn: a launch is not what is measured
WAYS = ("pallas", "chunked")
# only what is timed here is built of mamba-ssm: bfloat16 inputs, float32 weights
ONLY = {"ITYPE": "using input_t = at::BFloat16;", "WTYPE": "using weight_t = float;"}


def ours(name, args, dy, impl):
    """{pass: function that returns its outputs}."""
    run = functools.partial({"mamba": scan.selective_scan, "wkv": scan.wkv}[name], impl=impl)
    forward = jax.jit(lambda *a: run(*a)[0])
    keeping = jax.jit(lambda *a: jax.vjp(lambda *b: run(*b)[0], *a))
    pull = keeping(*args)[1]
    backward = jax.jit(lambda pull, dy: pull(dy))
    return dict(
        zip(
            PASSES,
            (lambda: forward(*args), lambda: keeping(*args), lambda: backward(pull, dy)),
            strict=True,
        )
    )


def of_torch(fn, args, dy):
    """The same of a PyTorch function and its leaves."""
    import torch

    y = fn(*args)

    def forward():
        with torch.no_grad():
            return fn(*args)

    def backward():
        return torch.autograd.grad(y, args, dy, retain_graph=True)

    return dict(zip(PASSES, (forward, lambda: fn(*args).detach(), backward), strict=True))


def tensor(x):
    """A jax array as a leaf of PyTorch on the GPU; of [B, T, ..] with T last if `last`."""
    import torch

    made = torch.from_numpy(np.asarray(x.astype(jnp.float32))).cuda()
    made = made.to(torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32)
    return made.requires_grad_()


def of_fla(args, dy):
    """flash-linear-attention's RWKV-4: it takes log(-w) and a state [B, 3, 1, A]."""
    import torch
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    k, v, w, u = args
    state = torch.zeros(k.shape[0], 3, 1, k.shape[2], device="cuda", dtype=torch.bfloat16)
    state[:, 2] = -1e38
    theirs = [tensor(x) for x in (jnp.log(-w), u, k, v)]
    return of_torch(lambda *a: fused_recurrent_rwkv4(*a, state)[0], theirs, tensor(dy).detach())


def of_mamba_ssm(source, args, dy):
    """mamba-ssm's kernels, of bfloat16 inputs and float32 weights; its layout has T last."""
    import torch
    from torch.utils import cpp_extension

    place = Path(source).resolve()
    code = (place / "selective_scan.cpp").read_text().replace("c10::optional", "std::optional")
    for kind, use in ONLY.items():
        code = re.sub(
            rf"#define (DISPATCH_{kind}\w+)\({kind}, NAME, \.\.\.\).*?\n    }}\n",
            rf"#define \1({kind}, NAME, ...) {{ {use} __VA_ARGS__(); }}\n",
            code, flags=re.S,
        )  # fmt: skip
    (place / "only.cpp").write_text(code)
    files = ("only.cpp", "selective_scan_fwd_bf16.cu", "selective_scan_bwd_bf16_real.cu")
    undo = [
        f"-U__CUDA_NO_{kind}_{what}__"
        for kind in ("HALF", "BFLOAT16") for what in ("OPERATORS", "CONVERSIONS")
    ]  # fmt: skip
    built = cpp_extension.load(
        "delve_peer_selective_scan",
        [str(place / f) for f in files],
        extra_cflags=["-O3"],
        extra_cuda_cflags=["-O3", "--use_fast_math", "--expt-relaxed-constexpr",
                           "--expt-extended-lambda", *undo,
                           "-gencode", "arch=compute_90,code=sm_90"],
    )  # fmt: skip

    class Scan(torch.autograd.Function):
        """As mamba_ssm's SelectiveScanFn, without z and bias."""

        @staticmethod
        def forward(ctx, u, dt, A, B, C, D):
            y, x, *_ = built.fwd(u, dt, A, B, C, D, None, None, False)
            ctx.save_for_backward(u, dt, A, B, C, D, x)
            return y

        @staticmethod
        def backward(ctx, dy):
            u, dt, A, B, C, D, x = ctx.saved_tensors
            more = (None, None, dy, x, None, None, False, False)
            du, ddt, dA, dB, dC, dD, *_ = built.bwd(u, dt, A, B, C, D, *more)
            return du, ddt, dA, dB, dC, dD

    def last(x, group=False):  # [B, T, E] -> [B, E, T] or [B, 1, N, T]
        x = tensor(x).detach().swapaxes(1, 2)
        return (x[:, None] if group else x).contiguous().requires_grad_()

    u, dt, A, B, C, D = args
    theirs = [last(u), last(dt), tensor(A), last(B, True), last(C, True), tensor(D)]
    return of_torch(Scan.apply, theirs, last(dy).detach())


def numbers(side, kind, args, out):
    """What a side gave, float32 numpy in our order and layout, so that sides can be compared: of
    what has a batch the first row (the kernels know nothing of other rows)."""
    if side.startswith("ours"):
        leaves = jax.tree.leaves(out[0] if kind == "forward keeping" else out)
        leaves = [x[0] if x.ndim == 3 else x for x in leaves]
        return [np.asarray(x.astype(jnp.float32)) for x in leaves]
    parts = [x.detach() for x in (out if isinstance(out, tuple) else [out])]
    parts = [(x[0] if x.ndim > 2 else x).float().cpu().numpy() for x in parts]
    if side == "mamba-ssm":  # [E, T] or [1, N, T]; A [E, N] has no T
        T = args[0].shape[1]
        parts = [x[0] if x.ndim == 3 else x for x in parts]
        return [x.T if x.ndim == 2 and x.shape[1] == T else x for x in parts]
    if kind == "backward":
        w, u, k, v = parts  # w: d / d log(-w) = w d / dw
        return [k, v, w / np.asarray(args[2]), u]
    return parts


def measure(name, shape, source, repeats, bandwidth):
    """Rows of the three passes: all sides in turn."""
    args = scans.inputs(name, shape, jnp.bfloat16)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=args[0].shape), jnp.bfloat16)
    makers = {f"ours, {impl}": functools.partial(ours, name, args, dy, impl) for impl in WAYS}
    if name == "wkv":
        makers["fla"] = functools.partial(of_fla, args, dy)
    elif source:
        makers["mamba-ssm"] = functools.partial(of_mamba_ssm, source, args, dy)
    sides, failed = {}, {}
    for side, make in makers.items():
        try:
            sides[side] = make()
            for call in sides[side].values():
                call()
        except Exception as err:  # noqa: BLE001 - a peer that is not there or does not run
            sides.pop(side, None)
            failed[side] = f"{type(err).__name__}: {err}".splitlines()[0][:300]
    for kind in PASSES:
        one = functools.partial(compare, name, kind, shape, args, repeats, bandwidth)
        yield one({side: calls[kind] for side, calls in sides.items()}) | {"failed": failed}


def compare(name, kind, shape, args, repeats, bandwidth, sides):
    """One row."""

    def many(side, call):
        def run():
            for _ in range(CALLS):
                out = call()
            if side.startswith("ours"):
                return jax.block_until_ready(out)
            import torch

            torch.cuda.synchronize()
            return out

        return run

    seconds, given = turns({side: many(side, call) for side, call in sides.items()}, repeats)
    found = summary({side: [x / CALLS for x in xs] for side, xs in seconds.items()})
    every = {side: numbers(side, kind, args, given[side]) for side in sides}
    reference = next(side for side in ("ours, chunked", *sides) if side in sides)
    apart = {
        side: [
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in zip(got, every[reference], strict=True)
        ]
        for side, got in every.items()
    }
    floor, median = scans.floor_bytes(args)[kind == "backward"] / bandwidth, found["seconds"]
    return {
        "recurrence": name, "pass": kind, "shape": shape, "dtype": "bfloat16", "floor_s": floor,
        "bar": BARS.get((name, kind)), "over_floor": {s: t / floor for s, t in median.items()},
        "over_ours": {s: t / median.get("ours, pallas", np.nan) for s, t in median.items()},
        **found, "apart_from": reference, "apart": apart,
    }  # fmt: skip


def picture(rows, file):
    """Times over the floor, a group a pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 3.8))
    every = (*(f"ours, {impl}" for impl in WAYS), "fla", "mamba-ssm")
    groups = {side: [r["over_floor"].get(side) for r in rows] for side in every}
    groups = {side: found for side, found in groups.items() if any(found)}
    labels = [f"{r['recurrence']}\n{r['pass']}" for r in rows]
    bars(ax, labels, groups, "time over the bandwidth floor", [r["bar"] for r in rows])
    fig.tight_layout()
    fig.savefig(file, dpi=150)


def main():
    parser = arguments(__doc__, "scan_peers_gpu", CASES)
    parser.add_argument("--mamba-ssm", type=Path, help="its csrc/selective_scan")
    parser.add_argument("--small", action="store_true", help="tiny shapes: does it run?")
    flags = parser.parse_args()
    bandwidth, rows = scans.copy_bandwidth(), old_rows(flags.out)
    found = {
        p: importlib.metadata.version(p)
        for p, module in (("torch", "torch"), ("triton", "triton"), ("fla-core", "fla"))
        if importlib.util.find_spec(module)
    }
    for name in flags.only:
        shape = list((SMALL if flags.small else CASES)[name])
        for row in measure(name, shape, flags.mamba_ssm, flags.repeats, bandwidth):
            rows = add_row(rows, ("recurrence", "pass", "shape"), functools.partial(dict, row))
            write(
                flags.out, rows, seed=0, repeats=flags.repeats, calls=CALLS,
                copy_bytes_per_second=bandwidth, peers=found,
            )  # fmt: skip
    picture(rows, flags.out.with_suffix(".png"))
    print(flags.out)


if __name__ == "__main__":
    main()
