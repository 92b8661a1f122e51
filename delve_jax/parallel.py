"""Meshes, placement and processes: a table path regex -> axes, for every family, DELVE, optimiser.

Mesh axes: "replica" (copies of the weights), "data" (FSDP: weights and batch are split), "model"
(tensor parallel). A batch is split over replica x data. A stacked layer axis is never split, nor is
a dimension that its mesh axis does not divide. Models do not know about meshes: they are handed at
most one sharding for the residual stream (`models.Compute.residual`).
"""

from __future__ import annotations

import json
import math
import os
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .config import DelveError

AXES = ("replica", "data", "model")
ROWS = ("replica", "data")  # axes that split a batch
HEARTBEAT_S = 60  # a process that is silent for so long is lost: the others end with an error

# maps whose output (columns) is split over "model", and those whose input (rows) is
_COLUMN = (
    r"(in_proj|dt_proj|att/(key|value|receptance|qkv|q|k|v)|ffn/(key|receptance)"
    r"|mlp/(up|gate)|head)"
)
_ROW = r"(out_proj|x_proj|att/(output|out|o)|ffn/value|mlp/down)"
# regex on the end of a path -> axes of the LAST dimensions; leading ones (layers) are whole
RULES: tuple[tuple[str, tuple], ...] = (
    (r"embed/kernel", ("model", "data")),  # [V, D]
    (r"embed/v(_q)?", ("model", "data")),  # [V, K]
    (r"embed/u(_q|_rest)?", ("data", "model")),  # [K, D]
    (_COLUMN + r"/kernel", ("data", "model")),  # [I, O]
    (_COLUMN + r"/v(_q|_rest)?", ("data", None)),  # [I, K]
    (_COLUMN + r"/u(_q|_rest)?", ("data", "model")),  # [K, O]
    (_COLUMN + r"/bias", ("model",)),
    (_ROW + r"/kernel", ("model", "data")),
    (_ROW + r"/v(_q|_rest)?", ("model", "data")),
    (_ROW + r"/u(_q|_rest)?", (None, "data")),
    (r"conv/kernel", (None, "model")),  # [W, E]
    (r"conv/bias|att/time_(decay|first)|layers/D", ("model",)),
    (r"A_log", ("model", None)),  # [E, N]
    (r"hub/[^/]+/a", ("data", None)),  # [D, r]
    (r"hub/[^/]+/b", (None, "data")),  # [r, D]
)
_RULES = tuple((re.compile(rf"(^|.*/)({pattern})"), axes) for pattern, axes in RULES)


def start(how: str | None = None) -> int:
    """Join the processes of this run and return their number; call it before any device is used.

    None: found from the environment (TPU VM, Slurm, OpenMPI, Kubernetes), one process otherwise.
    "HOST:PORT,N,I": process I of N, process 0 listens at HOST:PORT. "off": one process. A second
    call does nothing. DelveError: also JAX_COORDINATOR_ADDRESS alone, which says neither N nor I.
    """
    if how == "off" or jax.distributed.is_initialized():
        return jax.process_count()
    known = {}
    if how is not None:
        address, *numbers = how.split(",")
        if ":" not in address or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
            raise DelveError(
                f"--distributed {how}: expected HOST:PORT,PROCESSES,INDEX or off, as "
                "10.0.0.2:9876,4,0"
            )
        count, index = map(int, numbers)
        if index >= count:
            raise DelveError(f"--distributed {how}: index {index} must be below {count}")
        known = {"coordinator_address": address, "num_processes": count, "process_id": index}
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_S, **known)
    except ValueError as err:  # no cluster in the environment: an ordinary machine
        if known:
            raise
        if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
            why = " ".join(str(err).split())[:120]
            raise DelveError(
                f"JAX_COORDINATOR_ADDRESS={address}: does not say how many processes there are and "
                f"which this is ({why}); name it with --distributed {address},PROCESSES,INDEX"
            ) from None
    except RuntimeError as err:
        if how is None and "before any JAX calls" in str(err):
            return jax.process_count()  # a caller from Python has started JAX as it wanted it
        raise DelveError(f"--distributed {how}: {' '.join(str(err).split())[:200]}") from None
    return jax.process_count()


def one_process(what: str) -> None:
    """DelveError where `what`, which knows nothing of processes, was started as one of several.

    Read from the environment: joining the others, as `start` does, would wait for all of them, and
    on one host of a TPU slice nobody else may come (experiments/launch/tpu_vm.sh).
    """
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if (count := os.environ.get(name, "")).isdecimal() and int(count) > 1:
            raise DelveError(
                f"{what}: runs in one process, and {name} says that this is one of {count}; start "
                "it once (delve heal and delve train run in several)"
            )


def is_main() -> bool:
    """True in the process that writes logs, configs and names (index 0)."""
    return jax.process_index() == 0


def on_main(function, *args, **kw):
    """Call it in process 0 only; every process gets its JSON-able result or its DelveError.

    Whatever touches shared files once (claiming a directory, renaming it) goes through here.
    """
    if jax.process_count() == 1:
        return function(*args, **kw)
    said = {}
    if is_main():
        try:
            said = {"result": function(*args, **kw)}
        except DelveError as err:
            said = {"error": str(err)}
        except BaseException as err:  # the others must not wait for one that is gone
            said = {"error": f"process 0: {type(err).__name__} {err}"}
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = np.resize(text, size) if is_main() else np.zeros(size, np.uint8)
    said = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))))
    if "error" in said:
        raise DelveError(said["error"])
    return said["result"]


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def parse_mesh(spec: str) -> dict[str, int]:
    """ "data=8,model=2" -> the size of every axis, 1 where it is not named."""
    sizes = dict.fromkeys(AXES, 1)
    for part in spec.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise DelveError(f"--mesh {spec}: {part!r} is not one of replica=N, data=N, model=N")
        sizes[name] = int(size)
    return sizes


def make_mesh(spec: str | None = None) -> Mesh:
    """A mesh from "replica=2,data=8,model=1"; None puts every device of every process on "data".

    Fewer devices than there are may be asked for (by one process); more, or an unknown axis, raise
    DelveError.
    """
    devices = jax.devices()
    sizes = parse_mesh(spec or f"data={len(devices)}")
    count = math.prod(sizes.values())
    if count > len(devices) or (count < len(devices) and jax.process_count() > 1):
        raise DelveError(f"--mesh {spec}: {count} devices asked for, {len(devices)} are there")
    try:  # `jax.make_mesh` lets an axis be a part of a physical one on a v5e alone
        placed = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices[:count], allow_split_physical_axes=True
        )
    except (NotImplementedError, ValueError) as err:
        why = " ".join(str(err).split())[:160]
        raise DelveError(
            f"--mesh {spec}: does not fit how these devices are wired ({why})"
        ) from None
    # Auto: jax's default, Explicit, breaks Linen (jax_stack.md)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


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


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows of a batch over replica x data, after `leading` whole axes (microbatches)."""
    return NamedSharding(mesh, P(*(None,) * leading, ROWS))


def residual_sharding(mesh: Mesh, sequence: bool = False) -> NamedSharding | None:
    """Where x_BTD lives between layers: rows split, and T over "model" if `sequence`.

    None on one device: a constraint there would only cost compilation.
    """
    if mesh.size == 1:
        return None
    return NamedSharding(mesh, P(ROWS, "model" if sequence else None, None))


def row_groups(mesh: Mesh) -> int:
    """Into how many parts a batch is split; its size must be a multiple."""
    return mesh.shape["replica"] * mesh.shape["data"]


def feed(mesh: Mesh, batch: int) -> tuple[int, int]:
    """(shard, shards): which part of a global batch of `batch` rows this process must read.

    Processes that share rows (a "model" axis across them) read the same part. Rows of a process
    need not be one block of the batch: on a TPU the ring of devices goes to and fro between hosts,
    and `global_batch` deals a part out to its process's places in their order.
    """
    of_process: dict[int, set[int]] = {}
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((batch,)).items():
        of_process.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted(set(map(frozenset, of_process.values())), key=min)
    if sum(map(len, parts)) != row_groups(mesh) or len(set(map(len, parts))) > 1:
        raise DelveError(
            "--mesh: two processes share some of their rows and not others; let model= be a "
            "multiple, or a divisor, of the devices of a process"
        )
    return parts.index(frozenset(of_process[jax.process_index()])), len(parts)


def global_batch(mesh: Mesh, rows: np.ndarray, leading: int = 0) -> jax.Array:
    """The global array of which `rows` are this process's part."""
    where = batch_sharding(mesh, leading)
    if jax.process_count() == 1:
        return jax.device_put(rows, where)
    return jax.make_array_from_process_local_data(where, rows)


def replicated(mesh: Mesh) -> NamedSharding:
    """Everywhere whole."""
    return NamedSharding(mesh, P())
