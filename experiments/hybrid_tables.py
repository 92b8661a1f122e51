"""The tables of the hybrid studies: a part of `tables.py`, run by it."""

import json
from pathlib import Path

from speed_tables import table as _table

RESULTS = Path(__file__).resolve().parent / "results"
RESAMPLED = "intervals resample documents and seeds"


def hybrid_diversity() -> str:
    """What pools of the dense parents gain over the best of them."""
    r = json.loads((RESULTS / "hybrid_diversity.json").read_text())
    K, pools = len(r["names"]), ("even pool", "fitted pool", "fitted mixture")
    best = min(r["names"], key=lambda n: r["nll"][n])
    rows = [(x["source"], f"{x['tokens']:,}", f"{min(x['nll'][n] for n in r['names']):.4f}",
             *(f"{x['gain'][p]:+.4f}" for p in pools)) for x in r["rows"]]  # fmt: skip
    gain = {p: r["nll"][best] - r["nll"][p] for p in pools}
    rows.append(("**all**", f"{r['tokens']:,}", f"{r['nll'][best]:.4f} ({best})",
                 *(f"{gain[p]:+.4f}" for p in pools)))  # fmt: skip
    weights = ", ".join(
        f"{n} {w:.2f}" for n, w in zip(r["names"], r["weights"]["fitted pool"], strict=True)
    )
    pairs = [(r["kl"][i][j], r["names"][i], r["names"][j])
             for i in range(K) for j in range(K) if i != j]  # fmt: skip
    low, high = min(pairs), max(pairs)
    return "\n".join([
        "Nats a token that a pool gains over the best single parent of the same text:", "",
        *_table(("text", "tokens", "best parent", *pools), rows), "",
        f"Weights of the fitted (log-linear) pool: {weights}. KL between two parents: "
        f"{low[0]:.2f} ({low[1]} to {low[2]}) to {high[0]:.2f} ({high[1]} to {high[2]}) nats a "
        f"token; their losses correlate at {min(min(c) for c in r['correlation']):.2f} or more.",
    ])  # fmt: skip


def _mean(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _cells(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of the hybrid studies by their cell."""
    return {c: [r for r in rows if r["cell"] == c] for c in dict.fromkeys(r["cell"] for r in rows)}


def _gap(x: dict | None) -> str:
    """A paired difference with its interval, which resamples documents and seeds."""
    return f"{x['mean']:+.4f} [{x['low']:+.4f}, {x['high']:+.4f}]" if x else ""


def hybrid_parts() -> str:
    """What each part of a DELVE is worth."""
    r = json.loads((RESULTS / "hybrid_parts.json").read_text())
    cells, rows = _cells(r["rows"]), []
    for name in sorted(cells, key=lambda c: (c != "base", _mean(cells[c], "report"))):
        mine, gap = cells[name], r["against_base"].get(name, {})
        rows.append((name, f"{_mean(mine, 'parameters'):,.0f}", f"{len(mine)}",
                     f"{_mean(mine, 'step_0'):.4f}", f"{_mean(mine, 'report'):.4f}",
                     _gap(gap.get("report"))))  # fmt: skip
    head = ("cell", "parameters", "seeds", "step 0", "healed", "minus base, 95 %")
    lines = [
        f"Nats per token on {r['scored_tokens']:,} report tokens, {r['healing_tokens']:,} healing "
        "tokens each; one difference from `base` a cell. Means are of a cell's own seeds, "
        f"differences are paired, {RESAMPLED}:", "", *_table(head, rows),
    ]  # fmt: skip
    if "cross - self" in r["against_base"]:
        lines += ["", "Cross minus self connectors (the same parameters; self hears only its own "
                  f"stream): {_gap(r['against_base']['cross - self']['report'])}."]  # fmt: skip
    return "\n".join(lines)


def hybrid_elastic() -> str:
    """One healed DELVE at many sizes, beside one that was made for half of it."""
    r = json.loads((RESULTS / "hybrid_elastic.json").read_text())
    cells, rows = _cells(r["rows"]), []
    shares = [p["share"] for p in cells["elastic"][0]["at"]]
    for name in ("whole", "elastic", "half"):
        at = {share: [p["report"] for x in cells[name] for p in x["at"] if p["share"] == share]
              for share in shares}  # fmt: skip
        means = [f"{sum(each) / len(each):.4f}" if each else "" for each in at.values()]
        rows.append((name, f"{len(cells[name])}", f"{_mean(cells[name], 'step_0'):.4f}", *means))
    gap = r["elastic_minus_half"]["report"]
    each = ", ".join(f"{x:+.4f}" for x in gap["by_seed"])
    return "\n".join([
        f"Nats per token on {r['scored_tokens']:,} report tokens at shares of "
        f"{r['parameters']:,} parameters, {r['healing_tokens']:,} healing tokens each, mean of the "
        "seeds:", "", *_table(("cell", "seeds", "step 0", *(f"x {s:g}" for s in shares)), rows), "",
        f"Elastic at half minus a model made and healed at that size: {_gap(gap)} (seeds: {each}; "
        f"bar {r['bar']}; {RESAMPLED}).",
    ])  # fmt: skip


def hybrid_codes() -> str:
    """Vocabulary tables in common beside tables of their own, before and after healing."""
    r = json.loads((RESULTS / "hybrid_codes.json").read_text())
    cells = _cells(r["rows"])
    against = {}
    for cell in cells:
        tables, comma, length = cell.partition(",")
        against[cell] = r["difference"].get(f"{tables} - own{comma}{length}")
    rows = [(cell, f"{rows[0]['table_parameters']:,}", f"{rows[0]['parameters']:,}",
             f"{len(rows)}", f"{_mean(rows, 'step_0'):.4f}", f"{_mean(rows, 'report'):.4f}",
             _gap(against[cell])) for cell, rows in cells.items() if "try" not in cell]  # fmt: skip
    return "\n".join([
        f"Nats per token of {r['scored_tokens']:,} report tokens after {r['healing_tokens']:,} "
        f"tokens of healing (longer: {r['longer']:,}); in the last column minus `own` of the same "
        f"length and seeds, 95 %, {RESAMPLED}:", "",
        *_table(("tables", "parameters in tables", "in all", "seeds", "before healing", "healed",
                 "minus own"), rows),
    ])  # fmt: skip


def hybrid_pair() -> str:
    """A DELVE of the two parents that the pool wants, against dense ones."""
    r = json.loads((RESULTS / "hybrid_pair.json").read_text())
    cells, rows = _cells(r["rows"]), []
    for name in sorted(cells, key=lambda c: _mean(cells[c], "report")):
        if name.startswith("try"):
            continue
        mine, gaps = cells[name], r["delve_minus"].get(name, {})
        before = f"{_mean(mine, 'step_0'):.4f}" if "step_0" in mine[0] else ""
        size = _mean(mine, "parameters")
        rows.append((name, f"{size:,.0f} ({size / r['best']:.2f})", f"{len(mine)}", before,
                     f"{_mean(mine, 'report'):.4f}", _gap(gaps.get("dense rwkv"))))  # fmt: skip
    head = (
        "model",
        "parameters (of dense rwkv)",
        "seeds",
        "step 0",
        "nats",
        "minus dense rwkv, 95 %",
    )
    scored = {name: mine for name, mine in cells.items() if "fresh" in mine[0]}
    fresh = []
    for name in sorted(scored, key=lambda c: _mean(scored[c], "fresh")):
        gaps = r["delve_minus_fresh"].get(name, {})
        rivals = (_gap(gaps.get(rival)) for rival in ("dense rwkv", "healed rwkv, longest"))
        fresh.append((name, f"{len(scored[name])}", f"{_mean(scored[name], 'fresh'):.4f}", *rivals))
    last = ("model", "seeds", "nats", "minus dense rwkv", "minus healed rwkv, longest")
    return "\n".join([
        f"Nats per token on {r['scored_tokens']:,} report tokens; {r['healing_tokens']:,} tokens "
        f"of healing, `longer` {r['longer']:,}, `longest` {r['longest']:,}; {RESAMPLED}:", "",
        *_table(head, rows), "",
        f"On {r['fresh_windows']:,} windows of {r['fresh_documents']} other report documents, "
        "which no model of the study had read before:", "", *_table(last, fresh),
    ])  # fmt: skip


def hybrid_curve() -> str:
    """DELVE against what else the same parameters and tokens could be."""
    r = json.loads((RESULTS / "hybrid_curve.json").read_text())
    cells = _cells(r["rows"])
    gaps = {size: r["delve_minus"][size] for size in sorted(r["delve_minus"], key=float)}
    kinds = {kind for of_size in gaps.values() for kind in of_size}
    last = list(gaps)[-1]

    def told(kind, size):
        if kind not in gaps[size]:
            return "n/a"
        mean = f"{_mean(cells[f'{kind} {size}'], 'report'):.3f}"
        gap = gaps[size][kind]
        return f"{mean} ({gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}])"

    best = sorted(kinds, key=lambda kind: _mean(cells[f"{kind} {last}"], "report"))
    rows = [
        ("**DELVE**", *(f"**{_mean(cells[f'delve {size}'], 'report'):.3f}**" for size in gaps)),
        *((kind, *(told(kind, size) for size in gaps)) for kind in best),
    ]
    whole = {name.split()[1]: mine for name, mine in cells.items() if name.startswith("dense")}
    dense = ", ".join(
        f"{name} {_mean(mine, 'report'):.3f} ({_mean(mine, 'parameters'):,.0f})"
        for name, mine in sorted(whole.items())
    )
    seeds = min(len(cells[f"delve {size}"]) for size in gaps)
    return "\n".join([
        f"Nats per token of {r['scored_tokens']:,} report tokens after {r['healing_tokens']:,} "
        f"tokens of healing (or of training), {seeds} seeds; N in units of the largest parent "
        f"({r['largest']:,} parameters). In brackets DELVE minus it, 95 %: negative where the "
        f"DELVE is better; {RESAMPLED}:", "",
        *_table(("model", *(f"N = {size}" for size in gaps)), rows), "",
        f"Dense parents, not healed (parameters): {dense}. n/a: rank 1 everywhere is too large.",
    ])  # fmt: skip


def hybrid_tasks() -> str:
    """What DELVE, its parents and its rivals know: BLiMP and LAMBADA."""
    r = json.loads((RESULTS / "hybrid_tasks.json").read_text())
    cells = _cells(r["rows"])
    mean_bits = lambda x: sum(x["bits_per_byte"].values()) / len(x["bits_per_byte"])  # noqa: E731
    rows = [
        (name, f"{_mean(mine, 'parameters'):,.0f}", f"{len(mine)}",
         f"{_mean(mine, 'blimp'):.3f}", f"{_mean(mine, 'blimp_corrected'):.3f}",
         f"{_mean(mine, 'lambada'):.3f}", f"{_mean(mine, 'lambada_nats_per_token'):.3f}",
         f"{sum(map(mean_bits, mine)) / len(mine):.3f}")
        for name, mine in sorted(cells.items(), key=lambda x: -_mean(x[1], "blimp"))
    ]  # fmt: skip
    head = ("model", "parameters", "seeds", "BLiMP", "corrected", "LAMBADA", "its nats a token",
            "bits per byte")  # fmt: skip
    first = r["rows"][0]
    return "\n".join([
        f"BLiMP: accuracy over {len(first['blimp_each'])} paradigms, {r['pairs']} pairs each, and "
        "(accuracy - 1/2) / (1/2). LAMBADA: accuracy and nats a token of the last word, "
        f"{r['lambada_lines']} lines. Bits per byte: mean of {len(first['bits_per_byte'])} sources "
        "of report text. Pairs and lines are the same for all:", "", *_table(head, rows),
    ])  # fmt: skip


def hybrid_sources() -> str:
    """Bits per byte of each source of report text."""
    r = json.loads((RESULTS / "hybrid_tasks.json").read_text())
    cells, sources = _cells(r["rows"]), list(r["rows"][0]["bits_per_byte"])
    rows = [
        (source, *(f"{sum(x['bits_per_byte'][source] for x in mine) / len(mine):.3f}"
                   for mine in cells.values()))
        for source in sources
    ]  # fmt: skip
    return "\n".join(_table(("source", *cells), rows))
