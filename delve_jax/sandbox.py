"""A program that a model wrote, run in a process of its own under limits; only where asked for.

The limits stop loops, memory, files and child processes from doing harm by accident. They are no
wall against a hostile program (it can read what the user can read and reach the network): run such
models in a container.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

SECONDS = 10  # of the clock, and of the processor
MEMORY = 1 << 30  # bytes of address space
FILE = 1 << 20  # bytes of one file

# set in the child before the program is compiled; the source comes on stdin
_START = f"""
import resource, sys
for what, most in (("CPU", {SECONDS}), ("AS", {MEMORY}), ("FSIZE", {FILE}), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "__main__"}})
"""


def passes(program: str) -> bool:
    """Whether the program ends by itself without an error, in an empty folder and environment.

    A program that leaves by `sys.exit` or `os._exit` before its last line has not passed: that line
    is ours, and what it prints is looked for.
    """
    token = os.urandom(16).hex()
    source = f"{program}\nprint({token!r}, flush=True)\n"
    with (
        tempfile.TemporaryDirectory(prefix="delve-code-") as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as printed,  # a pipe would be waited for as long as anyone has it
    ):
        given.write(source.encode("utf-8", "replace"))
        given.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _START], cwd=folder, env={}, stdin=given, stdout=printed,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # whatever it has started ends with it
        child.wait()
        printed.seek(0)
        return code == 0 and token.encode() in printed.read()
