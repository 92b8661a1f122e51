"""RWKV-4, Hugging Face names (`model_type: rwkv`) and BlinkDL's own `.pth` names, both read.

Both store the raw time_decay. Hugging Face's `rescale_every` is a float16 trick: ignored.
"""

from __future__ import annotations

import re

from ..config import DelveError, RwkvConfig
from .rows import Fields, Row, layer_norm, linear

MODEL_TYPE = "rwkv"
ARCHITECTURE = "RwkvForCausalLM"
EMBED = "rwkv.embeddings.weight"
HEAD = "head.weight"
TIED_BY_DEFAULT = False
PAPER = ("RWKV", "2305.13048")

_BLINK = (  # applied in order to names that do not start with "rwkv."
    (r"emb\.weight", "rwkv.embeddings.weight"),
    (r"ln_out\.", "rwkv.ln_out."),
    (r"blocks\.0\.ln0\.", "rwkv.blocks.0.pre_ln."),
    (r"blocks\.(\d+)\.att\.", r"rwkv.blocks.\1.attention."),
    (r"blocks\.(\d+)\.ffn\.", r"rwkv.blocks.\1.feed_forward."),
    (r"blocks\.(\d+)\.", r"rwkv.blocks.\1."),
)
_MIX = {"k": "key", "v": "value", "r": "receptance"}


def canonical(name: str) -> str | None:
    """The Hugging Face name of a BlinkDL one."""
    for pattern, to in _BLINK:
        if re.match(pattern, name):
            name = re.sub("^" + pattern, to, name)
            break
    return re.sub(r"\.time_mix_([kvr])$", lambda m: f".time_mix_{_MIX[m[1]]}", name)


def check_names(names, where: str) -> None:
    """Later RWKVs share most names; say so instead of listing their tensors."""
    for name in names:
        if re.search(r"attention\.(ln_x|gate|time_faaaa|time_maa|r_k)", name):
            raise DelveError(
                f"{where}: tensor {name} is of RWKV-5 or later, only RWKV-4 is supported"
            )


def config(raw: dict, where: str, **common) -> RwkvConfig:
    """config.json -> RwkvConfig."""
    f = Fields(raw, where)
    d = f.get("hidden_size", int)
    return RwkvConfig(
        d_model=d,
        n_layers=f.get("num_hidden_layers", int),
        norm_eps=f.get("layer_norm_epsilon", float, 1e-5),
        context_length=f.get("context_length", int, 1024),
        d_att=f.get("attention_hidden_size", int, d),
        d_ffn=f.get("intermediate_size", int, 4 * d),
        **common,
    )


def from_tensors(tensors: dict, where: str) -> dict:
    """The raw config of a `.pth`, which has none: shapes say everything but the context."""

    def axis(name: str, which: int) -> int:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise DelveError(f"{where}: no matrix {name}; only RWKV-4 .pth files can be read")
        return tensors[name].shape[which]

    layers = {int(m[1]) for m in (re.match(r"rwkv\.blocks\.(\d+)\.", n) for n in tensors) if m}
    ctx = re.search(r"ctx(\d+)", where.rsplit("/", 1)[-1])
    return {
        "vocab_size": axis("rwkv.embeddings.weight", 0),
        "hidden_size": axis("rwkv.embeddings.weight", 1),
        "num_hidden_layers": max(layers, default=0) + 1,
        "attention_hidden_size": axis("rwkv.blocks.0.attention.key.weight", 0),
        "intermediate_size": axis("rwkv.blocks.0.feed_forward.key.weight", 0),
        "context_length": int(ctx[1]) if ctx else 1024,
        "tie_word_embeddings": False,
    }


def stock(cfg: RwkvConfig) -> dict:
    """A stock config.json for weights that came without one."""
    return {
        "hidden_size": cfg.d_model,
        "attention_hidden_size": cfg.d_att,
        "intermediate_size": cfg.d_ffn,
        "num_hidden_layers": cfg.n_layers,
        "context_length": cfg.context_length,
        "layer_norm_epsilon": cfg.norm_eps,
        "rescale_every": 0,  # exact in float32; readers that run float16 may set 6
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": True,
    }


def rows(cfg: RwkvConfig) -> list[Row]:
    """Every tensor of the family."""
    d, a, ff, at = cfg.d_model, cfg.d_att, cfg.d_ffn, "rwkv.blocks.{i}."
    att, ffn = at + "attention.", at + "feed_forward."
    out = [
        Row("embed/kernel", "rwkv.embeddings.weight", (cfg.vocab_rows, d)),
        *layer_norm("ln0", "rwkv.blocks.0.pre_ln", d),
        *layer_norm("layers/ln1", at + "ln1", d),
        *layer_norm("layers/ln2", at + "ln2", d),
        Row("layers/att/time_decay", att + "time_decay", (a,)),
        Row("layers/att/time_first", att + "time_first", (a,)),
        *(Row(f"layers/att/mix_{k}", f"{att}time_mix_{_MIX[k]}", (1, 1, d)) for k in "kvr"),
        *linear("layers/att/key", att + "key", d, a),
        *linear("layers/att/value", att + "value", d, a),
        *linear("layers/att/receptance", att + "receptance", d, a),
        *linear("layers/att/output", att + "output", a, d),
        *(Row(f"layers/ffn/mix_{k}", f"{ffn}time_mix_{_MIX[k]}", (1, 1, d)) for k in "kr"),
        *linear("layers/ffn/key", ffn + "key", d, ff),
        *linear("layers/ffn/value", ffn + "value", ff, d),
        *linear("layers/ffn/receptance", ffn + "receptance", d, d),
        *layer_norm("norm_f", "rwkv.ln_out", d),
    ]
    if not cfg.tie_embeddings:
        out += linear("head", "head", d, cfg.vocab_rows)
    return out
