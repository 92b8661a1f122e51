"""Checkpoints: DIR/params (sharded Orbax) + config.json + tokenizer.json, restored on any mesh.

Written as DIR.partial, renamed at the end: the final name never holds half a checkpoint. Arrays go
out in 64 MiB chunks without OCDBT: saving then costs about 0.3 GiB of host memory, not a copy.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from . import parallel
from .config import Config, DelveError, from_json, read_json, to_json

CHUNK_BYTES = 64 * 2**20
_FILES = ("config.json", "tokenizer.json")


def _checkpointer(limit_bytes: int = 10**9) -> ocp.Checkpointer:
    """limit_bytes bounds what is read at once; no single array may be larger."""
    limit = -(-max(limit_bytes, 10**9) // 10**9)
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=False, restore_concurrent_gb=limit)
    )


@contextlib.contextmanager
def _quiet():
    """Orbax logs a traceback per failed thread; the one line of our DelveError says it all."""
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda i: None if "loop is closed" in str(i.exc_value) else hook(i)
    yield  # after an error all stays: reads still under way end later, on a loop that is gone
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    sys.unraisablehook = hook


def _replaced(dst: Path) -> Path:
    return dst.with_name(f".{dst.name}.replaced")


def _mend(dst: Path) -> None:
    """A kill between the two renames of `writing` left the old DST aside: put it back."""
    if dst.name and not dst.exists() and _replaced(dst).is_dir():
        _replaced(dst).rename(dst)


@contextlib.contextmanager
def writing(dst: str | Path, overwrite: bool = False, fresh: bool = False):
    """Yield DST.partial, renamed to DST on success; an old DST stays until that moment.

    fresh: start from an empty DST.partial and remove it on an error (else it may hold a run's logs
    and steps, which stay). DelveError: DST is taken, or the disk refuses.
    """
    dst = Path(dst)
    partial, old = dst.with_name(dst.name + ".partial"), _replaced(dst)
    _mend(dst)
    if dst.exists() and not overwrite and (dst.is_file() or any(dst.iterdir())):
        raise DelveError(f"{dst}: exists, give another name or --overwrite")
    try:
        if fresh:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if dst.is_file():
            dst.unlink()
        elif dst.exists():
            dst.rename(old)
        partial.rename(dst)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as err:
        if fresh:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(err, OSError):
            raise DelveError(f"{dst}: cannot be written ({err.strerror or err})") from None
        raise


def _save_tree(path: Path, tree) -> None:
    """One Orbax tree at `path`; what is left of a failed write is removed."""
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    shutil.rmtree(path, ignore_errors=True)
    try:
        with _quiet(), _checkpointer() as orbax:
            orbax.save(path.absolute(), args=ocp.args.PyTreeSave(tree, args))
    except Exception as err:  # tensorstore reports a full disk as one of several types
        for left in [path, *path.parent.glob(path.name + ".orbax-checkpoint-tmp*")]:
            shutil.rmtree(left, ignore_errors=True)
        reason = "no space left on the device" if "space" in str(err) else _one_line(err)
        dst = str(path.parent).removesuffix(".partial")
        raise DelveError(f"{dst}: cannot be written ({reason})") from None


def _restore_tree(path: Path, abstract):
    """An Orbax tree in the dtypes and shardings of `abstract`."""
    try:
        largest = max((x.size * 4 for x in jax.tree.leaves(abstract)), default=0)
        with _quiet(), _checkpointer(2 * largest) as orbax:
            args = ocp.checkpoint_utils.construct_restore_args(abstract)
            return orbax.restore(
                path.absolute(), args=ocp.args.PyTreeRestore(abstract, restore_args=args)
            )
    except Exception as err:  # damage surfaces as anything from KeyError to RuntimeError
        raise DelveError(f"{path}: damaged checkpoint, make it again ({_one_line(err)})") from None


def _one_line(err: BaseException) -> str:
    return " ".join(f"{type(err).__name__} {err}".split())[:120]


def _read_abstract(path: Path) -> dict:
    """The tree of shapes and dtypes that a saved tree says it has."""
    if not path.is_dir():
        raise DelveError(f"{path}: no such directory; {path.parent} is no checkpoint")
    try:
        with _quiet(), _checkpointer() as orbax:
            tree = orbax.metadata(path.absolute()).item_metadata.tree
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    except Exception as err:
        raise DelveError(f"{path}: damaged checkpoint, make it again ({_one_line(err)})") from None


def save(
    dst: str | Path,
    cfg: Config,
    params: dict,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    extra: dict[str, dict] | None = None,
) -> Path:
    """Write a checkpoint directory: arrays as they are, `tokenizer` a path or the JSON itself.

    extra: further JSON files, name -> object. What already stands in DST.partial moves along.
    """
    if tokenizer is not None and not str(tokenizer).lstrip().startswith("{"):
        tokenizer = Path(tokenizer).read_text(encoding="utf-8")
    with writing(dst, overwrite) as partial:
        for name in _FILES:
            (partial / name).unlink(missing_ok=True)
        _save_tree(partial / "params", params)
        if tokenizer is not None:
            (partial / "tokenizer.json").write_text(str(tokenizer), encoding="utf-8")
        for name, data in {**(extra or {}), "config.json": to_json(cfg)}.items():
            (partial / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return Path(dst)


def load_config(src: str | Path) -> Config:
    """The config of a checkpoint directory."""
    src = Path(src)
    _mend(src)
    if not src.is_dir():
        raise DelveError(f"{src}: no such checkpoint directory")
    return from_json(read_json(src / "config.json"), str(src / "config.json"))


def load_tokenizer(src: str | Path) -> str | None:
    """tokenizer.json of a checkpoint as text, None where it has none."""
    file = Path(src) / "tokenizer.json"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def restore(src: str | Path, mesh=None, dtype: str | None = None) -> tuple[Config, dict]:
    """(cfg, params) on `mesh` (None: the first device), cast to `dtype` unless None.

    DelveError: no checkpoint, damaged files, or arrays that are not those of the config.
    """
    from . import models

    cfg, path = load_config(src), Path(src) / "params"
    tree = _read_abstract(path)
    expected = {parallel.path_of(k): x.shape for k, x in _leaves(models.abstract_params(cfg))}
    found = {parallel.path_of(k): x.shape for k, x in _leaves(tree)}
    if odd := sorted(k for k in expected | found if expected.get(k) != found.get(k)):
        name = odd[0]
        raise DelveError(
            f"{src}: array {name} is {found.get(name)}, config.json says {expected.get(name)}"
        )
    cast = lambda x: jax.numpy.dtype(dtype) if dtype else x.dtype  # noqa: E731
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, cast(x)), tree)
    return cfg, _restore_tree(path, _placed(tree, mesh))


def restore_part(src: str | Path, name: str):
    """One top-level subtree of the parameters (the pool of a DELVE, say) without the rest."""
    path = Path(src) / "params"
    tree = {name: _placed(_read_abstract(path)[name], None)}
    with _quiet(), _checkpointer() as orbax:
        restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
        args = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True)
        return orbax.restore(path.absolute(), args=args)[name]


def _placed(tree, mesh):
    if mesh is not None:
        return parallel.abstract(mesh, tree)
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree)


def _leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def save_step(folder: str | Path, step: int, tree, keep: int = 2) -> None:
    """Save a training state as FOLDER/00000012, atomically; only the last `keep` stay."""
    folder = Path(folder)
    target = folder / f"{step:08d}"
    with writing(target, overwrite=True, fresh=True) as partial:
        _save_tree(partial / "state", tree)
    for number in _steps(folder)[:-keep]:
        shutil.rmtree(folder / f"{number:08d}", ignore_errors=True)


def _steps(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir())


def latest_step(folder: str | Path) -> int | None:
    """The newest complete step of a training run, None where there is none."""
    steps = _steps(Path(folder))
    return steps[-1] if steps else None


def restore_step(folder: str | Path, step: int, abstract):
    """The state of one step, in the shapes, dtypes and shardings of `abstract`."""
    return _restore_tree(Path(folder) / f"{step:08d}" / "state", abstract)
