"""Train the four proxy parents: small, really trained, in Hugging Face layout (delve_jax/proxies/).

Question: do a Mamba, an RWKV-4 and two GPT-NeoX models of 1 to 2M parameters, trained on the train
split of the shared text, behave enough like real parents to test and demonstrate the road on?
Command: python experiments/proxies.py [--tokens N] [--only NAME] [--continue]; run it again to
resume. Work stands in .studies/proxies. Cost and result: experiments/results/proxies.json.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np

from delve_jax import data, evaluate, metrics, models, parents, presets
from delve_jax.config import DelveError
from delve_jax.train import objective, optim
from delve_jax.train.loop import fit

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".studies" / "proxies"
PACKAGE = ROOT / "delve_jax" / "proxies"
VOCAB, CONTEXT = 3840, 256
PROXIES = {name: presets.proxy(name) for name in ("mamba", "rwkv", "neox", "incite")}
BATCH, PEAK_LR, SEED = 16, 3e-3, 0


def prepare():
    """Tokenizer learned on, and token ids of, the train split; kept in .studies/proxies."""
    WORK.mkdir(parents=True, exist_ok=True)
    tok_file, ids_file, meta_file = WORK / "tokenizer.json", WORK / "ids.npy", WORK / "data.json"
    if not meta_file.exists():
        documents = data.split(data.shared_documents(ROOT.parent / "shared/data/text"), "train")
        tok_file.write_text(data.train_bpe(documents, VOCAB))
        tok = data.load_tokenizer(tok_file.read_text(), VOCAB)
        # token order must not be file order: the short runs would see one source only
        order = np.random.default_rng(SEED).permutation(len(documents))
        ids = data.encode_documents(tok, [documents[i] for i in order])
        np.save(ids_file, ids.astype(np.uint16))
        meta_file.write_text(json.dumps({
            "data_hash": data.data_hash(documents), "documents": len(documents),
            "bytes": sum(len(d.encode()) for d in documents), "tokens": len(ids),
        }))  # fmt: skip
    return tok_file.read_text(), np.load(ids_file, mmap_mode="r"), json.loads(meta_file.read_text())


def report_texts():
    """The report split of the shared text."""
    return data.split(data.shared_documents(ROOT.parent / "shared/data/text"), "report")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=3_020_000, help="training tokens per proxy")
    parser.add_argument("--only", choices=PROXIES, help="train this one")
    parser.add_argument("--continue", dest="go_on", action="store_true",
                        help="start from the committed weights instead of random ones")  # fmt: skip
    parser.add_argument("--score", action="store_true",
                        help="only score the committed weights again")  # fmt: skip
    args = parser.parse_args(argv)
    if args.score:
        for name in PROXIES:
            if args.only in (None, name):
                score(name, json.loads((PACKAGE / name / "card.json").read_text()))
        return
    tokenizer_json, ids, meta = prepare()
    windows = data.windows(ids, CONTEXT + 1, CONTEXT)
    for name, cfg in PROXIES.items():
        if args.only not in (None, name):
            continue
        tag = f"{name}-{args.tokens}{'-continued' if args.go_on else ''}"
        if (WORK / tag / "done.json").exists():
            continue
        if args.go_on:
            cfg, params, _ = parents.load(PACKAGE / name, dtype="float32")
        else:
            params = models.init_params(cfg, jax.random.key(SEED))
        steps = args.tokens // (BATCH * CONTEXT)
        began = time.time()
        params = fit(
            params,
            objective.language_model(cfg),
            # another seed when continuing: windows not in the order of the first run
            data.batches(windows, BATCH, SEED + args.go_on),
            optim.adamw(optim.wsd(PEAK_LR, steps, 0.05, 0.3), b2=0.98),
            steps=steps,
            workdir=WORK / tag,
            desc=name,
        )
        publish(name, cfg, params, tokenizer_json, meta, args, time.time() - began, tag)


def publish(name, cfg, params, tokenizer_json, meta, args, seconds, tag):
    """Write the Hugging Face directory and its record, then score what was written."""
    dst = PACKAGE / name
    before = json.loads((dst / "card.json").read_text()) if args.go_on else {"tokens": 0}
    half = jax.tree.map(lambda a: np.asarray(a, np.float16), params)
    if dst.exists():
        shutil.rmtree(dst)
    parents.export_stock(cfg, half, dst, tokenizer_json)
    (dst / "generation_config.json").unlink(missing_ok=True)
    curve = [m for m in metrics.read_metrics(WORK / tag / "metrics.jsonl") if "loss" in m]
    row = {
        "name": name,
        "command": "python experiments/proxies.py " + " ".join(sys.argv[1:]),
        "family": cfg.family,
        "parameters": models.count(cfg),
        "tokens": before["tokens"] + args.tokens // (BATCH * CONTEXT) * BATCH * CONTEXT,
        "seed": SEED,
        "train_data": meta,
        "tokenizer_sha256": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
        "train_seconds": round(seconds),
        "curve": [[m["tokens"], round(m["loss"], 3)] for m in curve[:: max(1, len(curve) // 24)]],
        "versions": metrics.versions(),
    }
    score(name, row)
    (WORK / tag / "done.json").write_text(json.dumps(row))


def score(name, row):
    """Bits per byte on the report split in windows of the training length; card and result row."""
    dst = PACKAGE / name
    cfg, params, tokenizer_json = parents.load(dst, dtype="float32")
    lm = evaluate.Model(cfg, params, data.load_tokenizer(tokenizer_json, VOCAB))
    row["report"] = evaluate.evaluate(lm, report_texts(), window=CONTEXT, stride=CONTEXT * 3 // 4)
    (dst / "card.json").write_text(json.dumps(row, indent=1) + "\n")
    (dst / "README.md").write_text(card(row))
    results = ROOT / "experiments" / "results" / "proxies.json"
    results.parent.mkdir(exist_ok=True)
    rows = json.loads(results.read_text()) if results.exists() else {}
    results.write_text(json.dumps(rows | {name: row}, indent=1, sort_keys=True) + "\n")
    print(name, json.dumps(row["report"]))


def card(row):
    """The model card of one proxy, from its result row."""
    curve = ", ".join(f"{tokens / 1e6:.1f}M: {loss}" for tokens, loss in row["curve"])
    score = row["report"]
    return f"""---
library_name: transformers
license: apache-2.0
tags: [delve-jax, proxy]
---
# {row["name"]}: a proxy parent of delve-jax

A {row["family"]} language model of {row["parameters"]:,} parameters, trained with this project
so that tests, studies and the quickstart have parents that are really trained. Not a model to
use for anything else.

- Data: train split (sha256(document)[0] % 64 < 58) of the shared development text,
  {row["train_data"]["bytes"]:,} bytes, hash `{row["train_data"]["data_hash"][:16]}`; public
  documentation, prose, code and mathematics (see the sources' own licences).
- Tokens: {row["tokens"]:,}, windows of {CONTEXT}, seed {row["seed"]}, byte-level BPE of {VOCAB:,}
  entries learned on the same split.
- Report split: {score["bits_per_byte"]:.4f} bits per byte,
  {score["nll_per_token"]:.4f} nats a token
  ({score["tokens"]:,} tokens, {score["bytes"]:,} bytes).
- Training loss by tokens: {curve}.
- Command: `{row["command"].strip()}` ({row["train_seconds"]} s on 2 shared CPU cores).
"""


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
