"""Measure the upcycle bars on the trained proxies: exactness at step 0, keep 1.0, pool, export.

Command: make quickstart, then python experiments/bars.py (reads out/quickstart; needs torch)
Result: experiments/results/bars.json. Bars: step 0 <= 1e-5 (J = K), 2e-5 (J = 1) in log p, in
bfloat16 a mean KL <= 1e-4 and the same most likely token on 99.5 % of the text; keep 1.0
<= 1e-4 of max |logit|; pool <= best parent on the fitted text, + 0.002 nats on the report split;
exported logits <= 1e-4, 64 greedy tokens equal with cache and without and to JAX's.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import torch

import delve_jax
from delve_jax import compress, data, fuse, metrics, models, parents, road, upcycle
from delve_jax.lm import LM

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "quickstart"
jax.config.update("jax_default_matmul_precision", "highest")


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def step_zero(parts, windows, latents) -> dict:
    """DELVE against the pool computed in float64 from its parents' own logits."""
    cfg, params, report = fuse.fuse(parts, windows, latents=latents, connectors="hub")
    tokens = windows[:4]
    own = [log_softmax(LM(c, p).logits(tokens)) for _, c, p in parts]
    w = np.asarray(report["weights"], np.float64)
    if latents == 1:
        want = log_softmax(sum(a * x for a, x in zip(w, own, strict=True)))
    else:
        w = np.maximum(w, 1e-6) / np.maximum(w, 1e-6).sum()
        want = np.logaddexp.reduce([np.log(a) + x for a, x in zip(w, own, strict=True)])
    got = log_softmax(LM(cfg, params).logits(tokens))
    return {
        "max_abs_dlogp": float(np.abs(got - want).max()),
        "nll_fit": report["nll"],
        "nll_fit_best_parent": min(report["nll_parents"]),
    }


def step_zero_bf16(parts, windows) -> dict:
    """DELVE (J = 1) computed in bfloat16 against the float64 pool of its parents' logits, these
    computed in bfloat16 too (what joining adds) and in float32 (what bfloat16 costs)."""
    cfg, params, report = fuse.fuse(parts, windows, connectors="hub")
    tokens = windows[:32]

    def logits(cfg, params, dtype):
        run = functools.partial(models.forward, cfg, how=models.Compute(dtype))
        return np.asarray(jax.jit(lambda p, t: run(p, t)[0])(params, tokens), np.float64)

    got, out = log_softmax(logits(cfg, params, "bfloat16")), {}
    for dtype in ("bfloat16", "float32"):
        own = [log_softmax(logits(c, p, dtype)) for _, c, p in parts]
        want = log_softmax(sum(a * x for a, x in zip(report["weights"], own, strict=True)))
        kl = (np.exp(want) * (want - got)).sum(-1)
        out[f"pool in {dtype}"] = {"mean_kl": float(kl.mean()), "same_top_1": float(
            (want.argmax(-1) == got.argmax(-1)).mean())}  # fmt: skip
    return out | {"tokens": int(tokens.size)}


def keep_one() -> dict:
    """compress --keep 1.0 against the parent: max |difference| over max |logit|."""
    out = {}
    tokens = np.random.default_rng(0).integers(0, 3840, (2, 64))
    for src in upcycle.embedded_parents():
        cfg, params, _ = parents.load(src, dtype="float32")
        dense = np.asarray(LM(cfg, params).logits(tokens))
        kept = compress.compress(cfg, params, tokens, keep=1.0, progress=False)[:2]
        out[Path(src).name] = float(np.abs(LM(*kept).logits(tokens) - dense).max()
                                    / np.abs(dense).max())  # fmt: skip
    return out


def export(prompts) -> dict:
    """The exported directory in transformers against JAX: logits, and 64 greedy tokens."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    lm = delve_jax.load(OUT / "checkpoint")
    hf = AutoModelForCausalLM.from_pretrained(OUT / "hf", trust_remote_code=True).eval()
    tokens = np.stack([p[:40] for p in prompts])
    with torch.no_grad():
        theirs = hf(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(lm.logits(tokens))
    out = {"max_abs_diff": float(np.abs(ours - theirs).max()),
           "max_abs_logit": float(np.abs(ours).max()), "greedy": {}}  # fmt: skip
    for batch in (1, 3):
        # rows of unequal length, padded on the left
        lengths = [40, 25, 33][:batch]
        ids, mask = np.zeros((2, batch, max(lengths)), np.int64)
        for row, n in enumerate(lengths):
            ids[row, -n:], mask[row, -n:] = prompts[row][:n], 1
        jax_ids = np.asarray(lm.generate(ids, 64, mask_BT=mask))
        kw = dict(attention_mask=torch.tensor(mask), max_new_tokens=64, min_new_tokens=64,
                  do_sample=False, pad_token_id=0)  # fmt: skip
        torch_ids = [
            hf.generate(torch.tensor(ids), use_cache=c, **kw).numpy() for c in (True, False)
        ]
        out["greedy"][f"batch {batch}"] = {
            "cached = uncached": bool((torch_ids[0] == torch_ids[1]).all()),
            "torch = jax": bool((torch_ids[0] == jax_ids).all()),
        }
    return out


def main() -> int:
    names = sorted(p.name for p in (OUT / "parents").iterdir())
    loaded = {n: parents.load(OUT / "parents" / n, dtype="float32") for n in names}
    parts = [(n, cfg, params) for n, (cfg, params, _) in loaded.items()]
    cfg, _, tok = loaded[names[0]]
    documents = data.stdlib_documents()
    windows = road.calibration_windows(cfg, tok, data.split(documents, "calibrate"), 16384)
    tokenizer = data.load_tokenizer(tok, cfg.vocab_size)
    report = json.loads((OUT / "report.json").read_text())
    rows = {r["name"]: r["nll_per_token"] for r in report["rows"]}
    held_back = data.encode_documents(tokenizer, data.split(documents, "report"))
    prompts = [held_back[i * 500 : i * 500 + 40] for i in range(3)]
    result = {
        "command": "python experiments/bars.py",
        "versions": metrics.versions() | {"torch": torch.__version__},
        "data_hash": report["data_hash"],
        "seeds": report["seeds"],
        "step 0, J=1": step_zero(parts, windows, 1),
        "step 0, J=K": step_zero(parts, windows, len(parts)),
        "step 0, bfloat16": step_zero_bf16(parts, windows),
        "keep 1.0, max|dlogit|/max|logit|": keep_one(),
        "report split, nats per token": {
            "pool at step 0": rows["DELVE at step 0"],
            "best compressed parent": min(rows[f"{n} compressed"] for n in names),
            "healed": rows["DELVE healed"],
        },
        "export": export(prompts),
    }
    path = ROOT / "experiments" / "results" / "bars.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
