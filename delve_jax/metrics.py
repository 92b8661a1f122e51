"""What a run says while it goes: `metrics.jsonl` always, a bar on stderr, other sinks when asked.

A log line is one JSON object with `step`; the file is the record, the bar is for the eyes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from .config import DelveError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers; what is missing is left out."""
    out = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def progress(total: int | None, desc: str, unit: str = "step", hide: bool = False) -> tqdm:
    """A bar on stderr with rate and time left; a context manager with `.update(n)`."""
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=True,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=hide,
    )


class MetricsLog:
    """Appends one JSON line per logged step to `path`; `log(step, **values)`, then `close()`.

    `resume` keeps an older file (False starts it anew), and `rewind(step)` cuts it back to the step
    that a checkpoint stands at, so that no step is in it twice. `sinks`: names of SINKS that get
    the numbers too. DelveError: one that is unknown, is not installed or refuses to start.
    """

    def __init__(self, path: str | Path, resume: bool = True, sinks: Sequence[str] = ()):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._names, self._sinks = check_sinks(sinks), []
        if not resume:
            self.path.unlink(missing_ok=True)
        _keep_lines(self.path, None)
        self._file, self._waiting = self.path.open("ab", buffering=0), b""

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step`, where the run goes on; at 0 it starts anew."""
        self._file.close()
        _keep_lines(self.path, step or -1)
        self._file = self.path.open("ab", buffering=0)
        self._start_sinks(step)

    def _start_sinks(self, step: int) -> None:
        self._sinks = self._sinks or [_SINKS[n][1](self.path.parent, step) for n in self._names]

    def log(self, step: int, **values) -> None:
        """One line; numbers may be JAX or numpy scalars (null where they are not finite).
        Unbuffered: a kill loses nothing."""
        line = {"step": int(step)} | {k: _plain(v) for k, v in values.items()}
        self._waiting += (json.dumps(line, allow_nan=False) + "\n").encode()
        self._write()
        self._start_sinks(int(step) - 1)
        numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
        for write, _ in self._sinks:
            write(int(step), numbers)

    def _write(self) -> None:
        # a full disk must not end a run: the lines wait until there is room
        with contextlib.suppress(OSError):
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        self._write()
        self._file.close()
        for _, end in self._sinks:
            end()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict]:
    """The whole lines of a metrics file; one that a kill cut short is left out."""
    out = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return out


def _keep_lines(path: Path, step: int | None) -> None:
    """Rewrite `path` without cut lines and, given `step`, without later steps."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if step is None or line.get("step", 0) <= step]
    partial = path.with_name(path.name + ".partial")
    kept = [{k: _plain(v) for k, v in line.items()} for line in kept]
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def _plain(value):
    """A JSON value of a Python, numpy or JAX scalar; anything else as it is. JSON has no NaN and no
    Inf: they become null."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(folder: Path, step: int) -> tuple[Callable, Callable]:
    """Event files in FOLDER/tensorboard; what an earlier call wrote of later steps is hidden."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(step, numbers):
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return write, writer.close


def _wandb(folder: Path, step: int) -> tuple[Callable, Callable]:
    """A run of the project delve-jax (or WANDB_PROJECT), the same one when the run is resumed.

    wandb's variables rule the rest: WANDB_MODE=offline leaves all in FOLDER/wandb for `wandb sync`.
    """
    known = folder / "wandb" / "run-id"
    known.parent.mkdir(exist_ok=True)
    if not known.exists():
        known.write_text(uuid.uuid4().hex[:8])
    name, project = folder.name.removesuffix(".partial"), os.environ.get("WANDB_PROJECT")
    try:
        import wandb

        run = wandb.init(dir=str(folder), project=project or "delve-jax", id=known.read_text(),
                         name=name, resume="allow")  # fmt: skip
    except Exception as err:  # broken install, no key, no network
        why = " ".join(str(err).split())[:160]
        raise DelveError(f"--track wandb: {why}; WANDB_MODE=offline needs no network") from None
    return lambda step, numbers: run.log(numbers, step=step), run.finish


# name -> (package, what makes (write(step, numbers), end()) for a folder and the step it is at)
_SINKS = {"tensorboard": ("tensorboardX", _tensorboard), "wandb": ("wandb", _wandb)}
SINKS = tuple(_SINKS)


def check_sinks(names: Sequence[str]) -> tuple[str, ...]:
    """The names; DelveError: one is unknown or not installed. Nothing is imported."""
    for name in names:
        if name not in _SINKS:
            raise DelveError(f"--track {name}: unknown; choose {' or '.join(_SINKS)}")
        package = _SINKS[name][0]
        if importlib.util.find_spec(package) is None:
            raise DelveError(f"--track {name}: is not installed; pip install {package}")
    return tuple(dict.fromkeys(names))
