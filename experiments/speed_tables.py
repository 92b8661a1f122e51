"""The tables of what is measured beside peers and bars: a part of `tables.py`, run by it.

Results of experiments/benchmarks/{decode,prefill,growth,loading}.py, on a GPU of those named in
`accelerator`; one that is absent is said so.
"""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
NOT_MEASURED = "Not measured yet."


def table(head: tuple, rows: list[tuple]) -> list[str]:
    """Lines of a table: the first column is text, the others are numbers."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _measured(name: str, where: str = "cpu") -> dict | None:
    """A benchmark's result, None where it was not run on a quiet machine yet."""
    file = RESULTS / f"{name}_{where}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _met(value: float, bar: float, least: bool = True) -> str:
    """A value beside its bar; one that misses it stands in bold."""
    good = value >= bar if least else value <= bar
    return f"{value:.2f} ({bar:g})" if good else f"**{value:.2f}** ({bar:g})"


def decode() -> str:
    """Greedy decoding beside transformers, and a DELVE's beside its bound."""
    r = _measured("decode")
    if r is None:
        return NOT_MEASURED
    rows = []
    for x in r["rows"]:
        rate, bound = x["tokens_per_second"], x.get("of_bound")
        ratio = f"{x['ratio']:.2f}" if "ratio" in x else ""
        if "ratio" in x and x["batch"] == 1:
            ratio = _met(x["ratio"], r["bars"]["ratio"])
        of_bound = "" if bound is None else f"{bound:.2f}"
        if bound is not None and x["family"] == "delve" and x["beyond_cache"]:
            of_bound = _met(bound, r["bars"]["of_bound"])
        rows.append((x["family"], f"{x['d_model']:,}", f"{x['batch']}",
                     f"{x['parameters'] / 1e6:.1f} M", f"{rate['ours']:,.1f}",
                     f"{rate['ours, stacked']:,.1f}" if "ours, stacked" in rate else "",
                     f"{rate['transformers']:,.1f}" if "transformers" in rate else "", ratio,
                     f"{x['ratio_of_calls']:.2f}" if "ratio_of_calls" in x else "",
                     of_bound))  # fmt: skip
    first = r["rows"][0]
    return "\n".join([
        f"float32, {len(r['machine']['cores'])} cores, {first['prompt']} tokens of prompt, "
        f"{first['new']} new ones; bars in brackets, missed ones bold. A step is a token of every "
        "row, prefill left out; a call has it. Stacked: layers in a loop, as before. The bound is "
        "the bytes of a step over the rate at which so many are read in the same run (a bar only "
        "for a DELVE whose weights are 4 times the last-level cache, here "
        f"{r['machine']['last_level_cache'] >> 20} MiB); it keeps {r['keep']} of its parents:", "",
        *table(("family", "width", "batch", "parameters", "ours, tokens/s", "stacked",
                 "transformers, tokens/s", "step", "call", "of the bound"), rows),
    ])  # fmt: skip


def prefill() -> str:
    """Prompts read beside the peers."""
    r = _measured("prefill")
    if r is None:
        return NOT_MEASURED
    peers = ("transformers", "torch.compile", "mambapy", "rwkv")
    rows = [
        (x["family"], f"{x['d_model']:,}", f"{x['T']:,}", f"{x['tokens_per_second']['ours']:,.0f}",
         *(f"{x['tokens_per_second'][p]:,.0f}" if p in x["ratios"] else "" for p in peers),
         _met(x["ratio"], x["bar"]),
         f"{x['ratio_of_products']:.2f}" if "ratio_of_products" in x else "")
        for x in r["rows"]
    ]  # fmt: skip
    missing = sorted({x["missing"] for x in r["rows"] if "missing" in x})
    text = [
        "Tokens/s of one row, float32; ratio to the fastest eager peer, its bar in brackets, bold "
        "where missed. Products: the ratio of PyTorch's products with the layers' maps alone, as "
        "if all else took no time:", "",
        *table(("family", "width", "T", "ours", *peers, "ratio", "products"), rows),
    ]  # fmt: skip
    return "\n".join(text + ["", f"Not installed there: {', '.join(missing)}."] * bool(missing))


def growth() -> str:
    """Exponents of time and memory along every axis."""
    r = _measured("growth")
    if r is None:
        return NOT_MEASURED
    rows = []
    for axis, families in r["slopes"].items():
        for family, kinds in families.items():
            mine = [x["value"] for x in r["rows"] if (x["axis"], x["family"]) == (axis, family)]
            cells = [f"{kinds[k]['seconds']:.2f}" for k in ("forward", "step")]
            if axis == "T" and family in ("mamba", "rwkv"):
                cells = [_met(kinds[k]["seconds"], r["max_slope"], least=False)
                         for k in ("forward", "step")]  # fmt: skip
            memory = [f"{kinds[k]['bytes']:.2f}" for k in ("forward", "step")]
            rows.append((f"{axis}, {min(mine):,} to {max(mine):,}", family, *cells, *memory))
    b = r["base"]
    return "\n".join([
        f"Exponent of growth (slope of the logs) from width {b['width']}, {b['depth']} layers, "
        f"{b['batch']} row of {r['short_T']} tokens; bars in brackets, missed ones bold:", "",
        *table(("axis", "family", "forward, time", "step, time", "forward, memory",
                 "step, memory"), rows),
    ])  # fmt: skip


def loading() -> str:
    """Weights loaded beside a plain read, and start-up."""
    r = _measured("loading")
    if r is None:
        return NOT_MEASURED
    rows = [
        (x["case"], f"{x['bytes'] / 1e6:,.0f} MB", f"{x['bytes_per_second']['load'] / 1e9:.2f}",
         f"{x['bytes_per_second']['plain read'] / 1e9:.2f}",
         _met(x["ratio"], x["bar"]) if x["bar"] else f"{x['ratio']:.2f}")
        for x in r["rows"] if "ratio" in x
    ]  # fmt: skip
    text = table(("what", "size", "load, GB/s", "plain read, GB/s", "ratio"), rows) if rows else []
    for x in r["rows"]:
        if "bars" in x:
            took = ", ".join(f"{name} {_met(x['seconds'][key], x['bars'][key], least=False)} s"
                             for name, key in (("`import delve_jax`", "import"),
                                               ("help of `delve`", "help")))  # fmt: skip
            alone = x["seconds"]["python alone"]
            text += ["", f"Start-up: {took}; Python alone {alone:.2f} s."]
    return "\n".join(["Files in the page cache; bars in brackets, missed ones bold:", "", *text])


def accelerator() -> str:
    """What was measured on a GPU: scans beside peers and their floor, training, decoding."""
    peers, tiles, mfu, decode = (
        _measured(name, "gpu") for name in ("scan_peers", "scan_tiles", "mfu", "decode_keep")
    )
    if not (peers and tiles and mfu and decode):
        return NOT_MEASURED
    rows = []
    for x in peers["rows"]:
        ms = {side: f"{1e3 * seconds:.3g}" for side, seconds in x["seconds"].items()}
        rows.append((f"{x['recurrence']}, {x['pass']}", " x ".join(map(str, x["shape"])),
                     ms["ours, pallas"], ms["ours, chunked"], ms.get("fla", ""),
                     ms.get("mamba-ssm", "")))  # fmt: skip
    lines = [
        f"{mfu['machine']['device']}, jax {mfu['versions']['jax']}. Scans in bfloat16, "
        "milliseconds a call:", "",
        *table(("pass", "shape", "kernel", "chunked", "fla", "mamba-ssm"), rows), "",
    ]  # fmt: skip
    best = []
    for name in ("wkv", "mamba"):
        # what ran beside call 4 of a lent machine made its times too long
        mine = [
            x
            for x in tiles["rows"]
            if x["recurrence"] == name and x.get("call") != 4 and "dropped" not in x
        ]
        for what in ("forward", "backward"):
            x = min(mine, key=lambda x: x[f"{what}_over_floor"])
            bar = {"forward": 2.5, "backward": 3.5}[what] if name == "mamba" else None
            over = x[f"{what}_over_floor"]
            told = f"{over:.2f}" if bar is None else _met(over, bar, least=False)
            how = x["variant"]
            tokens = how["unroll"] if what == "forward" else how["chunk"]
            best.append((f"{name}, {what}", f"{how[what]}, {tokens}", f"{x['ms'][what]:.2f}", told))
    lines += [
        "The best of all tiles at 8 rows of 4,096 tokens and 4,096 channels (Mamba: N 16), over "
        "the floor of the memory's bandwidth; a backward pass with what keeping states costs the "
        "forward one; bars in brackets, missed ones bold:", "",
        *table(("pass", "tile, tokens a turn", "ms", "times the floor"), best), "",
    ]  # fmt: skip
    bars = {"qwen3-1b": 0.5, "delve-0.4b": 0.35}
    rows = [
        (x["case"], f"{x['rows']} x {x['T']:,}", x["remat"],
         "together" if int(x["across"]) else "apart",
         "float32" if "before" in x else "bfloat16", f"{x['tokens_per_second']:,.0f}",
         f"{1e3 * x['step_s']:.0f}",
         _met(x["mfu"], bars[x["case"]]) if x["case"] in bars else f"{x['mfu']:.2f}",
         f"{x['mfu_causal']:.2f}",
         f"{x['peak_bytes'] / 2**30:.1f}")
        for x in mfu["rows"] if "failed" not in x
    ]  # fmt: skip
    lines += [
        "Training steps (AdamW, bfloat16 activations, float32 weights). MFU of 989 TFLOP/s with "
        "attention over all of T, then with the half that a causal kernel computes. The DELVE is "
        "healed with its three dense parents as teachers:",
        "",
        *table(("case", "rows x T", "remat", "documents", "head's gradient", "tokens/s", "ms",
                "MFU", "causal", "GiB"), rows), "",
    ]  # fmt: skip
    rows = []
    for x in decode["rows"]:
        if "failed" in x or x["xla"].strip():
            continue
        dense, kept = x["dense"], x["kept"]
        how = "stacked, dropped kernel" if x.get("matvec") else x.get("layers", "stacked")
        rows.append((x["case"], how,
                     f"{dense['tokens_per_second']:,.0f}", f"{kept['tokens_per_second']:,.0f}",
                     _met(x["ratio"], 2.5), f"{dense['of_bound']:.2f}",
                     f"{kept['of_bound']:.2f}"))  # fmt: skip
    lines += [
        f"Decoding one row in bfloat16, {decode['rows'][0]['new']} tokens after "
        f"{decode['rows'][0]['prompt']}: dense, and a quarter kept in factors. Layers apart: each "
        "has arrays of its own, as `generate` does it now; stacked: XLA copies them out of one. "
        "The dropped kernel read them where they stand in it:", "",
        *table(("shape", "layers", "dense, tokens/s", "kept, tokens/s", "ratio",
                "dense of its bound", "kept of its bound"), rows),
    ]  # fmt: skip
    if training := _measured("training", "gpu"):
        rows = [(x["family"], f"{x['batch']} x {x['T']:,}",
                 *(f"{x['tokens_per_second'][side]:,.0f}" for side in ("ours", "torch")),
                 f"{x['ratio']:.1f}") for x in training["rows"]]  # fmt: skip
        lines += ["", "Training at width 512 beside transformers (eager, bfloat16 by autocast, "
                  "fused AdamW), 4 layers:", "",
                  *table(("family", "rows x T", "ours, tokens/s", "PyTorch", "ratio"),
                         rows)]  # fmt: skip
    return "\n".join(lines)
