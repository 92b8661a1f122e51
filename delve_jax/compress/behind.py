"""Files written behind the work: in the order asked for, on a thread, while an accelerator goes on.

What is on disk is at any moment what a run without the thread would have left somewhat earlier, so
a killed run goes on as ever. Nothing runs after a failure, which `do` or `wait` then raises. On a
CPU, which has nothing to wait for, everything is done at once.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from . import device

MOST = 8  # waiting at a time: each may hold the activations of one boundary, or one layer's factors

_thread = ThreadPoolExecutor(1, "behind")
_waiting: deque[Future] = deque()
_failed = False


def do(work, *args, **named) -> None:
    """Call work(*args, **named) after everything that was asked for before."""
    if not device.on():
        work(*args, **named)
        return
    while _waiting and (len(_waiting) >= MOST or _waiting[0].done()):
        _next()
    _waiting.append(_thread.submit(_run, work, args, named))


def wait() -> None:
    """Until all of it is done."""
    while _waiting:
        _next()


@contextlib.contextmanager
def done():
    """All that is asked for inside is done in the end; what fails there raises, but hides no other
    failure, and leaves nothing to the next caller."""
    try:
        yield
        wait()
    finally:
        while _waiting:
            with contextlib.suppress(BaseException):
                wait()


def _run(work, args, named) -> None:
    global _failed
    if _failed:
        return
    try:
        work(*args, **named)
    except BaseException:
        _failed = True
        raise


def _next() -> None:
    global _failed
    try:
        _waiting.popleft().result()
    except BaseException:
        while _waiting:  # none of these did anything
            _waiting.popleft().cancel()
        _thread.submit(int).result()
        _failed = False
        raise


# ---- arrays on their way ------------------------------------------------------------------------


def leaving(part) -> jax.Array:
    """The part, on its way to the host."""
    part = device.put(part)
    part.copy_to_host_async()
    return part


def write_parts(file: Path, shape: tuple[int, ...], parts) -> None:
    """An array of float32 in a file, part by part."""
    half = file.with_suffix(".writing")
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with half.open("wb") as out:
        np.lib.format.write_array_header_1_0(out, header)
        for part in parts:
            np.asarray(part, np.float32).tofile(out)
    half.replace(file)  # a killed run leaves no half a file under the name


def give_back(array: np.ndarray) -> None:
    """Give back the pages of a mapped file that were read; what still needs them reads them anew.

    The system would drop them when it is short of memory, but counts them until then: the
    activations of 20 students of a 7B parent on 4,096 tokens are 1.3 GB.
    """
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)  # a view, the array, the mapping
    if array is not None and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)
