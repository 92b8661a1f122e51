"""A DELVE through the command line: fusing, healing in stages, its parts, inspection, state files.

Parents are random and tiny, fused dense or at common codes; nothing is compressed here.
"""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import bad, delve
from compiled import forward

import delve_jax
from delve_jax import checkpoint, cli, compress, data, models, parents, training
from delve_jax.config import DelveError, MambaConfig, NeoxConfig, RwkvConfig
from delve_jax.metrics import read_metrics
from delve_jax.train.objective import Terms

SHARED = dict(vocab_size=300, vocab_rows=300, d_model=16, context_length=32)
PARENTS = {
    "mam": MambaConfig(**SHARED, n_layers=2, d_inner=32, d_state=4, dt_rank=2),
    "rwk": RwkvConfig(**SHARED, n_layers=2, d_att=16, d_ffn=32),
    "neo": NeoxConfig(**SHARED, n_layers=2, n_heads=2, d_ffn=32),
}
HEAL = ("--tokens", 1024, "--batch", 4, "--window", 32, "--lr", 0.01)


@pytest.fixture(scope="module")
def place(tmp_path_factory, randomised):
    """Three dense parents and their factored forms at two thirds, a text, a DELVE of the latter."""
    root = tmp_path_factory.mktemp("hybrid")
    source = [d[:2000] for d in data.stdlib_documents()[:30]]
    tok = data.train_bpe(source, 300)
    for name, part in (("fit", source[:20]), ("held", source[20:])):
        (root / f"{name}.txt").write_text("\n<|endoftext|>\n".join(part))
    for i, (name, cfg) in enumerate(PARENTS.items()):
        params = jax.tree.map(lambda a: np.asarray(a, np.float32), randomised(cfg, i))
        checkpoint.save(root / "dense" / name, cfg, params, tok)
        small = compress.compress(cfg, params, None, keep=0.7, method="svd")[:2]
        facts = {"source": str(root / "dense" / name)}
        checkpoint.save(root / name, *small, tok, extra={"compress.json": facts})
    argv = ["fuse", *(root / n for n in PARENTS), root / "fused", "--calibrate", root / "fit.txt",
            "--calibrate-tokens", "512", "--connectors", "hub", "--hub-rank", "4"]  # fmt: skip
    assert cli.main(list(map(str, argv))) == 0
    return root


TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12))


def in_two_processes(*argv) -> None:
    """`delve` as two processes with a device each, both to their end."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{s.getsockname()[1]},2"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    argv = [sys.executable, "-m", "delve_jax", *map(str, argv), "--distributed"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen([*argv, f"{where},{i}"], env=env, text=True, **pipes) for i in (0, 1)]
    try:
        for one in both:
            _, err = one.communicate(timeout=300)
            assert one.returncode == 0, err[-2000:]
    finally:
        for one in both:
            one.kill()


def test_two_processes_heal_a_hybrid(place, tmp_path):
    """As one does, to the end: the facts of it are read by one of them, which waits for nobody.

    Without teachers: of these several processes take an even pool, one fits it.
    """
    flags = ("--data", place / "fit.txt", *HEAL, "--objective", "ce")
    in_two_processes("heal", place / "fused", tmp_path / "two", *flags, "--mesh", "data=2")
    assert cli.main([*map(str, ("heal", place / "fused", tmp_path / "one", *flags))]) == 0
    two, one = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("two", "one")
    )
    assert len(one) == 8 and one[-1] < one[0]
    np.testing.assert_allclose(two, one, rtol=1e-4)
    assert np.isfinite(delve_jax.load(tmp_path / "two").logits(TOKENS)).all()


@pytest.mark.parametrize("what", ["is missing", "has other bytes"])
def test_info_names_a_damaged_file_of_the_pool(what, place, tmp_path, capsys):
    shutil.copytree(place / "fused", tmp_path / "damaged")
    chunk = tmp_path / "damaged" / "params" / "pool.a" / "0"
    chunk.unlink() if what == "is missing" else chunk.write_bytes(chunk.read_bytes()[:3])
    assert f"pool.a/0 {what}" in bad(capsys, "info", tmp_path / "damaged")
    assert delve(capsys, "info", place / "fused")[0] == 0


def test_fuse_with_other_connectors_heads_and_a_warm_hub(place, capsys, tmp_path):
    flags = ("--calibrate", place / "fit.txt", "--calibrate-tokens", 512)
    sources = [place / n for n in PARENTS]
    code, out, _ = delve(capsys, "fuse", *sources, tmp_path / "two", *flags, "--latents", 2,
                         "--connectors", "self", "--warm-hub", "--ffn-skip", 0.5)  # fmt: skip
    assert code == 0 and (out["latents"], out["connectors"]) == (2, "self")
    assert all(0 <= r <= 1 for r in out["fit"]["warm_hub"]["r2"])
    assert out["fit"]["nll"] <= min(out["fit"]["nll_parents"]) + 1e-6
    model = delve_jax.load(tmp_path / "two")
    got = np.asarray(model.logits(TOKENS))
    np.testing.assert_allclose(np.exp(got).sum(-1), 1, atol=1e-4)  # log p
    assert model.config.ffn_skip == 0.5 and "skip_v" in model.params["hub"]["neo"]
    hub = model.params["hub"]["mam"]
    assert np.abs(hub["b"]).max() > 0 and not np.asarray(hub["g"]).any()
    line = bad(capsys, "fuse", *sources, tmp_path / "x", *flags, "--connectors", "mesh")
    assert "--connectors mesh" in line
    line = bad(capsys, "fuse", *sources, tmp_path / "x", *flags, "--latents", 4)
    assert "latents 4" in line
    assert "--calibrate" in bad(capsys, "fuse", *sources, tmp_path / "x", "--warm-hub")
    line = bad(capsys, "fuse", *sources, tmp_path / "x", *flags, "--warm-hub", "--connectors",
               "cross", "--overwrite")  # fmt: skip
    assert "--warm-hub" in line


STAGES = [
    {"name": "alone", "share": 0.5, "trains": "experts", "ce": 0, "kl": 0, "streams": 1,
     "hidden": [1, 0.5]},
    {"name": "joint", "share": 0.5, "kl": [0.9, 0.5], "ce": [0.1, 0.5], "streams": 0.3,
     "stream_drop": 0.2, "rank_drop": 0.5, "joints_lr": 5},
]  # fmt: skip


@pytest.fixture(scope="module")
def healed(place):
    """Healed in two stages, killed once between them: the first is not run again."""
    file, dst = place / "stages.json", place / "healed"
    file.write_text(json.dumps(STAGES))
    argv = ["heal", place / "fused", dst, "--data", place / "fit.txt", *HEAL, "--stages", file]
    argv = list(map(str, argv))
    ran, real = [], training.run.heal

    def counted(*args, terms, **kw):
        if ran == ["streams+hidden"]:
            ran.append("killed")
            raise KeyboardInterrupt
        ran.append(terms.name)
        return real(*args, terms=terms, **kw)

    training.run.heal = counted
    try:
        assert cli.main(argv) == 130 and not dst.exists()
        assert cli.main(argv) == 0
    finally:
        training.run.heal = real
    assert ran == ["streams+hidden", "killed", "ce+kl+streams"]
    return dst


def test_stages_leave_one_checkpoint_and_one_log(healed, place):
    facts = json.loads((healed / "heal.json").read_text())
    assert [s["steps"] for s in facts["stages"].values()] == [4, 4] and facts["steps"] == 8
    assert facts["tokens"] == 1024
    lines = read_metrics(healed / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {line["stage"] for line in lines} == {"alone", "joint"}
    assert lines[-1]["tokens"] == 1024 and "hidden" in lines[0] and "stream_kl" in lines[-1]
    assert not list(healed.glob("stages*")) and not list(healed.glob("state*"))
    before, after = (delve_jax.load(place / n).params for n in ("fused", "healed"))
    moved = {
        room: any(np.abs(np.asarray(a) - b).max() > 1e-6 for a, b in zip(
            jax.tree.leaves(before[room]), jax.tree.leaves(after[room]), strict=True))
        for room in before
    }  # fmt: skip
    assert all(moved.values()), moved


def test_a_teacher_without_weight_still_teaches_its_stream_in_a_later_stage(
    place, tmp_path, monkeypatch
):
    """The first stage asks the pool alone and forgets it. (Nothing is trained here.)"""
    fit = ([0.6, 0.0, 0.4], {"teacher_weights_from": "fit"})

    def still(cfg, params, loss, dataset, settings, mesh, T, workdir, *_):
        (workdir / "metrics.jsonl").write_text("")
        return params[1](), {"steps": settings.steps(T), "tokens": settings.tokens}

    monkeypatch.setattr(training.run, "_teacher_weights", lambda *_: fit)
    monkeypatch.setattr(training.run, "_train", still)
    stages = [{"name": "couple", "share": 0.5, "ce": 0, "kl": 1},
              {"name": "joint", "share": 0.5, "streams": 0.3}]  # fmt: skip
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    settings = training.Settings(tokens=128, batch=2, window=16)
    out = training.heal(place / "fused", tmp_path / "out", settings, text=[place / "fit.txt"],
                        stages=str(tmp_path / "stages.json"))  # fmt: skip
    facts = out["heal"]["stages"]
    assert facts["couple"]["teacher_weights"] == facts["joint"]["teacher_weights"] == fit[0]


def test_wrong_objectives_are_refused(place, capsys, tmp_path):
    argv = ("heal", place / "fused", tmp_path / "x", "--data", place / "fit.txt", *HEAL)
    for flags, said in (
        (("--kl-weight", "2"), "--kl-weight 2"), (("--stream-kl", "a:b"), "--stream-kl a:b"),
        (("--stream-drop", "1.5"), "--stream-drop 1.5"), (("--rank-drop", "0"), "--rank-drop 0"),
        (("--ffn-share", "0.5"), "fuse --ffn-skip"),
        (("--objective", "ce", "--stream-kl", "1"), "--stream-kl: not beside --objective ce"),
        (("--joints-lr", "-1"), "--joints-lr -1"), (("--stages", tmp_path / "no"), "--stages"),
        (("--teachers", place / "dense" / "neo", "--stream-kl", "1"), "parent of every stream"),
        (("--teacher-cache", tmp_path / "c", "--stream-kl", "1"), "--teacher-cache"),
        *((("--stages", "hybrid", flag, value), f"{flag}: not beside --stages") for flag, value in (
            ("--joints-lr", "1"), ("--train", "joints"), ("--kl-weight", "0.5"),
            ("--stream-kl", "0"), ("--stream-drop", "0.1"), ("--hidden-match", "1"),
            ("--rank-drop", "0.5"), ("--ffn-share", "0.5"), ("--objective", "ce"))),
    ):  # fmt: skip
        line = bad(capsys, *argv, *flags, "--overwrite")
        assert said in line, line
    late = tmp_path / "late.json"  # the last stage is read before the first one is trained
    late.write_text(json.dumps([{"share": 0.5}, {"share": 0.5, "ffn_share": 0.5}]))
    assert "fuse --ffn-skip" in bad(capsys, *argv, "--stages", late, "--overwrite")
    assert not (tmp_path / "x.partial" / "stages").exists()
    line = bad(capsys, "heal", place / "neo", tmp_path / "y", "--data", place / "fit.txt", *HEAL,
               "--train", "joints")  # fmt: skip
    assert "--train joints" in line
    few = training.Settings(tokens=64)
    for settings, terms, flag in (
        (dataclasses.replace(few, joints_lr=2.0), Terms(), "--joints-lr"),
        (few, Terms(kl=0.3), "--kl-weight"),
    ):
        with pytest.raises(DelveError, match=f"{flag}: not beside --stages"):
            training.heal(place / "fused", tmp_path / "x", settings, text=[place / "fit.txt"],
                          terms=terms, stages="hybrid")  # fmt: skip


def test_a_teacher_cache_is_made_once(place, capsys, tmp_path):
    argv = ("heal", place / "fused", "--data", place / "fit.txt", *HEAL, "--teacher-cache",
            tmp_path / "cache")  # fmt: skip
    code, out, _ = delve(capsys, *argv[:2], tmp_path / "a", *argv[2:])
    assert code == 0 and out["heal"]["teacher_samples"] == 64
    made_of = json.loads((tmp_path / "cache" / "0-of-1" / "cache.json").read_text())
    assert made_of["data"] == out["heal"]["data"]["data_hash"] is not None
    file = tmp_path / "cache" / "0-of-1" / "ids.bin"
    made = file.stat().st_mtime_ns
    line = bad(capsys, *argv[:2], tmp_path / "c", *argv[2:], "--seed", 1)
    assert "another run" in line and "--teacher-cache" in line
    assert file.stat().st_mtime_ns == made


def test_parts_are_loaded_scored_written_and_exported(healed, place, capsys, tmp_path):
    """--streams and --keep at every verb that loads give the same smaller model."""
    whole = delve_jax.load(healed)
    part = delve_jax.load(healed, streams=("rwk", "mam"))
    assert part.config.names == ("mam", "rwk") and len(part.config.teachers) == 2
    assert np.abs(np.asarray(part.logits(TOKENS)) - whole.logits(TOKENS)).max() > 0.01
    dense = sum(models.count(cfg) for cfg in PARENTS.values())
    small = delve_jax.load(healed, keep=0.6)
    assert models.count(small.config) <= 0.6 * dense < models.count(whole.config)
    code, out, _ = delve(capsys, "convert", healed, tmp_path / "part", "--streams", "mam,rwk",
                         "--keep", 0.6)  # fmt: skip
    some = sum(models.count(PARENTS[n]) for n in ("mam", "rwk"))
    assert code == 0 and out["parameters"] <= 0.6 * some and set(out["streams"]) == {"mam", "rwk"}
    want = delve_jax.load(healed, streams=("mam", "rwk"), keep=0.6).logits(TOKENS)
    np.testing.assert_allclose(delve_jax.load(tmp_path / "part").logits(TOKENS), want, atol=1e-5)
    flags = ("--text", place / "held.txt")
    code, scored, _ = delve(capsys, "eval", healed, *flags, "--streams", "mam,rwk", "--keep", 0.6)
    assert code == 0 and scored["parameters"] == out["parameters"]
    code, exported, _ = delve(capsys, "export", tmp_path / "part", tmp_path / "hf")
    assert code == 0 and exported["verified"]
    code, out, _ = delve(capsys, "generate", healed, "--prompt", "def", "--max-new-tokens", 4,
                         "--streams", "rwk")  # fmt: skip
    assert code == 0 and len(out["tokens"]) <= 4
    assert "the streams are mam, rwk, neo" in bad(capsys, "eval", healed, *flags, "--streams", "x")
    assert "the smallest ranks need" in bad(capsys, "eval", healed, *flags, "--keep", 0.01)
    assert "only a DELVE" in bad(capsys, "eval", place / "neo", *flags, "--streams", "a")
    line = bad(capsys, "eval", place / "dense" / "neo", *flags, "--keep", 0.5)
    assert "factored" in line and str(place) in line


def test_attention_free_streams_keep_a_state_that_does_not_grow(healed):
    part = delve_jax.load(healed, streams=("mam", "rwk"))
    size = lambda s: sum(a.size for a in jax.tree.leaves(s))  # noqa: E731
    state = part.init_state(1, 8)
    assert size(state) == size(part.init_state(1, 4096))
    for i in range(3):
        state = part.step(TOKENS[:1, 4 * i : 4 * i + 4], state)[1]
    assert size(state) == size(part.init_state(1, 8))


def test_a_state_is_saved_and_goes_on_elsewhere(healed, place, tmp_path):
    model = delve_jax.load(healed)
    want = np.asarray(model.logits(TOKENS))
    _, state = model.step(TOKENS[:, :7], model.init_state(2, 12))
    model.save_state(tmp_path / "s.npz", state)
    other = delve_jax.load(healed)
    got, _ = other.step(TOKENS[:, 7:], other.load_state(tmp_path / "s.npz"))
    np.testing.assert_allclose(got, want[:, 7:], atol=1e-4)
    with pytest.raises(DelveError, match="another configuration"):
        delve_jax.load(place / "neo").load_state(tmp_path / "s.npz")
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(DelveError, match=r"bad.npz: not a readable state"):
        other.load_state(tmp_path / "bad.npz")


def test_inspect_writes_its_report_and_prints_it_for_people(healed, place, capsys, tmp_path):
    argv = ("inspect", healed, "--text", place / "held.txt", "--limit", 300, "--out",
            tmp_path / "look")  # fmt: skip
    code, out, _ = delve(capsys, *argv)
    assert code == 0 and set(out["streams"]) == set(out["parents"]) == set(PARENTS)
    assert {p.name for p in (tmp_path / "look").iterdir()} == {"inspect.json", "inspect.png"}
    code, scored, _ = delve(capsys, "inspect", healed, "--text", place / "held.txt")
    code, plain, _ = delve(capsys, "eval", healed, "--text", place / "held.txt")
    assert scored["nll_per_token"] == pytest.approx(plain["nll_per_token"], rel=1e-5)
    assert cli.main(list(map(str, argv))) == 0
    said = capsys.readouterr().out
    assert "better than" in said and "effective streams" in said and "word start" in said
    assert "not a DELVE" in bad(capsys, "inspect", place / "neo", "--text", place / "held.txt")


def test_streams_of_the_model_are_parents_still(place):
    """`parents.part` of everything is the model itself."""
    cfg, params, _ = parents.load(place / "fused", dtype="float32")
    same, kept = parents.part(cfg, params, streams=cfg.names)
    assert same == cfg
    np.testing.assert_allclose(
        forward(same, kept, TOKENS)[0], forward(cfg, params, TOKENS)[0], atol=1e-5
    )
