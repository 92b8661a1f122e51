"""Do lm-eval and `delve eval` give the same numbers, on a checkpoint and on its export?

Command: python experiments/harness.py [CHECKPOINT EXPORT] [--limit N]   (needs lm_eval and torch;
default: what `make quickstart` leaves). piqa, arc_easy, LAMBADA and three BLiMP paradigms from
../shared/data/eval as local yaml tasks, offline. Three ways: `delve eval --tasks` on the
checkpoint, lm-eval's `hf` model on the exported directory, lm-eval with `delve_jax.harness` on the
checkpoint. Bar: every metric within 1e-3. Result: experiments/results/harness.json: equal on the
first 200 lines of each (5 minutes of a core). tests/test_ecosystem.py runs `compare` on small sets.
"""

import argparse
import importlib.metadata
import json
import math
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval
from lm_eval.tasks import TaskManager

from delve_jax import look, metrics
from delve_jax.harness import DelveLM

ROOT = Path(__file__).resolve().parents[1]
EVAL = ROOT.parent / "shared" / "data" / "eval"
OUT = ROOT / "experiments" / "results" / "harness.json"
BAR = 1e-3
FILES = {
    "piqa": "piqa.jsonl",
    "arc_easy": "arc_easy.jsonl",
    "lambada_openai": "lambada_openai.jsonl",
    **{f"blimp_{n}": f"blimp/{n}.jsonl"
       for n in ("adjunct_island", "anaphor_number_agreement", "animate_subject_passive")},
}  # fmt: skip
# ours -> lm-eval's name; per byte is acc_bytes there, acc_norm is per character
CHOICES = {"acc": "acc", "acc_norm": "acc_bytes"}
CLOZE = {"acc": "acc", "logprob": "perplexity"}


def task_yaml(name, file):
    """A local task of lm-eval for one of our jsonl files, as YAML."""
    kind = "cloze" if "lambada" in name else "blimp" if "blimp" in name else "choices"
    with file.open() as lines:
        row = json.loads(lines.readline())
    # a space joins a context to its answer, unless the context ends in white space of its own;
    # lm-eval adds it to choices, but not to a cloze's answer
    context = row.get("query", row.get("context", ""))
    gap = " " if context and not context[-1].isspace() else ""
    fields = {
        "choices": ("multiple_choice", '"{{query}}"', '"{{gold}}"', '"{{choices}}"'),
        "blimp": ("multiple_choice", '""', "0", '"{{[sentence_good, sentence_bad]}}"'),
        "cloze": ("loglikelihood", '"{{context}}"', f'"{gap}{{{{continuation}}}}"', None),
    }[kind]
    wanted = CLOZE if kind == "cloze" else CHOICES
    lines = [
        f"task: {name}_local", "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(file))}}}}}", "test_split: test",
        f"output_type: {fields[0]}", f"doc_to_text: {fields[1]}", f"doc_to_target: {fields[2]}",
        *([f"doc_to_choice: {fields[3]}"] if fields[3] else []),
        f"target_delimiter: {json.dumps(gap)}", "num_fewshot: 0", "metric_list:",
    ]  # fmt: skip
    for metric in wanted.values():
        aggregation = "perplexity" if metric == "perplexity" else "mean"
        lines += [f"  - metric: {metric}", f"    aggregation: {aggregation}"]
    return "\n".join(lines) + "\n"


def by_lm_eval(model, args, names, folder, limit):
    """{task: {metric: value}} in lm-eval's names."""
    found = lm_eval.simple_evaluate(
        model=model, model_args=args, tasks=[f"{n}_local" for n in names], limit=limit,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0, verbosity="ERROR",
    )  # fmt: skip
    return {n: {k.partition(",")[0]: v for k, v in found["results"][f"{n}_local"].items()}
            for n in names}  # fmt: skip


def compare(checkpoint, export, files, limit=None):
    """Rows {task, metric, delve, export, adapter, apart}: the same number three times."""
    ours = look.evaluate(str(checkpoint), tasks=[str(f) for f in files.values()], limit=limit)
    ours = {n: ours["tasks"][f.stem] for n, f in files.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, file in files.items():
            (Path(folder) / f"{name}.yaml").write_text(task_yaml(name, file))
        args = f"pretrained={export},trust_remote_code=True,dtype=float32,device=cpu"
        theirs = by_lm_eval("hf", args, files, folder, limit)
        adapter = by_lm_eval(DelveLM(str(checkpoint)), None, files, folder, limit)
    rows = []
    for name in files:
        for mine, other in (CLOZE if "lambada" in name else CHOICES).items():
            value = ours[name][mine]
            if other == "perplexity":  # nats of the mean, which is what is compared
                theirs[name][other], adapter[name][other] = (
                    -math.log(x[name][other]) for x in (theirs, adapter)
                )
            three = {"delve": value, "export": theirs[name][other], "adapter": adapter[name][other]}
            rows.append({"task": name, "metric": mine, "examples": ours[name]["examples"], **three,
                         "apart": max(three.values()) - min(three.values())})  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made = ROOT / "out" / "quickstart"
    parser.add_argument("checkpoint", nargs="?", type=Path, default=made / "checkpoint")
    parser.add_argument("export", nargs="?", type=Path, default=made / "hf")
    parser.add_argument("--limit", type=int, help="examples of each task (all)")
    args = parser.parse_args()
    rows = compare(args.checkpoint, args.export, {n: EVAL / f for n, f in FILES.items()},
                   args.limit)  # fmt: skip
    for r in rows:
        print(f"{r['task']:28}{r['metric']:10}{r['delve']:10.5f}{r['export']:10.5f}"
              f"{r['adapter']:10.5f}  apart {r['apart']:.1e}")  # fmt: skip
    result = {
        "command": "python experiments/harness.py" + (f" --limit {args.limit}" * bool(args.limit)),
        "seeds": [], "bar": BAR, "met": all(r["apart"] <= BAR for r in rows),
        "versions": metrics.versions() | {"lm_eval": importlib.metadata.version("lm_eval")},
        "rows": rows,
    }  # fmt: skip
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
