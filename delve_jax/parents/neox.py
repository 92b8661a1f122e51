"""GPT-NeoX as Hugging Face writes it (`model_type: gpt_neox`): Pythia, RedPajama-INCITE.

Rotary fields come in three spellings (v4, late v4, v5); the fused qkv keeps its per-head order.
"""

from __future__ import annotations

import re

from ..config import DelveError, NeoxConfig
from .rows import Fields, Row, layer_norm, linear

MODEL_TYPE = "gpt_neox"
ARCHITECTURE = "GPTNeoXForCausalLM"
EMBED = "gpt_neox.embed_in.weight"
HEAD = "embed_out.weight"
TIED_BY_DEFAULT = False
PAPER = ("GPT-NeoX-20B", "2204.06745")

# buffers that old versions saved: causal mask, its fill value, rotary frequencies
_BUFFERS = re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")


def canonical(name: str) -> str | None:
    """The name on disk of what transformers 5 calls lm_head in memory; None for buffers."""
    if _BUFFERS.fullmatch(name) or name == "gpt_neox.rotary_emb.inv_freq":
        return None
    return re.sub(r"^lm_head\.", "embed_out.", name)


def check_names(names, where: str) -> None:
    """No trap by name in this family: INCITE differs from Pythia in the config alone."""


def config(raw: dict, where: str, **common) -> NeoxConfig:
    """config.json -> NeoxConfig, old and new spelling of the rotary fields."""
    f = Fields(raw, where)
    f.only("hidden_act", "gelu")  # exact erf; the tanh kinds are other functions
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise DelveError(f"{where}: field 'rope_parameters' = {rope!r} is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise DelveError(f"{where}: field 'rope_type' = {kind!r} is not supported, only 'default'")
    merged = Fields({**raw, **rope}, where)
    pct = merged.get("rotary_pct", float, 0.25)
    base = merged.get("rotary_emb_base", float, 10000.0)
    d, heads = f.get("hidden_size", int), f.get("num_attention_heads", int)
    if d % heads:
        raise DelveError(f"{where}: field 'hidden_size' = {d} is no multiple of {heads} heads")
    return NeoxConfig(
        d_model=d,
        n_layers=f.get("num_hidden_layers", int),
        norm_eps=f.get("layer_norm_eps", float, 1e-5),
        context_length=f.get("max_position_embeddings", int, 2048),
        n_heads=heads,
        d_ffn=f.get("intermediate_size", int),
        rotary_pct=merged.get("partial_rotary_factor", float, pct),
        rotary_base=merged.get("rope_theta", float, base),
        parallel_residual=f.get("use_parallel_residual", bool, True),
        use_bias=f.get("attention_bias", bool, True),
        **common,
    )


def stock(cfg: NeoxConfig) -> dict:
    """A stock config.json for weights that came without one; v4 spelling, which v5 reads too."""
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "intermediate_size": cfg.d_ffn,
        "hidden_act": "gelu",
        "layer_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.context_length,
        "rotary_pct": cfg.rotary_pct,
        "rotary_emb_base": cfg.rotary_base,
        "use_parallel_residual": cfg.parallel_residual,
        "attention_bias": cfg.use_bias,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def rows(cfg: NeoxConfig) -> list[Row]:
    """Every tensor of the family."""
    d, at = cfg.d_model, "gpt_neox.layers.{i}."
    out = [
        Row("embed/kernel", "gpt_neox.embed_in.weight", (cfg.vocab_rows, d)),
        *layer_norm("layers/ln1", at + "input_layernorm", d),
        *layer_norm("layers/ln2", at + "post_attention_layernorm", d),
        *linear("layers/att/qkv", at + "attention.query_key_value", d, 3 * d, cfg.use_bias),
        *linear("layers/att/out", at + "attention.dense", d, d, cfg.use_bias),
        *linear("layers/mlp/up", at + "mlp.dense_h_to_4h", d, cfg.d_ffn, True),
        *linear("layers/mlp/down", at + "mlp.dense_4h_to_h", cfg.d_ffn, d, True),
        *layer_norm("norm_f", "gpt_neox.final_layer_norm", d),
    ]
    if not cfg.tie_embeddings:
        out += linear("head", "embed_out", d, cfg.vocab_rows)
    return out
