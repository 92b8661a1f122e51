"""Claiming a DST: who may go on with work that stands there, and what is refused."""

import json

import pytest
from commands import bad

from delve_jax import checkpoint, cli, data, parallel, road, training, upcycle
from delve_jax.config import DelveError
from delve_jax.train.run import Settings

COMMAND = {"verb": "compress", "keep": 0.5}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("some text")
    return file


def begun(tmp_path, text) -> None:
    """Work of COMMAND that is not finished."""
    assert not road.begin(tmp_path / "out", COMMAND, text=[text])
    (tmp_path / "out.partial" / "work").mkdir()


def test_work_goes_on_with_the_same_text_only(tmp_path, text):
    dst, partial = tmp_path / "out", tmp_path / "out.partial"
    begun(tmp_path, text)
    assert not road.begin(dst, COMMAND, text=[text]) and (partial / "work").exists()
    text.write_text("some other")  # of the same size
    with pytest.raises(DelveError, match=rf"^{text}: has changed .*--overwrite"):
        road.begin(dst, COMMAND, text=[text])
    text.write_text("some text")
    assert not road.begin(dst, COMMAND, text=[text]) and (partial / "work").exists()
    text.write_text("some other")
    assert not road.begin(dst, COMMAND, overwrite=True, text=[text])
    assert not (partial / "work").exists()
    assert not road.begin(dst, COMMAND, text=[text])  # the new text is the run's own now


@pytest.mark.parametrize("left", ["", "run.json.writing"])
def test_a_folder_that_is_not_ours_is_refused_and_an_empty_one_is_taken(tmp_path, text, left):
    """Without run.json stands what somebody else made, or what a kill before it was whole left."""
    dst, partial = tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years")
    with pytest.raises(DelveError, match=rf"^{partial}: .*move it, or --overwrite$"):
        road.begin(dst, COMMAND, text=[text])
    assert (partial / "thesis.txt").read_text() == "years"
    assert not road.begin(dst, COMMAND, overwrite=True, text=[text])
    assert [p.name for p in partial.iterdir()] == ["run.json"]
    (partial / "run.json").unlink()
    if left:
        (partial / left).write_text("{")
    assert not road.begin(dst, COMMAND, text=[text])
    assert json.loads((partial / "run.json").read_text())["command"] == COMMAND


def test_finished_work_says_so_unless_its_text_has_changed(tmp_path, text):
    dst = tmp_path / "out"
    begun(tmp_path, text)
    (tmp_path / "out.partial").rename(dst)
    assert road.begin(dst, COMMAND, text=[text])
    text.rename(tmp_path / "elsewhere")  # it is done: nobody needs the text any more
    assert road.begin(dst, COMMAND, text=[text])
    text.write_text("some other")
    with pytest.raises(DelveError, match=rf"^{text}: has changed .*--overwrite"):
        road.begin(dst, COMMAND, text=[text])


def test_a_record_of_before_texts_were_hashed_is_taken_as_it_is(tmp_path, text):
    begun(tmp_path, text)
    record = tmp_path / "out.partial" / "run.json"
    record.write_text(json.dumps({"command": COMMAND}))
    assert not road.begin(tmp_path / "out", COMMAND, text=[text])
    assert (tmp_path / "out.partial" / "work").exists()
    assert json.loads(record.read_text())["text"] == data.text_hashes([text])


@pytest.mark.parametrize("where", ["out", "out.partial"])
def test_a_damaged_record_is_refused_and_overwritten(tmp_path, text, where):
    begun(tmp_path, text)
    (tmp_path / "out.partial").rename(tmp_path / where)
    record = tmp_path / where / "run.json"
    record.write_text(record.read_text()[:20])
    with pytest.raises(DelveError, match=rf"^{record}: not readable .*--overwrite$"):
        road.begin(tmp_path / "out", COMMAND, text=[text])
    assert not road.begin(tmp_path / "out", COMMAND, overwrite=True, text=[text])
    assert not (tmp_path / "out.partial" / "work").exists()


def test_text_hashes(tmp_path, text):
    """Files by their bytes, folders by their shards; a weight is no part; nothing is refused."""
    folder = tmp_path / "mix" / "a"
    folder.mkdir(parents=True)
    manifest = {"shards": [{"sha256": "12"}], "made": "today"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "mix" / "mixture.json").write_text('{"weights": {"a": 1}}')
    found = data.text_hashes([f"{text}=0.5", tmp_path / "mix", tmp_path / "gone"])
    assert set(found) == {str(text), str(folder), str(tmp_path / "mix" / "mixture.json")}
    manifest["made"] = "tomorrow"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert data.text_hashes([folder])[str(folder)] == found[str(folder)]
    manifest["shards"][0]["sha256"] = "13"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert data.text_hashes([folder])[str(folder)] != found[str(folder)]
    (folder / "manifest.json").write_text("{")
    assert data.text_hashes([folder]) == {}


def test_every_verb_that_reads_text_hands_it_to_the_claim(tmp_path, text, monkeypatch):
    claimed = []

    def begin(dst, command, overwrite=False, text=()):
        claimed.append(list(text))
        raise DelveError("claimed")

    monkeypatch.setattr(road, "begin", begin)
    monkeypatch.setattr(training, "begin", begin)
    parent, dst, few = upcycle.embedded_parents()[0], tmp_path / "out", Settings(tokens=1)
    for call, wanted in (
        (lambda: road.compress(parent, dst, keep=0.5, calibrate=["a"]), ["a"]),
        (lambda: road.fuse([parent], dst, calibrate=["a"]), ["a"]),
        (lambda: training.heal(parent, dst, few, text=["a=2"]), ["a=2"]),
        (lambda: training.train("proxy-neox", dst, few, text=["a"], tokenizer=parent), ["a"]),
        (lambda: upcycle.upcycle(out=dst, text="a", calibrate="b", report_text="c"), [*"abc"]),
    ):
        with pytest.raises(DelveError, match="claimed"):
            call()
        assert claimed.pop() == wanted


def test_fuse_is_claimed_for_its_teachers(tmp_path, monkeypatch):
    """Named ones are part of what was made; those that the sources recorded are found anew."""
    claimed = []

    def begin(dst, command, *rest):
        claimed.append(command)
        raise DelveError("claimed")

    monkeypatch.setattr(road, "begin", begin)
    for teachers in (None, ["a", "b"], ["b", "a"]):
        with pytest.raises(DelveError, match="claimed"):
            road.fuse(["x", "y"], tmp_path / "out", teachers=teachers)
    none, one, other = claimed
    assert "teachers" not in none and one["teachers"] == ["a", "b"] != other["teachers"]


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_verbs_of_one_process_refuse_to_be_one_of_several(tmp_path, capsys, monkeypatch, name):
    parallel.one_process("delve x")
    monkeypatch.setenv(name, "1")
    parallel.one_process("delve x")
    monkeypatch.setenv(name, "4")
    flags = {"compress": ["a", "b", "--keep", "0.5"], "fuse": ["a", "b", "c"], "export": ["a", "b"],
             "convert": ["a", "b"], "data prepare": ["a", "b", "--tokenizer", "c"],
             "delphi sweep": ["a", "--data", "b", "--report-text", "c"], "upcycle": []}  # fmt: skip
    assert set(flags) == cli.ONE_PROCESS
    monkeypatch.chdir(tmp_path)
    for verb, more in flags.items():
        line = bad(capsys, *verb.split(), *more)
        assert line.startswith(f"error: delve {verb}: runs in one process") and "of 4" in line
    assert not list(tmp_path.iterdir())


def test_overwrite_leaves_alone_what_no_verb_made(tmp_path):
    """`delve convert out/healed out --overwrite`, with "/hf" forgotten, would take all of out/."""
    (tmp_path / "out" / "healed").mkdir(parents=True)
    (tmp_path / "out" / "thesis.txt").write_text("words")
    with pytest.raises(DelveError, match=r"out: holds healed .*name another DST$"):
        road.begin(tmp_path / "out", COMMAND, overwrite=True)
    with (
        pytest.raises(DelveError, match="leaves it alone"),
        checkpoint.writing(tmp_path / "out", overwrite=True),
    ):
        pass
    assert (tmp_path / "out" / "thesis.txt").exists()
    (tmp_path / "out" / "run.json").write_text("{}")  # what a verb leaves
    assert not road.begin(tmp_path / "out", COMMAND, overwrite=True)
