"""Mamba-1 as Hugging Face writes it (`model_type: mamba`): names, shapes, config, both ways."""

from __future__ import annotations

import math
import re

from ..config import DelveError, MambaConfig
from .rows import Fields, Row, linear

MODEL_TYPE = "mamba"
ARCHITECTURE = "MambaForCausalLM"
EMBED = "backbone.embeddings.weight"
HEAD = "lm_head.weight"
TIED_BY_DEFAULT = True
PAPER = ("Mamba", "2312.00752")


def canonical(name: str) -> str | None:
    """The Hugging Face name of a legacy one."""
    return name.replace("backbone.embedding.weight", "backbone.embeddings.weight")


def check_names(names, where: str) -> None:
    """mamba-7b-rw's trap: LayerNorm weights under a config that says RMSNorm."""
    for name in names:
        if re.fullmatch(r"backbone\.(layers\.\d+\.norm|norm_f)\.bias", name):
            raise DelveError(
                f"{where}: tensor {name} means LayerNorm, but mamba is RMSNorm; not convertible"
            )


def config(raw: dict, where: str, **common) -> MambaConfig:
    """config.json -> MambaConfig; keys of the original non-HF code are ignored."""
    f = Fields(raw, where)
    f.only("hidden_act", "silu", "swish")
    d = f.get("hidden_size", int)
    rank = raw.get("time_step_rank", "auto")
    return MambaConfig(
        d_model=d,
        n_layers=f.get("num_hidden_layers", int),
        norm_eps=f.get("layer_norm_epsilon", float, 1e-5),
        context_length=f.get("max_position_embeddings", int, 2048),  # not an HF key: Pile training
        d_inner=f.get("intermediate_size", int, int(f.get("expand", float, 2) * d)),
        d_state=f.get("state_size", int, 16),
        d_conv=f.get("conv_kernel", int, 4),
        dt_rank=math.ceil(d / 16) if rank == "auto" else f.get("time_step_rank", int),
        use_bias=f.get("use_bias", bool, False),
        use_conv_bias=f.get("use_conv_bias", bool, True),
        **common,
    )


def stock(cfg: MambaConfig) -> dict:
    """A stock config.json for weights that came without one."""
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "intermediate_size": cfg.d_inner,
        "expand": max(1, cfg.d_inner // cfg.d_model),  # intermediate_size wins
        "state_size": cfg.d_state,
        "conv_kernel": cfg.d_conv,
        "time_step_rank": cfg.dt_rank,
        "use_bias": cfg.use_bias,
        "use_conv_bias": cfg.use_conv_bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": cfg.norm_eps,
        "residual_in_fp32": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def rows(cfg: MambaConfig) -> list[Row]:
    """Every tensor of the family."""
    d, e, n, r = cfg.d_model, cfg.d_inner, cfg.d_state, cfg.dt_rank
    at, mixer = "backbone.layers.{i}.", "backbone.layers.{i}.mixer."
    out = [
        Row("embed/kernel", "backbone.embeddings.weight", (cfg.vocab_rows, d)),
        Row("layers/norm/scale", at + "norm.weight", (d,)),
        *linear("layers/in_proj", mixer + "in_proj", d, 2 * e, cfg.use_bias),
        Row("layers/conv/kernel", mixer + "conv1d.weight", (e, 1, cfg.d_conv), transpose=True),
        *linear("layers/x_proj", mixer + "x_proj", e, r + 2 * n),
        *linear("layers/dt_proj", mixer + "dt_proj", r, e, True),
        Row("layers/A_log", mixer + "A_log", (e, n)),
        Row("layers/D", mixer + "D", (e,)),
        *linear("layers/out_proj", mixer + "out_proj", e, d, cfg.use_bias),
        Row("norm_f/scale", "backbone.norm_f.weight", (d,)),
    ]
    if cfg.use_conv_bias:
        out.append(Row("layers/conv/bias", mixer + "conv1d.bias", (e,)))
    if not cfg.tie_embeddings:
        out += linear("head", "lm_head", d, cfg.vocab_rows)
    return out
