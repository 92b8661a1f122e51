"""The tables of what is measured beside peers and bars: a part of `tables.py`, run by it.

Results of experiments/benchmarks/{decode,prefill,growth,loading}.py; one that is absent is said so.
"""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
NOT_MEASURED = "Not measured yet."


def table(head: tuple, rows: list[tuple]) -> list[str]:
    """Lines of a table: the first column is text, the others are numbers."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _measured(name: str) -> dict | None:
    """A benchmark's result, None where it was not run on a quiet machine yet."""
    file = RESULTS / f"{name}_cpu.json"
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
        if bound is not None and x["family"] == "delve":
            of_bound = _met(bound, r["bars"]["of_bound"])
        rows.append((x["family"], f"{x['d_model']:,}", f"{x['batch']}",
                     f"{x['parameters'] / 1e6:.1f} M", f"{rate['ours']:,.1f}",
                     f"{rate['transformers']:,.1f}" if "transformers" in rate else "", ratio,
                     f"{x['ratio_of_calls']:.2f}" if "ratio_of_calls" in x else "",
                     of_bound))  # fmt: skip
    first = r["rows"][0]
    return "\n".join([
        f"float32, {len(r['machine']['cores'])} cores, {first['prompt']} tokens of prompt, "
        f"{first['new']} new ones; bars in brackets, missed ones bold. A step is a token of every "
        "row, prefill left out; a call has it. The bound is the bytes of a step over the "
        "bandwidth of the same run, where the weights are 4 times the last-level cache; the DELVE "
        f"keeps {r['keep']} of its parents:", "",
        *table(("family", "width", "batch", "parameters", "ours, tokens/s",
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
         _met(x["ratio"], x["bar"]))
        for x in r["rows"]
    ]  # fmt: skip
    missing = sorted({x["missing"] for x in r["rows"] if "missing" in x})
    text = [
        "Tokens/s of one row, float32; ratio to the fastest eager peer, its bar in brackets, bold "
        "where missed:", "",
        *table(("family", "width", "T", "ours", *peers, "ratio"), rows),
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
