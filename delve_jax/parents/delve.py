"""Names of an exported DELVE: the one table between its torch tensors and our tree, both ways.

Torch names count streams and layers (`streams.0.layers.3.in_proj.u.weight`); a torch layer has its
own true ranks and MLP width, while our stacked arrays are zero beyond them.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ..config import DelveConfig, DelveError, ParentConfig, from_json, read_json

VOCABULARY = {  # (map, leaf) -> torch name, view, axis that the rank cuts
    ("embed", "kernel"): ("embed.weight", "same", None),
    ("embed", "v"): ("embed.table.weight", "same", 1),
    ("embed", "u"): ("embed.up.weight", "transpose", 0),
    ("head", "v"): ("head.down.weight", "transpose", 1),
    ("head", "u"): ("head.table.weight", "transpose", 0),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One torch tensor: `leaf[layer]`, cut to its true size along each axis, as torch turns it."""

    key: str
    path: tuple[str, ...]  # of the leaf in our tree
    layer: int | None = None
    size: tuple[int | None, ...] = ()  # None: the whole axis
    view: str = "same"  # "same", "transpose" or "conv"

    def to_torch(self, leaf: np.ndarray) -> np.ndarray:
        x = self._slot(leaf)
        x = x if self.view == "same" else x.T
        return np.ascontiguousarray(x[:, None] if self.view == "conv" else x)

    def fill(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Write a torch tensor into its place in `leaf` (zeros beyond the rank stay)."""
        x = tensor[:, 0] if self.view == "conv" else tensor
        self._slot(leaf)[...] = x if self.view == "same" else x.T

    def _slot(self, leaf):
        x = leaf if self.layer is None else leaf[self.layer]
        return x[tuple(map(slice, self.size))] if self.size else x

    def elements(self, shape: tuple[int, ...]) -> int:
        """Numbers that the tensor of a leaf of this shape has."""
        shape = shape if self.layer is None else shape[1:]
        cut = (n if size is None else size for n, size in zip_longest(shape, self.size))
        return math.prod(cut)


def leaves(tree: dict, path: tuple[str, ...] = ()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def leaf_at(tree: dict, path: tuple[str, ...]):
    for name in path:
        tree = tree[name]
    return tree


def _true_size(cfg: ParentConfig, path: tuple[str, ...], layer: int, axis: int | None):
    """What of a leaf of one parent's layer is no padding: its rank along `axis`, its neurons."""
    from .. import models

    *module, name = path
    where, size = "/".join(module), [None, None]
    if axis is not None and (ranks := cfg.rank(where)) is not None:
        size[axis] = ranks[layer]
    mlp = models.FAMILY[cfg.family].MLP if cfg.neurons else ()
    if where in mlp:  # all but the last of its maps make the neurons
        along = {"kernel": 0, "v": 0} if where == mlp[-1] else {"kernel": 1, "u": 1, "bias": 0}
        if name in along:
            size[along[name]] = cfg.neurons[layer]
    while size and size[-1] is None:
        size.pop()
    return tuple(size)


def _stream_leaf(cfg: ParentConfig, path: tuple[str, ...]) -> tuple[str, str, int | None]:
    """(torch name, view, axis that a rank cuts) of a leaf of one parent's tree, layers cut off."""
    *module, name = path
    where = ".".join(module)
    if (where, name) in VOCABULARY:
        return VOCABULARY[where, name]
    if where == "conv":
        return (
            ("conv1d.weight", "conv", None) if name == "kernel" else ("conv1d.bias", "same", None)
        )
    if name in ("v", "u"):
        return f"{where}.{name}.weight", "transpose", int(name == "v")
    if name == "kernel":
        return f"{where}.weight", "transpose", None
    if name == "scale":
        return f"{where}.weight", "same", None
    if name == "bias" and cfg.rank("/".join(module)) is not None:
        return f"{where}.u.bias", "same", None
    return ".".join(path), "same", None


def entries(cfg: DelveConfig) -> list[Entry]:
    """Every tensor of the exported model and its place in our tree; the one table of both ways."""
    from .. import models

    index = {name: k for k, name in enumerate(cfg.names)}
    out = []
    for path, _ in leaves(models.abstract_params(cfg)):
        room = path[0]
        if room == "pool":  # one tensor, but for mixtures of pools
            both = path[1] == "log_pi" and cfg.latents < len(cfg.streams)
            out.append(Entry("pool_log_pi" if both else "pool", path))
        elif room == "codes":  # [V, r] as torch has an embedding, and a linear map to V outputs
            view = "same" if path[1] == "embed" else "transpose"
            out.append(Entry(f"codes.{path[1]}.weight", path, view=view))
        elif room == "hub":
            out.append(Entry(f"hub.{index[path[1]]}.{path[2]}", path))
        elif room == "gate" and cfg.gate_proj:
            key = f"gate.p.{index[path[2]]}" if path[1] == "p" else f"gate.{path[1]}"
            out.append(Entry(f"{key}.weight", path, view="transpose"))
        elif room == "streams":
            sub = dict(cfg.streams)[path[1]]
            prefix, inner = f"streams.{index[path[1]]}", path[2:]
            stacked = inner[0] == "layers"
            module, view, axis = _stream_leaf(sub, inner[stacked:])
            for layer in range(sub.n_layers) if stacked else [None]:
                size = _true_size(sub, inner[stacked:], layer or 0, axis)
                middle = f".layers.{layer}." if stacked else "."
                out.append(Entry(f"{prefix}{middle}{module}", path, layer, size, view))
    return out


def read_exported_delve(
    src: str | Path, dtype: str | None = None, mesh=None
) -> tuple[DelveConfig, dict, str | None]:
    """An exported DELVE -> (config, parameters in our tree, tokenizer.json's text or None).

    One leaf is on the host at a time; with a mesh it goes straight to its shards. dtype None keeps
    the stored one. DelveError names a missing, unknown, misshapen or non-finite tensor.
    """
    from .. import models

    src = Path(src)
    cfg = _read_config(src)
    tensors = _Tensors(src)
    table = entries(cfg)
    if unknown := sorted(set(tensors.file_of) - {entry.key for entry in table}):
        raise DelveError(f"{src}: unknown tensor '{unknown[0]}'; not an export of this config.json")
    by_path: dict[tuple, list[Entry]] = {}
    for entry in table:
        by_path.setdefault(entry.path, []).append(entry)
    abstract = models.abstract_params(cfg)
    place = _placer(abstract, mesh)
    params: dict = {}
    for path, shape in leaves(abstract):
        leaf = None
        for entry in by_path.get(path, []):
            tensor = tensors.read(entry.key)
            if leaf is None:
                leaf = np.zeros(shape.shape, tensor.dtype)
            want = entry.to_torch(leaf).shape
            if tensor.shape != want:
                raise DelveError(
                    f"{src}: tensor '{entry.key}' has shape {tensor.shape}, not {want}"
                )
            entry.fill(leaf, tensor)
        leaf = np.zeros(shape.shape, np.float32) if leaf is None else leaf  # a gate of width 0
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        if dtype is not None:
            leaf = leaf.astype(models.kept_dtype("/".join(path), leaf.dtype, dtype))
        node[path[-1]] = place(path, leaf)
    tokenizer = src / "tokenizer.json"
    return cfg, params, tokenizer.read_text(encoding="utf-8") if tokenizer.exists() else None


def _read_config(src: Path) -> DelveConfig:
    """Our config out of an exported config.json."""
    data = read_json(src / "config.json")
    if data.get("model_type") != "delve":
        raise DelveError(f"{src}/config.json: model_type is not 'delve'")
    names = {field.name for field in dataclasses.fields(DelveConfig)}
    fields = {"family": "delve", **{k: v for k, v in data.items() if k in names}}
    return from_json(fields, str(src / "config.json"))


def _placer(abstract: dict, mesh):
    """(path, array) -> the array where it belongs: on the default device or on its mesh shards."""
    import jax

    if mesh is None:
        return lambda path, leaf: jax.numpy.asarray(leaf)
    from .. import parallel

    shardings = parallel.shardings(mesh, abstract)
    return lambda path, leaf: jax.device_put(leaf, leaf_at(shardings, path))


class _Tensors:
    """The tensors of a directory of safetensors files, read one at a time."""

    def __init__(self, src: Path):
        self.src, self.file_of, self.open = src, {}, {}
        files = sorted(src.glob("*.safetensors"))
        if not files:
            raise DelveError(f"{src}: no model.safetensors; is this an exported directory?")
        for path in files:
            for key in self._file(path).keys():
                self.file_of[key] = path

    def _file(self, path: Path):
        from safetensors import SafetensorError, safe_open

        if path not in self.open:
            try:
                self.open[path] = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as err:
                raise DelveError(f"{path}: truncated or damaged ({err})") from None
        return self.open[path]

    def read(self, key: str) -> np.ndarray:
        if key not in self.file_of:
            raise DelveError(f"{self.src}: tensor '{key}' is missing")
        tensor = self._file(self.file_of[key]).get_tensor(key)
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise DelveError(f"{self.src}: tensor '{key}' has NaN or Inf values")
        return tensor
