"""Refinement: closer to the parent on text it did not see, exact resume, rows that are counted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import forward

from delve_jax import checkpoint, cli, models, parents, road
from delve_jax.compress import compress, refine
from delve_jax.config import NeoxConfig
from delve_jax.metrics import read_metrics
from delve_jax.train import loop, objective

CFG = NeoxConfig(
    vocab_size=256, vocab_rows=256, d_model=24, n_layers=2, n_heads=4, d_ffn=96, context_length=16
)
TEXT = ["".join(chr(97 + int(i)) for i in np.random.default_rng(0).integers(0, 26, 1200))]


@pytest.fixture(scope="module")
def dense():
    rng = np.random.default_rng(0)
    around = lambda a: 0.15 * rng.normal(size=a.shape) + (a.ndim < 3)  # noqa: E731
    return jax.tree.map(lambda a: np.asarray(around(a), np.float32), models.abstract_params(CFG))


def rows_of(tokens, seed=0):
    return road.refinement_rows(CFG, None, TEXT, tokens, seed)


def test_rows_hold_the_calibration_windows_and_no_more_than_was_asked_for():
    rows, windows = rows_of(600, 3), road.calibration_windows(CFG, None, TEXT, 300, 3)
    assert rows.shape == (600 // 17, 17) and rows.size <= 600
    assert {w.tobytes() for w in windows} <= {np.ascontiguousarray(r[:-1]).tobytes() for r in rows}
    text = TEXT[0].encode()
    assert all(bytes(r.astype(np.uint8)) in text for r in rows)
    assert len({r.tobytes() for r in rows}) == len(rows)
    assert not np.array_equal(rows, rows_of(600, 4))
    assert rows_of(1).shape == (1, 17)  # never none
    assert len(rows_of(10**9)) == (1200 - 1) // 16  # nor more than there are


def test_it_comes_closer_to_the_parent_on_other_text(dense, tmp_path):
    rows, held = rows_of(600), np.asarray(rows_of(10**9))
    held = held[[r.tobytes() not in {x.tobytes() for x in rows} for r in held]]
    cfg, small, _ = compress(CFG, dense, None, keep=0.5, method="svd", progress=False)

    def distance(params):
        logits = [forward(c, p, jnp.asarray(held[:, :-1]))[0]
                  for c, p in ((CFG, dense), (cfg, params))]  # fmt: skip
        return float(objective.kl(*logits).mean())

    trained, report = refine.refine(cfg, small, (CFG, dense), rows, workdir=tmp_path)
    before, after = distance(small), distance(trained)
    assert len(held) > 20 and after < 0.9 * before, (before, after)
    assert report["passes"] == refine.PASSES and report["distinct_tokens"] == rows.size
    assert report["written_tokens"] == refine.WRITTEN * rows.size
    assert report["steps"] == -(-(refine.PASSES + refine.WRITTEN) * len(rows) // report["batch"])
    assert report["objective"] == "ce+kl" and report["teacher_weights"] == [1.0]
    assert report["weights"] == {"ce": refine.CE, "kl": 1.0} and refine.CE == 0.1
    told = read_metrics(tmp_path / "metrics.jsonl")
    for row in told:
        assert row["loss"] == pytest.approx(row["kl"] + 0.1 * row["nll"], rel=1e-5)
    assert told[-1]["kl"] > 0


def test_what_the_parent_writes_begins_like_the_text_and_is_written_once(
    dense, tmp_path, monkeypatch
):
    rows = rows_of(600)
    monkeypatch.setattr(refine, "WRITERS", 16)
    own = refine.write(CFG, dense, rows, 2, 5, tmp_path)
    assert own.shape == (2 * len(rows), rows.shape[1]) and own.dtype == np.int32
    text = TEXT[0].encode()
    starts = [bytes(r[: refine.PROMPT].astype(np.uint8)) for r in own]
    assert all(s in text for s in starts) and len(set(starts)) > len(own) / 2
    ends = own[:, refine.PROMPT :]
    assert 0 <= ends.min() and ends.max() < CFG.vocab_size and len(np.unique(ends)) > 40
    # sampled from the parent: its own ids are likelier to it than others
    logits = forward(CFG, dense, jnp.asarray(own[:, :-1]))[0]
    nll = objective.cross_entropy(logits, jnp.asarray(own[:, 1:]))[:, refine.PROMPT :].mean()
    entropy = objective.kl(logits, jnp.zeros_like(logits))[:, refine.PROMPT :].mean()
    assert abs(float(nll) - (np.log(CFG.vocab_size) - float(entropy))) < 0.15
    files = sorted(tmp_path.glob("rows-*.npy"))
    assert len(files) == -(-len(own) // 16) > 2
    files[1].unlink()  # as if killed before it: that batch alone is written again
    stamp = files[0].stat().st_mtime_ns
    np.testing.assert_array_equal(refine.write(CFG, dense, rows, 2, 5, tmp_path), own)
    assert files[0].stat().st_mtime_ns == stamp and files[1].exists()
    other = tmp_path / "other"
    other.mkdir()
    assert (refine.write(CFG, dense, rows, 2, 6, other) != own).any()
    assert refine.write(CFG, dense, rows, 0, 5, other).shape == (0, rows.shape[1])


def test_the_verb_has_the_default_of_the_function():
    args = cli.parser().parse_args(["compress", "SRC", "DST", "--keep", "0.5"])
    assert (
        args.refine_written == refine.WRITTEN
    )  # the parser starts without JAX: a number of its own


def test_verb_killed_while_refining_goes_on_to_the_same_bits(dense, tmp_path, monkeypatch):
    parents.export_stock(CFG, dense, tmp_path / "hf")
    how = {"keep": 0.6, "method": "svd", "documents": TEXT, "refine_tokens": 400}
    real = refine.settings_for
    often = lambda *args: dataclasses.replace(real(*args), saving=loop.Saving(every=3))  # noqa: E731
    monkeypatch.setattr(refine, "settings_for", often)
    road.compress(tmp_path / "hf", tmp_path / "want", **how)
    saved, real_save = [], loop._save

    def dying(states, step, *args, **more):
        real_save(states, step, *args, **more)
        saved.append(step)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", dying)
    with pytest.raises(KeyboardInterrupt):
        road.compress(tmp_path / "hf", tmp_path / "got", **how)
    assert saved == [3, 6] and not (tmp_path / "got").exists()
    road.compress(tmp_path / "hf", tmp_path / "got", **how)
    assert saved[2] == 9, "it went on, it did not begin anew"
    got, want = (checkpoint.restore(tmp_path / d)[1] for d in ("got", "want"))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    facts = json.loads((tmp_path / "got" / "compress.json").read_text())["refine"]
    assert 340 < facts["distinct_tokens"] <= 400
    steps = [m["step"] for m in read_metrics(tmp_path / "got" / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == facts["steps"]
    assert not (tmp_path / "got" / "state").exists() and not (tmp_path / "got" / "work").exists()
