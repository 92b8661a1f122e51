"""On one narrow kind of text: is KL to the parents' pool enough, or does healing need the labels?

Command: python experiments/kl_weight.py, after `make quickstart` (about 3 minutes). The
quickstart's fused DELVE is healed as there (half cross-entropy, half KL) and with KL alone, on the
same documents of Python's library, and scored on the choose split of them. The parents were trained
on that kind of text among nine others; for the whole mixture see the cells `KL` and `CE` of
hybrid_parts.py.
Result: experiments/results/kl_weight.json, quoted in docs/results.md.
"""

import argparse
import json
import sys
from pathlib import Path

from delve_jax import data, lm, metrics, training, upcycle
from delve_jax.config import DelveError
from delve_jax.train.objective import Terms
from delve_jax.train.run import Saving, Settings

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART, WORK = ROOT / "out" / "quickstart", ROOT / "out" / "kl_weight"
OUT = ROOT / "experiments" / "results" / "kl_weight.json"
TOKENS, WINDOW, BYTES = 80_000, 256, 120_000


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    if not (QUICKSTART / "fused").exists():
        raise DelveError(f"{QUICKSTART / 'fused'}: is not there; run `make quickstart` first")
    train = upcycle.roles((), (), ())["train"]
    choose = upcycle.cut_documents(data.split(data.stdlib_documents(), "choose"), BYTES)
    how = Settings(tokens=TOKENS, batch=8, lr=2e-3, seed=0, saving=Saving(200))
    sources = {"step 0": QUICKSTART / "fused"}
    for kl in (0.5, 1.0):
        sources[f"KL {kl:g}"] = WORK / f"kl-{kl:g}"
        training.heal(
            QUICKSTART / "fused", sources[f"KL {kl:g}"], how, documents=train,
            terms=Terms(ce=1 - kl, kl=kl),
        )  # fmt: skip
    rows = [upcycle.score(name, lm.load(src), choose, WINDOW) for name, src in sources.items()]
    facts = {
        "command": "python experiments/kl_weight.py", "seeds": [0], "tokens": TOKENS,
        "versions": metrics.versions(),
        "data_hash": {"train": data.data_hash(train), "choose": data.data_hash(choose)},
    }  # fmt: skip
    OUT.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    for row in rows:
        print(f"{row['name']}: {row['nll_per_token']:.4f} nats a token")


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
