"""The public face: names, docstrings and their examples, every help page, and the trackers."""

import argparse
import doctest
import importlib
import importlib.util
import inspect
import json
import shlex
import subprocess
import sys

import pytest
from commands import bad, delve

import delve_jax
from delve_jax import cli, metrics, upcycle
from delve_jax.config import DelveError

PUBLIC = delve_jax._WHERE | delve_jax._VERB_MODULES
NO_EXAMPLE = {"heal", "train", "export", "inspect", "upcycle"}  # too dear; tested elsewhere
EXAMPLES = {
    name: doctest.DocTestFinder(recurse=False).find(
        getattr(importlib.import_module(f"delve_jax.{where}"), name), name
    )[0]
    for name, where in PUBLIC.items()
}


def test_import_is_light_and_complete():
    code = (
        "import sys, delve_jax; heavy = {'jax', 'numpy', 'flax', 'orbax', 'grain', 'torch'}; "
        "print(sorted(heavy & {*sys.modules}), sorted(delve_jax.__all__))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == f"[] {sorted(PUBLIC)}"
    with pytest.raises(AttributeError, match="nonsense"):
        delve_jax.nonsense  # noqa: B018


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    thing = getattr(importlib.import_module(f"delve_jax.{PUBLIC[name]}"), name)
    doc = inspect.getdoc(thing)
    assert doc and len(doc.split("\n")) > 1, name
    if inspect.isfunction(thing):
        assert "DelveError" in doc, f"{name}: what does it refuse?"
    assert bool(EXAMPLES[name].examples) == (name not in NO_EXAMPLE)
    for member, function in inspect.getmembers(thing, inspect.isfunction):
        assert member.startswith("_") or inspect.getdoc(function) or name == "DelveError", member


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - NO_EXAMPLE))
def test_examples_are_true(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said = []
    runner.run(EXAMPLES[name], out=said.append)
    assert runner.summarize(verbose=False) == (0, len(EXAMPLES[name].examples)), "".join(said)


# ---- help ----------------------------------------------------------------------------------------


def walk(parser, words=()):
    """(words of the verb, its parser) of all verbs and actions, the program itself first."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from walk(below, (*words, name))


PARSERS = dict(walk(cli.parser()))


@pytest.mark.parametrize("words", PARSERS, ids=" ".join)
def test_help_is_complete_with_an_example_that_parses(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.parser().parse_args([*words, "--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and shown.startswith(f"usage: {' '.join(('delve', *words))} ")
    for action in PARSERS[words]._actions:
        if not isinstance(action, argparse._SubParsersAction):
            assert action.help and "TODO" not in action.help, action
    first, *example = shlex.split(" ".join(shown.rpartition("example: ")[2].split()))
    assert first == "delve" and tuple(example[: len(words)]) == words
    args = cli.parser().parse_args(example)
    assert args.verb == (words[0] if words else "upcycle")


def test_example_of_the_help_is_the_whole_epilog():
    assert all(parser.epilog.startswith("example: delve ") for parser in PARSERS.values())
    verbs = {words[-1] for words in PARSERS if words} - {"delphi", "prepare"}
    assert verbs == set(cli.EXAMPLES)


# ---- trackers ------------------------------------------------------------------------------------

# where the real packages are not installed, these stand for them: they write what they are told
FAKES = {
    "tensorboardX": """
import json, pathlib
class SummaryWriter:
    def __init__(self, folder, purge_step=None):
        pathlib.Path(folder).mkdir(exist_ok=True)
        self.file = open(folder + "/fake", "a")
        self.say("start", purge_step)
    def say(self, *words):
        self.file.write(json.dumps(words) + chr(10))
    def add_scalar(self, name, value, step):
        self.say(name, value, step)
    def close(self):
        self.say("close")
        self.file.close()
""",
    "wandb": """
import json, os
class Run:
    def say(self, *words):
        self.file.write(json.dumps(words) + chr(10))
    def log(self, numbers, step):
        self.say(step, numbers)
    def finish(self):
        self.say("finish")
        self.file.close()
def init(**how):
    if os.environ.get("WANDB_MODE") != "offline":
        raise RuntimeError("api_key not configured (no-tty)")
    run = Run()
    run.file = open(how["dir"] + "/wandb/fake", "a")
    run.say("start", how)
    return run
""",
}


@pytest.fixture
def trackers(tmp_path, monkeypatch):
    """Packages to track with: the real ones where they are installed; -> names of stand-ins."""
    faked = {name for name in FAKES if importlib.util.find_spec(name) is None}
    for name in faked:
        (tmp_path / "fakes").mkdir(exist_ok=True)
        (tmp_path / "fakes" / f"{name}.py").write_text(FAKES[name])
    monkeypatch.syspath_prepend(tmp_path / "fakes")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield faked
    for name in faked:
        sys.modules.pop(name, None)


def lines_of(file) -> list:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_trackers_get_the_numbers_and_resume(trackers, tmp_path):
    path = tmp_path / "run.partial" / "metrics.jsonl"
    for start in (0, 2):  # the second call goes on from step 2
        with metrics.MetricsLog(path, sinks=metrics.SINKS) as log:
            log.rewind(start)
            for step in range(start + 1, start + 4):
                log.log(step, loss=1 / step, note="words are not drawn")
    assert [line["step"] for line in metrics.read_metrics(path)] == [1, 2, 3, 4, 5]
    board, offline = path.parent / "tensorboard", path.parent / "wandb"
    if "tensorboardX" in trackers:
        first = [["start", 1], *(["loss", 1 / n, n] for n in (1, 2, 3)), ["close"]]
        second = [["start", 3], *(["loss", 1 / n, n] for n in (3, 4, 5)), ["close"]]
        assert lines_of(board / "fake") == first + second
    else:
        assert len([*board.glob("events.out.tfevents.*")]) >= 1
    if "wandb" in trackers:
        said = lines_of(offline / "fake")
        starts = [line[1] for line in said if line[0] == "start"]
        assert starts[0] == starts[1] and starts[0]["resume"] == "allow"  # one id: one run
        assert starts[0]["name"] == "run" and len(starts[0]["id"]) == 8
        assert [line[0] for line in said if line[0] != "start"] == [1, 2, 3, "finish", 3, 4, 5,
                                                                    "finish"]  # fmt: skip
    else:
        assert [*offline.glob("offline-run-*")]


def test_trackers_that_are_missing_are_named(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    gone = lambda name: None if name in FAKES else real(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    src = upcycle.embedded_parents()[-1]
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        line = bad(capsys, "heal", src, tmp_path / "d", "--data", "t.txt", "--tokens", 8, "--track",
                   name)  # fmt: skip
        assert f"--track {name}" in line and f"pip install {package}" in line
    assert not list(tmp_path.iterdir())
    assert "--track" in bad(capsys, "train", "proxy-neox", "d", "--data", "t", "--tokens", 8,
                            "--track", "smoke")  # fmt: skip


def test_wandb_without_a_key_is_one_line(trackers, tmp_path, monkeypatch):
    if "wandb" not in trackers:
        pytest.skip("the real wandb would ask the network")
    monkeypatch.delenv("WANDB_MODE")
    log = metrics.MetricsLog(tmp_path / "run" / "metrics.jsonl", sinks=["wandb"])
    with pytest.raises(DelveError, match="--track wandb: api_key .*WANDB_MODE=offline"):
        log.log(1, loss=1.0)
    log.close()


def test_track_flag_reaches_a_staged_run(trackers, tmp_path, capsys, monkeypatch):
    """Stages go when they are done; what they told the trackers stays with the result."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def double(x):\n    return 2 * x\n" * 99)
    stages = [{"name": n, "share": 0.5, "ce": 1.0, "kl": 0.0} for n in ("one", "two")]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    argv = ("heal", upcycle.embedded_parents()[2], "healed", "--stages", "stages.json", "--data",
            "text.txt", "--tokens", 64, "--batch", 2, "--window", 16)  # fmt: skip
    code, out, err = delve(capsys, *argv, "--track", "tensorboard")
    assert code == 0 and out["heal"]["steps"] == 2, err
    found = {p.name: sorted(f.name for f in p.iterdir()) for p in
             (tmp_path / "healed" / "tensorboard").iterdir()}  # fmt: skip
    assert set(found) == {"1-one", "2-two"} and all(found.values())
    code, _, err = delve(capsys, *argv)  # what is tracked is not what the result is
    assert code == 0 and "already done" in err
