"""The embedded parents: small, trained, as their cards say; compression and pooling on them."""

import json
import math

import jax
import numpy as np
import pytest

import delve_jax
from delve_jax import compress, data, fuse, models, parents, road, upcycle

NAMES = ["incite", "mamba", "neox", "rwkv"]
POOL = ["mamba", "neox", "rwkv"]  # one of each family: incite is of neox's
KEEP = 0.5


@pytest.fixture(scope="module")
def split():
    """Calibration and report windows [N, 128] of the standard library, disjoint documents."""
    _, tok = parents.peek(upcycle.PROXIES / "neox")
    tokenizer, documents = data.load_tokenizer(tok, 3840), data.stdlib_documents()
    out = {}
    for role, count in (("calibrate", 48), ("report", 48)):
        ids = data.encode_documents(tokenizer, data.split(documents, role))
        # spread over all documents: the first windows would be one or two files, and moments and
        # weights fitted on those do not carry over
        rows = data.windows(ids, 128)
        out[role] = np.array(rows[np.linspace(0, len(rows) - 1, count).astype(int)])
    return out


@pytest.fixture(scope="module")
def compressed(split):
    """{name: (config, parameters)} of POOL at KEEP, by the cheapest method that reads text:
    ours on these proxies is what the quickstart in CI runs."""
    out = {}
    for name in POOL:
        cfg, params, _ = parents.load(upcycle.PROXIES / name, dtype="float32")
        out[name] = compress.compress(
            cfg, params, split["calibrate"], keep=KEEP, method="svd-llm", progress=False
        )[:2]  # fmt: skip
    return out


def nll(cfg, params, tokens) -> float:
    logits, _ = jax.jit(lambda p, t: models.forward(cfg, p, t))(params, tokens[:, :-1])
    picked = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), tokens[:, 1:, None], axis=-1
    )
    return -float(picked.astype(np.float64).mean())


def test_four_small_parents_with_one_tokenizer():
    assert sorted(p.rsplit("/", 1)[1] for p in upcycle.embedded_parents()) == NAMES
    files = [f for f in upcycle.PROXIES.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12 * 2**20
    road.same_tokenizer([(n, parents.peek(upcycle.PROXIES / n)[1]) for n in NAMES])
    depths = {n: parents.peek(upcycle.PROXIES / n)[0].n_layers for n in NAMES}
    assert depths == {"mamba": 6, "rwkv": 3, "neox": 3, "incite": 3}
    incite = parents.peek(upcycle.PROXIES / "incite")[0]
    assert not incite.parallel_residual and incite.rotary_pct == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_proxy_is_what_its_card_says(name, split):
    card = json.loads((upcycle.PROXIES / name / "card.json").read_text())
    cfg, params, _ = parents.load(upcycle.PROXIES / name, dtype="float32")
    assert card["parameters"] == models.count(cfg) and 1e6 < card["parameters"] < 2e6
    assert card["tokens"] >= 3_000_000 and cfg.dtype == "float16"
    assert card["report"]["bits_per_byte"] < 2.3
    # trained on text of this kind: far below a uniform guess and below unigram statistics
    counts = np.bincount(split["calibrate"].reshape(-1), minlength=3840) + 1
    unigram = -np.log(counts / counts.sum())[split["report"][:32, 1:]].mean()
    found = nll(cfg, params, split["report"][:32])
    assert found < 0.8 * unigram < math.log(3840)


def test_pool_of_compressed_proxies(compressed, split):
    """Step 0: on the fitted text never worse than its best parent; elsewhere within 0.002 nats."""
    parts = [(n, *compressed[n]) for n in POOL]
    total = sum(models.count(parents.peek(upcycle.PROXIES / n)[0]) for n in POOL)
    assert sum(models.count(c) for _, c, _ in parts) <= KEEP * total
    cfg, params, report = fuse.fuse(parts, split["calibrate"])
    assert report["nll"] <= min(report["nll_parents"])
    best = min(nll(c, p, split["report"]) for _, c, p in parts)
    assert nll(cfg, params, split["report"]) <= best + 0.002


def test_greedy_continuation_is_that_of_the_full_forward(compressed, split):
    """64 tokens of a fused DELVE: cached decoding equals recomputing everything, batch 1 and 3."""
    cfg, params, _ = fuse.fuse([(n, *compressed[n]) for n in POOL])
    lm = delve_jax.LM(cfg, params)
    prompt = split["report"][:3, :33]
    out = np.asarray(lm.generate(prompt, 64))
    logits = np.asarray(lm.logits(out[:, :-1]))[:, 32:]
    top2 = np.sort(logits, axis=-1)[..., -2:]
    agrees = logits.argmax(-1) == out[:, 33:]
    assert (agrees | (top2[..., 1] - top2[..., 0] < 1e-4)).all() and agrees[:, :8].all()
    np.testing.assert_array_equal(np.asarray(lm.generate(prompt[:1], 64)), out[:1])
