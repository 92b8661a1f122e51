"""Small models and their exports, for the tests of what leaves this package (imported, not run)."""

import jax
import numpy as np
import torch

from delve_jax import checkpoint, models
from delve_jax.config import DelveConfig, MambaConfig, NeoxConfig, RwkvConfig
from delve_jax.parents import export

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
V = 288
RAW = ("A_log", "D", "time_decay", "time_first", "dt_proj/bias", "sigma", "scale", "/g")


def mamba(**kw):
    sizes = {"d_inner": 48, "d_state": 4, "d_conv": 4, "dt_rank": 3, "use_bias": True}
    return MambaConfig(V, V, 24, 6, context_length=128, **sizes, **kw)


def rwkv(**kw):
    return RwkvConfig(V, V, 32, 3, context_length=128, d_att=40, d_ffn=64, **kw)


def neox(layers=3, rows=V, **kw):
    return NeoxConfig(V, rows, 24, layers, context_length=128, n_heads=2, d_ffn=48, **kw)


def joints(**kw):
    return {"connectors": "hub", "hub_rank": 4, "gate_proj": 8, "gate_hidden": 12, **kw}


def three():
    """6/3/3 layers, widths 24/32/24, S divides none of them, unequal ranks, J = 1."""
    ranks = {
        "mamba": (("embed", (9,)), ("in_proj", (7, 8, 8, 7, 8, 6)), ("out_proj", (5,) * 6)),
        "rwkv": (("att/key", (6, 7, 6)), ("ffn/value", (8, 9, 9)), ("head", (10,))),
        "neox": (("att/qkv", (8, 9, 8)), ("mlp/up", (9, 9, 9)), ("embed", (7,))),
    }
    streams = (
        ("first", mamba(tie_embeddings=True, ranks=ranks["mamba"])),
        ("second", rwkv(ranks=ranks["rwkv"])),
        ("third", neox(ranks=ranks["neox"], rotary_pct=1.0, parallel_residual=False)),
    )
    teachers = ("here/first", "second@rev", "third")
    return DelveConfig(streams, n_superblocks=4, latents=1, teachers=teachers, **joints())


def two():
    """6/4 layers, the scanned superblocks, parallel residual, J = K."""
    streams = (
        ("m", mamba(ranks=(("out_proj", (5, 4, 5, 5, 5, 5)),), use_conv_bias=False)),
        (
            "n",
            neox(
                4, rotary_pct=0.5, use_bias=False, rows=V + 7, ranks=(("mlp/down", (6, 7, 7, 6)),)
            ),
        ),
    )
    return DelveConfig(streams, n_superblocks=2, latents=2, **joints())


def common(latents, connectors="hub"):
    """Three streams whose vocabulary tables have their long factors in common."""
    ranks = (("embed", (9,)), ("head", (11,)))
    streams = (("a", mamba(ranks=ranks)), ("b", rwkv(ranks=ranks)), ("c", neox(ranks=ranks)))
    return DelveConfig(
        streams, 3, latents, codes=("embed", "head"), **joints(connectors=connectors)
    )


def random_params(cfg, seed=0):
    """Random weights in which nothing is zero or trivial but the padding beyond true ranks."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = "/".join(key.key for key in path)
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if name == "pool/a":
            return 1 + 0.3 * noise  # logits of several units
        if name.endswith(RAW) or leaf.ndim == 1:
            return np.asarray(leaf) + 0.1 * noise
        gain = 2.5 if "mlp" in name else 1  # so that a tanh GELU would show
        return gain * noise / max(leaf.shape[-2], 1) ** 0.5

    initial = jax.jit(models.init_params, static_argnums=0)(cfg, jax.random.key(seed))
    params = jax.tree_util.tree_map_with_path(draw, initial)
    for name, sub in cfg.streams if cfg.family == "delve" else [(None, cfg)]:
        tree = params if name is None else params["streams"][name]
        for map_name, ranks in sub.ranks:
            leaf = tree if map_name in ("embed", "head") else tree["layers"]
            for part in map_name.split("/"):
                leaf = leaf[part]
            stacked = map_name not in ("embed", "head")
            for layer, rank in enumerate(ranks) if stacked else ():
                leaf["v"][layer, :, rank:] = 0
                leaf["u"][layer, rank:] = 0
        mlp = models.FAMILY[sub.family].MLP if sub.neurons else ()
        for map_name in mlp:
            for key, array in models.leaf_of(tree, map_name).items():
                reads = map_name == mlp[-1]
                for layer, width in enumerate(sub.neurons):
                    if reads and key in ("kernel", "v"):
                        array[layer, width:] = 0
                    elif not reads and key in ("kernel", "u", "bias"):
                        array[layer, ..., width:] = 0
    return params


def tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=V,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(["the export of the model and the model of the export"], trainer)
    return tok.to_str()


def torch_model(folder):
    from transformers import AutoModelForCausalLM

    kwargs = {"trust_remote_code": True, "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def make(folder, cfg, layout, seed):
    params = random_params(cfg, seed)
    checkpoint.save(folder / "checkpoint", cfg, params, tiny_tokenizer())
    facts = export.export_hf(folder / "checkpoint", folder / "hf", layout)
    run = jax.jit(lambda p, t, m: models.forward(cfg, p, t, None, m)[0])
    return {
        "cfg": cfg,
        "params": params,
        "facts": facts,
        "checkpoint": folder / "checkpoint",
        "hf": folder / "hf",
        "torch": torch_model(folder / "hf"),
        "jax": lambda t, m: run(params, t, m),
    }
