"""Write the tables of README and docs/results.md from experiments/results; `--check`: in step?

Command: python experiments/tables.py   (experiments/quickstart.py --record writes quickstart.json)
"""

import json
import statistics
import sys
from pathlib import Path

from hybrid_tables import (
    hybrid_codes,
    hybrid_curve,
    hybrid_diversity,
    hybrid_elastic,
    hybrid_pair,
    hybrid_parts,
    hybrid_sources,
    hybrid_tasks,
)
from scipy import stats
from speed_tables import accelerator, decode, growth, loading, prefill
from speed_tables import table as _table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def quickstart() -> str:
    """The report of the quickstart with its measured time."""
    r = json.loads((RESULTS / "quickstart.json").read_text())
    lines = [
        "| model | parameters | bytes | bits per byte | nats per token | tokens/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in r["rows"]:
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {row['parameter_bytes']:,} | "
            f"{row['bits_per_byte']:.4f} | {row['nll_per_token']:.4f} | "
            f"{row['tokens_per_second']:,.0f} |"
        )
    lines.append("")
    lines.append(
        f"{r['seconds']:.0f} s on {r['machine']}, seed {r['seeds']['seed']}, "
        f"{r['rows'][0]['tokens']:,} report tokens, keep {r['keep']:.4f}; export reloaded in "
        f"transformers {r['versions']['transformers']}, max |Δlogit| "
        f"{r['export']['max_abs_diff']:.1e} at max |logit| {r['export']['max_abs_logit']:.1f}."
    )
    return "\n".join(lines)


def proxies() -> str:
    """The embedded parents."""
    rows = json.loads((RESULTS / "proxies.json").read_text())
    lines = [
        "| proxy | family | parameters | training tokens | bits per byte (report split) |",
        "|---|---|---:|---:|---:|",
    ]
    for name, r in sorted(rows.items()):
        lines.append(
            f"| {name} | {r['family']} | {r['parameters']:,} | {r['tokens']:,} | "
            f"{r['report']['bits_per_byte']:.4f} |"
        )
    return "\n".join(lines)


def interruption() -> str:
    """Killed and split runs against the one that was left alone."""
    r = json.loads((RESULTS / "interruption.json").read_text())
    lines = [
        f"Runs of {r['steps']} steps against the run left alone (`{r['command']}`):",
        "",
        "| run | kills | while saving | parameters differ by | losses differ by |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, x in r["rows"].items():
        lines.append(
            f"| {name} | {x.get('kills', '')} | {x.get('while_saving', '')} | "
            f"{x['parameters']:.1e} | {x['losses']:.1e} |"
        )
    return "\n".join(lines)


def sharding() -> str:
    """Sharded against single-device losses."""
    r = json.loads((RESULTS / "sharding.json").read_text())
    worst = {}
    for x in r["rows"]:
        key = x["family"], x["dtype"]
        worst[key] = max(worst.get(key, 0.0), x["difference"])
    meshes = list(dict.fromkeys(x["mesh"] for x in r["rows"]))
    lines = [
        f"Losses of {r['steps']} steps on {len(meshes)} meshes of 4 and 8 virtual devices "
        f"({'; '.join(meshes)}) against one device, largest relative difference:",
        "",
        "| family | float64 | float32 |",
        "|---|---:|---:|",
    ]
    for family in dict.fromkeys(f for f, _ in worst):
        lines.append(
            f"| {family} | {worst[family, 'float64']:.1e} | {worst[family, 'float32']:.1e} |"
        )
    return "\n".join(lines)


def optimisers() -> str:
    """Healing compressed proxies with four treatments of the factors."""
    r = json.loads((RESULTS / "factored_optim.json").read_text())
    names = list(r["chosen"])
    rows = r["report_nll_per_token"]
    lines = [
        f"Factored maps: compressed proxies healed on {r['tokens_per_run']:,} tokens, "
        "nats per token on the report split, mean of 3 seeds (± std), rates chosen on other text:",
        "",
        "| proxy | compressed | " + " | ".join(names) + " |",
        "|---|---:|" + "---:|" * len(names),
    ]
    for proxy, x in rows.items():
        cells = " | ".join(f"{x[n]['mean']:.4f} ± {x[n]['std']:.4f}" for n in names)
        lines.append(f"| {proxy} | {x['compressed']:.4f} | {cells} |")
    return "\n".join(lines)


def training() -> str:
    """Training speed beside PyTorch."""
    r = json.loads((RESULTS / "training_cpu.json").read_text())
    lines = [
        "Products: the ratio of PyTorch's products with all maps alone, forward and backward, as "
        "if all else took no time; by XLA: of XLA's, what ours could reach at most; kept: our time "
        "over that of a step that keeps all for its backward pass:",
        "",
        "| family | T | batch | ours, tokens/s | PyTorch, tokens/s | ratio | products | by XLA | "
        "kept |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    ceilings = ("ratio_of_products", "ratio_of_xla_products", "of_all_kept")
    for x in r["rows"]:
        rate = x["tokens_per_second"]
        lines.append(
            f"| {x['family']} | {x['T']:,} | {x['batch']} | {rate['ours']:,.0f} | "
            f"{rate['torch']:,.0f} | {x['ratio']:.2f} | "
            + " ".join(f"{x[k]:.2f} |" if k in x else " |" for k in ceilings)
        )
    return "\n".join(lines)


def compression() -> str:
    """Compression methods on every parent, and what the parts of ours are worth."""
    r = json.loads((RESULTS / "compression.json").read_text())
    return "\n\n".join(part for part in r["markdown"].values() if part)


def refinement() -> str:
    """Compressed proxies after their short distillation, and the ways that were compared."""
    r = json.loads((RESULTS / "refinement.json").read_text())
    lines = [
        f"Keep {r['keep']}, nats per token on {r['scored']:,} report tokens, mean of the seeds; "
        f"refined in {r['passes']} passes over at most {r['tokens']:,} distinct tokens (5 % of the "
        f"proxy's {r['trained_on']:,}; the calibration tokens are among them) and one over "
        f"{r['written']} times as many that the parent wrote:",
        "",
        "| parent (dense) | compressed | refined | recovered (each seed) | nats left | dense, "
        "trained alike (seed 0) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    report = [x for x in r["rows"] if x["split"] == "report"]
    chosen = [x for x in report if x["variant"] == r["chosen"]]
    alike = {x["parent"]: f"{x['refined']:.4f}" for x in report if x["variant"] == r["control"]}
    for name in dict.fromkeys(x["parent"] for x in chosen):
        mine = [x for x in chosen if x["parent"] == name]
        mean = {k: sum(x[k] for x in mine) / len(mine)
                for k in ("dense", "compressed", "refined", "recovered", "left")}  # fmt: skip
        seeds = ", ".join(f"{x['recovered']:.0%}" for x in mine)
        lines.append(
            f"| {name} ({mean['dense']:.4f}) | {mean['compressed']:.4f} | {mean['refined']:.4f} | "
            f"{mean['recovered']:.0%} ({seeds}) | {mean['left']:.4f} | {alike.get(name, '')} |"
        )
    varied = [x for x in r["rows"] if x["split"] == "choose"]
    lines += [
        "",
        "Ways compared on the choose split (seed 0, the same tokens):",
        "",
        "| parent | way | recovered | nats left | seconds |",
        "|---|---|---:|---:|---:|",
    ]
    for x in sorted(varied, key=lambda x: (x["parent"], x["recovered"])):
        lines.append(
            f"| {x['parent']} | {x['variant']} | {x['recovered']:.0%} | {x['left']:.4f} | "
            f"{x['seconds']['refine']:.0f} |"
        )
    return "\n".join(lines)


def shared_tables() -> str:
    """Vocabulary tables in common against tables of their own."""
    r = json.loads((RESULTS / "shared_tables.json").read_text())
    lines = [
        f"Nats per token above the dense parents, mean of the four, seeds {r['seeds']}, "
        f"{r['tokens']['scored']:,} report tokens:",
        "",
        "| kept share of the tables | own (rank) | in common (rank) |",
        "|---:|---:|---:|",
    ]
    for share in sorted({x["share"] for x in r["rows"]}, reverse=True):
        cells = []
        for how in ("own", "common"):
            mine = [x for x in r["rows"] if x["share"] == share and x["how"] == how]
            mean = sum(x["report"]["mean"] for x in mine) / len(mine)
            cells.append(f"{mean:.4f} ({mine[0]['rank']})")
        lines.append(f"| {share} | {' | '.join(cells)} |")
    return "\n".join(lines)


def delphi() -> str:
    """What the recipe and the fits reproduce, and the forecasts."""
    r = json.loads((RESULTS / "delphi.json").read_text())
    left = r["top_two_from_five"]
    c, cp = r["chinchilla"]["huber"], r["chinchilla"]["published"]
    names = ("E", "A", "B", "alpha", "beta")
    fit, law = ({k: f"{x[k]:.4g}" for k in names} for x in (c, cp))
    lines = [
        f"From the published grid (`{r['command']}`): {r['grid']['same']} of "
        f"{r['grid']['enumerated']} candidates exact, "
        f"hyper-parameters within {r['recipe']['rates_error']:.0e}, optima within "
        f"{r['optima_error']:.0e}. The two largest budgets from the five below them: "
        + ", ".join(f"{x['error']:+.2%}" for x in left)
        + ". Chinchilla's points: "
        + ", ".join(f"{k} {fit[k]} ({law[k]})" for k in names)
        + " (published re-analysis).",
        "",
        "| FLOPs | forecast loss, nats | 95 % interval | width | batch | tokens |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for x in r["forecasts"]:
        low, high = x["interval"]
        run = x["config"]
        lines.append(
            f"| {x['flops']:.0e} | {x['loss']:.4f} | {low:.4f} to {high:.4f} | {run['hidden']:,} | "
            f"{run['batch_size']:,} | {run['tokens']:.3g} |"
        )
    return "\n".join(lines)


def compress_memory() -> str:
    """Peak memory of `delve compress` on real shapes."""
    r = json.loads((RESULTS / "compress_memory.json").read_text())
    lines = [
        "| parent | layers run | calibration tokens | peak RSS | bar | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for x in r["rows"]:
        lines.append(
            f"| {x['row']} | {x['layers_run']} of {x['layers']} | {x['tokens']:,} | "
            f"{x['peak_rss'] / 2**30:.2f} GiB | {x['bar'] / 2**30:.0f} GiB | {x['seconds']:,.0f} "
            f"(load {x['load']:.0f}) |"
        )
    return "\n".join(lines)


def compress_accelerator() -> str:
    """Where the time of `delve compress` goes on an accelerator."""
    r = json.loads((RESULTS / "compress_accelerator.json").read_text())
    x = r["rows"][-1]
    rows = [
        (name, f"{s['seconds']:.0f}", f"{s['compile_seconds']:.0f}", f"{s['cpu_seconds']:.0f}")
        for name, s in x["stages"].items() if s["seconds"] >= 0.5
    ]  # fmt: skip
    rows.append(("**all**", f"**{x['seconds']:.0f}**", "", f"{x['cpu_seconds']:.0f}"))
    head = ("stage", "seconds", "of compiling, threads added up", "seconds of all cores")
    return "\n".join([
        f"{x['preset']}, {x['layers_run']} of {x['layers']} layers, {x['tokens']:,} tokens, keep "
        f"{x['keep']}, {x['device']}, {x['cores']} cores; {x['peak_rss'] / 2**30:.1f} GiB of the "
        f"host and {x['peak_device'] / 2**30:.1f} of the device at the peak:", "",
        *_table(head, rows),
    ])  # fmt: skip


def generation() -> str:
    """Tokens a second of factored models beside their dense parents."""
    r = json.loads((RESULTS / "generate_cpu.json").read_text())
    rows = [
        (f"{x['parent']}, {x['layers']} layers", x["form"], f"{x['parameters'] / 1e6:.1f} M",
         f"{x['parameter_bytes'] / 1e6:.0f} MB", f"{x['tokens_per_second']:.1f}",
         f"{x['ratio']:.2f}")
        for x in r["rows"]
    ]  # fmt: skip
    return "\n".join([
        f"Batch 1, keep {r['keep']} of all parameters, float32, one CPU core:", "",
        *_table(("parent", "form", "parameters", "size", "tokens/s", "times dense"), rows),
    ])  # fmt: skip


def ladder() -> str:
    """Our own ladder: what was forecast, and what came."""
    r = json.loads((RESULTS / "ladder.json").read_text())
    ref = r["reference"]
    text = [
        f"{len(r['ladder'])} runs at five budgets of {r['ladder'][0]['flops']:.0e} to "
        f"{r['ladder'][-1]['flops']:.1e} FLOPs (raw bytes; rates of the reference run: AdamH "
        f"{ref['recipe']['lr0']:g} and {ref['recipe']['adam_lr0']:g}). Forecasts were committed "
        "before their runs, three seeds each:", "",
    ]  # fmt: skip
    rows = []
    for c in [r["comparison"]] + [part["comparison"] for part in (r.get("far"),) if part]:
        low, high = c["interval"]
        rows.append((
            f"{c['flops']:.0e}", f"{c['times_the_largest_fitted']:.0f} x",
            f"{c['forecast']:.4f} [{low:.4f}, {high:.4f}]",
            f"{c['loss']:.4f} ± {c['spread_of_seeds']:.4f}", f"{c['error']:+.2%}",
            f"{sum(c['inside'])} of {len(c['inside'])}",
        ))  # fmt: skip
    text += _table(("FLOPs", "of the largest fitted", "forecast, nats a byte", "came", "error",
                    "inside"), rows)  # fmt: skip
    left = json.loads((RESULTS / "ladder_forecast.json").read_text())["fit"]["validation"]
    text += ["", "Leaving the largest budgets out beforehand: errors of "
             f"{left['rms_error']:.1%} rms, at most {left['largest_error']:.1%}, {left['covered']} "
             f"of {left['of']} inside their intervals."]  # fmt: skip
    if "optimizers" in r:
        x = r["optimizers"]
        sides = {n: (v["losses"], v["lr"]) for n, v in x.items() if isinstance(v, dict)}
        tuned = {name: min(x["loss"] for x in ref[name]) for name in ("adamh", "adamw")}
        text += ["", *_optimizers(x["flops"], x["hidden"], sides),
                 f"At the reference run, one seed: {tuned['adamh']:.4f} against "
                 f"{tuned['adamw']:.4f}."]  # fmt: skip
    if "far" in r:
        x = r["far"]["rows"]
        sides = {n: ([row["loss"] for row in v], v[0]["lr"]) for n, v in x.items()}
        text += ["", *_optimizers(x["adamh"][0]["flops"], x["adamh"][0]["hidden"], sides)]
    return "\n".join(text)


def _optimizers(flops, hidden, sides) -> list[str]:
    """A table of losses by optimiser, and AdamH minus AdamW by seed."""
    rows = [
        (name, f"{lr:.3g}", f"{statistics.mean(each):.4f}", ", ".join(f"{x:.4f}" for x in each))
        for name, (each, lr) in sides.items()
    ]
    gap = [a - b for a, b in zip(sides["adamh"][0], sides["adamw"][0], strict=True)]
    mean = statistics.mean(gap)
    half = float(stats.t.ppf(0.975, len(gap) - 1)) * statistics.stdev(gap) / len(gap) ** 0.5
    return [
        f"At {flops:.1e} FLOPs, width {hidden}:", "",
        *_table(("optimiser", "peak rate", "nats a byte", "seeds"), rows), "",
        f"AdamH minus AdamW, paired by seed: {mean:+.4f} nats a byte "
        f"[{mean - half:+.4f}, {mean + half:+.4f}] (95 %, t of {len(gap)} seeds).",
    ]  # fmt: skip


def lora() -> str:
    """Adapters on the factors of an exported DELVE, or beside them."""
    r = json.loads((RESULTS / "lora.json").read_text())
    names = {"all": "every weight", "factors": "on u and v", "beside": "beside the map"}
    rows = [
        (
            names[s["way"]],
            f"{s['rank']}" if s["rank"] else "",
            f"{s['trained_parameters']:,}",
            f"{s['rate']:g}",
            f"{s['mean']:.4f} ± {s['std']:.4f}",
        )
        for s in r["summary"]
    ]
    return "\n".join([
        f"{r['steps']} steps of {r['batch']} x {r['window']} tokens of film reviews, "
        f"{r['scored']:,} report tokens, three seeds; untuned {r['untuned']['report']:.4f} nats a "
        "token. Rank: of the adapters on u and v; one beside has about as many weights:", "",
        *_table(("trained", "rank", "parameters", "rate", "nats a token"), rows),
    ])  # fmt: skip


def tiers() -> str:
    """The DELVE tiers at full shape, compiled without weights."""
    r = json.loads((RESULTS / "tiers.json").read_text())
    rows = []
    for x in r["rows"]:
        if " step " not in x["row"] and " decode" not in x["row"]:
            continue
        size = x["bytes"].get("peak", sum(v for v in x["bytes"].values()))
        fits = {True: "yes", False: "NO"}.get(x.get("fits"), "")
        rows.append((x["row"], f"{x['parameters']:,}", f"{size / 2**30:.1f}", fits,
                     f"{x.get('hours', 0):,.1f}" if "hours" in x else "",
                     f"{x['compile_seconds']:.0f}"))  # fmt: skip
    return "\n".join(_table(
        ("what", "parameters", "GiB a device", "fits", "hours", "seconds to compile"), rows
    ))  # fmt: skip


BLOCKS = (
    quickstart, proxies, interruption, sharding, training, optimisers, compression,
    shared_tables, refinement, generation, decode, prefill, growth, loading, accelerator,
    compress_memory, compress_accelerator,
    hybrid_diversity, hybrid_curve, hybrid_tasks, hybrid_sources, hybrid_parts, hybrid_pair,
    hybrid_elastic, hybrid_codes, delphi, ladder, lora, tiers,
)  # fmt: skip


def main(argv=None) -> int:
    """Fill (or check) every `<!-- NAME --> ... <!-- /NAME -->` block; each stands on one page."""
    pages = {page: page.read_text() for page in PAGES}
    old = dict(pages)
    for make in BLOCKS:
        start, end = f"<!-- {make.__name__} -->", f"<!-- /{make.__name__} -->"
        (page,) = (p for p, text in pages.items() if start in text)
        before, rest = pages[page].split(start)
        pages[page] = f"{before}{start}\n{make()}\n{end}{rest.split(end)[1]}"
    if "--check" in (argv if argv is not None else sys.argv[1:]):
        return int(pages != old)
    for page, text in pages.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
