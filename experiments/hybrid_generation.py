"""Does a DELVE generate what it scores, and does its attention-free subset need constant memory?

Command: python experiments/hybrid_generation.py [SRC]   (default out/quickstart/checkpoint)
1. 256 greedy tokens, batches of 1, 2, 4 and 8 prompts of unequal lengths padded on the left: every
   token is the argmax of the uncached model on the same text, each row read alone and unpadded
   (where the two best logits are within 1e-4 of each other either may stand).
2. The streams {mamba, rwkv} read up to 32,768 tokens in chunks of 512: bytes of the state and the
   process at 1k to 32k tokens; beside them the state of the whole model, which grows.
Result: experiments/results/hybrid_generation.json. Cost: minutes.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

import delve_jax
from delve_jax import data, metrics, models
from delve_jax.config import DelveError

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "experiments" / "results" / "hybrid_generation.json"
NEW, CHUNK, LENGTHS, TIE = 256, 512, (1024, 4096, 16_384, 32_768), 1e-4


def rss():
    """Resident bytes of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def greedy(lm, prompts):
    """Tokens of a padded batch that the uncached model, row by row, would not have chosen."""
    longest = max(map(len, prompts))
    ids = np.stack([np.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = np.stack([np.arange(longest) >= longest - len(p) for p in prompts])
    out = np.asarray(lm.generate(ids, NEW, mask))
    wrong = ties = 0
    for row, prompt in zip(out, prompts, strict=True):
        text = np.concatenate([prompt, row[longest:]])
        logits = np.asarray(lm.logits(text[None, :-1]))[0, len(prompt) - 1 :]
        best = logits.max(-1)
        chosen = logits[np.arange(NEW), text[len(prompt) :]]
        wrong += int((best - chosen > TIE).sum())
        ties += int(((best - chosen > 0) & (best - chosen <= TIE)).sum())
    return {"batch": len(prompts), "lengths": [len(p) for p in prompts], "tokens": NEW * len(out),
            "differ": wrong, "ties_turned": ties}  # fmt: skip


def size(state):
    return int(sum(a.nbytes for a in jax.tree.leaves(state)))


def memory(src, ids):
    """State and process while the attention-free subset reads on and on."""
    lm = delve_jax.load(src, streams=("mamba", "rwkv"))
    whole = delve_jax.load(src).config
    state, rows = lm.init_state(1, CHUNK), []
    for at in range(0, max(LENGTHS), CHUNK):
        logits, state = lm.step(ids[None, at : at + CHUNK], state)
        if not np.isfinite(np.asarray(logits)).all():
            raise RuntimeError(f"not finite after {at} tokens")
        if at + CHUNK in LENGTHS:
            all_streams = jax.eval_shape(lambda n=at + CHUNK: models.init_state(whole, 1, n))
            rows.append({
                "tokens": at + CHUNK, "state_bytes": size(state), "rss": rss(),
                "state_bytes_all_streams": int(sum(
                    np.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(all_streams))),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main():
    src = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "out" / "quickstart" / "checkpoint")
    lm = delve_jax.load(src)
    documents = data.split(data.stdlib_documents(), "report")
    ids = data.encode_documents(lm.tokenizer, documents)[: max(LENGTHS)]
    rng, rows = np.random.default_rng(0), []
    for batch in (1, 2, 4, 8):
        lengths = rng.integers(3, 90, batch)
        starts = rng.integers(0, len(ids) - 100, batch)
        rows.append(greedy(lm, [ids[s : s + n] for s, n in zip(starts, lengths, strict=True)]))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": "python experiments/hybrid_generation.py", "source": src.name, "seeds": [0],
        "versions": metrics.versions(), "data_hash": data.data_hash(documents),
        "new_tokens": NEW, "greedy": rows, "memory": memory(src, ids),
    }  # fmt: skip
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
