"""Where a checkpoint comes from: one entry a verb, handed on from checkpoint to export.

`lineage.json` holds "steps": what the sources' own files say, then the step that made this one. It
is what a model card is written from, so nothing in it names a place on the machine of its maker:
of local paths only the last part is kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from . import parents
from .config import DelveError, read_json
from .metrics import versions

FILE = "lineage.json"
_SCALARS = (str, int, float, bool, type(None))


def step(verb: str, sources: Sequence[str | Path], facts: dict) -> dict[str, dict]:
    """{FILE: the lineage of what `verb` makes of `sources`}, for `checkpoint.save(extra=...)`.

    Of the facts numbers, texts and flat dicts of these are kept; long lists stand in the verb's own
    file beside it.
    """
    entries: list[dict] = []
    for src in sources:
        entries += [entry for entry in of(src) if entry not in entries]
    names = [public_name(src) for src in sources]
    entries.append({"verb": verb, "made_from": names, **_brief(facts), "versions": versions()})
    return {FILE: {"steps": entries}}


def of(src: str | Path) -> list[dict]:
    """The entries of a source: its own file, or what is known of a parent that has none."""
    path, kind = parents.resolve(src), parents.detect(src)
    if steps := read(path):
        return steps
    family = parents.peek(src)[0].family if kind == "checkpoint" else kind
    return [{"verb": "parent", "name": public_name(src), "family": family,
             "revision": parents.commit(path), "license": _license(path)}]  # fmt: skip


def public_name(src: str | Path) -> str:
    """A hub id as it is; of a local path the last part."""
    return Path(src).name if Path(src).exists() or Path(src).is_absolute() else str(src)


def public_source(src: str | Path) -> str:
    """What of a parent's source says something elsewhere: a hub id or address as it is, of a
    checkpoint that `convert` made of one its id and commit, of another local path the last part."""
    file = Path(src) / "source.json"
    made_of = read_json(file) if file.is_file() else {}
    repo, commit = str(made_of.get("source")).partition("@")[0], made_of.get("commit")
    if commit and re.fullmatch(r"[\w.-]+/[\w.-]+", repo):  # a commit: it came from the hub
        return f"{repo}@{commit}"
    return public_name(src)


def _license(path: Path) -> str | None:
    """What the card in a parent's directory says of its licence, None where it says nothing."""
    import huggingface_hub

    card = path / "README.md"
    if not card.is_file():
        return None
    try:
        said = (huggingface_hub.metadata_load(card) or {}).get("license")
    except Exception:  # no text, or a head that is no YAML, in one of many types
        return None
    if isinstance(said, list) and len(said) == 1:
        (said,) = said
    return said if isinstance(said, str) else None


def _brief(facts: dict) -> dict:
    out = {}
    for name, value in facts.items():
        if isinstance(value, dict) and all(isinstance(v, _SCALARS) for v in value.values()):
            out[name] = {k: _shown(v) for k, v in value.items()}
        elif isinstance(value, _SCALARS):
            out[name] = _shown(value)
    return out


def _shown(value):
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def read(folder: str | Path) -> list[dict]:
    """The lineage of a directory; [] where it was made before there was one."""
    file = Path(folder) / FILE
    steps = read_json(file).get("steps") if file.is_file() else []
    if not isinstance(steps, list) or not all(map(_is_step, steps)):
        raise DelveError(
            f"{file}: field 'steps' must be a list of steps, each with its 'verb', parents with "
            "'name' and 'family'"
        )
    return steps


def _is_step(entry) -> bool:
    if not isinstance(entry, dict) or "verb" not in entry:
        return False
    return entry["verb"] != "parent" or {"name", "family"} <= entry.keys()
