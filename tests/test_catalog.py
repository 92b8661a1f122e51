"""Every named data set through a small local copy in its published schema; mixtures; refusals."""

import json
import sys
import types

import pytest
from test_data import write_rows

from delve_jax import data
from delve_jax.config import DelveError
from delve_jax.data import catalog

TEXTS = ["first document\n", "second, ünï\n"]


def code(text):
    return {"content": text, "max_stars_count": 3, "lang": "C", "license": ["mit"]}


def web(text):
    return {"text": text, "id": "<urn>", "url": "http://a.b", "language_score": 0.9}


def pile(text):
    return {"text": text, "meta": {"pile_set_name": "Github"}}


# name -> (file below the copy's root, a row as the data set publishes it)
SCHEMAS = {
    "pile": ("train/00.jsonl.zst", pile),
    "slimpajama": (
        "train/chunk1/example_train_0.jsonl.zst",
        lambda t: {"text": t, "meta": {"redpajama_set_name": "RedPajamaC4"}},
    ),
    "oscar": (
        "en_meta/en_meta_part_1.jsonl.zst",
        lambda t: {"content": t, "warc_headers": {"warc-type": "conversion"}, "metadata": {}},
    ),
    "redpajama-v2": (
        "documents/2023-06/0000/en_head.json.gz",
        lambda t: {"url": "u", "raw_content": t, "title": "t", "length": 3},
    ),
    "refinedweb": (
        "data/train-00000.parquet",
        lambda t: {"content": t, "url": "u", "image_urls": [["a", "b"]]},
    ),
    "the-stack-dedup": ("data/c/train-00000.parquet", code),
    "the-stack-v2": ("blobs/0.jsonl.gz", lambda t: {"blob_id": "ab", "content": t}),
    "github-code": ("data/train-00000.parquet", lambda t: {"code": t, "repo_name": "r"}),
    "codeparrot-clean": ("file-000000000001.json.gz", lambda t: {"repo_name": "r", "content": t}),
    "codesearchnet": (
        "python/final/jsonl/train/python_train_0.jsonl.gz",
        lambda t: {"repo": "r", "original_string": t, "code": t, "docstring": ""},
    ),
    "starcoderdata": ("python/train-00000.parquet", code),
    "chinese-fineweb-edu": ("data/0.parquet", lambda t: {"text": t, "score": 0.9}),
    "chinese-fineweb-edu-v2": ("data/0.parquet", lambda t: {"text": t, "score": 0.9}),
    "fineweb": ("data/CC-MAIN-2013-20/000_00000.parquet", web),
    "fineweb-edu": ("data/CC-MAIN-2013-20/train-00000.parquet", web),
    "finemath": ("finemath-4plus/train-00000.parquet", web),
    "dolma": ("c4-0000.json.gz", lambda t: {"id": "1", "source": "c4", "text": t}),
    "proof-pile-2": (
        "arxiv/train/arXiv_000.jsonl.zst",
        lambda t: {"text": t, "meta": {"arxiv_id": "1"}},
    ),
}
for _d in catalog.DATASETS.values():
    if _d.part:  # Nemotron-CC
        SCHEMAS[_d.name] = (f"{_d.part}/kind2=x/CC-MAIN-2013-20-part-00000.jsonl.zstd", web)


def test_every_data_set_has_its_schema():
    assert SCHEMAS.keys() == catalog.DATASETS.keys()


@pytest.mark.parametrize("name", catalog.DATASETS)
def test_a_local_copy_reads(name, tmp_path):
    where, row = SCHEMAS[name]
    path = tmp_path / "copy" / where
    path.parent.mkdir(parents=True)
    plain = path.with_name("plain.jsonl") if path.suffix == ".zstd" else path
    write_rows(plain.with_suffix(".zst") if plain != path else path, [row(t) for t in TEXTS])
    if plain != path:
        plain.with_suffix(".zst").rename(path)
    for name_of_card in ("README.md", "LICENSE", ".gitattributes", "dataset_infos.json"):
        (tmp_path / "copy" / name_of_card).write_text("no data")
    made = data.prepare([f"{name}={tmp_path / 'copy'}"], tmp_path / "t", tokenizer=None)
    folder = data.open_tokens(tmp_path / "t")
    assert bytes(folder.read(0, folder.tokens).tolist()) == "".join(TEXTS).encode()
    assert [s["path"] for s in made["sources"]] == [str(path)] and made["documents"] == 2


def test_parts_of_one_copy_are_told_apart(tmp_path):
    for name, d in catalog.DATASETS.items():
        if d.part:
            path = tmp_path / d.part / "kind2=x" / "0.jsonl"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"text": name}) + "\n")
    for name, d in catalog.DATASETS.items():
        if d.part:  # from the copy of the whole, and from the part's own folder
            for root in (tmp_path, tmp_path / d.part):
                (source,) = catalog.resolve(f"{name}={root}")
                assert [document for document, _ in source.stream()] == [name]
    with pytest.raises(DelveError, match="below a folder quality=high/kind=actual"):
        catalog.resolve(f"hq_actual={tmp_path / 'quality=medium'}")


def test_sources_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "README.md").write_text("card")
    for source, says in (
        ("pile", "pip install datasets.*pile=DIR"),
        ("the-stack-v2", "no contents: download.*the-stack-v2=DIR"),
        ("medium", "not on the hub.*medium=DIR"),
        ("the-heap", "no such file, and no data set"),
        (f"pile={tmp_path / 'none'}", "none: no such file or folder"),
        (f"pile={tmp_path}", "no .txt, .jsonl or .parquet"),
        (f"delphi={tmp_path}", "has no 'hq_actual', a part of delphi"),
    ):
        with pytest.raises(DelveError, match=says) as err:
            data.prepare([source], tmp_path / "t", tokenizer=None)
        assert "\n" not in str(err.value) and not (tmp_path / "t").exists()


def test_a_name_reads_the_hub(tmp_path, monkeypatch):
    asked = []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda hub, config, split, streaming: (
        asked.append((hub, config, split, streaming)) or iter([{"text": t} for t in TEXTS])
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    made = data.prepare(["finemath"], tmp_path / "t", tokenizer=None)
    assert asked == [("HuggingFaceTB/finemath", "finemath-4plus", "train", True)]
    assert made["sources"][0]["path"] == "hub:HuggingFaceTB/finemath/finemath-4plus/train"
    assert made["documents"] == 2


def test_a_field_can_be_named(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"body": {"plain": t}} for t in TEXTS])
    data.prepare([tmp_path], tmp_path / "t", tokenizer=None, text_field="body.plain")
    assert data.open_tokens(tmp_path / "t").tokens == len("".join(TEXTS).encode())


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A folder of two parts, of which two mixtures are made."""
    monkeypatch.setitem(catalog.MIXTURES, "one", {"pile": 1.0})
    monkeypatch.setitem(catalog.MIXTURES, "two", {"pile": 3.0, "slimpajama": 1.0})
    for part in ("pile", "slimpajama"):
        (tmp_path / "raw" / part).mkdir(parents=True)
        write_rows(tmp_path / "raw" / part / "0.jsonl", [{"text": t} for t in TEXTS])
    return tmp_path / "raw"


def stands(folder):
    return sorted(path.name for path in folder.iterdir())


def test_another_mixture_does_not_join_the_one_that_stands_there(raw, tmp_path, monkeypatch):
    make = lambda name, **more: data.prepare(  # noqa: E731
        [f"{name}={raw}"], tmp_path / "mix", tokenizer=None, **more
    )
    make("one")
    with pytest.raises(DelveError, match=f"{tmp_path / 'mix'}: exists and was not.*--overwrite"):
        make("two")
    assert stands(tmp_path / "mix") == ["mixture.json", "pile"] and make("one")["already"]
    assert make("two", overwrite=True)["mixture"] == "two"
    assert stands(tmp_path / "mix") == ["mixture.json", "pile", "slimpajama"]
    assert make("one", overwrite=True)["weights"] == {"pile": 1.0}
    assert stands(tmp_path / "mix") == ["mixture.json", "pile"]
    monkeypatch.setitem(catalog.MIXTURES, "one", {"pile": 2.0})  # a later version's weights
    with pytest.raises(DelveError, match="--overwrite"):
        make("one")
    data.prepare([f"pile={raw / 'pile'}"], tmp_path / "tokens", tokenizer=None)
    with pytest.raises(DelveError, match="tokens: .* no mixture.json, so --overwrite leaves it"):
        data.prepare([f"one={raw}"], tmp_path / "tokens", tokenizer=None, overwrite=True)


def test_unfinished_work_of_another_mixture_is_kept(raw, tmp_path):
    make = lambda name, **more: data.prepare(  # noqa: E731
        [f"{name}={raw}"], tmp_path / "mix", tokenizer=None, **more
    )
    bad = raw / "slimpajama" / "0.jsonl"
    good = bad.read_text()
    bad.write_text('{"body": "no"}\n')
    with pytest.raises(DelveError, match="no field 'text'"):
        make("two")
    half = tmp_path / "mix.partial"
    assert {"pile", "prepare.json"} <= set(stands(half)) and not (tmp_path / "mix").exists()
    with pytest.raises(DelveError, match=f"{half}: holds unfinished work of other arguments"):
        make("one")
    with pytest.raises(DelveError, match=f"{half}: holds unfinished"):
        data.prepare([f"pile={raw / 'pile'}"], tmp_path / "mix", tokenizer=None)
    before = (half / "pile").stat().st_ino
    bad.write_text(good)
    assert not make("two")["already"] and (tmp_path / "mix" / "pile").stat().st_ino == before
    assert stands(tmp_path / "mix") == ["mixture.json", "pile", "slimpajama"]
    (tmp_path / "mix").rename(half)  # as a kill before the last rename leaves it
    make("one", overwrite=True)
    assert stands(tmp_path / "mix") == ["mixture.json", "pile"] and not half.exists()


@pytest.mark.parametrize(
    "record", [{}, {"weights": {}}, {"weights": [1]}, {"weights": {"pile": "1"}},
               {"weights": {"pile": 0}}],
)  # fmt: skip
def test_a_damaged_mixture_is_named(raw, tmp_path, record):
    args = ([f"one={raw}"], tmp_path / "mix")
    data.prepare(*args, tokenizer=None)
    (tmp_path / "mix" / "mixture.json").write_text(json.dumps(record))
    read = lambda: data.training_set([tmp_path / "mix"], None, 256, 5, 1, 0)  # noqa: E731
    with pytest.raises(DelveError, match="mixture.json: field 'weights' must.*--overwrite"):
        read()
    data.prepare(*args, tokenizer=None, overwrite=True)  # the way out
    read()


def test_the_mixtures_and_the_listing():
    assert set(catalog.MIXTURES) == {"delve", "delphi"}
    for parts in catalog.MIXTURES.values():
        assert parts.keys() <= catalog.DATASETS.keys() and min(parts.values()) > 0
    assert sum(catalog.MIXTURES["delve"].values()) == pytest.approx(1)
    rows = {row["name"]: row for row in data.listing()}
    assert rows.keys() == {*catalog.DATASETS, *catalog.MIXTURES}
    delphi = rows["delphi"]["parts"]  # the shares as published
    assert delphi["medium"] == 0.30693 and delphi["hq_synth"] == 0.247
    assert delphi["proof-pile-2"] == 0.00499 and sum(delphi.values()) == pytest.approx(1, abs=1e-4)
    for row in rows.values():
        assert row["kind"] == "mixture" or row["licence"] and row["field"]
    json.dumps(data.listing())
