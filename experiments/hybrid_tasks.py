"""What do the hybrid, its parents and its rivals know: BLiMP, LAMBADA, bits per byte by source?

Command: python experiments/hybrid_tasks.py [--only MODEL ...] [--seeds N ...]; repeat it to go on.
Models: the dense proxies, and of hybrid_curve.py at N = 1.25 x the largest parent the DELVE, the
ensemble of equally healed parents and those parents alone. 22 BLiMP paradigms (the first 200 pairs
of each), LAMBADA (the first 500 lines: accuracy is of all the last word's tokens, so that models
this small stand near 0; nats a token move earlier). Chance-corrected: (accuracy - 1/2) / (1/2).
Bits per byte: report text of every source (prose, code, mathematics; all English but for names),
48 windows at most. Cost: 1 to 4 minutes of a core a model and seed once hybrid_curve.py has run.
Result: experiments/results/hybrid_tasks.json and README.md.
"""

import math
import sys

import hybrid
import hybrid_curve
import numpy as np
from hybrid_diversity import sources

from delve_jax import evaluate, models, tasks
from delve_jax.config import DelveError

N = int(1.25 * hybrid.LARGEST)
EVAL = hybrid.ROOT.parent / "shared" / "data" / "eval"
PAIRS, LINES = 200, 500

MODELS = {
    **{f"dense {n}": (lambda seed, n=n: hybrid.dense(n)[:2]) for n in hybrid.NAMES},
    **{f"part {n}": (lambda seed, n=n: hybrid_curve.part(N, seed, n)) for n in hybrid.NAMES},
    "ensemble": lambda seed: hybrid_curve.ensemble(N, seed),
    "delve": lambda seed: hybrid_curve.delve(N, seed),
}


def bits(scorer):
    """Bits per byte of every source, each window's bytes being those of its targets."""
    out = {}
    for name, rows in sources().items():
        nats = size = 0
        for i in range(0, len(rows), hybrid.BATCH):
            part = rows[i : i + hybrid.BATCH]
            nats += float(np.asarray(scorer.score(part[:, :-1], part[:, 1:])[0], np.float64).sum())
        for row in rows:
            text = hybrid.tokenizer().decode(row[1:].tolist(), skip_special_tokens=False)
            size += len(text.encode())
        out[name] = nats / size / math.log(2)
    return out


def make(cfg, params):
    """The fields of a row."""
    model = evaluate.Model(cfg, params, tokenizer=hybrid.tokenizer())
    scorer = evaluate.as_scorer(model)
    pairs = {
        file.stem: tasks.evaluate_task(scorer, file, PAIRS)["acc"]
        for file in sorted((EVAL / "blimp").glob("*.jsonl"))
    }
    acc = float(np.mean(list(pairs.values())))
    cloze = tasks.evaluate_task(scorer, EVAL / "lambada_openai.jsonl", LINES)
    return {
        "parameters": models.count(cfg), "blimp": acc, "blimp_corrected": 2 * acc - 1,
        "lambada": cloze["acc"], "lambada_nats_per_token": -cloze["logprob_per_token"],
        "bits_per_byte": bits(scorer), "blimp_each": pairs,
    }  # fmt: skip


def main():
    args = hybrid.flags(__doc__, MODELS, "MODEL").parse_args()
    results = hybrid.Results("hybrid_tasks", "python experiments/hybrid_tasks.py",
                             parameters=N, pairs=PAIRS, lambada_lines=LINES)  # fmt: skip
    jobs = [(n, s) for n in args.only for s in ([0] if n.startswith("dense") else args.seeds)]
    with hybrid.metrics.progress(len(jobs), "tasks", "model") as bar:
        for name, seed in jobs:
            results.row(name, seed, lambda n=name, s=seed: make(*MODELS[n](s)))
            bar.update(1)


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
