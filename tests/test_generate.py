"""The decode loop: stop ids, truncated sampling, seeds; every row as if it were alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import delve_jax
from delve_jax import lm as lm_module
from delve_jax import look, models
from delve_jax.config import (
    DelveConfig,
    DelveError,
    MambaConfig,
    NeoxConfig,
    Qwen3Config,
    RwkvConfig,
)
from delve_jax.lm import layers_apart, truncated

SIZES = {"vocab_size": 40, "vocab_rows": 48, "d_model": 16, "n_layers": 2}
CONFIGS = {
    "mamba": MambaConfig(**SIZES, d_inner=32, d_state=4, dt_rank=2),
    "neox": NeoxConfig(**SIZES, n_heads=2, d_ffn=32),
}
PROMPT = np.random.default_rng(0).integers(0, 40, (3, 7))


@pytest.fixture(params=CONFIGS)
def lm(request, randomised):
    cfg = CONFIGS[request.param]
    params = jax.tree.map(lambda a: 3 * a, randomised(cfg, 0))  # decided, not uniform
    return delve_jax.LM(cfg, params)


def test_stop_ids_end_a_row(lm):
    """Up to its first stop id a row is what it is without one; then it is that id."""
    free = np.asarray(lm.generate(PROMPT, 24))[:, 7:]
    stop = sorted({int(free[0, 5]), int(free[1, 9])})
    cut = np.asarray(lm.generate(PROMPT, 24, stop=stop))[:, 7:]
    for whole, part in zip(free, cut, strict=True):
        ends = np.flatnonzero(np.isin(whole, stop))
        end = ends[0] if len(ends) else len(whole) - 1
        np.testing.assert_array_equal(part[: end + 1], whole[: end + 1])
        assert (part[end:] == whole[end]).all() or not len(ends)
    assert np.isin(free[0], stop).any()


def test_the_loop_ends_with_the_last_row(lm, monkeypatch):
    """All rows ended: no further step is run (counted where the model is called back)."""
    steps = []
    real = models.forward

    def counted(cfg, params, tokens_BT, state=None, *rest, **kw):
        if tokens_BT.shape[1] == 1:
            jax.debug.callback(lambda: steps.append(1))
        return real(cfg, params, tokens_BT, state, *rest, **kw)

    monkeypatch.setattr(models, "forward", counted)
    fresh = delve_jax.LM(lm.config, lm.params)
    free = np.asarray(fresh.generate(PROMPT[:1], 16))[0, 7:]
    jax.effects_barrier()
    assert len(steps) == 15
    steps.clear()
    out = np.asarray(fresh.generate(PROMPT[:1], 16, stop=[int(free[3])]))[0, 7:]
    jax.effects_barrier()
    first = int(np.flatnonzero(free == free[3])[0])
    assert len(steps) == first and (out[first:] == free[3]).all()


def test_the_loop_works_in_the_caches_of_the_prefill(lm):
    """Neither a second set of caches nor a copy of the first: they may be most of the memory."""
    how = {"keys": None, "temperature": jnp.float32(1), "top_p": None, "top_k": 0, "sample": False}
    first_B, state = lm._prefill(lm.params, PROMPT, None, room=16, **how)
    places = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(state)]
    _, after = lm._decode(lm.params, first_B, state, n=8, stop=(), **how)
    assert sorted(places) == sorted(a.unsafe_buffer_pointer() for a in jax.tree.leaves(after))


def test_sampling_is_of_the_kept_ids_only(lm):
    """top_k 1 and a tiny top_p are greedy; every drawn id is among the likeliest of its step."""
    greedy = np.asarray(lm.generate(PROMPT, 12))
    for how in ({"top_k": 1}, {"top_p": 1e-6}):
        out = lm.generate(PROMPT, 12, temperature=2.0, seed=5, **how)
        np.testing.assert_array_equal(np.asarray(out), greedy)
    out = np.asarray(lm.generate(PROMPT, 12, temperature=50.0, top_k=3, seed=1))
    logits = np.asarray(lm.logits(out[:, :-1]))[:, 6:]
    rank = (logits > np.take_along_axis(logits, out[:, 7:, None], -1)).sum(-1)
    assert rank.max() == 2 and (rank == 0).any()
    again = np.asarray(lm.generate(PROMPT, 12, temperature=50.0, top_k=3, seed=1))
    other = np.asarray(lm.generate(PROMPT, 12, temperature=50.0, top_k=3, seed=2))
    assert np.array_equal(out, again) and not np.array_equal(out, other)


def test_a_prompt_is_read_as_evaluation_and_training_read_text():
    """A tokenizer that frames a text with special tokens (Pythia's does not) is not asked to."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tok = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2}, "<|endoftext|>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tok.encode("a b").ids == [0, 1, 2, 0]

    class Heard(delve_jax.LM):
        def generate(self, tokens, *_, **how):
            assert np.array_equal(tokens, [[1, 2]]) and how["stop"] == [0]
            return np.array([[1, 2, 2, 0]])

    assert look.generate(Heard(CONFIGS["neox"], {}, tok), "a b")["tokens"] == [2]


def test_truncation_by_hand():
    p = np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]])
    for top_k, top_p, kept in (
        (0, 1.0, 4), (0, None, 4), (2, None, 2), (0, 0.5, 1), (0, 0.51, 2), (0, 0.94, 3),
        (3, 0.9, 3), (2, 0.6, 1), (4, 1.0, 4),
    ):  # fmt: skip
        out = np.asarray(truncated(jnp.log(jnp.asarray(p, jnp.float32)), top_k, top_p))
        assert np.isfinite(out).sum(-1).tolist() == [kept, kept], (top_k, top_p)
        np.testing.assert_allclose(np.exp(out[np.isfinite(out)]).min(), np.sort(p[0])[-kept], 1e-5)


@pytest.mark.parametrize(
    ("how", "said"),
    [({"temperature": -1.0}, "temperature -1.0"), ({"top_k": -1}, "top_k -1"),
     ({"top_p": 0.0}, "top_p 0.0"), ({"top_p": float("nan")}, "top_p nan")],
)  # fmt: skip
def test_refusals(lm, how, said):
    with pytest.raises(DelveError, match=said):
        lm.generate(PROMPT, 4, **how)


def test_ragged_prompts_say_what_to_do(lm):
    with pytest.raises(DelveError, match="pad on the left and pass mask_BT"):
        lm.generate([[1, 2], [3]])


def test_states_are_written_aside_each_to_a_file_of_its_own(lm, tmp_path, monkeypatch):
    written, real = [], np.savez
    monkeypatch.setattr(np, "savez", lambda file, **a: (written.append(file.name), real(file, **a)))
    for name in ("user.1", "user.2"):
        lm.save_state(tmp_path / name, lm.init_state(1, 4))
    assert len(set(written)) == 2 and len(list(tmp_path.iterdir())) == 2


def test_damaged_states_are_named(lm, tmp_path):
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no archive")
    for name in ("array.npy", "empty", "text", "missing"):
        with pytest.raises(DelveError, match=f"{name}: not a readable state"):
            lm.load_state(tmp_path / name)


FAMILIES = (
    *CONFIGS.values(),
    RwkvConfig(**SIZES, d_att=16, d_ffn=32),
    Qwen3Config(**SIZES, n_heads=2, n_kv_heads=1, head_dim=8, d_ffn=32),
)


def same_tokens_apart(cfg, params, monkeypatch):
    """As stacks, as NumPy's arrays (a compressed parent's are), and too deep to be taken apart."""
    out = np.asarray(delve_jax.LM(cfg, params).generate(PROMPT, 24))
    depth = sum(sub.n_layers for _, sub in cfg.streams) if "streams" in params else cfg.n_layers
    monkeypatch.setattr(lm_module, "MOST_APART", depth - 1)
    assert layers_apart(cfg, params) is params
    np.testing.assert_array_equal(out, delve_jax.LM(cfg, params).generate(PROMPT, 24))
    monkeypatch.undo()
    plain = jax.tree.map(np.asarray, params)
    np.testing.assert_array_equal(out, delve_jax.LM(cfg, plain).generate(PROMPT, 24))
    assert len(set(out[:, 7:].ravel().tolist())) > 3


def rows_of(parted, stacked, n):
    """A tuple of n trees, the rows of a stacked one; on a CPU in its memory, not their own."""
    assert isinstance(parted, tuple) and len(parted) == n
    for i, layer in enumerate(parted):
        for one, stack in zip(jax.tree.leaves(layer), jax.tree.leaves(stacked), strict=True):
            np.testing.assert_array_equal(one, stack[i])
            if one.nbytes % 64 == 0 and stack.unsafe_buffer_pointer() % 64 == 0:  # XLA asks for it
                at = stack.unsafe_buffer_pointer() + i * one.nbytes
                assert one.unsafe_buffer_pointer() == at


@pytest.mark.parametrize("cfg", FAMILIES, ids=lambda cfg: cfg.family)
def test_layers_apart_give_the_same_tokens(cfg, randomised, monkeypatch):
    """As layers in a loop."""
    params = jax.tree.map(lambda a: 3 * a, randomised(cfg, 0))
    rows_of(layers_apart(cfg, params)["layers"], params["layers"], cfg.n_layers)
    same_tokens_apart(cfg, params, monkeypatch)


def joined(*streams, S, ranks=(), **more):
    """A DELVE with a hub, its streams named by their families."""
    streams = tuple((sub.family, dataclasses.replace(sub, ranks=ranks)) for sub in streams)
    return DelveConfig(streams, S, connectors="hub", hub_rank=4, **more)


MAMBA, NEOX, RWKV, _ = FAMILIES
DEEP = dataclasses.replace(MAMBA, n_layers=4)
DELVES = {
    "J=1": joined(DEEP, RWKV, NEOX, S=2, ffn_skip=0.9),
    "J=K, uneven": joined(dataclasses.replace(RWKV, n_layers=3), NEOX, S=3, latents=2),
    "codes": joined(
        DEEP, NEOX, S=2, codes=("embed", "head"), ranks=(("embed", (9,)), ("head", (9,)))
    ),
    "alone": joined(MAMBA, S=1),
}


@pytest.mark.parametrize("name", DELVES)
def test_layers_of_a_delve_apart_give_the_same_tokens(name, randomised, monkeypatch):
    """Superblocks one by one as in a loop; the prompts are padded, hub and gate act."""
    cfg = DELVES[name]
    params = randomised(cfg, 0)
    parted = layers_apart(cfg, params)
    for stream, sub in cfg.streams:
        layers = params["streams"][stream]["layers"]
        rows_of(parted["streams"][stream]["layers"], layers, sub.n_layers)
    if "hub" in params:
        rows_of(parted["hub"], params["hub"], cfg.n_superblocks - 1)
    same_tokens_apart(cfg, params, monkeypatch)


@pytest.mark.parametrize("cfg", [*FAMILIES, DELVES["alone"]], ids=lambda cfg: cfg.family)
def test_padding_behind_text_that_was_read_is_refused(cfg, randomised):
    """Of recurrent streams, for which it would be text; one padding may go on over two calls."""
    lm, pads = delve_jax.LM(cfg, randomised(cfg, 0)), np.array([[0], [5]])
    mask, state = np.arange(7) >= pads, lm.init_state(2, 12)
    for at in (slice(0, 3), slice(3, 7)):
        _, state = lm.step(PROMPT[:2, at], state, mask[:, at])
    late = [[True, True], [False, True]]
    if cfg.family in ("neox", "qwen3"):
        got, _ = lm.step(PROMPT[:2, :2], state, late)
        alone = lm.logits(np.append(PROMPT[1, 5:], PROMPT[1, 1])[None])
        np.testing.assert_allclose(got[1, -1], alone[0, -1], atol=1e-4)
    else:
        with pytest.raises(DelveError, match="mask: row 1 has a state"):
            lm.step(PROMPT[:2, :2], state, late)


@pytest.mark.parametrize("cfg", FAMILIES, ids=lambda cfg: cfg.family)
def test_a_prompt_is_read_alike_where_caches_are_known_to_be_empty(cfg, randomised):
    """Left-padded, longer than a block of queries: features, and all that later tokens see."""
    T, real = 150, np.arange(150) >= np.array([[0], [40]])
    tokens_BT = np.random.default_rng(0).integers(0, 40, (2, T))
    params, state = randomised(cfg, 1), models.init_state(cfg, 2, T + 10)
    read = jax.jit(lambda p, s: models.features(cfg, p, tokens_BT, s, real))
    known = jax.jit(lambda p, s: models.features(cfg, p, tokens_BT, lm_module._empty(s), real))
    (want, after), (got, then) = read(params, state), known(params, state)
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=2e-5)
    assert jax.tree.structure(then) == jax.tree.structure(after)
    last = np.full((2, 1), 7)
    step = jax.jit(lambda p, s: models.forward(cfg, p, last, s)[0])
    np.testing.assert_allclose(step(params, then), step(params, after), rtol=0, atol=2e-5)
