"""Mixtures, pools and training sets: exact counts, purity in the step, hosts, refusals."""

import collections
import json
import shutil

import numpy as np
import pytest

from delve_jax import data
from delve_jax.config import DelveError
from delve_jax.data import catalog, pipeline


def rows_of(name_number, n, length=3):
    """A source whose rows say which source and which row they are."""
    rows = np.full((n, length), name_number, np.int32)
    rows[:, 1] = np.arange(n)
    return rows


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 100, 2048, 2049])
def test_permuted_is_a_permutation(n):
    orders = [tuple(pipeline.permuted(i, n, key) for i in range(n)) for key in (1, 2, 1 << 63)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 8:
        assert len(set(orders)) == 3 and orders[0] != tuple(range(n))


@pytest.mark.parametrize("n", [3, 5, 8, 37])
def test_permuted_spreads_every_place(n):
    """Over many keys each place takes each value as often (chi-squared, (n - 1)^2 degrees)."""
    keys = 1000
    seen = np.zeros((n, n))
    for key in range(keys):
        for i in range(n):
            seen[i, pipeline.permuted(i, n, pipeline._key("test", key))] += 1
    chi2 = ((seen - keys / n) ** 2 / (keys / n)).sum()
    assert chi2 - (n - 1) ** 2 < 6 * (2 * (n - 1) ** 2) ** 0.5
    big = pipeline.permuted(5, 10**12, 3)
    assert 0 <= big < 10**12 and big != pipeline.permuted(5, 10**12, 4)


def test_delphi_counts_are_the_published_ones():
    weights = list(catalog.MIXTURES["delphi"].values())
    assert pipeline.block_counts(weights, 2048) == [169, 505, 153, 633, 286, 130, 116, 46, 10]
    shares = [int(w / sum(weights) * 2048) for w in weights]
    assert 2048 - sum(shares) == 5 and shares[3] == 628  # the rest went to `medium`


def test_counts_are_exact_in_every_block():
    sizes, weights, block = (50, 7, 400), (0.5, 0.2, 0.3), 64
    parts = [
        (str(k), rows_of(k, n), w) for k, (n, w) in enumerate(zip(sizes, weights, strict=True))
    ]
    counts = pipeline.block_counts(weights, block)
    assert counts == [33, 12, 19] and sum(counts) == block
    ds = data.mixture(parts, batch=16, seed=5, block=block)
    blocks = [np.concatenate([ds[4 * b + s] for s in range(4)]) for b in range(60)]
    for rows in blocks:
        assert collections.Counter(rows[:, 0].tolist()) == dict(enumerate(counts))
    assert len({tuple(rows[:, 0]) for rows in blocks}) == 60  # each block in an order of its own
    far = np.concatenate([ds[4 * 10**9 + s] for s in range(4)])
    assert collections.Counter(far[:, 0].tolist()) == dict(enumerate(counts))
    # a component is read through, each epoch in a permutation of its own, before it starts anew
    for k, n in enumerate(sizes):
        read = [[] for _ in range(60 * counts[k] // n + 1)]
        for b, rows in enumerate(blocks):
            mine = rows[rows[:, 0] == k][:, 1].tolist()
            turns = sorted(b * counts[k] + j for j in range(counts[k]))
            if turns[0] // n == turns[-1] // n:  # a block inside one epoch
                read[turns[0] // n] += mine
                assert len(set(mine)) == len(mine)
        assert all(len(set(epoch)) == len(epoch) for epoch in read)
    mix = pipeline.Mixture(("a", "b"), (rows_of(0, 10), rows_of(1, 6)), (5, 3), 0)
    order = [mix.place(g) for g in range(16)]  # 2 blocks: an epoch of both
    assert sorted(order) == [(0, i) for i in range(10)] + [(1, i) for i in range(6)]
    again = [mix.place(g) for g in range(16, 32)]
    assert sorted(again) == sorted(order) != again and again != order


def test_mixture_is_pure_and_hosts_interleave():
    parts = [("a", rows_of(0, 30), 3), ("b", rows_of(1, 20), 1)]
    make = lambda seed=1, **more: data.mixture(parts, 8, seed, block=32, **more)  # noqa: E731
    first, again = make(), make()
    steps = {i: np.array(first[i]) for i in range(12)}
    for i in (11, 3, 0, 7):
        np.testing.assert_array_equal(steps[i], again[i])
    for i, batch in zip(range(12), make().to_iter_dataset(), strict=False):
        np.testing.assert_array_equal(steps[i], batch)
    assert any((steps[i] != make(2)[i]).any() for i in range(3))
    hosts = [make(shard=k, shards=4) for k in range(4)]
    for i in range(12):
        np.testing.assert_array_equal(np.stack([h[i] for h in hosts], 1).reshape(8, 3), steps[i])
    assert steps[0].dtype == np.int32 and hosts[0][0].shape == (2, 3)


def test_bad_mixtures_are_named():
    rows = rows_of(0, 9)
    for parts, says in (
        ([("a", rows, 1.0), ("b", rows, 0.0)], "b: weight 0.0 must be positive"),
        ([("a", rows, 1.0), ("b", rows, float("nan"))], "b: weight nan"),
        ([("a", rows, 1.0), ("b", rows, 1e-4)], "b: its weight is less than one window"),
        ([("a", rows, 1.0), ("a", rows, 1.0)], "a: named twice"),
    ):
        with pytest.raises(DelveError, match=says):
            data.mixture(parts, 4, 0)
    with pytest.raises(DelveError, match="multiple"):
        data.mixture([("a", rows, 1.0)], 5, 0, shards=2)


# ---- training sets -------------------------------------------------------------------------------

T = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """a.txt and b.txt, a tokenizer, and a token folder of each text."""
    place = tmp_path_factory.mktemp("training")
    documents = [d[:900] for d in data.stdlib_documents()[:40]]
    json_str = data.train_bpe(documents, 300)
    (place / "tokenizer.json").write_text(json_str)
    for name, part in (("a", documents[:30]), ("b", documents[30:])):
        (place / f"{name}.txt").write_bytes("\n<|endoftext|>\n".join(part).encode())
        data.prepare([place / f"{name}.txt"], place / name, tokenizer=place / "tokenizer.json")
    return place


def make(place, items, **more):
    tokenizer = (place / "tokenizer.json").read_text()
    args = {"vocab_size": 300, "window": T + 1, "batch": 4, "seed": 3} | more
    return data.training_set(items, tokenizer, **args)


def test_text_alone_is_what_it_was(place):
    files = [place / "a.txt", place / "b.txt"]
    documents = [d for f in files for d in data.read_documents(f)]
    tok = data.load_tokenizer((place / "tokenizer.json").read_text(), 300)
    ids = data.encode_documents(tok, documents)
    want = data.batches(data.windows(ids, T + 1, T), 4, 3)
    ds, facts = make(place, files)
    for step in (0, 5, 900):
        np.testing.assert_array_equal(ds[step], want[step])
    assert ds[0].shape == (4, T + 1) and ds[0].dtype == np.int32
    assert facts["data_hash"] == data.data_hash(documents) and facts["tokens"] == len(ids)


def test_folders_pool_evenly(place):
    ds, facts = make(place, [place / "a", place / "b"])
    sources = [data.open_tokens(place / name).windows(T + 1) for name in "ab"]
    n = sum(map(len, sources))
    epoch = np.concatenate([ds[i] for i in range(n // 4)])
    want = {tuple(s[i]) for s in sources for i in range(len(s))}
    have = [tuple(row) for row in epoch]
    assert set(have) <= want and len(set(have)) > len(want) - 40  # few windows are alike
    hosts = [make(place, [place / "a", place / "b"], shard=k, shards=2)[0] for k in range(2)]
    np.testing.assert_array_equal(np.stack([h[6] for h in hosts], 1).reshape(4, T + 1), ds[6])
    assert facts["tokens"] == sum(p["tokens"] for p in facts["parts"].values())
    assert list(facts["parts"]) == [str(place / "a"), str(place / "b")]
    folder_and_text, _ = make(place, [place / "a", place / "b.txt"])
    assert folder_and_text[0].shape == (4, T + 1)


def test_weights_mix(place):
    items = [f"{place / 'a'}=0.25", f"{place / 'b.txt'}=0.75"]
    ds, facts = make(place, items, batch=256)
    folder = data.open_tokens(place / "a").windows(T + 1)
    mine = {tuple(folder[i]) for i in range(len(folder))}
    rows = np.concatenate([ds[i] for i in range(8)])  # one block of 2048
    assert 512 <= sum(tuple(row) in mine for row in rows) < 600  # the texts share a few windows
    weights = [p["weight"] for p in facts["parts"].values()]
    assert weights == [0.25, 0.75] and facts["parts"][str(place / "a")]["windows"] == len(folder)
    other = make(place, [f"{place / 'a'}=0.5", f"{place / 'b.txt'}=0.5"])[1]
    assert other["data_hash"] != facts["data_hash"] == make(place, items)[1]["data_hash"]


def test_a_prepared_mixture_brings_its_weights(place, tmp_path, monkeypatch):
    monkeypatch.setitem(catalog.MIXTURES, "two", {"pile": 3.0, "slimpajama": 1.0})
    for part, name in (("pile", "a"), ("slimpajama", "b")):
        (tmp_path / "raw" / part).mkdir(parents=True)
        text = "".join(
            json.dumps({"text": d}) + "\n" for d in data.read_documents(place / f"{name}.txt")
        )
        (tmp_path / "raw" / part / "0.jsonl").write_text(text)
    args = ([f"two={tmp_path / 'raw'}"], tmp_path / "mix")
    made = data.prepare(*args, tokenizer=place / "tokenizer.json")
    assert made["weights"] == {"pile": 3.0, "slimpajama": 1.0} and not made["already"]
    assert data.prepare(*args, tokenizer=place / "tokenizer.json")["already"]
    _, facts = make(place, [tmp_path / "mix"])
    assert [p["weight"] for p in facts["parts"].values()] == [0.75, 0.25]
    _, facts = make(place, [f"{tmp_path / 'mix'}=0.5", f"{place / 'b'}=0.5"])
    assert [p["weight"] for p in facts["parts"].values()] == [0.375, 0.125, 0.5]
    limited = data.prepare(
        args[0], tmp_path / "small", tokenizer=place / "tokenizer.json", limit_bytes=4000
    )
    sizes = [
        data.open_tokens(tmp_path / "small" / part).manifest["bytes"] for part in limited["weights"]
    ]
    assert 3000 <= sizes[0] < 3900 and 1000 <= sizes[1] < 1900
    (tmp_path / "raw" / "pile" / "0.jsonl").unlink()
    with pytest.raises(DelveError, match="raw/pile: no .txt"):
        data.prepare(args[0], tmp_path / "other", tokenizer=place / "tokenizer.json")
    assert not (tmp_path / "other").exists()


def test_bad_training_data_is_named(place, tmp_path):
    (tmp_path / "short.txt").write_text("hi")
    (tmp_path / "folder").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "mixture.json").write_text('{"weights": {"a": 1, "b": 3}}')
    for name in "ab":
        shutil.copytree(place / name, tmp_path / "mixed" / name)
    for items, more, says in (
        ([], {}, "no training data"),
        (["no.txt"], {}, "no.txt: no such text file or token folder"),
        ([f"{place / 'a'}=much"], {}, "the weight 'much' is not a number"),
        ([f"{place / 'a'}=0.5", place / "b"], {}, f"{place / 'b'}: has no weight"),
        ([f"{place / 'a'}=-1"], {}, "weight -1.0 must be positive"),
        ([f"{tmp_path / 'mixed'}=0", f"{place / 'a'}=1"], {}, "mixed/a: weight 0.0 must be posi"),
        ([place / "a", place / "a"], {}, "a: named twice"),
        ([tmp_path / "folder"], {}, "without manifest.json"),
        ([tmp_path / "short.txt"], {}, "short.txt: text has . tokens, a window needs 9"),
        ([place / "a"], {"window": 10**6}, f"{place / 'a'}: has .* a window needs 1000000"),
        ([place / "a"], {"vocab_size": 200}, "has the token id ..., the model's vocabulary is 200"),
        ([place / "a.txt"], {"vocab_size": 200}, "the model's vocabulary is 200"),
    ):
        with pytest.raises(DelveError, match=says) as err:
            make(place, items, **more)
        assert "\n" not in str(err.value)


def test_tokens_of_another_tokenizer_are_refused(place):
    tokenizer = (place / "tokenizer.json").read_text()
    args = {"vocab_size": 300, "window": T + 1, "batch": 4, "seed": 3}
    other = data.train_bpe(["quite another text"], 300)
    for json_str in (other, None):
        with pytest.raises(DelveError, match="another tokenizer"):
            data.training_set([place / "a"], json_str, **args)
    blob = json.loads(tokenizer)  # written by another library, set to cut: the same ids
    blob["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data.training_set([place / "a"], json.dumps(blob, indent=2), **args)
