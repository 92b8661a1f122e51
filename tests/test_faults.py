"""Faults of a training run, each with real processes: what they cost, and what is left to go on.

One device and the command line: a full disk, a lost shard. Several devices and processes, in
float64 (the workers of experiments/interruption.py, where the long runs are): kills while the
number of devices changes, two processes, the loss of one.
"""

import os
import random
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from delve_jax import checkpoint, data, upcycle
from delve_jax.data import build
from delve_jax.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import interruption  # noqa: E402

TOKENIZER = upcycle.PROXIES / "neox" / "tokenizer.json"
STEPS = 24

# ---- one device, the command line ----------------------------------------------------------------

DELVE = """
    import os, resource, signal, sys
    from delve_jax import checkpoint, cli, presets
    from delve_jax.config import NeoxConfig

    presets.PRESETS["tiny"] = lambda: NeoxConfig(
        vocab_size=3840, vocab_rows=3840, d_model=8, n_layers=2, n_heads=2, d_ffn=16,
        context_length=16,
    )
    full, dies = os.environ.get("FULL", "").split(), os.environ.get("DIES")
    prepare, (_, most) = checkpoint.Steps._prepare, resource.getrlimit(resource.RLIMIT_FSIZE)

    def before_a_write(self, path):
        step = path.name.lstrip("0")
        if step == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        # arrays do not fit any more, a line of metrics does
        size = 8192 if step in full else most
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        prepare(self, path)

    checkpoint.Steps._prepare = before_a_write
    sys.exit(cli.main(sys.argv[1:]))
    """


def delve(*argv, **env) -> subprocess.CompletedProcess:
    """`delve` in a process of its own that has a tiny preset; FULL and DIES name steps."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DELVE), *map(str, argv)],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def train(out: Path, tokens: Path, **env) -> subprocess.CompletedProcess:
    size = ("--tokens", STEPS * 4 * 16, "--batch", 4, "--window", 16, "--save-every", 4)
    return delve("train", "tiny", out, "--data", tokens, *size, **env)


def lines_of(err: str) -> list[str]:
    """What stands on stderr beside the bar."""
    lines = [line.strip() for line in err.replace("\r", "\n").split("\n")]
    return [line for line in lines if line and "step/s" not in line and "s/step" not in line]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A token folder of several shards."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(data.stdlib_documents()[:8]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_SHARD_BYTES", 5_000)
        data.prepare([folder / "text.txt"], folder / "t", tokenizer=TOKENIZER)
    assert len(list((folder / "t").glob("*.bin"))) > 2
    return folder / "t"


@pytest.fixture(scope="module")
def undisturbed(tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    done = train(out, tokens)
    assert done.returncode == 0, done.stderr
    return out


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit the same parameters, and the same losses, each logged once."""
    ours, theirs = (checkpoint.restore(p)[1] for p in (a, b))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    losses = [[(m["step"], m["loss"]) for m in read_metrics(p / "metrics.jsonl")] for p in (a, b)]
    assert losses[0] == losses[1] and losses[0][-1][0] == STEPS
    assert [s for s, _ in losses[0]] == sorted({s for s, _ in losses[0]})


def test_a_full_disk_costs_states_and_nothing_else(undisturbed, tokens, tmp_path):
    """No bytes for the states of steps 8 and 12; then somebody makes room."""
    done = train(tmp_path / "b", tokens, FULL="8 12")
    assert done.returncode == 0, done.stderr
    said = re.findall(rf"{tmp_path / 'b'}\S*: cannot be written .*", done.stderr)
    assert len(said) == 2 and "Traceback" not in done.stderr
    for line in said:
        assert line.endswith("training goes on, the last good state is that of step 4")
    assert_same_run(tmp_path / "b", undisturbed)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_lost_shard_is_named_and_nothing_is_lost(undisturbed, tokens, tmp_path):
    """The run was killed at step 12; a shard has vanished when it is started again, then is back"""
    killed = train(tmp_path / "b", tokens, DIES="12")
    assert killed.returncode == -9
    states = checkpoint.Steps(tmp_path / "b.partial" / "state")
    assert states.numbers() == [4, 8]
    shard = sorted(tokens.glob("*.bin"))[1]
    shard.rename(tokens / "elsewhere")
    try:
        done = train(tmp_path / "b", tokens)
    finally:
        (tokens / "elsewhere").rename(shard)
    lines = lines_of(done.stderr)
    assert done.returncode == 2 and len(lines) == 1 and not done.stdout
    assert lines[0].startswith("error: ") and str(shard) in lines[0] and "is gone" in lines[0]
    assert states.numbers() == [4, 8] and not (tmp_path / "b").exists()
    done = train(tmp_path / "b", tokens)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "b", undisturbed)


# ---- several devices and processes ---------------------------------------------------------------

MESH = "data=4,model=2"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("interruption")


@pytest.fixture(scope="module")
def dying(work):
    """Two processes of which one is lost: a minute of waiting, while other tests run."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(
            interruption.two_processes, work / "death", MESH, STEPS, x64=True, die=STEPS // 2
        )


@pytest.fixture(scope="module")
def alone(work):
    """The run that was left alone: one process, 8 devices, float64."""
    assert interruption.start(work / "alone", 8, x64=True, steps=STEPS).wait(300) == 0
    return interruption.result(work / "alone", True)


def apart(out: Path, alone) -> dict:
    found = interruption.result(out, True)
    assert found[1][-1][0] == STEPS
    return interruption.difference(found, alone)


def test_kills_on_changing_devices(dying, alone, work):
    """SIGKILL on 8 and on 4 devices; the rest on 2. (`dying` is started here for its minute.)"""
    rng = random.Random(0)
    facts = interruption.killed_run(work / "killed", 2, [8, 4, 2], rng, STEPS, True)
    assert facts["kills"] == 2
    found = apart(work / "killed", alone)
    assert found["parameters"] <= 1e-9 and found["losses"] <= 1e-9


def test_two_processes_equal_one(alone, work):
    facts = interruption.two_processes(work / "two", MESH, STEPS, x64=True)
    assert facts["codes"] == [0, 0], Path(f"{work / 'two'}.log").read_text()[-2000:]
    found = apart(work / "two", alone)
    assert found["parameters"] <= 1e-9 and found["losses"] <= 1e-9


def test_the_loss_of_a_process_ends_the_other_and_costs_nothing(dying, alone, work):
    """It must not hang: it ends with an error, and the same command goes on, on fewer processes."""
    facts, out = dying.result(300), work / "death"
    assert facts["codes"][1] == -9 and facts["codes"][0] not in (0, None)
    assert facts["seconds_after_the_loss"] < 120
    assert not out.exists() and 0 < interruption.reached(out) < STEPS
    assert interruption.start(out, 8, x64=True, steps=STEPS).wait(300) == 0
    found = apart(out, alone)
    assert found["parameters"] <= 1e-9 and found["losses"] <= 1e-9
