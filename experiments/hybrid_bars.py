"""Is a DELVE exact at the real tiers' widths? H0, H1 and H7 on random full-width, few-layer models.

Command: python experiments/hybrid_bars.py [--only TIER ...]   (needs torch for H7)
Streams of the tier's parents at their full width, 2 layers each (so S = 2 and a hub), all maps
factored at the ranks of keep 0.5, common codes of rank d/4, random weights whose logits vary by
units. H0: step 0 against the pool computed in float64 from each stream run alone, J = 1 and J = K.
H1: token by token, in chunks, and left-padded against the whole text, hub and gate at work. H7: the
exported directory in transformers, logits and greedy tokens. Precision "highest", float32.
Result: experiments/results/hybrid_bars.json. Cost: minutes and up to 16 GB a tier (7B).
"""

import argparse
import dataclasses
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from delve_jax import checkpoint, metrics, models, presets
from delve_jax.config import DelveConfig, DelveError
from delve_jax.lm import LM
from delve_jax.models import delve

OUT = Path(__file__).resolve().parent / "results" / "hybrid_bars.json"
LAYERS, T, GREEDY = 2, 256, 64
jax.config.update("jax_default_matmul_precision", "highest")


def shortened(tier, latents):
    """The tier at full width, LAYERS layers a stream, tables in common."""
    whole = presets.tier(tier, 0.5)
    rank = min(sub.d_model for _, sub in whole.streams) // 4
    streams = []
    for name, sub in whole.streams:
        ranks = tuple((m, r[:LAYERS]) for m, r in sub.ranks if m not in ("embed", "head"))
        ranks += (("embed", (rank,)), ("head", (rank,)))
        streams.append((name, dataclasses.replace(
            sub, n_layers=LAYERS, ranks=ranks, tie_embeddings=False, dtype="float32",
            neurons=(), hf_config="",
        )))  # fmt: skip
    return DelveConfig(
        tuple(streams), LAYERS, latents or len(streams), connectors="hub", hub_rank=whole.hub_rank,
        codes=("embed", "head"),
    )  # fmt: skip


def weights(cfg, seed, joints):
    """Random weights; joints: hub and gate at work, else as fusion makes them."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, room = path[-1].key, path[0].key
        x = rng.standard_normal(leaf.shape, np.float32)
        if room == "pool":
            return jnp.asarray(np.abs(0.3 + 0.1 * x))
        if name in ("scale", "g", "sigma") or name.startswith("mix_"):
            return jnp.asarray(1 + 0.1 * x)
        if name == "time_decay":
            return jnp.asarray(-2 + x)
        if name in ("kernel", "v", "u", "a", "b", "w1", "w2") and x.ndim > 1:
            gain = 1.0 if path[-2].key == "embed" and name == "v" else x.shape[-2] ** -0.5
            return jnp.asarray(x * (gain * (4 if path[-2].key == "head" else 1)))
        return jnp.asarray(0.1 * x)

    params = jax.tree.map_with_path(draw, models.abstract_params(cfg))
    if joints:
        return params
    return {**params, **delve.init_joints(cfg, jax.random.key(seed)), "pool": params["pool"]}


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def step_0(tier, latents, tokens):
    """max |d log p| against the pool of the streams, each run alone."""
    cfg = shortened(tier, latents)
    params = weights(cfg, 0, joints=False)
    own = []
    for n, sub in cfg.streams:  # one stream's tables back at a time
        alone = delve.whole(cfg, params)[n]
        own.append(np.asarray(LM(sub, alone).logits(tokens), np.float64))
    if latents == 1:
        want = log_softmax(sum(a * x for a, x in zip(
            np.asarray(params["pool"]["a"], np.float64), own, strict=True)))  # fmt: skip
    else:
        w = log_softmax(params["pool"]["log_pi"])
        want = np.logaddexp.reduce([w[k] + log_softmax(x) for k, x in enumerate(own)])
    got = log_softmax(LM(cfg, params).logits(tokens))
    return {"max_abs_dlogp": float(np.abs(got - want).max()), "logit_std": float(own[0].std())}


def stepwise(lm, tokens):
    """max |d logit| over max |logit| of other ways through the same text."""
    want = np.asarray(lm.logits(tokens))
    most = np.abs(want).max()
    out = {}
    for name, sizes in (("single steps", [1] * T), ("chunks", [100, 1, 55, T - 156])):
        state, parts, at = lm.init_state(len(tokens), T), [], 0
        for n in sizes:
            logits, state = lm.step(tokens[:, at : at + n], state)
            parts.append(np.asarray(logits))
            at += n
        out[name] = float(np.abs(np.concatenate(parts, 1) - want).max() / most)
    pad = 17
    padded = np.pad(tokens[:, : T - pad], ((0, 0), (pad, 0)))
    mask = np.arange(T)[None] >= pad
    got = np.asarray(lm.logits(padded, np.repeat(mask, len(tokens), 0)))[:, pad:]
    out["left padding"] = float(np.abs(got - want[:, : T - pad]).max() / most)
    return out


def exported(cfg, params, lm, tokens):
    """The export in transformers: logits, and greedy tokens with their own cache."""
    import torch
    from transformers import AutoModelForCausalLM

    from delve_jax.parents.export import export_hf

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "c", cfg, params)
        facts = export_hf(Path(folder) / "c", Path(folder) / "hf")
        hf = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "hf", trust_remote_code=True
        ).eval()  # fmt: skip
    with torch.no_grad():
        theirs = hf(torch.tensor(tokens[:, :64])).logits.numpy()
        long = hf.generate(
            torch.tensor(tokens[:1, :32]), max_new_tokens=GREEDY, do_sample=False
        ).numpy()[:, 32:]  # fmt: skip
    ours = np.asarray(lm.logits(tokens[:, :64]))
    mine = np.asarray(lm.generate(tokens[:1, :32], GREEDY))[:, 32:]
    apart = np.flatnonzero(mine[0] != long[0])
    return {
        "verified": facts["verified"],
        "max_abs_diff_over_max_logit": float(np.abs(ours - theirs).max() / np.abs(ours).max()),
        "greedy_equal": int(apart[0]) if len(apart) else GREEDY, "greedy_of": GREEDY,
    }  # fmt: skip


def measure(tier):
    """All bars of one tier, in this process."""
    began = time.perf_counter()
    tokens = np.random.default_rng(1).integers(0, presets.V, (2, T)).astype(np.int32)
    row = {"tier": tier, "layers": LAYERS}
    row["H0"] = {name: step_0(tier, j, tokens[:, :64]) for name, j in (("J=1", 1), ("J=K", 0))}
    cfg = shortened(tier, 1)
    params = weights(cfg, 2, joints=True)
    lm = LM(cfg, params)
    row["widths"] = {n: sub.d_model for n, sub in cfg.streams}
    row["parameters"] = models.count(cfg)
    row["H1"] = stepwise(lm, tokens)
    row["H7"] = exported(cfg, params, lm, tokens)
    row["seconds"] = round(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return row | {"peak_rss_gib": round(peak / 2**20, 2)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=presets.TIERS, default=list(presets.TIERS))
    args = parser.parse_args()
    rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else []
    for tier in args.only:
        row = measure(tier)
        print(json.dumps(row), flush=True)
        rows = sorted([r for r in rows if r["tier"] != tier] + [row], key=lambda r: r["tier"])
        result = {"command": "python experiments/hybrid_bars.py", "seeds": [0, 1, 2],
                  "versions": metrics.versions(), "rows": rows}  # fmt: skip
        OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
