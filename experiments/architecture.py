"""Draw docs/architecture.png: parents, factorised experts, streams with hub and gate, head, export.

Command: python experiments/architecture.py [--out FILE]   (seconds; matplotlib alone)
A drawing, not a measurement: three streams and three superblocks stand for any number of them.
Names and shape letters are those of delve_jax/models/__init__.py; docs/architecture.md explains it.
"""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "architecture.png"
INK, ACCENT, MUTED = "#222222", "#c4472b", "#7a8ca3"
PAPER, LIGHT, WARM = "#f6f8fa", "#e3e9ef", "#fbf1ee"
SIZE = (160, 88)  # units of the drawing; 10 pixels each, so that 800 pixels still show the words
LANES = (  # (y of the stream, parent, how it remembers)
    (63, "Mamba-1", "selective scan"),
    (47, "RWKV-4", "wkv"),
    (31, "GPT-NeoX", "attention"),
)
BLOCKS = ((64.5, "superblock 0"), (80.5, "superblock 1"), (99.5, "superblock S-1"))
HUBS = (76.2, 95.2)  # before every superblock but the first
WORDS = 8.6  # points, the smallest


class Drawing:
    """Boxes, words and arrows on one pair of axes."""

    def __init__(self, plt):
        self.plt = plt
        self.figure = plt.figure(figsize=(SIZE[0] / 16, SIZE[1] / 16), dpi=160)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, SIZE[0])
        self.axes.set_ylim(0, SIZE[1])
        self.axes.set_axis_off()

    def box(self, x, y, width, height, face="white", edge=INK, line=1.0, order=2, corner=0.8):
        """A rounded box with its lower left corner at (x, y)."""
        shape = self.plt.matplotlib.patches.FancyBboxPatch(
            (x, y), width, height, boxstyle=f"round,pad=0,rounding_size={corner}", facecolor=face,
            edgecolor=edge, linewidth=line, zorder=order,
        )  # fmt: skip
        self.axes.add_patch(shape)

    def words(self, x, y, text, size=WORDS, colour=INK, weight="normal", **how):
        """Text, centred at (x, y) unless `how` says otherwise."""
        how = {"ha": "center", "va": "center", "zorder": 6, "linespacing": 1.3} | how
        self.axes.text(x, y, text, fontsize=size, color=colour, weight=weight, **how)

    def arrow(self, start, end, colour=INK, line=1.2, dashed=False, order=3):
        """A straight arrow."""
        self.axes.annotate(
            "", end, start, zorder=order,
            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": line, "shrinkA": 0,
                        "shrinkB": 0, "mutation_scale": 9, "ls": "--" if dashed else "-"},
        )  # fmt: skip

    def path(self, points, colour=MUTED, line=1.2):
        """A dashed polyline without a head."""
        self.axes.plot(*zip(*points, strict=True), color=colour, lw=line, ls="--", zorder=1)


def parents(d: Drawing) -> None:
    """The dense parents, and each as factors."""
    d.words(10.5, 84, "dense parents", 11, weight="bold", va="baseline")
    d.words(10.5, 80, "folder, hub id, .pth", colour=MUTED)
    d.words(37, 84, "compress", 11, weight="bold", va="baseline")
    d.words(37, 80, r"$W \approx v\,u$, by rank", colour=MUTED)
    for y, name, memory in LANES:
        d.box(2, y - 5, 17, 10, LIGHT)
        d.words(10.5, y + 1.6, name, 10, weight="bold")
        d.words(10.5, y - 2.0, memory)
        d.arrow((19, y), (25.5, y))
        d.box(26, y - 4, 8, 8, LIGHT, MUTED, corner=0.2)
        d.words(30, y, "$W$", 11)
        d.words(35.7, y, r"$\approx$", 11)
        d.box(37.4, y - 4, 2.2, 8, WARM, ACCENT, corner=0.2)
        d.words(38.5, y, "$v$", 10, ACCENT)
        d.box(40.6, y + 1.8, 8, 2.2, WARM, ACCENT, corner=0.2)
        d.words(44.6, y + 2.85, "$u$", 10, ACCENT)
        d.arrow((49.2, y), (58.3, y))
    d.words(44.9, LANES[0][0] - 2.2, "[K, O]", colour=MUTED)
    d.words(38.7, LANES[0][0] - 5.8, "[I, K]", colour=MUTED)
    d.words(30, LANES[0][0] - 5.8, "[I, O]", colour=MUTED)
    d.words(37, 21.4, "one budget for all parents:\na knapsack over nats lost")


def streams(d: Drawing) -> None:
    """The widened residual stream: lanes of superblocks, the hub between them."""
    d.box(53.5, 17.5, 86, 60, PAPER, MUTED, 0.9, order=0, corner=1.6)
    d.words(96, 84, "fuse: one DELVE", 11, weight="bold", va="baseline")
    d.words(96, 80, "a stream a parent, side by side in one widened residual stream", colour=MUTED)
    tall = {"y": LANES[-1][0] - 6, "height": LANES[0][0] - LANES[-1][0] + 12}
    d.box(58.5, width=3, face=WARM, edge=ACCENT, **tall)
    d.words(60, 47, "token codes [V, K]", rotation=90)
    for y, _, _ in LANES:
        d.arrow((61.6, y), (113.4, y), order=1)
        for x, _ in BLOCKS:
            d.box(x, y - 4, 10, 8)
            for i in range(3):  # layers
                d.box(x + 1.6 + 2.5 * i, y - 2.6, 1.8, 5.2, LIGHT, MUTED, 0.7, 3, 0.2)
    for x, name in BLOCKS:
        d.words(x + 5, 72.3, name)
    for y, _, _ in LANES:  # superblocks that are left out
        d.box(91.3, y - 1, 3.2, 2, PAPER, PAPER, corner=0.2)
        for i in range(3):
            d.axes.plot(92.2 + 0.7 * i, y, ".", color=INK, ms=2.6, zorder=5)
    for x in HUBS:
        d.box(x, width=2.6, face=ACCENT, edge=ACCENT, order=4, **tall)
        d.words(x + 1.3, 47, "hub", 10, "white", "bold", rotation=90)
    d.words(87, 21.4, "hub and gate start exactly without effect: at step 0 the\n"
            "DELVE is the fitted pool of its compressed parents")  # fmt: skip


def head(d: Drawing) -> None:
    """Gate, pool, head and what leaves."""
    tall = {"y": LANES[-1][0] - 6, "height": LANES[0][0] - LANES[-1][0] + 12}
    d.box(113.5, width=3.2, face="white", edge=ACCENT, **tall)
    d.words(115.1, 47, "gate", 10, ACCENT, "bold", rotation=90)
    centre = (125, 47)
    for y, _, _ in LANES:
        d.arrow((116.8, y), (centre[0] - 3.6, centre[1] + (y - 47) * 0.17))
    circle = d.plt.Circle(centre, 3.9, facecolor="white", edgecolor=ACCENT, linewidth=1.4, zorder=4)
    d.axes.add_patch(circle)
    d.words(*centre, "pool", 10, ACCENT, "bold")
    d.words(125, 66.4, r"$\Sigma_k\, a_k(x)\, z_k$")
    d.words(125, 62.6, "or a mixture")
    d.box(133, width=3, face=WARM, edge=ACCENT, **tall)
    d.words(134.5, 47, "head codes [K, V]", rotation=90)
    d.arrow((129, 47), (132.9, 47))
    d.arrow((136.1, 47), (143.1, 47))
    d.words(151.5, 84, "export", 11, weight="bold", va="baseline")
    d.words(151.5, 80, "plain PyTorch", colour=MUTED)
    d.box(143.5, 36, 16, 22, LIGHT)
    d.words(151.5, 52.4, "Hugging Face\ndirectory", weight="bold")
    d.words(151.5, 42.6, "reloaded and\nits logits\ncompared")


def healing(d: Drawing) -> None:
    """The dense parents teach: what the losses reach."""
    d.path([(10.5, 25.7), (10.5, 8.5), (125, 8.5)])
    for x in HUBS:
        d.arrow((x + 1.3, 8.5), (x + 1.3, 17.2), MUTED, dashed=True)
    d.arrow((125, 8.5), (125, 42.6), MUTED, dashed=True)
    d.words(10.5, 5.2, "heal", 11, weight="bold")
    d.words(87, 5.2, "teachers: hidden match at the hubs, KL of each stream to its own parent, "
            "KL of the pool to the parents' pool, cross-entropy")  # fmt: skip


def draw(out: Path) -> None:
    """The picture as a PNG of 1600 pixels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    d = Drawing(plt)
    for part in (parents, streams, head, healing):
        part(d)
    out.parent.mkdir(parents=True, exist_ok=True)
    d.figure.savefig(out, facecolor="white")
    plt.close(d.figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
