"""Tables and pictures of reports, made from the files that the verbs leave and nothing else."""

from __future__ import annotations

from pathlib import Path

INK, ACCENT, MUTED = "#222222", "#c4472b", "#7a8ca3"
KINDS = (INK, ACCENT, MUTED, "#d99a2b", "#4b7f52", "#8a5a9e", "#2f6f9f", "#b07a62", "#a0a060")
GLYPHS = str.maketrans(" \n\t", "\u00b7\u21b5\u2192")  # in labels
FLOOR = 1e-9  # of a spectrum that is drawn


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


def ranks_picture(facts: dict, spectra: dict, path: str | Path) -> None:
    """What compress.json and spectra.npz say: the rank of every map and layer, and the spectra.

    Colours are shares of the largest rank that is cheaper than the dense map.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    maps, dense, neurons = facts["maps"], facts["dense"], facts["neurons"]
    names = [*dense, *maps]
    names.sort(key=lambda n: (n not in ("embed", "head"), n))
    rows = [f"neurons of {max(facts['neurons_before'], 1):,}"] if neurons else []
    L = max([len(m["ranks"]) for m in maps.values()] + [len(neurons)])
    height = max(3.4, 1.4 + 0.36 * (len(names) + len(rows)))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11.5, height), dpi=150, width_ratios=(1.25, 1), layout="constrained"
    )
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("ranks", ["#fbf1ee", ACCENT])
    small = L <= 16  # room for numbers

    def cell(x: int, y: int, share: float, text: str, width: int = 1) -> None:
        box = plt.Rectangle((x, y), width, 1, facecolor=shades(min(share, 1.0)), edgecolor="white",
                            linewidth=0.8 if small else 0.2)  # fmt: skip
        left.add_patch(box)
        if small:
            left.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=7,
                      color="white" if share > 0.6 else INK)  # fmt: skip

    for y, name in enumerate(names):
        if name in dense:
            box = plt.Rectangle((0, y), L, 1, facecolor="#eef1f4", edgecolor="white", hatch="///")
            left.add_patch(box)
            pruned = neurons and facts["neurons_before"] in dense[name]
            word = "dense, at fewer neurons" if pruned else "dense"
            left.text(L / 2, y + 0.5, word, ha="center", va="center", fontsize=8, color=MUTED)
            continue
        (n_in, n_out), ranks = maps[name]["shape"], maps[name]["ranks"]
        most = (n_in * n_out - 1) // (n_in + n_out)
        for x, rank in enumerate(ranks):
            if rank:
                cell(x, y, rank / most, str(rank), L if len(ranks) < L else 1)
            else:
                left.plot(x + 0.5, y + 0.5, marker="x", color=INK, markersize=5 if small else 3)
    for x, kept in enumerate(neurons):
        cell(x, len(names), kept / facts["neurons_before"], str(kept))
    left.set_xlim(0, L)
    left.set_ylim(len(names) + len(rows), 0)
    ticks = range(0, L, max(1, -(-L // 12)))
    left.set_xticks([t + 0.5 for t in ticks], [str(t) for t in ticks])
    left.set_yticks([y + 0.5 for y in range(len(names) + len(rows))], names + rows, fontsize=8)
    left.tick_params(length=0, labelsize=8)
    right.tick_params(labelsize=8)
    left.set_xlabel("layer (a table has none)", fontsize=9)
    left.set_title("rank over the largest useful rank; x: dropped", fontsize=9)
    scale = matplotlib.cm.ScalarMappable(cmap=shades)
    bar = figure.colorbar(scale, ax=left, fraction=0.03, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=0)

    for colour, name in zip(KINDS * 2, [n for n in names if n in maps], strict=False):
        energy_LK = spectra[name.replace("/", ".")]
        scaled_LK = energy_LK / energy_LK[:, :1].clip(1e-300)
        K = scaled_LK.shape[1]
        mean_K = scaled_LK.mean(0).clip(FLOOR)
        right.plot([(i + 1) / K for i in range(K)], mean_K, color=colour, linewidth=1.2, label=name)
        rank = sum(maps[name]["ranks"]) / len(maps[name]["ranks"])
        if rank >= 1:
            right.plot(rank / K, mean_K[int(rank) - 1], "o", color=colour, markersize=5)
    right.set_yscale("log")
    right.set_xlim(0, 1)
    right.set_xlabel("rank over the narrow side", fontsize=9)
    right.set_ylabel("energy over the largest", fontsize=9)
    right.set_title("spectra, mean of the layers; dots: mean rank kept", fontsize=9)
    right.grid(color="#eeeeee")
    right.legend(fontsize=7, frameon=False, ncols=2, loc="lower left")
    for axes in (left, right):
        for side in ("top", "right", *(("left", "bottom") if axes is left else ())):
            axes.spines[side].set_visible(False)
    measured = facts["measured"]
    title = f"{facts['ratio']:.1%} of {facts['parameters_before']:,} parameters"
    if measured:
        title += f"; KL {measured['kl']:.4f}"
        if facts["expected_kl"] is not None:
            title += f" (expected {facts['expected_kl']:.4f})"
        title += f", nll {measured['nll_before']:.4f} to {measured['nll_after']:.4f} nats a token"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def inspection_picture(report: dict, path, alarm: float) -> None:
    """What inspect.json holds: nll of all models, gains by token group, the pool's weights along a
    text, the hub's ratios."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, pool = list(report["streams"]), report["pool"]
    figure, axes = plt.subplot_mosaic(
        [["nll", "gain"], ["gate", "gate"], ["number", "hub"]], figsize=(11.5, 11), dpi=150,
        height_ratios=(1.35, 1, 0.9), layout="constrained",
    )  # fmt: skip

    bars = [("hybrid", report["nll_per_token"], ACCENT)]
    for name in dict.fromkeys([*names, *report["parents"]]):
        for word, kind, colour in (("dense", "parents", INK), ("stream", "streams", MUTED)):
            if row := report[kind].get(name):
                bars.append((f"{name}, {word}", row["nll_per_token"], colour))
    ax = axes["nll"]
    ax.barh([b[0] for b in bars], [b[1] for b in bars], color=[b[2] for b in bars], height=0.7)
    for y, (_, value, _) in enumerate(bars):
        ax.text(value, y, f" {value:.3f}", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.14)
    ax.set_xlabel("nats per token", fontsize=9)
    ax.set_title("the hybrid, dense parents, and streams as they stand in it", fontsize=9)

    ax, ticks = axes["gain"], []
    groups = [{"all tokens": report["gain"]}]
    groups += [report[f"by_{kind}"] for kind in ("type", "copying", "position")]
    for block, group in enumerate(groups):
        for name, g in group.items():
            y = len(ticks) + 0.6 * block  # a gap between groupings
            low, high = g["interval"] or (g["gain"], g["gain"])
            colour = ACCENT if low > 0 else INK if high < 0 else MUTED
            ax.plot([low, high], [y, y], color=colour, linewidth=2)
            ax.plot(g["gain"], y, "o", color=colour, markersize=5)
            ticks.append((y, f"{name} ({g['share']:.0%})"))
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_yticks(*zip(*ticks, strict=True))
    ax.invert_yaxis()
    ax.grid(axis="x", color="#eeeeee")
    kind = "dense parent" if report["compared_with"] == "parents" else "of its own streams"
    ax.set_xlabel(f"nats per token better than {report['best']}, the best {kind}", fontsize=9)
    drawn = f"95 % interval over {report['intervals_over']}"
    ax.set_title(f"gain and {drawn} (grey: contains zero), share of tokens", fontsize=9)

    ax, tokens = axes["gate"], report["example"]["tokens"]
    weights = [[*w, w[-1]] for w in (report["example"]["weights"][name] for name in names)]
    colours = [KINDS[k % len(KINDS)] for k in range(len(names))]
    edges = [x - 0.5 for x in range(len(tokens) + 1)]
    ax.stackplot(edges, weights, colors=colours, labels=names, step="post")
    shown = [t.translate(GLYPHS) for t in tokens]
    shown = [t if len(t) <= 12 else t[:10] + "\u2026" for t in shown]
    shown = ["".join(c if c.isprintable() and c < "\u2200" else "\ufffd" for c in t) for t in shown]
    ax.set_xticks(range(len(tokens)), shown, rotation=90, fontsize=7, parse_math=False)
    ax.set_xlim(-0.5, len(tokens) - 0.5)
    ax.set_ylim(0, 1)
    ax.legend(fontsize=8, ncols=len(names), loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    ax.set_title("weights of the streams as each token is predicted", fontsize=9, loc="left")

    ax, number = axes["number"], pool["effective_streams"]
    edges = number["histogram"]["edges"]
    ax.stairs(number["histogram"]["tokens"], edges, fill=True, color=MUTED)
    for word, colour in (("static", INK), ("mean", ACCENT)):
        ax.axvline(number[word], color=colour, linewidth=1.2, label=f"{word} {number[word]:.2f}")
    ax.legend(fontsize=8, frameon=False)
    ax.set_xlabel("effective number of streams", fontsize=9)
    ax.set_ylabel("tokens", fontsize=9)

    ax, hub = axes["hub"], report["hub"]
    if hub is None:
        ax.text(0.5, 0.5, "no hub", ha="center", va="center", color=MUTED)
        ax.set_axis_off()
    else:
        ratios = [hub["update_ratio"][name] for name in names]
        shades = matplotlib.colors.LinearSegmentedColormap.from_list("hub", ["#fbf1ee", ACCENT])
        image = ax.imshow(ratios, cmap=shades, vmin=0, vmax=alarm, aspect="auto")
        for k, row in enumerate(ratios):
            for s, ratio in enumerate(row):
                ax.text(s, k, f"{ratio:.3f}" + "!" * (ratio > alarm), ha="center", va="center",
                        fontsize=8, color="white" if ratio > 0.6 * alarm else INK)  # fmt: skip
        ax.set_xticks(range(len(ratios[0])), range(1, len(ratios[0]) + 1))
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel("sync point (before this superblock)", fontsize=9)
        ax.set_title(f"hub update over the stream; ! above {alarm}", fontsize=9)
        figure.colorbar(image, ax=ax, fraction=0.05, extend="max").ax.tick_params(labelsize=8)
    for ax in axes.values():
        ax.tick_params(labelsize=8 if ax is not axes["gate"] else 7, length=2)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{report['tokens']:,} tokens, {report['nll_per_token']:.4f} nats a token, "
        f"{report['bits_per_byte']:.4f} bits per byte", fontsize=10,
    )  # fmt: skip
    figure.savefig(path, format="png")
    plt.close(figure)
