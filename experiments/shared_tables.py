"""Do the parents of a DELVE lose less when they share token codes than with tables of their own?

Command: python experiments/shared_tables.py   (20 minutes of a busy core; --seeds N ... for fewer)
The question E2 of the hybrid's design. Four proxies, bodies dense; only vocabulary tables are
factored, all of them at one rank: each parent's own (ours, in the metric of its loss) against
common codes for the four input tables and for the four heads (mamba's tied table is in both). Equal
counted parameters. Nats per token above the dense parents, mean of the four, 32,768 report tokens;
the choose split stands beside them in the results. Calibration: 65,536 tokens by seed.
Result: experiments/results/shared_tables.json and docs/results.md.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from delve_jax import compress, data, evaluate, metrics, parents, road, upcycle
from delve_jax.compress import vocab
from delve_jax.compress.moments import Sweep
from delve_jax.compress.spectra import InMemory
from delve_jax.config import DelveError

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data" / "text"
NAMES = ("incite", "mamba", "neox", "rwkv")
SHARES = (0.6, 0.4, 0.25, 0.15)  # of all parameters in tables
CALIBRATE, SEQUENCES, WINDOW, BATCH = 65_536, 128, 256, 16


class Parent:
    """A dense proxy and what its tables' closed forms need."""

    def __init__(self, name):
        cfg, params, self.tokenizer = parents.load(upcycle.PROXIES / name, dtype="float32")
        cfg = dataclasses.replace(cfg, dtype="float32")
        self.cfg, self.params, _ = compress.compress(cfg, params, None, keep=1.0, method="svd")
        self.tied = self.cfg.tie_embeddings
        self.embed = np.asarray(self.params["embed"]["kernel"], np.float64)
        head = self.embed.T if self.tied else self.params["head"]["kernel"]
        self.head = np.asarray(head, np.float64)

    def calibrate(self, documents, seed, folder):
        """Sweep once: moments of the head's inputs and the metric of the looked-up rows."""
        tokens = road.calibration_windows(self.cfg, self.tokenizer, documents, CALIBRATE, seed)
        sweep = Sweep(InMemory(self.cfg, self.params), tokens, folder, seed=seed)
        sweep.boundaries()
        self.gram, _, mean_p_V = sweep.head()
        for i in range(self.cfg.n_layers - 1, -1, -1):
            sweep.layer(i)
        self.grad = sweep.embed_grad()
        self.p_V = vocab.frequencies(tokens, self.cfg.vocab_size)
        self.predicted = mean_p_V

    def scores(self, split, embed=None, head=None):
        """Nats of each sequence, with these tables [V, D], [D, V] in the place of its own."""
        cfg, params = self.cfg, dict(self.params)
        if embed is not None:
            cfg = dataclasses.replace(cfg, tie_embeddings=False)
            params |= {"embed": {"kernel": jnp.asarray(embed, jnp.float32)},
                       "head": {"kernel": jnp.asarray(head, jnp.float32)}}  # fmt: skip
        score = evaluate.as_scorer(evaluate.Model(cfg, params)).score
        rows = sequences(self.tokenizer, cfg.vocab_size, split)
        nll = [score(rows[i : i + BATCH, :-1], rows[i : i + BATCH, 1:])[0]
               for i in range(0, len(rows), BATCH)]  # fmt: skip
        return np.concatenate([np.asarray(a, np.float64).sum(1) for a in nll])


@functools.cache
def documents(split):
    return data.split(data.shared_documents(SHARED), split)


@functools.cache
def sequences(tokenizer, vocab_size, split):
    ids = data.encode_documents(data.load_tokenizer(tokenizer, vocab_size), documents(split))
    rows = data.windows(ids, WINDOW + 1)
    return rows[np.sort(np.random.default_rng(0).permutation(len(rows))[:SEQUENCES])]


def own_tables(group, rank):
    """[(embed, head) of each parent], every table with factors of its own."""
    out = []
    for p in group:
        predicted = vocab.weights(p.predicted)
        if p.tied:
            w_V = vocab.weights((p.p_V + p.predicted) / 2)
            fit = vocab.factor_tied(p.embed, p.gram, w_V, rank, p.grad)
            table = fit.v_IK @ fit.u_KO
            out.append((table, table.T))
            continue
        a = vocab.factor_embed(p.embed, vocab.weights(p.p_V), rank, p.grad)
        b = vocab.factor_head(p.head, p.gram, predicted, rank)
        out.append((a.v_IK @ a.u_KO, b.v_IK @ b.u_KO))
    return out


def common_tables(group, rank):
    """The same from codes that all parents share."""
    seen = np.mean([p.p_V for p in group], 0)
    predicted = np.mean([p.predicted for p in group], 0)
    c_VK, u_KD, _ = vocab.shared_embed(
        [p.embed for p in group], vocab.weights(seen), rank, [p.grad for p in group]
    )
    v_DK, c_KV, _ = vocab.shared_head(
        [p.head for p in group], [p.gram for p in group], vocab.weights(predicted), rank
    )
    return [(c_VK @ u, v @ c_KV) for u, v in zip(u_KD, v_DK, strict=True)]


def ranks(group, share):
    """(rank of own tables, rank of common ones): the largest within the same parameters."""
    V = len(group[0].embed)
    budget = share * sum(p.embed.size * (1 if p.tied else 2) for p in group)
    own = sum((V + p.embed.shape[1]) * (1 if p.tied else 2) for p in group)
    common = 2 * (V + sum(p.embed.shape[1] for p in group))
    return int(budget // own), int(budget // common)


def main():
    import tempfile

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    out = ROOT / "experiments/results/shared_tables.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    if not SHARED.is_dir():
        raise DelveError(f"{SHARED}: the shared text is not here")
    group, rows = [Parent(name) for name in NAMES], []
    splits = ("choose", "report")
    dense = {s: [p.scores(s) for p in group] for s in splits}
    with metrics.progress(len(args.seeds) * len(SHARES) * 2, "tables", "row") as bar:
        for seed in args.seeds:
            for p in group:
                with tempfile.TemporaryDirectory() as place:
                    p.calibrate(documents("calibrate"), seed, Path(place))
            for share in SHARES:
                for how, make, rank in zip(
                    ("own", "common"), (own_tables, common_tables), ranks(group, share),
                    strict=True,
                ):  # fmt: skip
                    tables = make(group, rank)
                    row = {"seed": seed, "share": share, "how": how, "rank": rank}
                    for s in splits:
                        lost = [
                            p.scores(s, *pair) - d
                            for p, pair, d in zip(group, tables, dense[s], strict=True)
                        ]
                        row[s] = {n: float(x.sum() / x.size / WINDOW)
                                  for n, x in zip(NAMES, lost, strict=True)}  # fmt: skip
                        row[s]["mean"] = float(np.mean(list(row[s].values())))
                    rows.append(row)
                    bar.set_postfix_str(f"{how} {share}: {row['choose']['mean']:.4f}")
                    bar.update(1)
    result = {
        "command": "python experiments/shared_tables.py", "seeds": args.seeds,
        "versions": metrics.versions(),
        "data_hash": {s: data.data_hash(documents(s)) for s in ("calibrate", *splits)},
        "tokens": {"calibrate": CALIBRATE, "scored": SEQUENCES * WINDOW}, "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for share in SHARES:
        at = {h: [r for r in rows if r["share"] == share and r["how"] == h]
              for h in ("own", "common")}  # fmt: skip
        means = {h: np.mean([r["report"]["mean"] for r in rs]) for h, rs in at.items()}
        print(f"share {share}: own (rank {at['own'][0]['rank']}) +{means['own']:.4f}, "
              f"common (rank {at['common'][0]['rank']}) +{means['common']:.4f} nats")  # fmt: skip


if __name__ == "__main__":
    main()
