"""JAX -> Hugging Face -> JAX: logits, greedy text, caches, padding, round trip, refusals."""

import copy
import dataclasses
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import forward

from delve_jax import checkpoint, models, parallel, parents, road
from delve_jax.config import DelveConfig, DelveError, NeoxConfig, RwkvConfig
from delve_jax.parents import card, export

torch = pytest.importorskip("torch")
from exported import (  # noqa: E402
    V,
    common,
    joints,
    make,
    mamba,
    random_params,
    rwkv,
    three,
    tiny_tokenizer,
    torch_model,
    two,
)

RELOAD = Path(__file__).parent / "export_reload.py"


@pytest.fixture(scope="module")
def factored(tmp_path_factory):
    return make(
        tmp_path_factory.mktemp("three"), three(), "factored", 0
    )  # seeds whose greedy text wanders


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return make(tmp_path_factory.mktemp("two"), two(), "dense", 8)


@pytest.fixture(params=["factored", "dense"])
def case(request):
    """Three streams, J = 1, exported factored; two streams, J = K, exported dense."""
    return request.getfixturevalue(request.param)


def batch(length=12, pads=(0, 3, 7, 10)):
    """Left-padded tokens and mask; the padding ids are ordinary ids, so a leak would show."""
    tokens = np.random.default_rng(1).integers(0, V, (len(pads), length))
    return tokens, np.arange(length)[None] >= np.array(pads)[:, None]


def call(model, tokens, mask=None, **kw):
    mask = None if mask is None else torch.from_numpy(mask).long()
    with torch.no_grad():
        return model(torch.from_numpy(tokens), attention_mask=mask, **kw)


def pad_to(tokens, mask, length):
    """Left-pad further, to one shape for the compiled JAX program; padding changes nothing."""
    extra = length - tokens.shape[1]
    return np.pad(tokens, ((0, 0), (extra, 0))), np.pad(mask, ((0, 0), (extra, 0)))


def jax_logits(case, tokens, mask, length=140, rows=4):
    n, t = tokens.shape
    tokens, mask = pad_to(tokens, mask, length)
    fill = ((0, rows - n), (0, 0))
    tokens, mask = np.pad(tokens, fill), np.pad(mask, fill, constant_values=True)
    return np.asarray(case["jax"](jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)))[:n, -t:]


def test_logits_match_jax_padded_and_not(case):
    assert case["facts"]["verified"]
    assert case["facts"]["max_abs_diff"] <= 1e-4 * case["facts"]["max_abs_logit"]
    tokens, mask = batch(40, (0, 9, 21, 39))
    ours, theirs = jax_logits(case, tokens, mask), call(case["torch"], tokens, mask).logits.numpy()
    scale = np.abs(ours[mask]).max()
    assert scale > 2  # logits that vary, or the comparison says nothing
    assert np.abs(ours - theirs)[mask].max() <= 1e-4 * scale
    for row in range(4):  # and a padded row is the row alone
        alone = call(case["torch"], tokens[row : row + 1, mask[row]]).logits.numpy()[0]
        assert np.abs(alone - theirs[row, mask[row]]).max() <= 2e-5 * scale


@pytest.mark.parametrize(
    ("pads", "n"), [((0,), 32), ((0, 3, 7, 10), 128)], ids=["batch1", "batch4"]
)
def test_greedy_is_the_same_cached_uncached_and_in_jax(case, pads, n):
    tokens, mask = batch(12, pads)
    kw = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "eos_token_id": None}
    ids, attention = torch.from_numpy(tokens), torch.from_numpy(mask).long()
    texts = [
        case["torch"].generate(ids, attention_mask=attention, use_cache=cache, **kw).numpy()
        for cache in (True, False)
    ]
    full = np.pad(mask, ((0, 0), (0, n)), constant_values=True)
    logits = jax_logits(case, texts[0], full)[:, 11:-1]  # what JAX predicts on the same prefix
    assert len(np.unique(texts[0][:, 12:])) > 5  # not one token for ever
    for row in range(len(pads)):
        theirs, ours = texts[0][row, 12:], logits[row].argmax(-1)
        for other in (texts[1][row, 12:], ours):
            differing = np.flatnonzero(theirs != other)
            if len(differing):  # only where the two best are a rounding apart
                top = np.sort(logits[row, differing[0]])[-2:]
                assert top[1] - top[0] <= 1e-4


def test_chunks_and_steps_continue_the_cache(case):
    tokens, mask = batch(20)
    full = call(case["torch"], tokens, mask).logits.numpy()
    cache, parts, at = None, [], 0
    for size in (2, 1, 9, 1, 7):  # the first chunks end inside the padding
        out = call(
            case["torch"],
            tokens[:, at : at + size],
            mask[:, : at + size],
            past_key_values=cache,
            use_cache=True,
        )
        cache, at = out.past_key_values, at + size
        parts.append(out.logits.numpy())
    difference = np.abs(np.concatenate(parts, 1) - full)[mask].max()
    assert difference <= 2e-5 * np.abs(full).max()


def test_beams_keep_their_states_apart(case):
    tokens, mask = batch(6, (0, 2))
    kw = {"max_new_tokens": 8, "num_beams": 4, "do_sample": False, "eos_token_id": None}
    ids, attention = torch.from_numpy(tokens), torch.from_numpy(mask).long()
    runs = [
        case["torch"].generate(ids, attention_mask=attention, use_cache=c, **kw)
        for c in (True, False)
    ]
    assert torch.equal(*runs)


def test_loss_logits_to_keep_and_refused_padding(case):
    model, (tokens, mask) = case["torch"], batch(10)
    out = call(model, tokens, labels=torch.from_numpy(tokens))
    log_p = torch.log_softmax(out.logits[:, :-1], -1)
    nll = -log_p.gather(-1, torch.from_numpy(tokens)[:, 1:, None]).mean()
    assert abs(out.loss - nll) < 1e-5 and out.past_key_values is None
    assert case["cfg"].latents == 1 or torch.logsumexp(out.logits, -1).abs().max() < 1e-5
    last = call(model, tokens, logits_to_keep=2).logits
    torch.testing.assert_close(last, out.logits[:, -2:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="on the left"):
        call(model, tokens, mask[:, ::-1].copy(), use_cache=True)
    cache = call(model, tokens, mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cover all 11 tokens"):
        call(model, tokens[:, :1], mask[:, :1], past_key_values=cache)


def test_right_padding_without_a_word_on_the_cache_goes_without_one(case):
    tokens, mask = batch()
    mask = mask[:, ::-1].copy()
    out = call(case["torch"], tokens, mask)
    assert out.past_key_values is None
    for row in range(4):
        alone = call(case["torch"], tokens[row : row + 1, mask[row]]).logits[0]
        torch.testing.assert_close(out.logits[row, mask[row]], alone, rtol=1e-4, atol=1e-4)


def test_a_16_bit_model_says_so_and_is_saved_as_one(factored, tmp_path):
    half = factored["torch"].from_pretrained(factored["hf"], dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.pool.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    back = torch_model(tmp_path / "half")
    assert {n: p.dtype for n, p in back.named_parameters()} == {
        n: p.dtype for n, p in half.named_parameters()
    }


class Packed(torch.nn.Module):
    """A linear map that stores integers, as those of 4 and 8 bits do."""

    def __init__(self, linear):
        super().__init__()
        self.map = linear.forward  # bound: its weight is none of ours
        self.weight = torch.nn.Parameter(torch.zeros(3, 1, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        assert x.is_floating_point()
        return self.map(x)


@pytest.mark.parametrize("cfg", [three(), common(1)], ids=["tied-factored", "codes"])
def test_integer_weights_of_linear_maps_are_not_read(factored, cfg):
    """The maps that quantisers replace (exactly `nn.Linear`) are called, whatever they hold."""
    kind = type(factored["torch"])
    raw = export._hf_config(cfg, "factored", "float32", {})
    model, (tokens, mask) = kind(kind.config_class(**raw)).eval(), batch()
    plain = call(model, tokens, mask).logits
    linear = [m for m in model.modules() if type(m) is torch.nn.Linear]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in linear:
                setattr(parent, name, Packed(child))
    assert len(linear) > 60 and torch.equal(call(model, tokens, mask).logits, plain)


@pytest.mark.parametrize("away", ["streams.0", "hub", "auto"])
def test_parts_that_are_kept_on_the_disk_give_the_same_logits(factored, tmp_path, away):
    pytest.importorskip("accelerate")
    model, (tokens, mask) = factored["torch"], batch()
    names = ["hub", "gate", "pool", *(f"streams.{k}" for k in range(3))]
    where = {name: "disk" if name == away else "cpu" for name in names}
    how = {"device_map": where}
    if away == "auto":  # memory for a part of the first stream
        how = {"device_map": "auto", "max_memory": {"cpu": 90_000}}
    spread = model.from_pretrained(factored["hf"], offload_folder=tmp_path, **how).eval()
    assert "disk" in spread.hf_device_map.values()
    assert torch.equal(call(spread, tokens, mask).logits, call(model, tokens, mask).logits)


def test_a_step_follows_its_layer_to_another_device(factored):
    """As accelerate asks where layers have devices: padding, mask and NeoX's angles."""
    tokens, mask = map(torch.from_numpy, batch())
    steps = factored["torch"]._steps(tokens, mask, None, None)
    for step, n in zip((step.to("meta") for step in steps), (2, 2, 4), strict=True):
        fields = [step.pad_BT1, step.mask_B1TS, *(step.rotary or ())]
        assert [x.device.type for x in fields] == ["meta"] * n


def test_a_reentrant_checkpoint_gives_every_stream_its_gradients(factored):
    """As adapters ask for them: all else frozen, one embedding told to want a gradient."""
    model = copy.deepcopy(factored["torch"]).train()
    factors = [(n, p.requires_grad_(n.endswith("u.weight"))) for n, p in model.named_parameters()]
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": True})
    tokens = torch.from_numpy(batch()[0])
    model(tokens, labels=tokens).loss.backward()
    assert not [n for n, p in factors if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_tables_are_not_resized(case):
    with pytest.raises(NotImplementedError, match="its own tables"):
        case["torch"].resize_token_embeddings(V + 8)


def test_an_export_names_the_transformers_that_it_needs(factored, monkeypatch):
    import transformers

    pinned = (Path(__file__).parents[1] / "requirements.txt").read_text().split()
    assert card.TRANSFORMERS in pinned
    assert f"`{card.TRANSFORMERS}`" in (factored["hf"] / "README.md").read_text()
    config = json.loads((factored["hf"] / "config.json").read_text())
    assert config["transformers_version"] == transformers.__version__
    monkeypatch.delattr(transformers.Cache, "get_recurrent_state")
    with pytest.raises(ImportError, match="needs transformers 5.23 or 5.24; this is"):
        runpy.run_path(str(factored["hf"] / "modeling_delve.py"))


def test_exported_directory_alone_in_a_process_without_jax(factored, tmp_path):
    tokens, mask = batch(12)
    text = "the model"
    data = {"tokens": tokens, "mask": mask, "logits": jax_logits(factored, tokens, mask)}
    np.savez(tmp_path / "expected.npz", text=text, **data)
    args = [sys.executable, "-I", str(RELOAD), str(factored["hf"]), str(tmp_path / "expected.npz")]
    run = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    out = json.loads(run.stdout.splitlines()[-1])
    assert out["difference"] <= 1e-4 * out["scale"]
    assert out["saved_again"] == 0 and not out["leaked"]
    assert not out["no_gradient"]
    assert out["kept_float32"] == ["A_log", "D", "pool", "time_decay", "time_first"]
    assert 0 < out["bfloat16_difference"] < 0.2 * out["scale"]
    from tokenizers import Tokenizer

    assert out["text_ids"] == Tokenizer.from_str(tiny_tokenizer()).encode(text).ids


def test_way_back_is_exact(factored):
    cfg, params, tokenizer = export.read_exported_delve(factored["hf"])
    assert cfg == factored["cfg"] and tokenizer == tiny_tokenizer()
    assert jax.tree.structure(params) == jax.tree.structure(factored["params"])
    jax.tree.map(np.testing.assert_array_equal, params, factored["params"])
    mesh = parallel.make_mesh()
    half_cfg, half, _ = export.read_exported_delve(factored["hf"], "bfloat16", mesh)
    assert half_cfg == cfg  # its dtype says what is stored, not what was asked for
    leaf = half["streams"]["first"]["layers"]["in_proj"]["u"]
    assert leaf.sharding.mesh == mesh and leaf.dtype == jnp.bfloat16
    expected = factored["params"]["streams"]["first"]["layers"]["in_proj"]["u"]
    np.testing.assert_array_equal(leaf, expected.astype(jnp.bfloat16))
    for wide in (half["streams"]["first"]["layers"]["A_log"], half["pool"]["a"],
                 half["streams"]["second"]["layers"]["att"]["time_decay"]):  # fmt: skip
        assert wide.dtype == jnp.float32


def test_an_export_names_teachers_without_paths_of_this_machine(tmp_path):
    """A hub id and an address as they are, a converted checkpoint by its hub id, a folder's name"""
    ours, hub = tmp_path / "secret" / "mine", tmp_path / "secret" / "converted"
    for folder, source in ((ours, None), (hub, "org/model@main")):
        folder.mkdir(parents=True)
        record = {"source": source or str(tmp_path), "commit": source and "0123abc"}
        (folder / "source.json").write_text(json.dumps(record))
    gone = str(tmp_path / "secret" / "gone")
    named = (str(ours), str(hub), gone, "org/other@v1", "https://example.org/m")
    cfg = dataclasses.replace(two(), teachers=named)
    checkpoint.save(tmp_path / "c", cfg, random_params(cfg))
    export.export_hf(tmp_path / "c", tmp_path / "hf", verify=False)
    for file in (tmp_path / "hf").glob("*.json"):
        assert "secret" not in file.read_text(), file
    back, _, _ = export.read_exported_delve(tmp_path / "hf")
    assert back.teachers == (
        "mine", "org/model@0123abc", "gone", "org/other@v1", "https://example.org/m"
    )  # fmt: skip
    assert checkpoint.load_config(tmp_path / "c").teachers == named


def test_a_teacher_of_which_only_the_name_is_known_is_not_looked_for(tmp_path, monkeypatch):
    """A folder of the same name, wherever one happens to stand, may be anything."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "mine", rwkv(), random_params(rwkv()), tiny_tokenizer())
    with pytest.raises(DelveError, match="^mine: is known by its name only"):
        road.load_teacher("mine", tiny_tokenizer(), recorded=True)
    assert road.load_teacher("mine", tiny_tokenizer())[0] == rwkv()


def test_sixteen_bit_way_back_is_exact_and_in_shards(tmp_path, monkeypatch):
    cfg = two()
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_params(cfg))
    checkpoint.save(tmp_path / "c", cfg, params)
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    facts = export.export_hf(tmp_path / "c", tmp_path / "hf")
    assert facts["verified"] and "model.safetensors.index.json" in facts["files"]
    assert facts["parameters"] == models.count(cfg) and facts["dtype"] == "bfloat16"
    _, back, _ = export.read_exported_delve(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, back, params)
    # products of factors are rounded to 16 bits: compared all the same, less closely
    dense = export.export_hf(tmp_path / "c", tmp_path / "dense", "dense")
    assert dense["verified"] and dense["max_abs_diff"] > facts["max_abs_diff"]


def test_one_compressed_parent_leaves_dense_as_a_stock_directory(tmp_path):
    from transformers import RwkvForCausalLM

    cfg = rwkv(ranks=(("att/output", (7, 8, 8)), ("embed", (9,))))
    checkpoint.save(tmp_path / "c", cfg, random_params(cfg), tiny_tokenizer())
    facts = export.export_hf(tmp_path / "c", tmp_path / "hf")
    assert facts["verified"] and facts["layout"] == "dense" and facts["model_type"] == "rwkv"
    assert facts["parameters"] == models.count(dataclasses.replace(cfg, ranks=()))
    assert not list((tmp_path / "hf").glob("*.py"))
    assert RwkvForCausalLM.from_pretrained(tmp_path / "hf").num_parameters() == facts["parameters"]


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_one_parent_leaves_factored_as_a_delve_of_one_stream(tmp_path, family):
    cfg = {
        "mamba": mamba(tie_embeddings=True, ranks=(("in_proj", (7, 8, 8, 7, 8, 6)),)),
        "rwkv": rwkv(ranks=(("att/output", (7, 8, 8)),)),
    }[family]
    checkpoint.save(tmp_path / "c", cfg, random_params(cfg))
    assert export.export_hf(tmp_path / "c", tmp_path / "hf", "factored")["verified"]
    ids, kw = torch.arange(10)[None], {"max_new_tokens": 12, "do_sample": False}
    # without an attention stream `generate` has no cache that knows the length but ours
    model = torch_model(tmp_path / "hf")
    runs = [model.generate(ids, use_cache=c, **kw) for c in (True, False)]
    assert torch.equal(*runs) and runs[0].shape == (1, 22)
    back, params, _ = export.read_exported_delve(tmp_path / "hf")
    logits = forward(back, params, jnp.arange(10)[None])[0]
    np.testing.assert_allclose(logits, call(model, ids.numpy()).logits, atol=1e-4)


def test_a_wrong_export_is_caught_and_leaves_nothing(factored, tmp_path, monkeypatch):
    wrong = tmp_path / "remote"
    shutil.copytree(export.REMOTE, wrong)
    code = (wrong / "modeling_delve.py").read_text()
    right = "EPS = 1e-6"  # of the hub's and the gate's norm
    assert right in code
    code = code.replace(right, "EPS = 1e-3")
    (wrong / "modeling_delve.py").write_text(code)
    with (wrong / "configuration_delve.py").open("a") as file:
        file.write("# transformers keeps a model class per config file: make this one new\n")
    monkeypatch.setattr(export, "REMOTE", wrong)
    with pytest.raises(DelveError, match="logits differ"):
        export.export_hf(factored["checkpoint"], tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["remote"]


def test_an_export_that_dies_in_its_check_is_begun_anew(tmp_path, monkeypatch):
    """The stock layout is a write within a write: DST.partial stays ours all the while."""
    cfg, dst = rwkv(), tmp_path / "hf"
    checkpoint.save(tmp_path / "ck", cfg, random_params(cfg))
    seen = []

    def killed(partial, *_):
        seen.extend(sorted(p.name for p in partial.iterdir()))
        monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)  # nothing after it
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_check", killed)
    with pytest.raises(KeyboardInterrupt):
        export.export_hf(tmp_path / "ck", dst)
    monkeypatch.undo()
    assert ".delve" in seen and "model.safetensors" in seen and not dst.exists()
    assert export.export_hf(tmp_path / "ck", dst, verify=False)["layout"] == "dense"
    assert not list(dst.glob(".*")) and not list(tmp_path.glob("*.partial"))


def test_repeated_other_and_overwriting_exports(factored, tmp_path, monkeypatch):
    src, dst = factored["checkpoint"], tmp_path / "hf"
    monkeypatch.setitem(sys.modules, "torch", None)  # as if torch were not installed
    assert export.export_hf(src, dst)["verified"] is False
    assert "**Not verified**" in (dst / "README.md").read_text()
    before = (dst / "model.safetensors").stat().st_mtime_ns
    assert export.export_hf(src, dst)["already"]
    assert (dst / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(DelveError, match="--overwrite"):
        export.export_hf(src, dst, "dense")
    assert export.export_hf(src, dst, "dense", overwrite=True)["layout"] == "dense"
    cfg, _, _ = export.read_exported_delve(dst)
    assert all(not sub.ranks for _, sub in cfg.streams)
    assert not list(dst.glob(".*"))  # what marked DST.partial as ours has gone
    half = tmp_path / "hf.partial"
    half.mkdir()
    (half / "notes.txt").write_text("mine")
    for more in ({}, {"overwrite": True}):  # the first is refused because of DST
        with pytest.raises(DelveError, match="--overwrite|hf.partial: is in the way and not ours"):
            export.export_hf(src, dst, **more)
        assert (half / "notes.txt").read_text() == "mine" and (dst / "config.json").exists()
    (half / ".delve").touch()  # as a killed export leaves it
    assert export.export_hf(src, dst, overwrite=True)["layout"] == "factored"
    assert not half.exists()
    with pytest.raises(DelveError, match="--layout"):
        export.export_hf(src, dst, "thin")


def test_a_run_under_way_leaves_with_its_newest_state_or_the_one_named(tmp_path):
    cfg, run, dst = rwkv(), tmp_path / "h.partial", tmp_path / "hf"
    params = {1: random_params(cfg)}
    params[2] = jax.tree.map(lambda x: 2 * x, params[1])
    run.mkdir()
    checkpoint.describe_run(run, cfg, tiny_tokenizer())
    states = checkpoint.Steps(run / "state")

    def leaves(src, step, **kw):
        facts = export.export_hf(src, dst, verify=False, **kw)
        jax.tree.map(np.testing.assert_array_equal, parents.load(dst)[1], params[step])
        return facts

    for step in (1, 2):
        states.save(step, {"params": params[step]})
        states.wait()
        if step == 2:  # the same command, but no longer the same weights
            with pytest.raises(DelveError, match="--overwrite"):
                export.export_hf(run, dst, verify=False)
        assert "already" not in leaves(run, step, overwrite=step == 2)
        assert leaves(run, step)["already"]
    leaves(states.path(1), 1, overwrite=True)


def damage(folder, name, change):
    """Rewrite model.safetensors with one tensor changed (None: left out)."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    tensors = {k: v for k, v in tensors.items() if v is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: None, "missing"),
        (lambda x: x[:-1], "shape"),
        (lambda x: x * np.nan, "NaN"),
    ],
    ids=["missing", "shape", "nan"],
)
def test_damaged_export_is_refused_by_name(factored, tmp_path, change, message):
    shutil.copytree(factored["hf"], tmp_path / "hf")
    name = "streams.1.layers.2.att.key.v.weight"
    damage(tmp_path / "hf", name, change)
    with pytest.raises(DelveError, match=f"{name}.*{message}"):
        export.read_exported_delve(tmp_path / "hf")


def test_truncated_unknown_and_foreign_directories_are_refused(factored, tmp_path):
    shutil.copytree(factored["hf"], tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DelveError, match="truncated"):
        export.read_exported_delve(tmp_path / "hf")
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    thin = {**config, "streams": config["streams"][:2], "latents": 1}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(thin))
    with pytest.raises(DelveError, match="unknown tensor"):
        export.read_exported_delve(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(DelveError, match="model_type"):
        export.read_exported_delve(tmp_path / "hf")


def test_dense_layout_is_the_product_of_the_factors(case):
    cfg, params = case["cfg"], case["params"]
    dense_cfg, dense = export.densify(cfg, params)
    assert all(not sub.ranks for _, sub in dense_cfg.streams)
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(
        jnp.shape, models.abstract_params(dense_cfg)
    )
    name = cfg.names[0]
    factors = params["streams"][name]["layers"]["out_proj"]
    kernel = dense["streams"][name]["layers"]["out_proj"]["kernel"]
    np.testing.assert_allclose(kernel, factors["v"] @ factors["u"], atol=1e-5)
    assert dataclasses.replace(dense_cfg, streams=cfg.streams) == cfg


@pytest.mark.parametrize("latents,connectors,layout", [
    (1, "hub", "factored"), (3, "self", "factored"), (2, "cross", "factored"),
    (1, "none", "factored"), (2, "hub", "dense"),
])  # fmt: skip
def test_common_codes_leave_and_come_back(tmp_path, latents, connectors, layout):
    """The export has the logits of the JAX model; a factored one comes back bit for bit. So for
    every head and all connectors."""
    case = make(tmp_path, common(latents, connectors), layout, 4)
    assert case["facts"]["verified"]
    assert case["facts"]["max_abs_diff"] <= 1e-4 * case["facts"]["max_abs_logit"]
    shared = layout == "factored"
    assert hasattr(case["torch"], "codes") == shared
    if not shared:
        return
    stored = sum(tensor.numel() for tensor in case["torch"].state_dict().values())
    assert stored == models.count(case["cfg"])
    cfg, params, _ = export.read_exported_delve(tmp_path / "hf")
    assert cfg == case["cfg"]
    jax.tree.map(np.testing.assert_array_equal, params, case["params"])


PRUNED = {
    "neox": NeoxConfig(V, V, 24, 3, context_length=128, n_heads=2, d_ffn=31, neurons=(20, 0, 31)),
    "rwkv": RwkvConfig(V, V, 32, 2, context_length=128, d_att=40, d_ffn=33, neurons=(33, 9),
                       ranks=(("ffn/key", (5, 7)), ("ffn/receptance", (0, 3)))),
}  # fmt: skip


@pytest.mark.parametrize("family", PRUNED)
def test_a_pruned_parent_leaves_padded_as_a_stock_directory(tmp_path, family):
    cfg = PRUNED[family]
    checkpoint.save(tmp_path / "c", cfg, random_params(cfg), tiny_tokenizer())
    facts = export.export_hf(tmp_path / "c", tmp_path / "hf")
    assert facts["verified"] and facts["model_type"] in ("gpt_neox", "rwkv")
    padded = dataclasses.replace(cfg, ranks=(), neurons=())
    assert facts["parameters"] == models.count(padded) > models.count(cfg)
    back, params, _ = parents.load(tmp_path / "hf")
    assert (back.d_ffn, back.neurons) == (cfg.d_ffn, ())
    assert ", ".join(map(str, cfg.neurons)) in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.parametrize("layout", ["factored", "dense"])
def test_a_delve_of_pruned_parents_leaves_at_its_true_widths(tmp_path, layout):
    cfg = DelveConfig(tuple(PRUNED.items()), n_superblocks=2, latents=1, **joints())
    case = make(tmp_path, cfg, layout, 2)
    assert case["facts"]["verified"]
    assert case["facts"]["max_abs_diff"] <= 1e-4 * case["facts"]["max_abs_logit"]
    stored = sum(tensor.numel() for tensor in case["torch"].state_dict().values())
    back, params, _ = export.read_exported_delve(tmp_path / "hf")
    assert case["facts"]["parameters"] == stored == models.count(back)
    assert [sub.neurons for _, sub in back.streams] == [(20, 0, 31), (33, 9)]
    if layout == "factored":
        assert back == cfg
        jax.tree.map(np.testing.assert_array_equal, params, case["params"])
