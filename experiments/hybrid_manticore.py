"""One mixed stream instead of one stream per parent: what does keeping them apart buy?

Command: python experiments/hybrid_manticore.py [--seeds N ...]; repeat it to go on.
E10 of the hybrid's design, in the style of Manticore (arXiv 2406.00894; by its description, not
its code): the same compressed parents as at N = 1.25 in DELVE, cut into the same superblocks, one
residual stream. Each superblock is sum_k alpha_sk out_k(layers_k(in_k(h))), embedding and head are
mixed alike; in and out are projectors x + (x A) B with B = 0 at first, alpha a softmax that starts
even. Rank of the projectors: the hub's, so that both have about the same parameters. Not the same
function as the parents at step 0, which is the point. Same tokens, teacher pool, optimiser and rate
as `base` of hybrid_parts.py. Result: experiments/results/hybrid_manticore.json, told in
docs/results.md.
"""

import argparse
import sys

import hybrid
import hybrid_parts
import jax
import jax.numpy as jnp
import numpy as np

from delve_jax import data, fuse, models, parallel
from delve_jax.config import DelveError
from delve_jax.models import delve
from delve_jax.train import loop, objective, run

RANK = 8


def build(seed):
    """(config of the streams, parameters) of the mixed model."""
    as_if = fuse.joint_config([(n, hybrid.dense(n)[0]) for n in hybrid.NAMES], connectors="hub")
    made = hybrid.together(hybrid_parts.N - fuse.joints_count(as_if), seed)
    cfg, params, _ = fuse.fuse(made, shared=True, connectors="none")
    K, S, d = len(made), cfg.n_superblocks, made[0][1].d_model
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    pair = lambda n: {"a": jax.random.normal(next(keys), (n, K, d, RANK)) / d**0.5,  # noqa: E731
                      "b": jnp.zeros((n, K, RANK, d))}  # fmt: skip
    mixed = {"in": pair(S + 1), "out": pair(S + 1), "alpha": jnp.zeros((S + 2, K))}
    return cfg, {"streams": params["streams"], "codes": params["codes"], "mixed": mixed}


def logits_of(cfg, params, tokens_BT, eot):
    """Logits [B, T, V] of the mixed stream."""
    streams = delve.whole(cfg, params)
    m, S = params["mixed"], cfg.n_superblocks
    seg = objective.segments(tokens_BT, eot)
    alpha = jax.nn.softmax(m["alpha"], -1)
    project = lambda p, s, k, x: x + (x @ p["a"][s, k]) @ p["b"][s, k]  # noqa: E731
    h = sum(alpha[0, k] * project(m["out"], S, k, models.embed_tokens(sub, streams[n], tokens_BT))
            for k, (n, sub) in enumerate(cfg.streams))  # fmt: skip
    for s in range(S):
        parts = []
        for k, (n, sub) in enumerate(cfg.streams):
            first, last = delve.boundaries(sub.n_layers, S)[s : s + 2]
            layers = jax.tree.map(lambda a, i=first, j=last: a[i:j], streams[n]["layers"])
            x = project(m["in"], s, k, h)
            ctx, _ = models.FAMILY[sub.family].context(sub, x, segments_BT=seg)
            y, _ = models.run_layers(sub, layers, x, None, ctx)
            parts.append(alpha[s + 1, k] * project(m["out"], s, k, y))
        h = sum(parts)
    out = 0.0
    for k, (n, sub) in enumerate(cfg.streams):
        f = models.final_features(sub, streams[n], project(m["in"], S, k, h))
        out = out + alpha[S + 1, k] * models.head_logits(sub, streams[n], f)
    return out


def healed(seed):
    """One row."""
    cfg, params = build(seed)
    eot, teachers = data.eot_of(hybrid.tokenizer()), [hybrid.dense(n) for n in hybrid.NAMES]
    pool = delve.plain_pool(hybrid.NAMES, [c for c, _, _ in teachers])
    frozen = {"streams": {n: p for n, (_, p, _) in zip(hybrid.NAMES, teachers, strict=True)},
              "pool": {"a": jnp.asarray(hybrid.teacher_weights(seed), jnp.float32)}}  # fmt: skip

    def loss(params, frozen, tokens_BT, step=0):
        inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:]
        logits = logits_of(cfg, params, inputs, eot)
        f, _ = delve.features(pool, frozen, inputs, segments_BT=objective.segments(inputs, eot))
        taught = jax.lax.stop_gradient(delve.head(pool, frozen, f))
        nll = objective.cross_entropy(logits, targets).mean()
        kl = objective.kl(taught, logits).mean()
        return 0.5 * nll + 0.5 * kl, {"nll": nll, "kl": kl}

    settings = run.Settings(
        tokens=hybrid.HEAL, batch=hybrid.BATCH, lr=hybrid.LR, window=hybrid.WINDOW, seed=seed
    )
    steps = settings.steps(hybrid.WINDOW)
    before = score(cfg, params)
    params = loop.fit(
        params, loss, data.batches(hybrid.healing_rows(), hybrid.BATCH, seed),
        settings.make_optimizer(steps), steps=steps, frozen=frozen, mesh=parallel.make_mesh(None),
        workdir=hybrid.WORK / "healed" / f"manticore-s{seed}.partial", desc="heal",
    )  # fmt: skip
    after = score(cfg, params)
    extra = sum(a.size for a in jax.tree.leaves(params["mixed"]))
    bare = models.count(cfg) - fuse.joints_count(cfg)
    return {"parameters": bare + extra, "step_0": float(before["report"].mean()),
            **{s: float(x.mean()) for s, x in after.items()},
            **{f"{s}_each": [round(float(v), 5) for v in x] for s, x in after.items()}}  # fmt: skip


def score(cfg, params):
    """{split: nats of every scored sequence}."""
    run_on = jax.jit(lambda p, rows: objective.cross_entropy(
        logits_of(cfg, p, rows[:, :-1], None), rows[:, 1:]).mean(1))  # fmt: skip
    out = {}
    for split in ("choose", "report"):
        rows = hybrid.sequences(split)
        out[split] = np.concatenate([
            np.asarray(run_on(params, rows[i : i + hybrid.BATCH]), np.float64)
            for i in range(0, len(rows), hybrid.BATCH)
        ])  # fmt: skip
    return out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=hybrid.SEEDS, metavar="N")
    args = parser.parse_args()
    results = hybrid.Results("hybrid_manticore", "python experiments/hybrid_manticore.py")
    for seed in args.seeds:
        results.row("one mixed stream", seed, lambda s=seed: healed(s))


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
