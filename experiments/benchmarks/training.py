"""Is training (forward, backward, AdamW) as fast as PyTorch's transformers, for every family?

taskset -c 0,1 python experiments/benchmarks/training.py [--only NAME ...] [--repeats 7]
Two CPU cores. Other work starves PyTorch's OpenMP threads, so a row taken under load (its `load`
above 3) reads too high: repeat it. Ratio to PyTorch eager, quiet, in five measurements, before the
last two attention and gains' gradients, before the last AdamW's update was written anew: neox 0.83,
0.70, 0.64, 0.69, 0.83 (2 x 256), 0.81, 0.58, 0.65, 0.74, 0.72 (1 x 1024); qwen3 0.89, 0.68, 0.69,
0.79, 0.92 and 0.86, 0.60, 0.60, 0.82, 0.91; rwkv 1.7, 2.2, 2.4, 2.8, 3.1 and 2.7, 4.2, 4.7, 5.8,
6.2; mamba 43 to 49, 56 to 94 (transformers has no kernel on a CPU). Sides of
their own: a step that keeps all for its backward pass (`--remat none`), and the products with all
maps alone, forward and backward, PyTorch's and XLA's: how fast a program would be in which nothing
else took time. Tried beside the plain step before attention was written anew, neox 2 x 256: weight
gradients from a transposed copy, the scan over layers unrolled, both, XLA's oneDNN products
(--xla_cpu_use_onednn) and YNNPACK's (--xla_cpu_experimental_ynn_fusion_type), jax 0.11.2: none made
a step faster beyond the noise. Nor did a step on a tree a layer, in which nothing
is stacked or sliced: 0.82 to 1.04 times as long in six calls (neox and qwen3, both lengths), median
0.97. A malloc that hands no pages back (MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=9999999999 MALLOC_TOP_PAD_=1000000000) saves a step its 58,000 page faults:
0.78 to 1.06 times as long (six calls; PyTorch 0.82 to 0.99), but healing a DELVE gained nothing.
--gpu: both sides on one GPU, activations in bfloat16 and weights in float32 as both projects' users
train there (PyTorch by autocast), 8 rows. transformers' mamba and rwkv without their CUDA kernels.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "" if "--gpu" in sys.argv else "cpu"  # before jax starts
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room on a GPU, too

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from turns import products, xla_products

from delve_jax import models, parallel
from delve_jax.config import MambaConfig, NeoxConfig, Qwen3Config, RwkvConfig
from delve_jax.metrics import versions
from delve_jax.parents.stock import export_stock
from delve_jax.train.loop import init_state
from delve_jax.train.run import Settings, step_of

GPU = not os.environ["JAX_PLATFORMS"]
V, D = 4096, 512
FAMILIES = {
    "mamba": functools.partial(
        MambaConfig, n_layers=2, d_inner=2 * D, dt_rank=D // 16, tie_embeddings=True
    ),
    "rwkv": functools.partial(RwkvConfig, n_layers=4, d_att=D, d_ffn=4 * D),
    "neox": functools.partial(NeoxConfig, n_layers=4, n_heads=8, d_ffn=4 * D),
    "qwen3": functools.partial(
        Qwen3Config, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=128, d_ffn=4 * D
    ),
}
SIZES = ((8, 256), (8, 1024)) if GPU else ((2, 256), (1, 1024))  # B, T
TINY = ((2, 32),)  # with --tiny
# a step of transformers' mamba is a Python loop over T whose backward pass is quadratic in T
LAYERS = {("mamba", 1024): 1}
LONG_S = 60  # a side whose first step takes longer is not stepped again: that step is its time
# torch.compile takes a minute and a half a model, and would unroll the recurrences' loops over T
COMPILED = (("neox", SIZES[GPU][1]), ("qwen3", SIZES[GPU][1]))
# largest relative differences; 16 bits: the sides round in other places
CHECKS = {"loss": 1e-4, "grad_norm": 1e-3, "loss_after": 1e-3}
CHECKS_16 = {"loss": 1e-3, "grad_norm": 2e-2, "loss_after": 5e-3}


def config(name, T):
    """The family's config at D = 512."""
    cfg = FAMILIES[name](vocab_size=V, vocab_rows=V, d_model=D, context_length=T)
    return dataclasses.replace(cfg, n_layers=LAYERS.get((name, T), cfg.n_layers))


def torch_model(cfg, params):
    """The transformers model of this config with these weights, in training mode."""
    with tempfile.TemporaryDirectory() as place:
        export_stock(cfg, params, Path(place) / "model")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            Path(place) / "model", dtype=torch.float32
        )
    return model.float().train()


def ours(cfg, params, settings, tokens):
    """-> (a function that makes one step and returns its loss and gradient norm, compile [s])."""
    mesh = parallel.make_mesh("data=1")
    step, arguments = step_of(cfg, (), settings, mesh)
    abstract, _, like, _ = arguments
    tokens, index = jax.device_put(tokens, like.sharding), np.int32(0)
    optimizer = settings.make_optimizer(settings.steps(settings.row_length(cfg)))
    shard = parallel.shardings(mesh, abstract)
    params = jax.tree.map(jax.numpy.copy, params)  # the step takes its own
    state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shard)(params)
    start = time.perf_counter()
    program = step.lower(*arguments).compile()
    seconds = time.perf_counter() - start

    def once():
        nonlocal state
        state, metrics = jax.block_until_ready(program(state, (), tokens, index))
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return once, seconds


def theirs(model, settings, tokens, compiled=False):
    """The same of PyTorch: clipping and AdamW (its fused form, the faster one) included."""
    device = "cuda" if torch.cuda.is_available() and GPU else "cpu"
    model = model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.95), eps=1e-8,
        weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip
    ids = torch.tensor(tokens, device=device).long()
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def loss_of():
        with torch.autocast(device, torch.bfloat16, enabled=settings.compute == "bfloat16"):
            logits = model(inputs, use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def once():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item(), norm.item()

    return once


def measure(name, B, T, repeats):
    """One row: the sides' times in turn, and how far apart loss, gradient and update are."""
    cfg = config(name, T)
    # constant rate, no decay: the optimisers are the same function
    settings = Settings(
        tokens=1000 * B * T, batch=B, window=T, lr=1e-3, warmup=0.0, decay=0.0, weight_decay=0.0,
        compute="bfloat16" if GPU else "float32",
    )  # fmt: skip
    params = jax.jit(functools.partial(models.init_params, cfg))(jax.random.key(0))
    # id 0 would open a document, which stock models do not know
    tokens = np.random.default_rng(0).integers(1, V, (B, T + 1)).astype(np.int32)
    sides = {"torch": theirs(torch_model(cfg, params), settings, tokens)}
    if (name, T) in COMPILED:
        sides["torch.compile"] = theirs(torch_model(cfg, params), settings, tokens, compiled=True)
    sides["ours"], compile_s = ours(cfg, params, settings, tokens)
    if not GPU:
        keeping = dataclasses.replace(settings, remat="none")
        sides["ours, all kept"], _ = ours(cfg, params, keeping, tokens)
        sides["products"] = products(params, B * T, training=True)
        sides["products, XLA"] = xla_products(params, B * T)
    seen, seconds = {side: [] for side in sides}, {side: [] for side in sides}
    for k in range(1 + repeats):
        order = -1 if k % 2 else 1  # so that no side always comes behind the same one
        for side, once in list(sides.items())[::order]:
            if k and side == "torch" and seconds[side][0] > LONG_S:
                continue
            start = time.perf_counter()
            try:
                seen[side].append(once())
            except RuntimeError as err:  # no compiler there
                if side != "torch.compile":
                    raise
                del sides[side], seen[side], seconds[side]
                print(f"{name} {T}, {side}: {str(err).splitlines()[0]}", flush=True)
                continue
            seconds[side].append(time.perf_counter() - start)
    first = {side: times[0] for side, times in seconds.items()}
    # the first step warms up (of torch.compile: compiles), unless it is the only one
    timed = {side: times[1:] or times for side, times in seconds.items()}
    median = {side: statistics.median(times) for side, times in timed.items()}
    row = {
        "family": name, "batch": B, "T": T, "layers": cfg.n_layers, "compute": settings.compute,
        "device": jax.devices()[0].device_kind,
        "parameters": models.count(cfg),
        "ratio": median["torch"] / median["ours"],
        # other work on the cores makes PyTorch's threads wait for each other: see this one too
        "ratio_of_fastest": min(timed["torch"]) / min(timed["ours"]),
        "tokens_per_second": {side: B * T / s for side, s in median.items()},
        "seconds": median,
        "spread": {side: (max(t) - min(t)) / median[side] for side, t in timed.items()},
        "compile_s": {"ours": compile_s},
        "apart": {side: apart(seen["ours"], seen[side]) for side in sides if "torch" in side},
        "seconds_all": {side: [round(s, 4) for s in times] for side, times in timed.items()},
    }  # fmt: skip
    if "products" in sides:  # what the ratio would be if nothing else took time
        row["ratio_of_products"] = median["torch"] / median["products"]
        row["ratio_of_xla_products"] = median["torch"] / median["products, XLA"]
        row["of_all_kept"] = median["ours"] / median["ours, all kept"]
    if "torch.compile" in sides:
        row["compile_s"]["torch.compile"] = first["torch.compile"]
        row["ratio_to_compiled"] = median["torch.compile"] / median["ours"]
    return row


def apart(mine, their):
    """Relative differences of the first loss and gradient norm and of the loss after an update."""
    pairs = {"loss": (mine[0][0], their[0][0]), "grad_norm": (mine[0][1], their[0][1])}
    if len(their) > 1:
        pairs["loss_after"] = mine[1][0], their[1][0]
    out = {name: abs(a - b) / abs(b) for name, (a, b) in pairs.items()}
    for name, value in out.items():
        if not value <= (CHECKS_16 if GPU else CHECKS)[name]:
            raise SystemExit(f"{name} differs by {value:.2g} from {pairs[name][1]:.6g}")
    return out


def picture(rows, file):
    """Bars of ours / theirs in tokens a second, one group a family and T."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 3.6))
    x = np.arange(len(rows))
    for shift, key, label, colour in (
        (-0.2, "ratio", "PyTorch eager", "#4477aa"),
        (0.2, "ratio_to_compiled", "torch.compile", "#ee6677"),
    ):
        at = [(i + shift, row[key]) for i, row in zip(x, rows, strict=True) if key in row]
        ax.bar(*zip(*at, strict=True), width=0.38, color=colour, label=f"against {label}")
        for i, ratio in at:
            ax.text(i, ratio * 1.05, f"{ratio:.2f}", ha="center", va="bottom", fontsize=8)
    ax.axhline(1, color="black", linewidth=1)
    ax.set_yscale("log")
    ax.set_ylim(0.5, 2 * max(row["ratio"] for row in rows))
    ax.set_xticks(x, [f"{r['family']}\n{r['batch']} x {r['T']}" for r in rows])
    ax.set_ylabel("training tokens/s, DELVE / PyTorch")
    ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(file, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES),
                        help="measure these again")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7, help="at least 5; medians are reported")
    parser.add_argument("--gpu", action="store_true", help="both sides on one GPU, in bfloat16")
    parser.add_argument("--tiny", action="store_true", help="short texts, no file: does it run?")
    where = f"experiments/results/training_{'gpu' if GPU else 'cpu'}.json"
    parser.add_argument("--out", type=Path, default=Path(where))
    flags = parser.parse_args()
    if GPU and not flags.tiny and not torch.cuda.is_available():
        parser.error("--gpu: there is none; leave it out, or see that the code runs with --tiny")
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    old = flags.out.exists() and not flags.tiny
    rows = json.loads(flags.out.read_text())["rows"] if old else []
    rows = [row for row in rows if row["family"] not in flags.only]
    for B, T in TINY if flags.tiny else SIZES:
        for name in flags.only:
            load, start = os.getloadavg()[0], time.time()
            try:
                row = measure(name, B, T, flags.repeats)
            except (SystemExit, RuntimeError) as err:  # the next rows, while the GPU is there
                if not GPU:
                    raise
                print(f"{name} {B} x {T}: failed: {err}", flush=True)
                continue
            row |= {"load": [load, os.getloadavg()[0]], "minutes": (time.time() - start) / 60}
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "seconds_all"}), flush=True)
            if not flags.tiny:
                write(rows, flags.out)
    if flags.tiny:
        return
    rows.sort(key=lambda row: (list(FAMILIES).index(row["family"]), row["T"]))
    write(rows, flags.out)
    picture(rows, flags.out.with_suffix(".png"))
    print(f"{flags.out}: slowest ratio {min(row['ratio'] for row in rows):.2f}")


def write(rows, file):
    """All rows so far; those of families that this call does not measure are kept."""
    result = {
        "command": "taskset -c 0,1 " * (not GPU) + "python " + " ".join(sys.argv),
        "versions": versions() | {"torch": torch.__version__},
        "cores": sorted(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "slowest": min(row["ratio"] for row in rows),
        "rows": rows,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
