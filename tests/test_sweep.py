"""`delve delphi sweep`: ladders that are trained, scored, gathered, gone on with, and refused."""

import csv
import json
import shutil

import pytest

from delve_jax import checkpoint, cli, data, evaluate, lm, presets, road, sweep, upcycle
from delve_jax.config import DelveError, read_json, to_json, write_json
from delve_jax.delphi import points, recipe
from delve_jax.metrics import read_metrics

TOY = {"seq_len": 32, "vocab_size": 256, "head_dim": 8, "min_hidden": 16, "fine_step": 16,
       "max_steps": 16, "min_batch": 1, "T0": 1e4, "B0": 4}  # fmt: skip
FLOPS = ("4e8", "8e8")


def delve(capsys, *argv):
    """(exit code, parsed stdout or None, stderr) of the verb with --json."""
    capsys.readouterr()
    try:
        code = cli.main(["delphi", "sweep", *map(str, argv), "--json"])
    except SystemExit as err:  # argparse
        code = err.code
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.strip() else None, err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A text to train on, one to score on, the toy recipe."""
    root = tmp_path_factory.mktemp("sweep")
    documents = [d[:2000] for d in data.stdlib_documents()[:44]]
    parts = {"train": documents[:36], "report": documents[36:40], "other": documents[40:]}
    for name, part in parts.items():
        (root / f"{name}.txt").write_text("\n<|endoftext|>\n".join(part))
    (root / "toy.json").write_text(json.dumps(TOY))
    return root


def flags(place, *more):
    return ("--data", place / "train.txt", "--report-text", place / "report.txt", *more)


@pytest.fixture
def untrained(monkeypatch):
    """Sweeps that stop short of the work: every run is a folder with its score alone."""

    def score(folder, job, *_):
        folder.mkdir(parents=True)
        found = dict.fromkeys(("loss", "bits_per_byte", "train_loss"), 1.0)
        write_json(folder / sweep.SCORE, job.facts | found | {"run": job.name})

    monkeypatch.setattr(sweep.training, "train", lambda *_, **__: {})
    monkeypatch.setattr(sweep, "_score", score)


def test_a_ladder(place, capsys):
    """Every candidate of the recipe at every budget: trained with its rates, scored, one row."""
    toy = flags(place, "--recipe", place / "toy.json", "--hidden", 16)
    dst = place / "ladder"
    code, out, err = delve(capsys, dst, "--flops", *FLOPS, *toy)
    assert code == 0 and "sweep" in err, err
    rules = recipe.read(place / "toy.json")
    rows = list(csv.DictReader((dst / "points.csv").open()))
    assert tuple(rows[0]) == sweep.COLUMNS and len(rows) == len(out["rows"]) == 2
    for row, C in zip(rows, map(float, FLOPS), strict=True):
        c, r = rules.candidate(C, 16), rules.config(C, 16)
        for name, value in {"flops": C, "params": c.params, "tokens": c.tokens, "steps": c.steps,
                            "train_flops": c.flops, "lr": r["lr"], "seed": 0}.items():  # fmt: skip
            assert float(row[name]) == value, name
        folder = dst / "runs" / row["run"]
        ran = json.loads((folder / "run.json").read_text())["command"]
        for field, name in {"lr": "lr", "adam_lr": "adam_lr", "b2": "beta2", "eps": "epsilon",
                            "clip": "max_grad_norm", "z_loss": "z_loss"}.items():  # fmt: skip
            assert ran[field] == r[name]
        assert ran["optimizer"] == "adamh" and ran["tokens"] == c.tokens
        assert checkpoint.load_config(folder).d_model == 16
        documents = data.read_documents(place / "report.txt")
        found = evaluate.evaluate(lm.load(folder), documents)
        assert float(row["loss"]) == pytest.approx(found["nll_per_token"], rel=1e-6)
        assert float(row["train_loss"]) == read_metrics(folder / "metrics.jsonl")[-1]["loss"]
    assert len(points.read(dst / "points.csv").budgets) == 2

    # again: nothing is run; a run whose score is missing is scored, one that is gone is trained
    before = {f: f.stat().st_mtime_ns for f in dst.glob("runs/*/score.json")}
    shutil.rmtree(dst / "runs" / rows[0]["run"])
    (dst / "runs" / rows[1]["run"] / sweep.SCORE).unlink()
    code, again, _ = delve(capsys, dst, "--flops", *FLOPS, *toy)
    assert code == 0 and again["rows"] == out["rows"]
    assert all(f.stat().st_mtime_ns != t for f, t in before.items())
    # another seed is another run beside them, with other weights
    code, more, _ = delve(capsys, dst, "--flops", FLOPS[0], "--seeds", 0, 1, *toy)
    assert code == 0 and len(more["rows"]) == 3
    assert more["rows"][0]["loss"] != more["rows"][1]["loss"]
    # what all points have in common cannot change
    for changed in (("--lr", 0.01), ("--data", place / "other.txt"), ("--tokenizer", "t.json")):
        code, _, err = delve(capsys, dst, "--flops", FLOPS[0], *toy, *changed)
        assert code == 2 and "name another DST" in err
    code, _, err = delve(capsys, dst, "--flops", "4.001e8", *toy)  # whose name is C4e+08 too
    assert code == 2 and "is the run of flops 400000000.0, not 400100000.0" in err


def test_text_or_tokenizer_that_changed_is_refused(place, tmp_path, capsys, untrained):
    """The paths alone would let points of other data into one file of points."""
    kinds = {"text": tmp_path / "text.txt", "tokenizer": tmp_path / "t" / "tokenizer.json"}
    kinds["tokenizer"].parent.mkdir()
    for file in kinds.values():
        file.write_text("{}")
    argv = ("--data", place / "train.txt", kinds["text"], "--tokenizer", tmp_path / "t",
            "--report-text", place / "report.txt", "--recipe", place / "toy.json",
            "--hidden", 16)  # fmt: skip
    dst = tmp_path / "dst"
    assert delve(capsys, dst, "--flops", FLOPS[0], *argv)[0] == 0
    for file in kinds.values():
        file.write_text('{"now": "another"}')
        code, _, err = delve(capsys, dst, "--flops", FLOPS[1], *argv)
        assert code == 2 and f"{file}: has changed since {dst} was begun" in err
        file.write_text("{}")
    assert delve(capsys, dst, "--flops", FLOPS[1], *argv)[0] == 0
    # a sweep that an earlier version began knows its paths only, and goes on
    record = read_json(dst / "sweep.json")
    write_json(dst / "sweep.json", {"command": record["command"]})
    kinds["text"].write_text("another")
    assert delve(capsys, dst, "--flops", FLOPS[1], *argv)[0] == 0


def test_runs_of_one_name(place, tmp_path, capsys, untrained):
    """Two budgets that print alike are refused before the first is trained; twice said is once."""
    toy = flags(place, "--recipe", place / "toy.json", "--hidden", 16)
    code, _, err = delve(capsys, tmp_path / "dst", "--flops", "4e8", "4.001e8", *toy)
    assert code == 2 and "400000000.0 and 400100000.0 would both be the run C4e+08-h16-s0" in err
    assert not (tmp_path / "dst").exists()
    twice = ("--flops", "4e8", "4e8", "--seeds", 0, 0)
    code, out, _ = delve(capsys, tmp_path / "dst", *twice, *toy)
    assert code == 0 and len(out["rows"]) == 1


@pytest.mark.parametrize("weight", ["", "=0.5"])
def test_report_text_must_be_unseen(weight, place, tmp_path, capsys, untrained):
    """A law of losses on the training text is none; see also `delve upcycle`."""
    argv = ("--data", f"{place / 'train.txt'}{weight}", f"{place / 'report.txt'}{weight}",
            "--report-text", place / "report.txt", "--recipe", place / "toy.json",
            "--hidden", 16)  # fmt: skip
    code, _, err = delve(capsys, tmp_path / "dst", "--flops", FLOPS[0], *argv)
    assert code == 2 and "--report-text: 4 of its documents are also in --data" in err
    assert not (tmp_path / "dst").exists()


def test_a_run_is_scored_as_it_was_trained(place, tmp_path, monkeypatch):
    """On the run's mesh, in windows of its rows: 2,048 tokens are not scored 1,024 at a time."""
    rules = recipe.Recipe(**TOY | {"seq_len": 2048})
    job = sweep._candidates(rules, [1e11], [16], [0], {}, [place / "train.txt"], None, "data=1")[0]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    asked = {}
    monkeypatch.setattr(sweep.lm, "load", lambda folder, mesh=None: asked.update(mesh=mesh))
    monkeypatch.setattr(
        sweep.evaluate, "evaluate",
        lambda model, documents, window=None: (
            asked.update(window=window) or {"nll_per_token": 1.0, "bits_per_byte": 1.0}
        ),
    )  # fmt: skip
    sweep._score(tmp_path, job, ["text"], "data=1")
    assert asked["window"] == 2048 and asked["mesh"].shape["data"] == 1
    assert read_json(tmp_path / sweep.SCORE)["window"] == 2048


def test_points_of_an_earlier_version(place, tmp_path, capsys, untrained):
    """They go on where this version would have made the same ones, and are refused elsewhere."""
    rules = recipe.read(place / "toy.json")
    for how, said in (
        ((), None),
        (("--window", 16), "was scored on windows of 32 tokens"),
        (("--batch", 8), "has the rates of another batch"),
        (("--batch", 8, "--optimizer", "adamw", "--lr", 0.001), None),
    ):
        dst = tmp_path / "-".join(map(str, ("dst", *how)))
        argv = flags(place, "--recipe", place / "toy.json", "--hidden", 16, *how)
        code, out, _ = delve(capsys, dst, "--flops", FLOPS[0], *argv)
        assert code == 0
        (row,) = out["rows"]
        folder = dst / "runs" / row["run"]
        write_json(folder / "config.json", to_json(presets.delphi(16, rules)))
        write_json(folder / "train.json", {"window": row.pop("window")})
        write_json(folder / sweep.SCORE, row)
        code, _, err = delve(capsys, dst, "--flops", FLOPS[1], *argv)
        assert code == 0 if said is None else (code == 2 and f"{folder}: {said}" in err), err


def test_a_run_of_another_source_has_not_the_name_of_one_that_is_done(tmp_path):
    """out/a/small and out/b/small, healed in two calls, would both be runs/small-32-s0."""
    file = tmp_path / sweep.SCORE
    facts = {"flops": 1e9, "src": "out/b/small", "src_hash": "ab"}
    job = sweep.Job("small-32-s0", None, facts)
    assert not sweep._scored(file, job)
    for before, said in (
        ({"src": "out/b/small", "flops": 1e9}, None),
        ({"flops": 1e9}, None),
        (facts, None),
        ({"src": "out/a/small", "flops": 1e9}, "is the run of src out/a/small"),
        (facts | {"src_hash": "cd"}, "out/b/small: has changed since"),
    ):
        file.write_text(json.dumps(before))
        if said is None:
            assert sweep._scored(file, job)
            continue
        with pytest.raises(DelveError, match=said):
            sweep._scored(file, job)


def test_a_point_has_the_steps_and_flops_of_its_window(place):
    """--window in the place of the recipe's rows: more steps, cheaper attention."""
    rules = recipe.read(place / "toy.json")
    args = (rules, [4e8], [16], [0])
    own, short = (
        sweep._candidates(*args, given, [place / "train.txt"], None, None)[0].facts
        for given in ({}, {"window": 16})
    )
    assert short["steps"] == 2 * own["steps"] and short["tokens"] == own["tokens"]
    per_token = 3 * recipe.Recipe(**TOY | {"seq_len": 16}).forward_flops(16)
    assert short["train_flops"] == per_token * short["tokens"] < own["train_flops"]


def test_the_mesh_decides_which_batches_fit(place, monkeypatch):
    asked = []
    make = sweep.parallel.make_mesh
    monkeypatch.setattr(sweep.parallel, "make_mesh", lambda spec: asked.append(spec) or make(spec))
    rules = recipe.read(place / "toy.json")
    sweep._candidates(rules, [4e8], [16], [0], {}, [place / "train.txt"], None, "data=1")
    assert asked == ["data=1"]


def test_another_optimizer_takes_sizes_not_rates(place):
    rules = recipe.read(place / "toy.json")
    c = rules.candidate(4e8, 16)
    ours = sweep.settings_of(rules, 4e8, c, 0, {})
    plain = sweep.settings_of(rules, 4e8, c, 0, {"optimizer": "adamw", "lr": 3e-3})
    assert (plain.tokens, plain.batch, plain.z_loss) == (ours.tokens, ours.batch, ours.z_loss)
    assert plain.lr == 3e-3 and plain.b2 is plain.eps is plain.clip is plain.adam_lr is None
    assert ours.b2 == rules.config(4e8, 16)["beta2"]


def test_rates_are_those_of_the_batch_given():
    """As `delve delphi recipe --batch` has them."""
    c = recipe.DELPHI.candidate(3e18, 512)
    found = sweep.settings_of(recipe.DELPHI, 3e18, c, 0, {"batch": 128})
    r = recipe.DELPHI.config(3e18, 512, 128)
    assert found.lr == r["lr"] == pytest.approx(0.00757, abs=5e-6)
    for field, name in {"adam_lr": "adam_lr", "b2": "beta2", "eps": "epsilon", "tokens": "tokens",
                        "batch": "batch_size"}.items():  # fmt: skip
        assert getattr(found, field) == r[name]
    found = sweep.settings_of(recipe.DELPHI, 3e18, c, 0, {"batch": 128, "lr": 0.002})
    assert found.lr == 0.002 and found.adam_lr == r["adam_lr"]


def test_the_sweep_that_the_recipe_prints_is_the_one_asked_for(place, tmp_path, capsys, untrained):
    """The budget, not what whole steps of it spend; and the rows of a step."""
    argv = ["delphi", "recipe", "--flops", "4.1e8", "--batch", "4", "--hidden", "16", "--recipe"]
    assert cli.main([*argv, str(place / "toy.json")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    names = {"DST": tmp_path / "dst", "TOKENS": place / "train.txt", "TEXT": place / "report.txt"}
    assert line.startswith("delve delphi sweep DST ")
    code, out, err = delve(capsys, *(names.get(word, word) for word in line.split()[3:]))
    assert code == 0, err
    (row,) = out["rows"]
    assert row["flops"] == 4.1e8 and row["batch_size"] == 4 and row["hidden"] == 16
    rules = recipe.read(place / "toy.json")
    assert row["tokens"] == rules.config(4.1e8, 16, 4)["tokens"]


def test_a_ladder_of_healing(place, capsys):
    """Checkpoints at two keep ratios, healed for two numbers of tokens, towards their parent."""
    for keep in (0.4, 0.6):
        road.compress(upcycle.PROXIES / "neox", place / f"small-{keep}", keep=keep, method="svd")
    sources = [place / "small-0.4", place / "small-0.6"]
    how = flags(place, "--batch", 2, "--window", 32)
    dst = place / "healing"
    code, out, err = delve(capsys, dst, "--heal", *sources, "--tokens", 64, 128, *how)
    assert code == 0, err
    rows = out["rows"]
    assert sorted({r["keep"] for r in rows}) == pytest.approx([0.4, 0.6], abs=0.01)
    assert sorted({r["tokens"] for r in rows}) == [64, 128] and len(rows) == 4
    one = next(r for r in rows if r["tokens"] == 64 and r["keep"] < 0.5)
    two = next(r for r in rows if r["tokens"] == 128 and r["keep"] < 0.5)
    assert two["flops"] == 2 * one["flops"] == 2 * one["train_flops"]
    facts = json.loads((dst / "runs" / one["run"] / "heal.json").read_text())
    assert facts["objective"] == "ce+kl"
    # what is said twice is done once, and a name that two sources have is refused
    again = ("--heal", *sources, sources[0], "--tokens", 64, 64, "--seeds", 0, 0)
    code, again, err = delve(capsys, dst, *again, *how)
    assert code == 0 and again["rows"] == rows, err
    shutil.copytree(sources[0], place / "b" / "small-0.4")
    both = (sources[0], place / "b" / "small-0.4")
    code, _, err = delve(capsys, dst, "--heal", *both, "--tokens", 64, *how)
    assert code == 2 and f"--heal: {both[0]} and {both[1]} would both be the run small-0.4" in err
    # another checkpoint in the place of a source: its runs are no runs of it
    sums = sources[0] / "params" / "checksums.json"
    sums.write_text(sums.read_text().replace("[", "[1", 1))
    code, _, err = delve(capsys, dst, "--heal", *sources, "--tokens", 64, *how)
    assert code == 2 and f"{sources[0]}: has changed since" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "name the ladder"),
        (("--flops", "4e8", "--heal", "x", "--tokens", 64), "name the ladder"),
        (("--heal", "x"), "name the ladder"),
        (("--flops", "4e8", "--hidden", 24), "--hidden 24: none is a candidate"),
        (("--flops", "1e2",), "--flops 100"),
        (("--flops", "4e8", "--optimizer", "sgd"), "--optimizer sgd"),
        (("--heal", str(upcycle.PROXIES / "rwkv"), "--tokens", 64), "not compressed"),
    ],
)  # fmt: skip
def test_refusals(argv, said, place, capsys):
    code, out, err = delve(
        capsys, place / "refused", *argv, *flags(place, "--recipe", place / "toy.json")
    )
    assert code == 2 and out is None and said in err, err
    assert err.startswith("error:") and err.count("\n") == 1
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"seqlen": 3}, "unknown field 'seqlen'"),
        ({"seq_len": 2.5}, "'seq_len' must be a positive int"),
        ({"lr0": "high"}, "'lr0' must be a positive float"),
        ({"lr0": -1}, "'lr0' must be a positive float"),
    ],
)
def test_recipe_files(content, said, tmp_path, capsys):
    file = tmp_path / "r.json"
    file.write_text(json.dumps(content))
    code = cli.main(["delphi", "recipe", "--flops", "1e20", "--recipe", str(file)])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and said in err and str(file) in err
