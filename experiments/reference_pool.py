"""A pool of other people's models for the step from soft to hard metrics, scored by our own code.

Command: python experiments/reference_pool.py --tasks mmlu.jsonl gsm8k.jsonl --shots 5 --out DIR
    [--models SRC ...] [--limit N] [--soft choice_logprob] [--hard acc]
Models: hub ids or directories, by default the pool of Delphi's forecast (design notes, delphi.md
section 8); each is loaded once by transformers (`delve eval --backend hf`). DIR/MODEL.json holds
all metrics of a model; DIR/TASK.csv (model, soft, hard) is what `delve delphi downstream --pool`
takes. Models that stand there are not run again (with other tasks or settings: an error), one that
cannot be had is named and left out.
Cost: the default pool in float32 wants 60 GB of memory and a GPU; not run here, where there is no
hub (tests/test_tasks.py runs it on small local models). Soft metrics of a task are chosen by what
it is: choice_logprob and acc for choices, bits_per_byte and exact_match or pass_at_1 for answers.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from delve_jax import evaluate, metrics, tasks
from delve_jax.config import DelveError, read_json

POOL = (
    "Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-4B-Base", "Qwen/Qwen3-8B-Base",
    "Qwen/Qwen3-14B-Base", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B",
    "allenai/OLMo-2-1124-7B", "allenai/OLMo-2-1124-13B", "marin-community/marin-8b-base",
)  # fmt: skip
PAIRS = (("choice_logprob", "acc"), ("bits_per_byte", "exact_match"),
         ("bits_per_byte", "pass_at_1"), ("bits_per_byte", "acc"))  # fmt: skip


def settings(args):
    """How every task is asked: what all models of a folder must have in common."""
    return {"limit": args.limit, "shots": args.shots, "run_code": args.run_code, "mmlu": args.mmlu}


def stands(file, args):
    """Whether a model was scored already; DelveError where it was scored otherwise."""
    if not file.exists():
        return False
    found, how = read_json(file), settings(args)
    same = {k: found[k] for k in how} == how
    if not same or {*found["tasks"]} != {Path(t).stem for t in args.tasks}:
        raise DelveError(f"{file}: scored with other tasks or settings; name another --out")
    return True


def scored(src, args):
    """All metrics of one model on every task."""
    model = evaluate.hf_scorer(src, args.trust_remote_code)
    how = settings(args)
    return {
        "model": src, "parameters": model.parameters, "versions": metrics.versions(), **how,
        "tasks": {Path(t).stem: tasks.evaluate_task(model, t, **how) for t in args.tasks},
    }  # fmt: skip


def write(out, soft, hard):
    """One CSV a task of all models that are there; returns the files."""
    models = [read_json(file) for file in sorted(out.glob("*.json"))]
    files = []
    for task in sorted({name for m in models for name in m["tasks"]}):
        found = [(m["model"], m["tasks"][task]) for m in models if task in m["tasks"]]
        pair = (soft, hard) if soft else next((p for p in PAIRS if {*p} <= {*found[0][1]}), None)
        if pair is None or not {*pair} <= {*found[0][1]}:
            names = ", ".join(k for k, v in found[0][1].items() if isinstance(v, float))
            raise DelveError(f"task {task}: name --soft and --hard among {names}")
        file = out / f"{task}.csv"
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("model", "soft", "hard"))
            writer.writerows((name, row[pair[0]], row[pair[1]]) for name, row in found)
        files.append(file)
    return files


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", required=True, metavar="FILE.jsonl")
    parser.add_argument("--models", nargs="+", default=POOL, metavar="SRC")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--mmlu", default="label", choices=tasks.MMLU)
    parser.add_argument("--soft"), parser.add_argument("--hard")
    parser.add_argument("--run-code", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args(argv)
    if bool(args.soft) != bool(args.hard):
        raise DelveError("--soft and --hard: name both or neither")
    for file in args.tasks:
        tasks.read_task(file)  # a damaged file is named before the first model is loaded
    args.out.mkdir(parents=True, exist_ok=True)
    with metrics.progress(len(args.models), "models", "model") as bar:
        for src in map(str, args.models):
            file = args.out / (src.strip("/").replace("/", "--") + ".json")
            bar.set_postfix_str(src)
            if not stands(file, args):
                try:
                    row = scored(src, args)
                except DelveError as err:
                    print(f"left out: {err}", file=sys.stderr)
                    continue
                file.with_suffix(".writing").write_text(json.dumps(row, indent=1) + "\n")
                file.with_suffix(".writing").replace(file)
            bar.update(1)
    for file in write(args.out, args.soft, args.hard):
        print(file)


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
