"""What is each part of a DELVE worth: connectors, pooling, gate, objective, order, every parent?

Command: python experiments/hybrid_parts.py [--only CELL ...] [--seeds N ...]; repeat it to go on.
N = 1.25 x the largest parent, 204,800 healing tokens for every cell, all else as in `base` (hub
that hears all, J = 1, gate, half cross-entropy and half KL to the pool of the dense parents). The
learning rate is that of the quickstart for all cells; nothing was tuned per cell. Connectors: self
has the same parameters as hub and cross and reads only its own stream, so that what it gains is
adapter capacity. "ffn share": routers may spare a token the FFNs behind the first hub, and healing
asks that they run for that share of the tokens ("free": asks nothing, so it has the routers'
weights alone); base is the same model without routers. Their rows hold the share of report tokens
whose FFNs ran and the FLOPs a token (`flops`). Cost: 7 to 10 minutes of a core a cell and seed.
Result: experiments/results/hybrid_parts.json and docs/results.md; the rule for defaults: a part
that does not help at 95 % on three seeds is off by default.
"""

import dataclasses
import sys

import hybrid
import jax
import numpy as np

from delve_jax import fuse, models
from delve_jax.config import DelveError
from delve_jax.models import delve
from delve_jax.train.objective import Terms

N = int(1.25 * hybrid.LARGEST)
SKIP = 0.5  # a router's weight below which a token does without an FFN, as `fuse --ffn-skip` says

# cell: (what is built, how it is healed)
CELLS = {
    "base": ({}, {}),
    "none": ({"connectors": "none"}, {}),
    "self": ({"connectors": "self"}, {}),
    "cross": ({"connectors": "cross"}, {}),
    "warm hub": ({"warm": True}, {}),
    "no gate": ({"gate": False}, {}),
    "J=2": ({"latents": 2}, {}),
    "J=K": ({"latents": 4}, {}),
    "CE": ({}, {"terms": Terms(ce=1.0, kl=0.0)}),
    "KL": ({}, {"terms": Terms(ce=0.0, kl=1.0)}),
    "+ streams": ({}, {"terms": Terms(streams=0.3)}),
    "+ streams, hidden": ({}, {"terms": Terms(streams=0.3, hidden=1.0)}),
    "KL + streams, hidden": ({}, {"terms": Terms(ce=0.0, kl=1.0, streams=0.3, hidden=1.0)}),
    "+ streams, stream-drop": ({}, {"terms": Terms(streams=0.3, stream_drop=0.1)}),
    "hybrid stages": ({}, {"stages": "hybrid"}),
    "half": ({"N": N // 2}, {}),
    **{f"without {n}": ({"names": tuple(m for m in hybrid.NAMES if m != n)}, {})
       for n in hybrid.NAMES},
    **{f"ffn share {x:g}": ({}, {"terms": Terms(ffn_share=x)}) for x in (0.5, 0.75)},
    "ffn share free": ({}, {"terms": Terms()}),
}  # fmt: skip


def make(cell, seed):
    """One row: the model at step 0 and healed, and what is asked of this cell beside."""
    built, how = CELLS[cell]
    cfg, params, report = hybrid.hybrid(**{"N": N, "seed": seed} | built)
    if routers := cell.startswith("ffn share"):
        cfg, params = with_routers(cfg, params)
    before = hybrid.scored(cfg, params)
    key = f"parts-{cell.replace(' ', '-').replace(',', '')}-s{seed}"
    if cell == "base":
        key = f"delve-{N}-s{seed}"  # hybrid_curve.py's model of this size is the same
    names = built.get("names", hybrid.NAMES)
    cfg, params = hybrid.healed(key, cfg, params, seed, names, **how)
    row = hybrid.scored(cfg, params, step_0=before["report"], step_0_choose=before["choose"])
    if "warm_hub" in report:
        row["warm_hub"] = report["warm_hub"]
    if cell in ("base", "+ streams", "+ streams, stream-drop"):
        row["subsets"] = {"+".join(s): subset(cfg, params, s, seed) for s in SUBSETS}
    if routers:
        share = ffn_share(cfg, params)
        behind = np.mean([share_S[1:] for share_S in share.values()])
        row |= {"ffn_skip": SKIP, "ffn_share": float(behind), "ffn_share_each": share,
                "flops": flops(cfg, share), "flops_all_run": flops(cfg)}  # fmt: skip
    return row


def with_routers(cfg, params):
    """The same model with routers that do nothing yet (all weights 1)."""
    cfg = dataclasses.replace(cfg, ffn_skip=SKIP)
    fresh = delve.init_joints(cfg, jax.random.key(0))["hub"]  # of it the routers alone are kept
    return cfg, params | {"hub": {n: fresh[n] | p for n, p in params["hub"].items()}}


def ffn_share(cfg, params):
    """{stream: share of the report tokens whose FFNs run, [S] in the order of superblocks}."""
    rows = hybrid.sequences("report")
    on_the_way = jax.jit(lambda p, x: delve.traced(cfg, p, x, trace=False)[2]["ffn"])
    parts = [on_the_way(params, rows[i : i + hybrid.BATCH, :-1])
             for i in range(0, len(rows), hybrid.BATCH)]  # fmt: skip
    return {n: np.mean([p[n] for p in parts], 0).astype(float).tolist() for n in parts[0]}


def flops(cfg, share=None):
    """Forward FLOPs a token: 2 for each weight that it is multiplied by, at true ranks and widths,
    and attention over the whole window (as Delphi's recipe counts).

    Not counted: lookups, norms, recurrences. share: of tokens that run their FFNs (None: all), as
    if a token that skips one costs nothing. J = 1 and tables in common.
    """
    tree = models.abstract_params(cfg)
    joints = [tree.get("gate", {}), *({k: a for k, a in p.items() if k in ("a", "b", "skip_v")}
                                      for p in tree["hub"].values())]  # fmt: skip
    total = sum(a.size for a in jax.tree.leaves(joints)) + tree["codes"]["head"]["u"].size
    streams = delve.whole(cfg, tree)
    for name, sub in cfg.streams:
        bounds = delve.boundaries(sub.n_layers, cfg.n_superblocks)
        share_L = np.repeat((share or {}).get(name, [1.0] * cfg.n_superblocks), np.diff(bounds))
        for key, size_L in weights(sub, streams[name]).items():
            ffn = key.startswith(("ffn/", "mlp/"))
            total += (size_L * share_L if ffn else size_L).sum()
        if sub.family == "neox":
            total += sub.n_layers * 2 * hybrid.WINDOW * sub.d_model  # scores, and their sums
    return float(2 * total)


def weights(sub, tree):
    """{map: weights that a token meets in each layer} of a stream; of the tables its own side."""
    out = {}
    for (key, ranks), (_, sizes) in zip(sub.ranks, models.factored_maps(sub, tree), strict=True):
        out[key] = np.array([r * (n_in + n_out) for r, n_in, n_out in sizes])
        if key in ("embed", "head"):
            out[key] = np.array(ranks) * sub.d_model
    for path, a in jax.tree_util.tree_leaves_with_path(tree["layers"]):
        key = "/".join(k.key for k in path[:-1])
        if path[-1].key == "kernel":
            out[key] = np.full(a.shape[0], np.prod(a.shape[1:]))
            if sub.neurons and key in models.FAMILY[sub.family].MLP:
                out[key] = out[key] // sub.d_ffn * np.array(sub.neurons)
    return out


SUBSETS = (("mamba", "rwkv"), ("incite", "neox"), ("rwkv",))


def subset(cfg, params, names, seed):
    """A subset of the streams, and the ensemble of its own: the same streams with a pool fitted
    anew on calibration tokens, hub and gate left out."""
    part = delve.subset(cfg, params, names)
    streams = delve.whole(*part)
    made = [(n, sub, streams[n]) for n, sub in part[0].streams]
    rows = hybrid.calibration(seed)[: len(hybrid.calibration(seed)) // 2]
    pool = fuse.fuse(made, rows, connectors="none", shared=True)
    bare = dataclasses.replace(pool[0], gate_proj=0, gate_hidden=0)
    tree = {k: v for k, v in pool[1].items() if k != "gate"}
    return {"subset": float(hybrid.nats(*part, "report").mean()),
            "ensemble": float(hybrid.nats(bare, tree, "report").mean())}  # fmt: skip


def main():
    parser = hybrid.flags(__doc__, CELLS)
    parser.add_argument("--out", default="hybrid_parts", help="name of the results")
    args = parser.parse_args()
    results = hybrid.Results(args.out, "python experiments/hybrid_parts.py", parameters=N)
    with hybrid.metrics.progress(len(args.only) * len(args.seeds), "parts", "cell") as bar:
        for seed in args.seeds:
            for cell in args.only:
                results.row(cell, seed, lambda c=cell, s=seed: make(c, s))
                bar.update(1)
    results.save(**derived(results))


def derived(results):
    """Differences of every cell from base, and of cross from self, with paired intervals."""
    against = {
        cell: {split: results.difference(cell, "base", split) for split in ("choose", "report")}
        for cell in CELLS
        if results.cell(cell) and cell != "base"
    }
    if results.cell("self") and results.cell("cross"):
        against["cross - self"] = {s: results.difference("cross", "self", s)
                                   for s in ("choose", "report")}  # fmt: skip
    return {"intervals": hybrid.INTERVALS, "against_base": against}


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
