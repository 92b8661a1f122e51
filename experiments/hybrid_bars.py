"""Is a DELVE exact at the real tiers' widths? H0, H1 and H7 on random full-width, few-layer models.

Command: python experiments/hybrid_bars.py [--only TIER ...] [--spread 3]   (needs torch for H7)
Streams of the tier's parents at their full width, 2 layers each (so S = 2 and a hub), all maps
factored at the ranks of keep 0.5, common codes of rank d/4, random weights. Every parent's head is
drawn so that its logits have a standard deviation of --spread over vocabulary and positions: 3, a
little more than the proxies' (2.5 to 2.8 on report text). Rows of 16, with which this study began,
stand beside: what float32 leaves grows with it. H0: step 0 against the pool computed in float64
from the float32 logits of each stream run alone, J = 1 and J = K. H1: token by token, in chunks,
and left-padded against the whole text, hub and gate at work. H7: the exported directory in
transformers, logits and greedy tokens. Precision "highest", float32; one model is in memory at a
time.
Result: experiments/results/hybrid_bars.json. Cost: 4, 9 and 22 minutes of CPU a tier, 2 to 10 GiB.
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
TIERS = ("delve-0.4b", "delve-1.4b", "delve-7b")
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


def weights(cfg, seed, joints, spread):
    """Random weights; joints: hub and gate at work, else as fusion makes them.

    spread: standard deviation of every stream's logits, its root in either factor of the heads.
    """
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
            return jnp.asarray(x * (gain * (spread**0.5 if path[-2].key == "head" else 1)))
        return jnp.asarray(0.1 * x)

    params = jax.tree.map_with_path(draw, models.abstract_params(cfg))
    if joints:
        return params
    return {**params, **delve.init_joints(cfg, jax.random.key(seed)), "pool": params["pool"]}


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def step_0(tier, latents, tokens, spread):
    """max |d log p| against the pool of the streams, each run alone."""
    cfg = shortened(tier, latents)
    params = weights(cfg, 0, False, spread)
    own = {}
    for n, sub in cfg.streams:  # one stream's tables back at a time
        alone = delve.whole(cfg, params)[n]
        own[n] = np.asarray(LM(sub, alone).logits(tokens), np.float64)
    if latents == 1:
        want = log_softmax(sum(a * x for a, x in zip(
            np.asarray(params["pool"]["a"], np.float64), own.values(), strict=True)))  # fmt: skip
    else:
        w = log_softmax(params["pool"]["log_pi"])
        want = np.logaddexp.reduce([w[k] + log_softmax(x) for k, x in enumerate(own.values())])
    got = log_softmax(LM(cfg, params).logits(tokens))
    return {"max_abs_dlogp": float(np.abs(got - want).max()),
            "logit_std": {n: float(x.std()) for n, x in own.items()}}  # fmt: skip


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


def ours(cfg, tokens, spread, folder):
    """(H1, logits, greedy tokens) of a model that is left in `folder` and no longer in memory."""
    params = weights(cfg, 2, True, spread)
    lm = LM(cfg, params)
    made = stepwise(lm, tokens), np.asarray(lm.logits(tokens[:, :64]))
    greedy = np.asarray(lm.generate(tokens[:1, :32], GREEDY))[:, 32:]
    checkpoint.save(folder, cfg, params)
    return *made, greedy


def exported(folder, tokens, logits, greedy):
    """The export in transformers: logits, and greedy tokens with their own cache."""
    import torch
    from transformers import AutoModelForCausalLM

    from delve_jax.parents.export import export_hf

    facts = export_hf(folder, folder / "hf")
    hf = AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True).eval()
    with torch.no_grad():
        theirs = hf(torch.tensor(tokens[:, :64])).logits.numpy()
        long = hf.generate(
            torch.tensor(tokens[:1, :32]), max_new_tokens=GREEDY, do_sample=False
        ).numpy()[:, 32:]  # fmt: skip
    apart, most = np.flatnonzero(greedy[0] != long[0]), np.abs(logits).max()
    return {
        "verified": facts["verified"], "max_abs_logit": float(most),
        "max_abs_diff_over_max_logit": float(np.abs(logits - theirs).max() / most),
        "greedy_equal": int(apart[0]) if len(apart) else GREEDY, "greedy_of": GREEDY,
    }  # fmt: skip


def measure(tier, spread):
    """Yields the row of a tier after each of its bars, all in this process."""
    began = time.perf_counter()
    tokens = np.random.default_rng(1).integers(0, presets.V, (2, T)).astype(np.int32)
    cfg = shortened(tier, 1)
    row = {
        "tier": tier, "spread": spread, "layers": LAYERS, "parameters": models.count(cfg),
        "widths": {n: sub.d_model for n, sub in cfg.streams}, "H0": {},
    }  # fmt: skip

    def so_far():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return row | {"seconds": round(time.perf_counter() - began),
                      "peak_rss_gib": round(peak / 2**20, 2)}  # fmt: skip

    for name, latents in (("J=1", 1), ("J=K", 0)):
        row["H0"][name] = step_0(tier, latents, tokens[:, :64], spread)
        yield so_far()
    with tempfile.TemporaryDirectory() as folder:
        row["H1"], *made = ours(cfg, tokens, spread, Path(folder) / "c")
        yield so_far()
        row["H7"] = exported(Path(folder) / "c", tokens, *made)
    yield so_far()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--spread", type=int, default=3, help="of every parent's logits")
    args = parser.parse_args()
    if args.spread < 1:
        raise DelveError(f"--spread {args.spread}: must be at least 1")
    name = lambda row: (row["tier"], row["spread"])  # noqa: E731
    for tier in args.only:
        for row in measure(tier, args.spread):
            print(json.dumps(row), flush=True)
            rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else []
            rows = sorted([r for r in rows if name(r) != name(row)] + [row], key=name)
            result = {"command": "python experiments/hybrid_bars.py [--spread 16]",
                      "seeds": [0, 1, 2], "versions": metrics.versions(), "rows": rows}  # fmt: skip
            OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
