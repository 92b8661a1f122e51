"""Write the README tables from experiments/results/*.json; `--check` says whether they agree.

Command: python experiments/tables.py   (experiments/quickstart.py --record writes quickstart.json)
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"


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


def main(argv=None) -> int:
    """Fill (or check) every `<!-- NAME --> ... <!-- /NAME -->` block."""
    readme = ROOT / "README.md"
    text = old = readme.read_text()
    for name, make in (("quickstart", quickstart), ("proxies", proxies)):
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{make()}\n{end}{rest.split(end)[1]}"
    if "--check" in (argv if argv is not None else sys.argv[1:]):
        return int(text != old)
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
