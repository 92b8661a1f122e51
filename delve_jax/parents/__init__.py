"""What the outside world calls things: find a source, read it, write it back.

load("org/name@revision" | DIR | FILE.pth) -> (cfg, params, tokenizer_json)
export_stock(cfg, params, DST, tokenizer_json)      a directory that plain transformers loads
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from .. import checkpoint, config, models, parallel
from ..config import Config, DelveError, ParentConfig, read_json
from ..models import elastic
from ..models.delve import subset
from .layerwise import Files, Saved
from .stock import (
    FAMILIES,
    MODEL_TYPES,
    dense_parents,
    describe,
    export_stock,
    family_of,
    load_stock,
)

__all__ = [
    "commit", "dense_parents", "describe", "detect", "export_stock", "load", "open_layers", "part",
    "peek", "register", "resolve",
]  # fmt: skip

_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_KEEP = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "README.md",  # says under which licence the weights may be used
]  # fmt: skip
_FORMATS = (  # in order of preference
    r"model-\d+-of-\d+\.safetensors|model\.safetensors(\.index\.json)?",
    r"pytorch_model-\d+-of-\d+\.bin|pytorch_model\.bin(\.index\.json)?",
)

CONTRACT = (  # what the two modules of a family define, first models/NAME.py, then parents/NAME.py
    "FACTORABLE", "MLP", "RESIDUAL", "NORM", "Block", "init_layers", "init_state", "mixer_flops",
    "KEEP_WIDE", "context", "MODEL_TYPE", "ARCHITECTURE", "EMBED", "HEAD", "TIED_BY_DEFAULT",
    "PAPER", "canonical", "check_names", "config", "stock", "rows",
)  # fmt: skip


def register(cls: type[ParentConfig], family) -> None:
    """Make a parent family known that is no part of the package; see docs/new_family.md.

    cls: its frozen config class; family: a module (or any object) with all names of `CONTRACT`.
    DelveError: a name is missing, or the family or its `model_type` is there already.
    """
    if missing := [name for name in CONTRACT if not hasattr(family, name)]:
        raise DelveError(f"family '{cls.family}': does not define {', '.join(missing)}")
    if cls.family in config.FAMILIES or family.MODEL_TYPE in MODEL_TYPES:
        raise DelveError(
            f"family '{cls.family}' (model_type '{family.MODEL_TYPE}'): is there already; families "
            f"are {', '.join(config.FAMILIES)}"
        )
    config.FAMILIES[cls.family] = cls
    models.FAMILY[cls.family] = FAMILIES[cls.family] = family
    MODEL_TYPES[family.MODEL_TYPE] = cls.family


def resolve(src: str | Path) -> Path:
    """The local directory or `.pth` file of `src`; a hub id `org/name[@revision]` is fetched."""
    path = Path(src).expanduser()
    if path.exists():
        if path.is_file() and path.suffix != ".pth":
            raise DelveError(f"{src}: a directory, a hub id or an RWKV .pth file is expected")
        return path
    match = _HUB.fullmatch(str(src))
    if match is None:
        raise DelveError(f"{src}: no such file or directory, and not a hub id org/name[@revision]")
    return _fetch(str(src), match[1], match[2])


def _fetch(src: str, repo: str, revision: str | None) -> Path:
    """The snapshot of a hub repository; without network, the one that the cache holds."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    fetch, pinned = huggingface_hub.snapshot_download, {"revision": revision}
    try:
        try:
            names = huggingface_hub.HfApi().list_repo_files(repo, **pinned)
        except HfHubHTTPError:  # the hub answered: no such repository, revision or permission
            raise
        except Exception:  # no network, in one of many types
            return Path(fetch(repo, local_files_only=True, **pinned))
        for pattern in _FORMATS:
            if weights := [n for n in names if re.fullmatch(pattern, n)]:
                folder = Path(fetch(repo, allow_patterns=[*_KEEP, *weights], **pinned))
                return _with_code(folder, repo, fetch)
    except Exception as err:
        reason = " ".join(str(err).split())[:160]
        raise DelveError(
            f"{src}: no such directory, and the hub does not give it ({reason})"
        ) from None
    raise DelveError(f"{src}: no model*.safetensors and no pytorch_model*.bin in the repository")


def _with_code(folder: Path, repo: str, fetch) -> Path:
    """The snapshot, with its Python files where its config names some (`evaluate.hf_scorer` reads
    them, and decides what may run)."""
    config = folder / "config.json"
    if not config.is_file() or b'"auto_map"' not in config.read_bytes():
        return folder
    return Path(fetch(repo, revision=commit(folder), allow_patterns=["*.py"]))


def commit(path: str | Path) -> str | None:
    """The hub commit of a resolved directory (to be stored beside the converted weights)."""
    path = Path(path)
    return path.name if path.parent.name == "snapshots" else None


def detect(src: str | Path) -> str:
    """What `src` is: "checkpoint" (ours), "delve" (an exported DELVE) or a parent family."""
    path = resolve(src)
    if path.is_file():
        return "rwkv"
    if checkpoint.is_checkpoint(path):
        return "checkpoint"
    raw = read_json(path / "config.json")
    if "family" in raw:
        raise DelveError(f"{src}: has a config but no arrays; a run under way saves them later")
    if raw.get("model_type") == "delve":
        return "delve"
    return family_of(raw, str(path / "config.json"))


def peek(src: str | Path):
    """(cfg, tokenizer_json or None) of any source; weights are checked for shape but not read."""
    kind, path = detect(src), resolve(src)
    if kind == "checkpoint":
        return checkpoint.load_config(path), checkpoint.load_tokenizer(path)
    if kind == "delve":
        raise DelveError(f"{src}: is an exported DELVE, not a parent; `delve convert` reads it")
    return describe(path)[1:]


def load(
    src: str | Path,
    dtype: str | None = None,
    mesh=None,
    *,
    keep: float | None = None,
    streams: Sequence[str] = (),
):
    """Read any source into (cfg, params, tokenizer_json or None).

    dtype: of the arrays (float32, bfloat16, float16), None keeps each tensor's own; cfg.dtype says
    what is stored. mesh: where the arrays go (`parallel.shardings`), None for the first device.
    keep, streams: only a part of the model, see `part`. Raises DelveError for anything that does
    not fit: files, names, shapes, NaN.
    """
    try:
        fits = dtype is None or jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # no dtype at all
        fits = False
    if not fits:
        raise DelveError(f"dtype '{dtype}': must be float32, bfloat16 or float16")
    path = resolve(src)
    kind = detect(path)
    if kind == "checkpoint":
        cfg, params = checkpoint.restore(path, mesh, dtype)
        tokenizer = checkpoint.load_tokenizer(path)
    elif kind == "delve":
        from .delve import read_exported_delve

        cfg, params, tokenizer = read_exported_delve(path, dtype, mesh)
    else:
        cfg, params, tokenizer = load_stock(path, dtype, mesh)
    if keep is None and not streams:
        return cfg, params, tokenizer
    try:
        cfg, params = part(cfg, params, keep, streams)
    except DelveError as err:
        raise DelveError(f"{src}: {err}") from None
    if mesh is not None:
        params = jax.device_put(params, parallel.shardings(mesh, params))
    return cfg, params, tokenizer


def part(cfg: Config, params: dict, keep: float | None = None, streams: Sequence[str] = ()):
    """A smaller model that is in this one -> (cfg, params).

    streams: of a DELVE, only these. keep: only so many of the first ranks of every factored map
    that all parameters are at most this share of the dense parents' (of the streams that are left).
    DelveError: not a DELVE, unknown streams, nothing factored, a share that is too small.
    """
    if streams:
        if cfg.family != "delve":
            raise DelveError("--streams: only a DELVE has streams")
        cfg, params = subset(cfg, params, tuple(streams))
    if keep is not None:
        if not 0 < keep <= 1:
            raise DelveError(f"--keep {keep}: must lie in (0, 1], the kept share of all parameters")
        cfg, params = elastic.shrink(
            cfg, params, int(keep * sum(map(models.count, dense_parents(cfg))))
        )
    return cfg, params


def open_layers(src: str | Path):
    """A parent as a source that reads layer by layer (see `layerwise`), with `.tokenizer`.

    float32, the vocabulary cut to its valid ids. None where a source can only be read as a whole:
    an exported DELVE, a run under way, a checkpoint written before layers were chunks of files.
    """
    kind, path = detect(src), resolve(src)
    if kind == "checkpoint":
        parent = checkpoint.load_config(path).family != "delve"
        arrays = checkpoint.layerwise(path) if parent else None
        return arrays and Saved(path, arrays)
    return None if kind == "delve" else Files(path)
