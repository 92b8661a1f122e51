"""Tiny random stock models in every family and file layout that hubs hold; helpers of two tests."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from delve_jax import parents

torch = pytest.importorskip("torch", reason="torch makes the stock models that are read here")
transformers = pytest.importorskip("transformers")
BUILT: dict[str, Path] = {}


def make(kind: str, dtype=torch.float32):
    """A tiny random stock model; all sizes differ, so that a swapped axis cannot hide."""
    torch.manual_seed(len(kind))
    t = transformers
    mamba = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, state_size=4)
    neox = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                intermediate_size=24)  # fmt: skip
    qwen = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=6, intermediate_size=24)  # fmt: skip
    model = {
        "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(**mamba)),
        "mamba-untied": lambda: t.MambaForCausalLM(
            t.MambaConfig(**mamba, expand=3, use_bias=True, use_conv_bias=False, time_step_rank=5,
                          tie_word_embeddings=False)),
        "rwkv": lambda: t.RwkvForCausalLM(
            t.RwkvConfig(vocab_size=40, hidden_size=16, attention_hidden_size=24,
                         intermediate_size=40, num_hidden_layers=3)),
        "neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**neox)),
        "neox-sequential": lambda: t.GPTNeoXForCausalLM(
            t.GPTNeoXConfig(**neox, use_parallel_residual=False, attention_bias=False,
                            rope_parameters={"rope_type": "default", "rope_theta": 500.0,
                                             "partial_rotary_factor": 1.0})),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**qwen, tie_word_embeddings=False)),
        "qwen3-tied-llama3": lambda: t.Qwen3ForCausalLM(
            t.Qwen3Config(**qwen, tie_word_embeddings=True, rms_norm_eps=1e-5,
                          rope_parameters={"rope_type": "llama3", "rope_theta": 500.0,
                                           "factor": 8.0, "low_freq_factor": 1.0,
                                           "high_freq_factor": 4.0,
                                           "original_max_position_embeddings": 64})),
    }[kind]()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():  # biases and gains away from 0 and 1
            p.add_(0.02 * torch.randn_like(p))
    return model.to(dtype)


def disk_names(model) -> dict:
    """The state dict under the names that files have (NeoX: embed_out)."""
    old = isinstance(model, transformers.GPTNeoXForCausalLM)
    return {
        k.replace("lm_head", "embed_out") if old else k: v.clone()
        for k, v in model.state_dict().items()
    }


def save_bin(model, path: Path, shards: int = 1, rename=lambda n: n, extra=None) -> Path:
    """pytorch_model*.bin as old versions of transformers wrote it (tied head included)."""
    path.mkdir()
    model.config.save_pretrained(path)
    state = {rename(k): v for k, v in disk_names(model).items()} | (extra or {})
    if shards == 1:
        torch.save(state, path / "pytorch_model.bin")
        return path
    names = list(state)
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = names[i::shards]
        torch.save({n: state[n] for n in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def blink(name: str) -> str:
    """Hugging Face's RWKV name -> BlinkDL's."""
    for a, b in (("rwkv.embeddings", "emb"), ("rwkv.blocks.0.pre_ln", "blocks.0.ln0"),
                 ("rwkv.", ""), (".attention.", ".att."), (".feed_forward.", ".ffn."),
                 ("mix_key", "mix_k"), ("mix_value", "mix_v"),
                 ("mix_receptance", "mix_r")):  # fmt: skip
        name = name.replace(a, b)
    return name


def neox_buffers(layers: int = 3) -> dict:
    """The buffers that files of Pythia and INCITE still carry."""
    out = {}
    for i in range(layers):
        at = f"gpt_neox.layers.{i}.attention."
        out[at + "bias"] = torch.tril(torch.ones(1, 1, 8, 8, dtype=torch.uint8))
        out[at + "masked_bias"] = torch.tensor(-1e9)
        out[at + "rotary_emb.inv_freq"] = torch.ones(2, dtype=torch.float16)
    return out


def old_spelling(path: Path) -> Path:
    """config.json as transformers 4 wrote it for Pythia."""
    raw = json.loads((path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    raw["torch_dtype"] = raw.pop("dtype", "float32")
    (path / "config.json").write_text(json.dumps(raw))
    return path


def build(root: Path) -> dict[str, Path]:
    """Every family in every layout that hubs hold."""
    out = {}

    def hf(name, kind, dtype=torch.float32, **kwargs):
        make(kind, dtype).save_pretrained(root / name, **kwargs)
        out[name] = root / name

    plain = ("mamba", "mamba-untied", "rwkv", "neox", "neox-sequential", "qwen3")
    for kind in (*plain, "qwen3-tied-llama3"):
        hf(kind, kind)
    for kind in ("mamba", "rwkv", "neox"):
        hf(f"{kind}-shards-bf16", kind, torch.bfloat16, max_shard_size="6KB")
        hf(f"{kind}-f16", kind, torch.float16)
        out[f"{kind}-bin"] = save_bin(make(kind), root / f"{kind}-bin")
        out[f"{kind}-bin-shards-bf16"] = save_bin(
            make(kind, torch.bfloat16), root / f"{kind}-bin-shards-bf16", shards=3
        )
    out["mamba-legacy"] = save_bin(
        make("mamba"), root / "mamba-legacy",
        rename=lambda n: n.replace("backbone.embeddings", "backbone.embedding"),
    )  # fmt: skip
    out["rwkv-legacy"] = save_bin(make("rwkv"), root / "rwkv-legacy", rename=blink)
    out["neox-buffers-f16"] = old_spelling(
        save_bin(make("neox", torch.float16), root / "neox-buffers-f16", 2, extra=neox_buffers())
    )
    out["neox-lm_head"] = save_bin(
        make("neox"), root / "neox-lm_head", rename=lambda n: n.replace("embed_out", "lm_head")
    )
    untied = make("mamba")
    path = save_bin(untied, root / "mamba-tie-trap")  # config says tied, the head differs
    state = torch.load(path / "pytorch_model.bin", weights_only=True)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, path / "pytorch_model.bin")
    out["mamba-tie-trap"] = path
    torch.save(
        {blink(k): v for k, v in disk_names(make("rwkv", torch.bfloat16)).items()},
        root / "RWKV-4-ctx512.pth",
        _use_new_zipfile_serialization=False,  # the old format, which cannot be mapped
    )
    out["pth"] = root / "RWKV-4-ctx512.pth"
    return out


def built_once(tmp_path_factory) -> dict[str, Path]:
    """Name -> path of every source, shared by the test files."""
    if not BUILT:
        BUILT.update(build(tmp_path_factory.mktemp("sources")))
    return BUILT


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Canonical name -> array of a source, a redundant tied head left out."""
    source, _, _ = parents.describe(path)
    return {name: np.array(source.read(name)) for name in source.tensors}


def equal(a: dict, b: dict) -> None:
    assert set(a) == set(b)
    for name, x in a.items():
        assert x.dtype == b[name].dtype and x.shape == b[name].shape, name
        assert x.tobytes() == b[name].tobytes(), name


def broken(sources, tmp_path, name="neox", **config) -> Path:
    """A private copy of a source, its config.json changed."""
    path = tmp_path / "broken"
    shutil.copytree(sources[name], path)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, **config}))
    return path


def rewrite(path: Path, change) -> Path:
    """Change the tensors of a one-file safetensors source."""
    from safetensors.torch import load_file, save_file

    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def tokenizer_json(ids: int) -> str:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    vocab = {"<|endoftext|>": 0} | {f"t{i}": i for i in range(1, ids - 1)}
    tokenizer = Tokenizer(kinds.WordLevel(vocab, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens(["added"])
    return tokenizer.to_str()
