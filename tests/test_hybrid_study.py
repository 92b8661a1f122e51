"""The studies' own arithmetic: FLOPs of a DELVE and of one that skips FFNs, intervals."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from delve_jax import data, models, parents
from delve_jax.config import DelveConfig, NeoxConfig, RwkvConfig
from delve_jax.models import delve

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import hybrid  # noqa: E402
import hybrid_parts  # noqa: E402

V, T, S = 40, 16, 2
tables = (("embed", (4,)), ("head", (4,)))
both = {"vocab_size": V, "vocab_rows": V, "n_layers": 4, "tie_embeddings": False}
STREAMS = (
    ("r", RwkvConfig(d_model=16, d_att=16, d_ffn=48, ranks=(("ffn/key", (3,) * 4), *tables),
                     **both)),
    ("n", NeoxConfig(d_model=32, n_heads=2, d_ffn=64, ranks=(("att/qkv", (5,) * 4), *tables),
                     **both)),
)  # fmt: skip
CFG = DelveConfig(STREAMS, S, connectors="hub", hub_rank=3, codes=("embed", "head"), ffn_skip=0.5)


def products(jaxpr, times=1):
    """FLOPs of all matrix products of a traced program."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (over, _), _ = eqn.params["dimension_numbers"]
            depth = np.prod([eqn.invars[0].aval.shape[i] for i in over])
            total += times * 2 * depth * np.prod(eqn.outvars[0].aval.shape)
        repeats = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        inner = (getattr(p, "jaxpr", p) for p in jax.tree.leaves(list(eqn.params.values())))
        total += sum(products(j, repeats) for j in inner if hasattr(j, "eqns"))
    return total


def test_flops_are_those_of_the_program(monkeypatch):
    monkeypatch.setattr(hybrid, "WINDOW", T)

    def run(params):
        return delve.head(CFG, params, delve.features(CFG, params, np.zeros((1, T), int))[0])

    traced = jax.make_jaxpr(run)(models.abstract_params(CFG)).jaxpr
    hub_before_0 = sum(2 * 2 * sub.d_model * CFG.hub_rank + CFG.hub_rank * 2
                       for _, sub in STREAMS)  # fmt: skip
    # the scan over superblocks runs a hub of zeros before the first
    assert products(traced) / T - hub_before_0 == pytest.approx(hybrid_parts.flops(CFG))


def test_skipped_ffns_cost_nothing():
    key = {"r": 3 * (16 + 48) + 48 * 16 + 16 * 16, "n": 2 * 32 * 64}  # an FFN's weights
    share = {"r": [1.0, 0.25], "n": [1.0, 0.5]}
    saved = 2 * 2 * (0.75 * key["r"] + 0.5 * key["n"])  # 2 layers behind the hub
    got = hybrid_parts.flops(CFG) - hybrid_parts.flops(CFG, share)
    assert got == pytest.approx(saved)


def test_neurons_and_ranks_count_as_they_are():
    """Padding of ragged layers is no work."""
    neox = dataclasses.replace(STREAMS[1][1], neurons=(64, 64, 10, 64))
    cut = dataclasses.replace(CFG, streams=(STREAMS[0], ("n", neox)))
    assert hybrid_parts.flops(CFG) - hybrid_parts.flops(cut) == 2 * 2 * 32 * 54
    rwkv = dataclasses.replace(STREAMS[0][1], ranks=(("ffn/key", (3, 1, 3, 3)), *tables))
    cut = dataclasses.replace(CFG, streams=(("r", rwkv), STREAMS[1]))
    assert hybrid_parts.flops(CFG) - hybrid_parts.flops(cut) == 2 * 2 * (16 + 48)


# ---- intervals -----------------------------------------------------------------------------------

DOCUMENTS, EACH = 24, 16  # windows of each document
OF_N = np.repeat(np.arange(DOCUMENTS), EACH)
GAP_N = np.random.default_rng(0).standard_normal(DOCUMENTS)[OF_N]  # windows of a document are alike
AS_IF = 2 * 1.96 * GAP_N.std() / len(GAP_N) ** 0.5  # width, were they independent


@pytest.fixture
def results(monkeypatch):
    """Rows of two cells that are GAP_N apart, three seeds, on the report split."""
    monkeypatch.setattr(hybrid, "RESAMPLES", 2000)
    clusters = {"report": OF_N, "choose": np.arange(len(GAP_N))}
    monkeypatch.setattr(hybrid, "scored_of", lambda split: (None, clusters[split]))
    out = hybrid.Results("no_such_study", "")
    out.rows = [{"cell": cell, "seed": seed, "report_each": each, "choose_each": each}
                for cell, each in (("a", GAP_N + 4), ("b", np.full(len(GAP_N), 4.0)))
                for seed in hybrid.SEEDS]  # fmt: skip
    return out


def test_intervals_resample_documents(results):
    """All that varies lies between documents: EACH windows of one are as good as one window."""
    gap = results.difference("a", "b")
    assert gap["mean"] == pytest.approx(GAP_N.mean()) and gap["low"] < gap["mean"] < gap["high"]
    assert gap["high"] - gap["low"] == pytest.approx(AS_IF * EACH**0.5, rel=0.1)
    own = results.difference("a", "b", "choose")  # whose windows are all of different documents
    assert own["high"] - own["low"] == pytest.approx(AS_IF, rel=0.1)


def test_intervals_resample_seeds(results):
    """Three seeds apart by 1 from each other, and documents that do not differ."""
    for row in results.rows:
        row["report_each"] = np.full(len(GAP_N), row["seed"] if row["cell"] == "a" else 0)
    gap = results.difference("a", "b")
    assert gap["by_seed"] == [0, 1, 2] and (gap["low"], gap["high"]) == pytest.approx((0, 2))


def test_a_draw_is_the_mean_of_all_its_windows(monkeypatch):
    """A sum over a number: a document counts by its windows, and they count alike."""
    monkeypatch.setattr(hybrid, "RESAMPLES", 200)
    weight_RN = hybrid.resampled(np.array([7, 7, 7, 2]), np.random.default_rng(0))
    assert weight_RN.shape == (200, 4)
    draws = {tuple(row) for row in weight_RN.round(6).tolist()}
    third = round(1 / 3, 6)
    assert draws == {(third, third, third, 0), (0, 0, 0, 1), (0.25, 0.25, 0.25, 0.25)}


@pytest.mark.parametrize("joined", [True, False])
def test_a_window_is_of_the_document_of_its_first_token(joined, monkeypatch):
    """Documents are joined by a token where the vocabulary has one; raw bytes have none."""
    monkeypatch.setattr(hybrid, "WINDOW", 6)
    monkeypatch.setattr(hybrid, "SEQUENCES", 20)
    tok = hybrid.tokenizer() if joined else data.ByteTokenizer()
    letters = "abcdefghij"
    texts = [letter * n for letter, n in zip(letters, range(7, 107, 10), strict=True)]
    if joined:
        texts = [" ".join(text) for text in texts]  # so that a token is of one letter
    rows, document_N = hybrid.scored_windows(tok, texts)
    assert rows.shape == (20, 7) and len(set(document_N)) > 5
    assert (data.eot_of(tok) is not None) == joined
    firsts = [tok.decode([int(row[0])]).strip() for row in rows]
    assert firsts == [letters[document] for document in document_N]

    monkeypatch.setattr(hybrid, "SEQUENCES", 3)
    told = [  # the letters of each window, those of a document that it reaches into included
        [
            set(tok.decode(row.tolist())) & set(letters)
            for row in hybrid.scored_windows(tok, texts, f)[0]
        ]
        for f in (False, True)
    ]
    seen, fresh = (set.union(*sets) for sets in told)
    assert len(told[0]) == 3 and len(told[1]) > 5 and len(fresh) > 2 and not seen & fresh


def test_intervals_of_the_compression_study(monkeypatch):
    """`delve` against one rival whose loss varies between documents alone."""
    spec = importlib.util.spec_from_file_location("study", EXPERIMENTS / "compression.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    monkeypatch.setattr(hybrid, "RESAMPLES", 2000)
    monkeypatch.setattr(study, "scored", lambda tokenizer, V, split: (None, OF_N))
    monkeypatch.setattr(parents, "load", lambda *a, **k: (STREAMS[0][1], None, None))
    sums = {study.OURS: GAP_N + 4, study.REFERENCE: np.full(len(GAP_N), 6.0)}
    rows = [{"study": "methods", "parent": "mamba", "label": label, "keep": 0.4, "seed": seed,
             "report_sums": study.WINDOW * nats}
            for label, nats in sums.items() for seed in study.SEEDS]  # fmt: skip
    dense = {"mamba": {"report_sums": np.full(len(GAP_N), 4.0 * study.WINDOW)}}
    (found,) = study.comparisons({"dense": dense, "rows": rows})
    mean, low, high = found["difference"]
    assert mean == pytest.approx(GAP_N.mean() - 2)
    assert high - low == pytest.approx(AS_IF * EACH**0.5, rel=0.1)
    share, low, high = found["gap_closed"]
    assert share == pytest.approx(1 - GAP_N.mean() / 2)
    assert high - low == pytest.approx(AS_IF * EACH**0.5 / 2, rel=0.1)
