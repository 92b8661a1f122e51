"""Is greedy decoding ahead of transformers' `generate`, and a DELVE near what the memory gives?

taskset -c 0,1 python experiments/benchmarks/decode.py [--only NAME ...] [--widths 512 ...]
Two CPU cores, float32, random weights in real layout, prompts of 32 tokens and 64 new ones. Both
sides make 1 and then 64 tokens in turn; the difference, over 63, is a step's time. Its bound: the
bytes which it has to move, over the rate at which so many are read in the same turns. Bars: 1.5
times transformers (eager) for one row of every family; a DELVE (mamba, rwkv and neox at keep 0.5)
at 0.5 of its bound, where its weights are at least 4 times the last-level cache. "ours, stacked" is
the same loop over stacked layers (of a DELVE: over superblocks), which backs `lm.layers_apart`. The
DELVE alone: --only delve --widths 1024.
Transformers' mamba and rwkv run without kernels: those that exist need a GPU.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts

import functools

import jax
import numpy as np
import torch
from training import torch_model
from turns import (
    add_row,
    arguments,
    bars,
    last_level_cache,
    old_rows,
    quiet_torch,
    readers,
    summary,
    turns,
    write,
)

from delve_jax import fuse, lm, models, presets
from delve_jax.config import MambaConfig, NeoxConfig, Qwen3Config, RwkvConfig
from delve_jax.lm import LM

V, KEEP, PROMPT, NEW = 4096, 0.5, 32, 64
BARS = {"ratio": 1.5, "of_bound": 0.5}
LOST = 1e-4  # a token may be another one only where its logit is this close to the largest
STREAMS = ("mamba", "rwkv", "neox")  # of the DELVE
FAMILIES = (*STREAMS, "qwen3")
WIDTHS, BATCHES = (512, 1024), (1, 8)


def config(name, D):
    """A family's config with layers of published proportions; "delve": the DELVE of STREAMS."""
    shared = {"vocab_size": V, "vocab_rows": V, "d_model": D, "n_layers": 4}
    if name == "delve":
        small = [(stream, presets._uniform(config(stream, D), KEEP)) for stream in STREAMS]
        return fuse.joint_config(small, connectors="hub")
    if name == "mamba":
        shared["n_layers"] = 8  # a layer has half the parameters of the others'
        return MambaConfig(**shared, d_inner=2 * D, dt_rank=D // 16, tie_embeddings=True)
    if name == "rwkv":
        return RwkvConfig(**shared, d_att=D, d_ffn=4 * D)
    if name == "neox":
        return NeoxConfig(**shared, n_heads=D // 64, d_ffn=4 * D)
    heads = D // 128
    return Qwen3Config(**shared, n_heads=heads, n_kv_heads=heads, head_dim=128, d_ffn=3 * D)


def weights(cfg):
    """Random ones; matrices of the layers times 4, so that the text does not repeat one token.

    Times 2 for Mamba and a DELVE: at 4 Mamba grows rounding until another token is the largest.
    """
    times = 2 if cfg.family in ("mamba", "delve") else 4

    def make(key):
        params = models.init_params(cfg, key)
        larger = lambda path, a: times * a if path[-1].key in ("kernel", "u") else a  # noqa: E731
        streams = params["streams"] if cfg.family == "delve" else {"": params}
        for tree in streams.values():
            tree["layers"] = jax.tree_util.tree_map_with_path(larger, tree["layers"])
        return params

    return jax.jit(make)(jax.random.key(0))


def step_bytes(cfg, batch, length):
    """Bytes that a step of `batch` rows has to move, float32, with `length` tokens in the caches.

    Every parameter but the rows of embeddings that no token looks up, states read and written,
    caches read.
    """
    numbers, streams = models.count(cfg), cfg.streams if cfg.family == "delve" else [("", cfg)]
    for _, sub in streams:
        if not sub.tie_embeddings:
            width = sub.d_model if sub.rank("embed") is None else sub.rank("embed")[0]
            numbers -= (sub.vocab_rows - batch) * width
        state = jax.eval_shape(lambda sub=sub: models.init_state(sub, batch, length))["layers"]
        moved = sum(a.size for a in jax.tree.leaves(state))
        numbers += moved if "k" in state else 2 * moved
    return 4 * numbers


def theirs(cfg, params, prompt_BT):
    """-> function of n: prompt and n new ids of transformers' greedy `generate`."""
    model = torch_model(cfg, params).eval()
    model.generation_config.eos_token_id = None  # all rows run to the end, as ours do
    model.generation_config.pad_token_id = 0
    ids = torch.tensor(prompt_BT).long()
    mask = torch.ones_like(ids)

    def generate(n):
        with torch.inference_mode():
            return model.generate(
                ids, attention_mask=mask, max_new_tokens=n, do_sample=False, use_cache=True
            ).numpy()

    return generate


def stacked(model, prompt_BT):
    """-> function of n: as `LM.generate`, its single steps in a loop over stacked layers."""

    def generate(n):
        most, lm.MOST_APART = lm.MOST_APART, 0
        try:
            return np.asarray(model.generate(prompt_BT, n))
        finally:
            lm.MOST_APART = most

    return generate


def checked(side, model, ours_BT, theirs_BT):
    """How far a text is from the greedy one of `model`; SystemExit where it is not that.

    Each token's logit, all tokens before it given, may lie LOST of the largest logit below the
    largest: so the cache, and the other side, are held against one uncached forward pass.
    """
    logits_BTV = np.asarray(model.logits(theirs_BT))[:, PROMPT - 1 : -1]
    chosen_BT1 = np.take_along_axis(logits_BTV, theirs_BT[:, PROMPT:, None], -1)
    lost = float((logits_BTV.max(-1) - chosen_BT1[..., 0]).max() / abs(logits_BTV).max())
    if not lost <= LOST:
        raise SystemExit(f"{side} {model.config.family}: a logit {lost:.2g} below the largest")
    new = theirs_BT[:, PROMPT:]
    return {
        "lost": lost, "same_tokens": float((ours_BT == theirs_BT)[:, PROMPT:].mean()),
        "distinct": min(len(set(row)) for row in new.tolist()),
    }  # fmt: skip


def measure(name, D, B, repeats):
    """One row: a step and a whole call of each side, and the step beside its bound."""
    cfg = config(name, D)
    params = weights(cfg)
    prompt_BT = np.random.default_rng(0).integers(1, V, (B, PROMPT)).astype(np.int32)
    model = LM(cfg, params)
    sides = {"ours": lambda n: np.asarray(model.generate(prompt_BT, n)),
             "ours, stacked": stacked(model, prompt_BT)}  # fmt: skip
    # an exported DELVE is our own code on their side; their rwkv writes other tokens in a batch
    # than alone: its rows do not pass `checked`
    if name != "delve" and (name != "rwkv" or B == 1):
        sides["transformers"] = theirs(cfg, params, prompt_BT)
    calls = {
        f"{side}, {n}": functools.partial(make, n) for side, make in sides.items() for n in (1, NEW)
    }
    moved = step_bytes(cfg, B, PROMPT + NEW // 2)
    ways, size = readers(moved)
    seconds, given = turns({**calls, **ways}, repeats)
    text = {side: given[f"{side}, {NEW}"] for side in sides}
    step = {
        side: [(all_ - first) / (NEW - 1) for first, all_ in
               zip(seconds[f"{side}, 1"], seconds[f"{side}, {NEW}"], strict=True)]
        for side in sides
    }  # fmt: skip
    found, call = summary(step), summary({side: seconds[f"{side}, {NEW}"] for side in sides})
    row = {
        "family": name, "d_model": D, "batch": B, "parameters": models.count(cfg),
        "prompt": PROMPT, "new": NEW, "step_bytes": moved,
        "tokens_per_second": {side: B / s for side, s in found["seconds"].items()}, **found,
        "call": call,
        "beyond_cache": models.count(cfg) >= last_level_cache(),  # float32: 4 bytes, 4 times
        "check": {s: checked(s, model, text["ours"], text[s]) for s in sides},
    }  # fmt: skip
    if "transformers" in sides:
        row["ratio"] = found["seconds"]["transformers"] / found["seconds"]["ours"]
        row["ratio_of_calls"] = call["seconds"]["transformers"] / call["seconds"]["ours"]
    read = summary({way: seconds[way] for way in ways})["seconds"]
    rates = {way: size / s for way, s in read.items()}
    row["bandwidth"] = {"bytes": size, "bytes_per_second": rates, "best": max(rates.values())}
    row["of_bound"] = moved / max(rates.values()) / found["seconds"]["ours"]
    return row


def picture(rows, file):
    """Ours over transformers in tokens a second, and ours over the bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(12, 3.8))
    cells = list(dict.fromkeys((r["d_model"], r["batch"]) for r in rows))
    for ax, key, unit in zip(
        axes, BARS, ("steps/s, DELVE / transformers", "steps/s / bound of the memory"), strict=True
    ):
        of = {(r["family"], r["d_model"], r["batch"]): r[key] for r in rows if key in r}
        names = list(dict.fromkeys(name for name, *_ in of))
        groups = {f"d {D}, batch {B}": [of.get((n, D, B)) for n in names]
                  for D, B in cells if any((n, D, B) in of for n in names)}  # fmt: skip
        goals = [BARS[key] if key == "ratio" or n == "delve" else None for n in names]
        if names:
            bars(ax, names, groups, unit, goals)
    fig.tight_layout()
    fig.savefig(file, dpi=150)


def main():
    every = (*FAMILIES, "delve")
    parser = arguments(__doc__, "decode_cpu", every)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="D; DELVE: largest")
    flags = parser.parse_args()
    quiet_torch()
    rows = old_rows(flags.out)
    for name in flags.only:
        for D in (max(flags.widths),) if name == "delve" else flags.widths:
            for B in BATCHES:
                make = functools.partial(measure, name, D, B, flags.repeats)
                rows = add_row(rows, ("family", "d_model", "batch"), make)
                rows.sort(key=lambda r: (every.index(r["family"]), r["d_model"], r["batch"]))
                write(
                    flags.out, rows, bars=BARS, keep=KEEP, seed=0, slowest=slowest(rows),
                    repeats=flags.repeats, torch=torch.__version__,
                    torch_threads=torch.get_num_threads(),
                    peers="transformers runs eager; its mamba and rwkv have no CPU kernels",
                )  # fmt: skip
    picture(rows, flags.out.with_suffix(".png"))
    print(f"{flags.out}: slowest step of one row {slowest(rows)} times transformers'")


def slowest(rows):
    """The least ratio that has a bar: of one row, any family and width (None: not measured)."""
    return min((r["ratio"] for r in rows if r["batch"] == 1 and "ratio" in r), default=None)


if __name__ == "__main__":
    main()
