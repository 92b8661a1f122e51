"""Does tokenising to a token folder keep up with the bare library, and batches with a step?

python experiments/benchmarks/data.py [--megabytes 100] [--out experiments/results/data.json]
2 CPU cores (load 3 to 4), 100 MB in four pieces, 1.6 minutes: `prepare` runs at 1.38 (pieces 1.31
to 1.73) of the rate of `encode_batch`, as it asks for ids without offsets; a batch of 8 x 513 ids
takes 0.3 ms on average, 0.4 with grain's threads.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import grain
import numpy as np
import tokenizers

from delve_jax import data
from delve_jax.metrics import versions

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
TOKENIZER = SHARED / "tokenizer/20B_tokenizer.json"
PIECES = 4  # the two ways take turns on pieces of the text, so that a busy machine slows both
WEIGHTS = (0.5, 0.3, 0.2)


def pieces_of(megabytes):
    """PIECES lists of documents, about `megabytes` in all, each with documents of every file."""
    documents = data.shared_documents(SHARED / "text")
    documents = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]
    pieces, size = [[]], 0
    for document in documents:
        pieces[-1].append(document)
        size += len(document.encode())
        if size >= len(pieces) * megabytes * 1e6 / PIECES:
            if len(pieces) == PIECES:
                break
            pieces.append([])
    return pieces


def tokenise(pieces, place):
    """A row for each piece: MB/s of `encode_batch` alone and of `prepare`, text file to folder."""
    tok = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    tok.encode_batch(pieces[0][:8])  # start the threads
    rows = []
    for k, piece in enumerate(pieces):
        path = place / f"{k}.txt"
        path.write_bytes("\n<|endoftext|>\n".join(piece).encode())
        seconds, tokens = {}, {}
        for way in ("library", "prepare") if k % 2 else ("prepare", "library"):
            start = time.perf_counter()
            if way == "library":
                encoded = tok.encode_batch(piece, add_special_tokens=False)
                seconds[way] = time.perf_counter() - start
                tokens[way] = sum(map(len, encoded)) + len(piece)
                del encoded
            else:
                made = data.prepare([path], place / f"tokens{k}", tokenizer=TOKENIZER)
                seconds[way] = time.perf_counter() - start
                tokens[way] = made["tokens"]
        assert tokens["library"] == tokens["prepare"]
        megabytes = made["bytes"] / 1e6
        rows.append({
            "megabytes": round(megabytes, 1), "documents": len(piece), "tokens": tokens["prepare"],
            "library_mb_s": megabytes / seconds["library"],
            "prepare_mb_s": megabytes / seconds["prepare"],
            "ratio": seconds["library"] / seconds["prepare"],
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def batch_times(place, steps):
    """Milliseconds a batch of a mixture of three folders, B = 8, T = 512: mean and 99th percentile.

    direct: ds[step] in the calling thread. prefetch: from grain's threads, as fast as they give.
    """
    parts = [
        (str(k), data.open_tokens(place / f"tokens{k}").windows(513), weight)
        for k, weight in enumerate(WEIGHTS)
    ]
    ds = data.mixture(parts, batch=8, seed=0)
    ahead = iter(ds.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)))
    out = {}
    for way, batch in (("direct", ds.__getitem__), ("prefetch", lambda _: next(ahead))):
        seen = []
        for step in range(steps):
            start = time.perf_counter()
            batch(step)
            seen.append(1e3 * (time.perf_counter() - start))
        seen = seen[20:]
        out[way] = {"mean_ms": statistics.fmean(seen), "p99_ms": float(np.percentile(seen, 99))}
    return {"batch": 8, "window": 513, "weights": WEIGHTS, "steps": steps, **out}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--steps", type=int, default=3000, help="batches timed each way")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/data.json"))
    flags = parser.parse_args()
    load, start = os.getloadavg()[0], time.time()
    with tempfile.TemporaryDirectory() as place:
        pieces = pieces_of(flags.megabytes)
        rows = tokenise(pieces, Path(place))
        pipeline = batch_times(Path(place), flags.steps)
    result = {
        "command": "python " + " ".join(sys.argv),
        "versions": versions() | {"tokenizers": tokenizers.__version__},
        "machine": {"cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()[0]},
        "minutes": round((time.time() - start) / 60, 1),
        "data_hash": data.data_hash(document for piece in pieces for document in piece),
        "ratio": statistics.median(row["ratio"] for row in rows),
        "tokenise": rows,
        "pipeline": pipeline,
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(pipeline))
    print(f"{flags.out}: {result['ratio']:.2f} of the library's rate, {result['minutes']} minutes")


if __name__ == "__main__":
    main()
