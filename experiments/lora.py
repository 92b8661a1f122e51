"""Fine-tuning an exported DELVE with PEFT: adapters on the factors, or beside them?

Command: python experiments/lora.py [EXPORT] [--seeds N ...]; repeat it to go on. (needs peft)
The quickstart's export (healed on Python code) is tuned to film reviews: 120 steps of 4 windows of
128 tokens from the train split. `factors`: LoRA on the inner maps u and v of every factored linear
(target_modules=["u", "v"]); `beside`: on the whole map, y = u(v(x)) + B A x, at about the same
number of trained parameters; `all`: every weight, for scale. Learning rates are chosen per way on
the choose split at seed 0, from the same three; results are of the report split, 3 seeds.
Result: experiments/results/lora.json and docs/results.md. Cost: 75 minutes of a core.
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from delve_jax import data, metrics

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT.parent / "shared" / "data" / "text" / "nltk_movie_reviews.txt.xz"
OUT = ROOT / "experiments" / "results" / "lora.json"
RATES = {"factors": (1e-3, 3e-3, 1e-2), "beside": (1e-3, 3e-3, 1e-2), "all": (1e-4, 3e-4, 1e-3)}
RANKS, WINDOW, BATCH, STEPS, SCORED, SEEDS = (2, 8), 128, 4, 120, 64, (0, 1, 2)
torch.set_num_threads(1)


class Beside(nn.Module):
    """A factored map with a low-rank adapter of the whole map beside it."""

    def __init__(self, inner, rank):
        super().__init__()
        self.inner = inner
        self.a = nn.Linear(inner.v.in_features, rank, bias=False)
        self.b = nn.Linear(rank, inner.u.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.inner(x) + self.b(self.a(x))


def factored(model):
    """(parent module, name, map) of every factored linear."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LowRank":
                yield module, name, child


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def adapted(export, way, rank, seed):
    """The model in which only what is tuned has gradients."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    if way == "all":
        return model
    if way == "factors":
        return peft.get_peft_model(model, peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["u", "v"],
        ))  # fmt: skip
    for p in model.parameters():
        p.requires_grad_(False)
    maps = list(factored(model))
    wanted = sum(rank * (m.v.in_features + 2 * m.v.out_features + m.u.out_features)
                 for _, _, m in maps)  # fmt: skip
    own = max(1, round(wanted / sum(m.v.in_features + m.u.out_features for _, _, m in maps)))
    for module, name, child in maps:
        setattr(module, name, Beside(child, own))
    return model


def windows(tokenizer, split):
    documents = data.split(data.read_documents(TEXT), split)
    ids = []
    for document in documents[: 400 if split == "train" else 60]:
        ids += [tokenizer.eos_token_id, *tokenizer(document)["input_ids"]]
    n = len(ids) // (WINDOW + 1)
    rows = np.array(ids[: n * (WINDOW + 1)]).reshape(n, WINDOW + 1)
    return torch.from_numpy(rows), data.data_hash(documents)


@torch.no_grad()
def score(model, rows):
    """Mean nats a token."""
    model.eval()
    total = [model(input_ids=r, labels=r).loss.item() for r in rows[:SCORED].split(8)]
    return float(np.mean(total))


def tune(export, way, rank, rate, seed, train, held_back):
    """One run -> its row."""
    began, model = time.perf_counter(), adapted(export, way, rank, seed)
    optimizer = torch.optim.AdamW(trained(model), rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    order = np.random.default_rng(seed).permutation(len(train))[: STEPS * BATCH]
    model.train()
    for i in range(0, len(order), BATCH):
        rows = train[order[i : i + BATCH]]
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(model), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    nats = score(model, held_back)
    return {"way": way, "rank": rank, "rate": rate, "seed": seed,
            "trained_parameters": sum(p.numel() for p in trained(model)), "nats": nats,
            "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("export", nargs="?", type=Path, default=ROOT / "out/quickstart/hf")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.export, trust_remote_code=True)
    sets = {s: windows(tokenizer, s) for s in ("train", "choose", "report")}
    model = AutoModelForCausalLM.from_pretrained(args.export, trust_remote_code=True)
    weights = hashlib.sha256((args.export / "model.safetensors").read_bytes()).hexdigest()[:16]
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    rows = known["rows"] if known.get("weights") == weights else []
    facts = {
        "command": "python experiments/lora.py", "seeds": SEEDS, "weights": weights,
        "steps": STEPS, "batch": BATCH, "window": WINDOW, "scored": SCORED * WINDOW,
        "versions": metrics.versions() | {"peft": peft.__version__, "torch": torch.__version__},
        "data_hash": {s: h for s, (_, h) in sets.items()},
        "untuned": {s: score(model, sets[s][0]) for s in ("choose", "report")},
    }  # fmt: skip

    def row(split, way, rank, rate, seed):
        key = (split, way, rank, rate, seed)
        for old in rows:
            if tuple(old[k] for k in ("split", "way", "rank", "rate", "seed")) == key:
                return old
        new = {"split": split, **tune(args.export, way, rank, rate, seed, sets["train"][0],
                                      sets[split][0])}  # fmt: skip
        rows.append(new)
        print(json.dumps(new), flush=True)
        OUT.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
        return new

    ways = [("all", 0), *((w, r) for r in RANKS for w in ("factors", "beside"))]
    with metrics.progress(len(ways) * (3 + len(args.seeds)), "lora", "run") as bar:
        summary = []
        for way, rank in ways:
            tried = []
            for rate in RATES[way]:
                tried.append(row("choose", way, rank, rate, 0))
                bar.update(1)
            best = min(tried, key=lambda r: r["nats"])["rate"]
            found = []
            for seed in args.seeds:
                found.append(row("report", way, rank, best, seed))
                bar.update(1)
            nats = [r["nats"] for r in found]
            summary.append({"way": way, "rank": rank, "rate": best, "mean": statistics.mean(nats),
                            "std": statistics.stdev(nats) if len(nats) > 1 else 0.0,
                            "trained_parameters": found[0]["trained_parameters"]})  # fmt: skip
    OUT.write_text(json.dumps(facts | {"summary": summary, "rows": rows}, indent=1) + "\n")
    for s in summary:
        print(f"{s['way']:8} rank {s['rank']} {s['trained_parameters']:9,} trained, rate "
              f"{s['rate']:g}: {s['mean']:.4f} +- {s['std']:.4f}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
