"""How much of a training step is spent waiting for data? Bar: at most 2 %.

taskset -c 0,1 python experiments/benchmarks/loop.py [--steps 60] [--out ...]
Two CPU cores, 45 seconds. proxy-neox, 8 x 256 tokens, three token folders: 0.25 % of the time on
average, 0.8 % at most over three steps (a step takes 0.46 s).
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

import delve_jax
from delve_jax import data, parallel, presets
from delve_jax.metrics import read_metrics, versions
from delve_jax.train.run import Settings, pretrain

TEXT = Path(__file__).resolve().parents[2] / "../shared/data/text"
TOKENIZER = Path(delve_jax.__file__).parent / "proxies/neox/tokenizer.json"
PARTS = {"linux_doc_rst": 0.5, "python_doc": 0.3, "sympy_doc": 0.2}
MEGABYTES = 3  # of each part
PRESET, BATCH, WINDOW = "proxy-neox", 8, 256


def run(place, steps):
    """-> (report of the run, logged lines) of the real loop on a mixture of token folders."""
    json_str = data.read_tokenizer(TOKENIZER)
    for name in PARTS:
        data.prepare([TEXT / f"{name}.txt.xz"], place / name, tokenizer=TOKENIZER,
                     limit_bytes=int(MEGABYTES * 1e6))  # fmt: skip
    cfg, facts = presets.preset(PRESET), {}

    def open_data(T, batch, shard, shards):
        items = [f"{place / name}={weight}" for name, weight in PARTS.items()]
        ds, found = data.training_set(
            items, json_str, cfg.vocab_size, T + 1, batch, 0, shard, shards
        )
        facts.update(found)
        return ds

    settings = Settings(tokens=steps * BATCH * WINDOW, batch=BATCH, window=WINDOW)
    eot = data.eot_of(data.load_tokenizer(json_str, cfg.vocab_size))
    _, report = pretrain(cfg, open_data, settings, mesh=parallel.make_mesh("data=1"),
                         workdir=place / "run", eot=eot)  # fmt: skip
    return report | {"data_hash": facts["data_hash"]}, read_metrics(place / "run/metrics.jsonl")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/loop_cpu.json"))
    flags = parser.parse_args()
    load, start = os.getloadavg()[0], time.time()
    with tempfile.TemporaryDirectory() as place:
        report, lines = run(Path(place), flags.steps)
    steady = lines[1:]  # the first one's time has compilation in it
    share = [line["data_wait"] for line in steady]
    result = {
        "command": "taskset -c 0,1 python " + " ".join(sys.argv),
        "versions": versions(),
        "machine": {
            "cores": sorted(os.sched_getaffinity(0)), "device": jax.devices()[0].device_kind,
            "load_before": load, "load_after": os.getloadavg()[0],
        },
        "minutes": round((time.time() - start) / 60, 1),
        "preset": PRESET,
        "data_wait": {
            "mean": statistics.fmean(share), "median": statistics.median(share), "max": max(share),
        },
        "step_ms": 1e3 * BATCH * WINDOW / statistics.median(
            line["tokens_per_second"] for line in steady
        ),
        "report": report,
        "lines": lines,
    }  # fmt: skip
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{flags.out}: waiting for data {result['data_wait']}, step {result['step_ms']:.0f} ms")


if __name__ == "__main__":
    main()
