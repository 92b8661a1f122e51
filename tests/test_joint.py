"""Parents compressed together: one budget, common tables, nothing lost when it is stopped."""

import json
import shutil

import jax
import numpy as np
import pytest
from compiled import forward

from delve_jax import DelveError, fuse, models, upcycle
from delve_jax.compress import codes, joint, spectra
from delve_jax.compress.spectra import InMemory
from delve_jax.config import MambaConfig, NeoxConfig, RwkvConfig
from delve_jax.models import elastic

V = 61
BOTH = dict(vocab_size=V, vocab_rows=V, context_length=32)
PARENTS = {
    "m": MambaConfig(**BOTH, d_model=16, n_layers=2, d_inner=32, dt_rank=2, tie_embeddings=True),
    "r": RwkvConfig(**BOTH, d_model=16, n_layers=2, d_att=16, d_ffn=24),
    "x": NeoxConfig(**BOTH, d_model=24, n_layers=2, n_heads=2, d_ffn=32, rotary_pct=0.5),
}
TOTAL = sum(models.count(cfg) for cfg in PARENTS.values())


@pytest.fixture(scope="module")
def parts(randomised):
    tokens = np.random.default_rng(0).integers(0, V, (16, 32)).astype(np.int32)
    return [
        joint.Part(name, InMemory(cfg, randomised(cfg, seed)), tokens)
        for seed, (name, cfg) in enumerate(PARENTS.items())
    ]


@pytest.fixture(scope="module")
def half(parts, tmp_path_factory):
    """All three at half their parameters, and the folder that they came from."""
    work = tmp_path_factory.mktemp("joint")
    return joint.compress(parts, TOTAL // 2, work, bars=False), work


def counted(out) -> int:
    """Parameters of the parents, what they share counted once."""
    cfg = fuse.joint_config([(n, c) for n, c, _ in out.parents], codes=("embed", "head"))
    return models.count(cfg) - fuse.joints_count(fuse.joint_config(list(PARENTS.items())))


def test_a_colon_in_a_parents_name():
    """`Part.name` is a directory's: sizes still find their parent."""
    sizes = {("b:c:att/out", 0): 3, ("c:att/out", 0): 5, ("codes", 0): 2}
    choice = joint.knapsack.Allocation({}, sizes, 9, 0.0, 0.0)
    body = [joint.parent_maps(PARENTS["x"])[0][1]]
    assert body[0].name == "att/out"
    plans = [joint._plan(name, body, choice, 9, 9) for name in ("b:c", "c")]
    assert [plan.ranks for plan in plans] == [{"att/out": (3,)}, {"att/out": (5,)}]


def test_the_budget_is_met_and_used(half):
    out, _ = half
    assert out.report["parameters"] == counted(out) <= TOTAL // 2
    step = 2 * (V + 56)  # a rank of the codes; the grid of ranks leaves less than one step unused
    assert TOTAL // 2 - counted(out) < 4 * step
    assert out.report["bound_kl_sum"] <= out.report["expected_kl_sum"] * (1 + 1e-9)
    for (_, cfg, params), (_, other, more) in zip(out.parents, out.parents[1:], strict=False):
        assert params["embed"]["v"] is more["embed"]["v"]
        assert params["head"]["u"] is more["head"]["u"]
        assert cfg.rank("embed") == other.rank("head") == (out.rank,)


def test_half_of_it_is_inside_by_the_allocators_sizes(half):
    """`nested` says every map's size in a model of half the budget, which `--keep` cuts out."""
    out, _ = half
    fused = fuse.fuse(out.parents, None, shared=True, connectors="none")[:2]
    for (_, sub), (name, own, _) in zip(fused[0].streams, out.parents, strict=True):
        assert sub.nested == own.nested
        named = {*dict(own.ranks), *["neurons"] * bool(own.neurons)}
        assert set(dict(own.nested)) == named, name
        for n, sizes in own.nested:
            full = own.neurons if n == "neurons" else own.rank(n)
            assert all(0 <= a <= b for a, b in zip(sizes, full, strict=True))
    cfg, _ = elastic.shrink(*fused, models.count(elastic.config_at(fused[0], 0.5)))
    for (_, sub), (_, own, _) in zip(cfg.streams, out.parents, strict=True):
        assert sub.ranks == tuple((n, dict(own.nested)[n]) for n, _ in own.ranks)


def test_a_smaller_budget_slices_the_same_factors(half, parts, monkeypatch):
    """No pass is made again, and the work folder gives the bits of a fresh one."""
    out, work = half
    monkeypatch.setattr(spectra.Sweep, "boundaries", lambda *_: pytest.fail("swept again"))
    again = joint.compress(parts, TOTAL // 2, work, bars=False)
    for (_, a, p), (_, b, q) in zip(out.parents, again.parents, strict=True):
        assert a == b
        jax.tree.map(np.testing.assert_array_equal, p, q)
    less = joint.compress(parts, TOTAL * 2 // 5, work, bars=False)
    assert counted(less) <= TOTAL * 2 // 5 and less.rank <= out.rank
    assert less.report["expected_kl_sum"] > out.report["expected_kl_sum"]


@pytest.mark.parametrize("before", ["other parents", "no key"])
def test_the_curve_of_the_codes_belongs_to_its_parents(half, parts, tmp_path, before):
    shutil.copytree(half[1], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "codes.json"
    if before == "no key":  # an earlier version's: the curve alone
        file.write_text(json.dumps(json.loads(file.read_text())["curve"]))
    with pytest.raises(DelveError, match=f"^{file}: .*remove it or name another"):
        joint.compress(parts if before == "no key" else parts[:2], TOTAL // 2, tmp_path, bars=False)


def test_stopped_anywhere_it_ends_with_the_same_bits(half, parts, tmp_path, monkeypatch):
    real, left = spectra.write_arrays, [0]

    def dying(file, **arrays):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(file, **arrays)

    monkeypatch.setattr(spectra, "write_arrays", dying)
    stops = 0
    while True:
        left[0] = 2  # two more files each time
        try:
            got = joint.compress(parts, TOTAL // 2, tmp_path, bars=False)
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops < 30, "it never ends"
    assert stops >= 4
    for (_, a, p), (_, b, q) in zip(half[0].parents, got.parents, strict=True):
        assert a == b
        jax.tree.map(np.testing.assert_array_equal, p, q)


def test_the_fused_model_is_the_pool_of_what_was_compressed(half, parts):
    out, _ = half
    cfg, params, _ = fuse.fuse(out.parents, parts[0].tokens_NT[:4], shared=True)
    tokens = parts[0].tokens_NT[:2]
    alone = [forward(c, p, tokens)[0] for _, c, p in out.parents]
    pooled = sum(a * x for a, x in zip(params["pool"]["a"], alone, strict=True))
    got = forward(cfg, params, tokens)[0]
    want = jax.nn.log_softmax(pooled)
    np.testing.assert_allclose(jax.nn.log_softmax(got), want, atol=1e-4)


def test_codes_of_a_rank_are_the_optimum_that_a_slice_is(parts):
    """Tails fall, vanish at full rank, and a slice is what is fitted at that rank alone."""
    known = []
    for part in parts:
        cfg, params = codes.untied(part.source.cfg, _tree(part.source))
        moments = codes.measure(cfg, params, part.tokens_NT[:4])
        known.append((part.source, moments, part.tokens_NT))
    full, small = codes.of(known, most=56), codes.of(known, most=12)
    tails = full.tails(range(57))
    assert (np.diff(tails) <= 1e-12).all() and tails[-1] <= 1e-9 * tails[0]
    for a, b in zip(full.at(12), small.at(12), strict=True):
        for table in ("embed", "head"):
            want = b[table]["v"] @ b[table]["u"]
            scale = np.abs(want).max()
            np.testing.assert_allclose(a[table]["v"] @ a[table]["u"], want, atol=1e-4 * scale)
    for part, own in zip(parts, full.at(56), strict=True):
        table = np.asarray(part.source.outer()["embed"]["kernel"])
        np.testing.assert_allclose(own["embed"]["v"] @ own["embed"]["u"], table, atol=2e-4)


def _tree(source):
    layers = [source.layer(i) for i in range(source.cfg.n_layers)]
    return {**source.outer(), "layers": jax.tree.map(lambda *a: np.stack(a), *layers)}


def test_budgets_that_cannot_be_met_say_what_can(parts, tmp_path):
    configs = list(PARENTS.items())
    with pytest.raises(DelveError, match="smallest possible --keep for these"):
        upcycle.together_budget(configs, 0.05)
    with pytest.raises(DelveError, match=r"must lie in \(0, 1\]"):
        upcycle.together_budget(configs, 1.5)
    assert upcycle.together_budget(configs, 0.9) < 0.9 * TOTAL
    for latents in (0, 1, 2, 3):  # what fusion adds is what is left for it
        added = fuse.joints_count(fuse.joint_config(configs, latents or 3))
        assert upcycle.together_budget(configs, 0.9, latents) == int(0.9 * TOTAL) - added
        assert sum(upcycle.budgets(configs, 0.9, latents)) <= 0.9 * TOTAL - added
    other = joint.Part("o", InMemory(RwkvConfig(7, 7, 8, 1, d_att=8, d_ffn=8), {}), None)
    with pytest.raises(DelveError, match="different vocabularies"):
        joint.compress([parts[0], other], 10, tmp_path, bars=False)
