"""Frozen configurations: one dataclass per model family, to and from JSON.

What is factored, and at which rank, is data here (`ranks`); the modules read it, nothing else does.
Letters (V, D, L, E, ...) are those of `delve_jax.models`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

Ranks = tuple[tuple[str, tuple[int, ...]], ...]
DTYPES = ("float32", "bfloat16", "float16", "float64")
STORAGES = ("uv", "pivot", "int8")  # forms of a factored map, see `models.linear`


class DelveError(Exception):
    """Bad input: one line that names the file, tensor, field or flag and the way out (exit 2).

    >>> import delve_jax
    >>> delve_jax.load("/nowhere")
    Traceback (most recent call last):
    delve_jax.config.DelveError: /nowhere: ...
    """


class Factored(NamedTuple):
    """How one factored map of a stack is held: what its modules must know to declare it."""

    rank: int  # K, the largest true rank (or 1): all layers are padded to it
    least: int  # the smallest true rank
    storage: str = "uv"


@dataclass(frozen=True)
class ParentConfig:
    """What every parent family shares; V = `vocab_size` valid ids of `vocab_rows` stored rows."""

    vocab_size: int  # V: ids the tokenizer can produce; logits are cut to these
    vocab_rows: int  # stored embedding rows, >= V (checkpoints pad)
    d_model: int  # D
    n_layers: int  # L
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    context_length: int = 2048  # length of the training windows
    ranks: Ranks = ()  # map name -> true rank per layer; a missing name is dense
    storage: str = "uv"  # form of all factored maps: uv, or made after training pivot or int8
    neurons: tuple[int, ...] = ()  # true F of each layer, d_ffn the largest (or 1); (): d_ffn
    nested: Ranks = ()  # sizes of the best model of half the size inside: ranks by map, "neurons"
    dtype: str = "float32"  # dtype of the source's tensors
    hf_config: str = ""  # the source's config.json, verbatim: the way back
    family: ClassVar[str] = ""

    def rank(self, name: str) -> tuple[int, ...] | None:
        """True rank of the map `name` in each layer, or None where it is dense."""
        return dict(self.ranks).get(name)

    def factored(self, name: str) -> Factored | None:
        """How the stacked factors of `name` are held (None: dense)."""
        ranks = self.rank(name)
        return None if ranks is None else Factored(max(1, *ranks), min(ranks), self.storage)


@dataclass(frozen=True)
class MambaConfig(ParentConfig):
    """Mamba-1 (arXiv 2312.00752)."""

    d_inner: int = 0  # E
    d_state: int = 16  # N
    d_conv: int = 4  # W
    dt_rank: int = 0  # R
    use_bias: bool = False
    use_conv_bias: bool = True
    family: ClassVar[str] = "mamba"


@dataclass(frozen=True)
class RwkvConfig(ParentConfig):
    """RWKV-4 (arXiv 2305.13048)."""

    d_att: int = 0  # A
    d_ffn: int = 0  # F
    family: ClassVar[str] = "rwkv"


@dataclass(frozen=True)
class NeoxConfig(ParentConfig):
    """GPT-NeoX: Pythia (parallel residual, partial rotary), INCITE (sequential, full rotary)."""

    n_heads: int = 0  # H
    d_ffn: int = 0  # F
    rotary_pct: float = 0.25
    rotary_base: float = 10000.0
    parallel_residual: bool = True
    use_bias: bool = True  # biases of the attention maps; MLP and norms always have theirs
    family: ClassVar[str] = "neox"


class RopeScaling(NamedTuple):
    """Llama 3's scaling of rotary frequencies: `original` is the length before it, in tokens."""

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True)
class Qwen3Config(ParentConfig):
    """Qwen3 (arXiv 2505.09388), QK-norm included; the architecture of the Delphi models."""

    n_heads: int = 0  # H
    n_kv_heads: int = 0  # G, divides H
    head_dim: int = 0  # h
    d_ffn: int = 0  # F
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    family: ClassVar[str] = "qwen3"


@dataclass(frozen=True)
class DelveConfig:
    """K parents in one widened residual stream (pooled head with J latents, low-rank hub)."""

    streams: tuple[tuple[str, ParentConfig], ...]
    n_superblocks: int  # S; the hub acts before each but the first
    latents: int = 1  # J: 1 = log-linear pool, K = probability mixture, between: J pools mixed
    connectors: str = "none"  # what a stream hears: "none", "hub" all, "cross" others, "self"
    hub_rank: int = 8
    gate_proj: int = 32
    gate_hidden: int = 64
    ffn_skip: float = 0.0  # a token does without an FFN whose router gives it less; 0: no routers
    codes: tuple[str, ...] = ()  # tables (embed, head) that the streams have in common, factored
    teachers: tuple[str, ...] = ()  # where each stream's dense parent came from
    dtype: str = "float32"
    family: ClassVar[str] = "delve"

    @property
    def vocab_size(self) -> int:
        return self.streams[0][1].vocab_size

    @property
    def vocab_rows(self) -> int:
        return self.vocab_size

    @property
    def context_length(self) -> int:
        return min(cfg.context_length for _, cfg in self.streams)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.streams)


Config = ParentConfig | DelveConfig
FAMILIES = {c.family: c for c in (MambaConfig, RwkvConfig, NeoxConfig, Qwen3Config, DelveConfig)}


def to_json(cfg: Config) -> dict:
    """A config as plain JSON values, with its `family`."""
    out: dict = {"family": cfg.family}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in ("ranks", "nested"):
            value = {name: list(ranks) for name, ranks in value}
        elif field.name == "streams":
            value = [{"name": name, **to_json(sub)} for name, sub in value]
        elif isinstance(value, tuple):
            value = list(value)
        out[field.name] = value
    return out


def from_json(data: dict, where: str = "config.json") -> Config:
    """The config that `to_json` wrote; `where` names the file in errors."""
    data = dict(data)
    cls = FAMILIES.get(str(data.pop("family", None)))
    if cls is None:
        raise DelveError(f"{where}: field 'family' must be one of {', '.join(FAMILIES)}")
    names = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - names):
        raise DelveError(f"{where}: unknown field '{unknown[0]}' for family {cls.family}")
    if data.get("storage", "uv") not in STORAGES:
        raise DelveError(f"{where}: field 'storage' must be one of {', '.join(STORAGES)}")
    for field in dataclasses.fields(cls):
        parse, form = _FORMS.get(field.type, (None, ""))
        if parse and field.name in data:
            try:
                data[field.name] = parse(data[field.name])
            except (AttributeError, TypeError):
                raise DelveError(f"{where}: field '{field.name}' must be {form}") from None
    _check_sizes(cls, data, where)
    if "streams" in data:
        data["streams"] = _streams(data["streams"], where)
    neurons, layers, width = data.get("neurons"), data.get("n_layers"), data.get("d_ffn")
    if neurons and (width is None or len(neurons) != layers or max(1, *neurons) != width):
        raise DelveError(
            f"{where}: field 'neurons' must name one MLP width for each of the {layers} layers, "
            f"the largest of them d_ffn ({width})"
        )
    for name, ranks in data.get("ranks", ()):
        if len(ranks) not in (1, layers) or min(ranks) < 0:  # 1: a map outside the layers
            raise DelveError(
                f"{where}: field 'ranks' gives '{name}' {list(ranks)}; it must be one rank of at "
                f"least 0 for each of the {layers} layers"
            )
    full = dict(data.get("ranks", ())) | {"neurons": neurons or ()}
    for name, sizes in data.get("nested", ()):
        most = full.get(name, ())
        if len(sizes) != len(most) or not all(map(lambda a, b: 0 <= a <= b, sizes, most)):
            raise DelveError(
                f"{where}: field 'nested' gives '{name}' the sizes {list(sizes)}, the model "
                f"has {list(most)}; leave the field out to shrink all ranks alike"
            )
    try:
        return cls(**data)
    except TypeError as err:  # a field without a default is missing
        raise DelveError(f"{where}: {err}") from None


def _check_sizes(cls: type, data: dict, where: str) -> None:
    """DelveError: sizes, map names or a dtype that no model of this family can have."""
    ints = [field.name for field in dataclasses.fields(cls) if field.type == "int"]
    least = dict.fromkeys(ints, 1)
    if cls is DelveConfig:
        least |= {"hub_rank": 0, "gate_proj": 0, "gate_hidden": 0}  # without a hub, without a gate
    for name in ints:
        if data.get(name, least[name]) < least[name]:
            raise DelveError(f"{where}: field '{name}' is {data[name]}; at least {least[name]}")
    rows = data.get("vocab_rows", 0)
    if "vocab_rows" in data and data.get("vocab_size", 0) > rows:
        raise DelveError(f"{where}: field 'vocab_size' is more than vocab_rows, {rows}")
    for whole, part in (("d_model", "n_heads"), ("n_heads", "n_kv_heads")):
        apart = part == "n_heads" and "head_dim" in data  # Qwen3's heads need not make up d_model
        if not apart and part in data and data.get(whole, 0) % data[part]:
            raise DelveError(f"{where}: field '{part}' must divide {whole}, {data[whole]}")
    if data.get("dtype", "float32") not in DTYPES:
        raise DelveError(f"{where}: field 'dtype' must be one of {', '.join(DTYPES)}")
    if data.get("ranks"):
        from .models import FAMILY

        maps = (*FAMILY[cls.family].FACTORABLE, "embed", "head")
        if unknown := [name for name, _ in data["ranks"] if name not in maps]:
            raise DelveError(
                f"{where}: field 'ranks' has '{unknown[0]}'; maps of {cls.family} are "
                f"{', '.join(maps)}"
            )


def _of(value, *kinds: type):
    """`value`, of one of these types; true and false are no numbers. TypeError: it is not."""
    if type(value) not in kinds:
        raise TypeError
    return value


def _list(value, *kinds: type) -> tuple:
    return tuple(_of(item, *kinds) for item in _of(value, list, tuple))


_FORMS = {  # annotation of a field -> (its value from JSON's, what it must be)
    "int": (lambda v: _of(v, int), "a whole number"),
    "float": (lambda v: _of(v, int, float), "a number"),
    "bool": (lambda v: _of(v, bool), "true or false"),
    "str": (lambda v: _of(v, str), "a string"),
    "tuple[int, ...]": (lambda v: _list(v, int), "a list of whole numbers"),
    "tuple[str, ...]": (lambda v: _list(v, str), "a list of strings"),
    "Ranks": (
        lambda v: tuple((name, _list(sizes, int)) for name, sizes in v.items()),
        "an object: for each map a list of whole numbers",
    ),
    "RopeScaling | None": (
        lambda v: v if v is None else RopeScaling(*_list(v, int, float)), "four numbers or null",
    ),
}  # fmt: skip


def _streams(value, where: str) -> tuple[tuple[str, ParentConfig], ...]:
    """(name, config) of each parent in a DELVE."""
    try:
        rows = [dict(row) for row in _of(value, list)]
        names = [_of(row.pop("name"), str) for row in rows]
    except (KeyError, TypeError, ValueError):
        names = []
    if not names:
        raise DelveError(f"{where}: field 'streams' must be a list of parents, each with a 'name'")
    return tuple((name, from_json(row, where)) for name, row in zip(names, rows, strict=True))


def read_json(path: str | Path) -> dict:
    """A JSON object from a file; DelveError names the file where it is missing or damaged."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DelveError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise DelveError(f"{path}: not readable as JSON ({err})") from None
    if not isinstance(data, dict):
        raise DelveError(f"{path}: a JSON object is expected")
    return data


def write_json(path: str | Path, value: dict, indent: int | None = None) -> None:
    """The JSON of `value`, written aside and renamed: a file of this name is always whole."""
    path = Path(path)
    half = path.with_name(path.name + ".writing")
    half.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    half.replace(path)
