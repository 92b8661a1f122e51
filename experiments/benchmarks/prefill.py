"""Is reading a prompt (all its states, the next token's logits) as fast as the peers read it?

taskset -c 0,1 python experiments/benchmarks/prefill.py [--only NAME ...] [--widths 512 ...]
Two CPU cores, float32, one row, random weights, vocabulary 4,096. Peers: transformers (eager, and
torch.compile for the attention families at 256), its mamba with mambapy's parallel scan, the
`rwkv` package; the last two where they are installed (pip install --no-deps mambapy rwkv).
Bars, against the fastest eager one: neox and qwen3 1.0, mamba 1.5, rwkv 2 at 256 tokens, 4 at
1,024. A side of its own are the products with the layers' maps alone, by PyTorch: the ratio of a
program for which all else takes no time.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts
os.environ.setdefault("RWKV_JIT_ON", "1")  # the package's own default, its faster way
os.environ.setdefault("RWKV_CUDA_ON", "0")

import functools
import importlib.metadata
import importlib.util
import inspect
import tempfile
from pathlib import Path

import decode
import jax
import numpy as np
import torch
from decode import FAMILIES, LOST, WIDTHS, V
from training import torch_model
from turns import add_row, arguments, bars, old_rows, products, quiet_torch, summary, turns, write

from delve_jax import models
from delve_jax.lm import LM

LENGTHS = (256, 1024)
BARS = {
    ("mamba", 256): 1.5, ("mamba", 1024): 1.5, ("rwkv", 256): 2.0, ("rwkv", 1024): 4.0,
    ("neox", 256): 1.0, ("neox", 1024): 1.0, ("qwen3", 256): 1.0, ("qwen3", 1024): 1.0,
}  # fmt: skip
COMPILED = (("neox", 256), ("qwen3", 256))  # minutes; the recurrences' loops would be unrolled
PEERS = {"mamba": "mambapy", "rwkv": "rwkv"}  # family -> package


def of_transformers(model, ids_BT, compiled=False):
    """-> function: last logits [V] of a pass that keeps the states, the first one of `generate`."""
    known = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    run = torch.compile(model) if compiled else model

    def once():
        with torch.inference_mode():
            return run(ids_BT, use_cache=True, **last).logits[0, -1].numpy()

    return once


def of_mambapy(model, ids_BT):
    """The same of transformers' mamba with mambapy's parallel scan."""
    for module in model.modules():
        if hasattr(module, "use_mambapy"):
            module.use_mambapy = True
    return of_transformers(model, ids_BT)


def of_rwkv(model, ids_BT):
    """The same of the `rwkv` package, with the weights of transformers' model under its names."""
    from rwkv.model import RWKV

    names = (
        ("rwkv.embeddings.", "emb."), ("pre_ln", "ln0"), ("rwkv.ln_out", "ln_out"),
        ("rwkv.blocks", "blocks"), ("attention", "att"), ("feed_forward", "ffn"),
        ("mix_key", "mix_k"), ("mix_value", "mix_v"), ("mix_receptance", "mix_r"),
    )  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        for theirs, blink in names:
            name = name.replace(theirs, blink)
        state[name] = tensor.clone()
    with tempfile.TemporaryDirectory() as place:
        torch.save(state, Path(place) / "model.pth")
        run = RWKV(model=str(Path(place) / "model"), strategy="cpu fp32", verbose=False)
    ids = ids_BT[0].tolist()

    def once():
        with torch.inference_mode():
            return run.forward(ids, None)[0].float().numpy()

    return once


def measure(name, D, T, repeats):
    """One row: all sides' times in turn, and how far their logits are from ours."""
    cfg = decode.config(name, D)
    params = jax.jit(functools.partial(models.init_params, cfg))(jax.random.key(0))
    prompt_BT = np.random.default_rng(0).integers(1, V, (1, T)).astype(np.int32)
    lm, ids_BT = LM(cfg, params), torch.tensor(prompt_BT).long()
    model = functools.partial(torch_model, cfg, params)
    sides = {"transformers": of_transformers(model().eval(), ids_BT)}
    if importlib.util.find_spec(PEERS.get(name, "-")):
        of_peer = {"mamba": of_mambapy, "rwkv": of_rwkv}[name]
        sides[PEERS[name]] = of_peer(model().eval(), ids_BT)
    eager = tuple(sides)
    if (name, T) in COMPILED:
        sides["torch.compile"] = of_transformers(model().eval(), ids_BT, compiled=True)
    sides["ours"] = lambda: np.asarray(lm.generate(prompt_BT, 1))[0, -1]
    alone = {"products": products(params, T)}
    seconds, given = turns(sides | alone, repeats)
    logits_V = np.asarray(lm.logits(prompt_BT))[0, -1]
    apart = {
        side: float(abs(given[side] - logits_V).max() / abs(logits_V).max())
        for side in sides if side != "ours"
    }  # fmt: skip
    apart["ours"] = float((logits_V.max() - logits_V[given["ours"]]) / abs(logits_V).max())
    for side, value in apart.items():
        if not value <= LOST:
            raise SystemExit(f"{name}, {T} tokens: logits of {side} differ by {value:.2g}")
    found = summary(seconds)
    median = found["seconds"]
    best = min(eager, key=median.get)
    row = {
        "family": name, "d_model": D, "T": T, "batch": 1, "parameters": models.count(cfg),
        "ratio": median[best] / median["ours"], "best": best, "bar": BARS[name, T],
        "ratios": {side: median[side] / median["ours"] for side in sides if side != "ours"},
        "ratio_of_products": median[best] / median["products"],
        "tokens_per_second": {side: T / s for side, s in median.items()}, **found, "apart": apart,
    }  # fmt: skip
    if name in PEERS and PEERS[name] not in sides:
        row["missing"] = PEERS[name]
    return row


def picture(rows, file):
    """Ours over each peer in tokens a second, a group a family, width and T."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(max(6, 0.8 * len(rows) + 2), 3.8))
    labels = [f"{r['family']}\nd {r['d_model']}\n{r['T']:,}" for r in rows]
    every = ("transformers", "torch.compile", *PEERS.values())
    groups = {f"against {side}": [r["ratios"].get(side) for r in rows] for side in every}
    groups = {label: ratios for label, ratios in groups.items() if any(ratios)}
    bars(ax, labels, groups, "prefill tokens/s, DELVE / peer", [r["bar"] for r in rows])
    fig.tight_layout()
    fig.savefig(file, dpi=150)


def main():
    parser = arguments(__doc__, "prefill_cpu", FAMILIES)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="D")
    flags = parser.parse_args()
    quiet_torch()
    found = {
        p: importlib.metadata.version(p) for p in PEERS.values() if importlib.util.find_spec(p)
    }
    rows = old_rows(flags.out)
    for name in flags.only:
        for D in flags.widths:
            for T in LENGTHS:
                make = functools.partial(measure, name, D, T, flags.repeats)
                rows = add_row(rows, ("family", "d_model", "T"), make)
                rows.sort(key=lambda r: (FAMILIES.index(r["family"]), r["d_model"], r["T"]))
                write(
                    flags.out, rows, seed=0, repeats=flags.repeats,
                    peers={"torch": torch.__version__, **found},
                    torch_threads=torch.get_num_threads(),
                    met=all(r["ratio"] >= r["bar"] for r in rows),
                )  # fmt: skip
    picture(rows, flags.out.with_suffix(".png"))
    below = [f"{r['family']} {r['T']} {r['ratio']:.2f}" for r in rows if r["ratio"] < r["bar"]]
    print(f"{flags.out}: below the bar: {', '.join(below) or 'none'}")


if __name__ == "__main__":
    main()
