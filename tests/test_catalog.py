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
