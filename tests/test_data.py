"""Readers, documents, splits, ids, batches: each rule against an independent computation."""

import gzip
import hashlib
import json
import lzma
import random
import re
import sys
import sysconfig
import types
from pathlib import Path

import numpy as np
import pytest
import zstandard

from delve_jax import data
from delve_jax.config import DelveError
from delve_jax.metrics import MetricsLog, progress, read_metrics, versions

SHARED = Path(__file__).parents[1] / "../shared/data"


@pytest.fixture(scope="module")
def bpe():
    return data.load_tokenizer(data.train_bpe(data.stdlib_documents()[:60], 600), 600)


def random_text(rng: random.Random, n: int) -> str:
    """Any code points but surrogates: controls, accents (composed or not), astral, spaces."""
    pools = [(0, 128), (0x80, 0x300), (0x300, 0x370), (0x2000, 0x3000), (0x1F300, 0x1F700)]
    chars = [chr(rng.randrange(*rng.choice(pools))) for _ in range(n)]
    return "".join(c if rng.random() > 0.3 else rng.choice(" \n\t\r") for c in chars)


# sha256 of these texts begins with the byte in the comment (printf %s TEXT | sha256sum)
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", "train"),  # e3 = 227, 227 % 64 = 35
        ("a", "train"),  # ca = 202, 10
        ("8", "train"),  # 2c = 44
        ("document 2", "calibrate"),  # 7a = 122, 58
        ("document 73", "calibrate"),  # bb = 187, 59
        ("document 87", "choose"),  # fc = 252, 60
        ("document 3", "choose"),  # 3d = 61
        ("document 93", "report"),  # 7e = 126, 62
        ("document 41", "report"),  # ff = 255, 63
    ],
)
def test_split_rule(text, name):
    assert data.split_of(text) == name


def test_splits_partition_the_documents():
    docs = [f"text {i}" for i in range(4000)]
    parts = {name: data.split(docs, name) for name in data.SPLITS}
    assert sorted(sum(parts.values(), [])) == sorted(docs)
    assert all(60 < len(parts[name]) < 200 for name in data.SPLITS[1:])  # 125 expected
    with pytest.raises(DelveError, match="validation"):
        data.split(docs, "validation")


def test_separators_and_byte_exact_documents(tmp_path):
    docs = ["one\n", "two\r\n\r\n", "", "a <|endoftext|> inside\n <|endoftext|>\n", "\nlast, ünï"]
    joined = "\n<|endoftext|>\n".join(docs)
    kept = [doc for doc in docs if doc]
    cases = (joined, joined + "\n<|endoftext|>\n", "<|endoftext|>\n" + joined + "\n<|endoftext|>")
    for i, text in enumerate(cases):
        raw = text.encode("utf-8")
        for name, content in (
            ("t.txt", raw),
            ("t.md", raw),
            ("t.txt.xz", lzma.compress(raw)),
            ("t.txt.gz", gzip.compress(raw)),
            ("t.txt.zst", zstandard.compress(raw)),
        ):
            path = tmp_path / f"{i}{name}"
            path.write_bytes(content)
            assert data.read_documents(path) == kept
    windows = b"\r\n<|endoftext|>\r\n".join(d.encode() for d in ("one\r\ntwo", "three\n", "four"))
    (tmp_path / "w.txt").write_bytes(windows)
    assert data.read_documents(tmp_path / "w.txt") == ["one\r\ntwo", "three\n", "four"]
    (tmp_path / "plain.py").write_bytes(b"x = 1\r\n")
    assert data.read_documents(tmp_path / "plain.py") == ["x = 1\r\n"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "no text"),
        ("b.txt", b"<|endoftext|>\n<|endoftext|>\n", "no text"),
        ("c.txt", b"ok\xff\xfe", "UTF-8 at byte 2"),
        ("d.txt", b"ELF\0\1", "binary"),
        ("e.txt.xz", lzma.compress(b"hello" * 99)[:-20], "cut short"),
        ("f.txt.gz", gzip.compress(b"hello" * 99, mtime=0)[:-9], "cut short"),
        ("g.txt.xz", b"not xz at all", "damaged"),
        ("h.txt.gz", b"not gzip", "damaged"),
        ("i.txt", None, "no such"),
        ("", None, "directory"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DelveError) as err:
        data.read_documents(path)
    assert str(path) in str(err.value) and says in str(err.value) and "\n" not in str(err.value)


def split_documents(text):
    """The rule in one regular expression: pieces between lines that are `<|endoftext|>`.

    Where such a line ends in CRLF, so does the line before it.
    """
    parts = re.split(r"(?:\A|\n)<\|endoftext\|>((?:\r(?=\n))?)(?=\n|\Z)", text)
    ends = [*parts[1::2], ""]
    pieces = [d if i == 0 else d.removeprefix("\n") for i, d in enumerate(parts[0::2])]
    return [d for d in (p.removesuffix(end) for p, end in zip(pieces, ends, strict=True)) if d]


def test_streamed_documents_follow_the_rule(tmp_path):
    rng = random.Random(1)
    pieces = ["<|endoftext|>", "\n", "\n", "x", " ", "é\n<|endoftext|>\n", "\r\n"]
    path, several = tmp_path / "t.txt", 0
    for _ in range(400):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(30)))
        path.write_bytes(text.encode())
        want = split_documents(text)
        assert [document for document, _ in data.text.stream(path)] == want
        several += len(want) > 1
    assert several > 50  # the cases are not trivial


def test_zstd_frames_and_cuts(tmp_path):
    raw = random.Random(0).randbytes(300_000).hex().encode()
    frames = zstandard.compress(raw[:250_000]) + zstandard.compress(raw[250_000:])
    path = tmp_path / "t.txt.zst"
    path.write_bytes(frames)
    assert data.read_text(path) == raw.decode()
    for cut in (1, 1000, len(frames) // 2):
        path.write_bytes(frames[:-cut])
        with pytest.raises(DelveError, match="cut short"):
            data.read_text(path)
    path.write_bytes(b"not zstandard")
    with pytest.raises(DelveError, match="damaged"):
        data.read_text(path)


ROWS = [
    {"text": "first\nline", "meta": {"raw": "nested 1"}, "n": 1},
    {"text": "", "meta": {"raw": ""}, "n": 2},
    {"text": "second ünï \u0000", "meta": {"raw": "nested 2"}, "n": 3},
    {"text": None, "meta": None, "n": 4},
]


def write_rows(path, rows):
    """`rows` as JSON lines or parquet, packed as the suffix says."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress}
    path.write_bytes(pack.get(path.suffix, bytes)(raw))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.parquet"])
def test_rows_read_alike_in_every_format(tmp_path, name):
    path = tmp_path / name
    write_rows(path, ROWS[:3])
    assert data.read_documents(path) == ["first\nline", "second ünï \0"]
    assert data.read_documents(path, ["content", "meta.raw"]) == ["nested 1", "nested 2"]
    shares = [share for _, share in data.text.stream(path)]
    assert shares == sorted(shares) and 0 < shares[0] and shares[-1] <= 1
    for field, says in (("n", "'n' is int"), ("body", "no field 'body'"), ("meta.x", "'meta.x'")):
        with pytest.raises(DelveError, match=says) as err:
            data.read_documents(path, [field])
        assert str(path) in str(err.value) and "\n" not in str(err.value)
    write_rows(path, ROWS)
    assert len(data.read_documents(path)) == 2  # null is an empty document


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "x"', ":2: not JSON"),
        (b"[1]", ":2: not a JSON object"),
        (b'{"content": "x", "id": 1}', ":2: no field 'text'; there are content, id"),
        (b'{"text": 5}', ":2: field 'text' is int"),
        (b'{"text": "\\ud800"}', ":2: field 'text' has half"),
        (b'{"text": "\xff"}', ":2: not UTF-8 at byte 10"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DelveError) as err:
        data.read_documents(path)
    assert str(err.value).startswith(f"{path}{says}") and "\n" not in str(err.value)


def test_bad_parquet_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write_rows(path, ROWS)
    for content in (path.read_bytes()[:-9], b"", b"PAR1 no"):
        path.write_bytes(content)
        with pytest.raises(DelveError, match="cannot be read") as err:
            data.read_documents(path)
        assert str(path) in str(err.value) and "\n" not in str(err.value)
    with pytest.raises(DelveError, match="no such file"):
        data.read_documents(tmp_path / "b.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DelveError, match="pip install pyarrow"):
        data.read_documents(path)


def test_hub_rows(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    read = lambda: list(data.text.stream_hub("pile", "o/pile", "c", "train", ["text"]))  # noqa: E731
    with pytest.raises(DelveError, match="pip install datasets.*pile=DIR"):
        read()
    asked, rows = [], [{"text": "one"}, {"text": ""}, {"text": "two"}]
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda *a, **k: asked.append((a, k)) or iter(rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read() == [("one", None), ("two", None)]
    assert asked == [(("o/pile", "c"), {"split": "train", "streaming": True})]
    rows.append({"content": "three"})
    with pytest.raises(DelveError, match="row 4: no field 'text'"):
        read()

    def offline(*_, **__):
        raise ConnectionError("no\nroute")

    fake.load_dataset = offline
    with pytest.raises(DelveError, match="o/pile stopped at row 0 .ConnectionError: no route"):
        read()


def test_stdlib_is_source_without_tests_or_packages():
    docs = data.stdlib_documents()
    assert docs == data.stdlib_documents() and len(docs) > 300
    assert Path(random.__file__).read_bytes().decode() in docs
    root = Path(sysconfig.get_path("stdlib"))
    for name in (
        "test/support/__init__.py",
        "idlelib/idle_test/htest.py",
        "ctypes/test/__init__.py",
    ):
        if (root / name).exists():  # some distributions leave their tests out
            assert (root / name).read_bytes().decode() not in docs
    assert Path(pytest.__file__).read_bytes().decode() not in docs
    assert all(data.split(docs, name) for name in data.SPLITS)


def test_shared_text_and_running_stdlib_agree_on_documents():
    """A file of the library is the same document, in the same split, from either source."""
    path = SHARED / "text/python_stdlib_code.txt.xz"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    both = set(data.read_documents(path)) & set(data.stdlib_documents())
    assert len(both) > 100  # all of them under the Python that it was taken from


def test_data_hash_depends_on_cuts_and_order():
    docs = ["ab", "c", "d"]
    hashes = {data.data_hash(d) for d in (docs, ["a", "bc", "d"], docs[::-1], docs[:2], [])}
    assert len(hashes) == 5
    by_hand = hashlib.sha256(b"ab\n<|endoftext|>\nc\n<|endoftext|>\nd\n<|endoftext|>\n")
    assert data.data_hash(docs) == by_hand.hexdigest()


# ---- tokens --------------------------------------------------------------------------------------


def test_bpe_round_trip_of_any_text(bpe):
    rng = random.Random(0)
    texts = [random_text(rng, n) for n in (0, 1, 2, 3, 10, 100, 1000) for _ in range(20)]
    texts += ["e\u0301 \u00e9", "<|endoftext|> in <|padding|>", "    \n\n\t x", "\ufeff"]
    for text in texts:
        ids = bpe.encode(text, add_special_tokens=False).ids
        assert bpe.decode(ids, skip_special_tokens=False) == text


def test_bpe_has_every_byte_and_its_special_ids(bpe):
    assert (bpe.token_to_id(data.EOT), bpe.token_to_id(data.PADDING)) == (0, 1)
    assert bpe.get_vocab_size() == 600
    assert sum(len(token) == 1 for token in bpe.get_vocab()) == 256
    text = data.stdlib_documents()[3]
    assert len(bpe.encode(text).ids) < 0.75 * len(text.encode())  # it has learned merges
    with pytest.raises(DelveError, match="258"):
        data.train_bpe(["x"], 200)


def test_encode_documents_joins_with_eot(bpe, monkeypatch):
    docs = [f"line {i} = {i * i}\n" for i in range(50)]
    want: list[int] = []
    for doc in docs:
        want += ([0] if want else []) + bpe.encode(doc).ids
    for size in (1, 64, 1 << 20):  # the cut into batches must not show
        monkeypatch.setattr(data.tokenizer, "_BATCH_BYTES", size)
        ids = data.encode_documents(bpe, docs)
        assert ids.dtype == np.int32 and ids.tolist() == want
    assert data.encode_documents(bpe, []).shape == (0,)


def test_a_tokenizer_file_cannot_cut_or_fill_documents(bpe):
    json_str = bpe.to_str()
    other = data.load_tokenizer(json_str, 600)
    other.enable_truncation(4)
    other.enable_padding(length=9)
    docs = ["a long enough text", "b"]
    ids = data.encode_documents(data.load_tokenizer(other.to_str(), 600), docs)
    np.testing.assert_array_equal(ids, data.encode_documents(bpe, docs))


def test_bytes_without_a_tokenizer():
    tok = data.load_tokenizer(None, 256)
    docs = ["naïve\n", "text"]
    ids = data.encode_documents(tok, docs)
    assert bytes(ids.tolist()) == "naïve\ntext".encode()
    assert tok.decode(ids) == "naïve\ntext" and data.eot_of(tok) is None
    with pytest.raises(DelveError, match="50277"):
        data.load_tokenizer(None, 50277)
    with pytest.raises(DelveError, match="tokenizer.json"):
        data.load_tokenizer('{"version": "1.0"', 300)


def test_the_neox_tokenizer_file():
    path = SHARED / "tokenizer/20B_tokenizer.json"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    tok = data.load_tokenizer(path.read_text(), 50277)
    ids = data.encode_documents(tok, ["Hello world", "\n"])
    assert ids.tolist() == [12092, 1533, 0, 187] and tok.get_vocab_size() == 50277


# ---- windows and batches -------------------------------------------------------------------------


def test_windows_of_overlap_one_make_every_id_a_target_once():
    ids = np.arange(1003, dtype=np.int32)
    rows = data.windows(ids, 11, 10)
    assert rows.shape == (100, 11) and np.shares_memory(rows, ids)
    np.testing.assert_array_equal(np.sort(rows[:, 1:].ravel()), np.arange(1, 1001))
    np.testing.assert_array_equal(data.windows(ids, 10).ravel(), np.arange(1000))
    with pytest.raises(DelveError, match="1003 tokens"):
        data.windows(ids, 1004)


def test_batches_are_a_pure_function_of_the_step():
    rows = data.windows(np.arange(21 * 4), 4)
    first, again = data.batches(rows, 6, seed=1), data.batches(rows, 6, seed=1)
    steps = {i: np.array(first[i]) for i in range(14)}
    for i in (13, 5, 0, 9, 5):  # resumed at any step, in any order
        np.testing.assert_array_equal(steps[i], again[i])
    for i, batch in zip(range(14), data.batches(rows, 6, seed=1).to_iter_dataset(), strict=False):
        np.testing.assert_array_equal(steps[i], batch)
    assert any((steps[i] != data.batches(rows, 6, seed=2)[i]).any() for i in range(3))
    # 14 batches of 6 are 4 epochs of the 21 windows, each complete and in an order of its own
    epochs = np.concatenate([steps[i][:, 0] for i in range(14)]).reshape(4, 21)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(np.arange(0, 84, 4), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_hosts_share_the_global_batch():
    rows = data.windows(np.arange(400), 4)
    whole = data.batches(rows, 8, seed=3)
    hosts = [data.batches(rows, 8, 3, shard=i, shards=2) for i in range(2)]
    for step in (0, 7, 40):
        np.testing.assert_array_equal(
            np.stack([h[step] for h in hosts], 1).reshape(8, 4), whole[step]
        )
    with pytest.raises(DelveError, match="multiple"):
        data.batches(rows, 7, 3, shards=2)


# ---- metrics -------------------------------------------------------------------------------------


def test_metrics_resume_drops_cut_lines_and_later_steps(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 8):
            log.log(step, loss=np.float32(1 / step), tokens=np.int64(step * 10))
    with path.open("a") as file:
        file.write('{"step": 8, "los')  # a kill in the middle of a line
    with MetricsLog(path) as log:
        log.rewind(5)
        log.log(6, loss=0.5)
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[3] == {"step": 4, "loss": 0.25, "tokens": 40} and lines[-1]["loss"] == 0.5
    with MetricsLog(path) as log:
        log.rewind(0)  # nothing was saved: the run starts again
    assert read_metrics(path) == []
    with pytest.raises(DelveError, match="smoke"):
        MetricsLog(path, sinks=["smoke"])


def test_a_number_that_is_not_finite_is_null(tmp_path):
    """JSON has no NaN; lines that an earlier version wrote with one are mended when it goes on."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN, "skipped": 1}\n')
    with MetricsLog(path) as log:
        log.log(2, loss=np.float32("nan"), grad_norm=float("inf"), skipped=2)

    def refuse(name):
        raise AssertionError(name)

    lines = [json.loads(x, parse_constant=refuse) for x in path.read_text().splitlines()]
    assert lines[0] == {"step": 1, "loss": None, "skipped": 1}
    assert lines[1] == {"step": 2, "loss": None, "grad_norm": None, "skipped": 2}


def test_progress_and_versions(capsys):
    with progress(10, "count") as bar:
        bar.update(10)
    out = capsys.readouterr()
    assert out.out == "" and "10/10" in out.err.replace("10.0", "10")
    assert versions()["jax"].count(".") == 2 and "python" in versions()
