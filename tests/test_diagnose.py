"""`inspect` against the same numbers computed apart: layer by layer, then token by token."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import forward

from delve_jax import checkpoint, data, diagnose, evaluate, models
from delve_jax.config import DelveConfig, DelveError, NeoxConfig, RwkvConfig
from delve_jax.lm import LM
from delve_jax.report import inspection_picture

V, T = 300, 16
TEXT = (
    "def area(radius, digits=2):\n    return round(3.14159 * radius ** 2, digits)\n",
    "A second document, naïve: the radius of 12 circles, and the radius again.\n",
)


def rwkv(L, V, d=16):
    return RwkvConfig(V, V, d, L, d_att=d, d_ffn=2 * d, context_length=64)


def neox(L, V, d=24):
    return NeoxConfig(V, V, d, L, n_heads=2, d_ffn=2 * d, context_length=64)


GATED = DelveConfig(
    (("r", rwkv(3, V)), ("n", neox(3, V))), n_superblocks=3, connectors="hub", hub_rank=4
)
BYTES = DelveConfig(
    (("r", rwkv(3, 256)), ("n", neox(2, 256))), n_superblocks=2, latents=2, connectors="none",
    gate_proj=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, randomised):
    """A checkpoint `delve`, its parents `r` and `n` on disk, and the text."""
    root = tmp_path_factory.mktemp("diagnose")
    tokenizer = data.train_bpe([*TEXT] * 3, V)
    (root / "text.txt").write_text("\n<|endoftext|>\n".join(TEXT))
    for seed, (name, sub) in enumerate(GATED.streams):
        checkpoint.save(root / name, sub, randomised(sub, seed), tokenizer)
    cfg = dataclasses.replace(GATED, teachers=(str(root / "r"), str(root / "n")))
    checkpoint.save(root / "delve", cfg, randomised(cfg, 7), tokenizer)
    return root


@pytest.fixture(scope="module")
def report(place):
    return diagnose.inspect(
        place / "delve", [str(place / "text.txt")], out=place / "seen" / "it", window=T
    )


def f64(x):
    return np.asarray(x, np.float64)


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def log_softmax(x):
    x = f64(x)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def layer_by_layer(cfg, params, tokens):
    """log p of the pool and of each stream, w_BTK, ratio [s, K, B, T]: J = 1, hub and gate on."""
    hub, h, ratios = params["hub"], {}, []
    for n, sub in cfg.streams:
        h[n] = models.embed_tokens(sub, params["streams"][n], tokens)
    block = {n: jax.jit(functools.partial(models.block_apply, sub)) for n, sub in cfg.streams}
    for s in range(cfg.n_superblocks):
        if s:
            z = sum(rms(f64(h[n])) @ f64(hub[n]["a"][s - 1]) for n in h)
            ratios.append([])
            for n in h:
                p = {name: f64(leaf[s - 1]) for name, leaf in hub[n].items()}
                said = p["sigma"] * ((p["g"] * z) @ p["b"])
                ratios[-1].append(np.sqrt((said**2).sum(-1) / (f64(h[n]) ** 2).sum(-1)))
                h[n] = jnp.float32(f64(h[n]) + said)
        for n, _ in cfg.streams:  # as many superblocks as layers: one each
            layer = jax.tree.map(lambda a, s=s: a[s], params["streams"][n]["layers"])
            h[n] = block[n](layer, h[n])
    f = {n: models.final_features(sub, params["streams"][n], h[n]) for n, sub in cfg.streams}
    own = [f64(models.head_logits(sub, params["streams"][n], f[n])) for n, sub in cfg.streams]
    gate = jax.tree.map(f64, params["gate"])
    x = np.concatenate([rms(f64(f[n])) @ gate["p"][n] for n in f], axis=-1) @ gate["w1"]
    a_BTK = f64(params["pool"]["a"]) * np.exp(2 * np.tanh(x / (1 + np.exp(-x)) @ gate["w2"] / 2))
    pooled = log_softmax(sum(a_BTK[..., k, None] * ell for k, ell in enumerate(own)))
    w_BTK = np.abs(a_BTK) / np.abs(a_BTK).sum(-1, keepdims=True)
    return pooled, [log_softmax(ell) for ell in own], w_BTK, np.array(ratios)


@pytest.fixture(scope="module")
def scored(place):
    """One dict for each scored token, from windows that start every T / 2 ids."""
    cfg, params = checkpoint.restore(place / "delve")
    tok = data.load_tokenizer((place / "r" / "tokenizer.json").read_text(), V)
    stream = [data.eot_of(tok), *data.encode_documents(tok, TEXT).tolist()]
    n, starts = len(stream) - 1, []
    while not starts or starts[-1] + T < n:
        starts.append(min(len(starts) * T // 2, n - T))
    tokens = np.array([stream[s : s + T] for s in starts])
    pooled, own, w_BTK, ratio_sKBT = layer_by_layer(cfg, params, tokens)
    parts = {"hybrid": pooled, **{f"stream {n}": x for n, x in zip(cfg.names, own, strict=True)}}
    for name in cfg.names:
        sub, p = checkpoint.restore(place / name)
        parts[f"parent {name}"] = log_softmax(forward(sub, p, tokens)[0])
    out, apart, end, free = [], [], 0, 0
    for b, start in enumerate(starts):
        for t in range(T):
            at = start + t + 1
            row = {
                "window": b, "target": stream[at], "text": tok.decode([stream[at]]), "t": t,
                "seen": stream[at] in stream[start:at], "w": w_BTK[b, t], "at": at,
                "ratio": ratio_sKBT[:, :, b, t],
                **{name: -x[b, t, stream[at]] for name, x in parts.items()},
            }  # fmt: skip
            if at > end:
                out.append(row)
            if start >= free:
                apart.append(row)
        free = start + T if start >= free else free
        end = start + T
    assert [row["at"] for row in out] == list(range(1, n + 1))
    return out, apart, stream, tok


def test_losses_of_hybrid_streams_and_parents(report, scored, place):
    rows, size = scored[0], sum(len(text.encode()) for text in TEXT)
    assert (report["tokens"], report["bytes"], report["window"]) == (len(rows), size, T)
    assert report["windows"] == 1 + rows[-1]["window"] > 4
    found = {"hybrid": report}
    for kind in ("stream", "parent"):
        found |= {f"{kind} {name}": report[f"{kind}s"][name] for name in GATED.names}
    for name, row in found.items():
        total = sum(r[name] for r in rows)
        assert row["nll_per_token"] == pytest.approx(total / len(rows), rel=1e-4), name
        assert row["bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-4), name
    assert report["compared_with"] == "parents" and report["parents_missing"] == {}
    losses = {n: sum(r[f"parent {n}"] for r in rows) for n in GATED.names}
    assert report["best"] == min(losses, key=losses.get)
    assert (place / "seen" / "it" / "inspect.json").is_file()


def test_gains_by_group(report, scored):
    rows, apart, stream, tok = scored
    best = f"parent {report['best']}"
    types = diagnose.token_types(tok, np.array(stream))
    expected = {"by_type": {}, "by_copying": {}, "by_position": {}}
    for row in rows:
        kind = diagnose.TYPES[types[row["at"]]]
        expected["by_type"].setdefault(kind, []).append(row)
        expected["by_copying"].setdefault(diagnose.COPYING[row["seen"]], []).append(row)
    for row in apart:
        quarter = diagnose.QUARTERS[row["t"] // (T // 4)]
        expected["by_position"].setdefault(quarter, []).append(row)
    assert set(report["by_type"]) == set(diagnose.TYPES)
    for grouping, groups in expected.items():
        found, total = report[grouping], sum(map(len, groups.values()))
        assert found.keys() == groups.keys()
        for name, members in groups.items():
            gains = [r[best] - r["hybrid"] for r in members]
            assert found[name]["tokens"] == len(members)
            assert found[name]["share"] == pytest.approx(len(members) / total)
            assert found[name]["gain"] == pytest.approx(np.mean(gains), rel=1e-3, abs=1e-3)
            nll = np.mean([r["hybrid"] for r in members])
            assert found[name]["nll_per_token"] == pytest.approx(nll, rel=1e-4)
            if found[name]["interval"]:
                low, high = found[name]["interval"]
                assert low <= found[name]["gain"] <= high
    assert report["gain"]["tokens"] == len(rows)


def test_weights_of_the_pool(report, scored, place):
    w_NK, pool = np.array([row["w"] for row in scored[0]]), report["pool"]
    a_K = np.abs(f64(checkpoint.restore(place / "delve")[1]["pool"]["a"]))
    for k, name in enumerate(GATED.names):
        assert pool["static"][name] == pytest.approx(a_K[k] / a_K.sum(), rel=1e-5)
        spread = pool["gated"][name]
        assert spread["mean"] == pytest.approx(w_NK[:, k].mean(), abs=1e-4)
        for p in (5, 25, 50, 75, 95):
            assert spread[f"p{p}"] == pytest.approx(np.percentile(w_NK[:, k], p), abs=1e-4)
    number_N = np.exp([-sum(w * math.log(w) for w in row) for row in w_NK])
    number = pool["effective_streams"]
    assert number["mean"] == pytest.approx(number_N.mean(), abs=1e-4)
    assert number["p95"] == pytest.approx(np.percentile(number_N, 95), abs=1e-4)
    assert sum(number["histogram"]["tokens"]) == len(w_NK)
    shown = report["example"]["tokens"]
    first = next(i for i, r in enumerate(scored[0]) if r["window"] == report["windows"] // 2)
    assert shown == [r["text"] for r in scored[0][first : first + len(shown)]]
    np.testing.assert_allclose(
        np.array([report["example"]["weights"][n] for n in GATED.names]).T,
        w_NK[first : first + len(shown)], rtol=0, atol=1e-4,
    )  # fmt: skip


def test_hub_ratios_and_alarms(report, scored):
    ratio_sK = np.mean([row["ratio"] for row in scored[0]], axis=0)
    for k, name in enumerate(GATED.names):
        assert report["hub"]["update_ratio"][name] == pytest.approx(ratio_sK[:, k], rel=1e-3)
    alarms = {(a["sync_point"], a["stream"]): a["ratio"] for a in report["hub"]["alarms"]}
    large = {(s + 1, GATED.names[k]) for s, k in np.argwhere(ratio_sK > 0.5)}
    assert alarms.keys() == large and large


def test_the_ratio_is_of_what_each_stream_hears(randomised):
    """cross: a stream does not hear itself; the last superblock's end has no hub behind it."""
    cfg = dataclasses.replace(GATED, connectors="cross")
    hub, r = randomised(cfg, 3)["hub"], np.random.default_rng(0)
    h = {n: jnp.float32(r.normal(size=(3, 2, 5, sub.d_model))) for n, sub in cfg.streams}
    ratio_BTsK = diagnose.hub_ratios(cfg, hub, h)
    assert ratio_BTsK.shape == (2, 5, 2, 2)
    for s in range(2):
        for k, (n, other) in enumerate((("r", "n"), ("n", "r"))):
            p = {name: f64(leaf[s]) for name, leaf in hub[n].items()}
            heard = rms(f64(h[other][s])) @ f64(hub[other]["a"][s])
            said = p["sigma"] * (p["g"] * heard) @ p["b"]
            want = np.linalg.norm(said, axis=-1) / np.linalg.norm(f64(h[n][s]), axis=-1)
            np.testing.assert_allclose(ratio_BTsK[:, :, s, k], want, rtol=1e-4)
    silent = jax.tree.map(jnp.zeros_like, hub)
    assert not np.asarray(diagnose.hub_ratios(cfg, silent, h)).any()


def test_weights_between_one_and_all_latents():
    """1 < J < K: latents averaged by pi, both moved by the gate; a negative a counts by its size"""
    three = (*GATED.streams, ("m", rwkv(3, V)))
    cfg = dataclasses.replace(GATED, streams=three, latents=2)
    r = np.random.default_rng(1)
    a_JK, log_pi_J, delta_BG = r.normal(size=(2, 3)), r.normal(size=2), r.normal(size=(4, 5))
    pool = {"a": jnp.float32(a_JK), "log_pi": jnp.float32(log_pi_J)}
    got = diagnose.stream_weights(cfg, pool, jnp.float32(delta_BG))
    for b in range(4):
        pi = np.exp(log_pi_J + delta_BG[b, 3:])
        pi /= pi.sum()
        a = np.abs(a_JK) * np.exp(2 * np.tanh(delta_BG[b, :3] / 2))
        want = sum(pi[j] * a[j] for j in range(2))
        np.testing.assert_allclose(got[b], want / want.sum(), rtol=1e-5)
    none = {"a": jnp.zeros((2, 3)), "log_pi": jnp.float32(log_pi_J)}
    np.testing.assert_allclose(diagnose.stream_weights(cfg, none, jnp.zeros(5)), [1 / 3] * 3)


def test_effective_number():
    w = [[1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3, [0.7, 0.2, 0.1]]
    last = 0.7**-0.7 * 0.2**-0.2 * 0.1**-0.1
    np.testing.assert_allclose(diagnose.effective_number(w), [1, 2, 3, last])


class Pieces:
    """A tokenizer whose ids are places in a list of strings."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def test_token_types_of_a_hand_written_string():
    start, on, space, digit, symbol, other = range(6)
    text = [
        ("", other), ("The", start), (" cat", start), ("s", on), (" ", space), ("sat", start),
        ("_", symbol), ("x", start), ("1", digit), ("b", on), (" 22", digit), ("2nd", digit),
        ("\n\n", space), ("(foo", symbol), (" ==", symbol), ("\tif", start), ("é", other),
        ("t", on), ("\ufffd", other), ("t", start), (" naïve", other), ("s\n", on), ("A", start),
    ]  # fmt: skip
    pieces = list(dict.fromkeys(piece for piece, _ in text))
    ids = np.array([pieces.index(piece) for piece, _ in text])
    assert diagnose.token_types(Pieces(pieces), ids).tolist() == [kind for _, kind in text]
    raw = np.frombuffer("Hi 7é!\n".encode(), np.uint8)
    got = diagnose.token_types(data.ByteTokenizer(), raw)
    assert got.tolist() == [start, on, space, digit, other, other, symbol, space]


def test_intervals_are_those_of_window_means():
    """Windows with a common shift: the spread is that of B means, not of B T tokens."""
    r, B = np.random.default_rng(2), 200
    best_BT = r.normal(size=(B, 8)) + r.normal(size=(B, 1)) * 3 + 0.5
    mask, label = np.ones((B, 8), bool), np.zeros((B, 8), int)
    label[:, 4:] = 1
    label[3, 0] = 2
    each = np.arange(B)
    out = diagnose.grouped(("a", "b", "c", "d"), each, label, mask, np.zeros((B, 8)), best_BT)
    assert list(out) == ["a", "b", "c"] and out["c"]["interval"] is None
    means_B = best_BT[:, 4:].mean(1)
    low, high = out["b"]["interval"]
    assert out["b"]["gain"] == pytest.approx(means_B.mean())
    assert high - low == pytest.approx(2 * 1.96 * means_B.std() / B**0.5, rel=0.15)
    same = diagnose.grouped(("a",), each, label * 0, mask, best_BT - 0.25, best_BT)["a"]
    assert same["interval"] == pytest.approx([0.25, 0.25])


def test_intervals_are_those_of_document_means():
    """Five windows of one shift each are one observation, not five; documents may have gaps."""
    r, D = np.random.default_rng(3), 80
    best_BT = np.repeat(r.normal(size=(D, 1)), 5, 0) + np.zeros((1, 4))
    mask, document_B = np.ones(best_BT.shape, bool), np.repeat(np.arange(D) * 3 + 1, 5)
    for unit_B, n in ((document_B, D), (np.arange(5 * D), 5 * D)):
        out = diagnose.grouped(("a",), unit_B, np.zeros_like(mask), mask, 0 * best_BT, best_BT)
        low, high = out["a"]["interval"]
        assert high - low == pytest.approx(2 * 1.96 * best_BT.std() / n**0.5, rel=0.15)
    one = diagnose.grouped(("a",), 0 * unit_B, np.zeros_like(mask), mask, 0 * best_BT, best_BT)
    assert one["a"]["interval"] is None


def test_many_documents_are_drawn_few_are_not(place, tmp_path):
    texts = [f"def f{i}(x):\n    return x * {i} + {'1 + ' * i}radius\n" for i in range(12)]
    found = []
    for n in (diagnose.FEWEST, diagnose.FEWEST - 1):
        (tmp_path / "some.txt").write_text("\n<|endoftext|>\n".join(texts[:n]))
        found.append(diagnose.inspect(place / "delve", [tmp_path / "some.txt"], window=T))
    assert [r["intervals_over"] for r in found] == ["documents", "windows"]
    assert all(r["gain"]["interval"] for r in found)


def test_raw_bytes_mixture_without_hub_gate_and_parents(randomised, tmp_path):
    """The numbers of `evaluate`; weights that do not move; streams in the place of parents."""
    file, text = tmp_path / "bytes.txt", "naïve été = 12\n" * 9
    file.write_text(text)
    params = randomised(BYTES, 4)
    model = LM(dataclasses.replace(BYTES, teachers=(str(tmp_path / "gone"), "n")), params)
    out = diagnose.inspect(model, [file])
    want = evaluate.evaluate(model, [text])
    for name in ("nll_per_token", "bits_per_byte"):
        assert out[name] == pytest.approx(want[name], rel=1e-5)
    assert (out["tokens"], out["bytes"], out["window"]) == (n := want["bytes"], n, want["window"])
    assert out["compared_with"] == "streams" and out["parents"] == {}
    assert str(tmp_path / "gone") in out["parents_missing"]["r"] and out["best"] in out["streams"]
    assert out["hub"] is None and out["gain"]["tokens"] == n - 1  # no one predicts the first byte
    w_K = np.exp(log_softmax(params["pool"]["log_pi"]))
    for name, w in zip(BYTES.names, w_K, strict=True):
        assert out["pool"]["static"][name] == pytest.approx(w, rel=1e-5)
        assert [*out["pool"]["gated"][name].values()] == pytest.approx([w] * 6, rel=1e-5)
    few = diagnose.inspect(model, [file], limit=40)
    assert few["tokens"] == few["bytes"] == 40 and few["windows"] == 1
    assert few["gain"]["interval"] is None
    inspection_picture(few, tmp_path / "few.png", diagnose.ALARM)  # no hub, no intervals
    assert (tmp_path / "few.png").read_bytes().startswith(b"\x89PNG")


# ---- files and errors ----------------------------------------------------------------------------


def test_both_files_are_whole_or_absent(report, place, monkeypatch):
    out = place / "seen" / "it"
    assert sorted(p.name for p in out.iterdir()) == ["inspect.json", "inspect.png"]
    saved = json.loads((out / "inspect.json").read_text())
    assert saved == {k: v for k, v in report.items() if k != "path"}
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert before["inspect.png"].startswith(b"\x89PNG") and len(before["inspect.png"]) > 20_000

    def full(self, raw):
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(DelveError, match=f"--out {out}: cannot be written"):
            diagnose._write(out, report)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_refusals(place, randomised, tmp_path):
    text, model = [str(place / "text.txt")], LM(GATED, {})
    with pytest.raises(DelveError, match=f"{place / 'r'}: is rwkv, not a DELVE"):
        diagnose.inspect(place / "r", text)
    with pytest.raises(DelveError, match="nothing to inspect on: give --text FILE"):
        diagnose.inspect(place / "delve", [])
    with pytest.raises(DelveError, match="gone.txt: no such text file"):
        diagnose.inspect(place / "delve", [str(place / "gone.txt")])
    with pytest.raises(DelveError, match="the model: no tokenizer.json.*vocabulary of 300"):
        diagnose.inspect(model, text)
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(DelveError, match="--text .*short.txt: 1 token; give more text"):
        diagnose.inspect(place / "delve", [tmp_path / "short.txt"])
    for flag in ("window", "limit"):
        with pytest.raises(DelveError, match=f"--{flag} 1: must be at least 2"):
            diagnose.inspect(place / "delve", text, **{flag: 1})
    with pytest.raises(DelveError, match="text.txt: is a file; name a directory"):
        diagnose.inspect(place / "delve", text, out=text[0])
    tok = json.loads((place / "r" / "tokenizer.json").read_text())
    (a, i), (b, j) = list(tok["model"]["vocab"].items())[-2:]
    tok["model"]["vocab"] |= {a: j, b: i}  # as many ids, two of another meaning
    cfg, params = checkpoint.restore(place / "r")
    checkpoint.save(tmp_path / "other", cfg, params, json.dumps(tok))
    with pytest.raises(DelveError, match="--parents .*other: its tokenizer differs"):
        diagnose.inspect(place / "delve", text, parents=[tmp_path / "other"], window=T)
    with pytest.raises(DelveError, match="--parents .*gone: no such file"):
        diagnose.inspect(place / "delve", text, parents=[place / "r", place / "gone"], window=T)
    checkpoint.save(tmp_path / "bytes", rwkv(3, 256), randomised(rwkv(3, 256), 0))
    with pytest.raises(DelveError, match="--parents .*bytes: has 256 ids, the DELVE 300"):
        diagnose.inspect(place / "delve", text, parents=[tmp_path / "bytes"], window=T)
