"""Windows, arithmetic and metrics of evaluation against brute force on toy models."""

import dataclasses
import fnmatch
import hashlib
import json
import math
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import forward

import delve_jax.evaluate as evaluate
from delve_jax import data, look, models, tasks
from delve_jax.config import DelveError, MambaConfig, NeoxConfig, RwkvConfig

V = 23
KEYS = jax.random.split(jax.random.key(0), 4)
LAG_3VD, HEAD_DV = jax.random.normal(KEYS[0], (3, V, 8)), jax.random.normal(KEYS[1], (8, V))


def three_gram(tokens_BT):
    """Logits that depend on the last three tokens and on nothing before them."""
    T = tokens_BT.shape[1]
    padded = jnp.pad(tokens_BT, ((0, 0), (2, 0)), constant_values=0)
    h_BTD = sum(LAG_3VD[k][padded[:, 2 - k : 2 - k + T]] for k in range(3))
    return jnp.tanh(h_BTD) @ HEAD_DV


def three_gram_numpy(stream):
    """The same in numpy over a whole text [n] -> [n, V]."""
    padded = np.concatenate([[0, 0], stream])
    h_TD = sum(np.asarray(LAG_3VD[k])[padded[2 - k : len(padded) - k]] for k in range(3))
    return np.tanh(h_TD) @ np.asarray(HEAD_DV)


def running_mean(tokens_BT):
    """Logits that depend on every token from the start of the window on."""
    x_BTD = LAG_3VD[0][tokens_BT]
    count_T1 = jnp.arange(1, tokens_BT.shape[1] + 1)[:, None]
    return 3 * jnp.cumsum(x_BTD, 1) / count_T1 @ HEAD_DV


def by_hand(logits, ids):
    """-log softmax of `logits` [T, V] at ids [T], float64, one token after the other."""
    rows = np.asarray(logits, np.float64)
    return [
        math.log(sum(math.exp(x) for x in row)) - row[i] for row, i in zip(rows, ids, strict=True)
    ]


# ---- windows -------------------------------------------------------------------------------------


def test_spans_score_every_position_once_with_enough_context():
    rng = random.Random(1)
    for _ in range(500):
        window = rng.randint(1, 40)
        stride, n = rng.randint(1, window), rng.randint(0, 200)
        seen = []
        for start, first in evaluate.spans(n, window, stride):
            end = min(start + window, n)
            assert 0 <= start <= first < end
            assert first == 0 or first - start >= window - stride
            seen += range(first, end)
        assert seen == list(range(n))


@pytest.mark.parametrize("bos", [None, 7])
def test_windowed_nll_equals_full_context_where_the_context_is_bounded(bos):
    """Three tokens decide: with an overlap of two every window is as good as the whole text."""
    rng, scorer = np.random.default_rng(0), evaluate.as_scorer(three_gram)
    for window, stride, batch in ((400, 200, 2), (64, 62, 3), (17, 9, 5), (3, 1, 16)):
        for n in (1, 2, 5, 64, 65, 333):
            ids = rng.integers(0, V, n).astype(np.int32)
            stream = ids if bos is None else np.concatenate([[bos], ids])
            want = by_hand(three_gram_numpy(stream)[:-1], stream[1:])
            want = [math.log(V), *want] if bos is None else want
            got = evaluate.nll(scorer, ids, window, stride, batch, bos)
            assert got.shape == (n,) and got.dtype == np.float32
            np.testing.assert_allclose(got, want, atol=2e-5)


def test_each_token_is_scored_in_its_own_window():
    """A model that sees its whole window: the value tells from where it read."""
    ids = np.random.default_rng(3).integers(0, V, 150).astype(np.int32)
    stream = np.concatenate([[0], ids])
    got = evaluate.nll(running_mean, ids, 16, 5, batch=3, bos=0)
    for i in range(len(ids)):  # windows start at 0, 5, 10, ..., the last one at 150 - 16
        start = next(s for s in [*range(0, 134, 5), 134] if s <= i < s + 16)
        mean_D = np.asarray(LAG_3VD[0])[stream[start : i + 1]].mean(0)
        logits = 3 * mean_D @ np.asarray(HEAD_DV)
        np.testing.assert_allclose(got[i], by_hand(logits[None], ids[i : i + 1])[0], atol=2e-5)


def test_bad_strides_and_ids():
    ids = np.zeros(9, np.int32)
    for stride in (0, 17, -1):
        with pytest.raises(DelveError, match="stride"):
            evaluate.nll(three_gram, ids, 16, stride)
    with pytest.raises(DelveError, match="empty"):
        evaluate.evaluate(byte_lm(), [])
    tok = data.load_tokenizer(data.train_bpe(["some text " * 9], 300), 300)
    with pytest.raises(DelveError, match="not its tokenizer"):
        evaluate.evaluate(dataclasses.replace(byte_lm(), tokenizer=tok), ["some text, éé"])
    with pytest.raises(DelveError, match="text is empty"):  # but for the <|endoftext|> between
        evaluate.evaluate(dataclasses.replace(byte_lm(), tokenizer=tok), ["", ""])


# ---- models --------------------------------------------------------------------------------------

COMMON = dict(vocab_size=256, vocab_rows=256, d_model=16, n_layers=1, context_length=48)
CONFIGS = {
    "mamba": MambaConfig(**COMMON, d_inner=32, d_state=4, dt_rank=2),
    "rwkv": RwkvConfig(**COMMON, d_att=16, d_ffn=32),
    "neox": NeoxConfig(**COMMON, n_heads=2, d_ffn=32),
}


def byte_lm(family="neox", scale=8.0):
    cfg = CONFIGS[family]
    params = models.init_params(cfg, jax.random.key(1))
    return evaluate.Model(cfg, jax.tree.map(lambda a: a * scale if a.ndim > 2 else a, params))


TEXTS = ["Every byte counts: ünïcødé.\n" * 5, "x" * 70, "\n"]


@pytest.mark.parametrize("family", CONFIGS)
def test_evaluate_counts_and_does_not_depend_on_the_batch(family):
    lm = byte_lm(family)
    raw = "".join(TEXTS).encode()
    results = [evaluate.evaluate(lm, TEXTS, window=32, stride=8, batch=b) for b in (2, 5)]
    for result in results:
        assert result["bytes"] == result["tokens"] == len(raw)
        assert result["parameters"] == models.count(lm.config)
        assert result["parameter_bytes"] == 4 * models.count(lm.config)
        assert result["tokens_per_second"] > 0 and result["data_hash"] == data.data_hash(TEXTS)
        assert result["nll_per_token"] == pytest.approx(results[0]["nll_per_token"], rel=1e-6)
        assert result["bits_per_byte"] == pytest.approx(result["nll_per_token"] / math.log(2))
    # one window over everything: the plain sum, and log 256 for the byte that nothing precedes
    whole = evaluate.evaluate(lm, TEXTS, window=len(raw), stride=1)
    tokens = np.frombuffer(raw, np.uint8).astype(np.int32)
    logits, _ = forward(lm.config, lm.params, tokens[None, :-1])
    want = math.log(256) + sum(by_hand(logits[0], tokens[1:]))
    assert whole["nll_per_token"] * len(raw) == pytest.approx(want, rel=1e-5)


def test_bits_per_byte_with_a_tokenizer_counts_the_documents_bytes():
    tok = data.load_tokenizer(data.train_bpe(TEXTS, 258), 258)
    cfg = NeoxConfig(**COMMON | {"vocab_size": 258, "vocab_rows": 264}, n_heads=2, d_ffn=32)
    lm = evaluate.Model(cfg, models.init_params(cfg, jax.random.key(0)), tok)
    result = evaluate.evaluate(lm, TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    ids = [i for text in TEXTS for i in [0, *tok.encode(text).ids]]  # eot before each document
    assert (result["bytes"], result["tokens"]) == (size, len(ids) - 1)
    nll_n = evaluate.nll(lm, np.array(ids[1:]), result["window"], result["stride"], bos=0)
    assert result["bits_per_byte"] == pytest.approx(nll_n.sum() / math.log(2) / size, rel=1e-6)


def test_damaged_weights_are_an_error_not_a_number(tmp_path):
    lm = byte_lm()
    lm.params["norm_f"]["bias"] = lm.params["norm_f"]["bias"].at[0].set(jnp.nan)
    with pytest.raises(DelveError, match="damaged"):
        evaluate.evaluate(lm, TEXTS)
    path = write_task(tmp_path, [{"context": "a", "continuation": "b"}])
    with pytest.raises(DelveError, match="damaged"):
        tasks.evaluate_task(lm, path)


# ---- tasks ---------------------------------------------------------------------------------------

LOGP_V = np.log(np.random.default_rng(5).dirichlet(np.ones(256)))


def unigram(tokens_BT):
    """Bytes drawn independently: log-probabilities add up."""
    return jnp.broadcast_to(jnp.asarray(LOGP_V, jnp.float32), (*tokens_BT.shape, 256))


def ll_of(text):
    return sum(LOGP_V[b] for b in text.encode())


def write_task(tmp_path, rows):
    path = tmp_path / "toy.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_choices_by_the_published_formulas(tmp_path):
    """delphi.md section 8 where likelihoods are sums; the joining space is not in the bytes."""
    rng = random.Random(2)
    words = lambda: "".join(rng.choice("abcdé\u2028 ") for _ in range(rng.randint(1, 30))) + "z"  # noqa: E731
    rows = [
        {"query": words(), "choices": [words() for _ in range(4)], "gold": rng.randrange(4)}
        for _ in range(40)
    ]
    got = tasks.evaluate_task(unigram, write_task(tmp_path, rows), batch=7)
    want = {key: [] for key in got if key not in ("task", "examples")}
    for row in rows:
        gold = row["gold"]
        bare = [choice.removeprefix(" ") for choice in row["choices"]]  # which brings the joint
        ll = np.array([ll_of(" " + choice) for choice in bare])
        size = np.array([len(choice.encode()) for choice in bare])
        bits = -ll / (size * math.log(2))
        share = np.exp(-bits) / np.exp(-bits).sum()
        for key, value in {
            "acc": ll.argmax() == gold,
            "acc_norm": (ll / size).argmax() == gold,
            "bits_per_byte": bits[gold],
            "logprob": ll[gold],
            "logprob_per_token": ll[gold] / (size[gold] + 1),
            "logprob_per_byte": ll[gold] / size[gold],
            "choice_logprob": ll[gold] - math.log(np.exp(ll).sum()),
            "choice_prob_norm": share[gold],
            "choice_logprob_norm": math.log(share[gold]),
        }.items():
            want[key].append(value)
    assert (got["task"], got["examples"]) == ("toy", 40)
    for key, values in want.items():
        assert got[key] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-6), key


NEXT = np.arange(1, 257)
NEXT[ord("j")] = ord(" ")


def alphabet(tokens_BT):
    """After each byte the next one, after j a space, with probability near one."""
    return 9.0 * jax.nn.one_hot(jnp.asarray(NEXT)[tokens_BT], 256)


def test_cloze_needs_every_token(tmp_path):
    rows = [
        {"context": "fg hij", "continuation": '!"#'},  # joined by a space
        {"context": "fg hij ", "continuation": '!"#'},  # which is not doubled
        {"context": "fg hij", "continuation": '!"$'},  # the last token is wrong
        {"context": "\t", "continuation": "\n\x0b"},  # other white space joins by itself
    ]
    path = write_task(tmp_path, rows)
    got = tasks.evaluate_task(alphabet, path)
    assert got["acc"] == 0.75 and "acc_norm" not in got
    assert tasks.evaluate_task(alphabet, path, limit=2)["acc"] == 1
    # log p of the right byte: logits 9 there, 0 at the 255 others; the space is a token too
    want = 4 * (9 - math.log(math.exp(9) + 255))
    assert tasks.evaluate_task(alphabet, path, limit=1)["logprob"] == pytest.approx(want, 1e-4)


def test_white_space_that_ends_a_context_is_scored(tmp_path):
    """As lm-eval does it, whose accuracies per byte differ else: two wrong tokens, not one."""
    path = write_task(tmp_path, [{"context": "fgh\n", "continuation": "!"}])
    wrong = -math.log(math.exp(9) + 255)
    assert tasks.evaluate_task(alphabet, path)["logprob"] == pytest.approx(2 * wrong, 1e-4)


def test_minimal_pairs_and_context_options(tmp_path):
    rows = [
        {"sentence_good": "abcdef", "sentence_bad": "abdcef"},
        {"sentence_good": "zyx", "sentence_bad": "abc"},
    ]
    assert tasks.evaluate_task(alphabet, write_task(tmp_path, rows))["acc"] == 0.5
    rows = [{"context_options": ["qj", "qk"], "continuation": "!", "gold": gold} for gold in (0, 1)]
    assert tasks.evaluate_task(alphabet, write_task(tmp_path, rows))["acc"] == 0.5


def test_long_contexts_are_cut_from_the_left(tmp_path):
    """Only the nearest context fits; a model of three tokens does not miss the rest."""
    lm = byte_lm()
    row = {"query": "q" * 500 + "tail", "choices": ["one", "two"], "gold": 1}
    short = row | {"query": "q" * 20 + "tail"}
    cut = evaluate.Scorer(evaluate.as_scorer(unigram).score, 256, 16)
    a = tasks.evaluate_task(cut, write_task(tmp_path, [row]))
    b = tasks.evaluate_task(cut, write_task(tmp_path, [short]))
    assert a == b and a["logprob"] == pytest.approx(ll_of(" two"), rel=1e-5)
    assert tasks.evaluate_task(lm, write_task(tmp_path, [row]))["examples"] == 1


def test_continuations_longer_than_the_context_are_scored_whole(tmp_path):
    """In pieces; a model that reads one byte back shows that each stands behind the one before."""
    text = "".join(map(chr, range(33, 83)))  # each byte's follower is the next one
    rows = [{"context": "fghij", "continuation": text}, {"context": "", "continuation": text}]
    lm = lambda context: evaluate.Scorer(evaluate.as_scorer(alphabet).score, 256, context)  # noqa: E731
    for row in rows:
        path = write_task(tmp_path, [row])
        whole = tasks.evaluate_task(lm(256), path)
        assert whole["acc"] == 1
        for context in (9, 16, 40):
            got = tasks.evaluate_task(lm(context), path)
            assert got == {k: v if isinstance(v, str) else pytest.approx(v, rel=1e-5)
                           for k, v in whole.items()}  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        '{"question": "?"}',
        '{"query": "a", "choices": ["b", "c"], "gold": 2}',
        '{"query": "a", "choices": ["b", ""], "gold": 0}',
        '{"query": "a", "choices": ["b", 3], "gold": 0}',
        '{"query": "a", "choices": ["b", "c"], "gold": "0"}',
        '{"sentence_good": "only"}',
        '{"context": "a", "continuation": ""}',
        '{"context": "a", "continuation": "\\ud800"}',
        '{"context": "\\udfff a", "continuation": "b"}',
        '{"query": "a", "choices": {"b": 1, "c": 2}, "gold": 0}',
        '{"query": "a", "choices": "bc", "gold": 0}',
        '{"query": "a", "choices": ["b", "c"], "gold": 0.5}',
        '{"query": "a", "choices": ["b", "c"], "gold": 0, "subject": 7}',
        '{"context_options": {"a": 0, "b": 1}, "continuation": "c", "gold": 0}',
        '{"question": "a", "choices": ["b", "c"], "answer": 0, "subject": 7}',
        '{"question": "a", "choices": ["b", "c"], "answer": 0, "subject": "\\ud800"}',
        '{"question": 7, "choices": ["b", "c"], "answer": 0}',
        '{"question": "a", "choices": {"b": 1, "c": 2}, "answer": 0}',
        '{"question": "a", "answer": 7}',
        '{"question": 7, "answer": "#### 7"}',
        '{"context": "a", "chain_of_thought": 7, "answer": "7"}',
        '{"prompt": "a", "canonical_solution": "b", "test": 7, "entry_point": "f"}',
    ],
)
def test_bad_task_lines_are_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"context": "a", "continuation": "b"}\n\n' + line + "\n")
    with pytest.raises(DelveError, match=r"bad\.jsonl:3: "):
        tasks.evaluate_task(unigram, path)
    path.write_text("\n")
    with pytest.raises(DelveError, match="no examples"):
        tasks.evaluate_task(unigram, path)


# ---- transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hf") / "neox"
    json_str = data.train_bpe([*TEXTS, "some more text to learn merges from, more text"], 280)
    n = data.load_tokenizer(json_str, 280).get_vocab_size()
    config = transformers.GPTNeoXConfig(
        vocab_size=n + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=48, initializer_range=0.5,
        tie_word_embeddings=False,
    )  # fmt: skip
    transformers.GPTNeoXForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.json").write_text(json_str)
    return path


def test_hf_backend_scores_valid_ids_only(hf_dir):
    import torch
    import transformers

    result = evaluate.evaluate_hf(hf_dir, TEXTS, batch=3)
    tok = data.load_tokenizer((hf_dir / "tokenizer.json").read_text(), 280)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir).eval()
    stream = np.concatenate([[0], data.encode_documents(tok, TEXTS)])
    assert (result["tokens"], result["window"]) == (len(stream) - 1, 48)
    total, end = 0.0, 0
    for start in [*range(0, len(stream) - 49, 24), len(stream) - 49]:
        part = stream[start : start + 49]
        with torch.no_grad():
            logits = model(torch.tensor(part[None, :-1])).logits[0, :, : tok.get_vocab_size()]
        total += sum(by_hand(logits.numpy(), part[1:])[end - start :])
        end = start + 48
    assert result["nll_per_token"] == pytest.approx(total / (len(stream) - 1), rel=1e-5)


def test_hf_and_jax_backends_agree(hf_dir):
    parents = pytest.importorskip("delve_jax.parents")
    cfg, params, json_str = parents.load(hf_dir)
    lm = evaluate.Model(cfg, params, data.load_tokenizer(json_str, cfg.vocab_size))
    ours, theirs = evaluate.evaluate(lm, TEXTS), evaluate.evaluate_hf(hf_dir, TEXTS)
    for key in ("nll_per_token", "bits_per_byte"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-4)
    for key in ("tokens", "bytes", "window", "data_hash", "parameters", "parameter_bytes"):
        assert ours[key] == theirs[key], key
    # five rows of both tables are padding, here and in every verb
    assert ours["parameters"] == look.info(hf_dir)["parameters"] == models.count(cfg) - 2 * 5 * 16


def test_info_of_a_parent_reads_no_weights(hf_dir, monkeypatch):
    parents = pytest.importorskip("delve_jax.parents")
    cfg, _, json_str = parents.load(hf_dir)
    monkeypatch.setattr(parents, "load", None)
    facts = look.info(hf_dir)
    assert facts["parameters"] == evaluate.valid_count(cfg) and facts["dtype"] == "float32"
    assert facts["tokenizer"] == hashlib.sha256(json_str.encode()).hexdigest()


@pytest.mark.parametrize("code", [True, False])
def test_code_comes_from_the_hub_where_a_config_names_it(tmp_path, monkeypatch, code):
    """Our own export's is then known as ours; a stray script of another model stays there."""
    import huggingface_hub

    from delve_jax import parents

    hub, got = tmp_path / "hub", tmp_path / "snapshots" / "0123abc"
    remote = Path(parents.__file__).parent / "remote"
    shutil.copytree(remote, hub, ignore=shutil.ignore_patterns("__pycache__"))
    auto_map = {"AutoModelForCausalLM": "modeling_delve.DelveForCausalLM"}
    (hub / "config.json").write_text(json.dumps({"auto_map": auto_map} if code else {}))
    (hub / "model.safetensors").touch()
    names = sorted(file.name for file in hub.iterdir())

    def snapshot(repo, revision, allow_patterns):
        got.mkdir(parents=True, exist_ok=True)
        for name in names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                shutil.copy(hub / name, got)
        return str(got)

    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision=None: names
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    path = parents.resolve("org/delve")
    assert {file.name for file in path.glob("*.py")} == {n for n in names if code and ".py" in n}
    assert not code or evaluate._is_ours(path, auto_map)


def test_hf_refuses_damaged_and_foreign_directories(hf_dir, tmp_path):
    from safetensors.numpy import load_file, save_file

    with pytest.raises(DelveError, match="config.json"):
        evaluate.hf_scorer(tmp_path)
    config = json.loads((hf_dir / "config.json").read_text())
    tensors = load_file(hf_dir / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(DelveError, match=name):
        evaluate.hf_scorer(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(DelveError, match="trust_remote_code"):
        evaluate.hf_scorer(tmp_path)
    (tmp_path / "evil.py").unlink()  # no code here: it would come from another repository
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "org/evil--evil.Model"}})
    )
    with pytest.raises(DelveError, match="trust_remote_code"):
        evaluate.hf_scorer(tmp_path)
