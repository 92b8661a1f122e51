"""Bad parents: whatever is wrong with a source, one line that names the file and the tensor."""

import errno
import json
import shutil
import sys
from pathlib import Path

import pytest
from commands import bad
from stock_models import broken, built_once, rewrite, tokenizer_json, torch

from delve_jax import checkpoint, data, parents, presets, road, upcycle
from delve_jax import compress as compression
from delve_jax.config import DelveConfig, DelveError, from_json, to_json
from delve_jax.parents import stock
from delve_jax.parents.io import weight_files


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return built_once(tmp_path_factory)


def fails(path, *words, dtype=None) -> None:
    """load raises one line that holds all of `words`."""
    with pytest.raises(DelveError) as caught:
        parents.load(path, dtype=dtype)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message, (word, message)


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
    for unknown in ("bf16", "int8"):
        fails(path, f"dtype '{unknown}': must be float32", dtype=unknown)
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


def test_unreachable_hub(monkeypatch):
    fails("no-such-org-delve/nothing", "no-such-org-delve/nothing", "hub")


def test_export_refuses_a_taken_name_and_leaves_nothing_behind(sources, tmp_path, monkeypatch):
    cfg, params, _ = parents.load(sources["neox"])
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("x")
    with pytest.raises(DelveError, match="--overwrite"):
        parents.export_stock(cfg, params, taken)
    with pytest.raises(DelveError, match="leaves it alone"):
        parents.export_stock(cfg, params, taken, overwrite=True)
    (taken / "config.json").write_text("{}")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stock, "write_safetensors", full)
    with pytest.raises(DelveError, match="No space left"):
        parents.export_stock(cfg, params, taken, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"] and (taken / "mine").exists()


def test_torch_is_asked_for_where_it_is_needed(sources, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    fails(sources["neox-bin"], "pip install torch")
    parents.load(sources["neox"])  # safetensors need none


def test_destinations_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    """One line, no traceback: the folder that one stands in, a file in the way, a full disk."""
    source = upcycle.PROXIES / "rwkv"
    monkeypatch.chdir(tmp_path)
    assert "name a directory to make" in bad(capsys, "convert", source, ".")
    with pytest.raises(DelveError, match="name a directory to make"), checkpoint.writing("."):
        pass
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in bad(capsys, "convert", source, "file/in/it")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "spectra.npz")

    monkeypatch.setattr(compression, "compress", full)
    line = bad(capsys, "compress", source, "small", "--keep", 0.5, "--method", "svd")
    assert line == "error: spectra.npz: No space left on device"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("streams", 5, "a list of parents"),
        ("streams", [], "a list of parents"),
        ("streams", [{"family": "rwkv"}], "each with a 'name'"),
        ("streams", [["rwkv"]], "each with a 'name'"),
        ("teachers", "a", "a list of strings"),
        ("latents", "1", "a whole number"),
        ("ranks", [4, 4], "an object: for each map a list of whole numbers"),
        ("ranks", {"head": 4}, "a list of whole numbers"),
        ("ranks", {"head": ["4"]}, "a list of whole numbers"),
        ("ranks", {"head": []}, "gives 'head' []; it must be one rank"),
        ("ranks", {"att/key": [4, 4, 4, -1]}, "gives 'att/key' [4, 4, 4, -1]"),
        ("nested", {"head": None}, "a list of whole numbers"),
        ("neurons", ["9"], "a list of whole numbers"),
        ("n_layers", None, "a whole number"),
        ("d_model", True, "a whole number"),
        ("family", ["rwkv"], "one of mamba"),
        ("n_layers", 0, "is 0; at least 1"),
        ("d_ffn", -4, "is -4; at least 1"),
        ("latents", 0, "is 0; at least 1"),
        ("gate_proj", -1, "is -1; at least 0"),
        ("vocab_size", 10**9, "is more than vocab_rows"),
        ("dtype", "int8", "must be one of float32"),
        ("ranks", {"att/qkv": [4, 4, 4, 4]}, "has 'att/qkv'; maps of rwkv are att/key"),
    ],
)
def test_bad_fields_of_a_checkpoint_are_named(tmp_path, capsys, field, value, says):
    cfg = presets.preset("proxy-rwkv")
    joined = to_json(DelveConfig((("r", cfg),), n_superblocks=1))
    config = joined if field in joined else to_json(cfg)
    from_json(config)
    (tmp_path / "params").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    line = bad(capsys, "info", tmp_path)
    assert line.startswith(f"error: {tmp_path / 'config.json'}: field '{field}' ") and says in line
    if config is not joined:  # a parent's field in a DELVE
        joined["streams"][0][field] = value
        with pytest.raises(DelveError, match=f"^x.json: field '{field}'"):
            from_json(joined, "x.json")


def test_heads_that_do_not_divide_are_named():
    for name, field, value, whole in (
        ("proxy-neox", "n_heads", 5, "d_model"), ("delphi-512", "n_kv_heads", 3, "n_heads"),
    ):  # fmt: skip
        config = to_json(presets.preset(name))
        assert from_json(config) == presets.preset(name)
        with pytest.raises(DelveError, match=f"^x.json: field '{field}' must divide {whole}"):
            from_json({**config, field: value}, "x.json")


def test_a_source_without_a_tokenizer_is_told_where_to_put_one():
    one, other = (data.train_bpe([text * 9], 300) for text in ("one text ", "quite another "))
    road.same_tokenizer([("a.pth", None), ("b.pth", None)])
    for pair in ([("a.pth", None), ("b", one)], [("b", one), ("a.pth", None)]):
        with pytest.raises(DelveError, match="^a.pth: has no tokenizer.json and b has .* beside"):
            road.same_tokenizer(pair)
    with pytest.raises(DelveError, match="^b: its tokenizer differs from that of a; .* share one"):
        road.same_tokenizer([("a", one), ("b", other)])


def test_names_of_local_sources(tmp_path, monkeypatch):
    """A path may hold "@"; "." has no name of its own; hub ids lose their revision."""
    folder = tmp_path / "me@host" / "neox"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert [road.name_of(s) for s in (folder, f"{folder}/", ".")] == ["neox"] * 3
    assert road.name_of("org/name@refs/pr/1") == "name"
    assert road.name_of("/gone/RWKV-4-430M.pth") == "RWKV-4-430M"
