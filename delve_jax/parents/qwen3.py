"""Qwen3 as Hugging Face writes it (`model_type: qwen3`): the Delphi models, Qwen3 itself.

Rotary fields come in two spellings (v4: rope_theta and rope_scaling, v5: rope_parameters).
"""

from __future__ import annotations

import re

from ..config import DelveError, Qwen3Config, RopeScaling
from .rows import Fields, Row, linear

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
TIED_BY_DEFAULT = False
PAPER = ("Qwen3", "2505.09388")

# fields of Llama 3's scaling, in the order of RopeScaling
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def canonical(name: str) -> str | None:
    """Names are the same in every version; rotary frequencies are no weights."""
    return None if name.endswith("rotary_emb.inv_freq") else name


def check_names(names, where: str) -> None:
    """Qwen2's projections have biases, ours have none: the weights say which of the two it is."""
    for name in names:
        if re.fullmatch(r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.bias", name):
            raise DelveError(f"{where}: tensor {name}: biases of attention are not supported")


def config(raw: dict, where: str, **common) -> Qwen3Config:
    """config.json -> Qwen3Config, both spellings of the rotary fields."""
    f = Fields(raw, where)
    f.only("hidden_act", "silu", "swish")
    f.only("attention_bias", False)
    f.only("use_sliding_window", False)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise DelveError(f"{where}: field 'rope_parameters' = {rope!r} is not an object")
    r = Fields({**raw, **rope}, where)
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind == "llama3":
        scaling = RopeScaling(*(r.get(n, float) for n in _SCALING[:3]), r.get(_SCALING[3], int))
    elif kind != "default":
        raise DelveError(
            f"{where}: field 'rope_type' = {kind!r} is not supported, only 'default' and 'llama3'"
        )
    heads = f.get("num_attention_heads", int, 32)
    groups = f.get("num_key_value_heads", int, heads)
    if heads % groups:
        raise DelveError(
            f"{where}: field 'num_attention_heads' = {heads} is no multiple of "
            f"{groups} key-value heads"
        )
    return Qwen3Config(
        d_model=f.get("hidden_size", int),
        n_layers=f.get("num_hidden_layers", int),
        norm_eps=f.get("rms_norm_eps", float, 1e-6),
        context_length=f.get("max_position_embeddings", int, 32768),
        n_heads=heads,
        n_kv_heads=groups,
        head_dim=f.get("head_dim", int, 128),
        d_ffn=f.get("intermediate_size", int),
        rope_theta=r.get("rope_theta", float, 10000.0),
        rope_scaling=scaling,
        **common,
    )


def stock(cfg: Qwen3Config) -> dict:
    """A stock config.json for weights that came without one; v4 spelling, which v5 reads too."""
    scaling = None
    if cfg.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **dict(zip(_SCALING, cfg.rope_scaling, strict=True))}
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.d_ffn,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.context_length,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": cfg.tie_embeddings,
    }


def rows(cfg: Qwen3Config) -> list[Row]:
    """Every tensor of the family."""
    d, at = cfg.d_model, "model.layers.{i}."
    q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    norm = lambda path, name, width: Row(f"{path}/scale", f"{name}.weight", (width,))  # noqa: E731
    out = [
        Row("embed/kernel", EMBED, (cfg.vocab_rows, d)),
        norm("layers/ln1", at + "input_layernorm", d),
        norm("layers/ln2", at + "post_attention_layernorm", d),
        *linear("layers/att/q", at + "self_attn.q_proj", d, q),
        *linear("layers/att/k", at + "self_attn.k_proj", d, kv),
        *linear("layers/att/v", at + "self_attn.v_proj", d, kv),
        *linear("layers/att/o", at + "self_attn.o_proj", q, d),
        norm("layers/att/q_norm", at + "self_attn.q_norm", cfg.head_dim),
        norm("layers/att/k_norm", at + "self_attn.k_norm", cfg.head_dim),
        *linear("layers/mlp/gate", at + "mlp.gate_proj", d, cfg.d_ffn),
        *linear("layers/mlp/up", at + "mlp.up_proj", d, cfg.d_ffn),
        *linear("layers/mlp/down", at + "mlp.down_proj", cfg.d_ffn, d),
        norm("norm_f", "model.norm", d),
    ]
    if not cfg.tie_embeddings:
        out += linear("head", "lm_head", d, cfg.vocab_rows)
    return out
