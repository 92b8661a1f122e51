"""Parents in and out: every family and file layout bit-exact both ways."""

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled import forward
from stock_models import broken, built_once, equal, tensors, tokenizer_json, torch, transformers

from delve_jax import lineage, models, parallel, parents
from delve_jax.config import DelveError
from delve_jax.parents import io, stock
from delve_jax.parents.io import Source, weight_files

WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "weights"
needs_weights = pytest.mark.skipif(
    not WEIGHTS.is_dir(), reason="../shared/data/weights is absent: trained RWKV-4 not tested"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return built_once(tmp_path_factory)


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
    ours, _ = forward(cfg, params, tokens)
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
    # of its factored form the dense parent is this one still, head included
    factored = dataclasses.replace(cfg, ranks=(("head", (3,)),))
    assert models.count(stock.dense_parents(factored)[0]) == models.count(cfg)


@pytest.mark.parametrize(("head", "said"), [
    ("license: mit", "mit"), ("license: 'mit'  # all of it", "mit"), ("license: [mit]", "mit"),
    ("license:\n- apache-2.0", "apache-2.0"), ("license: [mit, other]", None),
    ("license:\nlanguage: en", None), ("tags: [license]", None), ("license: [mit", None),
])  # fmt: skip
def test_the_licence_in_a_parents_card(tmp_path, head, said):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\nlicense: of no head\n")
    assert lineage._license(tmp_path) == said


def test_safetensors_win_over_bin(sources, tmp_path):
    path = tmp_path / "both"
    shutil.copytree(sources["rwkv"], path)
    shutil.copy(sources["neox-bin"] / "pytorch_model.bin", path)
    assert [f.suffix for f in weight_files(path)] == [".safetensors"]
    parents.load(path)


def test_dtype_is_cast_except_where_it_would_hurt(sources):
    cfg, params, _ = parents.load(sources["mamba"], dtype="bfloat16")
    kept = {k for k, x in params["layers"].items() if getattr(x, "dtype", None) == np.float32}
    assert cfg.dtype == "float32" and kept == {"A_log", "D"}
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


def test_valid_ids_are_the_tokenizers(sources, tmp_path):
    """37 ids over 40 rows: logits are cut, rows are kept, the tokenizer travels."""
    path = broken(sources, tmp_path)
    (path / "tokenizer.json").write_text(tokenizer_json(37))
    cfg, params, text = parents.load(path)
    assert (cfg.vocab_size, cfg.vocab_rows) == (37, 40)
    assert params["embed"]["kernel"].shape[0] == 40
    assert forward(cfg, params, np.zeros((1, 2), int))[0].shape == (1, 2, 37)
    parents.export_stock(cfg, params, tmp_path / "hf", text)
    equal(tensors(path), tensors(tmp_path / "hf"))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(loaded) == 37 and loaded("t5 added")["input_ids"] == [5, 36]
    assert loaded.eos_token == "<|endoftext|>" or loaded.eos_token_id == 2  # GPTNeoXConfig's eos


def test_cut_vocabulary_stays_cut(sources, tmp_path):
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
        logits, _ = forward(cfg, params, tokens)
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


def test_source_reads_slices(sources):
    for name in ("rwkv", "rwkv-bin"):
        source = Source(sources[name], weight_files(sources[name]))
        whole = np.array(source.read("head.weight"))
        part = source.read("head.weight", (slice(3, 9), slice(1, 5)))
        np.testing.assert_array_equal(part, whole[3:9, 1:5])


def test_a_header_of_any_length_is_mapped(sources, tmp_path):
    """Then the tensors lie on odd addresses; our own and new files' headers are filled up to 8."""
    shutil.copytree(sources["neox"], tmp_path / "odd")
    file = tmp_path / "odd" / "model.safetensors"
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    file.write_bytes(struct.pack("<Q", size + 3) + raw[8 : 8 + size] + b"   " + raw[8 + size :])
    want, got = (parents.load(place)[1] for place in (sources["neox"], tmp_path / "odd"))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_file_that_went_away_is_named(sources, tmp_path):
    shutil.copytree(sources["neox"], tmp_path / "gone")
    source = Source(tmp_path / "gone", weight_files(tmp_path / "gone"))
    (tmp_path / "gone" / "model.safetensors").unlink()
    with pytest.raises(DelveError, match=r"model\.safetensors: tensor .* cannot be read"):
        source.read(next(iter(source.tensors)))


@pytest.mark.parametrize("kind", ["neox", "rwkv-bin"])
def test_a_file_mapped_again_for_every_tensor_holds_the_same(sources, kind, monkeypatch):
    """While another thread still copies out of the mapping before."""
    want = parents.load(sources[kind])[1]
    monkeypatch.setattr(io, "WINDOW", 1)
    monkeypatch.setattr(stock, "READERS", 8)
    jax.tree.map(np.testing.assert_array_equal, parents.load(sources[kind])[1], want)
