"""Token folders: what stands in them, the same however it was made; what is wrong is named."""

import hashlib
import json
import random
import shutil

import numpy as np
import pytest

from delve_jax import data
from delve_jax.config import DelveError
from delve_jax.data import build


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(text files, their documents, tokenizer.json, tokenizer)."""
    place = tmp_path_factory.mktemp("texts")
    source = data.stdlib_documents()[:60]
    documents = [d[i : i + 700] for d in source for i in range(0, min(len(d), 4200), 700)]
    files = []
    for k, part in enumerate((documents[:90], documents[90:95], documents[95:])):
        files.append(place / f"{k}.txt")
        # bytes of the file are those of the documents, whatever they end with
        files[-1].write_bytes("\n<|endoftext|>\n".join(part).encode())
    json_str = data.train_bpe(source, 400)
    (place / "tokenizer.json").write_text(json_str)
    return files, documents, place / "tokenizer.json", data.load_tokenizer(json_str, 400)


@pytest.fixture
def small(monkeypatch):
    """Shards and groups so small that the texts fill many."""
    monkeypatch.setattr(build, "_SHARD_BYTES", 20_000)
    monkeypatch.setattr(build, "_GROUP_BYTES", 3_000)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stream_of(documents, tok):
    """The ids that a folder must hold: each document after the separator."""
    return [i for d in documents for i in [data.eot_of(tok), *tok.encode(d).ids]]


def test_round_trip(texts, small, tmp_path):
    files, documents, tokenizer, tok = texts
    made = data.prepare(files, tmp_path / "t", tokenizer=tokenizer)
    folder = data.open_tokens(tmp_path / "t")
    ids = folder.read(0, folder.tokens)
    assert ids.dtype == np.int32 and ids.tolist() == stream_of(documents, tok)
    cuts = np.flatnonzero(ids == 0)
    pieces = [piece[1:].tolist() for piece in np.split(ids, cuts[1:])]
    assert [tok.decode(p, skip_special_tokens=False) for p in pieces] == documents
    folder.verify()
    shards = made["shards"]
    assert len(shards) > 5 and made["dtype"] == "uint16" and made["eot"] == 0
    assert made["documents"] == len(documents) and made["tokens"] == len(ids)
    assert made["bytes"] == sum(len(d.encode()) for d in documents) and made["max_id"] == ids.max()
    assert folder.tokenizer_json == tokenizer.read_text()
    for row, file in zip(made["sources"], files, strict=True):
        assert row["path"] == str(file) and row["size"] == file.stat().st_size
        assert row["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    names = {f"tokens-{i:05d}.bin" for i in range(len(shards))}
    assert set(contents(tmp_path / "t")) == names | {"manifest.json", "tokenizer.json"}
    assert not (tmp_path / "t.partial").exists()


def test_windows_span_shards(texts, small, tmp_path):
    files, _, tokenizer, _ = texts
    data.prepare(files, tmp_path / "t", tokenizer=tokenizer)
    folder = data.open_tokens(tmp_path / "t")
    ids = folder.read(0, folder.tokens)
    for length in (2, 17, 5000, 20_001):  # the last is longer than a shard
        rows, want = folder.windows(length), data.windows(ids, length, length - 1)
        assert len(rows) == len(want) > 0
        for i in {*range(min(len(rows), 200)), len(rows) - 1}:
            np.testing.assert_array_equal(rows[i], want[i])
            assert rows[i].dtype == np.int32
        with pytest.raises(IndexError):
            rows[len(rows)]
    with pytest.raises(DelveError, match=f"{tmp_path / 't'}: has {len(ids)} tokens"):
        folder.windows(len(ids) + 1)


def test_interrupted_work_goes_on_to_the_same_bytes(texts, small, tmp_path, monkeypatch):
    files, documents, tokenizer, _ = texts
    data.prepare(files, tmp_path / "whole", tokenizer=tokenizer)
    want = contents(tmp_path / "whole")
    encode, calls, last = build.ids_of, 0, 0

    class Killed(BaseException):
        pass

    def dying(tok, docs):
        nonlocal calls
        calls += 1
        if calls == last:
            raise Killed
        return encode(tok, docs)

    groups, dst = sum(map(len, documents)) // 3000, tmp_path / "t"
    monkeypatch.setattr(build, "ids_of", dying)
    left = []
    for n in (1, 4, 9, groups // 2):  # each run goes on where the one before died
        calls, last = 0, n
        with pytest.raises(Killed):
            data.prepare(files, dst, tokenizer=tokenizer)
        assert not dst.exists()
        left.append(len(list((tmp_path / "t.partial").glob("tokens-*.json"))))
        # what a kill -9 leaves in the middle of a shard, and after a shard but before its row
        (tmp_path / "t.partial" / f"tokens-{left[-1]:05d}.bin.writing").write_bytes(b"half")
        (tmp_path / "t.partial" / f"tokens-{left[-1]:05d}.bin").write_bytes(b"no row")
    assert left == sorted(left) and left[0] == 0 and left[-1] > left[1]
    calls, last = 0, -1
    assert not data.prepare(files, dst, tokenizer=tokenizer)["already"]
    assert contents(dst) == want and 0 < calls < groups  # and not from the beginning
    calls = 0
    assert data.prepare(files, dst, tokenizer=tokenizer)["already"] and calls == 0


def test_killed_before_the_last_rename(texts, small, tmp_path, monkeypatch):
    files, _, tokenizer, _ = texts
    data.prepare(files, tmp_path / "whole", tokenizer=tokenizer)

    def die(*_):
        raise KeyboardInterrupt

    # the shards are there; then the manifest, too
    for where, name in ((build, "_finish"), (build.Path, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, die)
            with pytest.raises(KeyboardInterrupt):
                data.prepare(files, tmp_path / "t", tokenizer=tokenizer)
    data.prepare(files, tmp_path / "t", tokenizer=tokenizer)
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_workers_do_not_show(texts, small, tmp_path):
    files, _, tokenizer, _ = texts
    data.prepare(files, tmp_path / "one", tokenizer=tokenizer)
    data.prepare(files, tmp_path / "two", tokenizer=tokenizer, workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_split_and_limit(texts, small, tmp_path):
    files, documents, tokenizer, tok = texts
    data.prepare(files, tmp_path / "train", tokenizer=tokenizer, split="train")
    folder = data.open_tokens(tmp_path / "train")
    kept = data.split(documents, "train")
    assert 0 < len(kept) < len(documents)
    assert folder.read(0, folder.tokens).tolist() == stream_of(kept, tok)
    made = data.prepare(files, tmp_path / "some", tokenizer=tokenizer, limit_bytes=50_000)
    folder = data.open_tokens(tmp_path / "some")
    first = documents[: made["documents"]]
    assert folder.read(0, folder.tokens).tolist() == stream_of(first, tok)
    assert 50_000 <= made["bytes"] < 50_000 + len(first[-1].encode())
    (tmp_path / "file").write_text("")
    with pytest.raises(DelveError, match="file/in: cannot be written"):
        data.prepare(files, tmp_path / "file" / "in", tokenizer=tokenizer)
    with pytest.raises(DelveError, match="--limit-bytes 0"):
        data.prepare(files, tmp_path / "x", tokenizer=tokenizer, limit_bytes=0)
    with pytest.raises(DelveError, match="validation"):
        data.prepare(files, tmp_path / "x", tokenizer=tokenizer, split="validation")
    (tmp_path / "a.txt").write_text("a")  # its split is train
    with pytest.raises(DelveError, match="holds no text in split 'report'"):
        data.prepare([tmp_path / "a.txt"], tmp_path / "x", tokenizer=tokenizer, split="report")
    assert not any(tmp_path.glob("x*"))


@pytest.mark.parametrize("name", ["t.txt.gz", "t.txt.zst", "t.jsonl", "t.jsonl.zst", "t.parquet"])
def test_packing_and_format_do_not_show(texts, tmp_path, name):
    from test_data import write_rows

    files, documents, tokenizer, _ = texts
    part, path = documents[90:95], tmp_path / name
    if ".txt" in name:
        import gzip

        import zstandard

        pack = gzip.compress if name.endswith("gz") else zstandard.compress
        path.write_bytes(pack(files[1].read_bytes()))
    else:
        write_rows(path, [{"id": i, "text": d} for i, d in enumerate(part)])
    data.prepare([files[1]], tmp_path / "plain", tokenizer=tokenizer)
    data.prepare([path], tmp_path / "packed", tokenizer=tokenizer)
    want = contents(tmp_path / "plain")["tokens-00000.bin"]
    assert contents(tmp_path / "packed")["tokens-00000.bin"] == want
    part = [d for d in part if d]
    assert data.open_tokens(tmp_path / "packed").manifest["documents"] == len(part) > 3


def test_raw_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("naïve\n<|endoftext|>\ntext")
    made = data.prepare([tmp_path / "a.txt"], tmp_path / "t", tokenizer=None)
    folder = data.open_tokens(tmp_path / "t")
    assert bytes(folder.read(0, folder.tokens).tolist()) == "naïvetext".encode()
    assert made["eot"] is None and folder.tokenizer_json is None
    data.open_tokens(tmp_path / "t").verify()


def test_large_vocabularies_take_four_bytes(texts, tmp_path):
    files, documents, tokenizer, _ = texts
    blob = json.loads(tokenizer.read_text())
    big = {"id": 70_000, "content": "import", "special": False}
    keys = ("single_word", "lstrip", "rstrip", "normalized")
    blob["added_tokens"].append(big | dict.fromkeys(keys, False))
    blob["model"]["vocab"]["import"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(blob))
    made = data.prepare(files, tmp_path / "t", tokenizer=tmp_path)  # a folder that holds one
    tok = data.load_tokenizer((tmp_path / "tokenizer.json").read_text(), 0)
    folder = data.open_tokens(tmp_path / "t")
    assert made["dtype"] == "uint32" and made["max_id"] == 70_000
    assert folder.read(0, folder.tokens).tolist() == stream_of(documents, tok)


def test_another_spelling_of_the_tokenizer_is_no_other(texts, tmp_path):
    """As published, and as the library writes it: merges in one string, defaults left out."""
    files, _, tokenizer, tok = texts
    blob = json.loads(tokenizer.read_text())
    blob["model"]["merges"] = [" ".join(pair) for pair in blob["model"]["merges"]]
    del blob["pre_tokenizer"]["use_regex"], blob["model"]["byte_fallback"]
    (tmp_path / "published.json").write_text(json.dumps(blob))
    data.prepare(files[1:2], tmp_path / "t", tokenizer=tmp_path / "published.json")
    args = {"vocab_size": 400, "window": 9, "batch": 4, "seed": 0}
    data.training_set([tmp_path / "t"], tok.to_str(), **args)
    blob["pre_tokenizer"]["add_prefix_space"] = True  # other ids of the same vocabulary
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(blob))
    with pytest.raises(DelveError, match="another tokenizer"):
        data.training_set([tmp_path / "t"], tok.to_str(), **args)
    (tmp_path / "t" / "tokenizer.json").write_text("{")
    with pytest.raises(DelveError, match=f"^{tmp_path / 't'}: tokenizer.json: cannot be read"):
        data.training_set([tmp_path / "t"], tok.to_str(), **args)


def test_where_a_mixture_stands_does_not_show(tmp_path):
    """The order of windows depends on what the parts hold; copies of one text are read apart."""
    args = {"vocab_size": 256, "window": 5, "batch": 2048, "seed": 3}
    seen = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for name in ("a", "b"):
            text = "".join(f"{name}{i:03d}" for i in range(600))
            (tmp_path / place / f"{name}.txt").write_text(text)
        items = [f"{tmp_path / place / name}.txt=0.5" for name in ("a", "b")]
        ds, facts = data.training_set(items, None, **args)
        seen.append((ds[0].tolist(), facts["data_hash"]))
    assert seen[0] == seen[1]
    (tmp_path / "1.txt").write_text("".join(f"{i:04d}" for i in range(2000)))
    shutil.copy(tmp_path / "1.txt", tmp_path / "2.txt")
    ds, _ = data.training_set([f"{tmp_path / name}.txt=0.5" for name in "12"], None, **args)
    # 1024 of 1999 windows from each: 1524 different ones where the two know nothing of each other
    assert 1450 < len({tuple(row) for row in ds[0]}) < 1600


def test_other_arguments_are_refused(texts, small, tmp_path):
    files, _, tokenizer, _ = texts
    dst = tmp_path / "t"
    data.prepare(files[:2], dst, tokenizer=tokenizer)
    want = contents(dst)
    for sources, more in ((files, {}), (files[:2], {"split": "train"}), (files[:1], {})):
        with pytest.raises(DelveError, match="--overwrite") as err:
            data.prepare(sources, dst, tokenizer=tokenizer, **more)
        assert str(dst) in str(err.value) and contents(dst) == want
    assert not data.prepare(files, dst, tokenizer=tokenizer, overwrite=True)["already"]
    assert contents(dst) != want
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("text")
    with pytest.raises(DelveError, match="it has no manifest.json, so --overwrite"):
        data.prepare(files, other, tokenizer=tokenizer, overwrite=True)
    assert (other / "thesis.tex").exists()


def test_changed_source_is_noticed(texts, small, tmp_path, monkeypatch):
    files, _, tokenizer, _ = texts
    mine, dst = tmp_path / "a.txt", tmp_path / "t"
    mine.write_bytes(files[0].read_bytes())
    done = build._Shard.close

    def die(self, position):
        done(self, position)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build._Shard, "close", die)
        with pytest.raises(KeyboardInterrupt):
            data.prepare([mine], dst, tokenizer=tokenizer)
    mine.write_bytes(mine.read_bytes().replace(b"import", b"IMPORT"))  # of the same size
    with pytest.raises(DelveError, match="changed since"):
        data.prepare([mine], dst, tokenizer=tokenizer)
    data.prepare([mine], dst, tokenizer=tokenizer, overwrite=True)
    mine.write_bytes(files[0].read_bytes())
    with pytest.raises(DelveError, match="not made like this"):
        data.prepare([mine], dst, tokenizer=tokenizer)


def test_no_room_leaves_whole_shards_only(texts, small, tmp_path, monkeypatch):
    files, _, tokenizer, _ = texts
    add, room = build._Shard.add, 12

    def full(self, ids, group):
        nonlocal room
        room -= 1
        if not room:
            raise OSError(28, "No space left on device")
        add(self, ids, group)

    with monkeypatch.context() as patch:
        patch.setattr(build._Shard, "add", full)
        with pytest.raises(DelveError, match="t.partial: .*No space left.*make room") as err:
            data.prepare(files, tmp_path / "t", tokenizer=tokenizer)
    assert "\n" not in str(err.value) and not (tmp_path / "t").exists()
    assert not list((tmp_path / "t.partial").glob("*.writing"))
    assert list((tmp_path / "t.partial").glob("tokens-*.bin"))
    data.prepare(files, tmp_path / "t", tokenizer=tokenizer)
    data.prepare(files, tmp_path / "whole", tokenizer=tokenizer)
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_bad_text_is_named_and_nothing_stands(texts, small, tmp_path):
    files, _, tokenizer, _ = texts
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"body": "no"}\n')
    with pytest.raises(DelveError, match=f"{bad}:2: no field 'text'"):
        data.prepare([files[1], bad], tmp_path / "t", tokenizer=tokenizer)
    assert not (tmp_path / "t").exists()
    bad.write_text('{"text": "good"}\n')
    data.prepare([files[1], bad], tmp_path / "t", tokenizer=tokenizer)  # mended: begun anew
    with pytest.raises(DelveError, match="no/such.txt: no such file, and no data set"):
        data.prepare(["no/such.txt"], tmp_path / "u", tokenizer=tokenizer)
    with pytest.raises(DelveError, match="no such text file"):
        data.prepare(files, tmp_path / "u", tokenizer=tmp_path / "none.json")


def test_damaged_folders_are_named(texts, small, tmp_path):
    files, _, tokenizer, _ = texts
    data.prepare(files, tmp_path / "good", tokenizer=tokenizer)

    def broken(change, says, check=data.open_tokens):
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        change(folder)
        with pytest.raises(DelveError, match=says) as err:
            check(folder)
        assert str(folder) in str(err.value) and "\n" not in str(err.value)
        return folder

    def cut(folder):
        path = folder / "tokens-00001.bin"
        path.write_bytes(path.read_bytes()[:-2])

    def flip(folder):
        path = folder / "tokens-00002.bin"
        raw = bytearray(path.read_bytes())
        raw[random.Random(0).randrange(len(raw))] ^= 4
        path.write_bytes(raw)

    def edit(**fields):
        def change(folder):
            made = json.loads((folder / "manifest.json").read_text())
            (folder / "manifest.json").write_text(json.dumps(made | fields))

        return change

    broken(lambda f: (f / "tokens-00001.bin").unlink(), "tokens-00001.bin: is gone")
    broken(cut, "tokens-00001.bin: has .* bytes")
    broken(lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json")
    broken(lambda f: (f / "manifest.json").unlink(), "not a token folder")
    broken(lambda f: (f / "manifest.json").write_text('{"dtype'), "not readable as JSON")
    broken(edit(dtype="uint32"), "tokens-00000.bin: has .* bytes")
    broken(edit(dtype="int7"), "manifest.json: field 'int7'")
    broken(edit(tokens=7), "'tokens' is 7")
    broken(edit(shards=[]), "another sum")
    broken(edit(max_id="9"), "manifest.json: field 'max_id'")
    row = {"file": "tokens-00000.bin", "tokens": 9}
    broken(edit(shards=[row]), "manifest.json: field 'sha256'")
    broken(flip, "tokens-00002.bin: differs", lambda f: data.open_tokens(f).verify())
    again = lambda f: data.prepare(files, f, tokenizer=tokenizer)  # noqa: E731
    bad = broken(cut, "tokens-00001.bin", again)
    data.prepare(files, bad, tokenizer=tokenizer, overwrite=True)
    assert contents(bad) == contents(tmp_path / "good")
    bad = broken(lambda f: (f / "manifest.json").write_text("{"), "--overwrite", again)
    data.prepare(files, bad, tokenizer=tokenizer, overwrite=True)
    assert contents(bad) == contents(tmp_path / "good")
