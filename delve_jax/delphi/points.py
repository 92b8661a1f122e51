"""Files of finished runs: FLOPs, parameters, tokens, loss of each, grouped by budget.

Any CSV with a header; lines that start with # are skipped. What is left out is listed with its line
and reason, never dropped silently.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import DelveError

# column -> accepted headings, the first that is there; total_gflops is in 1e9
NAMES = {
    "flops": ("flops_budget", "flops", "training flop", "total_gflops"),
    "params": ("params", "n_params", "model size"),
    "tokens": ("tokens",),
    "loss": ("loss",),
    "steps": ("steps",),
    "batch_size": ("batch_size",),
}
REQUIRED = ("flops", "params", "loss")
GAP = 0.02  # decades between budgets: logged FLOPs of one budget differ by less
SPREAD = 0.08  # decades that one budget may cover


@dataclass(frozen=True)
class Points:
    """Runs, one entry of every array each; C is the budget that a run belongs to."""

    C: np.ndarray  # FLOPs
    N: np.ndarray  # parameters
    T: np.ndarray  # tokens
    L: np.ndarray  # loss, nats a token
    log2_steps: np.ndarray | None = None  # up to a constant; None where a run's is unknown
    source: str = "points"
    excluded: tuple[dict, ...] = ()  # {"line" or "flops", "reason"}

    @property
    def budgets(self) -> np.ndarray:
        return np.unique(self.C)

    def where(self, mask: np.ndarray) -> Points:
        """The runs that `mask` selects."""
        steps = None if self.log2_steps is None else self.log2_steps[mask]
        arrays = {k: getattr(self, k)[mask] for k in "CNTL"}
        return replace(self, **arrays, log2_steps=steps)

    def without(self, budget: float, reason: str) -> Points:
        """Without one budget, for the reason given."""
        note = {"flops": float(budget), "reason": reason}
        return replace(self.where(budget != self.C), excluded=(*self.excluded, note))


def read(path: str | Path) -> Points:
    """The runs of a CSV file; DelveError names the file, the line and the column.

    Tokens are C / 6N where they are not given. Rows with an empty, infinite, NaN or negative
    number and repeated runs are left out and listed in `excluded`.
    """
    rows, headings = table(path, NAMES, REQUIRED)
    found, excluded, seen = [], [], set()
    for line, values in rows:
        bad = [k for k in REQUIRED if not 0 < values[k] < math.inf]
        if bad:
            reason = f"column {headings[bad[0]]}: not a positive number"
            excluded.append({"line": line, "reason": reason})
            continue
        if headings["flops"].lower() == "total_gflops":
            values["flops"] *= 1e9
        if not 0 < values["tokens"] < math.inf:
            values["tokens"] = values["flops"] / (6 * values["params"])
        run = tuple(values[k] for k in ("flops", "params", "tokens", "loss"))
        if run in seen:
            excluded.append({"line": line, "reason": "the same run as on a line above"})
            continue
        seen.add(run)
        found.append(values)
    if not found:
        raise DelveError(f"{path}: no row has positive numbers for flops, params and loss")
    get = {k: np.array([v[k] for v in found]) for k in NAMES}
    with np.errstate(divide="ignore", invalid="ignore"):  # else: steps up to the row length
        ratio = np.where(get["steps"] > 0, get["steps"], np.nan)
        if np.isnan(ratio).any():
            ratio = get["tokens"] / get["batch_size"]
        steps = np.log2(ratio)
    return Points(
        grouped(get["flops"]), get["params"], get["tokens"], get["loss"],
        steps if np.isfinite(steps).all() else None, str(path), tuple(excluded),
    )  # fmt: skip


def table(
    path: str | Path, names: dict[str, tuple[str, ...]], required: tuple[str, ...]
) -> tuple[list[tuple[int, dict[str, float]]], dict[str, str]]:
    """Rows of a CSV file as (line, numbers by key) and the heading found for each key.

    names: accepted headings of a key, whose case does not matter; NaN stands where a field is
    empty, or a column that is not `required` is missing.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [(i, line) for i, line in enumerate(file, 1) if _counts(line)]
    except FileNotFoundError:
        raise DelveError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as err:
        raise DelveError(f"{path}: not readable as a CSV file ({err})") from None
    if not lines:
        raise DelveError(f"{path}: empty; a header with {', '.join(required)} is expected")
    try:
        header, *rows = csv.reader([line for _, line in lines], strict=True)
    except csv.Error as err:
        raise DelveError(f"{path}: not readable as a CSV file ({err})") from None
    if len(rows) + 1 != len(lines):
        raise DelveError(f"{path}: fields that span several lines are not supported")
    columns = _columns(path, header, names, required)
    out = [
        (line, _values(path, line, header, columns, row, names))
        for (line, _), row in zip(lines[1:], rows, strict=True)
    ]
    return out, {key: header[i].strip() for key, i in columns.items()}


def _counts(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _columns(path, header, names, required) -> dict[str, int]:
    """Which column holds what."""
    given = [name.strip().lower() for name in header]
    columns = {}
    for key, accepted in names.items():
        for name in accepted:
            if name in given:
                if given.count(name) > 1:
                    raise DelveError(f"{path}: two columns are called {name}; rename one")
                columns[key] = given.index(name)
                break
    for key in required:
        if key not in columns:
            raise DelveError(
                f"{path}: no column for {key} ({' or '.join(names[key])}) among "
                f"{', '.join(header)[:120]}"
            )
    return columns


def _values(path, line, header, columns, row, names) -> dict[str, float]:
    """The numbers of one row, NaN where there are none."""
    values = dict.fromkeys(names, math.nan)
    for key, i in columns.items():
        text = row[i].strip() if i < len(row) else ""
        if text.lower() in ("", "na", "n/a", "none", "null", "-"):
            continue
        try:
            values[key] = float(text)
        except ValueError:
            raise DelveError(
                f"{path}: line {line}, column {header[i]}: {text[:40]!r} is not a number"
            ) from None
    return values


def grouped(flops: np.ndarray) -> np.ndarray:
    """The budget of each run: the median of those that lie within GAP of one another.

    Chains longer than SPREAD (runs that are no isoFLOP sweep) are cut into pieces of that length.
    """
    order = np.argsort(flops)
    logs = np.log10(flops[order])
    group = np.zeros(len(logs), int)
    start = 0
    for i in range(1, len(logs)):
        apart = logs[i] - logs[i - 1] > GAP or logs[i] - logs[start] > SPREAD
        start = i if apart else start
        group[i] = group[i - 1] + apart
    out = np.empty_like(flops)
    for g in range(group[-1] + 1):
        members = order[group == g]
        out[members] = np.median(flops[members])
    return out
