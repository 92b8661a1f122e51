"""`delve plan` against published counts, real arrays, XLA's own count and a compiled step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delve_jax import checkpoint, cli, models, parallel, plan, presets, upcycle
from delve_jax.config import (
    DelveConfig,
    DelveError,
    MambaConfig,
    NeoxConfig,
    Qwen3Config,
    RwkvConfig,
)
from delve_jax.train.loop import init_state
from delve_jax.train.objective import Terms
from delve_jax.train.run import Settings

GRID = [*range(512, 2305, 128), 2560, 3840, 5376]
SOME = Settings(tokens=10_000, batch=8)


def families(d: int, **more) -> dict:
    shared = dict(vocab_size=256, vocab_rows=256, d_model=d, context_length=64) | more
    out = {
        "mamba": MambaConfig(**shared, d_inner=2 * d, d_state=4, dt_rank=8),
        "tied": MambaConfig(**shared, d_inner=2 * d, d_state=4, dt_rank=8, tie_embeddings=True),
        "rwkv": RwkvConfig(**shared, d_att=d, d_ffn=4 * d),
        "neox": NeoxConfig(**shared, n_heads=4, d_ffn=4 * d),
        "qwen3": Qwen3Config(**shared, n_heads=4, n_kv_heads=2, head_dim=d // 2, d_ffn=3 * d),
    }
    if shared["n_layers"] == 1:
        ranks = (("mlp/up", (24,)), ("att/out", (16,)), ("head", (40,)))
    else:
        ranks = (("mlp/up", (24, 8)), ("att/out", (16, 4)), ("head", (40,)))
    out["factored"] = NeoxConfig(**shared, n_heads=4, d_ffn=4 * d, ranks=ranks)
    parents = tuple((n, out[n]) for n in ("mamba", "rwkv", "neox"))
    return out | {"delve": DelveConfig(parents, shared["n_layers"], connectors="hub", hub_rank=8)}


# ---- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", GRID)
def test_delphi_as_published(width):
    """delphi.md section 1, verified there on 81 runs."""
    cfg = presets.preset(f"delphi-{width}")
    H, L, S, V = width, cfg.n_layers, 4096, 128256
    want = L * (32 * H * H + 4 * S * H + 3 * S * (H // 128)) + 2 * H * V
    assert plan.forward_flops(cfg, S) == want
    if width == 512:
        assert want == 232_292_352


def test_the_budget_of_a_published_run():
    """1e22 FLOPs: 160,369,213,440 tokens at width 3840 (delphi.md section 2)."""
    settings = Settings(tokens=160_369_213_440, batch=1024, window=4096, optimizer="adamh")
    out = plan.plan("delphi-3840", settings, mesh="data=512,model=2", no_compile=True)
    assert out["tokens"] == settings.tokens and out["steps"] == 38235
    assert out["parameters"] == 9_714_698_752
    assert out["train_flops"] == pytest.approx(1e22, rel=1e-4)
    assert out["train_flops_per_token"] == 3 * out["forward_flops_per_token"]
    rate = 1024 * 0.4 * 989e12
    assert out["hours"] == pytest.approx(out["train_flops"] / rate / 3600)
    assert out["tokens_per_second"] == pytest.approx(settings.tokens / out["hours"] / 3600)


@pytest.mark.parametrize("family", families(8, n_layers=1))
def test_flops_are_those_of_the_program(family):
    """One layer (XLA counts the body of a scan once), wide enough for matmuls to be nearly all."""
    cfg, T = families(256, n_layers=1)[family], 256
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    program = jax.jit(lambda p, t: models.forward(cfg, p, t)[0])
    counted = program.lower(models.abstract_params(cfg), tokens).cost_analysis()["flops"] / T
    assert plan.forward_flops(cfg, T) == pytest.approx(counted, rel=0.08)


def test_flops_are_at_true_ranks():
    """Padding that layers of unequal rank share is not counted, and layers count alike."""
    shared = dict(vocab_size=64, vocab_rows=64, d_model=32, n_layers=2, n_heads=4, d_ffn=64)
    flops = lambda ranks: plan.forward_flops(NeoxConfig(**shared, ranks=ranks), 8)  # noqa: E731
    dense = flops(())
    assert flops((("mlp/up", (8, 4)),)) == dense - 2 * (2 * 32 * 64 - (8 + 4) * (32 + 64))
    assert flops((("mlp/up", (8, 8)),)) > flops((("mlp/up", (8, 4)),))
    # a table is looked up, a head is not
    assert flops((("embed", (8,)),)) == dense
    assert flops((("head", (8,)),)) == dense - 2 * (32 * 64 - 8 * (32 + 64))


# ---- bytes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of every family (its own preset, so to say) by name."""
    folder = tmp_path_factory.mktemp("plan")

    def of(name: str) -> str:
        dst, cfg = folder / name, families(32, n_layers=2)[name]
        if not dst.exists():
            zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), models.abstract_params(cfg))
            checkpoint.save(dst, cfg, zeros)
        return str(dst)

    return of


@pytest.mark.parametrize("optimizer", ["adamw", "adamh"])
@pytest.mark.parametrize("family", ["factored", "delve"])
def test_bytes_on_one_device_are_those_of_the_arrays(family, optimizer, source):
    cfg = families(32, n_layers=2)[family]
    settings = Settings(tokens=10_000, optimizer=optimizer)
    out = plan.plan(source(family), settings, objective="ce", no_compile=True)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), models.abstract_params(cfg))
    state = init_state(zeros, settings.make_optimizer(10))
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    assert out["bytes_per_device"] == {
        "parameters": size(state["params"]), "optimizer": size(state["opt"]), "teachers": 0
    }  # fmt: skip
    assert out["parameters"] == models.count(cfg) and out["teacher_parameters"] == 0


def test_bytes_on_a_mesh_are_those_of_the_shards(source):
    """Eight devices that need not exist: every leaf at the shape of its piece."""
    cfg = families(32, n_layers=2)["qwen3"]
    out = plan.plan(source("qwen3"), SOME, mesh="data=4,model=2", no_compile=True)
    mesh = jax.sharding.AbstractMesh((1, 4, 2), parallel.AXES)
    state = jax.eval_shape(
        lambda p: init_state(p, SOME.make_optimizer(10)), models.abstract_params(cfg)
    )
    for name, tree in (("parameters", state["params"]), ("optimizer", state["opt"])):
        total = 0
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            spec = parallel.spec_for(parallel.path_of(keys), leaf.shape, mesh)
            parts = [mesh.shape[a] for a in spec if a]
            total += leaf.size * leaf.dtype.itemsize // int(np.prod(parts, dtype=int))
        assert out["bytes_per_device"][name] == total
    whole = plan.plan(source("qwen3"), SOME, no_compile=True)["bytes_per_device"]
    copies = plan.plan(source("qwen3"), SOME, mesh="replica=8", no_compile=True)
    assert copies["bytes_per_device"] == whole and copies["devices"] == 8
    for name in ("parameters", "optimizer"):
        assert whole[name] / 8 <= out["bytes_per_device"][name] < whole[name] / 7


def test_a_delve_is_healed_against_its_dense_parents(source):
    out = plan.plan("delve-0.4b", SOME, no_compile=True)
    dense = plan.plan("delve-0.4b", SOME, keep=1.0, objective="ce", no_compile=True)
    parents = [presets.preset(of) for of in presets.TIERS["delve-0.4b"].values()]
    # at the valid ids, without the rows that checkpoints pad
    assert 0.99 < out["teacher_parameters"] / sum(map(models.count, parents)) <= 1
    assert out["objective"] == "ce+kl" and dense["objective"] == "ce"
    assert out["bytes_per_device"]["teachers"] == 4 * out["teacher_parameters"]
    teachers = out["train_flops_per_token"] - 3 * out["forward_flops_per_token"]
    assert dense["forward_flops_per_token"] == teachers  # without a hub nothing is added
    alone = plan.plan(source("factored"), SOME, objective="ce+kl", no_compile=True)
    assert alone["teacher_parameters"] == models.count(families(32, n_layers=2)["neox"])


def test_a_smaller_model_inside_is_trained_as_well():
    once, twice = (
        plan.plan("delve-0.4b", SOME, objective=Terms(rank_drop=share), no_compile=True)
        for share in (1.0, 0.5)
    )
    more = twice["train_flops_per_token"] - once["train_flops_per_token"]
    assert more == 3 * once["forward_flops_per_token"]


# ---- the compiled step ---------------------------------------------------------------------------


def test_the_terms_of_healing_are_in_the_compiled_step(source):
    """Each stream's logits beside its parent's, and both sides' streams at the sync points."""
    small = Settings(tokens=10_000, batch=2, window=32)
    size = [
        plan.plan(source("delve"), small, objective=terms)["bytes_per_device"]
        for terms in ("ce", "ce+kl", Terms(streams=0.3, hidden=1.0))
    ]
    assert size[0]["teachers"] == 0 < size[1]["teachers"] == size[2]["teachers"]
    assert size[0]["activations"] < size[1]["activations"] < size[2]["activations"]


def test_a_teacher_cache_leaves_the_teachers_out_of_the_step(source):
    small = Settings(tokens=10_000, batch=2, window=32)
    held, read = (plan.plan(source("delve"), small, teacher_cache=c) for c in (False, True))
    one, other = held["bytes_per_device"], read["bytes_per_device"]
    assert other["teachers"] == 0 and other["peak"] < one["peak"] - one["teachers"]
    assert other["activations"] < one["activations"]
    assert read["train_flops_per_token"] == held["train_flops_per_token"]
    assert "teacher_cache" not in held
    said = read["teacher_cache"]
    assert said["file_bytes"] == read["tokens"] * (64 * (2 + 1) + 2)
    assert said["teachers_bytes_per_device"] == one["teachers"]
    with pytest.raises(DelveError, match="--teacher-cache"):
        plan.plan(source("delve"), small, objective=Terms(streams=0.3), teacher_cache=True)


def test_the_step_is_compiled_for_a_mesh_that_is_not_there(source):
    settings = Settings(tokens=10_000, batch=8, window=32)
    assert len(jax.devices()) == 1
    out = plan.plan(source("neox"), settings, mesh="data=4")
    parts = out["bytes_per_device"]
    assert out["devices"] == 4 and out["steps"] == -(-10_000 // (8 * 32)) and out["fits"]
    assert parts["peak"] == sum(v for k, v in parts.items() if k != "peak")
    # at least the gradients and the logits of half a row's chunk live at once; no row of 4 more
    assert parts["activations"] > parts["parameters"] + 2 * 16 * 256 * 4
    assert parts["activations"] < 100 * parts["parameters"]


def test_what_cannot_be_compiled_is_one_line(source, monkeypatch):
    class Failed:
        returncode, stdout, stderr = 1, "", "Traceback\nMemoryError: too much\n"

    monkeypatch.setattr(plan.subprocess, "run", lambda *_, **__: Failed)
    with pytest.raises(DelveError, match="MemoryError: too much.*--no-compile"):
        plan.plan(source("neox"), SOME)


# ---- the verb ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "flags", "said"),
    [
        ("gpt-2", {}, "preset gpt-2: unknown.*delphi-512"),
        ("no/such-dir@x y", {}, "no/such-dir"),
        (None, {}, "--list"),
        ("delphi-512", {"device": "tpu9"}, "--device tpu9: choose.*h200"),
        ("delphi-512", {"mfu": 0.0}, "--mfu 0.0"),
        ("delphi-512", {"mfu": 1.5}, "--mfu 1.5"),
        ("delphi-512", {"mesh": "rows=2"}, "--mesh rows=2"),
        ("delphi-512", {"mesh": "data=3"}, "--batch 8: must be a multiple of 3"),
        ("delphi-512", {"mesh": "replica=2,data=8"}, "--batch 8: must be a multiple of 16"),
        ("delphi-512", {"keep": 0.5}, "--keep is for the DELVE tiers"),
        ("delphi-512", {"objective": "kl"}, "objective kl: must be ce, ce.kl or Terms"),
        ("delphi-512", {"objective": Terms(streams=1.0)}, "dense parent of every stream"),
        ("delphi-512", {"objective": Terms(rank_drop=0.5)}, "--rank-drop: needs factored maps"),
    ],
)
def test_refusals_name_the_flag(target, flags, said):
    with pytest.raises(DelveError, match=said) as caught:
        plan.plan(target, SOME, no_compile=True, **flags)
    assert "\n" not in str(caught.value)


def test_what_would_be_nonsense_is_refused():
    with pytest.raises(DelveError, match="--tokens -5"):
        plan.plan("delphi-512", Settings(tokens=-5), no_compile=True)
    source = str(upcycle.embedded_parents()[0])
    with pytest.raises(DelveError, match="--keep 0.5: is for presets"):
        plan.plan(source, SOME, keep=0.5, no_compile=True)


def delve(capsys, *argv):
    capsys.readouterr()
    code = cli.main([*map(str, argv), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_through_the_command_line(capsys, monkeypatch):
    few = {n: presets.PRESETS[n] for n in ("delphi-512", "proxy-neox", "pythia-14m")}
    monkeypatch.setattr(presets, "PRESETS", few)  # all are counted below
    code, out, _ = delve(capsys, "plan", "--list")
    assert code == 0 and set(out["presets"]) == set(few)
    assert out["presets"]["delphi-512"] == 156_508_160
    flags = ("--tokens", 10**9, "--batch", 64, "--mesh", "data=8", "--window", 4096, "--mfu", 0.5,
             "--device", "v5p", "--compute", "bfloat16", "--optimizer", "adamh")  # fmt: skip
    code, out, _ = delve(capsys, "plan", "delphi-512", "--no-compile", *flags)
    assert code == 0 and out["steps"] == -(-(10**9) // (64 * 4096))
    assert out["mesh"] == {"replica": 1, "data": 8, "model": 1} and out["device"] == "v5p"
    code, out, err = delve(capsys, "plan", "gpt-2")
    assert code == 2 and out is None and err.startswith("error: preset gpt-2") and err[-1] == "\n"


def test_the_flags_of_healing(capsys):
    heal = ("--stream-kl", "0.3:0.1", "--hidden-match", 1, "--train", "experts", "--no-compile")
    code, out, _ = delve(capsys, "plan", "delve-0.4b", *heal)
    assert code == 0 and out["objective"] == "ce+kl+streams+hidden"
    code, out, _ = delve(capsys, "plan", "delve-0.4b", "--objective", "ce", "--no-compile")
    assert code == 0 and out["objective"] == "ce" and not out["teacher_parameters"]
    code, out, _ = delve(capsys, "plan", "delve-0.4b", "--teacher-cache", "--no-compile")
    assert code == 0 and out["bytes_per_device"]["teachers"] == 0 < out["teacher_parameters"]


def test_tokens_need_not_be_given(capsys):
    """Bytes and FLOPs a token do not depend on them."""
    code, out, err = delve(capsys, "plan", "delphi-512", "--no-compile")
    assert code == 0, err
    assert out["forward_flops_per_token"] > 0 and out["steps"] == out["tokens"] == 0


def test_every_preset_is_planned_at_once():
    for name in presets.PRESETS:
        if name in presets.TIERS:  # tests/test_tiers.py plans those, against what was recorded
            continue
        out = plan.plan(name, SOME, mesh="data=8", no_compile=True)
        parts = out["bytes_per_device"]
        # an eighth of float32 weights; small vectors and what 8 does not divide stay whole
        assert 0.5 * out["parameters"] <= parts["parameters"] < 0.8 * out["parameters"], name
        assert 1.99 < parts["optimizer"] / parts["parameters"] < 2.01, name
        # a token costs 2 a weight at least, tables aside
        assert out["forward_flops_per_token"] > out["parameters"] / 4, name
