"""The named data sets and mixtures, and what a name, a path or NAME=DIR on the command line means.

Nothing is downloaded but through the package `datasets`, and nothing of a licence is granted here:
`licence` and `note` say what the data set's own card says. Copies on disk are read in the formats
that the data sets are published in; `fields` names the text on the hub and in those files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import DelveError
from . import text

_SCRIPT = "its hub repository is a loading script: datasets < 4, or a local copy"
_CC = "Common Crawl terms of use"


@dataclass(frozen=True)
class Dataset:
    """One named data set: where it is, which field is the text, what its licence asks."""

    name: str
    hub: str | None  # repository of the Hugging Face hub; None: not there
    config: str | None
    licence: str
    fields: tuple[str, ...] = ("text",)
    split: str = "train"
    part: str = ""  # of a local copy of the whole, only files with these folders in their path
    note: str = ""
    contents: bool = True  # False: its rows say where the text is, and do not hold it


def _nemotron(name: str, part: str) -> Dataset:
    note = f"Nemotron-CC; not on the hub: data.commoncrawl.org/contrib/Nemotron/Nemotron-CC, {part}"
    return Dataset(name, None, None, _CC, part=part, note=note)


DATASETS = {
    d.name: d
    for d in (
        Dataset("pile", "monology/pile-uncopyrighted", None, "those of its parts",
                note="the hub has it without Books3, BookCorpus2, OpenSubtitles, YTSubtitles and "
                "OpenWebText2; a local copy of the whole (jsonl.zst) reads alike"),
        Dataset("slimpajama", "cerebras/SlimPajama-627B", None, "those of RedPajama's parts"),
        Dataset("oscar", "oscar-corpus/OSCAR-2301", "en", f"CC0-1.0 (annotations); text: {_CC}",
                ("text", "content"), note=f"gated; {_SCRIPT}"),
        Dataset("redpajama-v2", "togethercomputer/RedPajama-Data-V2", "sample", _CC,
                ("raw_content",), note="'sample' of the hub; more by snapshot, language and "
                f"partition as its card says; {_SCRIPT}"),
        Dataset("refinedweb", "tiiuae/falcon-refinedweb", None, f"ODC-By 1.0; {_CC}",
                ("content",)),
        Dataset("the-stack-dedup", "bigcode/the-stack-dedup", None, "each file's own (permissive)",
                ("content",), note="gated: terms of use"),
        Dataset("the-stack-v2", "bigcode/the-stack-v2", None, "each file's own", ("content",),
                note="gated, and rows hold blob ids, no contents: download the blobs from "
                "s3://softwareheritage/content as its card says into files with a field "
                "'content'; in bulk by agreement with Software Heritage", contents=False),
        Dataset("github-code", "codeparrot/github-code", None, "each file's own",
                ("code", "content"), note=_SCRIPT),
        Dataset("codeparrot-clean", "codeparrot/codeparrot-clean", None, "each file's own",
                ("content",), note="Python only"),
        Dataset("codesearchnet", "code-search-net/code_search_net", "all", "each file's own",
                ("whole_func_string", "original_string"), note="functions, six languages"),
        Dataset("starcoderdata", "bigcode/starcoderdata", None, "each file's own (permissive)",
                ("content",), note="gated: terms of use"),
        Dataset("chinese-fineweb-edu", "opencsg/chinese-fineweb-edu", None,
                "Apache-2.0; OpenCSG community licence"),
        Dataset("chinese-fineweb-edu-v2", "opencsg/chinese-fineweb-edu-v2", None,
                "Apache-2.0; OpenCSG community licence"),
        Dataset("fineweb", "HuggingFaceFW/fineweb", "default", f"ODC-By 1.0; {_CC}"),
        Dataset("fineweb-edu", "HuggingFaceFW/fineweb-edu", "default", f"ODC-By 1.0; {_CC}"),
        Dataset("finemath", "HuggingFaceTB/finemath", "finemath-4plus", f"ODC-By 1.0; {_CC}",
                note="also called fineweb-math"),
        Dataset("dolma", "allenai/dolma", "v1_7", "ODC-By 1.0", note=_SCRIPT),
        Dataset("proof-pile-2", "EleutherAI/proof-pile-2", "default", "those of its parts",
                note=_SCRIPT),
        _nemotron("hq_actual", "quality=high/kind=actual"),
        _nemotron("hq_synth", "quality=high/kind=synthetic"),
        _nemotron("medium_high", "quality=medium-high"),
        _nemotron("medium", "quality=medium"),
        _nemotron("medium_low", "quality=medium-low"),
        _nemotron("low_actual", "quality=low/kind=actual"),
        _nemotron("low_synth", "quality=low/kind=synthetic"),
    )
}  # fmt: skip

MIXTURES: dict[str, dict[str, float]] = {
    # ours, untested at scale: the parents (Mamba, Pythia, RWKV-4) learned from the Pile, so half is
    # the Pile and its like; the rest is what the Pile has little of
    "delve": {
        "pile": 0.30, "slimpajama": 0.20, "fineweb-edu": 0.15, "the-stack-dedup": 0.15,
        "finemath": 0.08, "refinedweb": 0.07, "chinese-fineweb-edu-v2": 0.05,
    },
    # that of the Delphi suite: Nemotron-CC by size in TiB, code and mathematics
    "delphi": {
        "hq_actual": 0.91351, "hq_synth": 2.72, "medium_high": 0.82471, "medium": 3.38,
        "medium_low": 1.54, "low_actual": 0.70123, "low_synth": 0.62771, "starcoderdata": 0.25,
        "proof-pile-2": 0.055,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What `prepare` reads: one file, or one data set of the hub (`dataset`, no path)."""

    fields: tuple[str, ...]
    path: Path | None = None
    dataset: Dataset | None = None

    @property
    def label(self) -> str:
        d = self.dataset
        return str(self.path) if d is None else f"hub:{d.hub}/{d.config or ''}/{d.split}"

    def stream(self) -> Iterator[tuple[str, float | None]]:
        """(document, share read so far); DelveError as `text.stream` and `text.stream_hub`."""
        if self.dataset is None:
            return text.stream(self.path, self.fields)
        d = self.dataset
        return text.stream_hub(d.name, d.hub, d.config, d.split, self.fields)


def resolve(source: str | Path, text_field: str | None = None) -> list[Source]:
    """The files that `source` means: a path, NAME (of the hub), or NAME=DIR (a copy on disk).

    `text_field` replaces the data set's fields. An existing path is never taken for a name.
    DelveError: neither; a folder without a file for it; a data set that cannot be read by name.
    """
    fields = (text_field,) if text_field else ("text",)
    if (path := Path(source)).exists():
        return [Source(fields, file) for file in _files(path, "")]
    name, _, folder = str(source).partition("=")
    if (d := DATASETS.get(name)) is None:
        raise DelveError(f"{source}: no such file, and no data set; `delve data list` names them")
    fields = (text_field,) if text_field else d.fields
    if folder:
        return [Source(fields, file) for file in _files(Path(folder), d.part)]
    if d.hub is None or not d.contents:
        raise DelveError(f"{name}: cannot be read by its name ({d.note}); then give {name}=DIR")
    return [Source(fields, dataset=d)]


def _files(path: Path, part: str) -> list[Path]:
    """The file, or the files of a folder (hidden ones left out) in the order of their names."""
    if not path.exists():
        raise DelveError(f"{path}: no such file or folder")
    if path.is_file():
        return [path]
    files = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(path, followlinks=True)
        for name in names
        if not name.startswith(".") and _readable(name)
    )
    key = f"/{part.partition('=')[0]}="  # a folder of one part may have lost the publisher's names
    if part and any(key in f.absolute().as_posix() for f in files):
        inside = [f for f in files if f"/{part}/" in f.absolute().as_posix()]
    else:
        inside = files
    if not inside:
        where = f" below a folder {part}" if part and files else ""
        raise DelveError(f"{path}: no .txt, .jsonl or .parquet file (or packed one){where}")
    return inside


def _readable(name: str) -> bool:
    """Whether a file found in a folder is data: not a card, a licence, a checksum."""
    stem = name
    for suffix in (".gz", ".xz", ".zst", ".zstd"):
        stem = stem.removesuffix(suffix)
    return stem.endswith((".txt", ".jsonl", ".ndjson", ".parquet")) or (
        stem.endswith(".json") and stem != name  # plain .json beside data is a description of it
    )


def mixture_of(sources: Sequence[str | Path]) -> tuple[str, list[tuple[str, str, float]]] | None:
    """(its name, [(part, source of it, weight)]) where `sources` is one mixture; else None.

    NAME reads each part from the hub, NAME=DIR from the folder DIR/PART.
    """
    name, _, folder = str(sources[0]).partition("=") if len(sources) == 1 else ("", "", "")
    if name not in MIXTURES or Path(sources[0]).exists():
        return None
    parts = MIXTURES[name]
    if folder and (gone := [part for part in parts if not Path(folder, part).exists()]):
        raise DelveError(
            f"{folder}: has no '{gone[0]}', a part of {name}; it needs {', '.join(parts)}"
        )
    return name, [
        (part, f"{part}={Path(folder, part)}" if folder else part, weight)
        for part, weight in parts.items()
    ]


def listing() -> list[dict]:
    """A row for each data set and mixture, as `delve data list` prints them."""
    rows = [
        {
            "name": d.name, "kind": "data set", "hub": d.hub, "config": d.config, "split": d.split,
            "field": d.fields[0], "licence": d.licence, "note": d.note,
        }
        for d in DATASETS.values()
    ]  # fmt: skip
    for name, parts in MIXTURES.items():
        total = sum(parts.values())
        shares = {part: round(weight / total, 5) for part, weight in parts.items()}
        rows.append({"name": name, "kind": "mixture", "parts": shares})
    return rows
