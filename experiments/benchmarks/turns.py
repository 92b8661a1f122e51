"""What the benchmarks share: sides that take turns, their medians, the machine, its read bandwidth.

Sides of a comparison are called one after the other, again and again, so that a busy machine slows
all of them alike. No command of its own.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from delve_jax.metrics import versions

CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")


def arguments(doc: str, result: str, only, metavar: str | None = None) -> argparse.ArgumentParser:
    """The flags that all have; doc: the script's docstring, result: name of its JSON."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(only), default=tuple(only),
                        metavar=metavar, help="measure these; other rows stay")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7, help="at least 5; medians are reported")
    parser.add_argument("--out", type=Path, default=Path(f"experiments/results/{result}.json"))
    return parser


def quiet_torch() -> None:
    """PyTorch on all cores of this process; transformers without bars and warnings."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def turns(sides: dict, repeats: int) -> tuple[dict, dict]:
    """Call every side once to warm up, then `repeats` times in turn -> (seconds, first results).

    sides: name -> function of nothing that returns when its work is done; seconds: name -> list.
    """
    given, seconds = {side: call() for side, call in sides.items()}, {side: [] for side in sides}
    for _ in range(repeats):
        for side, call in sides.items():
            start = time.perf_counter()
            call()
            seconds[side].append(time.perf_counter() - start)
    return seconds, given


def summary(seconds: dict) -> dict:
    """Medians, spreads ((max - min) / median) and all values of the sides' times."""
    median = {side: statistics.median(s) for side, s in seconds.items()}
    return {
        "seconds": median,
        "spread": {side: (max(s) - min(s)) / median[side] for side, s in seconds.items()},
        "seconds_all": {side: [round(x, 6) for x in s] for side, s in seconds.items()},
    }


def last_level_cache() -> int:
    """Bytes of the largest cache that Linux says the first core has."""
    sizes = [file.read_text().strip() for file in CACHE.glob("index*/size")]
    return max(int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes)


def readers(size: int) -> tuple[dict, int]:
    """({way: function that reads an array of `size` bytes once}, its bytes: a multiple of 4,096).

    The fastest way is what caches and memory give to all cores of this process, for so many bytes.
    """
    import torch

    threads = len(os.sched_getaffinity(0))
    x_MN, one_N = np.ones((-(-size // 4096), 1024), np.float32), np.ones(1024, np.float32)
    parts, pool = np.array_split(x_MN, threads), concurrent.futures.ThreadPoolExecutor(threads)
    x_torch, one_torch = torch.from_numpy(x_MN), torch.from_numpy(one_N)
    x_jax, one_jax = jax.device_put(x_MN), jax.device_put(one_N)
    product = jax.jit(lambda a_MN, b_N: a_MN @ b_N)
    ways = {
        "numpy max": lambda: list(pool.map(np.max, parts)),
        "torch sum": lambda: x_torch.sum().item(),
        "torch matrix times vector": lambda: torch.mv(x_torch, one_torch),
        "jax matrix times vector": lambda: jax.block_until_ready(product(x_jax, one_jax)),
    }
    return ways, x_MN.nbytes


def products(params: dict, tokens: int, training: bool = False):
    """-> function: nothing but the products of all layers' maps with so many tokens, by PyTorch.

    How fast a side could be whose products run at that rate and for which all else takes no time.
    training: the head's, too, and of each map those of both gradients.
    """
    import torch

    maps = [torch.from_numpy(w) for w in _maps(params, training)]
    sizes = {size for w in maps for size in w.shape}
    rows = {size: torch.randn(tokens, size) for size in sizes}

    def once():
        for w_IO in maps:
            x_NI, g_NO = (rows[size] for size in w_IO.shape)
            x_NI @ w_IO
            if training:
                g_NO @ w_IO.T, x_NI.T @ g_NO

    return once


def xla_products(params: dict, tokens: int):
    """-> function: those of a training step by XLA, in one program that does nothing else."""
    maps, draw = _maps(params, head=True), np.random.default_rng(0)
    # rows of its own for each map: no product is that of another one
    rows = [tuple(draw.standard_normal((tokens, n), np.float32) for n in w.shape) for w in maps]

    @jax.jit
    def all_of(maps, rows):
        return [(x_NI @ w_IO, g_NO @ w_IO.T, x_NI.T @ g_NO)
                for w_IO, (x_NI, g_NO) in zip(maps, rows, strict=True)]  # fmt: skip

    maps, rows = jax.device_put((maps, rows))

    def once():  # hands nothing back: results of earlier turns would stay in memory
        jax.block_until_ready(all_of(maps, rows))

    return once


def _maps(params: dict, head: bool) -> list:
    """The matrices [I, O] of all layers, and the head's."""
    leaves = jax.tree.leaves_with_path(params["layers"])
    stacks = [a for path, a in leaves if path[-1].key == "kernel" and path[0].key != "conv"]
    maps = [np.array(w) for stack in stacks for w in stack]
    if head:
        maps.append(np.array(params["head"]["kernel"] if "head" in params
                             else params["embed"]["kernel"].T))  # fmt: skip
    return maps


def old_rows(file: Path) -> list:
    """The rows of earlier calls."""
    return json.loads(file.read_text())["rows"] if file.exists() else []


def add_row(rows: list, key: tuple, make) -> list:
    """The rows with a new one, `make()`, in the place of the one that has the same `key` fields."""
    load, start = os.getloadavg()[0], time.time()
    row = make()
    row |= {"load": [load, os.getloadavg()[0]], "minutes": (time.time() - start) / 60}
    print(json.dumps({k: v for k, v in row.items() if k != "seconds_all"}), flush=True)
    return [r for r in rows if any(r.get(k) != row[k] for k in key)] + [row]


def write(file: Path, rows: list, **facts) -> None:
    """The result file; how busy the machine was is in the `load` of each row."""
    result = {
        "command": "taskset -c 0,1 " * (jax.default_backend() == "cpu")
        + "python " + " ".join(sys.argv),
        "versions": versions(),
        "machine": {
            "device": jax.devices()[0].device_kind, "cores": sorted(os.sched_getaffinity(0)),
            "last_level_cache": last_level_cache(),
        },
        **facts,
        "rows": rows,
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def bars(ax, labels: list, groups: dict, unit: str, goals: list) -> None:
    """Grouped bars of ratios on a log axis; groups: label -> a ratio (or None) for each label.

    goals: the bar that is asked for at each label (or None), a dashed line across its group.
    """
    width = 0.84 / len(groups)
    for k, (label, ratios) in enumerate(groups.items()):
        shift = (k - (len(groups) - 1) / 2) * width
        at = [(i + shift, r) for i, r in enumerate(ratios) if r is not None]
        if at:
            ax.bar(*zip(*at, strict=True), width=0.95 * width, color=COLOURS[k], label=label)
        for i, ratio in at:
            ax.text(i, ratio * 1.05, f"{ratio:.3g}", ha="center", va="bottom", fontsize=7)
    for i, goal in enumerate(goals):
        if goal is not None:
            ax.hlines(goal, i - 0.45, i + 0.45, color="black", linestyle="dashed", linewidth=1)
    every = [r for ratios in groups.values() for r in ratios if r is not None]
    ax.axhline(1, color="black", linewidth=1)
    ax.set_yscale("log")
    ax.set_ylim(0.6 * min(1, *every), 2 * max(1, *every))
    ax.set_xticks(range(len(labels)), labels)
    ax.set_ylabel(unit)
    ax.legend(frameon=False, fontsize=8)
