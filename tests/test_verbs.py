"""`delve data`, `delve train` and what follows, through the command line: files, repeats, refusals.

The presets of this file are tiny ones, named like the real proxy where its name is what counts.
"""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from commands import bad, delve

from delve_jax import checkpoint, cli, data, models, presets, upcycle
from delve_jax.config import NeoxConfig
from delve_jax.metrics import read_metrics
from delve_jax.train import loop

TOKENIZER = upcycle.PROXIES / "neox" / "tokenizer.json"
TINY = NeoxConfig(
    vocab_size=3840, vocab_rows=3840, d_model=16, n_layers=1, n_heads=2, d_ffn=32,
    context_length=64,
)  # fmt: skip
SMALL = NeoxConfig(300, 300, 16, 1, n_heads=2, d_ffn=32, context_length=64)
SIZE = ("--tokens", 2048, "--batch", 4, "--window", 64, "--lr", 0.01)


@pytest.fixture(scope="module", autouse=True)
def tiny_presets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "proxy-neox", lambda: TINY)
        patch.setitem(presets.PRESETS, "small", lambda: SMALL)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two texts, each also as a token folder."""
    root = tmp_path_factory.mktemp("verbs")
    documents = [d[:3000] for d in data.stdlib_documents()[:24]]
    for name, part in (("a", documents[:12]), ("b", documents[12:20]), ("held", documents[20:])):
        (root / f"{name}.txt").write_text("\n<|endoftext|>\n".join(part))
        argv = ["data", "prepare", root / f"{name}.txt", root / name, "--tokenizer", TOKENIZER]
        assert cli.main(list(map(str, argv))) == 0
    return root


def arrays(path) -> dict:
    return jax.tree.map(np.asarray, checkpoint.restore(path)[1])


# ---- data ----------------------------------------------------------------------------------------


def test_the_list_of_data_sets(capsys):
    code, out, _ = delve(capsys, "data", "list")
    rows = {row["name"]: row for row in out["rows"]}
    assert code == 0 and {"data set", "mixture"} == {row["kind"] for row in rows.values()}
    assert "dolma" in rows or len(rows) > 20
    assert all(row["licence"] for row in rows.values() if row["kind"] == "data set")
    assert cli.main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows)
    assert all(line.startswith(name) for line, name in zip(lines, rows, strict=True))


def test_prepare_leaves_a_token_folder(place, capsys):
    argv = ("data", "prepare", place / "a.txt", place / "a", "--tokenizer", TOKENIZER)
    files = data.open_tokens(place / "a")
    files.verify()
    assert files.tokens > 2048 and not list(place.glob("*.partial"))
    code, out, err = delve(capsys, *argv)
    assert code == 0 and out["already"] and "already done" in err and out["tokens"] == files.tokens
    line = bad(capsys, *argv, "--split", "train")
    assert str(place / "a") in line and "--overwrite" in line
    line = bad(capsys, "data", "prepare", place / "b.txt", place / "a", "--tokenizer", TOKENIZER)
    assert str(place / "a") in line


def test_prepare_refuses_by_name(place, capsys, tmp_path):
    made = (tmp_path / "t", "--tokenizer", TOKENIZER)
    assert "gone.txt" in bad(capsys, "data", "prepare", tmp_path / "gone.txt", *made)
    line = bad(capsys, "data", "prepare", place / "a.txt", tmp_path / "t")
    assert "--tokenizer" in line
    line = bad(capsys, "data", "prepare", place / "a.txt", *made[:2], tmp_path / "no.json")
    assert "no.json" in line
    assert "--split" in bad(capsys, "data", "prepare", place / "a.txt", *made, "--split", "x")
    assert "action" in bad(capsys, "data")
    assert not list(tmp_path.iterdir())


# ---- train ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(place):
    """`delve train` of eight steps on a token folder, whose tokenizer it takes."""
    argv = ["train", "proxy-neox", place / "run", "--data", place / "a", *SIZE]
    assert cli.main(list(map(str, argv))) == 0
    return place / "run"


def test_train_leaves_a_checkpoint_with_its_record(trained):
    names = {p.name for p in trained.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "params", "run.json", "tokenizer.json",
                     "train.json", "lineage.json"}  # fmt: skip
    assert checkpoint.load_config(trained) == TINY
    assert (trained / "tokenizer.json").read_text() == TOKENIZER.read_text()
    lines = read_metrics(trained / "metrics.jsonl")
    assert [m["step"] for m in lines] == list(range(1, 9)) and lines[-1]["tokens"] == 2048
    assert lines[-1]["nll"] < lines[0]["nll"] < math.log(3840) + 0.5
    report = json.loads((trained / "train.json").read_text())
    assert report["steps"] == 8 and report["tokens"] == 2048
    assert report["parameters"] == models.count(TINY)
    assert not list(trained.parent.glob("*.partial"))


def test_train_again_is_done_and_other_arguments_are_refused(trained, place, capsys):
    argv = ("train", "proxy-neox", trained, "--data", place / "a", *SIZE)
    before = arrays(trained)
    # how often states are saved is not what the result is
    for more in ((), ("--save-every", 3), ("--keep-every", 5, "--save-minutes", 1)):
        code, out, err = delve(capsys, *argv, *more)
        assert code == 0 and "already done" in err and out["already"], more
        assert out["family"] == "neox"
    for more in (("--lr", 0.02), ("--seed", 1), ("--compute", "bfloat16"), ("--z-loss", 1e-4)):
        line = bad(capsys, *argv, *more)
        assert str(trained) in line and "--overwrite" in line, more
    jax.tree.map(np.testing.assert_array_equal, before, arrays(trained))


def test_a_stopped_run_goes_on_whatever_moves_no_number(
    trained, place, capsys, tmp_path, monkeypatch
):
    dst, report = tmp_path / "run", loop._report
    argv = ("train", "proxy-neox", dst, "--data", place / "a", *SIZE)

    def stopped(log, bar, clock, per_step, step, metrics):
        report(log, bar, clock, per_step, step, metrics)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_report", stopped)
    code, out, err = delve(capsys, *argv, "--save-every", 2)
    assert code == 130 and out is None and "same command goes on" in err and not dst.exists()
    partial = tmp_path / "run.partial"
    assert checkpoint.Steps(partial / "state").numbers() == [2, 4]
    monkeypatch.setattr(loop, "_report", report)
    line = bad(capsys, *argv, "--seed", 1)
    assert str(partial) in line and "--overwrite" in line
    # the run under way is a model already
    code, out, _ = delve(capsys, "info", partial)
    assert code == 0 and out["parameters"] == models.count(TINY)
    shutil.copytree(partial, tmp_path / "cut.partial")
    code, out, _ = delve(capsys, *argv, "--save-every", 3)
    assert code == 0 and out["train"]["steps"] == 8
    jax.tree.map(np.testing.assert_array_equal, arrays(dst), arrays(trained))
    lines, want = (read_metrics(p / "metrics.jsonl") for p in (dst, trained))
    assert [(m["step"], m["loss"]) for m in lines] == [(m["step"], m["loss"]) for m in want]
    # cut otherwise, and layers computed again: the same but for round-off
    argv = [*argv[:2], tmp_path / "cut", *argv[3:]]
    code, out, _ = delve(capsys, *argv, "--accumulate", 2, "--remat", "layer")
    assert code == 0 and out["train"]["steps"] == 8
    lines = read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert [m["step"] for m in lines] == [m["step"] for m in want]
    np.testing.assert_allclose([m["loss"] for m in lines], [m["loss"] for m in want], rtol=1e-5)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "cut"}


def test_the_trained_model_is_evaluated_and_continued(trained, place, capsys):
    code, out, _ = delve(capsys, "eval", trained, "--text", place / "held.txt")
    assert code == 0 and 4 < out["nll_per_token"] < math.log(3840)
    assert out["tokens"] > 500
    code, out, _ = delve(capsys, "generate", trained, "--prompt", "import", "--max-new-tokens", 4)
    assert code == 0 and len(out["tokens"]) == 4


def test_weights_of_a_mixture(place, capsys, tmp_path):
    argv = ("train", "proxy-neox", tmp_path / "m", "--tokens", 512, *SIZE[2:], "--data")
    code, out, _ = delve(capsys, *argv, f"{place / 'a'}=0.7", f"{place / 'b'}=0.3")
    assert code == 0 and out["train"]["steps"] == 2
    refused = {
        (place / "a", f"{place / 'b'}=0.3"): "no weight",
        (f"{place / 'a'}=much",): "'much' is not a number",
        (f"{place / 'a'}=1", f"{place / 'b'}=-1"): "must be positive",
        (place / "a", place / "a"): "named twice",
        (place / "gone",): "gone",
        (place,): "manifest.json",
    }
    for i, (items, said) in enumerate(refused.items()):
        line = bad(
            capsys, *argv[:2], tmp_path / f"r{i}", *argv[3:], *items, "--tokenizer", TOKENIZER
        )
        assert said in line, line
        assert not (tmp_path / f"r{i}").exists()


REFUSED = [
    (("--batch", 3, "--accumulate", 2), "--batch 3: must be a multiple of 2"),
    (("--batch", 0), "--batch 0"),
    (("--accumulate", 0), "--accumulate 0"),
    (("--tokens", 0), "--tokens 0"),
    (("--window", 0), "--window 0"),
    (("--lr", 0), "--lr 0"),
    (("--lr", "nan"), "--lr nan"),
    (("--compute", "float64"), "--compute float64: set the environment variable JAX_ENABLE_X64"),
    (("--compute", "float8"), "--compute"),
    (("--optimizer", "sgd"), "--optimizer"),
    (("--schedule", "step"), "--schedule"),
    (("--remat", "some"), "--remat"),
    (("--mesh", "rows=2"), "--mesh rows=2"),
    (("--mesh", "data=64"), "--mesh data=64"),
    (("--distributed", "here"), "--distributed here"),
    (("--warmup", 0.9, "--decay", 0.5), "--warmup 0.9"),
    (("--save-every", 0), "--save-every 0"),
    (("--warmup", -0.5), "--warmup -0.5"),
    (("--clip", 0), "--clip 0"),
    (("--seed", -1), "--seed: -1: a seed is a whole number from 0"),
    (("--seed", 2**32), "--seed: 4294967296"),
    (("--b2", 1.5), "--b2 1.5"),
    (("--adam-lr", -1, "--optimizer", "adamh"), "--adam-lr -1"),
    (("--tokenizer", "/nowhere/tokenizer.json"), "/nowhere/tokenizer.json"),
    (("--window", 10**6), "a window needs 1000001"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_refusals_name_the_flag(flags, said, place, capsys, tmp_path):
    line = bad(capsys, "train", "proxy-neox", tmp_path / "d", "--data", place / "a", *SIZE, *flags)
    assert said in line and not (tmp_path / "d").exists()


def test_tokenizers_that_do_not_fit(place, capsys, tmp_path):
    text = ("--data", place / "a.txt", *SIZE)
    line = bad(capsys, "train", "small", tmp_path / "d", *text, "--tokenizer", TOKENIZER)
    assert f"--tokenizer {TOKENIZER}" in line and "3,840 ids" in line and "300" in line
    line = bad(capsys, "train", "small", tmp_path / "d", "--data", place / "a", *SIZE)
    assert "--tokenizer" in line and "3,840 ids" in line
    line = bad(capsys, "train", "proxy-neox", tmp_path / "d", *text)
    assert "--tokenizer" in line and "3,840" in line
    assert "preset nothing" in bad(capsys, "train", "nothing", tmp_path / "d", *text)
    other = json.loads(TOKENIZER.read_text())
    vocab = other["model"]["vocab"]
    a, b = list(vocab)[40:42]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "other.json").write_text(json.dumps(other))
    line = bad(capsys, "train", "proxy-neox", tmp_path / "e", "--data", place / "a", *SIZE,
               "--tokenizer", tmp_path / "other.json")  # fmt: skip
    assert str(place / "a") in line and "another tokenizer" in line
    assert not (tmp_path / "d").exists() and not (tmp_path / "e").exists()


def test_a_tokenizer_may_be_any_source(trained, place, capsys, tmp_path):
    """A checkpoint's; the text is read as it is."""
    code, out, _ = delve(capsys, "train", "proxy-neox", tmp_path / "d", "--data", place / "a.txt",
                         *SIZE[2:], "--tokens", 256, "--tokenizer", trained)  # fmt: skip
    assert code == 0 and out["tokenizer"]
    assert (tmp_path / "d" / "tokenizer.json").read_text() == TOKENIZER.read_text()


def test_accumulation_and_cosine(trained, place, capsys, tmp_path):
    """The first loss is that of the whole batch; after the last step the rate is not 0."""
    code, _, _ = delve(capsys, "train", "proxy-neox", tmp_path / "d", "--data", place / "a", *SIZE,
                       "--accumulate", 2, "--schedule", "cosine")  # fmt: skip
    first, last = (read_metrics(tmp_path / "d" / "metrics.jsonl")[i]["loss"] for i in (0, -1))
    want = [m["loss"] for m in read_metrics(trained / "metrics.jsonl")]
    assert code == 0 and first == pytest.approx(want[0], rel=1e-5)
    assert last != want[-1] and last < first


def test_adamh_in_bfloat16(trained, place, capsys, tmp_path):
    """AdamH keeps the norm of every map and AdamW does not; weights stay float32."""
    code, _, _ = delve(capsys, "train", "proxy-neox", tmp_path / "d", "--data", place / "a", *SIZE,
                       "--optimizer", "adamh", "--compute", "bfloat16", "--schedule", "linear",
                       "--remat", "dots", "--z-loss", 1e-4)  # fmt: skip
    lines = read_metrics(tmp_path / "d" / "metrics.jsonl")
    first = read_metrics(trained / "metrics.jsonl")[0]["nll"]
    assert code == 0 and 0 < abs(lines[0]["nll"] - first) < 0.01 * first
    z = lines[0]["loss"] - lines[0]["nll"]  # 1e-4 logsumexp^2, near ln(3840) at the start
    assert z == pytest.approx(1e-4 * math.log(3840) ** 2, rel=0.05)
    start = models.init_params(TINY, jax.random.key(0))
    norm = lambda p: float(np.linalg.norm(p["layers"]["mlp"]["up"]["kernel"][0]))  # noqa: E731
    ours, theirs = arrays(tmp_path / "d"), arrays(trained)
    assert {x.dtype.name for x in jax.tree.leaves(ours)} == {"float32"}
    assert norm(ours) == pytest.approx(norm(start), rel=1e-5)
    assert abs(norm(theirs) - norm(start)) > 1e-3
    kernels = [p["layers"]["mlp"]["up"]["kernel"] for p in (ours, start)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_a_prepared_mixture_is_trained_on(place, capsys, tmp_path):
    """A folder of parts with their weights, as `prepare` of a mixture leaves it."""
    folder = tmp_path / "mix"
    folder.mkdir()
    for part in "ab":
        shutil.copytree(place / part, folder / part)
    record = {"mixture": "ab", "weights": {"a": 3.0, "b": 1.0}}
    (folder / "mixture.json").write_text(json.dumps(record))
    code, out, err = delve(capsys, "train", "proxy-neox", tmp_path / "d", "--data", folder,
                           *SIZE[2:], "--tokens", 256)  # fmt: skip
    assert code == 0, err
    assert out["train"]["steps"] == 1 and out["tokenizer"]


def test_raw_bytes(place, capsys, tmp_path, monkeypatch):
    """A vocabulary of 256 needs no tokenizer: text as it is, or a token folder made without one."""
    tiny = dataclasses.replace(SMALL, vocab_size=256, vocab_rows=256)
    monkeypatch.setitem(presets.PRESETS, "bytes", lambda: tiny)
    data.prepare([place / "a.txt"], tmp_path / "t", tokenizer=None)
    losses = []
    for name, source in (("text", place / "a.txt"), ("folder", tmp_path / "t")):
        code, out, err = delve(capsys, "train", "bytes", tmp_path / name, "--data", source,
                               *SIZE[2:], "--tokens", 256)  # fmt: skip
        assert code == 0, err
        assert out["tokenizer"] is None and not (tmp_path / name / "tokenizer.json").exists()
        losses.append(read_metrics(tmp_path / name / "metrics.jsonl")[-1]["loss"])
    assert losses[0] == losses[1]
