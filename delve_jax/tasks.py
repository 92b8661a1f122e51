"""Benchmark tasks from jsonl: choices, cloze and generated answers, zero- or few-shot.

Soft metrics (log-probabilities, bits per byte) move long before hard ones (accuracy, exact match,
pass@1) do; both come from the same lines (design notes, delphi.md section 8). A task is a file:

    {query, choices, gold}                    alternatives after one context
    {question, choices, answer, subject}      MMLU: lettered options, averaged over subjects
    {context_options, continuation, gold}     one ending after several contexts
    {context, continuation}                   cloze: the arg max must be every token
    {sentence_good, sentence_bad}             minimal pairs
    {question, answer} or {context, chain_of_thought, answer}   GSM8K: a number is generated
    {prompt, canonical_solution, test, entry_point}             HumanEval: code is generated
"""

from __future__ import annotations

import itertools
import json
import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import data, sandbox
from .config import DelveError
from .evaluate import Scorer, as_scorer, batch_size, check_ids, run_rows, tokenizer_of
from .metrics import progress

WANTED = (
    "query, choices, gold | question, choices, answer | context, continuation | sentence_good, "
    "sentence_bad | question, answer (#### number) | prompt, canonical_solution, test, entry_point"
)
LETTERS = string.ascii_uppercase
MMLU = ("label", "verb")  # what of an option is scored: its letter, or letter and text (Delphi)
NEW_TOKENS = {"number": 256, "code": 512}
# a generated answer ends before the first of these
STOPS = {
    "number": ("\nQuestion:", "Question:", "<|endoftext|>"),
    "code": ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "<|endoftext|>"),
}
# metrics that are averaged over subjects as they are; the others by the subjects' sizes
SOFT = ("bits_per_byte", "logprob", "logprob_per_token", "logprob_per_byte", "choice_logprob",
        "choice_prob_norm", "choice_logprob_norm")  # fmt: skip


@dataclass(frozen=True)
class Example:
    """Alternatives (context, continuation) of which `gold` is right; one alternative = cloze."""

    pairs: tuple[tuple[str, str], ...]
    gold: int = 0
    subject: str = ""  # accuracies and soft metrics are averaged over subjects
    heading: str = ""  # before the first of the shown examples, or the question itself
    kind: str = ""  # number, code: what follows the context is generated as well
    answer: str = ""  # number: what it must be; code: the test that it must pass

    def shown(self) -> str:
        """The example with its answer, as few-shot contexts hold it."""
        context, text = self.pairs[self.gold]
        bare, gap = _joint(context)
        return bare + gap + text


# ---- files ---------------------------------------------------------------------------------------


def read_task(path: str | Path, mmlu: str = "label") -> list[Example]:
    """Examples of a .jsonl file; DelveError names file and line of what is none."""
    examples = []
    for number, line in enumerate(data.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            examples.append(_example(json.loads(line), mmlu))
        except (ValueError, KeyError, TypeError) as err:
            raise DelveError(
                f"{path}:{number}: not a task line ({type(err).__name__}: {err}); wanted {WANTED}"
            ) from None
    if not examples:
        raise DelveError(f"{path}: holds no examples")
    return examples


def _example(row: dict, mmlu: str) -> Example:
    gold, more = 0, {}
    if "sentence_good" in row:
        pairs = (("", row["sentence_good"]), ("", row["sentence_bad"]))
    elif "canonical_solution" in row:
        pairs = ((row["prompt"], row["canonical_solution"]),)
        test = f"{_text(row, 'test')}\ncheck({_text(row, 'entry_point')})\n"
        more = {"kind": "code", "answer": test}
    elif "question" in row and "choices" in row:
        pairs, gold = _lettered(row, mmlu), row["answer"]
        subject = _subject(row)
        more = {"subject": subject, "heading": _heading(subject)}
    elif "choices" in row:
        pairs, gold = tuple((row["query"], one) for one in _texts(row, "choices")), row["gold"]
        more = {"subject": _subject(row)}
    elif "context_options" in row:
        pairs = tuple((one, row["continuation"]) for one in _texts(row, "context_options"))
        gold = row["gold"]
    elif "answer" in row:
        pairs, more = _worked(row)
    else:
        pairs = ((row["context"], row["continuation"]),)
    if not all(
        isinstance(context, str) and isinstance(text, str) and text for context, text in pairs
    ):
        raise TypeError("an alternative is empty or not a string")
    if gold not in range(len(pairs)):  # nor is 0.5, or "0"
        raise ValueError(f"gold {gold!r} of {len(pairs)} choices")
    texts = [*itertools.chain(*pairs), more.get("subject", ""), more.get("answer", "")]
    "".join(texts).encode("utf-8")  # JSON may hold half a character, which no tokenizer reads
    return Example(tuple(_without_joint(*pair) for pair in pairs), int(gold), **more)


def _text(row: dict, field: str) -> str:
    if not isinstance(row[field], str):
        raise TypeError(f"field '{field}' is {row[field]!r}, a string is expected")
    return row[field]


def _texts(row: dict, field: str) -> list[str]:
    some = row[field]
    if not isinstance(some, list) or not all(isinstance(one, str) for one in some):
        raise TypeError(f"field '{field}' is {some!r}, a list of strings is expected")
    return some


def _subject(row: dict) -> str:
    return "" if row.get("subject") is None else _text(row, "subject")


def _without_joint(context: str, text: str) -> tuple[str, str]:
    """The pair without the space that the continuation brings along (some files have it there):
    `_joint` puts it back, and a second one would be another text."""
    brings = context and not context[-1].isspace() and text[0] == " " and len(text) > 1
    return context, text[1:] if brings else text


def _lettered(row: dict, mmlu: str) -> tuple[tuple[str, str], ...]:
    """An MMLU question with its options under it, as the benchmark's authors print it."""
    choices = _texts(row, "choices")
    if len(choices) > len(LETTERS):
        raise ValueError(f"{len(choices)} choices; there are letters for {len(LETTERS)}")
    options = [f"{a}. {c}" for a, c in zip(LETTERS, choices, strict=False)]
    query = "\n".join([_text(row, "question").strip(), *options, "Answer:"])
    scored = options if mmlu == "verb" else LETTERS[: len(options)]
    return tuple((query, text) for text in scored)


def _worked(row: dict) -> tuple[tuple[tuple[str, str], ...], dict]:
    """A GSM8K line: the published solution is scored, the number behind #### is asked for."""
    if "chain_of_thought" in row:
        question, number = _text(row, "context"), _text(row, "answer")
        solution = f"{_text(row, 'chain_of_thought')}\n#### {number}"
    else:
        question, solution = _text(row, "question"), _text(row, "answer")
        number = solution.rpartition("####")[2]
    if not _number(number):
        raise ValueError(f"answer {number!r} is not a number behind ####")
    pairs = ((f"Question: {question}\nAnswer:", solution),)
    return pairs, {"kind": "number", "answer": _number(number)}


def _few_shot(examples: list[Example], shots: int, pool: list[Example] | None):
    """(examples that are scored, each behind `shots` answered ones).

    pool: where those come from, of the example's own subject; None: the first of the file (of each
    subject), which are then not scored.
    """
    kept, by_subject = examples, {}
    for one in examples if pool is None else pool:
        by_subject.setdefault(one.subject, []).append(one)
    if pool is None:
        shown = {id(one) for some in by_subject.values() for one in some[:shots]}
        kept = [one for one in examples if id(one) not in shown]
    out = []
    for one in kept:
        some = by_subject.get(one.subject, [])[:shots]
        if len(some) < shots:
            where = f" of subject {one.subject}" if one.subject else ""
            raise DelveError(f"--shots {shots}: there are {len(some)} examples{where} to show")
        head = one.heading + "".join(s.shown() + "\n\n" for s in some)
        out.append(replace(one, pairs=tuple((head + context, t) for context, t in one.pairs)))
    if not out:
        raise DelveError(f"--shots {shots}: nothing is left to score; name --shots-from FILE")
    return out


def _heading(subject: str) -> str:
    if not subject:
        return ""
    name = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {name}.\n\n"


# ---- scores --------------------------------------------------------------------------------------


def evaluate_task(
    model,
    path: str | Path,
    limit: int | None = None,
    batch: int | None = None,
    *,
    shots: int = 0,
    shots_from: str | Path | None = None,
    mmlu: str = "label",
    run_code: bool = False,
) -> dict:
    """Hard and soft metrics of a task file, means over its first `limit` examples.

    All kinds: bits_per_byte and logprob (nats) of the right continuation, logprob_per_token and
    _per_byte. Choices: acc, acc_norm (per byte), choice_logprob = log of the gold's share among the
    choices, choice_prob_norm and choice_logprob_norm = the same of bits per byte (delphi.md 8).
    Cloze: acc = every token of the continuation is the arg max. Numbers: exact_match (the number
    behind ####) and exact_match_flexible (the last one). Code: pass_at_1 of one greedy program, run
    only with `run_code`. With subjects, accuracies are means over examples and soft metrics over
    subjects. Bytes are those of the text of the continuation without the space that joins it.
    Contexts are cut from the left to the window. shots: answered examples before each, from
    `shots_from` or the file's own first ones (left out of the score).
    """
    for flag, value, least in (("--limit", limit, 1), ("--shots", shots, 0)):
        if value is not None and value < least:
            raise DelveError(f"{flag} {value}: must be at least {least}")
    if mmlu not in MMLU:
        raise DelveError(f"--mmlu {mmlu}: choose one of {', '.join(MMLU)}")
    if shots_from and not shots:
        raise DelveError(f"--shots-from {shots_from}: nothing is shown of it; give --shots N too")
    scorer = as_scorer(model)
    tok, bos = tokenizer_of(scorer)
    examples = read_task(path, mmlu)
    if shots or any(one.heading for one in examples):
        pool = read_task(shots_from, mmlu) if shots_from else None
        examples = _few_shot(examples, shots, pool)
    examples = examples[: limit or None]
    jobs = [ids_of(tok, *pair) for example in examples for pair in example.pairs]
    for ids, _ in jobs:
        check_ids(ids, scorer.vocab_size)
    desc = Path(path).stem
    scored = iter(continuations(scorer, jobs, batch, bos, desc))
    rows = [_metrics(one, [next(scored) for _ in one.pairs]) for one in examples]
    for kind in ("number", "code") if run_code else ("number",):  # stops and lengths are a kind's
        asked = [i for i, one in enumerate(examples) if one.kind == kind]
        hard = _generated(scorer, tok, [examples[i] for i in asked], batch, desc) if asked else []
        for i, row in zip(asked, hard, strict=True):
            rows[i] |= row
    out = {"task": desc, "examples": len(rows)} | ({"shots": shots} if shots else {})
    return out | _means(examples, rows)


def _means(examples: list[Example], rows: list[dict]) -> dict:
    """Means of every metric; over subjects where there are any: lines without are one of them."""

    def means(some):
        found = {}
        for row in some:
            for key, value in row.items():
                found.setdefault(key, []).append(value)
        return {key: float(np.mean(values)) for key, values in found.items()}

    out, names = means(rows), sorted({one.subject for one in examples})
    if names == [""]:
        return out
    parts = {name: [row for one, row in zip(examples, rows, strict=True) if one.subject == name]
             for name in names}  # fmt: skip
    by_subject = {name: means(part) for name, part in parts.items()}
    soft = means(by_subject.values())
    out |= {key: soft[key] for key in out if key in SOFT}
    subjects = {name: {"examples": len(parts[name])} | {k: m[k] for k in ("acc",) if k in m}
                for name, m in by_subject.items()}  # fmt: skip
    return out | {"subjects": subjects}


def _metrics(example: Example, scored: list[tuple[float, bool, int]]) -> dict[str, float]:
    """One example's metrics from (log-probability, all arg max, tokens) per alternative."""
    gold = example.gold
    ll_c = np.array([ll for ll, _, _ in scored])
    bytes_c = np.array([max(1, len(text.encode("utf-8"))) for _, text in example.pairs])
    out = {
        "bits_per_byte": -ll_c[gold] / (bytes_c[gold] * math.log(2)),
        "logprob": ll_c[gold],
        "logprob_per_token": ll_c[gold] / max(1, scored[gold][2]),
        "logprob_per_byte": ll_c[gold] / bytes_c[gold],
    }
    if not example.kind:  # of a solution, nobody asks that every token be the likeliest
        right = np.argmax(ll_c) == gold if len(ll_c) > 1 else scored[0][1]
        out = {"acc": float(right), **out}
    if len(ll_c) > 1:
        bits_c = -ll_c / (bytes_c * math.log(2))
        norm_c = np.exp(-bits_c - np.logaddexp.reduce(-bits_c))
        out |= {
            "acc_norm": float(np.argmin(bits_c) == gold),
            "choice_logprob": ll_c[gold] - np.logaddexp.reduce(ll_c),
            "choice_prob_norm": norm_c[gold],
            "choice_logprob_norm": math.log(norm_c[gold] + 1e-30),
        }
    return out


def _joint(context: str) -> tuple[str, str]:
    """(context without white space at its end, what joins it to its continuation): that white space
    (it is scored with the continuation, as lm-eval does), or a space after a context without."""
    bare = context.rstrip()
    return bare, context[len(bare) :] or (" " if context else "")


def ids_of(tok, context: str, continuation: str) -> tuple[np.ndarray, int]:
    """Ids of both together and how many belong to the continuation.

    White space between them goes to the continuation: byte-level BPE keeps a space with the word
    after it.
    """
    bare, gap = _joint(context)
    both = np.asarray(tok.encode(bare + gap + continuation, add_special_tokens=False).ids, np.int32)
    head = np.asarray(tok.encode(bare, add_special_tokens=False).ids, np.int32)
    if not np.array_equal(both[: len(head)], head):  # a merge across the joint: cut it there
        tail = tok.encode(gap + continuation, add_special_tokens=False).ids
        both = np.concatenate([head, np.asarray(tail, np.int32)])
    return both, len(both) - len(head)


def continuations(scorer: Scorer, jobs, batch, bos, desc) -> list[tuple[float, bool, int]]:
    """(log-probability, all arg max, tokens) of the last `n` ids of each job (ids, n).

    As in lm-eval `<|endoftext|>` stands before a continuation without a context, and nowhere else.
    Continuations longer than the model's context are scored in pieces of half of it.
    """
    pieces = [_pieces(*job, scorer.context_length) for job in jobs]
    scored = iter(_scored(scorer, [job for some in pieces for job in some], batch, bos, desc))
    out = []
    for (_, n), some in zip(jobs, pieces, strict=True):
        parts = [next(scored) for _ in some]
        out.append((sum(total for total, _ in parts), all(hit for _, hit in parts), n))
    return out


def _pieces(ids, n: int, longest: int) -> list[tuple[np.ndarray, int]]:
    """The job as jobs of at most `longest` ids to score, each behind all that comes before."""
    if n <= longest:
        return [(ids, n)]
    step = max(1, longest // 2)
    cuts = [*range(len(ids) - n, len(ids), step), len(ids)]
    return [(ids[:end], end - start) for start, end in itertools.pairwise(cuts)]


def _scored(scorer: Scorer, jobs, batch, bos, desc) -> list[tuple[float, bool]]:
    """(log-probability, all arg max) of jobs that each fit into the context.

    Rows are right-padded (a causal model does not see the padding) to a power of two, longest
    first, so that few shapes are compiled and a lack of memory shows at once.
    """
    longest = scorer.context_length
    head = [] if bos is None else [bos]
    streams = [np.array([*head * (n == len(ids)), *ids][-longest - 1 :], np.int32)
               for ids, n in jobs]  # fmt: skip
    buckets = [_bucket(len(stream) - 1, longest) for stream in streams]
    out: list = [None] * len(jobs)
    for window in sorted(set(buckets), reverse=True):
        members = [i for i, bucket in enumerate(buckets) if bucket == window]
        size = batch or batch_size(window, scorer.vocab_size, 64)
        padded = np.zeros((len(members), window + 1), np.int32)
        for row_T, i in zip(padded, members, strict=True):
            row_T[: len(streams[i])] = streams[i]
        parts = [padded[i : i + size] for i in range(0, len(members), size)]
        rows = ((part[:, :-1], part[:, 1:]) for part in parts)
        scored, _ = run_rows(scorer, rows, size, window, len(members), desc)
        for i, (nll_T, hit_T) in zip(members, scored, strict=True):
            n = jobs[i][1]
            end = max(0, len(streams[i]) - 1)
            first = max(0, end - n)
            # without <|endoftext|> nothing predicts the first id of a text: a uniform guess
            uniform = math.log(scorer.vocab_size) if bos is None and n == len(jobs[i][0]) else 0.0
            total = float(nll_T[first:end].sum(dtype=np.float64)) + uniform
            out[i] = (-total, bool(hit_T[first:end].all()))
    return out


def _bucket(n: int, limit: int) -> int:
    """The power of two from 16 on that holds n positions, `limit` at most."""
    return min(limit, max(16, 1 << max(0, n - 1).bit_length()))


# ---- generated answers ---------------------------------------------------------------------------


def _generated(scorer: Scorer, tok, examples: list[Example], batch, desc: str) -> list[dict]:
    """Hard metrics of each example from one greedy answer."""
    if scorer.generate is None:
        raise DelveError(f"{desc}: this model only scores text; a loaded one is needed to write it")
    out = []
    with progress(len(examples), f"{desc} answers", "example") as bar:
        for i in range(0, len(examples), size := batch or 8):
            some = examples[i : i + size]
            for one, text in zip(some, _answers(scorer, tok, some), strict=True):
                out.append(_numbers(one, text) if one.kind == "number" else _code(one, text))
            bar.update(len(some))
    return out


def _answers(scorer: Scorer, tok, examples: Sequence[Example]) -> list[str]:
    """What the model writes after each context, up to the first stop."""
    kind = examples[0].kind
    room = max(1, scorer.context_length - 1)
    new = min(NEW_TOKENS[kind], max(1, scorer.context_length // 2))  # half is the prompt's at least
    prompts = [tok.encode(one.pairs[0][0], add_special_tokens=False).ids for one in examples]
    prompts = [ids[-max(1, room - new) :] for ids in prompts]  # cut from the left, as scores are
    for ids in prompts:
        check_ids(np.asarray(ids), scorer.vocab_size)
    texts = [tok.decode(ids, skip_special_tokens=False) for ids in scorer.generate(prompts, new)]
    return [_before(text, STOPS[kind]) for text in texts]


def _before(text: str, stops: Sequence[str]) -> str:
    return text[: min([len(text), *(i for s in stops if (i := text.find(s)) >= 0)])]


def _number(text: str) -> str:
    """A number as GSM8K compares it: without commas, currency or a full stop; "" where none is."""
    found = re.fullmatch(r"\s*\$?(-?[0-9][0-9,]*(?:\.[0-9]+)?)\.?\s*", text)
    return found[1].replace(",", "") if found else ""


def _numbers(example: Example, text: str) -> dict[str, float]:
    """exact_match reads the number behind ####, exact_match_flexible the last one in the text."""
    strict = re.search(r"#### (\$?-?[0-9.,]+)", text)
    loose = re.findall(r"\$?-?[0-9][0-9.,]*", text)
    return {
        "exact_match": float(bool(strict) and _number(strict[1]) == example.answer),
        "exact_match_flexible": float(bool(loose) and _number(loose[-1]) == example.answer),
    }


def _code(example: Example, text: str) -> dict[str, float]:
    program = f"{example.pairs[0][0]}{text}\n{example.answer}"
    return {"pass_at_1": float(sandbox.passes(program))}
