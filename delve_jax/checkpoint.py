"""Checkpoints: DIR/params (sharded Orbax) + config.json + tokenizer.json, restored on any mesh.

Written as DIR.partial, renamed at the end: the final name never holds half a checkpoint. Every tree
carries checksums (`arrays`). `Steps` are the states of a training run: written in the background,
the newest sound one is found by itself. Several processes call everything here together, over one
shared file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from . import arrays, parallel
from .config import Config, DelveError, from_json, read_json, to_json

_FILES = ("config.json", "tokenizer.json")
_OURS = ("config.json", "run.json", "report.json")  # one of them is in whatever a verb leaves
_BEGUN = ".delve"  # in a DST.partial that is not gone on with: may be deleted


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
    and steps, which stay). DelveError: DST is taken, DST.partial holds what was not begun `fresh`,
    or the disk refuses.
    """
    dst = Path(dst)
    if not dst.name:
        raise DelveError(f"{dst}: name a directory to make, not one that is there")
    partial, ours = dst.with_name(dst.name + ".partial"), False
    try:
        parallel.on_main(_claim, dst, overwrite, fresh)
        ours = fresh
        yield partial
        parallel.on_main(_commit, dst)
    except BaseException as err:
        if ours:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(err, OSError):
            raise DelveError(f"{dst}: cannot be written ({err.strerror or err})") from None
        raise


def check_replaceable(dst: Path) -> None:
    """DelveError where --overwrite would delete a directory that no verb has made."""
    names = _names(dst)
    if names and not any(name in names for name in _OURS):
        raise DelveError(
            f"{dst}: holds {sorted(names)[0]} and is neither a checkpoint nor a model, so "
            "--overwrite leaves it alone; name another DST"
        )


def _names(folder: Path) -> list[str]:
    """What is in a folder, but for our mark in one that was begun and is empty."""
    return [p.name for p in folder.iterdir() if p.name != _BEGUN] if folder.is_dir() else []


def _claim(dst: Path, overwrite: bool, fresh: bool) -> None:
    _mend(dst)
    if dst.exists() and not overwrite and (dst.is_file() or _names(dst)):
        raise DelveError(f"{dst}: exists, give another name or --overwrite")
    check_replaceable(dst)
    partial = dst.with_name(dst.name + ".partial")
    if fresh:
        if partial.is_file() or (_names(partial) and not (partial / _BEGUN).exists()):
            raise DelveError(f"{partial}: is in the way and not ours; move it")
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    if fresh:
        (partial / _BEGUN).touch()


def _commit(dst: Path) -> None:
    # of a write within a write DST is itself one that was begun: its mark goes on
    begun, old = (dst / _BEGUN).exists(), _replaced(dst)
    shutil.rmtree(old, ignore_errors=True)
    if dst.is_file():
        dst.unlink()
    elif dst.exists():
        dst.rename(old)
    dst.with_name(dst.name + ".partial").rename(dst)
    (dst / _BEGUN).touch() if begun else (dst / _BEGUN).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


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
        arrays.save(partial / "params", params)
        texts = {n: json.dumps(data, indent=2) + "\n" for n, data in (extra or {}).items()}
        texts["config.json"] = json.dumps(to_json(cfg), indent=2) + "\n"
        if tokenizer is not None:
            texts["tokenizer.json"] = str(tokenizer)
        parallel.on_main(_write_texts, partial, texts)
        for name in served:
            parallel.on_main(arrays.remove, partial / name)
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


def home_of(src: str | Path) -> Path:
    """Where config.json and the tokenizer stand: beside the parameters, or with the run."""
    src = Path(src)
    return src.parent.parent if _is_state(src) else src


def load_config(src: str | Path) -> Config:
    """The config of a checkpoint directory."""
    src = home_of(src)
    _mend(src)
    if not src.is_dir():
        raise DelveError(f"{src}: no such checkpoint directory")
    return from_json(read_json(src / "config.json"), str(src / "config.json"))


def load_tokenizer(src: str | Path) -> str | None:
    """tokenizer.json of a checkpoint as text, None where it has none."""
    file = home_of(src) / "tokenizer.json"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def restore(src: str | Path, mesh=None, dtype: str | None = None) -> tuple[Config, dict]:
    """(cfg, params) on `mesh` (None: the first device), `models.cast` to `dtype` unless None.

    Of a run under way, the parameters of its newest sound state, or of the state named.
    DelveError: no checkpoint, damaged files, or arrays that are not those of the config.
    """
    from . import models

    cfg, (path, part) = load_config(src), params_of(Path(src))
    tree = part(arrays.shapes(path))
    _check_fit(src, cfg, tree)
    tree = models.cast(tree, dtype) if dtype else tree
    return cfg, part(arrays.restore(path, part(_placed(tree, mesh), wrap=True)))


def _check_fit(src: str | Path, cfg: Config, tree) -> None:
    from . import models

    expected = {name: x.shape for name, x in arrays.named(models.abstract_params(cfg))}
    found = {name: x.shape for name, x in arrays.named(tree)}
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
    arrays.check_sums(path)
    tree, out = arrays.shapes(path), {}
    _check_fit(src, load_config(src), tree)
    for name, leaf in arrays.named(tree):
        out[name] = arrays.opened(path, name)
        large = name.startswith("layers/") and leaf.size * leaf.dtype.itemsize > arrays.CHUNK_BYTES
        if large and out[name].chunk_layout.read_chunk.shape[0] > 1:
            return None
    return out


def params_of(src: Path):
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


def fingerprint(src: str | Path) -> str:
    """A hash of what stands at SRC: its config.json and the checksums of its arrays.

    Of a run under way the config stays, while its newest state becomes another one. Without sums
    (a Hugging Face directory, a damaged checkpoint) it is the config's alone.
    """
    config, sums = home_of(src) / "config.json", params_of(Path(src))[0] / arrays.SUMS
    found = [file.read_bytes() for file in (config, sums) if file.is_file()]
    return hashlib.sha256(b"".join(found)).hexdigest()


def restore_part(src: str | Path, name: str):
    """One top-level subtree of the parameters (the pool of a DELVE, say) without the rest: NumPy.

    Unlike `restore`, which waits for all processes, one of them may call it alone.
    """
    path, part = params_of(Path(src))
    tree = part({name: part(arrays.shapes(path))[name]}, wrap=True)
    read = arrays.read(path, [name for name, _ in arrays.named(tree)])
    return part(jax.tree.unflatten(jax.tree.structure(tree), read))[name]


def _placed(tree, mesh):
    if mesh is not None:
        return parallel.abstract(mesh, tree)
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree)


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
                arrays.check_sums(self.path(step))
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
            arrays.silence()
            options = ocp.options.AsyncOptions(post_finalization_callback=self._seal)
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
            self._orbax = ocp.AsyncCheckpointer(handler, async_options=options)
        self._writing = path
        try:
            self._orbax.save(path, args=arrays.save_args(tree))
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
                parallel.on_main(arrays.check_sums, self.path(step))
                sound = True
                return step, arrays.restore(self.path(step), abstract, check=False)
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
        for path in arrays.unfinished(self._writing):
            arrays.write_sums(path)

    def _failed(self, err: BaseException) -> DelveError:
        path, self._writing, self._orbax = self._writing, None, None
        return arrays.refused(path, err)

    def _retain(self, last: int) -> None:
        # later ones were passed over as damaged: they do not count among those that stay
        for step in [n for n in self.numbers() if n <= last][: -self.keep]:
            if not self.keep_every or step % self.keep_every:
                shutil.rmtree(self.path(step), ignore_errors=True)
