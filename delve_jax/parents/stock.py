"""Stock checkpoints in both directions: HF directory or `.pth` -> (config, params), and back.

Reading streams tensor by tensor into stacked, sharded arrays: peak host memory is the model in its
target dtype plus two tensors plus 1 GiB. The way back is bit-exact, written one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import SingleDeviceSharding

from .. import checkpoint, models, parallel
from ..config import Config, DelveError, ParentConfig, read_json
from . import mamba, neox, qwen3, rwkv
from .io import SAFE_NAMES, SHARD_BYTES, Source, weight_files, write_safetensors
from .rows import Fields, Row, copy, finite

FAMILIES = {"mamba": mamba, "rwkv": rwkv, "neox": neox, "qwen3": qwen3}
READERS = 2  # layers of a stacked array that are copied at a time
MODEL_TYPES = {module.MODEL_TYPE: name for name, module in FAMILIES.items()}
DTYPES = {np.dtype(t).name: np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)}


def family_of(raw: dict, where: str) -> str:
    """Our family name of a raw config.json."""
    kind = raw.get("model_type")
    if kind is None:  # very old files name the class alone
        classes = {module.ARCHITECTURE: m for m, module in FAMILIES.items()}
        named = [classes[a] for a in raw.get("architectures") or [] if a in classes]
        if named:
            return named[0]
    if kind not in MODEL_TYPES:
        hint = " (of state-spaces, take the '-hf' repository)" if "ssm_cfg" in raw else ""
        raise DelveError(
            f"{where}: field 'model_type' = {kind!r} is unknown, one of "
            f"{', '.join(MODEL_TYPES)} is expected{hint}"
        )
    return MODEL_TYPES[kind]


def dense_parents(cfg: Config) -> tuple[ParentConfig, ...]:
    """The dense parents of a DELVE, or of a compressed parent, with valid vocabulary rows only.

    Of pruned MLPs and untied tables the source's own config file knows what they were.
    """
    parts = [sub for _, sub in cfg.streams] if cfg.family == "delve" else [cfg]
    return tuple(_dense(sub) for sub in parts)


def _dense(cfg: ParentConfig) -> ParentConfig:
    dense = dataclasses.replace(cfg, ranks=(), neurons=(), nested=())
    if not cfg.hf_config:
        return dense
    family, raw = FAMILIES[cfg.family], json.loads(cfg.hf_config)
    source = family.config(raw, "config.json", vocab_size=cfg.vocab_size, vocab_rows=cfg.vocab_rows)
    if cfg.neurons:
        dense = dataclasses.replace(dense, d_ffn=source.d_ffn)
    if cfg.rank("head") is not None:  # factored: a tied table may have been untied for it
        tied = raw.get("tie_word_embeddings", family.TIED_BY_DEFAULT)
        dense = dataclasses.replace(dense, tie_embeddings=tied)
    return dense


def tokenizer_size(text: str, where: str) -> int:
    """Ids that a tokenizer.json can produce, added tokens included: 1 + the largest."""
    from tokenizers import Tokenizer

    try:
        vocab = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception as err:  # the library raises bare Exception
        reason = " ".join(str(err).split())[:120]
        raise DelveError(f"{where}: not a readable tokenizer ({reason})") from None
    return 1 + max(vocab.values(), default=-1)


def _same(source: Source, one: str, other: str) -> bool:
    """Whether two stored matrices are bit for bit the same, compared in blocks of rows."""
    a, b = source.tensors[one], source.tensors[other]
    if a.shape != b.shape or a.dtype != b.dtype or a.dtype is None or len(a.shape) != 2:
        return False
    step = max(1, 64 * 2**20 // max(1, a.shape[1] * a.dtype.itemsize))
    for start in range(0, a.shape[0], step):
        index = (slice(start, min(start + step, a.shape[0])), slice(None))
        if source.read(one, index).tobytes() != source.read(other, index).tobytes():
            return False
    return True


def check(source: Source, rows: list[Row], n_layers: int) -> None:
    """Every expected tensor there in its shape, nothing else; all problems in one DelveError."""
    expected = {}
    for row in rows:
        for i in range(n_layers) if row.stacked else (0,):
            expected[row.name.format(i=i)] = row.shape
    found = source.tensors
    bad = [f"missing {n} {s}" for n, s in expected.items() if n not in found]
    bad += [f"unknown {n} {e.shape}" for n, e in found.items() if n not in expected]
    for name in expected.keys() & found.keys():
        entry = found[name]
        if entry.shape != expected[name]:
            bad.append(f"{name} is {entry.shape}, config says {expected[name]}")
        elif entry.dtype is None:
            bad.append(f"{name} has dtype {entry.kind}, which is not supported")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DelveError(f"{source.where}: tensors do not fit: {'; '.join(bad[:3])}{more}")


def describe(path: Path) -> tuple[Source, ParentConfig, str | None]:
    """Open a stock source and read everything but the weights: (source, config, tokenizer)."""
    folder = path if path.is_dir() else path.parent
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DelveError(f"{folder / 'tokenizer.json'}: not UTF-8 text") from None
    if path.is_dir():
        where, text = str(path / "config.json"), ""
        raw = read_json(path / "config.json")
        text = (path / "config.json").read_text(encoding="utf-8")
        name = family_of(raw, where)
        source = Source(path, weight_files(path))
        source.rename(FAMILIES[name].canonical)
    else:
        where, text, name = str(path), "", "rwkv"
        source = Source(path, [path])
        source.rename(rwkv.canonical)
        rwkv.check_names(source.tensors, where)
        raw = rwkv.from_tensors(source.tensors, where)
    family = FAMILIES[name]
    family.check_names(source.tensors, str(path))

    table = source.tensors.get(family.EMBED)
    tied = Fields(raw, where).get("tie_word_embeddings", bool, family.TIED_BY_DEFAULT)
    if tied and table and family.HEAD in source.tensors:  # the mamba-7b-rw trap: compare, decide
        tied = _same(source, table.name, family.HEAD)
        if tied:
            del source.tensors[family.HEAD]
        else:  # the config that is handed on says what is so: `dense_parents` reads it
            text = json.dumps({**raw, "tie_word_embeddings": False})
    stored = Fields(raw, where).get("vocab_size", int)
    valid = stored
    if tokenizer is not None:
        valid = tokenizer_size(tokenizer, str(folder / "tokenizer.json"))
        if valid > stored:
            raise DelveError(
                f"{folder / 'tokenizer.json'}: {valid} ids, but the embedding has {stored} rows"
            )
    cfg = family.config(
        raw,
        where,
        vocab_size=valid,
        vocab_rows=stored,
        tie_embeddings=tied,
        dtype=table.dtype.name if table and table.dtype else "float32",
        hf_config=text,
    )
    check(source, family.rows(cfg), cfg.n_layers)
    if not text:
        cfg = dataclasses.replace(cfg, hf_config=json.dumps(hf_config(cfg, cfg.dtype)))
    return source, cfg, tokenizer


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary, which a CPU device takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _target(row: Row, stored: np.dtype, asked: np.dtype | None) -> np.dtype:
    """The dtype a tensor is kept in: its own, or the asked one where that is safe."""
    if asked is None:
        return np.dtype(np.float32) if stored == np.float64 else stored
    return models.kept_dtype(row.path, stored, asked)


def _reader(source: Source, row: Row, n_layers: int, dtype: np.dtype) -> Callable:
    """callback(index) for jax.make_array_from_callback: one device's part of a stacked array."""

    def fill(out: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
        piece = source.read(name, row.theirs_index(index))
        with np.errstate(over="ignore"):
            copy(out, row.to_ours(piece))
        if not finite(out):
            file = source.tensors[name].file
            if not np.isfinite(piece).all():
                raise DelveError(f"{file}: tensor {name} holds NaN or Inf")
            raise DelveError(f"{file}: tensor {name} overflows {dtype}, take --dtype bfloat16")

    def callback(index: tuple[slice, ...]) -> np.ndarray:
        shape = (n_layers, *row.ours) if row.stacked else row.ours
        spans = [s.indices(n) for s, n in zip(index, shape, strict=True)]
        out = _aligned(tuple(stop - start for start, stop, _ in spans), dtype)
        inner = tuple(slice(start, stop) for start, stop, _ in spans)
        if not row.stacked:
            fill(out, row.name, inner)
            return out
        layers = range(*spans[0][:2])
        # numpy copies without the interpreter's lock: two cores are faster than one
        with ThreadPoolExecutor(READERS) as pool:
            names = (row.name.format(i=layer) for layer in layers)
            list(pool.map(fill, out, names, [inner[1:]] * len(layers)))
        return out

    return callback


def load_stock(path: Path, dtype: str | None = None, mesh=None):
    """-> (cfg, params, tokenizer_json or None), arrays sharded over `mesh`; see `parents.load`."""
    if dtype is not None and dtype not in DTYPES:
        raise DelveError(f"--dtype {dtype}: one of {', '.join(DTYPES)} is expected")
    source, cfg, tokenizer = describe(path)
    family, plan = FAMILIES[cfg.family], {}
    for row in family.rows(cfg):
        names = [row.name.format(i=i) for i in range(cfg.n_layers if row.stacked else 1)]
        stored = max((source.tensors[n].dtype for n in names), key=lambda t: t.itemsize)
        kept = _target(row, stored, DTYPES[dtype] if dtype else None)
        shape = (cfg.n_layers, *row.ours) if row.stacked else row.ours
        plan[row.path] = (row, jax.ShapeDtypeStruct(shape, kept))
    if cfg.dtype == "float64":
        warnings.warn(f"{path}: float64 weights are kept as float32", stacklevel=2)
        cfg = dataclasses.replace(cfg, dtype="float32")

    model = sum(leaf.size * leaf.dtype.itemsize for _, leaf in plan.values())
    tensor = max(
        int(np.prod(source.tensors[row.name.format(i=0)].shape))
        * source.tensors[row.name.format(i=0)].dtype.itemsize
        for row, _ in plan.values()
    )
    peak = model + READERS * tensor + source.whole_file_bytes() + 2**30
    print(
        f"{path}: {cfg.family}, {len(source.tensors)} tensors, {model / 2**30:.2f} GiB as "
        f"{dtype or cfg.dtype}; host memory at the peak at most {peak / 2**30:.2f} GiB",
        file=sys.stderr,
    )

    tree: dict = {}
    for path_, (_, leaf) in plan.items():
        _put(tree, path_, leaf)
    device = SingleDeviceSharding(jax.devices()[0])
    where = parallel.shardings(mesh, tree) if mesh is not None else None
    for path_, (row, leaf) in plan.items():
        sharding = device if where is None else _get(where, path_)
        callback = _reader(source, row, cfg.n_layers, np.dtype(leaf.dtype))
        _put(tree, path_, jax.make_array_from_callback(leaf.shape, sharding, callback))
    source.close()
    if cfg.family == "rwkv":
        norm = jax.jit(lambda x: jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=(1, 2))))
        layers = tree["layers"]
        sizes = [norm(leaf["kernel"]) for leaf in (layers["att"]["output"], layers["ffn"]["value"])]
        warn_rescaled(cfg, np.stack(sizes, 1), path)
    return cfg, tree, tokenizer


def warn_rescaled(cfg: ParentConfig, size_L2: np.ndarray, path: Path) -> None:
    """Transformers' eval forward halves late blocks in place; files saved after it are off.

    size_L2: norms of each layer's attention output and channel-mix value.
    """
    every = json.loads(cfg.hf_config).get("rescale_every", 6)
    edges = range(every, cfg.n_layers, every) if isinstance(every, int) and every > 0 else ()
    ratios = [size_L2[i] / np.maximum(size_L2[i - 1], 1e-30) for i in edges]
    if ratios and all(((r > 0.4) & (r < 0.65)).all() for r in ratios):
        warnings.warn(
            f"{path}: attention.output and feed_forward.value halve every {every} blocks: the file "
            "was probably saved after an eval forward of transformers (rescale_every), fetch the "
            "original", stacklevel=2,
        )  # fmt: skip


def _layer(x, i: int) -> np.ndarray:
    """Layer i of a stacked array on the host; on CPU devices without a copy or a compilation."""
    shards = getattr(x, "addressable_shards", ())
    if not shards or shards[0].device.platform != "cpu" or shards[0].data.shape[0] != x.shape[0]:
        return np.asarray(x[i])
    if shards[0].data.shape == x.shape:
        return np.asarray(shards[0].data)[i]
    out = np.empty(x.shape[1:], x.dtype)
    for shard in shards:
        out[shard.index[1:]] = np.asarray(shard.data)[i]
    return out


def _get(tree: dict, path: str):
    for part in path.split("/"):
        tree = tree[part]
    return tree


def _put(tree: dict, path: str, leaf) -> None:
    *parents, last = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = leaf


def hf_config(cfg: ParentConfig, dtype: str) -> dict:
    """The stock config.json: the source's own where there was one, with what has changed."""
    family = FAMILIES[cfg.family]
    raw = json.loads(cfg.hf_config) if cfg.hf_config else family.stock(cfg)
    raw |= {"architectures": [family.ARCHITECTURE], "model_type": family.MODEL_TYPE}
    raw["vocab_size"] = cfg.vocab_rows
    if cfg.neurons:
        raw["intermediate_size"] = cfg.d_ffn
    if raw.get("tie_word_embeddings", family.TIED_BY_DEFAULT) != cfg.tie_embeddings:
        raw["tie_word_embeddings"] = cfg.tie_embeddings
    spelled = [key for key in ("dtype", "torch_dtype") if key in raw]
    return raw | dict.fromkeys(spelled or ["torch_dtype"], dtype)


def _tokenizer_config(cfg: ParentConfig, raw: dict, tokenizer_json: str) -> dict:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    out = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": cfg.context_length,
        "clean_up_tokenization_spaces": False,
    }
    for key in ("bos", "eos", "pad"):
        number = raw.get(f"{key}_token_id")
        word = tokenizer.id_to_token(number) if isinstance(number, int) else None
        if word is not None:
            out[f"{key}_token"] = word
    return out


def export_stock(
    cfg: ParentConfig,
    params: dict,
    dst: str | Path,
    tokenizer_json: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a directory that plain transformers loads; factored maps are multiplied out (float64).

    Arrays keep their dtype, rows of the vocabulary stay as stored. Written to DST.partial first.
    """
    family = FAMILIES[cfg.family]
    owner, specs = {}, []
    for row in family.rows(cfg):
        for i in range(cfg.n_layers) if row.stacked else (0,):
            owner[row.name.format(i=i)] = (row, i)
    for name, (row, _) in owner.items():
        node = _get(params, row.path.rsplit("/", 1)[0]) if "/" in row.path else params
        leaf = node.get(row.path.rsplit("/", 1)[-1], node.get("v"))
        specs.append((name, row.shape, np.dtype(leaf.dtype)))
    if odd := [(n, d) for n, _, d in specs if d not in SAFE_NAMES]:
        raise DelveError(f"{dst}: tensor {odd[0][0]} has dtype {odd[0][1]}, cannot be exported")

    def tensor(name: str) -> np.ndarray:
        row, i = owner[name]
        base, last = row.path.rsplit("/", 1)
        node, pick = _get(params, base), (lambda x: _layer(x, i) if row.stacked else np.asarray(x))
        if last in node:
            return row.to_theirs(pick(node[last]))
        rank = cfg.rank(base.removeprefix("layers/"))[i]
        v_IK, u_KO = (pick(node[side]).astype(np.float64) for side in "vu")
        return row.to_theirs((v_IK[:, :rank] @ u_KO[:rank]).astype(node["v"].dtype))

    dtype = next(d.name for n, _, d in specs if owner[n][0].path.startswith("embed/"))
    raw = hf_config(cfg, dtype)
    with checkpoint.writing(dst, overwrite, fresh=True) as partial:
        write_safetensors(partial, specs, tensor, shard_bytes)
        if tokenizer_json is not None:
            (partial / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
            _write(partial / "tokenizer_config.json", _tokenizer_config(cfg, raw, tokenizer_json))
        ids = {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in raw}
        _write(partial / "generation_config.json", {"_from_model_config": True, **ids})
        _write(partial / "config.json", raw)
    return Path(dst)


def _write(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
