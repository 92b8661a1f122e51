"""Checkpoints: DIR/params (sharded Orbax) + config.json + tokenizer.json, restored on any mesh.

Written as DIR.partial, renamed at the end: the final name never holds half a checkpoint. Arrays go
out in 64 MiB chunks without OCDBT (0.3 GiB of host memory, not a copy), stacks layer by layer.
Every tree carries the CRC-32 of its files and is not restored when one differs. `Steps` are the
states of a training run: written in the background, the newest sound one is found by itself.
Several processes call everything here together, over one shared file system.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import SingleDeviceSharding

from . import parallel
from .config import Config, DelveError, from_json, read_json, to_json

CHUNK_BYTES = 64 * 2**20
SUMS = "checksums.json"  # in each tree's directory: file -> [bytes, CRC-32]
_FILES = ("config.json", "tokenizer.json")


def _checkpointer(limit_bytes: int = 10**9) -> ocp.Checkpointer:
    """limit_bytes bounds what is read at once; no single array may be larger."""
    _silence()
    limit = -(-max(limit_bytes, 10**9) // 10**9)
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=False, restore_concurrent_gb=limit)
    )


def _silence() -> None:
    """Orbax logs a traceback per failed thread; the one line of our DelveError says it all."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hook = sys.unraisablehook
    if getattr(hook, "__name__", "") != "quiet_hook":

        def quiet_hook(unraisable):  # reads and writes under way end later, on a loop that is gone
            if "loop is closed" not in str(unraisable.exc_value):
                hook(unraisable)

        sys.unraisablehook = quiet_hook


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
    if not dst.name:
        raise DelveError(f"{dst}: name a directory to make, not one that is there")
    partial = dst.with_name(dst.name + ".partial")
    try:
        parallel.on_main(_claim, dst, overwrite, fresh)
        yield partial
        parallel.on_main(_commit, dst)
    except BaseException as err:
        if fresh:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(err, OSError):
            raise DelveError(f"{dst}: cannot be written ({err.strerror or err})") from None
        raise


def _claim(dst: Path, overwrite: bool, fresh: bool) -> None:
    _mend(dst)
    if dst.exists() and not overwrite and (dst.is_file() or any(dst.iterdir())):
        raise DelveError(f"{dst}: exists, give another name or --overwrite")
    partial = dst.with_name(dst.name + ".partial")
    if fresh:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)


def _commit(dst: Path) -> None:
    old = _replaced(dst)
    shutil.rmtree(old, ignore_errors=True)
    if dst.is_file():
        dst.unlink()
    elif dst.exists():
        dst.rename(old)
    dst.with_name(dst.name + ".partial").rename(dst)
    shutil.rmtree(old, ignore_errors=True)


def _crc(file: Path) -> list[int]:
    """[bytes, CRC-32] of a file, read in pieces."""
    size = crc = 0
    with file.open("rb") as f:
        while piece := f.read(2**24):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def _write_sums(path: Path) -> None:
    # Orbax writes _CHECKPOINT_METADATA (a time stamp) once more as it commits
    out = (SUMS, "_CHECKPOINT_METADATA")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in out)
    with ThreadPoolExecutor(4) as pool:  # zlib lets go of the interpreter while it sums
        sums = {f.relative_to(path).as_posix(): s for f, s in zip(files, pool.map(_crc, files))}  # noqa: B905
    (path / SUMS).write_text(json.dumps(sums), encoding="utf-8")


def _check_sums(path: Path, arrays: list[str] | None = None) -> None:
    """DelveError naming the first file that is missing or not what was written.

    arrays: of the tree, whose files alone are compared (None: all files).
    """
    if not (path / SUMS).is_file():
        if not path.is_dir():
            raise DelveError(f"{path}: no such directory; {path.parent} is no checkpoint")
        raise DelveError(f"{path}: damaged checkpoint, make it again (it has no {SUMS})")
    sums = read_json(path / SUMS)
    if arrays is not None:
        folders = tuple(f"{_folder(name)}/" for name in arrays)
        sums = {name: was for name, was in sums.items() if name.startswith(folders)}
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda n: _crc(path / n) if (path / n).is_file() else None, sums)
        for name, was in zip(sums, found, strict=True):
            if was != sums[name]:
                what = "is missing" if was is None else "has other bytes than were written"
                raise DelveError(f"{path}: damaged checkpoint, make it again ({name} {what})")


def _save_args(tree):
    def args(x):  # a chunk of a large stack [L, I, O] is one layer: `layerwise` reads no other
        stack = x.ndim == 3 and x.nbytes > CHUNK_BYTES
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stack else ())

    return ocp.args.PyTreeSave(tree, jax.tree.map(args, tree))


def _refused(path: Path, err: BaseException) -> DelveError:
    """The one line of a failed write, whose leavings are removed."""
    for left in [path, *_unfinished(path)]:
        shutil.rmtree(left, ignore_errors=True)
    # tensorstore reports a full disk as one of several types
    reason = "no space left on the device" if "space" in str(err) else _one_line(err)
    return DelveError(f"{str(path.parent).removesuffix('.partial')}: cannot be written ({reason})")


def _unfinished(path: Path) -> list[Path]:
    """Orbax's temporary directories of a tree that is being, or was not, written."""
    return sorted(path.parent.glob(path.name + ".orbax-checkpoint-tmp*"))


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _save_tree(path: Path, tree) -> None:
    """One Orbax tree at `path`; what is left of a failed write is removed."""
    parallel.on_main(_remove, path)
    try:
        with _checkpointer() as orbax:
            orbax.save(path.absolute(), args=_save_args(tree))
        parallel.on_main(_write_sums, path)
    except Exception as err:
        raise _refused(path, err) from None


def _restore_tree(path: Path, abstract, check: bool = True):
    """An Orbax tree in the dtypes and shardings of `abstract`, its checksums compared first."""
    if check:
        parallel.on_main(_check_sums, path)
    try:
        largest = max((x.size * 4 for x in jax.tree.leaves(abstract)), default=0)
        with _checkpointer(2 * largest) as orbax:
            args = ocp.checkpoint_utils.construct_restore_args(abstract)
            # partial: what the abstract tree leaves out is not read
            args = ocp.args.PyTreeRestore(abstract, restore_args=args, partial_restore=True)
            tree = orbax.restore(path.absolute(), args=args)
    except Exception as err:  # damage surfaces as anything from KeyError to RuntimeError
        raise DelveError(f"{path}: damaged checkpoint, make it again ({_one_line(err)})") from None
    for key, leaf in _leaves(tree):  # Orbax hands back what it did not find as it was asked for
        if isinstance(leaf, jax.ShapeDtypeStruct):
            name = parallel.path_of(key)
            raise DelveError(f"{path}: damaged checkpoint, make it again (it has no {name})")
    return tree


def _one_line(err: BaseException) -> str:
    return " ".join(f"{type(err).__name__} {err}".split())[:120]


def _read_abstract(path: Path) -> dict:
    """The tree of shapes and dtypes that a saved tree says it has."""
    if not path.is_dir():
        raise DelveError(f"{path}: no such directory; {path.parent} is no checkpoint")
    try:
        with _checkpointer() as orbax:
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
    served: tuple[str, ...] = (),
) -> Path:
    """Write a checkpoint directory: arrays as they are, `tokenizer` a path or the JSON itself.

    extra: further JSON files, name -> object. What already stands in DST.partial moves along, but
    for the folders `served`: they were for resuming, and go once the arrays are safe.
    """
    if tokenizer is not None and not str(tokenizer).lstrip().startswith("{"):
        tokenizer = Path(tokenizer).read_text(encoding="utf-8")
    with writing(dst, overwrite) as partial:
        _save_tree(partial / "params", params)
        texts = {n: json.dumps(data, indent=2) + "\n" for n, data in (extra or {}).items()}
        texts["config.json"] = json.dumps(to_json(cfg), indent=2) + "\n"
        if tokenizer is not None:
            texts["tokenizer.json"] = str(tokenizer)
        parallel.on_main(_write_texts, partial, texts)
        for name in served:
            parallel.on_main(_remove, partial / name)
    return Path(dst)


def _write_texts(folder: Path, texts: dict[str, str]) -> None:
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def describe_run(folder: Path, cfg: Config, tokenizer: str | None) -> None:
    """Config and tokenizer of a run under way, so that its states can be evaluated and healed."""
    texts = {"config.json": json.dumps(to_json(cfg), indent=2) + "\n"}
    if tokenizer is not None:
        texts["tokenizer.json"] = tokenizer
    parallel.on_main(_write_texts, folder, texts)


def is_checkpoint(path: Path) -> bool:
    """A finished checkpoint, a run under way (DST.partial), or one of its states."""
    return (path / "params").is_dir() or (path / "state").is_dir() or _is_state(path)


def _is_state(path: Path) -> bool:
    return path.name.isdigit() and path.parent.name == "state" and path.is_dir()


def _home(src: str | Path) -> Path:
    """Where config.json and the tokenizer stand: beside the parameters, or with the run."""
    src = Path(src)
    return src.parent.parent if _is_state(src) else src


def load_config(src: str | Path) -> Config:
    """The config of a checkpoint directory."""
    src = _home(src)
    _mend(src)
    if not src.is_dir():
        raise DelveError(f"{src}: no such checkpoint directory")
    return from_json(read_json(src / "config.json"), str(src / "config.json"))


def load_tokenizer(src: str | Path) -> str | None:
    """tokenizer.json of a checkpoint as text, None where it has none."""
    file = _home(src) / "tokenizer.json"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def restore(src: str | Path, mesh=None, dtype: str | None = None) -> tuple[Config, dict]:
    """(cfg, params) on `mesh` (None: the first device), `models.cast` to `dtype` unless None.

    Of a run under way, the parameters of its newest sound state, or of the state named.
    DelveError: no checkpoint, damaged files, or arrays that are not those of the config.
    """
    from . import models

    cfg, (path, part) = load_config(src), _params_of(Path(src))
    tree = part(_read_abstract(path))
    _check_fit(src, cfg, tree)
    tree = models.cast(tree, dtype) if dtype else tree
    return cfg, part(_restore_tree(path, part(_placed(tree, mesh), wrap=True)))


def _check_fit(src: str | Path, cfg: Config, tree) -> None:
    from . import models

    expected = {parallel.path_of(k): x.shape for k, x in _leaves(models.abstract_params(cfg))}
    found = {parallel.path_of(k): x.shape for k, x in _leaves(tree)}
    if odd := sorted(k for k in expected | found if expected.get(k) != found.get(k)):
        name = odd[0]
        raise DelveError(
            f"{src}: array {name} is {found.get(name)}, config.json says {expected.get(name)}"
        )


def layerwise(src: str | Path) -> dict | None:
    """{"layers/att/key/kernel": array} of a checkpoint; array[i].read().result() reads a layer.

    None: a run under way, or a checkpoint from before layers were chunks, where it reads them all.
    """
    path = Path(src) / "params"
    if not path.is_dir():
        return None
    _check_sums(path)
    tree, out = _read_abstract(path), {}
    _check_fit(src, load_config(src), tree)
    for key, leaf in _leaves(tree):
        name = parallel.path_of(key)
        out[name] = _opened(path, name)
        large = name.startswith("layers/") and leaf.size * leaf.dtype.itemsize > CHUNK_BYTES
        if large and out[name].chunk_layout.read_chunk.shape[0] > 1:
            return None
    return out


def _params_of(src: Path):
    """(directory of the tree that holds the parameters, how they stand in it)."""

    def whole(tree, wrap=False):
        return tree

    def in_state(tree, wrap=False):
        return {"params": tree} if wrap else tree["params"]

    if _is_state(src):
        return src, in_state
    if not (src / "params").is_dir() and (src / "state").is_dir():
        return Steps(src / "state").newest(), in_state
    return src / "params", whole


def restore_part(src: str | Path, name: str):
    """One top-level subtree of the parameters (the pool of a DELVE, say) without the rest: NumPy.

    Unlike `restore`, which waits for all processes, one of them may call it alone.
    """
    path, part = _params_of(Path(src))
    tree = part({name: part(_read_abstract(path))[name]}, wrap=True)
    leaves, form = jax.tree_util.tree_flatten_with_path(tree)
    names = [parallel.path_of(key) for key, _ in leaves]
    _check_sums(path, names)  # a chunk without a file would be read as zeros
    try:
        arrays = [_opened(path, name).read().result() for name in names]
    except (ValueError, OSError) as err:
        raise DelveError(f"{path}: damaged checkpoint, make it again ({_one_line(err)})") from None
    return part(jax.tree.unflatten(form, arrays))[name]


def _folder(name: str) -> str:
    """Where Orbax has the array "pool/a" of a tree."""
    return name.replace("/", ".")


def _opened(path: Path, name: str):
    """An array of a tree by its name, opened to read."""
    file = {"driver": "file", "path": str((path / _folder(name)).absolute())}
    return tensorstore.open({"driver": "zarr", "kvstore": file}, read=True).result()


def _placed(tree, mesh):
    if mesh is not None:
        return parallel.abstract(mesh, tree)
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree)


def _leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


class Steps:
    """The states of a training run as FOLDER/00000012: background writes, retention, recovery.

    The last `keep` stay, and every multiple of `keep_every` steps for good. One write is under way
    at a time; `save` waits for the one before. A state counts once it is complete and its checksums
    are written: both happen before it gets its name.
    """

    def __init__(self, folder: str | Path, keep: int = 2, keep_every: int | None = None):
        self.folder, self.keep, self.keep_every = Path(folder), keep, keep_every
        self._orbax, self._writing = None, None

    def numbers(self) -> list[int]:
        """The steps that stand there, oldest first."""
        return sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit() and p.is_dir())

    def path(self, step: int) -> Path:
        """Where the state of a step stands."""
        return self.folder / f"{step:08d}"

    def newest(self) -> Path:
        """The newest state whose checksums hold; DelveError without one."""
        for step in reversed(self.numbers()):
            try:
                _check_sums(self.path(step))
                return self.path(step)
            except DelveError:
                continue
        raise DelveError(f"{self.folder}: holds no whole state yet; wait for the first save")

    def save(self, step: int, tree) -> None:
        """Start writing; returns when `tree` may change again (its bytes are on the host).

        DelveError: the write BEFORE this one failed; nothing was started and older states stand.
        """
        self.wait()
        path = self.path(step).absolute()
        parallel.on_main(self._prepare, path)
        if self._orbax is None:
            _silence()
            options = ocp.options.AsyncOptions(post_finalization_callback=self._seal)
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
            self._orbax = ocp.AsyncCheckpointer(handler, async_options=options)
        self._writing = path
        try:
            self._orbax.save(path, args=_save_args(tree))
        except Exception as err:
            raise self._failed(err) from None

    def wait(self) -> None:
        """Wait for the write under way and drop states that are past keeping; DelveError if it
        failed."""
        if self._writing is None:
            return
        try:
            self._orbax.wait_until_finished()
        except Exception as err:
            raise self._failed(err) from None
        step, self._writing = int(self._writing.name), None
        parallel.on_main(self._retain, step)

    def restore(self, abstract, say=lambda line: None):
        """(step, state) of the newest sound state in the placement of `abstract`, None without.

        Damaged ones are passed over; `say` gets a line on each. DelveError where none can be used
        though the checksums of one hold: work that is there is not begun anew in silence.
        """
        whole = None
        for step in reversed(parallel.on_main(self.numbers)):
            sound = False
            try:
                parallel.on_main(_check_sums, self.path(step))
                sound = True
                return step, _restore_tree(self.path(step), abstract, check=False)
            except DelveError as err:
                whole = whole or (err if sound else None)
                say(f"{err}; passed over, an older state is used")
        if whole:
            raise DelveError(
                f"{self.folder}: no state can be restored, though checksums hold ({whole}); repeat "
                "the command as it was begun, or --overwrite to begin anew"
            )
        return None

    def _prepare(self, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in [path, *self.folder.glob("*.orbax-checkpoint-tmp*")]:
            shutil.rmtree(left, ignore_errors=True)

    def _seal(self) -> None:
        # called by Orbax after every file is written and before the directory gets its name
        for path in _unfinished(self._writing):
            _write_sums(path)

    def _failed(self, err: BaseException) -> DelveError:
        path, self._writing, self._orbax = self._writing, None, None
        return _refused(path, err)

    def _retain(self, last: int) -> None:
        # later ones were passed over as damaged: they do not count among those that stay
        for step in [n for n in self.numbers() if n <= last][: -self.keep]:
            if not self.keep_every or step % self.keep_every:
                shutil.rmtree(self.path(step), ignore_errors=True)
