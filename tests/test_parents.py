"""Parents in and out: every family and file layout bit-exact both ways; bad input in one line."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from delve_jax import models, parallel, parents
from delve_jax.config import DelveError
from delve_jax.parents import stock
from delve_jax.parents.io import Source, weight_files

torch = pytest.importorskip("torch", reason="torch makes the stock models that are read here")
transformers = pytest.importorskip("transformers")

WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "weights"
needs_weights = pytest.mark.skipif(
    not WEIGHTS.is_dir(), reason="../shared/data/weights is absent: trained RWKV-4 not tested"
)


def make(kind: str, dtype=torch.float32):
    """A tiny random stock model; all sizes differ, so that a swapped axis cannot hide."""
    torch.manual_seed(len(kind))
    t = transformers
    mamba = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, state_size=4)
    neox = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                intermediate_size=24)  # fmt: skip
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


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Every family in every layout that hubs hold."""
    root = tmp_path_factory.mktemp("sources")
    out = {}

    def hf(name, kind, dtype=torch.float32, **kwargs):
        make(kind, dtype).save_pretrained(root / name, **kwargs)
        out[name] = root / name

    for kind in ("mamba", "mamba-untied", "rwkv", "neox", "neox-sequential"):
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


def fails(path, *words, dtype=None) -> None:
    """load raises one line that holds all of `words`."""
    with pytest.raises(DelveError) as caught:
        parents.load(path, dtype=dtype)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message, (word, message)


def test_round_trip_on_meshes_is_bit_exact(sources, tmp_path):
    """Every layout: saved on 8 virtual devices, restored on 4, back to Hugging Face."""
    script = Path(__file__).with_name("multidevice_roundtrip.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, *sources.values()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok ") == len(sources) >= 20


@pytest.mark.parametrize("kind", ["mamba", "mamba-untied", "rwkv", "neox", "neox-sequential"])
def test_names_are_those_of_the_models(sources, kind):
    cfg, params, _ = parents.load(sources[kind])
    flat = lambda tree: {  # noqa: E731
        parallel.path_of(k): x.shape for k, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    assert flat(params) == flat(models.abstract_params(cfg))


@pytest.mark.parametrize("kind", ["mamba-untied", "rwkv", "neox-sequential"])
def test_export_loads_in_plain_transformers(sources, tmp_path, kind):
    """All keys used, same logits as ours from the exported directory (the smoke of the forward)."""
    cfg, params, _ = parents.load(sources[kind])
    parents.export_stock(cfg, params, tmp_path / "hf")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if kind == "rwkv":
        model.config.rescale_every = 0
    tokens = np.arange(20).reshape(2, 10)
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(tokens), use_cache=False).logits.numpy()
    ours, _ = models.forward(cfg, params, tokens)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    first = json.loads((sources[kind] / "config.json").read_text())
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == first


def test_config_spellings(sources):
    names = ("neox-f16", "neox-buffers-f16", "neox-sequential", "pth")
    new, old, seq, pth = (stock.describe(sources[name])[1] for name in names)
    for field in ("rotary_pct", "rotary_base", "parallel_residual", "n_heads", "dtype"):
        assert getattr(new, field) == getattr(old, field)
    assert (seq.rotary_pct, seq.rotary_base) == (1.0, 500.0)
    assert not seq.parallel_residual and not seq.use_bias
    assert pth.context_length == 512


def test_tying_is_decided_by_content(sources, tmp_path):
    assert stock.describe(sources["mamba-bin"])[1].tie_embeddings
    cfg, params, _ = parents.load(sources["mamba-tie-trap"])
    assert not cfg.tie_embeddings and "head" in params
    parents.export_stock(cfg, params, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False


def test_safetensors_win_over_bin(sources, tmp_path):
    path = tmp_path / "both"
    shutil.copytree(sources["rwkv"], path)
    shutil.copy(sources["neox-bin"] / "pytorch_model.bin", path)
    assert [f.suffix for f in weight_files(path)] == [".safetensors"]
    parents.load(path)


def test_dtype_is_cast_except_where_it_would_hurt(sources):
    cfg, params, _ = parents.load(sources["mamba"], dtype="bfloat16")
    kept = {k for k, x in params["layers"].items() if getattr(x, "dtype", None) == np.float32}
    assert cfg.dtype == "bfloat16" and kept == {"A_log", "D"}
    assert params["layers"]["dt_proj"]["bias"].dtype == np.float32
    assert params["layers"]["in_proj"]["kernel"].dtype == jax.numpy.bfloat16
    _, wide, _ = parents.load(sources["mamba-f16"], dtype="float32")
    assert {x.dtype.name for x in jax.tree.leaves(wide)} == {"float32"}


def test_several_export_shards_hold_the_same(sources, tmp_path):
    cfg, params, _ = parents.load(sources["neox"])
    parents.export_stock(cfg, params, tmp_path / "hf", shard_bytes=6000)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    equal(tensors(sources["neox"]), tensors(tmp_path / "hf"))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_factored_maps_are_multiplied_out(sources, tmp_path):
    """Unequal true ranks; what stands beyond a layer's rank is never used."""
    import dataclasses

    cfg, params, _ = parents.load(sources["rwkv"])
    ranks, rng = (2, 5, 3), np.random.default_rng(0)
    v, u = (rng.standard_normal((3, *s)).astype(np.float32) for s in ((16, 5), (5, 40)))
    params["layers"]["ffn"]["key"] = {"v": v, "u": u}
    params["embed"] = {"v": v[0].repeat(3, 0)[:40], "u": u[0, :, :16]}
    ranked = dataclasses.replace(cfg, ranks=(("ffn/key", ranks), ("embed", (5,))))
    parents.export_stock(ranked, params, tmp_path / "hf")
    out = tensors(tmp_path / "hf")
    for i, r in enumerate(ranks):
        want = (v[i, :, :r].astype(np.float64) @ u[i, :r]).T.astype(np.float32)
        np.testing.assert_array_equal(out[f"rwkv.blocks.{i}.feed_forward.key.weight"], want)
    want = params["embed"]["v"].astype(np.float64) @ params["embed"]["u"]
    np.testing.assert_array_equal(out["rwkv.embeddings.weight"], want.astype(np.float32))


def tokenizer_json(ids: int) -> str:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    vocab = {"<|endoftext|>": 0} | {f"t{i}": i for i in range(1, ids - 1)}
    tokenizer = Tokenizer(kinds.WordLevel(vocab, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens(["added"])
    return tokenizer.to_str()


def test_valid_ids_are_the_tokenizers(sources, tmp_path):
    """37 ids over 40 rows: logits are cut, rows are kept, the tokenizer travels."""
    path = broken(sources, tmp_path)
    (path / "tokenizer.json").write_text(tokenizer_json(37))
    cfg, params, text = parents.load(path)
    assert (cfg.vocab_size, cfg.vocab_rows) == (37, 40)
    assert params["embed"]["kernel"].shape[0] == 40
    assert models.forward(cfg, params, np.zeros((1, 2), int))[0].shape == (1, 2, 37)
    parents.export_stock(cfg, params, tmp_path / "hf", text)
    equal(tensors(path), tensors(tmp_path / "hf"))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(loaded) == 37 and loaded("t5 added")["input_ids"] == [5, 36]
    assert loaded.eos_token == "<|endoftext|>" or loaded.eos_token_id == 2  # GPTNeoXConfig's eos


def test_cut_vocabulary_stays_cut(sources, tmp_path):
    import dataclasses

    cfg, params, _ = parents.load(sources["neox"])
    params["embed"] = {"kernel": params["embed"]["kernel"][:37]}
    params["head"] = {"kernel": params["head"]["kernel"][:, :37]}
    cfg = dataclasses.replace(cfg, vocab_size=37, vocab_rows=37)
    parents.export_stock(cfg, params, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 37
    assert tensors(tmp_path / "hf")["embed_out.weight"].shape == (37, 16)


@needs_weights
def test_trained_rwkv_from_pth_and_directory(tmp_path):
    """rwkv.cpp's expected logits from both; no tokenizer and 256 ids are raw bytes."""
    want = np.fromfile(WEIGHTS / "expected-logits-4v0-660K.bin", np.float32)
    tokens = np.frombuffer(b'"in', np.uint8).astype(np.int32)[None]
    pth = WEIGHTS / "tiny-rwkv-4v0-660K.pth"
    cfg, params, tokenizer = parents.load(pth)
    parents.export_stock(cfg, params, tmp_path / "hf")
    equal(tensors(pth), tensors(tmp_path / "hf"))
    assert cfg.vocab_size == 256 and tokenizer is None and parents.detect(pth) == "rwkv"
    for src in (pth, tmp_path / "hf"):
        cfg, params, _ = parents.load(src)
        logits, _ = models.forward(cfg, params, tokens)
        assert np.abs(np.asarray(logits)[0, -1] - want).max() < 1e-4
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_rescaled_rwkv_is_suspected(tmp_path):
    config = transformers.RwkvConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=5, rescale_every=2
    )
    model = transformers.RwkvForCausalLM(config)
    with torch.no_grad():
        for block in model.rwkv.blocks:  # the random initialisation is 0 here
            torch.nn.init.normal_(block.attention.output.weight)
            torch.nn.init.normal_(block.feed_forward.value.weight)
    model.save_pretrained(tmp_path / "good")
    model.eval()(torch.zeros(1, 2, dtype=int))
    model.save_pretrained(tmp_path / "bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parents.load(tmp_path / "good")
    with pytest.warns(UserWarning, match="rescale_every"):
        parents.load(tmp_path / "bad")


def test_missing_and_unknown_tensors_are_named_together(sources, tmp_path):
    def change(state):
        state["gpt_neox.layers.1.surplus"] = torch.zeros(3)
        del state["gpt_neox.layers.2.mlp.dense_h_to_4h.bias"]
        state["gpt_neox.final_layer_norm.bias"] = torch.zeros(17)

    path = rewrite(broken(sources, tmp_path), change)
    fails(path, "missing gpt_neox.layers.2.mlp.dense_h_to_4h.bias (24,)",
          "unknown gpt_neox.layers.1.surplus (3,)",
          "gpt_neox.final_layer_norm.bias is (17,), config says (16,)")  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_name_their_tensor(sources, tmp_path, value):
    name = "gpt_neox.layers.1.attention.dense.weight"
    path = rewrite(broken(sources, tmp_path), lambda s: s[name].fill_(value))
    fails(path, name, "NaN or Inf")


def test_overflow_of_the_asked_dtype(sources, tmp_path):
    name = "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"
    path = rewrite(broken(sources, tmp_path), lambda s: s[name].fill_(1e6))
    fails(path, name, "bfloat16", dtype="float16")
    parents.load(path, dtype="bfloat16")


def test_integer_tensors_are_refused(sources, tmp_path):
    name = "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"
    path = rewrite(broken(sources, tmp_path), lambda s: s.update({name: s[name].to(torch.int8)}))
    fails(path, name, "I8", "not supported")


@pytest.mark.parametrize("name", ["neox", "neox-bin", "pth"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files(sources, tmp_path, name, keep):
    src = sources[name]
    path = tmp_path / src.name
    shutil.copytree(src, path) if src.is_dir() else shutil.copy(src, path)
    file = weight_files(path)[0] if path.is_dir() else path
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    fails(path, str(file))


def test_half_a_shard_set(sources, tmp_path):
    for name, pattern in (
        ("rwkv-shards-bf16", "model-00002-*"),
        ("neox-bin-shards-bf16", "*-00001-*"),
    ):
        for index in (True, False):
            path = tmp_path / f"{name}-{index}"
            shutil.copytree(sources[name], path)
            next(path.glob(pattern)).unlink()
            if not index:
                next(path.glob("*.index.json")).unlink()
            fails(path, "missing", "shards")


def test_pickles_with_code_are_refused(sources, tmp_path):
    path = broken(sources, tmp_path, "neox-bin")
    witness = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (witness,))

    torch.save({"gpt_neox.embed_in.weight": Evil()}, path / "pytorch_model.bin")
    fails(path, "pytorch_model.bin", "refused")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, ["'model_type' = 'llama'", "gpt_neox"]),
        ({"model_type": None, "architectures": []}, ["'model_type'"]),
        ({"hidden_act": "gelu_new"}, ["hidden_act", "gelu_new"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None}, ["linear"]),
        ({"num_attention_heads": 3}, ["hidden_size", "3 heads"]),
        ({"num_hidden_layers": "three"}, ["num_hidden_layers", "three"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"vocab_size": 41}, ["(40, 16)", "(41, 16)"]),
        ({"num_hidden_layers": 2}, ["unknown gpt_neox.layers.2"]),
    ],
)
def test_bad_configs(sources, tmp_path, config, words):
    fails(broken(sources, tmp_path, **config), *words)


def test_norm_bias_trap(sources, tmp_path):
    path = broken(sources, tmp_path, "mamba")
    rewrite(path, lambda s: s.update({"backbone.norm_f.bias": torch.zeros(16)}))
    fails(path, "backbone.norm_f.bias", "LayerNorm")


def test_bad_tokenizers_and_directories(sources, tmp_path):
    path = broken(sources, tmp_path)
    (path / "tokenizer.json").write_text(tokenizer_json(41))
    fails(path, "tokenizer.json", "41 ids", "40 rows")
    (path / "tokenizer.json").write_text("{")
    fails(path, "tokenizer.json")
    (path / "config.json").write_text('{"model_type": ')
    fails(path, "config.json")
    (path / "config.json").unlink()
    fails(path, "config.json", "no such file")
    (tmp_path / "file.gguf").write_text("x")
    fails(tmp_path / "file.gguf", "file.gguf")
    fails(tmp_path / "absent" / "deep" / "er", "no such file")
    (tmp_path / "empty.pth").write_bytes(b"")
    fails(tmp_path / "empty.pth", "empty.pth")
    with pytest.raises(DelveError, match="float8"):
        parents.load(sources["neox"], dtype="float8")


def test_hub_ids(sources, tmp_path, monkeypatch):
    """A pinned revision reaches the hub; safetensors are asked for alone when there are both."""
    import huggingface_hub

    seen = {}

    def snapshot(repo, **kwargs):
        seen.update(repo=repo, **kwargs)
        target = tmp_path / "snapshots" / "0123abc"
        shutil.copytree(sources["rwkv"], target)
        return str(target)

    names = ["config.json", "model.safetensors", "pytorch_model.bin", "flax_model.msgpack"]
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision=None: names
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    path = parents.resolve("org/rwkv-4@v1.0")
    assert (seen["repo"], seen["revision"]) == ("org/rwkv-4", "v1.0")
    assert "model.safetensors" in seen["allow_patterns"]
    assert not {"pytorch_model.bin", "flax_model.msgpack"} & set(seen["allow_patterns"])
    assert parents.commit(path) == "0123abc" and parents.detect(path) == "rwkv"


def test_unreachable_hub(monkeypatch):
    fails("no-such-org-delve/nothing", "no-such-org-delve/nothing", "hub")


def test_export_refuses_a_taken_name_and_leaves_nothing_behind(sources, tmp_path, monkeypatch):
    cfg, params, _ = parents.load(sources["neox"])
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("x")
    with pytest.raises(DelveError, match="--overwrite"):
        parents.export_stock(cfg, params, taken)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stock, "write_safetensors", full)
    with pytest.raises(DelveError, match="No space left"):
        parents.export_stock(cfg, params, taken, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"] and (taken / "mine").exists()


def test_source_reads_slices(sources):
    for name in ("rwkv", "rwkv-bin"):
        source = Source(sources[name], weight_files(sources[name]))
        whole = np.array(source.read("head.weight"))
        part = source.read("head.weight", (slice(3, 9), slice(1, 5)))
        np.testing.assert_array_equal(part, whole[3:9, 1:5])
