"""`delve delphi ACTION`: what each action answers (JSON values), and the same for people."""

from __future__ import annotations

import dataclasses

from . import downstream as scores
from . import forecast as forecasts
from . import points as files
from . import recipe as recipes


def candidates(flops: float, recipe: str | None = None) -> dict:
    """All widths of the sweep at a budget; recipe: a file of other constants."""
    return {"candidates": [dataclasses.asdict(c) for c in recipes.read(recipe).candidates(flops)]}


def recipe(
    flops: float, hidden: int | None = None, batch: int | None = None, recipe: str | None = None
) -> dict:
    """The whole configuration at a budget; width by the T* rule, or the one given."""
    out = recipes.read(recipe).config(flops, hidden, batch)
    if recipe is None:
        return out
    # what `out` has is rounded to whole steps: another budget for a sweep
    return out | {"recipe": str(recipe), "asked": {"flops": flops, "batch": batch}}


def fit(points: str) -> dict:
    """Optima and laws of a point file."""
    whole = files.read(points)
    runs = forecasts.usable(whole)
    return forecasts.report(runs, forecasts.interval(runs, runs.budgets), whole)


def forecast(points: str, flops: list[float], recipe: str | None = None) -> dict:
    """Losses with intervals and configurations at larger budgets."""
    return forecasts.forecast(points, flops, recipe=recipes.read(recipe))


def downstream(scores_csv: str, flops: list[float], **how) -> dict:
    """Benchmark scores with intervals at larger budgets."""
    return scores.forecast(scores_csv, flops, **how)


ACTIONS = {f.__name__: f for f in (candidates, recipe, fit, forecast, downstream)}


def run(action: str, **flags) -> dict:
    """The answer of an action."""
    return ACTIONS[action](**flags)


# ---- for people ----------------------------------------------------------------------------------


def show(r: dict) -> str:
    """An answer as text; which action gave it is seen from its fields."""
    if "points" in r:
        return _points(r)
    if "candidates" in r:
        return _candidates(r["candidates"])
    if "forecasts" in r:
        return _forecasts(r) if "budgets" in r["fit"] else _scores(r)
    return _fit(r) if "budgets" in r else _recipe(r)


def grid(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        for row in (head, *rows)
    )


def _candidates(rows: list[dict]) -> str:
    head = ("hidden", "layers", "heads", "batch", "steps", "tokens", "params", "FLOPs")
    return grid(head, [tuple(f"{v:,}" for v in [*r.values()][:-1]) + (f"{r['flops']:.6g}",)
                       for r in rows])  # fmt: skip


def _points(r: dict) -> str:
    head = ("run", "FLOPs", "params", "tokens", "loss", "bits/byte")
    rows = [(p["run"], f"{p['flops']:.3g}", f"{p['params']:,}", f"{p['tokens']:,}",
             f"{p['loss']:.4f}", f"{p['bits_per_byte']:.4f}") for p in r["rows"]]  # fmt: skip
    return f"{grid(head, rows)}\n\n{r['points']}: {len(rows)} runs; delve delphi fit takes it"


def _recipe(r: dict) -> str:
    rules = recipes.read(r.get("recipe"))
    parts = rules.schedule(r["steps"])
    flags = {
        "--tokens": r["tokens"], "--batch": r["batch_size"], "--window": rules.seq_len,
        "--optimizer": "adamh", "--lr": f"{r['lr']:.6g}", "--adam-lr": f"{r['adam_lr']:.6g}",
        "--b2": f"{r['beta2']:.6g}", "--eps": f"{r['epsilon']:.6g}", "--clip": r["max_grad_norm"],
        "--z-loss": r["z_loss"], "--warmup": r["warmup"], "--decay": r["decay"],
    }  # fmt: skip
    why = rules.outside(r["flops"], r["hidden"])
    return "\n".join([
        *([f"note: no candidate of the sweep ({why})"] if why else []),
        f"width {r['hidden']}, {r['layers']} layers, {r['heads']} heads: "
        f"{r['params']:,} parameters",
        f"{r['steps']:,} steps of {r['batch_size']} x {rules.seq_len} tokens = "
        f"{r['tokens']:,} tokens, {r['flops']:.6g} FLOPs",
        f"lr {r['lr']:.6g} (AdamH), {r['adam_lr']:.6g} (Adam); beta1 {r['beta1']}, beta2 "
        f"{r['beta2']:.6g}, epsilon {r['epsilon']:.4g}, clip {r['max_grad_norm']}, z-loss "
        f"{r['z_loss']:g}",
        f"schedule: {parts['warmup']:,} steps up, {parts['stable']:,} stable, "
        f"{parts['decay']:,} down",
        f"delve train delphi-{r['hidden']} DST --data TOKENS "
        + " ".join(f"{k} {v}" for k, v in flags.items())
        if rules == recipes.DELPHI
        else f"delve delphi sweep DST --recipe {r['recipe']} --flops {r['asked']['flops']} "
        f"--hidden {r['hidden']} "
        + (f"--batch {r['asked']['batch']} " if r["asked"]["batch"] else "")
        + "--data TOKENS --report-text TEXT",
    ])  # fmt: skip


def _law(law: dict) -> str:
    low, high = law.get("E_interval", (None, None))
    e = f"E {law['E']:.4f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")
    return f"{e}, A {law['A']:.4f}, alpha {law['alpha']:.4f}"


def _fit(r: dict) -> str:
    rows = [
        (f"{b['flops']:.3g}", f"{b['runs']}", f"{b['tokens']:.3e}", f"{b['params']:.3e}",
         f"{b['loss']:.4f}", f"{b['joint_loss']:.4f}")
        for b in r["budgets"]
    ]  # fmt: skip
    T, N, v = r["tokens_law"], r["params_law"], r["validation"]
    lines = [
        f"{r['source']}: {r['runs']} runs at {len(r['budgets'])} budgets",
        *(f"left out: {', '.join(f'{k} {x}' for k, x in e.items())}" for e in r["excluded"][:5]),
        *([f"... and {len(r['excluded']) - 5} more"] if len(r["excluded"]) > 5 else []),
        "",
        grid(("FLOPs", "runs", "T*", "N*", "parabola", "joint fit"), rows),
        "",
        f"T* = {T['coefficient']:.4g} C^{T['exponent']:.4f}    "
        f"N* = {N['coefficient']:.4g} C^{N['exponent']:.4f}",
        f"L(C) = E + A (C / 1e20)^-alpha: {_law(r['loss_law'])}; residuals up to "
        f"{r['loss_law']['largest_residual']:.3%}",
        f"  on the parabolas' vertices: {_law(r['parabola_law'])}",
    ]
    if r["parametric"]:
        for name, p in r["parametric"].items():
            if "E" in p:
                lines.append(
                    f"L(N, D) ({name}): E {p['E']:.4f}, A {p['A']:.4g}, B {p['B']:.4g}, "
                    f"alpha {p['alpha']:.4f}, beta {p['beta']:.4f}"
                )
            else:
                lines.append(f"L(N, D) ({name}): none, {p['failed']}")
    if v["of"]:
        lines.append(
            f"leaving the largest budgets out: {v['of']} forecasts, error rms {v['rms_error']:.2%},"
            f" at most {v['largest_error']:.2%}; {v['covered']} of {v['of']} inside their interval"
        )
    low, high = r["penalty"]["fitted_scales"]
    scales = sorted({p["scale"] for p in r["penalty"]["rows"] if p["scale"] > 1})
    shown = max([s for s in scales if s <= high], default=scales[0])  # what runs say something of
    for p in r["penalty"]["rows"]:
        if p["scale"] == shown:
            k = p["extra_compute"]
            cost = "which no compute makes up for" if k is None else f"as {k:.1f} x the compute"
            lines.append(f"{shown:g} x T* tokens at {p['flops']:g}: {p['gap']:.3f} nats, {cost}")
    lines.append(f"  (runs of the largest budget reach {low:.2g} to {high:.2g} x T*; "
                 f"{r['penalty']['note']})")  # fmt: skip
    return "\n".join(lines)


def _forecasts(r: dict) -> str:
    rows = []
    for f in r["forecasts"]:
        low, high = f["interval"]
        c = f["config"]
        rows.append((
            f"{f['flops']:.3g}", f"{f['loss']:.4f}", f"[{low:.4f}, {high:.4f}]",
            f"{low / f['loss'] - 1:+.2%} {high / f['loss'] - 1:+.2%}",
            f"{c['hidden']}" if "hidden" in c else "-", f"{c['params']:.3e}", f"{c['tokens']:.3e}",
            f"{c['batch_size']}" if "hidden" in c else "-",
        ))  # fmt: skip
    head = ("FLOPs", "loss", "95 % interval", "", "hidden", "params", "tokens", "batch")
    return f"{_fit(r['fit'])}\n\n{grid(head, rows)}"


def _scores(r: dict) -> str:
    soft, hard = r["fit"]["soft"], r["fit"]["hard"]
    rows = [
        (f"{f['flops']:.3g}", f"{f['soft']:.4f}",
         "[{:.4f}, {:.4f}]".format(*f["soft_interval"]), f"{f['hard']:.4f}",
         "[{:.4f}, {:.4f}]".format(*f["interval"]), "" if f["inside_pool"] else "outside the pool")
        for f in r["forecasts"]
    ]  # fmt: skip
    minus = "-" if soft["sign"] < 0 else ""
    x = "log |soft|" if hard["log"] else "soft"
    return "\n".join([
        f"soft = {minus}(E + A (C / 1e20)^-alpha): {_law(soft)} ({soft['rows']} runs)",
        f"hard = b + a / (1 + exp(-k (x - x0))), x = {x}: a {hard['a']:.4f}, "
        f"k {hard['k']:.4f}, x0 {hard['x0']:.4f}, b {hard['b']:.4f} ({hard['rows']} models)",
        *(f"left out: {', '.join(f'{k} {x}' for k, x in e.items())}"
          for e in r["fit"]["excluded"][:5]),
        "",
        grid(("FLOPs", "soft", "95 % interval", "hard", "95 % interval", ""), rows),
    ])  # fmt: skip
