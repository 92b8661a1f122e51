"""Streaming readers and writers of tensor files: safetensors and torch .bin / .pth, in shards.

A `Source` lists names, shapes and dtypes from headers alone and reads one slice at a time; open
files are dropped after `WINDOW` bytes, so that mapped pages never add up to a second model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from ..config import DelveError, read_json

WINDOW = 256 * 2**20  # bytes read through one open file before it is reopened
SHARD_BYTES = 5 * 10**9  # transformers' old and most portable shard size
SAFE_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SAFE_NAMES = {dtype: name for name, dtype in SAFE_DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One stored tensor: `name` is the canonical one, `key` the one in `file`."""

    name: str
    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype | None  # None: not a floating-point format we read
    kind: str = ""  # the file's own word for the dtype


def _one_line(err: BaseException) -> str:
    return " ".join(str(err).split())[:200]


def _torch(file: Path):
    try:
        import torch
    except ImportError:
        raise DelveError(f"{file}: needs PyTorch to be read, pip install torch") from None
    return torch


class Safetensors:
    """One .safetensors file."""

    mapped = True

    def __init__(self, file: Path):
        self.file = file

    def entries(self) -> list[Entry]:
        """All tensors; the library checks that header and file fit."""
        from safetensors import SafetensorError, safe_open

        try:
            handle, out = safe_open(self.file, framework="numpy"), []
        except (OSError, SafetensorError, ValueError) as err:
            raise DelveError(
                f"{self.file}: truncated or damaged file ({_one_line(err)}), fetch it again"
            ) from None
        for key in handle.keys():
            part = handle.get_slice(key)
            kind = part.get_dtype()
            dtype = SAFE_DTYPES.get(kind)
            out.append(Entry(key, key, self.file, tuple(part.get_shape()), dtype, kind))
        return out

    def open(self) -> dict:
        """Arrays of the mapped file (the library would copy each tensor once more)."""
        with self.file.open("rb") as handle:
            (size,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(size))
        raw, arrays = np.memmap(self.file, np.uint8, "r", 8 + size), {}
        for key, entry in header.items():
            if dtype := SAFE_DTYPES.get(entry.get("dtype")):
                start, end = entry["data_offsets"]
                arrays[key] = raw[start:end].view(np.ndarray).view(dtype).reshape(entry["shape"])
        return arrays

    @staticmethod
    def read(handle, key: str, index: tuple[slice, ...]) -> np.ndarray:
        return handle[key][index]


class TorchFile:
    """One .bin or .pth file of tensors; never unpickles anything else (weights_only)."""

    def __init__(self, file: Path):
        self.file = file
        with file.open("rb") as handle:  # files of torch < 1.6 are no zip: they are read whole
            self.mapped = handle.read(4) == b"PK\x03\x04"

    def open(self) -> dict:
        import pickle

        torch = _torch(self.file)
        mmap = True if self.mapped else None
        try:
            tensors = torch.load(self.file, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:
            raise DelveError(
                f"{self.file}: damaged, or holds more than tensors (refused); fetch it again"
            ) from None
        except (OSError, RuntimeError, EOFError, ValueError, KeyError) as err:
            raise DelveError(
                f"{self.file}: truncated or damaged file ({_one_line(err)}), fetch it again"
            ) from None
        if not isinstance(tensors, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in tensors.items()
        ):
            raise DelveError(f"{self.file}: a flat dictionary of tensors is expected")
        return tensors

    def entries(self) -> list[Entry]:
        out = []
        for key, tensor in self.open().items():
            kind = str(tensor.dtype).removeprefix("torch.")
            short = kind.replace("bfloat", "BF").replace("float", "F")
            out.append(
                Entry(key, key, self.file, tuple(tensor.shape), SAFE_DTYPES.get(short), kind)
            )
        return out

    @staticmethod
    def read(handle, key: str, index: tuple[slice, ...]) -> np.ndarray:
        import torch

        tensor = handle[key].detach()[index]
        if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16 of its own
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


class Source:
    """All tensors of a checkpoint, whatever its files: `tensors[name]`, `read(name, index)`."""

    def __init__(self, where: Path, files: list[Path]):
        self.where = where
        self.readers = {
            f: (Safetensors if f.suffix == ".safetensors" else TorchFile)(f) for f in files
        }
        self.tensors: dict[str, Entry] = {}
        self._open: tuple | None = None  # (file, handle): one file at a time
        self._seen = 0
        self._lock = threading.Lock()
        for reader in self.readers.values():
            for entry in reader.entries():
                if entry.name in self.tensors:
                    other = self.tensors[entry.name].file.name
                    raise DelveError(f"{entry.file}: tensor {entry.name} is also in {other}")
                self.tensors[entry.name] = entry

    def rename(self, canonical) -> None:
        """Rename every tensor by `canonical(name) -> name`, None to drop it."""
        out: dict[str, Entry] = {}
        for name, entry in self.tensors.items():
            new = canonical(name)
            if new is None:
                continue
            if new in out:
                raise DelveError(
                    f"{entry.file}: tensors {out[new].key} and {name} are the same map"
                )
            out[new] = dataclasses.replace(entry, name=new)
        self.tensors = out

    def whole_file_bytes(self) -> int:
        """Host memory of files that cannot be mapped and are therefore read whole."""
        return max((f.stat().st_size for f, r in self.readers.items() if not r.mapped), default=0)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A slice of a tensor in its stored dtype, mapped where that can be; of any thread."""
        with self._lock:
            return self._read(self.tensors[name], index)

    def _read(self, entry: Entry, index: tuple[slice, ...]) -> np.ndarray:
        reader = self.readers[entry.file]
        again = self._open is None or self._open[0] != entry.file
        try:
            if again or self._seen > WINDOW and reader.mapped:
                self._open = None  # drop the old mapping before making the new one
                self._open, self._seen = (entry.file, reader.open()), 0
            piece = reader.read(self._open[1], entry.key, index)
        except DelveError:
            raise
        except Exception as err:
            raise DelveError(
                f"{entry.file}: tensor {entry.key} cannot be read ({_one_line(err)})"
            ) from None
        self._seen += piece.nbytes
        return piece

    def close(self) -> None:
        self._open = None


def _shards(path: Path, stem: str, ext: str) -> list[Path]:
    """The files of one format in `path`, complete or refused; [] where the format is absent."""
    index = path / f"{stem}{ext}.index.json"
    single = path / f"{stem}{ext}"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DelveError(f"{index}: field 'weight_map' is missing")
        names = sorted({str(v) for v in weight_map.values()})
        if bad := [n for n in names if Path(n).name != n]:
            raise DelveError(f"{index}: shard '{bad[0]}' is not a plain file name")
    else:
        found = sorted(path.glob(f"{stem}-*-of-*{ext}"))
        if not found:
            return []
        match = re.fullmatch(r".*-of-(\d+)", found[0].name.removesuffix(ext))
        total = int(match.group(1)) if match else len(found)
        names = [f"{stem}-{i + 1:05d}-of-{total:05d}{ext}" for i in range(total)]
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise DelveError(
            f"{path / missing[0]}: missing, {len(missing)} of {len(names)} shards are not there"
        )
    return [path / name for name in names]


def weight_files(path: Path) -> list[Path]:
    """The weight files of a Hugging Face directory; safetensors win over .bin."""
    for stem, ext in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if files := _shards(path, stem, ext):
            return files
    raise DelveError(f"{path}: no model*.safetensors and no pytorch_model*.bin in this directory")


def write_safetensors(folder: Path, specs: list[tuple], tensor, shard_bytes: int = SHARD_BYTES):
    """Stream tensors into `folder` as one file, or several with an index.

    specs: (name, shape, dtype) in file order; tensor(name) -> array of that shape and dtype, asked
    for once, one at a time.
    """
    shards: list[list[tuple]] = [[]]
    used = 0
    for name, shape, dtype in specs:
        size = math.prod(shape) * dtype.itemsize
        if used and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, shape, dtype, size))
        used += size
    total, weight_map = len(shards), {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if total > 1:
            file = f"model-{number:05d}-of-{total:05d}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0  # transformers insists on the format
        for name, shape, dtype, size in shard:
            header[name] = {
                "dtype": SAFE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [at, at + size],
            }
            weight_map[name], at = file, at + size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            for name, shape, dtype, _ in shard:
                x = np.ascontiguousarray(tensor(name))
                assert x.shape == tuple(shape) and x.dtype == dtype, (name, x.shape, x.dtype)
                out.write(x.reshape(-1).view(np.uint8).data)
    if total > 1:
        size = sum(s[3] for shard in shards for s in shard)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
