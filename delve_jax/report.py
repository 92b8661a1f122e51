"""The table and the picture of an upcycle report, both made from report.json alone."""

from __future__ import annotations

from pathlib import Path

INK, ACCENT, MUTED = "#222222", "#c4472b", "#7a8ca3"


def table(report: dict) -> str:
    """The rows as aligned text."""
    head = ("model", "parameters", "bytes", "bits per byte", "nats per token", "tokens/s")
    rows = [
        (
            r["name"], f"{r['parameters']:,}", f"{r['parameter_bytes']:,}",
            f"{r['bits_per_byte']:.4f}", f"{r['nll_per_token']:.4f}",
            f"{r['tokens_per_second']:,.0f}",
        )
        for r in report["rows"]
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = lambda row: "  ".join(  # noqa: E731
        cell.ljust(w) if i == 0 else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, rows)])


def picture(report: dict, path: str | Path) -> None:
    """Parameters against bits per byte: dense parents, compressed parents, DELVE."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=150)
    for row in rows:
        name = row["name"]
        delve, small = name.startswith("DELVE"), name.endswith(" compressed")
        colour = ACCENT if delve else MUTED if small else INK
        marker = "D" if delve else "v" if small else "o"
        x, y = row["parameters"] / 1e6, row["bits_per_byte"]
        axes.scatter(x, y, color=colour, marker=marker, s=46, zorder=3)
        # labels of compressed parents go left, those of dense ones right: they stand close together
        axes.annotate(name, (x, y), xytext=(-7 if small else 7, -3), textcoords="offset points",
                      ha="right" if small else "left", fontsize=8, color=colour)  # fmt: skip
    points = {r["name"]: (r["parameters"] / 1e6, r["bits_per_byte"]) for r in rows}
    for name, start in points.items():
        end = points.get(f"{name} compressed")
        if end:
            axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#cccccc"})
    if "DELVE healed" in points:
        axes.annotate("", points["DELVE healed"], points["DELVE at step 0"],
                      arrowprops={"arrowstyle": "->", "color": ACCENT})  # fmt: skip
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel("bits per byte on held-back text")
    axes.set_title(f"Upcycle at keep {report['keep']:.3f} of the parents' sum", fontsize=10)
    axes.grid(color="#eeeeee")
    axes.margins(x=0.36, y=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
