"""How far should pass 2 go towards the parent's outputs, and does measured divergence tell?

Command: python experiments/blends.py [--only NAME ...] [--keep R ...] [--seeds N ...]
Each cell: ours at one keep ratio with pass 2 at every blend (0: pass 1 alone), whatever it does.
Measured: what `anchor.best` decides by, KL(parent || student) in nats on calibration tokens, and
nats per token on the choose split of compression.py's study. Rows that stand there are not run
again. Cost: two to three minutes a cell on one core.
Result (results/blends.json; three cells, seed 0): KL on calibration tokens and nats on other text
agree on the best blend in all three: 0.5 for rwkv at 0.4 (4.3939, pass 1 4.4304) and at 0.2
(5.1542, 5.2524), 0.25 for mamba at 0.2 (6.3673, 6.4544), where 0.5 (6.5073) is worse than pass 1.
"""

import argparse
import functools
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

from delve_jax import compress, data, metrics
from delve_jax.compress import anchor, assembly, curves
from delve_jax.config import DelveError

spec = importlib.util.spec_from_file_location("study", Path(__file__).with_name("compression.py"))
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)

BLENDS = (0.0, 0.25, 0.5, 1.0)


def forced(blend):
    """In the place of `anchor.best`: this blend, good or bad."""

    def best(spectra, plan, centred, assembled, before=None):
        out = assembled(functools.partial(anchor.Anchor, spectra, plan, centred, blend))
        (facts,) = curves.checked(spectra, [assembly.student(out)])
        return out, facts, blend

    return best


def cell(parent, keep, seed, work):
    """One row: KL and nats of every blend."""
    row = {"parent": parent.name, "keep": keep, "seed": seed, "code": study.code_hash()}
    for blend in BLENDS:
        anchor.best = forced(blend)
        cfg, params, report = compress.compress(
            parent.cfg, parent.params, parent.calibration(seed), keep=keep, work=work,
            anchor=blend > 0, check=True, progress=False,
        )  # fmt: skip
        nats = parent.scores(cfg, params, "choose").sum() / (study.SEQUENCES * study.WINDOW)
        row[f"{blend:g}"] = {"kl": float(report.measured["kl"]), "choose": float(nats)}
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=study.PARENTS, default=("mamba", "rwkv"))
    parser.add_argument("--keep", nargs="+", type=float, default=(0.4, 0.2))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--out", type=Path, default=study.RESULTS / "blends.json")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    done = {(r["parent"], r["keep"], r["seed"]) for r in rows}
    for name in args.only:
        parent = study.Parent(name)
        for seed in args.seeds:
            with tempfile.TemporaryDirectory(prefix="delve-blends-") as work:
                for keep in args.keep:
                    if (name, keep, seed) in done:
                        continue
                    rows.append(cell(parent, keep, seed, work))
                    print(json.dumps(rows[-1]), flush=True)
                    args.out.write_text(json.dumps(facts() | {"rows": rows}, indent=1) + "\n")


def facts():
    """What every row has in common."""
    return {
        "command": "python " + " ".join(sys.argv), "versions": metrics.versions(),
        "calibrate_tokens": study.CALIBRATE, "scored": study.SEQUENCES * study.WINDOW,
        "data_hash": {n: data.data_hash(d) for n, d in study.documents().items()},
    }  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
