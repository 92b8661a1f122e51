"""How long does a CPU take for forms of the same function that XLA treats differently?

taskset -c 0,1 python experiments/benchmarks/forms.py [--only NAME ...]
Two CPU cores, float32; about 4 minutes. The first side of a row is the form that models/ and train/
use on a CPU, the other the plain one or what was left out: LayerNorm and RWKV's mix with the
leading axes in one or not (`linear.in_rows`, gradients), GELU by erf or erfc (`neox.gelu`, with its
gradient), products of so many rows with matrices of one shape, 64 MiB or more of them in a chain,
by Eigen or by YNNPACK (`linear.few_rows`; "table": with a transposed array), AdamW of the
benchmark's neox (16.8M parameters; clipping by one product, a bad step left out by a branch, or
optax's clipping and a choice for each element; `loop.update_if`), and a healing step of the
quickstart's DELVE (8 x 256 tokens, four teachers) that keeps what its products gave or all
(`--remat`; after `make quickstart`).
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts

import dataclasses
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from training import config
from turns import add_row, arguments, old_rows, summary, turns, write

from delve_jax import checkpoint, models, parallel, parents, upcycle
from delve_jax.models import neox, rwkv
from delve_jax.train import optim
from delve_jax.train.loop import init_state, update_if
from delve_jax.train.run import Settings, step_of

linear = importlib.import_module("delve_jax.models.linear")  # `models.linear` is its function
ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((1, 1024, 512), (2, 256, 512))  # B, T, D
WHOLE = {"update": (16_804_864,), "heal": (8, 256)}  # rows of one shape
# rows, I, O
FEW = (
    *((rows, 1024, 4096) for rows in (2, 4, 8, 32, 48, 64)),
    *((8, *of) for of in ((512, 512), (1024, 1024), (1024, 2048), (2048, 8192))),
)
SIZES = {"few": FEW, "table": ((8, 1024, 4096),), **{what: (of,) for what, of in WHOLE.items()}}
NAMES = ("norm", "mix", "gelu", *SIZES)
APART = 1e-4  # of the largest number of a result: sums of 1,024 products in another order


def gradients(fn, *args):
    """-> function: the value of fn and its gradients by all arguments, for random cotangents."""
    g = draw(args[-1].shape, seed=1)  # x itself would be no gradient of a norm's

    def both(*args):
        y, backward = jax.vjp(fn, *args)
        return y, backward(g)

    program = jax.jit(both).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args))


def draw(shape, seed: int = 0) -> jax.Array:
    """Normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def plain(fn):
    """fn traced with the leading axes as they are."""

    def traced(*args):
        rows, linear.in_rows = linear.in_rows, lambda fn, *xs: fn(*xs)
        rwkv.in_rows = linear.in_rows
        try:
            return fn(*args)
        finally:
            linear.in_rows = rwkv.in_rows = rows

    return traced


def products(what: str, shape) -> dict:
    """{library: function that multiplies x by one matrix after the other}, the used one first."""
    rows, n_in, n_out = shape
    x, flipped = draw((rows, n_in)), what == "table"
    many = max(2, 2**24 // (n_in * n_out))
    of = (n_out, n_in) if flipped else (n_in, n_out)
    ws = [draw(of, seed) / n_in**0.5 for seed in range(many)]

    def chain(form):
        def run(x, ws):
            for w in ws:
                y = form(x, w.T if flipped else w)
                x = linear.rms_norm(jnp.resize(y, x.shape), 1e-5)  # no product meets the next
            return x

        program = jax.jit(run).lower(x, ws).compile()
        return lambda: jax.block_until_ready(program(x, ws))

    forms = {"Eigen": chain(linear._unpacked), "YNNPACK": chain(jnp.matmul)}
    few = linear.few_rows(x, ws[0]) and not flipped
    return forms if few else dict(reversed(forms.items()))


def sides(what: str, shape) -> dict:
    """{form: function}, the used one first."""
    if what in ("few", "table"):
        return products(what, shape)
    x, gain = draw(shape), jnp.ones(shape[-1])
    if what == "norm":
        norm = lambda scale, bias, x: linear.layer_norm({"scale": scale, "bias": bias}, x, 1e-5)  # noqa: E731
        args = gain, gain, x
        return {"rows": gradients(norm, *args), "plain": gradients(plain(norm), *args)}
    if what == "mix":
        mix = lambda m, prev, h: rwkv.mix(h, prev, m)  # noqa: E731
        args = gain / 3, x[:, ::-1], x
        return {"rows": gradients(mix, *args), "plain": gradients(plain(mix), *args)}
    by_erfc = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
    return {"erf": gradients(neox.gelu, x), "erfc": gradients(by_erfc, x)}


def updating() -> tuple[dict, dict]:
    """({form: function that updates once and gives the embedding}, scratch memory [bytes])."""
    params = models.init_params(config("neox", 256), jax.random.key(0))
    # of norm 41 in all: clipped
    grads = jax.tree.map(lambda a: 1e-2 * draw(a.shape), params)
    dividing = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b2=0.95, weight_decay=0.0)
    )
    steps, memory = {}, {}
    for form, optimizer, branch in (
        ("branch", optim.adamw(lambda _: 1e-3, weight_decay=0.0), True),
        ("select", dividing, False),
    ):

        def update(old, grads, optimizer=optimizer):
            updates, opt = optimizer.update(grads, old["opt"], old["params"])
            return {"params": optax.apply_updates(old["params"], updates), "opt": opt}

        def step(old, grads, update=update, branch=branch):
            good = jnp.isfinite(optax.tree.norm(grads))
            return update_if(good, update, old, grads, branch)

        state = jax.tree.map(jnp.copy, {"params": params, "opt": optimizer.init(params)})
        program = jax.jit(step, donate_argnums=0).lower(state, grads).compile()
        memory[form] = program.memory_analysis().temp_size_in_bytes

        def once(program=program, box=[state]):  # noqa: B006  (its own box)
            box[0] = jax.block_until_ready(program(box[0], grads))
            return np.asarray(box[0]["params"]["embed"]["kernel"])

        steps[form] = once
    return steps, memory


def healing() -> tuple[dict, dict]:
    """({--remat: function that makes a step and gives its loss}, scratch memory [bytes])."""
    cfg, params = checkpoint.restore(ROOT / "out" / "quickstart" / "fused")[:2]
    params = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
    cfg = dataclasses.replace(cfg, dtype="float32")
    taught = [parents.load(place, dtype="float32")[:2] for place in upcycle.embedded_parents()]
    taught = [(dataclasses.replace(c, dtype="float32"), p) for c, p in taught]
    frozen = {"weights": np.full(len(taught), 1 / len(taught), np.float32),
              "teachers": tuple(t[1] for t in taught)}  # fmt: skip
    mesh = parallel.make_mesh("data=1")
    tokens = np.random.default_rng(0).integers(1, cfg.vocab_size, (8, 257)).astype(np.int32)
    steps, memory = {}, {}
    for remat in ("dots", "none"):
        settings = Settings(tokens=10**6, batch=8, window=256, remat=remat)
        step, abstract = step_of(cfg, tuple(t[0] for t in taught), settings, mesh)
        optimizer = settings.make_optimizer(settings.steps(256))
        state = jax.jit(lambda p, o=optimizer: init_state(p, o))(params)
        program = step.lower(*abstract).compile()
        memory[remat] = program.memory_analysis().temp_size_in_bytes

        def once(program=program, box=[state]):  # noqa: B006  (its own box)
            box[0], metrics = program(box[0], frozen, tokens, np.int32(0))
            return float(metrics["loss"])

        steps[remat] = once
    return steps, memory


def measure(what: str, shape, repeats: int) -> dict:
    """One row; SystemExit where the forms do not agree."""
    whole = {"update": updating, "heal": healing}
    forms, memory = whole[what]() if what in whole else (sides(what, shape), {})
    seconds, given = turns(forms, repeats)
    used, other = forms
    for a, b in zip(*(jax.tree.leaves(given[side]) for side in (used, other)), strict=True):
        apart = float(jnp.abs(a - b).max() / jnp.abs(b).max())
        if not apart <= APART:
            raise SystemExit(f"{what} {shape}: {apart:.2g} from each other")
    row = {"what": what, "shape": list(shape), "used": used, **summary(seconds)}
    row["ratio"] = row["seconds"][used] / row["seconds"][other]
    return row | ({"scratch_bytes": memory} if memory else {})


def main():
    flags = arguments(__doc__, "forms_cpu", NAMES).parse_args()
    rows = old_rows(flags.out)
    for what in flags.only:
        for shape in SIZES.get(what, SHAPES):
            one = lambda: measure(what, shape, flags.repeats)  # noqa: B023, E731
            rows = add_row(rows, ("what", "shape"), one)
            write(flags.out, rows, seed=0, repeats=flags.repeats)


if __name__ == "__main__":
    main()
