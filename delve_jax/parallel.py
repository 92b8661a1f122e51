"""Meshes and placement: a table path regex -> axes, for every family, DELVE and optimiser state.

Weights are sharded over "data" (FSDP) and "model" (tensor parallel); a stacked layer axis never is,
nor is a dimension that its mesh axis does not divide. Models do not know about meshes.
"""

from __future__ import annotations

import math
import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .config import DelveError

AXES = ("data", "model")

# maps whose output (columns) is split over "model", and those whose input (rows) is
_COLUMN = r"(in_proj|dt_proj|att/(key|value|receptance|qkv)|ffn/(key|receptance)|mlp/up|head)"
_ROW = r"(out_proj|x_proj|att/(output|out)|ffn/value|mlp/down)"
# regex on the end of a path -> axes of the LAST dimensions; leading ones (layers) are whole
RULES: tuple[tuple[str, tuple], ...] = (
    (r"embed/kernel", ("model", "data")),  # [V, D]
    (r"embed/v", ("model", "data")),  # [V, K]
    (r"embed/u", ("data", "model")),  # [K, D]
    (_COLUMN + r"/kernel", ("data", "model")),  # [I, O]
    (_COLUMN + r"/v", ("data", None)),  # [I, K]
    (_COLUMN + r"/u", ("data", "model")),  # [K, O]
    (_COLUMN + r"/bias", ("model",)),
    (_ROW + r"/kernel", ("model", "data")),
    (_ROW + r"/v", ("model", "data")),
    (_ROW + r"/u", (None, "data")),
    (r"conv/kernel", (None, "model")),  # [W, E]
    (r"conv/bias|att/time_(decay|first)|layers/D", ("model",)),
    (r"A_log", ("model", None)),  # [E, N]
    (r"hub/[^/]+/a", ("data", None)),  # [D, r]
    (r"hub/[^/]+/b", (None, "data")),  # [r, D]
)
_RULES = tuple((re.compile(rf"(^|.*/)({pattern})"), axes) for pattern, axes in RULES)


def make_mesh(spec: str | None = None) -> Mesh:
    """A mesh from "data=8,model=1"; None puts every device on "data".

    Fewer devices than there are may be asked for; more, or an unknown axis, raise DelveError.
    """
    devices = jax.devices()
    sizes = {"data": len(devices), "model": 1}
    if spec is not None:
        sizes = {"data": 1, "model": 1}
        for part in spec.split(","):
            name, _, size = part.strip().partition("=")
            if name not in AXES or not size.isdigit() or int(size) < 1:
                raise DelveError(f"--mesh {spec}: {part!r} is not data=N or model=N")
            sizes[name] = int(size)
    count = math.prod(sizes.values())
    if count > len(devices):
        raise DelveError(f"--mesh {spec}: {count} devices asked for, {len(devices)} are there")
    # Auto: jax's default, Explicit, breaks Linen (jax_stack.md)
    return jax.make_mesh(
        tuple(sizes[a] for a in AXES), AXES, (AxisType.Auto,) * 2, devices=devices[:count]
    )


def path_of(keys) -> str:
    """A tree path as "layers/att/key/kernel"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of one array: the first rule that fits its path, where it divides."""
    for pattern, axes in _RULES:
        if pattern.fullmatch(path) and len(axes) <= len(shape):
            full = (None,) * (len(shape) - len(axes)) + axes
            return P(
                *(
                    a if a and size % mesh.shape[a] == 0 and mesh.shape[a] > 1 else None
                    for a, size in zip(full, shape, strict=True)
                )
            )
    return P()


def shardings(mesh: Mesh, tree):
    """The NamedSharding of every leaf (array or ShapeDtypeStruct) of a parameter or state tree."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: NamedSharding(mesh, spec_for(path_of(keys), x.shape, mesh)), tree
    )


def abstract(mesh: Mesh, tree):
    """The tree as ShapeDtypeStructs that carry their sharding, for restoring."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(mesh, tree)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over "data"."""
    return NamedSharding(mesh, P("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Everywhere whole."""
    return NamedSharding(mesh, P())
