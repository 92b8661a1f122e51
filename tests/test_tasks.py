"""Tasks of lettered options, of worked numbers and of programs; few-shot contexts; the sandbox."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import delve_jax.evaluate as evaluate
from delve_jax import cli, data, look, sandbox, tasks, upcycle
from delve_jax.config import DelveError
from delve_jax.delphi import points

LOGP_V = np.log(np.random.default_rng(5).dirichlet(np.ones(256)))


def write(tmp_path, rows, name="toy.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def speaker(answer=lambda prompt: "", context=4096):
    """A model of independent bytes that writes what `answer` says after a prompt."""
    seen = []

    def score(tokens_BT, targets_BT):
        return -LOGP_V[np.asarray(targets_BT)], np.zeros(np.shape(targets_BT), bool)

    def generate(prompts, n):
        texts = [bytes(ids).decode() for ids in prompts]
        seen.extend(texts)
        return [list(answer(t).encode().ljust(n, b" ")[:n]) for t in texts]

    return evaluate.Scorer(score, 256, context, None, generate=generate), seen


def ll_of(text):
    return sum(LOGP_V[b] for b in text.encode())


# ---- lettered options ----------------------------------------------------------------------------


def mmlu_row(i, subject):
    return {"question": f"Q{i}?", "choices": [f"a{i}", "b", "c", "ddd"], "answer": i % 4,
            "subject": subject}  # fmt: skip


def test_mmlu_is_printed_as_its_authors_do(tmp_path):
    """Hendrycks' template: heading, options under the question, letters behind `Answer:`."""
    rows = [mmlu_row(i, "high_school_physics") for i in range(3)]
    one = tasks.read_task(write(tmp_path, rows))[2]
    assert one.pairs[2] == ("Q2?\nA. a2\nB. b\nC. c\nD. ddd\nAnswer:", "C") and one.gold == 2
    verb = tasks.read_task(write(tmp_path, rows), mmlu="verb")[2]
    assert verb.pairs[2] == (one.pairs[2][0], "C. c")
    (shown,) = tasks._few_shot(tasks.read_task(write(tmp_path, rows)), 2, None)
    assert shown.pairs[0][0] == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "Q0?\nA. a0\nB. b\nC. c\nD. ddd\nAnswer: A\n\n"
        "Q1?\nA. a1\nB. b\nC. c\nD. ddd\nAnswer: B\n\n"
        "Q2?\nA. a2\nB. b\nC. c\nD. ddd\nAnswer:"
    )


def test_more_options_than_ten_have_letters_too(tmp_path):
    row = {"question": "Q?", "choices": [f"a{i}" for i in range(26)], "answer": 12, "subject": "x"}
    (one,) = tasks.read_task(write(tmp_path, [row]))
    assert len(one.pairs) == 26 and one.pairs[12][1] == "M" and "\nZ. a25\n" in one.pairs[0][0]
    with pytest.raises(DelveError, match=":1: .*27 choices"):
        tasks.read_task(write(tmp_path, [row | {"choices": [*row["choices"], "b"]}]))


def test_accuracy_is_weighted_by_size_and_soft_metrics_by_subject(tmp_path):
    """delphi.md section 8; the model likes one letter whatever it is asked."""
    rows = [mmlu_row(i, "big") for i in range(9)] + [mmlu_row(i, "small") for i in range(2)]
    got = tasks.evaluate_task(speaker()[0], write(tmp_path, rows))
    letters = np.array([ll_of(" " + letter) for letter in "ABCD"])
    favourite = int(letters.argmax())
    right = [i % 4 == favourite for i in range(9)] + [i % 4 == favourite for i in range(2)]
    assert got["acc"] == pytest.approx(np.mean(right)) and got["examples"] == 11
    share = letters - np.logaddexp.reduce(letters)
    per_subject = [np.mean([share[i % 4] for i in range(n)]) for n in (9, 2)]
    assert got["choice_logprob"] == pytest.approx(np.mean(per_subject), rel=1e-5)
    assert got["subjects"]["small"] == {"examples": 2, "acc": pytest.approx(np.mean(right[9:]))}


def test_lines_without_a_subject_are_one_of_the_subjects(tmp_path):
    """Of other kinds as well, which do not have all metrics."""
    plain = {"query": "Q", "choices": ["a", "bb"], "gold": 1}
    rows = [*(mmlu_row(i, "x") for i in range(3)), plain, {"context": "c", "continuation": "d"}]
    cut = lambda some: tasks.evaluate_task(speaker()[0], write(tmp_path, some))  # noqa: E731
    got, x, rest, choice = cut(rows), cut(rows[:3]), cut(rows[3:]), cut([plain])
    assert got["bits_per_byte"] == pytest.approx((x["bits_per_byte"] + rest["bits_per_byte"]) / 2)
    assert got["choice_logprob"] == pytest.approx(
        (x["choice_logprob"] + choice["choice_logprob"]) / 2
    )
    assert got["subjects"] == {"": {"examples": 2, "acc": rest["acc"]}, **x["subjects"]}
    null = cut([plain | {"subject": None}])
    assert null == choice
    got = cut([rows[0], {"question": "a", "answer": "#### 1"}])
    assert got["subjects"][""] == {"examples": 1} and not np.isnan(got["exact_match"])


def test_shots_are_of_the_subject_and_never_scored(tmp_path):
    rows = [mmlu_row(i, s) for i in range(3) for s in ("x", "y")]
    path, dev = write(tmp_path, rows), write(tmp_path, [mmlu_row(7, "y"), mmlu_row(5, "x")], "dev")
    examples = tasks._few_shot(tasks.read_task(path), 0, None)
    assert len(examples) == 6 and "about x.\n\nQ0?" in examples[0].pairs[0][0]
    examples = tasks._few_shot(tasks.read_task(path), 1, tasks.read_task(dev))
    assert len(examples) == 6 and "Q5?" in examples[0].pairs[0][0]
    assert tasks.evaluate_task(speaker()[0], path, shots=1)["examples"] == 4
    assert tasks.evaluate_task(speaker()[0], path, shots=1, shots_from=dev)["shots"] == 1
    for shots, more, said in ((3, {}, "nothing is left"), (4, {}, "nothing is left"),
                              (2, {"shots_from": dev}, "there are 1 examples of subject x"),
                              (-1, {}, "--shots -1"),
                              (0, {"shots_from": dev}, "from .*give --shots N")):  # fmt: skip
        with pytest.raises(DelveError, match=said):
            tasks.evaluate_task(speaker()[0], path, shots=shots, **more)
    with pytest.raises(DelveError, match="--mmlu letter"):
        tasks.evaluate_task(speaker()[0], path, mmlu="letter")
    with pytest.raises(DelveError, match="--limit 0"):
        tasks.evaluate_task(speaker()[0], path, limit=0)


def test_shots_of_other_kinds(tmp_path):
    """Joined by what joins them when they are scored."""
    rows = [{"query": "Is it?\n", "choices": ["yes", "no"], "gold": 1}, {"query": "So", "choices":
            ["a", "b"], "gold": 0}, {"context": "the end", "continuation": "is near"}]  # fmt: skip
    examples = tasks.read_task(write(tmp_path, rows))
    assert [e.shown() for e in examples] == ["Is it?\nno", "So a", "the end is near"]


def test_a_joining_space_may_stand_with_the_continuation(tmp_path):
    """Files of both habits give the same text; spaces that indent stay."""
    rows = [{"context": "the end", "continuation": text} for text in ("is near", " is near")]
    a, b = (tasks.evaluate_task(speaker()[0], write(tmp_path, [row])) for row in rows)
    assert a == b and a["logprob"] == pytest.approx(ll_of(" is near"), rel=1e-6)
    (example,) = tasks.read_task(write(tmp_path, [ADD]))
    assert example.shown() == ADD["prompt"] + ADD["canonical_solution"]
    one_line = ADD | {"prompt": "def add(a, b):", "canonical_solution": "  return a + b"}
    (example,) = tasks.read_task(write(tmp_path, [one_line]))
    assert example.shown() == "def add(a, b):  return a + b"


def test_task_files_of_one_name_are_told_apart():
    """`arc/test.jsonl piqa/test.jsonl`: neither replaces the other in the report."""
    names = look._task_names(["a/test.jsonl", "b/test.jsonl", "a/piqa.jsonl"])
    assert names == {"a/test.jsonl": "a/test.jsonl", "b/test.jsonl": "b/test.jsonl",
                     "piqa": "a/piqa.jsonl"}  # fmt: skip


# ---- numbers -------------------------------------------------------------------------------------


def test_both_layouts_of_gsm8k(tmp_path):
    ours = {"context": "How many?", "chain_of_thought": "2*600=1200", "answer": "1,200"}
    hub = {"question": "How many?", "answer": "2*600=1200\n#### 1,200"}
    a, b = tasks.read_task(write(tmp_path, [ours, hub]))
    assert a == b and a.answer == "1200"
    assert a.pairs == (("Question: How many?\nAnswer:", "2*600=1200\n#### 1,200"),)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" so it is\n#### 1200", 1, 1),
        (" so it is\n#### $1,200.", 1, 1),
        (" it is 1200", 0, 1),
        (" it is 1,200.", 0, 1),
        (" first 1200, then #### 7", 0, 0),
        (" #### 1200\nQuestion: next?\nAnswer: #### 3", 1, 1),
        (" #### -1200", 0, 0),
        (" none", 0, 0),
        ("", 0, 0),
    ],
)
def test_exact_match(tmp_path, text, strict, flexible):
    """As lm-evaluation-harness' gsm8k filters: behind ####, or the last number."""
    path = write(tmp_path, [{"question": "How many?", "answer": "600 twice\n#### 1200"}])
    model, seen = speaker(lambda prompt: text)
    got = tasks.evaluate_task(model, path)
    assert (got["exact_match"], got["exact_match_flexible"]) == (strict, flexible)
    assert seen == ["Question: How many?\nAnswer:"] and "acc" not in got
    want = -ll_of(" 600 twice\n#### 1200") / math.log(2) / len("600 twice\n#### 1200")
    assert got["bits_per_byte"] == pytest.approx(want, rel=1e-6)


def test_a_long_question_is_read_as_far_as_the_context_reaches(tmp_path):
    """As it is scored: eight worked examples have more than 1,024 tokens."""
    path = write(tmp_path, [{"question": "q" * 3000, "answer": "#### 1"}])
    for context, read in ((4096, 3018), (1024, 1023 - 256), (512, 511 - 256), (256, 255 - 128)):
        model, seen = speaker(context=context)
        tasks.evaluate_task(model, path)
        assert [len(text) for text in seen] == [read]
    path = write(tmp_path, [ADD | {"prompt": "#" * 3000 + "\n" + ADD["prompt"]}])
    for context, read in ((1024, 1023 - 512), (512, 511 - 256), (2, 1)):
        model, seen = speaker(context=context)
        tasks.evaluate_task(model, path, run_code=True)
        assert [len(text) for text in seen] == [read]


def test_a_model_that_only_scores_cannot_answer(tmp_path):
    path = write(tmp_path, [{"question": "How many?", "answer": "#### 1"}])
    blind = evaluate.Scorer(speaker()[0].score, 256, 64)
    with pytest.raises(DelveError, match="only scores text"):
        tasks.evaluate_task(blind, path)


def test_a_loaded_model_answers_alone_and_in_a_batch(tmp_path):
    """Left padding changes nothing: an answer does not depend on who is asked beside."""
    import delve_jax

    lm = delve_jax.load(upcycle.PROXIES / "rwkv")
    write_answers = evaluate.as_scorer(lm).generate
    prompts = [lm.tokenizer.encode(t).ids for t in ("The import system", "def main(argv):\n    if")]
    together = write_answers(prompts, 12)
    for prompt, new in zip(prompts, together, strict=True):
        assert len(new) == 12 and write_answers([prompt], 12)[0] == new
        assert np.asarray(lm.generate(np.array([prompt]), 12))[0, len(prompt) :].tolist() == new


# ---- programs ------------------------------------------------------------------------------------

ADD = {
    "task_id": "toy/0", "prompt": 'def add(a, b):\n    """Sum."""\n', "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(f):\n    assert f(1, 2) == 3\n    assert f(-1, 1) == 0\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("    return a + b\n", 1),
        ("    return a + b\n\ndef other():\n    nonsense(", 1),  # cut at the next definition
        ("    return a - b\n", 0),
        ("    return a +\n", 0),
        ("    import sys; sys.exit(0)\n", 0),
        ("    import os; os._exit(0)\n", 0),
    ],
)
def test_pass_at_1_only_when_asked(tmp_path, text, passed):
    path = write(tmp_path, [ADD])
    model, seen = speaker(lambda prompt: text)
    soft = tasks.evaluate_task(model, path)
    assert "pass_at_1" not in soft and not seen
    got = tasks.evaluate_task(model, path, run_code=True)
    assert got["pass_at_1"] == passed and got["bits_per_byte"] == soft["bits_per_byte"]


def test_answers_of_two_kinds_end_as_each_kind_does(tmp_path):
    path = write(tmp_path, [{"question": "How many?", "answer": "#### 1"}, ADD])
    code = "    return a + b\n\ndef other():\n    nonsense("
    model, seen = speaker(lambda prompt: code if "def add" in prompt else "\n#### 1")
    got = tasks.evaluate_task(model, path, run_code=True)
    assert (got["pass_at_1"], got["exact_match"], len(seen)) == (1, 1, 2)


def test_the_sandbox_has_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 3)
    monkeypatch.setenv("SECRET", "x")
    assert sandbox.passes("x = 1")
    assert not sandbox.passes("while True: pass")
    assert not sandbox.passes("x = bytearray(2 << 30)")
    assert not sandbox.passes("open('big', 'wb').write(bytes(3 << 20))")
    assert sandbox.passes("import os; assert 'SECRET' not in os.environ; assert not os.listdir()")
    # what it leaves running ends with it
    left = tmp_path / "left"
    child = f"import time; time.sleep(2); open({str(left)!r}, 'w')"
    assert sandbox.passes(
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    )
    time.sleep(2.5)
    assert not left.exists()


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a", "answer": "no number"},
        {"question": "a", "choices": ["b", "c"], "answer": "B"},
        {"question": "a", "choices": ["b", "c"], "answer": 2},
        {"prompt": "def f():", "canonical_solution": " pass", "test": ""},
    ],
)
def test_bad_lines(tmp_path, row, capsys):
    path = write(tmp_path, [row])
    assert cli.main(["eval", str(upcycle.PROXIES / "rwkv"), "--tasks", str(path)]) == 2
    assert f"{path}:1: not a task line" in capsys.readouterr().err


def test_the_shared_gsm8k():
    """The real file's lines are all understood."""
    path = Path(__file__).resolve().parents[2] / "shared/data/eval/gsm8k.jsonl"
    if not path.exists():
        pytest.skip("no ../shared/data")
    examples = tasks.read_task(path)
    assert len(examples) == 1319 and all(e.kind == "number" and e.answer for e in examples)


# ---- both backends, and a pool of models ---------------------------------------------------------


@pytest.fixture(scope="module")
def hf_models(tmp_path_factory):
    """Two small GPT-NeoX directories with a tokenizer."""
    torch = pytest.importorskip("torch")
    import transformers

    json_str = data.train_bpe(["2 + 2 = 4, Question: Answer: #### 4; some text to learn"], 270)
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        path = tmp_path_factory.mktemp("hf") / f"model{seed}"
        config = transformers.GPTNeoXConfig(
            vocab_size=data.load_tokenizer(json_str, 270).get_vocab_size(), hidden_size=16,
            num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=512, initializer_range=0.5, tie_word_embeddings=False,
        )  # fmt: skip
        transformers.GPTNeoXForCausalLM(config).save_pretrained(path)
        (path / "tokenizer.json").write_text(json_str)
        paths.append(path)
    return paths


def test_both_backends_write_the_same(hf_models):
    import delve_jax

    prompts = [[5, 9, 2], [7], [3, 3, 8, 1, 4, 6]]
    ours = evaluate.as_scorer(delve_jax.load(hf_models[0])).generate(prompts, 20)
    theirs = evaluate.hf_scorer(hf_models[0]).generate(prompts, 20)
    # transformers takes id 2 for the end of a text unless a config says otherwise; ours goes on
    assert all(a[: len(b)] == b and (len(b) == 20 or a[len(b)] == 2)
               for a, b in zip(ours, theirs, strict=True))  # fmt: skip
    assert any(len(b) == 20 for b in theirs)


def test_transformers_rwkv_answers_in_a_batch_as_alone():
    """It ignores the attention mask, and its cached step mixes the rows of a batch."""
    pytest.importorskip("torch")
    write_answers = evaluate.hf_scorer(upcycle.PROXIES / "rwkv").generate
    prompts = [[5, 9, 2, 70, 300], [77]]
    assert write_answers(prompts, 6) == [write_answers([prompt], 6)[0] for prompt in prompts]


def test_an_answer_ends_with_the_text():
    assert evaluate.ended(np.array([[5, 0, 7], [5, 6, 7]]), [0]) == [[5], [5, 6, 7]]
    assert evaluate.ended(np.array([[5, 0, 7]]), [None]) == [[5, 0, 7]]


def test_a_pool_of_models(hf_models, tmp_path, capsys):
    """One CSV a task that `delve delphi downstream --pool` reads; a missing model is left out."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
    import reference_pool

    choices = write(tmp_path, [mmlu_row(i, "x") for i in range(8)], "mmlu.jsonl")
    numbers = write(tmp_path, [{"question": "How?", "answer": "so\n#### 4"}], "gsm.jsonl")
    argv = ["--models", *map(str, hf_models), str(tmp_path / "none"), "--out", str(tmp_path / "p"),
            "--tasks", str(choices), str(numbers)]  # fmt: skip
    reference_pool.main(argv)
    out, err = capsys.readouterr()
    assert "left out" in err and "none" in err
    assert out.split() == [str(tmp_path / "p" / n) for n in ("gsm.csv", "mmlu.csv")]
    lines = (tmp_path / "p" / "mmlu.csv").read_text().splitlines()
    assert lines[0] == "model,soft,hard" and len(lines) == 3
    want = tasks.evaluate_task(evaluate.hf_scorer(hf_models[0]), choices)
    assert lines[1] == f"{hf_models[0]},{want['choice_logprob']},{want['acc']}"
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "p").glob("*.json")}
    reference_pool.main(argv)
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "p").glob("*.json")} == before
    for more in (["--shots", "1"], ["--tasks", str(choices)]):  # scores that do not go together
        with pytest.raises(DelveError, match="scored with other tasks or settings"):
            reference_pool.main([*argv, *more])
    rows, _ = points.table(tmp_path / "p" / "mmlu.csv", {"soft": ("soft",), "hard": ("hard",)}, ())
    assert len(rows) == 2
