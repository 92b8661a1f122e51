"""docs/new_family.md stays true: its quotations, its commands, and OLMo as a family in one file.

Bar: |logit difference| <= 1e-5 max|logit| to transformers' OlmoForCausalLM, states included.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import delve_jax
from delve_jax import checkpoint, cli, config, models, parallel, parents, plan
from delve_jax.config import DelveError
from delve_jax.parents import export, stock

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from stock_models import equal, tensors  # noqa: E402  (needs torch)

ROOT = Path(__file__).resolve().parents[1]
FILE, PAGE = ROOT / "docs" / "examples" / "olmo.py", ROOT / "docs" / "new_family.md"
PROGRAM = "python docs/examples/olmo.py"
BAR, V, T = 1e-5, 256, 24


@pytest.fixture(scope="module")
def olmo():
    """The example, imported and thereby registered; other test files must not see it."""
    spec = importlib.util.spec_from_file_location("olmo_example", FILE)
    module = sys.modules["olmo_example"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for table in (config.FAMILIES, models.FAMILY, stock.FAMILIES, stock.MODEL_TYPES):
        del table["olmo"]
    del sys.modules["olmo_example"]


KINDS = {
    "grouped, clipped": dict(num_key_value_heads=2, clip_qkv=1.0),
    "multi-head, tied": dict(tie_word_embeddings=True, rope_parameters={
        "rope_type": "default", "rope_theta": 500.0}),
}  # fmt: skip


def torch_model(kind: str):
    """Tiny, random, and far from its initialisation: logits vary by units, clipping bites."""
    torch.manual_seed(0)
    model = transformers.OlmoForCausalLM(
        transformers.OlmoConfig(
            vocab_size=V,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            eos_token_id=0,
            **KINDS[kind],
        )  # fmt: skip
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=1.0 if "embed" in name and "tied" not in kind else p.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with what the page's commands read: parents/olmo, parents/mamba, text.txt."""
    root = tmp_path_factory.mktemp("new_family")
    torch_model("grouped, clipped").save_pretrained(root / "parents" / "olmo")
    torch.manual_seed(1)
    sizes = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    mamba.save_pretrained(root / "parents" / "mamba")
    (root / "text.txt").write_text("def f(x):\n    return x + 1\n\n# some words\n" * 20)
    return root


def blocks(language: str) -> list[tuple[str, str]]:
    """(the line before, the text) of the page's fenced blocks in a language."""
    fence = rf"^(.*)\n```{language}\n((?:(?!```).*\n)+)```$"
    return re.findall(fence, PAGE.read_text(), re.MULTILINE)


def commands() -> list[str]:
    return [line for _, text in blocks("console") for line in text.splitlines()]


@pytest.fixture(scope="module")
def done(olmo, work) -> dict:
    """Command of the page -> (exit code, JSON or None, stderr), run in the page's order."""
    out = {}
    with contextlib.chdir(work):
        for command in commands():
            assert command.startswith(PROGRAM + " "), command
            stdout, stderr = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                code = cli.main([*shlex.split(command)[2:], "--json"])
            text = stdout.getvalue()
            out[command] = (code, json.loads(text) if text else None, stderr.getvalue())
    return out


def one(done: dict, *words: str):
    """What the one command with these words gave."""
    (found,) = [result for command, result in done.items() if set(words) <= set(command.split())]
    return found


def difference(got, want) -> float:
    assert got.shape == want.shape
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


# ---- the page ------------------------------------------------------------------------------------


def test_quotations_stand_in_the_file():
    quoted = blocks("python")
    assert len(quoted) >= 8
    for source, text in quoted:
        (name,) = re.findall(r"<!-- (\S+) -->", source)
        assert text in (ROOT / name).read_text(), text
    for name in re.findall(r"`(test_\w+)`", PAGE.read_text()):
        assert name in globals(), name


def test_files_and_names_of_the_page_exist(olmo):
    """Every path in backticks is a file; every name that `register` asks for is explained."""
    text = PAGE.read_text()
    for name in re.findall(r"`((?:delve_jax|docs|tests)/[\w/]+\.py)`", text):
        assert "NAME" in name or (ROOT / name).is_file(), name
    for name in re.findall(r"`(compress/\w+\.py)`", text):
        assert (ROOT / "delve_jax" / name).is_file(), name
    explained = text + FILE.read_text()
    assert all(re.search(rf"\b{name}\b", explained) for name in parents.CONTRACT)


def test_commands_of_the_page(done, work):
    """All end as the page says: one refusal, word for word, and nothing left behind by it."""
    for command, (code, _, stderr) in done.items():
        refused = command.endswith("export out/fused out/fused-hf")
        assert code == (2 if refused else 0), (command, stderr)
    lines = one(done, "out/fused-hf")[2].splitlines()
    assert lines == [text.strip() for _, text in blocks("text")]
    assert not list((work / "out").glob("fused-hf*"))


# ---- the family ----------------------------------------------------------------------------------


def test_as_a_program(work):
    """A process of its own: the file is `delve`, and a plain `delve` does not know the family."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = ["convert", "parents/olmo", "out/alone", "--json"]
    run = subprocess.run(
        [sys.executable, FILE, *argv], cwd=work, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["family"] == "olmo"


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(olmo, kind, tmp_path, record_property):
    """Whole texts, pieces and single steps, rows behind left padding; nothing looks ahead."""
    model = torch_model(kind)
    model.save_pretrained(tmp_path)
    lm = delve_jax.load(tmp_path)
    assert isinstance(lm.config, olmo.OlmoConfig)
    tokens = np.random.default_rng(0).integers(0, V, (2, T))
    with torch.no_grad():
        want = model(torch.tensor(tokens), use_cache=False).logits.numpy()
    assert want.std() > 0.5
    got = lm.logits(tokens)
    errors = {"whole": difference(got, want)}
    later = lm.logits(np.where(np.arange(T) < T - 5, tokens, (tokens + 1) % V))
    np.testing.assert_array_equal(later[:, : T - 5], got[:, : T - 5])
    assert np.abs(later[:, T - 5 :] - got[:, T - 5 :]).max() > 0.1
    if "tied" in kind:
        assert lm.config.tie_embeddings and "head" not in lm.params
        assert lm.config.rope_theta == 500.0
    else:
        state, out = lm.init_state(2, 8), []  # grows on the way
        for piece in np.split(tokens, [10, 20, 21, 22, 23], axis=1):
            logits, state = lm.step(piece, state)
            out.append(logits)
        errors["steps"] = difference(np.concatenate(out, axis=1), want)
        mask = np.arange(T) >= np.array([[0], [7]])
        with torch.no_grad():
            alone = model(torch.tensor(tokens[1:, 7:]), use_cache=False).logits.numpy()
        errors["padded"] = difference(lm.logits(tokens, mask)[1:, 7:], alone)
        free = dataclasses.replace(lm.config, clip_qkv=None)
        assert difference(jax.jit(models.forward, static_argnums=0)(free, lm.params, tokens)[0],
                          want) > 0.01  # fmt: skip
    for what, error in errors.items():
        record_property(what, error)
    assert max(errors.values()) <= BAR, errors


def test_documents_of_a_row_do_not_see_each_other(olmo, randomised):
    cfg = olmo.OlmoConfig(V, V, 32, 2, n_heads=4, n_kv_heads=2, d_ffn=48)
    params = randomised(cfg, 0)
    tokens = np.random.default_rng(1).integers(0, V, (1, T))
    run = jax.jit(lambda p, t, s: models.forward(cfg, p, t, None, None, s)[0])
    segments = (np.arange(T) >= 9)[None].astype(np.int32)
    other = np.where(segments, tokens, (tokens + 1) % V)
    np.testing.assert_array_equal(run(params, tokens, segments)[:, 9:],
                                  run(params, other, segments)[:, 9:])  # fmt: skip


def test_round_trip_is_bit_exact(done, work):
    """HF -> checkpoint -> HF: the same tensors and config fields; transformers verified it."""
    before, after = work / "parents" / "olmo", work / "out" / "olmo-hf"
    equal(tensors(before), tensors(after))
    old, new = (json.loads((p / "config.json").read_text()) for p in (before, after))
    assert {k: v for k, v in old.items() if new.get(k) != v} == {}
    result = one(done, "out/olmo-hf")[1]
    assert result["verified"] and result["max_abs_diff"] <= BAR * result["max_abs_logit"]


def test_config_without_a_source_is_stock(olmo, tmp_path):
    """`stock`: what was never read from a file is read back as it was."""
    cfg = olmo.OlmoConfig(V, V, 32, 2, n_heads=4, n_kv_heads=2, d_ffn=48, clip_qkv=3.0)
    raw = stock.hf_config(cfg, "float32")
    back = olmo.config(raw, "config.json", vocab_size=V, vocab_rows=V)
    assert back == cfg
    assert config.from_json(json.loads(json.dumps(config.to_json(cfg)))) == cfg
    assert transformers.OlmoConfig(**raw).rope_parameters["rope_theta"] == cfg.rope_theta


def test_compressed_to_half(done):
    """Half of all parameters, factored, and still a stock directory that transformers runs."""
    whole, half = one(done, "convert", "out/olmo")[1], one(done, "compress")[1]
    maps = {"embed", "head", *models.FAMILY["olmo"].FACTORABLE}
    assert 0.49 * whole["parameters"] < half["parameters"] <= 0.5 * whole["parameters"]
    assert half["ranks"] and set(half["ranks"]) <= maps
    assert one(done, "out/olmo-small-hf")[1]["verified"]


def test_fused_is_the_pool_of_its_parents(done, work):
    """Equal weights without text: logits are the mean of the two parents' at step 0."""
    lm = delve_jax.load(work / "out" / "fused")
    assert one(done, "fuse")[1]["pool"] == {"olmo-small": 0.5, "mamba": 0.5}
    tokens = np.random.default_rng(2).integers(0, V, (2, T))
    each = [delve_jax.load(work / p).logits(tokens) for p in ("out/olmo-small", "parents/mamba")]
    assert difference(lm.logits(tokens), np.mean(each, axis=0)) <= BAR
    assert one(done, "out/rest-hf")[1]["verified"]


@pytest.mark.parametrize("part", ["dense", "factored"])
def test_sharding_rules_cover_every_parameter(olmo, part):
    """Each matrix is split over both axes of a mesh (a column map's first factor over data)."""
    cfg = olmo.OlmoConfig(V, V, 32, 2, n_heads=4, n_kv_heads=2, d_ffn=48)
    if part == "factored":
        ranks = {n: (8, 8) for n in olmo.FACTORABLE} | {"embed": (8,), "head": (8,)}
        cfg = dataclasses.replace(cfg, ranks=tuple(ranks.items()))
    mesh = jax.sharding.AbstractMesh((1, 2, 2), parallel.AXES)
    leaves = jax.tree_util.tree_leaves_with_path(models.abstract_params(cfg))
    assert len(leaves) == 9 * (1 + (part == "factored"))
    for keys, leaf in leaves:
        path = parallel.path_of(keys)
        split = set(parallel.spec_for(path, leaf.shape, mesh)) - {None}
        assert "data" in split, path
        assert part == "factored" or split == {"data", "model"}, path


def test_residual_is_true(olmo, randomised):
    """What moves the last map's output moves the block's by as much (`compress.anchor`)."""
    cfg = olmo.OlmoConfig(V, V, 32, 2, n_heads=4, n_kv_heads=2, d_ffn=48)
    layer = jax.tree.map(lambda a: a[0], randomised(cfg, 0)["layers"])
    x_BTD, bump = np.random.default_rng(0).normal(size=(2, 1, 8, 32)).astype(np.float32)

    def block(x_BTD, **more):
        ctx = olmo.context(cfg, x_BTD)[0]
        return olmo.Block(cfg).apply({"params": layer, **more}, x_BTD, None, ctx,
                                     mutable=["perturbations"])  # fmt: skip

    like = jax.eval_shape(block, x_BTD)[1]["perturbations"]
    still = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), like)

    @jax.jit
    def run(bump):
        moved = {**still, "mlp": {**still["mlp"], "down": {"out": bump}}}
        return block(x_BTD, perturbations=moved)[0][0]

    assert [name for name, where in olmo.RESIDUAL.items() if where == "out"] == ["mlp/down"]
    np.testing.assert_allclose(run(bump) - run(0 * bump), bump, atol=1e-5)


def test_flops_are_counted(olmo):
    """2 a weight that a token meets; of attention scores, sums and 3 a softmax weight."""
    cfg = olmo.OlmoConfig(V, V, 32, 2, n_heads=4, n_kv_heads=2, d_ffn=48)
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + V * 32
    assert plan.forward_flops(cfg, T) == 2 * weights + 2 * (4 * T * 32 + 3 * T * 4)


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("hidden_act", "gelu", "hidden_act"),
        ("attention_bias", True, "attention_bias"),
        ("num_attention_heads", 5, "num_attention_heads"),
        ("num_key_value_heads", 3, "num_attention_heads"),
        ("clip_qkv", "much", "clip_qkv"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0}, "rope_type"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_type"),
        ("rope_parameters", "x", "rope_parameters"),
    ],
)
def test_what_is_not_computed_is_refused(olmo, field, value, named):
    raw = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    with pytest.raises(DelveError, match=f"^config.json: field '{named}'"):
        olmo.config({**raw, field: value}, "config.json", vocab_size=V, vocab_rows=V)


# ---- registering ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "rwkv", "neox", "qwen3"])
def test_the_contract_is_that_of_the_built_in_families(name):
    both = models.FAMILY[name], stock.FAMILIES[name]
    assert [n for n in parents.CONTRACT if sum(hasattr(m, n) for m in both) != 1] == []


def test_register_refuses_what_would_not_work(olmo):
    class Empty:
        pass

    with pytest.raises(DelveError, match="'olmo': does not define FACTORABLE, MLP, RESIDUAL"):
        parents.register(olmo.OlmoConfig, Empty)
    with pytest.raises(DelveError, match=r"'olmo' \(model_type 'olmo'\): is there already"):
        parents.register(olmo.OlmoConfig, olmo)


def test_without_the_file_a_checkpoint_is_refused_in_one_line(done, work, monkeypatch):
    monkeypatch.delitem(config.FAMILIES, "olmo")
    with pytest.raises(DelveError, match="field 'family' must be one of mamba, rwkv, neox, qwen3"):
        checkpoint.load_config(work / "out" / "olmo")


def test_families_with_a_torch_block():
    """`export.BLOCKS` is the list of remote/modeling_delve.py, which only torch can import."""
    text = (export.REMOTE / "modeling_delve.py").read_text()
    (table,) = re.findall(r"^BLOCKS = \{(.*)\}$", text, re.MULTILINE)
    assert tuple(re.findall(r'"(\w+)":', table)) == export.BLOCKS


def test_compile_cache_also_of_a_process_that_has_started_jax(monkeypatch, tmp_path):
    """The file imports JAX before `cli.main` can set what JAX reads when it is imported."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # put back at the end, whatever main sets
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.25")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        cli._compile_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "delve_jax" / "jax")
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.25
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
