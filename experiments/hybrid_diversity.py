"""E0: do the dense parents know different things? If not, nothing that joins them can help.

Command: python experiments/hybrid_diversity.py   (minutes; no training)
Four dense proxies on the report split: KL between each pair, correlation of their per-token losses,
and pools of them (even, fitted log-linear, fitted mixture), overall and by source of the text.
Weights are fitted on 32,768 calibration tokens of the same source mix, so the pool can lose.
Result: experiments/results/hybrid_diversity.json and docs/results.md.
"""

import json
import sys

import hybrid
import jax
import jax.numpy as jnp
import numpy as np

from delve_jax import data, fuse, models
from delve_jax.config import DelveError

ROWS = 48  # windows of a source at most
OUT = hybrid.RESULTS / "hybrid_diversity.json"


def sources():
    """{file stem: windows of its report documents [n, WINDOW + 1]}."""
    out = {}
    for file in sorted(hybrid.TEXT.glob("*.txt.xz")):
        documents = data.split(data.read_documents(file), "report")
        if not documents:
            continue
        ids = data.encode_documents(hybrid.tokenizer(), documents)
        if len(ids) > hybrid.WINDOW:
            rows = data.windows(ids, hybrid.WINDOW + 1)
            order = np.random.default_rng(0).permutation(len(rows))[:ROWS]
            out[file.name.removesuffix(".txt.xz")] = rows[np.sort(order)]
    return out


@jax.jit
def compared(params, pools, rows_BT):
    """Per-token losses [P, B, T] of parents and pools, and KL(p || q) [K, K] summed over tokens."""
    log_p = jnp.stack([
        jax.nn.log_softmax(models.forward(hybrid.dense(n)[0], p, rows_BT[:, :-1])[0])
        for n, p in zip(hybrid.NAMES, params, strict=True)
    ])  # fmt: skip
    kl = jnp.einsum("kbtv,kbtv->k", jnp.exp(log_p), log_p)[:, None]
    kl = kl - jnp.einsum("kbtv,jbtv->kj", jnp.exp(log_p), log_p)
    a_K, even_K, log_w = pools
    mixed = [jax.nn.log_softmax(jnp.einsum("k,kbtv->btv", a, log_p)) for a in (even_K, a_K)]
    mixed.append(jax.nn.logsumexp(log_p + log_w[:, None, None, None], axis=0))
    every = jnp.concatenate([log_p, jnp.stack(mixed)])
    y = rows_BT[None, :, 1:, None]
    return -jnp.take_along_axis(every, jnp.broadcast_to(y, (*every.shape[:3], 1)), -1)[..., 0], kl


def main():
    params = [hybrid.dense(n)[1] for n in hybrid.NAMES]
    configs = [hybrid.dense(n)[0] for n in hybrid.NAMES]
    windows = hybrid.calibration(0)
    linear, _ = fuse.fit_weights(configs, params, windows)
    mixture, _ = fuse.fit_weights(configs, params, windows, latents=len(configs))
    log_w = mixture["log_pi"] - np.logaddexp.reduce(mixture["log_pi"])
    K = len(configs)
    pools = (linear["a"], np.full(K, 1 / K, np.float32), log_w.astype(np.float32))
    names = [*hybrid.NAMES, "even pool", "fitted pool", "fitted mixture"]
    rows, losses, divergence, tokens = [], [], 0.0, 0
    for source, windows in sources().items():
        parts = []
        for i in range(0, len(windows), hybrid.BATCH):
            loss, kl = compared(params, pools, windows[i : i + hybrid.BATCH])
            parts.append(np.asarray(loss, np.float64).reshape(len(names), -1))
            divergence = divergence + np.asarray(kl, np.float64)
        loss_PN = np.concatenate(parts, 1)
        tokens += loss_PN.shape[1]
        losses.append(loss_PN)
        each = dict(zip(names, loss_PN.mean(1).tolist(), strict=True))
        best = min(each[n] for n in hybrid.NAMES)
        gain = {n: best - each[n] for n in names[K:]}
        rows.append({"source": source, "tokens": loss_PN.shape[1], "nll": each, "gain": gain})
        print(json.dumps(rows[-1]), flush=True)
    loss_PN = np.concatenate(losses, 1)
    results = {
        "command": "python experiments/hybrid_diversity.py", "seeds": [0],
        "versions": hybrid.metrics.versions(), "tokens": tokens,
        "data_hash": {s: data.data_hash(hybrid.documents(s)) for s in ("calibrate", "report")},
        "weights": {"fitted pool": linear["a"].tolist(), "fitted mixture": np.exp(log_w).tolist()},
        "nll": dict(zip(names, loss_PN.mean(1).tolist(), strict=True)),
        "kl": (divergence / tokens).tolist(), "names": list(hybrid.NAMES),
        "correlation": np.corrcoef(loss_PN[:K]).tolist(), "rows": rows,
    }  # fmt: skip
    OUT.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({k: results[k] for k in ("nll", "kl", "correlation")}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
