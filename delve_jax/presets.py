"""Configurations by name: the parents at their real shapes, the DELVE tiers, proxies, Delphi.

Shapes from the parents' config.json and Delphi's published recipe (design notes, parents.md section
1, hybrid.md section 2, delphi.md sections 1 and 5). Nothing is allocated or read here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable

from . import compress, fuse
from .config import (
    Config,
    DelveConfig,
    DelveError,
    MambaConfig,
    NeoxConfig,
    ParentConfig,
    Qwen3Config,
    RopeScaling,
    RwkvConfig,
)
from .delphi.recipe import DELPHI, Recipe

V = 50277  # ids of the GPT-NeoX-20B tokenizer; checkpoints pad their tables beyond
RANK_STEP = 32  # ranks that matrix units fill, and that meshes of as many devices divide


def _mamba(d: int, layers: int, rows: int = 50280) -> MambaConfig:
    return MambaConfig(
        V, rows, d, layers, tie_embeddings=True, d_inner=2 * d, dt_rank=math.ceil(d / 16)
    )


def _rwkv(d: int, layers: int) -> RwkvConfig:
    return RwkvConfig(V, V, d, layers, context_length=1024, d_att=d, d_ffn=4 * d)


def _neox(d: int, layers: int, heads: int, rows: int = 50304, **more) -> NeoxConfig:
    return NeoxConfig(V, rows, d, layers, dtype="float16", n_heads=heads, d_ffn=4 * d, **more)


def _incite() -> NeoxConfig:
    """Pythia's names and shapes, but one sub-layer after the other and rotary over all dims."""
    return _neox(4096, 32, 32, 50432, rotary_pct=1.0, parallel_residual=False)


def delphi(width: int, recipe: Recipe = DELPHI) -> Qwen3Config:
    """Delphi of any width that is a multiple of the head's: the width sets everything else."""
    if width < recipe.head_dim or width % recipe.head_dim:
        raise DelveError(
            f"preset delphi-{width}: the width must be a multiple of {recipe.head_dim}"
        )
    heads = recipe.heads(width)
    return Qwen3Config(
        recipe.vocab_size,
        recipe.vocab_size,
        width,
        recipe.layers(width),
        context_length=recipe.seq_len,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=recipe.head_dim,
        d_ffn=recipe.mlp_ratio * width,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    )


# of the 81 runs of the scaling study and of the three held-out budgets (2560, 3840, 5376)
DELPHI_WIDTHS = (*range(512, 2305, 128), *range(2560, 4097, 256), 5376)


def proxy(name: str) -> ParentConfig:
    """A proxy parent that the package embeds (experiments/proxies.py trained it)."""
    d, shared = 128, {"vocab_size": 3840, "vocab_rows": 3840, "d_model": 128}
    shared |= {"context_length": 256, "dtype": "float16"}
    if name == "mamba":
        return MambaConfig(
            **shared, n_layers=6, d_inner=2 * d, dt_rank=d // 16, tie_embeddings=True
        )
    if name == "rwkv":
        return RwkvConfig(**shared, n_layers=3, d_att=d, d_ffn=3 * d)
    if name == "neox":
        return NeoxConfig(**shared, n_layers=3, n_heads=4, d_ffn=4 * d)
    return NeoxConfig(
        **shared, n_layers=3, n_heads=4, d_ffn=3 * d, rotary_pct=1.0, parallel_residual=False
    )


# tier -> stream -> preset of its parent
TIERS = {
    "delve-0.4b": {"mamba": "mamba-370m", "rwkv": "rwkv-4-430m", "pythia": "pythia-410m"},
    "delve-1.4b": {
        "mamba": "mamba-1.4b", "rwkv": "rwkv-4-1b5", "pythia": "pythia-1.4b",
        "pythia-1b": "pythia-1b",
    },
    "delve-7b": {"mamba": "mamba-7b-rw", "rwkv": "rwkv-4-7b", "incite": "redpajama-incite-7b"},
    # every parent of the model card: widths 128 to 4096, depths 6 to 64, several of each family
    "delve-all": {n: n for n in (
        "mamba-370m", "mamba-1.4b", "mamba-7b-rw", "rwkv-4-430m", "rwkv-4-1b5", "rwkv-4-7b",
        "pythia-14m", "pythia-31m", "pythia-410m", "pythia-1b", "pythia-1.4b",
        "redpajama-incite-7b",
    )},
}  # fmt: skip


def tier(name: str, keep: float = 0.5) -> DelveConfig:
    """A DELVE tier: every parent within `keep` of all its parameters, one rank for all layers.

    Ranks are those of `compress.plan_for`, rounded down to multiples of RANK_STEP (of twice it at
    widths from 2048), at least one.
    """
    return fuse.joint_config([(s, _uniform(preset(of), keep)) for s, of in TIERS[name].items()])


def _uniform(cfg: ParentConfig, keep: float) -> ParentConfig:
    plan, _ = compress.plan_for(cfg, keep=keep)
    step = RANK_STEP * (2 if cfg.d_model >= 2048 else 1)  # wide parents go on larger meshes
    ranks = {name: (max(1, min(r) // step) * step,) * len(r) for name, r in plan.ranks.items()}
    return dataclasses.replace(cfg, vocab_rows=cfg.vocab_size, ranks=tuple(ranks.items()))


PRESETS: dict[str, Callable[[], Config]] = {
    "mamba-370m": functools.partial(_mamba, 1024, 48),
    "mamba-1.4b": functools.partial(_mamba, 2048, 48),
    "mamba-7b-rw": functools.partial(_mamba, 4096, 64, 50432),
    "rwkv-4-430m": functools.partial(_rwkv, 1024, 24),
    "rwkv-4-1b5": functools.partial(_rwkv, 2048, 24),
    "rwkv-4-7b": functools.partial(_rwkv, 4096, 32),
    "pythia-14m": functools.partial(_neox, 128, 6, 4),
    "pythia-31m": functools.partial(_neox, 256, 6, 8),
    "pythia-410m": functools.partial(_neox, 1024, 24, 16),
    "pythia-1b": functools.partial(_neox, 2048, 16, 8),
    "pythia-1.4b": functools.partial(_neox, 2048, 24, 16),
    "redpajama-incite-7b": _incite,
    **{name: functools.partial(tier, name) for name in TIERS},
    **{f"proxy-{n}": functools.partial(proxy, n) for n in ("mamba", "rwkv", "neox", "incite")},
    **{f"delphi-{width}": functools.partial(delphi, width) for width in DELPHI_WIDTHS},
}


def preset(name: str, keep: float | None = None) -> Config:
    """The configuration of this name; keep: of the DELVE tiers, the kept share of each parent.

    delphi-N is one for every multiple N of the head's width, beyond those that are listed.
    """
    if keep is None and name not in PRESETS and re.fullmatch(r"delphi-[1-9]\d{0,5}", name):
        return delphi(int(name.removeprefix("delphi-")))
    if name not in PRESETS:
        raise DelveError(f"preset {name}: unknown; there are {', '.join(PRESETS)}")
    if keep is None:
        return PRESETS[name]()
    if name not in TIERS:
        raise DelveError(f"preset {name}: --keep is for the DELVE tiers, {', '.join(TIERS)}")
    return tier(name, keep)
