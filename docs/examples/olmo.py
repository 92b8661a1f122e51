"""A fifth parent family in one file: OLMo-1 (arXiv 2402.00838), transformers' `OlmoForCausalLM`.

x <- x + o(attn(q, k, v));  x <- x + down(silu(gate h) * up h),  h = LN(x), which has no parameters.
docs/new_family.md explains it line by line. `python docs/examples/olmo.py VERB ...` is `delve VERB`
with this family known; from Python, importing this file makes it known.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from delve_jax import parents
from delve_jax.config import DelveError, ParentConfig
from delve_jax.models.attention import angles_and_mask, attend, flops, frequencies, init_caches
from delve_jax.models.linear import Linear, layer_norm, routed
from delve_jax.parents.rows import Fields, Row, linear


@dataclass(frozen=True)
class OlmoConfig(ParentConfig):
    """OLMo-1; norm_eps is not in its config.json, the published code has the default 1e-5."""

    n_heads: int = 0  # H
    n_kv_heads: int = 0  # G, divides H
    d_ffn: int = 0  # F
    rope_theta: float = 10000.0
    clip_qkv: float | None = None  # largest |q|, |k|, |v| before the rotary embedding
    family: ClassVar[str] = "olmo"


# ---- the model: what delve_jax/models/NAME.py says of the other families -------------------------

FACTORABLE = ("att/q", "att/k", "att/v", "att/o", "mlp/gate", "mlp/up", "mlp/down")  # as they run
MLP = ("mlp/gate", "mlp/up", "mlp/down")  # the last reads the neurons that the others make
RESIDUAL = {"att/o": "in", "mlp/down": "out"}  # outputs that are added to the stream as they are
NORM = "bare"  # kind of the final norm: "layer", "rms", or "bare", which has no parameters


class Attention(nn.Module):
    """Causal attention of H query and G key/value heads; `state` None or the layers' caches."""

    cfg: OlmoConfig

    @nn.compact
    def __call__(self, h_BTD, state, ctx):
        cfg = self.cfg
        b, T, d = h_BTD.shape

        def heads(name, n):
            y = Linear(n * (d // cfg.n_heads), cfg.factored(f"att/{name}"), name=name)(h_BTD)
            if cfg.clip_qkv is not None:
                y = jnp.clip(y, -cfg.clip_qkv, cfg.clip_qkv)
            return y.reshape(b, T, n, d // cfg.n_heads)

        q_BTHh, k_BTGh, v_BTGh = (
            heads("q", cfg.n_heads), heads("k", cfg.n_kv_heads), heads("v", cfg.n_kv_heads),
        )  # fmt: skip
        y_BTHh, state = attend(q_BTHh, k_BTGh, v_BTGh, state, ctx)
        out = Linear(d, cfg.factored("att/o"), name="o")
        return out(y_BTHh.reshape(b, T, d)), state


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(h)) * up(h))."""

    cfg: OlmoConfig

    @nn.compact
    def __call__(self, h_BTD):
        cfg = self.cfg
        gate = Linear(cfg.d_ffn, cfg.factored("mlp/gate"), name="gate")
        up = Linear(cfg.d_ffn, cfg.factored("mlp/up"), name="up")
        down = Linear(cfg.d_model, cfg.factored("mlp/down"), name="down")
        return down(nn.silu(gate(h_BTD)) * up(h_BTD))


class Block(nn.Module):
    """One residual layer."""

    cfg: OlmoConfig

    @nn.compact
    def __call__(self, x_BTD, state, ctx):
        norm = lambda x_BTD: layer_norm({}, x_BTD, self.cfg.norm_eps)  # noqa: E731
        y_BTD, state = Attention(self.cfg, name="att")(norm(x_BTD), state, ctx)
        x_BTD = x_BTD + y_BTD
        return x_BTD + routed(Mlp(self.cfg, name="mlp"), ctx, norm(x_BTD)), state


def init_layers(cfg: OlmoConfig, layers: dict, key) -> dict:
    """Nothing beyond the modules' own initialisers."""
    return layers


def init_state(cfg: OlmoConfig, batch: int, max_len: int, dtype=jnp.float32) -> dict:
    """Empty caches for `max_len` tokens."""
    return init_caches(cfg, batch, max_len, cfg.n_kv_heads, cfg.d_model // cfg.n_heads, dtype)


def context(cfg: OlmoConfig, x_BTD, mask_BT=None, state=None, segments_BT=None):
    """Rotary angles and attention mask of this call, and the state's advanced bookkeeping."""
    freq = frequencies(cfg.rope_theta, cfg.d_model // cfg.n_heads)
    return angles_and_mask(freq, x_BTD, mask_BT, state, segments_BT)


def mixer_flops(cfg: OlmoConfig, T: int) -> int:
    """Of a token and layer, beside its maps: attention over the full T."""
    return flops(T, cfg.n_heads, cfg.d_model // cfg.n_heads)


# ---- the files: what delve_jax/parents/NAME.py says of the other families ------------------------

MODEL_TYPE = "olmo"
ARCHITECTURE = "OlmoForCausalLM"
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
TIED_BY_DEFAULT = False  # where config.json does not name tie_word_embeddings
KEEP_WIDE = ()  # ends of our paths that stay float32 in a half-precision conversion
PAPER = ("OLMo", "2402.00838")


def canonical(name: str) -> str | None:
    """The current spelling of a tensor's name; None: not a weight (old files have the angles)."""
    return None if name.endswith("rotary_emb.inv_freq") else name


def check_names(names, where: str) -> None:
    """Traps that only names betray; none here: a missing or an unknown tensor is refused anyway."""


def config(raw: dict, where: str, **common) -> OlmoConfig:
    """config.json -> OlmoConfig; rotary fields in both spellings (v4 flat, v5 rope_parameters)."""
    f = Fields(raw, where)
    f.only("hidden_act", "silu", "swish")
    f.only("attention_bias", False)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise DelveError(f"{where}: field 'rope_parameters' = {rope!r} is not an object")
    rope = Fields({**raw, "rope_type": rope.get("type", "default"), **rope}, where)
    rope.only("rope_type", "default")
    d, heads = f.get("hidden_size", int), f.get("num_attention_heads", int)
    groups = f.get("num_key_value_heads", int, heads)
    if d % heads or heads % groups:
        raise DelveError(
            f"{where}: field 'num_attention_heads' = {heads} must divide hidden_size = {d} and be "
            f"a multiple of num_key_value_heads = {groups}"
        )
    clip = None if raw.get("clip_qkv") is None else f.get("clip_qkv", float)
    return OlmoConfig(
        d_model=d,
        n_layers=f.get("num_hidden_layers", int),
        context_length=f.get("max_position_embeddings", int, 2048),
        n_heads=heads,
        n_kv_heads=groups,
        d_ffn=f.get("intermediate_size", int),
        rope_theta=rope.get("rope_theta", float, 10000.0),
        clip_qkv=clip,
        **common,
    )


def stock(cfg: OlmoConfig) -> dict:
    """config.json for weights that came without one (trained here); v5 reads this spelling too."""
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "intermediate_size": cfg.d_ffn,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.context_length,
        "rope_theta": cfg.rope_theta,
        "clip_qkv": cfg.clip_qkv,
        "attention_bias": False,
        "tie_word_embeddings": cfg.tie_embeddings,
    }


def rows(cfg: OlmoConfig) -> list[Row]:
    """Every tensor: our path, their name, their shape (torch: out, in). Both ways read this."""
    d, at = cfg.d_model, "model.layers.{i}."
    kv = d // cfg.n_heads * cfg.n_kv_heads
    out = [
        Row("embed/kernel", EMBED, (cfg.vocab_rows, d)),
        *linear("layers/att/q", at + "self_attn.q_proj", d, d),
        *linear("layers/att/k", at + "self_attn.k_proj", d, kv),
        *linear("layers/att/v", at + "self_attn.v_proj", d, kv),
        *linear("layers/att/o", at + "self_attn.o_proj", d, d),
        *linear("layers/mlp/gate", at + "mlp.gate_proj", d, cfg.d_ffn),
        *linear("layers/mlp/up", at + "mlp.up_proj", d, cfg.d_ffn),
        *linear("layers/mlp/down", at + "mlp.down_proj", cfg.d_ffn, d),
    ]
    if not cfg.tie_embeddings:
        out += linear("head", "lm_head", d, cfg.vocab_rows)
    return out


parents.register(OlmoConfig, sys.modules[__name__])

if __name__ == "__main__":
    from delve_jax.cli import main

    raise SystemExit(main())
