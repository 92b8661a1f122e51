"""One tree of arrays in a directory: an Orbax tree, and the CRC-32 of each of its files.

Arrays go out in 64 MiB chunks without OCDBT (0.3 GiB of host memory, not a copy), stacks layer by
layer. A tree with a file that is not what was written is not restored. `checkpoint` says what such
trees are of; several processes call `save` and `restore` together.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import tensorstore

from . import parallel
from .config import DelveError, read_json

CHUNK_BYTES = 64 * 2**20
SUMS = "checksums.json"  # in each tree's directory: file -> [bytes, CRC-32]


def _checkpointer(limit_bytes: int = 10**9) -> ocp.Checkpointer:
    """limit_bytes bounds what is read at once; no single array may be larger."""
    silence()
    limit = -(-max(limit_bytes, 10**9) // 10**9)
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=False, restore_concurrent_gb=limit)
    )


def silence() -> None:
    """Orbax logs a traceback per failed thread; the one line of our DelveError says it all."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hook = sys.unraisablehook
    if getattr(hook, "__name__", "") != "quiet_hook":

        def quiet_hook(unraisable):  # reads and writes under way end later, on a loop that is gone
            if "loop is closed" not in str(unraisable.exc_value):
                hook(unraisable)

        sys.unraisablehook = quiet_hook


def _crc(file: Path) -> list[int]:
    """[bytes, CRC-32] of a file, read in pieces."""
    size = crc = 0
    with file.open("rb") as f:
        while piece := f.read(2**24):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def write_sums(path: Path) -> None:
    """The checksums of all files of a tree, beside them."""
    # Orbax writes _CHECKPOINT_METADATA (a time stamp) once more as it commits
    out = (SUMS, "_CHECKPOINT_METADATA")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in out)
    with ThreadPoolExecutor(4) as pool:  # zlib lets go of the interpreter while it sums
        sums = {f.relative_to(path).as_posix(): s for f, s in zip(files, pool.map(_crc, files))}  # noqa: B905
    (path / SUMS).write_text(json.dumps(sums), encoding="utf-8")


def check_sums(path: Path, names: list[str] | None = None) -> None:
    """DelveError naming the first file that is missing or not what was written.

    names: of the arrays whose files alone are compared (None: all files).
    """
    if not (path / SUMS).is_file():
        if not path.is_dir():
            raise DelveError(f"{path}: no such directory; {path.parent} is no checkpoint")
        raise DelveError(f"{path}: damaged checkpoint, make it again (it has no {SUMS})")
    sums = read_json(path / SUMS)
    if names is not None:
        folders = tuple(f"{_folder(name)}/" for name in names)
        sums = {name: was for name, was in sums.items() if name.startswith(folders)}
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda n: _crc(path / n) if (path / n).is_file() else None, sums)
        for name, was in zip(sums, found, strict=True):
            if was != sums[name]:
                what = "is missing" if was is None else "has other bytes than were written"
                raise DelveError(f"{path}: damaged checkpoint, make it again ({name} {what})")


def save_args(tree) -> ocp.args.PyTreeSave:
    """What Orbax needs to write a tree in chunks."""

    def args(x):  # a chunk of a large stack [L, I, O] is one layer: `layerwise` reads no other
        stack = x.ndim == 3 and x.nbytes > CHUNK_BYTES
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stack else ())

    return ocp.args.PyTreeSave(tree, jax.tree.map(args, tree))


def refused(path: Path, err: BaseException) -> DelveError:
    """The one line of a failed write, whose leavings are removed."""
    _clear(path)
    # tensorstore reports a full disk as one of several types
    reason = "no space left on the device" if "space" in str(err) else _one_line(err)
    return DelveError(f"{str(path.parent).removesuffix('.partial')}: cannot be written ({reason})")


def _clear(path: Path) -> None:
    """Remove what a failed write left, until it stays away: one of its tensors has failed, the
    others are still on tensorstore's threads, which make their folders anew. At most a minute."""
    calm = 0
    for _ in range(600):
        left = [p for p in (path, *unfinished(path)) if p.exists()]
        for p in left:
            remove(p)
        calm = 0 if left else calm + 1
        if calm > 10:  # a second: longer than a 64 MiB chunk takes to be compressed
            return
        time.sleep(0.1)


def unfinished(path: Path) -> list[Path]:
    """Orbax's temporary directories of a tree that is being, or was not, written."""
    return sorted(path.parent.glob(path.name + ".orbax-checkpoint-tmp*"))


def remove(path: Path) -> None:
    """A directory and all in it, if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def save(path: Path, tree) -> None:
    """One tree at `path`, in the place of what stands there; DelveError: it cannot be written, and
    what is left of it is removed."""
    parallel.on_main(remove, path)
    try:
        with _checkpointer() as orbax:
            orbax.save(path.absolute(), args=save_args(tree))
        parallel.on_main(write_sums, path)
    except Exception as err:
        raise refused(path, err) from None


def restore(path: Path, abstract, check: bool = True):
    """A tree in the dtypes and shardings of `abstract`, its checksums compared first.

    What `abstract` leaves out is not read. DelveError: damage, or an array that is not there.
    """
    if check:
        parallel.on_main(check_sums, path)
    try:
        largest = max((x.size * 4 for x in jax.tree.leaves(abstract)), default=0)
        with _checkpointer(2 * largest) as orbax:
            args = ocp.checkpoint_utils.construct_restore_args(abstract)
            args = ocp.args.PyTreeRestore(abstract, restore_args=args, partial_restore=True)
            tree = orbax.restore(path.absolute(), args=args)
    except Exception as err:  # damage surfaces as anything from KeyError to RuntimeError
        raise _damaged(path, err) from None
    for name, leaf in named(tree):  # Orbax hands back what it did not find as it was asked for
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise DelveError(f"{path}: damaged checkpoint, make it again (it has no {name})")
    return tree


def shapes(path: Path) -> dict:
    """The tree of shapes and dtypes that a saved tree says it has."""
    if not path.is_dir():
        raise DelveError(f"{path}: no such directory; {path.parent} is no checkpoint")
    try:
        with _checkpointer() as orbax:
            tree = orbax.metadata(path.absolute()).item_metadata.tree
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    except Exception as err:
        raise _damaged(path, err) from None


def opened(path: Path, name: str):
    """The array "pool/a" of a tree, opened to read: a tensorstore."""
    file = {"driver": "file", "path": str((path / _folder(name)).absolute())}
    return tensorstore.open({"driver": "zarr", "kvstore": file}, read=True).result()


def read(path: Path, names: list[str]) -> list:
    """Arrays of a tree as NumPy, the sums of their files compared first; by any one process."""
    check_sums(path, names)  # a chunk without a file would be read as zeros
    try:
        return [opened(path, name).read().result() for name in names]
    except (ValueError, OSError) as err:
        raise _damaged(path, err) from None


def named(tree) -> list[tuple[str, object]]:
    """("layers/att/key/kernel", leaf) of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(parallel.path_of(key), leaf) for key, leaf in leaves]


def _folder(name: str) -> str:
    """Where Orbax has the array "pool/a" of a tree."""
    return name.replace("/", ".")


def _damaged(path: Path, err: BaseException) -> DelveError:
    return DelveError(f"{path}: damaged checkpoint, make it again ({_one_line(err)})")


def _one_line(err: BaseException) -> str:
    return " ".join(f"{type(err).__name__} {err}".split())[:120]
