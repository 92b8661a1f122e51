"""The public contract: verbs, files, exit codes; the whole road on three tiny parents."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import bad, delve

import delve_jax
from delve_jax import cli, data, models, parents, training, upcycle
from delve_jax.config import MambaConfig, NeoxConfig, RwkvConfig
from delve_jax.metrics import read_metrics

SHARED = dict(vocab_size=300, vocab_rows=304, d_model=16, context_length=32)
PARENTS = {
    "mam": MambaConfig(**SHARED, n_layers=4, d_inner=32, dt_rank=2, tie_embeddings=True),
    "rwk": RwkvConfig(**SHARED, n_layers=2, d_att=16, d_ffn=32),
    "neo": NeoxConfig(**SHARED, n_layers=2, n_heads=2, d_ffn=32),
}


@pytest.fixture(scope="session")
def place(tmp_path_factory, randomised):
    """A folder with three parents, three texts and a tokenizer."""
    root = tmp_path_factory.mktemp("cli")
    source = [d[:2000] for d in data.stdlib_documents()[:60]]
    tok = data.train_bpe(source, 300)
    for name, part in (("fit", source[:40]), ("report", source[40:50]), ("cal", source[50:])):
        (root / f"{name}.txt").write_text("\n<|endoftext|>\n".join(part))
    for i, (name, cfg) in enumerate(PARENTS.items()):
        params = jax.tree.map(lambda a: np.asarray(a, np.float32), randomised(cfg, i))
        parents.export_stock(cfg, params, root / name, tok)
    return root


def road_flags(place, out, **more):
    flags = {
        "--keep": 0.7, "--heal-tokens": 512, "--calibrate-tokens": 512, "--report-bytes": 4000,
        "--batch": 4, "--out": out, "--data": place / "fit.txt", "--calibrate": place / "cal.txt",
        "--report-text": place / "report.txt", **more,
    }  # fmt: skip
    sources = [place / n for n in PARENTS]
    return ["upcycle", "--parents", *sources, *(x for pair in flags.items() for x in pair)]


@pytest.fixture(scope="session")
def upcycled(place):
    """The finished road, killed once on the way: after fusion it must not compress again."""
    out = place / "out"
    argv = [str(a) for a in road_flags(place, out)]
    compressed, real_heal, real_compress = [], training.heal, upcycle.joint.compress

    def killed(*args, **kw):
        raise KeyboardInterrupt

    def counted(*args, **kw):
        compressed.append([part.name for part in args[0]])
        return real_compress(*args, **kw)

    training.heal, upcycle.joint.compress = killed, counted
    try:
        assert cli.main(argv) == 130
    finally:
        training.heal = real_heal
    assert not out.exists() and (place / "out.partial" / "fused").exists()
    before = len(compressed)
    try:
        assert cli.main(argv) == 0
    finally:
        upcycle.joint.compress = real_compress
    assert before == 1 and compressed == [list(PARENTS)]
    return out


def test_upcycle_leaves_what_the_contract_names(upcycled, capsys, place):
    report = json.loads((upcycled / "report.json").read_text())
    for name in PARENTS:
        assert (upcycled / "parents" / name / "config.json").exists()
    for part in ("fused", "checkpoint", "hf", "report.png"):
        assert (upcycled / part).exists()
    rows = {r["name"]: r for r in report["rows"]}
    assert set(rows) == {*PARENTS, *(f"{n} compressed" for n in PARENTS), "DELVE at step 0",
                         "DELVE healed"}  # fmt: skip
    keys = {"parameters", "parameter_bytes", "nll_per_token", "bits_per_byte", "tokens_per_second"}
    assert all(keys <= set(row) for row in rows.values())
    total = sum(rows[n]["parameters"] for n in PARENTS)
    healed = rows["DELVE healed"]["parameters"]
    assert 0.68 < healed / total <= 0.7 and report["keep"] == healed / total
    assert healed == models.count(delve_jax.load(upcycled / "checkpoint").config)
    assert rows["DELVE healed"]["nll_per_token"] < rows["DELVE at step 0"]["nll_per_token"]
    assert report["export"]["verified"] and len(report["data_hash"]) == 3
    lines = read_metrics(upcycled / "checkpoint" / "metrics.jsonl")
    assert lines[-1]["tokens"] == 512
    assert {"step", "loss", "tokens", "tokens_per_second"} <= set(lines[0])
    assert not list(upcycled.parent.glob("out.partial"))
    # the numbers are those of `delve eval` on the same documents and windows
    texts = upcycle.cut_documents(data.read_documents(place / "report.txt"), 4000)
    again = upcycle.score("x", delve_jax.load(upcycled / "checkpoint"), texts, report["window"])
    assert again["bits_per_byte"] == pytest.approx(rows["DELVE healed"]["bits_per_byte"], 1e-6)


def test_upcycle_again_is_done_and_other_arguments_are_refused(upcycled, place, capsys):
    code, out, err = delve(capsys, *road_flags(place, upcycled))
    assert code == 0 and "already done" in err and out["rows"]
    line = bad(capsys, *road_flags(place, upcycled, **{"--keep": 0.6}))
    assert str(upcycled) in line and "--overwrite" in line


def test_a_kill_behind_the_fusion_leaves_no_factors(place, tmp_path, monkeypatch):
    """They are many times the model; what is fused already does not need them."""

    def killed(named, work, *rest):
        (work / "together" / "mam").mkdir(parents=True)
        (work / "fused").mkdir()
        raise KeyboardInterrupt

    def stopped(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(upcycle, "_together", killed)
    monkeypatch.setattr(training, "heal", stopped)
    argv = [str(a) for a in road_flags(place, tmp_path / "out")]
    assert cli.main(argv) == 130 and (tmp_path / "out.partial" / "together").exists()
    assert cli.main(argv) == 130  # in healing
    assert [p.name for p in (tmp_path / "out.partial").iterdir() if p.is_dir()] == ["fused"]


def test_convert_info_eval_generate_export(upcycled, place, capsys, tmp_path):
    code, out, _ = delve(capsys, "convert", place / "neo", tmp_path / "neo")
    assert code == 0 and out["family"] == "neox"
    code, out, _ = delve(capsys, "info", upcycled / "checkpoint")
    assert code == 0 and set(out["pool"]) == set(PARENTS) and out["family"] == "delve"
    assert any(stream["ranks"] for stream in out["streams"].values())
    text = ("--text", place / "report.txt")
    code, ours, _ = delve(capsys, "eval", upcycled / "checkpoint", *text)
    assert code == 0
    code, theirs, _ = delve(capsys, "eval", upcycled / "hf", *text, "--backend", "hf")
    assert code == 0
    assert theirs["nll_per_token"] == pytest.approx(ours["nll_per_token"], abs=1e-4)
    assert theirs["tokens"] == ours["tokens"] and theirs["bytes"] == ours["bytes"]
    argv = ("generate", upcycled / "checkpoint", "--prompt", "import ", "--max-new-tokens", 8)
    code, first, _ = delve(capsys, *argv)
    code, second, _ = delve(capsys, *argv, "--temperature", 1.0, "--seed", 3)
    assert len(first["tokens"]) == len(second["tokens"]) == 8
    code, short, _ = delve(capsys, *argv, "--dtype", "bfloat16", "--mesh", "data=1")
    assert code == 0 and len(short["tokens"]) == 8
    code, half, _ = delve(capsys, "eval", upcycled / "checkpoint", *text, "--dtype", "bfloat16")
    assert half["parameter_bytes"] == ours["parameter_bytes"]  # as stored, not as held in memory
    assert 0 < abs(half["nll_per_token"] - ours["nll_per_token"]) < 0.02
    line = bad(capsys, "eval", upcycled / "hf", *text, "--backend", "hf", "--dtype", "float16")
    assert "--dtype" in line
    code, back, _ = delve(capsys, "convert", upcycled / "hf", tmp_path / "back")
    assert code == 0 and back["parameters"] == out["parameters"]
    a, b = (delve_jax.load(p).params for p in (upcycled / "checkpoint", tmp_path / "back"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    code, stock, _ = delve(
        capsys, "export", upcycled / "parents" / "rwk", tmp_path / "rwk", "--layout", "dense"
    )
    assert code == 0 and stock["verified"] and stock["model_type"] == "rwkv"


def test_compressed_parent_heals_alone_and_resumes(upcycled, place, capsys, tmp_path):
    argv = ("heal", upcycled / "parents" / "neo", tmp_path / "h", "--data", place / "fit.txt",
            "--tokens", 256, "--batch", 4)  # fmt: skip
    code, out, _ = delve(capsys, *argv)
    assert code == 0 and out["heal"]["teacher_weights"] and out["heal"]["steps"] == 2
    assert out["heal"]["data"]["data_hash"] and out["heal"]["data"]["tokens"] > 256
    assert not (tmp_path / "h" / "state").exists()
    code, out, err = delve(capsys, *argv)
    assert code == 0 and "already done" in err


def test_keep_one_is_the_parent(place, capsys, tmp_path):
    code, _, _ = delve(capsys, "compress", place / "rwk", tmp_path / "k1", "--keep", 1.0)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 12))
    dense, kept = (delve_jax.load(p) for p in (place / "rwk", tmp_path / "k1"))
    assert code == 0 and kept.config.vocab_rows == 300
    np.testing.assert_allclose(kept.logits(tokens), dense.logits(tokens), atol=1e-4)


def test_refined_and_stored_in_another_form(place, capsys, tmp_path):
    """--refine-tokens trains the factors; --storage is a form of the same function."""
    argv = (place / "neo", "--keep", 0.6, "--calibrate", place / "cal.txt")
    src, *rest = argv
    code, plain, _ = delve(capsys, "compress", src, tmp_path / "uv", *rest)
    assert code == 0 and plain["storage"] == "uv" and not (tmp_path / "uv" / "work").exists()
    code, refined, _ = delve(capsys, "compress", src, tmp_path / "r", *rest, "--refine-tokens", 256)
    facts = json.loads((tmp_path / "r" / "compress.json").read_text())
    assert code == 0 and facts["refine"]["steps"] >= 1
    assert refined["parameters"] == plain["parameters"]
    tokens = np.random.default_rng(0).integers(0, 300, (2, 12))
    want = delve_jax.load(tmp_path / "uv").logits(tokens)
    assert np.abs(delve_jax.load(tmp_path / "r").logits(tokens) - want).max() > 1e-4
    for form, atol in (("pivot", 1e-3), ("int8", 0.3)):
        code, out, _ = delve(capsys, "convert", tmp_path / "uv", tmp_path / form, "--storage", form)
        assert code == 0 and out["storage"] == form
        got = delve_jax.load(tmp_path / form).logits(tokens)
        np.testing.assert_allclose(got, want, atol=atol * np.abs(want).max())
    assert json.loads((tmp_path / "pivot" / "config.json").read_text())["storage"] == "pivot"
    line = bad(capsys, "heal", tmp_path / "int8", tmp_path / "h", "--data", place / "fit.txt",
               "--tokens", 256)  # fmt: skip
    assert "uv" in line and "--storage" in line
    line = bad(capsys, "compress", src, tmp_path / "x", *rest, "--storage", "int4")
    assert "--storage int4" in line


def test_equal_pool_without_text(place, capsys, tmp_path):
    sources = [place / n for n in PARENTS]
    code, out, _ = delve(capsys, "fuse", *sources, tmp_path / "f", "--latents", 0)
    assert code == 0 and out["latents"] == 3
    assert list(out["pool"].values()) == pytest.approx([1 / 3] * 3)
    assert out["teachers"] == [str(s) for s in sources]


BAD_TEXT = {
    "binary": (b"\0\1\2", "NUL"),
    "latin1": ("caf\xe9".encode("latin-1"), "UTF-8"),
    "empty": (b"", "no text"),
}


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_unreadable_text(kind, place, capsys, tmp_path):
    content, word = BAD_TEXT[kind]
    (tmp_path / "t.txt").write_bytes(content)
    line = bad(capsys, "compress", place / "neo", tmp_path / "d", "--keep", 0.7, "--calibrate",
               tmp_path / "t.txt")  # fmt: skip
    assert "t.txt" in line and word in line and not (tmp_path / "d").exists()


def test_bad_flags_and_sources(place, upcycled, capsys, tmp_path):
    d = tmp_path / "d"
    text = ("--calibrate", place / "cal.txt")
    line = bad(capsys, "compress", place / "neo", d, "--keep", 0.01, *text)
    assert "smallest possible --keep is 0." in line
    least = float(line.rsplit(" ", 1)[1])
    # a command that failed at once leaves nothing in the way of the corrected one
    assert delve(capsys, "compress", place / "neo", d, "--keep", least, *text)[0] == 0
    assert delve(
        capsys, "compress", place / "neo", d, "--keep", least, *text, "--overwrite"
    )[0] == 0  # fmt: skip
    line = bad(capsys, *road_flags(place, tmp_path / "u", **{"--keep": 0.05}))
    least = float(line.rsplit(" ", 1)[1])
    assert 0.05 < least < 0.7 and not (tmp_path / "u").exists()
    configs = [(n, parents.peek(place / n)[0]) for n in PARENTS]
    assert upcycle.together_budget(configs, least)  # what the error says can be met, can
    assert "--keep 1.5" in bad(capsys, "compress", place / "neo", tmp_path / "e", "--keep", 1.5)
    assert "available" in bad(
        capsys, "compress", place / "neo", tmp_path / "f", "--keep", 0.7, "--method", "magic"
    )
    assert "nowhere" in bad(capsys, "info", "/nowhere/at/all")
    assert "--tokens 0" in bad(capsys, "heal", upcycled / "fused", tmp_path / "g", "--data",
                               place / "fit.txt", "--tokens", 0)  # fmt: skip
    assert "unrecognized" in bad(capsys, "info", place / "neo", "--nonsense")
    assert "give --text" in bad(capsys, "eval", place / "neo")


def test_missing_teacher(upcycled, place, capsys, tmp_path):
    source = tmp_path / "fused"
    shutil.copytree(upcycled / "fused", source)
    config = json.loads((source / "config.json").read_text())
    config["teachers"][1] = "/gone/teacher"
    (source / "config.json").write_text(json.dumps(config))
    argv = ("heal", source, tmp_path / "h", "--data", place / "fit.txt", "--tokens", 128,
            "--batch", 4)  # fmt: skip
    line = bad(capsys, *argv)
    assert "/gone/teacher" in line and "--teachers" in line and "--objective ce" in line
    assert not (tmp_path / "h").exists()
    code, out, _ = delve(capsys, *argv, "--objective", "ce", "--overwrite")
    assert code == 0 and out["heal"]["objective"] == "ce"


def test_different_tokenizers(place, capsys, tmp_path):
    shutil.copytree(place / "neo", tmp_path / "other")
    tok = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocab = tok["model"]["vocab"]
    a, b = list(vocab)[40:42]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tok))
    line = bad(capsys, "fuse", place / "rwk", tmp_path / "other", tmp_path / "f")
    assert "tokenizer differs" in line and str(tmp_path / "other") in line


def test_report_text_must_be_unseen(place, capsys, tmp_path):
    flags = road_flags(place, tmp_path / "u", **{"--report-text": place / "fit.txt"})
    assert "--report-text" in bad(capsys, *flags)


def test_the_face_is_lazy_and_callable():
    code = (
        "import sys, delve_jax; assert 'jax' not in sys.modules; "
        "import delve_jax.cli; delve_jax.cli.parser(); assert 'jax' not in sys.modules; "
        "assert all(callable(getattr(delve_jax, n)) for n in delve_jax.__all__); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    out = subprocess.run(
        [sys.executable, "-m", "delve_jax", "upcycle", "--help"], capture_output=True, text=True
    )
    assert out.returncode == 0 and "--heal-tokens" in out.stdout


def test_a_killed_copy_is_made_again(tmp_path, monkeypatch):
    """Half a checkpoint must not pass for the result of `--heal-tokens 0`."""
    (tmp_path / "fused" / "params").mkdir(parents=True)
    for name in ("config.json", "params/a"):
        (tmp_path / "fused" / name).write_text(name)
    real = shutil.copytree

    def killed(src, dst):
        (dst / "params").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copytree", killed)
    with pytest.raises(KeyboardInterrupt):
        upcycle._copy(tmp_path / "fused", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    monkeypatch.setattr(shutil, "copytree", real)
    upcycle._copy(tmp_path / "fused", tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "params" / "a").read_text() == "params/a"
    assert not (tmp_path / "checkpoint.partial").exists()
