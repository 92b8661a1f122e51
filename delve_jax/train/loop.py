"""One training loop for everything: a jitted, sharded step, a bar, metrics.jsonl, exact resume.

The data position is the step: `dataset[step]` is a pure function, so a run that is killed continues
from its last saved state and sees the batches it would have seen, on any number of devices or
processes. A step whose loss or gradient is not finite changes nothing but a counter; SIGTERM saves
and exits 0.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from tqdm import tqdm

from .. import checkpoint, parallel
from ..config import DelveError
from ..metrics import MetricsLog, progress
from . import objective

MAX_IN_A_ROW, MAX_SKIPPED = 5, 50  # steps without effect before a run gives up


@dataclass(frozen=True)
class Saving:
    """When states are written and which stay: Delphi's rule is 10 minutes, one kept every 5,000.

    Nothing here changes the result of a run, so a repeated command may differ in it.
    """

    every: int = 200  # steps between states
    minutes: float = 10.0  # a state is written after so long, however slow the steps are
    keep: int = 2  # newest states that stay
    keep_every: int | None = None  # multiples of so many steps stay for good
    track: tuple[str, ...] = ()  # where the log goes beside metrics.jsonl: `metrics.SINKS`


def init_state(params, optimizer) -> dict:
    """{"params", "opt", "skipped": [in all, in a row]}; a pure function, for jit and eval_shape."""
    return {"params": params, "opt": optimizer.init(params), "skipped": jnp.zeros(2, jnp.int32)}


def update_if(good, update, old, grads, branch: bool):
    """update(old, grads) where `good`, else old: by a branch or element by element.

    By a branch on a CPU: XLA has a fusion for each result there, and to choose between old and new
    it would copy both moments (results/forms_cpu.json). An accelerator updates weight and moments
    in one kernel, and would wait for the host at a branch.
    """
    if branch:
        return lax.cond(good, update, lambda old, _: old, old, grads)
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), update(old, grads), old)


def make_step(loss_fn, optimizer, mesh, state, frozen, accumulate: int = 1):
    """The compiled step (state, frozen, tokens, index) -> (state, metrics), sharded on `mesh`.

    `state` and `frozen` may be abstract; state (donated) is that of `init_state`. tokens: [B, T+1],
    or [accumulate, B, T+1]: the mean gradient over the first axis is taken before the update.
    index: number of the step, for losses whose weights or draws change with it.
    A step that is not finite changes nothing.
    """
    shard_state = parallel.shardings(mesh, state)
    shard_frozen = parallel.shardings(mesh, frozen)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def gradient(params, frozen, tokens, index):
        if accumulate == 1:
            return grad_fn(params, frozen, tokens, index)
        first = jax.tree.map(lambda a: a[0], tokens)
        shapes = jax.eval_shape(grad_fn, params, frozen, first, index)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        zeros = zeros[0], lax.with_sharding_constraint(zeros[1], shard_state["params"])

        def add(total, tokens_BT):
            return jax.tree.map(jnp.add, total, grad_fn(params, frozen, tokens_BT, index)), None

        total, _ = lax.scan(add, zeros, tokens)
        return jax.tree.map(lambda x: x / accumulate, total)

    def update(old, grads):
        updates, opt = optimizer.update(grads, old["opt"], old["params"])
        return {"params": optax.apply_updates(old["params"], updates), "opt": opt}

    def step(state, frozen, tokens, index):
        (loss, metrics), grads = gradient(state["params"], frozen, tokens, index)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        old = {k: state[k] for k in ("params", "opt")}
        new = update_if(good, update, old, grads, branch=on_cpu)
        total, row = state["skipped"]
        new["skipped"] = jnp.stack([total + ~good, jnp.where(good, 0, row + 1)])
        metrics = {"loss": loss, "grad_norm": norm, **metrics, "skipped": new["skipped"]}
        return new, metrics

    return jax.jit(
        step,
        in_shardings=(
            shard_state,
            shard_frozen,
            parallel.batch_sharding(mesh, int(accumulate > 1)),
            parallel.replicated(mesh),
        ),
        out_shardings=(shard_state, parallel.replicated(mesh)),
        donate_argnums=0,
    )


class _Terminated:
    """True once SIGTERM was received (by any process of the run: all stop at the same step)."""

    def __init__(self):
        self.received = False

    def __enter__(self):
        # with several processes JAX's own service holds the signal and agrees on a step
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_):
        self.received = True

    def at(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received

    def __exit__(self, *_):
        if hasattr(self, "_before"):
            signal.signal(signal.SIGTERM, self._before)


def fit(
    params: dict | tuple,
    loss_fn,
    dataset,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    workdir: Path,
    frozen=(),
    mesh=None,
    accumulate: int = 1,
    saving: Saving = Saving(),  # noqa: B008  (frozen)
    log_every: int = 10,
    desc: str = "train",
) -> dict:
    """Train to `steps` and return the parameters; resumes from `workdir/state` when there is one.

    params: arrays (copied, the caller keeps them), or (shapes, make) where make() -> arrays is
    called only when there is no state to resume and its arrays become the state. dataset: a grain
    MapDataset whose element i is this process's rows of step i, int32 [B / shards, T+1]
    (`parallel.feed`), or a dict of "tokens" and what goes with them (`cache`). Appends to
    `workdir/metrics.jsonl`.
    DelveError: too many steps were not finite; the last good state stays.
    """
    mesh = mesh or parallel.make_mesh(None)
    workdir = Path(workdir)
    shapes, make = params if isinstance(params, tuple) else (params, None)
    abstract = parallel.abstract(mesh, jax.eval_shape(lambda p: init_state(p, optimizer), shapes))
    states = checkpoint.Steps(workdir / "state", saving.keep, saving.keep_every)
    start, state = states.restore(abstract, say) or (0, None)
    if state is None:
        shard = jax.tree.map(lambda x: x.sharding, abstract)
        init = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shard, donate_argnums=0)
        made = make() if make else jax.tree.map(jnp.copy, params)
        state = init(jax.device_put(made, shard["params"]))
        del made
    frozen = jax.device_put(frozen, parallel.shardings(mesh, frozen))
    step_fn = make_step(loss_fn, optimizer, mesh, state, frozen, accumulate)
    log: MetricsLog | None = None

    def opened():
        nonlocal log
        log = MetricsLog(workdir / "metrics.jsonl", sinks=saving.track)
        log.rewind(start)

    parallel.on_main(opened)  # a sink that refuses ends all processes, not the first alone
    bar = progress(steps, desc, unit="step", hide=log is None)
    with contextlib.ExitStack() as stack:
        terminated = stack.enter_context(_Terminated())
        stack.callback(_finish, states)
        stack.enter_context(bar)
        if log:
            stack.enter_context(log)
        bar.update(start)
        clock, due = _Clock(start), _Due(saving.minutes, start)
        pending, before = None, ()
        for i, rows in zip(range(start, steps), _prefetched(dataset, start, steps), strict=True):
            batch = jax.tree.map(lambda a: _placed(mesh, np.asarray(a), accumulate), rows)
            tokens = objective.tokens_of(batch)
            per_step = tokens.size // tokens.shape[-1] * (tokens.shape[-1] - 1)
            clock.waited()
            state, metrics = step_fn(state, frozen, batch, np.int32(i))
            # one step is queued and one runs: the host's clock is the run's, and no device waits
            jax.block_until_ready(before)
            before = metrics
            bar.update(1)
            n = i + 1
            # the numbers of a step are read once the next one is under way: no device waits
            if pending:
                _report(log, bar, clock, per_step, *pending)
                pending = None
            if n % log_every == 0 or n == steps:
                pending = n, metrics
            if n == steps:
                _report(log, bar, clock, per_step, *pending)
            stop = n < steps and terminated.at(n)
            late = due.at(n, agree=pending is not None)
            if n < steps and (stop or late or n % saving.every == 0):
                _save(states, n, state, last=stop)
                due.saved(n)
            if stop:
                if pending:  # else its line is missing: a resumed run begins behind it
                    _report(log, bar, clock, per_step, *pending)
                say(f"{desc}: SIGTERM; step {n} is saved, the same command goes on from there")
                raise SystemExit(0)
            clock.resume()
    return state["params"]


def _placed(mesh, rows: np.ndarray, accumulate: int) -> jax.Array:
    """This process's rows of a batch as part of the global array, cut into microbatches."""
    rows = rows.astype(np.int32) if rows.dtype == np.int64 else rows
    if accumulate > 1:
        rows = rows.reshape(accumulate, -1, *rows.shape[1:])
    return parallel.global_batch(mesh, rows, int(accumulate > 1))


def _prefetched(dataset, start: int, stop: int):
    """Batches start..stop-1, read ahead by a thread."""
    import grain

    return iter(dataset[start:stop].to_iter_dataset(grain.ReadOptions(2, 8)))


def _finish(states: checkpoint.Steps) -> None:
    """However a run ends, the state that is being written gets its name first."""
    try:
        states.wait()
    except DelveError as err:
        say(f"{err}; older states stand")


def _save(states: checkpoint.Steps, step: int, state, last: bool) -> None:
    """Start writing a state. A write that fails costs that state only: the run goes on, and says
    so; the one before a stop must succeed."""
    for act in (states.wait, lambda: states.save(step, state)):
        try:
            act()
        except DelveError as err:
            if last or jax.process_count() > 1:
                raise
            good = states.numbers()
            where = f"that of step {good[-1]}" if good else "none yet"
            say(f"{err}; training goes on, the last good state is {where}")
    if last:
        states.wait()


class _Due:
    """Whether a state is due by the clock: asked on every step.

    Of several processes, process 0 says at every logged step at which one it will be, at the pace
    since the last state; between these nobody waits for a message, and all decide alike.
    """

    def __init__(self, minutes: float, step: int):
        self.seconds = 60 * minutes
        self.saved(step)

    def saved(self, step: int) -> None:
        self.step, self.since, self.agreed = step, time.monotonic(), None

    def at(self, step: int, agree: bool) -> bool:
        """agree: a step at which all processes call this with True."""
        spent = time.monotonic() - self.since
        if jax.process_count() == 1:
            return spent > self.seconds
        if agree:
            pace = max(spent / max(1, step - self.step), 1e-9)
            left = math.ceil(min(max(0.0, self.seconds - spent) / pace, 1e9))
            self.agreed = step + int(multihost_utils.broadcast_one_to_all(np.int32(left)))
        return self.agreed is not None and step >= self.agreed


class _Clock:
    """Times between reports, and the part of them spent waiting for data."""

    def __init__(self, step: int):
        self.step, self.since, self.wait = step, time.perf_counter(), 0.0
        self.resume()

    def resume(self) -> None:
        self.mark = time.perf_counter()

    def waited(self) -> None:
        self.wait += time.perf_counter() - self.mark

    def read(self, step: int) -> tuple[int, float, float]:
        """(steps, seconds, share of them waiting for data) since the last call."""
        now = time.perf_counter()
        out = step - self.step, now - self.since, self.wait / max(now - self.since, 1e-9)
        self.step, self.since, self.wait = step, now, 0.0
        return out


def _report(log, bar, clock: _Clock, per_step: int, step: int, metrics: dict) -> None:
    """One line of metrics.jsonl; DelveError when steps keep being skipped."""
    values = {name: np.asarray(v) for name, v in metrics.items()}
    skipped, in_a_row = map(int, values.pop("skipped"))
    if in_a_row >= MAX_IN_A_ROW or skipped >= MAX_SKIPPED:
        raise DelveError(
            f"step {step}: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}; "
            f"{skipped} steps were skipped as not finite, {in_a_row} in a row; lower the learning "
            "rate (with --overwrite) or look at the data; the last good state is kept"
        )
    done, seconds, wait = clock.read(step)
    if log is None:
        return
    rate = done * per_step / seconds
    numbers = {name: float(v) for name, v in values.items()}
    log.log(step, tokens=step * per_step, tokens_per_second=rate, data_wait=round(wait, 5),
            skipped=skipped, **numbers)  # fmt: skip
    bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {rate:.0f} tok/s")


def say(line: str) -> None:
    """A line on stderr, above the bar, from process 0."""
    if parallel.is_main():
        tqdm.write(line, file=sys.stderr)
