"""Pictures of a Delphi study, made from its JSON alone (experiments/results/delphi*.json)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import fit
from .downstream import Form, sigmoid_at

INK, ACCENT, MUTED = "#222222", "#c4472b", "#7a8ca3"
LIGHT = "#dfe5ec"


def draw(name: str, result: dict, path: str | Path) -> None:
    """One of PICTURES, or "downstream", as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    make = downstream if name == "downstream" else PICTURES[name]
    figure = make(result, plt)
    figure.savefig(path)
    plt.close(figure)


def _panels(plt, columns: int, width=7.2, height=4.4):
    figure, axes = plt.subplots(
        1, columns, figsize=(width, height), dpi=150, layout="constrained", squeeze=False
    )
    for ax in axes[0]:
        ax.grid(color="#eeeeee")
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes[0]


def _shade(i: int, n: int):
    """From the muted blue to ink: small to large budgets stay apart in print."""
    a, b = (np.array([int(c[j : j + 2], 16) for j in (1, 3, 5)]) / 255 for c in ("#a9b8ca", INK))
    return tuple(a + (b - a) * i / max(n - 1, 1))


def isoflop(r: dict, plt):
    """Loss over tokens at every budget: runs, parabolas, optima of both fits."""
    figure, (ax,) = _panels(plt, 1, 7.2, 5.2)
    rows = r["fit"]["budgets"]
    for i, b in enumerate(rows):
        colour = _shade(i, len(rows))
        runs = sorted((p["tokens"], p["loss"]) for p in r["runs"] if p["flops"] == b["flops"])
        T, L = np.array(runs).T
        ax.scatter(T, L, color=colour, s=14, zorder=3)
        x = np.linspace(np.log10(T[0]), np.log10(T[-1]), 100)
        ax.plot(10**x, np.polyval((b["a"], b["b"], b["c"]), x), color=colour, lw=1)
        ax.annotate(f"{b['flops']:.2g}".replace("e+", "e"), (T[-1], L[-1]), xytext=(5, -3),
                    textcoords="offset points", fontsize=8, color=colour)  # fmt: skip
    ax.plot([b["joint_tokens"] for b in rows], [b["joint_loss"] for b in rows], "D-",
            color=ACCENT, ms=5, lw=1.2, zorder=4, label="optima, joint fit")  # fmt: skip
    ax.plot([b["tokens"] for b in rows], [b["loss"] for b in rows], "x", color=ACCENT, ms=6,
            zorder=4, label="vertices of the parabolas")  # fmt: skip
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(plt.matplotlib.ticker.LogLocator(subs=(2, 5)))  # room for labels
    ax.tick_params(which="minor", labelsize=8)
    ax.margins(x=0.09)
    ax.set(xlabel="training tokens", ylabel="loss (nats a token)")
    ax.set_title("IsoFLOP runs; the budget in FLOPs stands at each curve", fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def laws(r: dict, plt):
    """T* and N* over compute, with the recipe's configurations at the forecast budgets."""
    figure, axes = _panels(plt, 2, 7.2, 3.6)
    rows, ahead = r["fit"]["budgets"], r["forecasts"]
    C = np.array([b["flops"] for b in rows])
    reach = np.array([C[0] / 1.5, max([C[-1], *(f["flops"] for f in ahead)]) * 1.5])
    for ax, key, name in ((axes[0], "tokens", "tokens T*"), (axes[1], "params", "parameters N*")):
        law = r["fit"][f"{key}_law"]
        ax.plot(reach, law["coefficient"] * reach ** law["exponent"], color=MUTED, lw=1,
                label=f"{law['coefficient']:.3g} C^{law['exponent']:.3f}")  # fmt: skip
        ax.plot(C, [b[key] for b in rows], "o", color=INK, ms=5, label="optima")
        ax.plot([f["flops"] for f in ahead], [f["config"][key] for f in ahead], "D", color=ACCENT,
                ms=5, label="chosen configurations")  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="compute (FLOPs)", ylabel=name)
        ax.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def loss_law(r: dict, plt):
    """L(C) with its interval; below, residuals and what five budgets said about the last two."""
    figure, (ax, low) = _panels(plt, 2, 9.6, 4.2)
    rows = r["fit"]["budgets"]
    p = [r["fit"]["loss_law"][k] for k in ("E", "A", "alpha")]
    C = np.array([b["flops"] for b in rows])
    ahead = sorted(r["forecasts"], key=lambda f: f["flops"])
    x = np.array([f["flops"] for f in ahead])
    line = np.logspace(np.log10(C[0] / 1.5), np.log10(x[-1] * 1.3), 200)
    ax.plot(line, fit.loss_at(p, line), color=MUTED, lw=1.2,
            label=f"${p[0]:.3f} + {p[1]:.3f}\\,(C/10^{{20}})^{{-{p[2]:.3f}}}$")  # fmt: skip
    edges = np.array([[f["interval"][i] for f in ahead] for i in (0, 1)])
    here = np.concatenate([[C[-1]], x])
    band = [np.concatenate([[fit.loss_at(p, C[-1])], e]) for e in edges]
    ax.fill_between(here, *band, color=LIGHT, label="95 % interval")
    ax.plot(C, [b["joint_loss"] for b in rows], "o", color=INK, ms=5, label="optima")
    ax.plot(x, [f["loss"] for f in ahead], "D", color=ACCENT, ms=5, label="forecasts")
    for f in ahead:
        ax.annotate(f"{f['loss']:.3f}", (f["flops"], f["loss"]), xytext=(-5, -12), ha="right",
                    textcoords="offset points", fontsize=8, color=ACCENT)  # fmt: skip
    ax.set(xscale="log", xlabel="compute (FLOPs)", ylabel="loss (nats a token)")
    ax.legend(frameon=False, fontsize=8)
    checks = r["fit"]["validation"]["rows"]
    counts = sorted({c["budgets"] for c in checks})
    for i, k in enumerate(counts):
        mine = [c for c in checks if c["budgets"] == k]
        apart = 0.015 * (i - (len(counts) - 1) / 2)  # prefixes may look equally far ahead
        ahead_by = [np.log10(c["flops"] / c["largest"]) + apart for c in mine]
        error = [100 * c["error"] for c in mine]
        half = np.array([[100 * (1 - c["interval"][0] / c["forecast"]) for c in mine],
                         [100 * (c["interval"][1] / c["forecast"] - 1) for c in mine]])  # fmt: skip
        colour = _shade(i, len(counts))
        low.errorbar(ahead_by, error, yerr=half, fmt="none", color=colour, lw=1, alpha=0.6)
        low.plot(ahead_by, error, "osD^vP*X"[i % 8], color=colour, ms=5, label=f"{k} budgets")
    low.axhline(0, color=MUTED, lw=1)
    low.set(xlabel="decades ahead of the largest budget", ylabel="error of the forecast (%)")
    low.set_title("the largest budgets left out", fontsize=10)
    low.legend(frameon=False, fontsize=8, title="fitted on", title_fontsize=8, loc="upper left")
    return figure


def penalty(r: dict, plt):
    """Loss and compute lost away from the optimal tokens."""
    figure, axes = _panels(plt, 2, 7.2, 3.6)
    rows = r["fit"]["budgets"]
    p = [r["fit"]["parabola_law"][k] for k in ("E", "A", "alpha")]
    x = np.linspace(np.log10(0.2), 1, 81)
    low, high = r["fit"]["penalty"]["fitted_scales"]
    budgets = (rows[-1]["flops"], *(f["flops"] for f in r["forecasts"]))
    for i, C in enumerate(sorted(set(budgets))):
        gaps = [fit.penalty_law(rows, 10**s) if abs(s) > 1e-9 else (0.0, 0.0) for s in x]
        colour = _shade(i, len(budgets))
        name = f"{C:.2g} FLOPs".replace("e+", "e") + (", extrapolated" if i else "")
        axes[0].plot(10**x, [g[0] * C ** g[1] for g in gaps], color=colour, lw=1.2, label=name)
        axes[1].plot(10**x, [fit.extra_compute(p, g, C) for g in gaps], color=colour, lw=1.2)
    top = [q for q in r["runs"] if q["flops"] == rows[-1]["flops"]]
    best = rows[-1]
    axes[0].scatter([q["tokens"] / best["tokens"] for q in top],
                    [q["loss"] - best["loss"] for q in top], s=12, color=ACCENT, zorder=3,
                    label=f"runs at {best['flops']:.2g}".replace("e+", "e"))  # fmt: skip
    for ax in axes:
        ax.set(xscale="log", xlabel="tokens over T*", xlim=(min(low, 0.2) / 1.1, high * 1.15))
        ax.set_xticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
        ax.minorticks_off()
    axes[0].set_ylabel("loss above the optimum (nats)")
    axes[1].set_ylabel("compute for the same loss (factor)")
    axes[0].legend(frameon=False, fontsize=7, loc="upper center")
    return figure


def methods(r: dict, plt):
    """Error of every forecasting method when the largest budgets are left out."""
    figure, (ax,) = _panels(plt, 1, 7.2, 4.4)
    rows = r["methods"]
    y = np.arange(len(rows))
    best = min(m["rms_joint"] for m in rows)
    for key, shift, colour in (("rms_joint", -0.18, INK), ("rms_published", 0.18, MUTED)):
        ax.barh(y + shift, [100 * m[key] for m in rows], 0.34, color=colour,
                label={"rms_joint": "against the joint fit's optima",
                       "rms_published": "against the parabolas' vertices"}[key])  # fmt: skip
    ax.set_yticks(y, [m["method"] for m in rows], fontsize=7)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set(xlabel=f"rms error of {rows[0]['forecasts']} forecasts (%)", xlim=(best * 60, None))
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def downstream(r: dict, plt):
    """Soft against hard: pool, sigmoid, forecasts with intervals and what came true."""
    shown = [(s, t) for s in r["studies"] for t in list(s["tasks"])[:4]]
    studies = list(dict.fromkeys(s["study"] for s, _ in shown))
    figure, axes = plt.subplots(
        len(studies), 4, figsize=(10.4, 2.3 * len(studies)), dpi=150, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for k, (s, task) in enumerate(shown):
        ax = axes[k // 4][k % 4]
        x, y = np.array(s["curves"][task]["pool"]).T
        mine = [q for q in s["rows"] if q["task"] == task]
        soft = np.array([q["soft_forecast"] for q in mine])
        line = np.linspace(min(x.min(), soft.min()), x.max(), 100)
        ax.scatter(x, y, s=5, color=MUTED, label="pool")
        form = Form(**s["curves"][task]["form"])
        curve = sigmoid_at(s["curves"][task]["law"], form.x(line))
        ax.plot(line, curve, color=INK, lw=1, label="sigmoid")
        half = np.array([[max(0.0, q["forecast"] - q["interval"][0]) for q in mine],
                         [max(0.0, q["interval"][1] - q["forecast"]) for q in mine]])  # fmt: skip
        ax.errorbar(soft, [q["forecast"] for q in mine], yerr=half, fmt="D", ms=3.5, lw=1,
                    color=ACCENT, label="forecast")  # fmt: skip
        ax.scatter([q["soft"] for q in mine], [q["hard"] for q in mine], s=22, marker="o",
                   facecolors="none", edgecolors=INK, zorder=4, label="came true")  # fmt: skip
        ax.invert_xaxis()
        ax.grid(color="#eeeeee")
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=7)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.set_title(task if k % 4 else f"{s['study']}\n{task}", fontsize=8,
                     loc="left" if k % 4 == 0 else "center")  # fmt: skip
        if k // 4 == len(studies) - 1:
            ax.set_xlabel("soft metric (nats)", fontsize=8)
    axes[0][0].set_ylabel("accuracy", fontsize=8)
    axes[0][0].legend(frameon=False, fontsize=6, loc="upper left")
    return figure


PICTURES: dict[str, Callable] = {
    "isoflop": isoflop, "laws": laws, "loss_law": loss_law, "penalty": penalty, "methods": methods,
}  # fmt: skip
