"""One training loop for everything: a jitted, sharded step, a bar, metrics.jsonl, exact resume.

The data position is the step: `dataset[step]` is a pure function, so a run that is killed continues
from its last saved state and sees the batches it would have seen.
"""

import time
from pathlib import Path

import jax
import numpy as np
import optax

from .. import checkpoint, parallel
from ..config import DelveError
from ..metrics import MetricsLog, progress


def make_step(loss_fn, optimizer, mesh, state, frozen):
    """The compiled step (state, frozen, tokens_BT) -> (state, metrics), sharded on `mesh`.

    `state` and `frozen` may be abstract; state = {"params", "opt"}, donated.
    """

    def step(state, frozen, tokens_BT):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = grad_fn(state["params"], frozen, tokens_BT)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        return {"params": params, "opt": opt}, metrics

    shard_state = parallel.shardings(mesh, state)
    shard_frozen = parallel.shardings(mesh, frozen)
    rows, replicated = parallel.batch_sharding(mesh), parallel.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(shard_state, shard_frozen, rows),
        out_shardings=(shard_state, replicated),
        donate_argnums=0,
    )


def fit(
    params: dict,
    loss_fn,
    dataset,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    workdir: Path,
    frozen=(),
    mesh=None,
    save_every: int = 200,
    log_every: int = 10,
    desc: str = "train",
) -> dict:
    """Train to `steps` and return the parameters; resumes from `workdir/state` when there is one.

    dataset[i]: int32 [B, T+1] token windows. Appends to `workdir/metrics.jsonl`. A non-finite loss
    stops the run with DelveError; the last saved state stays.
    """
    mesh = mesh or parallel.make_mesh(None)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    abstract = jax.eval_shape(lambda p: {"params": p, "opt": optimizer.init(p)}, params)
    sharded = parallel.shardings(mesh, abstract)
    start = checkpoint.latest_step(workdir / "state") or 0
    if start:
        shapes = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, sharded
        )
        state = checkpoint.restore_step(workdir / "state", start, shapes)
    else:
        # a copy: the step donates its state, the caller keeps its parameters
        init = jax.jit(
            lambda p: {"params": jax.tree.map(lambda a: a + 0, p), "opt": optimizer.init(p)},
            out_shardings=sharded,
        )
        state = init(params)
    frozen = jax.device_put(frozen, parallel.shardings(mesh, frozen))
    step_fn = make_step(loss_fn, optimizer, mesh, state, frozen)
    rows = parallel.batch_sharding(mesh)

    with (
        MetricsLog(workdir / "metrics.jsonl") as log,
        progress(steps, desc, unit="step") as bar,
    ):
        log.rewind(start)
        bar.update(start)
        last_time, last_step, pending = time.perf_counter(), start, None
        for i in range(start, steps):
            tokens = np.asarray(dataset[i], np.int32)
            state, metrics = step_fn(state, frozen, jax.device_put(tokens, rows))
            bar.update(1)
            if (i + 1) % log_every == 0 or i + 1 == steps:
                pending = {name: float(v) for name, v in metrics.items()}
                now = time.perf_counter()
                rate = (i + 1 - last_step) * tokens[:, 1:].size / (now - last_time)
                last_time, last_step = now, i + 1
                log.log(i + 1, tokens=(i + 1) * tokens[:, 1:].size, tokens_per_second=rate,
                        **pending)  # fmt: skip
                bar.set_postfix_str(f"loss {pending['loss']:.3f}, {rate:.0f} tok/s")
                if not np.isfinite(pending["loss"]):
                    raise DelveError(
                        f"{workdir}: loss is {pending['loss']} at step {i + 1}; lower the learning "
                        f"rate, or run again to resume from step "
                        f"{checkpoint.latest_step(workdir / 'state') or 0}"
                    )
            if (i + 1) % save_every == 0 and i + 1 < steps:
                checkpoint.save_step(workdir / "state", i + 1, state)
    return state["params"]
