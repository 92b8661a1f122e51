"""Would q, k, v (Mamba: x, z), each at a rank of its own, lose less than their fused map at one?

Command: python experiments/split_maps.py   (writes results/split_maps.json)
Both at equal counted parameters in the whole allocation, tables and all: the parts as maps of their
own (two-sided factors from their own blocks of the gradient's Gram, curves measured like every
other map's) against the fused map. Calibrated on 8,192 tokens, judged on the choose split.
Result: not built. The allocator expects at most 3 % less loss at keep 0.6 and 0.4 (over 2 % on
mamba at 0.4 alone), and no parent loses less by more than 0.3 % when measured, most lose more.
The rows of the results are of scripts before this one: its full runs were stopped.
"""

import importlib.util
import json
import math
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from delve_jax import data, metrics, models, road
from delve_jax.compress import curves, knapsack, moments, spectra
from delve_jax.compress.allocate import Map, Plan, parent_maps
from delve_jax.compress.assembly import assemble
from delve_jax.compress.factorize import factor
from delve_jax.models.linear import HIGHEST, wide

spec = importlib.util.spec_from_file_location("study", Path(__file__).with_name("compression.py"))
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)
FUSED = {"neox": "att/qkv", "incite": "att/qkv", "mamba": "in_proj"}
KEEPS, SEED, TOKENS = (0.6, 0.4), 0, 8192


def parts_of(cfg):
    """Columns of the fused map that belong to each of its parts."""
    if cfg.family == "mamba":
        return {"x": np.arange(cfg.d_inner), "z": np.arange(cfg.d_inner, 2 * cfg.d_inner)}
    at = np.arange(3 * cfg.d_model).reshape(cfg.n_heads, 3, -1)  # head-major
    return {name: at[:, i].ravel() for i, name in enumerate("qkv")}


def whole_metric(sums, g, params):
    """In the place of `moments._with_gradients`: E[g g^T] over the outputs of wide maps as well."""
    if "gram" not in sums:
        return {name: whole_metric(sub, g[name], params[name]) for name, sub in sums.items()}
    g_NO = wide(g["out"].reshape(-1, g["out"].shape[-1]))
    return {**sums, "grad": jnp.matmul(g_NO.T, g_NO, precision=HIGHEST)}


def fits_of(parent, tokens, name, parts):
    """{(part, layer): Factors at every useful rank} and the inputs' means [L, I]."""
    cfg, leaf, out = parent.cfg, models.leaf_of(parent.params, name), {}
    moments._with_gradients = whole_metric
    with tempfile.TemporaryDirectory() as folder:
        source = spectra.InMemory(cfg, parent.params)
        sweep = moments.Sweep(source, tokens, Path(folder), inputs=(name,), seed=SEED)
        sweep.boundaries()
        sweep.head()
        for layer in range(cfg.n_layers - 1, -1, -1):
            m = sweep.layer(layer)[name]
            w_IO = np.asarray(leaf["kernel"][layer], np.float64)
            for part, at in parts.items():
                w, grad = w_IO[:, at], m.grad[np.ix_(at, at)]
                b = np.asarray(leaf["bias"][layer])[at] if "bias" in leaf else None
                wider = w.shape[1] > w.shape[0]
                out[part, layer] = w, b, m.mean_I, factor(
                    w, Map(part, 1, *w.shape).max_rank, m.inputs if wider else w.T @ m.inputs @ w,
                    over="inputs" if wider else "outputs", mean_I=m.mean_I, bias_O=b,
                    grad=w @ grad @ w.T if wider else grad, floor=spectra.FLOOR,
                )  # fmt: skip
    return out


def joined(leaf, fits, parts, ranks):
    """The fused leaf, all layers, with its parts at ranks {part: one a layer} (None: dense)."""
    leaf = {key: np.array(a) for key, a in leaf.items()}
    for (part, layer), (w, b, mean_I, fit) in fits.items():
        if ranks.get(part) is not None:
            rank = ranks[part][layer]
            cut = fit.v_IK[:, :rank] @ fit.u_KO[:rank]
            leaf["kernel"][layer][:, parts[part]] = cut
            if b is not None:
                leaf["bias"][layer][parts[part]] = b + mean_I @ (w - cut)
    return {key: jnp.asarray(a) for key, a in leaf.items()}


def kind_of(held, leaf, fits, parts, part, name):
    """A part as a map of its own, with its own measured curve."""
    cfg = held.cfg
    m, layers = Map(part, cfg.n_layers, cfg.d_model, len(parts[part])), range(cfg.n_layers)
    ranks = [max(1, round(share * m.max_rank)) for share in curves.SHARES]
    students = []
    for rank in ranks:
        new = joined(leaf, fits, parts, {part: [rank] * m.layers})
        students.append(moments.Student(lambda i, params, new=new: put(params, name, new, i)))
    rows = max(1, curves.TOKENS // held.tokens.shape[1])
    nats = [kl for kl, _ in held.sweep.divergences(rows, students, "split")]
    tails = [curves.tails(fits[part, i][-1].spectrum, np.arange(m.max_rank + 1)) for i in layers]
    lost = [sum(float(tail[rank]) for tail in tails) for rank in ranks]
    curve = curves.through(*zip(lost, nats, strict=True))
    factored, dense = [], []
    for i in layers:
        errors = curves._nats(tails[i], m.layers, curve)
        options = [knapsack.Option(r, r * m.step, float(e)) for r, e in enumerate(errors)]
        factored.append(knapsack.Item(part, i, tuple(options)))
        dense.append(knapsack.Item(part, i, (knapsack.Option(-1, m.dense, 0.0),)))
    return knapsack.Kind(part, {"dense": tuple(dense), "factored": tuple(factored)})


def compared(name):
    """One parent: expected and true nats of both ways at each ratio."""
    parent = study.Parent(name)
    cfg, fused, parts = parent.cfg, FUSED[name], parts_of(parent.cfg)
    windows = road.calibration_windows(
        cfg, parent.tokenizer, study.documents()["calibrate"], TOKENS, SEED
    )
    tokens = moments.check_tokens(windows, cfg.vocab_size)
    body, tables, total = parent_maps(cfg)
    body, tables = ([m for m in some if m.max_rank] for some in (body, tables))
    maps, leaf = [*tables, *body], models.leaf_of(parent.params, fused)
    fixed = total - sum(m.layers * m.dense for m in maps)
    dense = parent.scores(cfg, parent.params, "choose").mean() / study.WINDOW
    with tempfile.TemporaryDirectory() as folder:
        held = spectra.Spectra(
            spectra.InMemory(cfg, parent.params), body, tables, tokens, Path(folder),
            spectra.recipe("delve"), {}, SEED, progress=False,
        )  # fmt: skip
        joint = curves.kinds(held, maps, curves.measure(held, maps))
        fits = fits_of(parent, tokens, fused, parts)
        apart = [kind for kind in joint if kind.name != fused]
        apart += [kind_of(held, leaf, fits, parts, part, fused) for part in parts]
        rows = []
        for keep in KEEPS:
            rows.append({"keep": keep})
            for way, kinds in (("joint", joint), ("split", apart)):
                choice = knapsack.choose(kinds, fixed, math.floor(keep * total), total=total)
                sizes = {}
                for (map_name, _), size in sorted(choice.sizes.items()):
                    sizes.setdefault(map_name, []).append(size)
                cut = {map_name: tuple(s) for map_name, s in sizes.items() if min(s) >= 0}
                ranks = {m.name: cut[m.name] for m in maps if m.name in cut}
                plan = Plan(ranks, choice.parameters, total, choice.parameters, keep, "")
                params = study.as_dense(assemble(held.source, held, plan).params, parent.like)
                if way == "split":
                    whole = joined(leaf, fits, parts, cut)
                    params = {**params, "layers": put(params["layers"], fused, whole)}
                lost = parent.scores(cfg, params, "choose").mean() / study.WINDOW - dense
                rows[-1][way] = {
                    "expected": choice.error, "lost": float(lost),
                    "parameters": choice.parameters,
                    "ranks": {part: sizes[part] for part in (fused, *parts) if part in sizes},
                }  # fmt: skip
            print(name, json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"map": fused, "dense": float(dense), "rows": rows}


def put(tree, name, leaf, layer=None):
    """The tree of a layer (or of all of them) with the fused leaf, of one layer (or all)."""
    first, _, rest = name.partition("/")
    if rest:
        return {**tree, first: put(tree[first], rest, leaf, layer)}
    return {**tree, first: leaf if layer is None else {k: a[layer] for k, a in leaf.items()}}


def main():
    names = sys.argv[1:] or list(FUSED)
    file = study.RESULTS / "split_maps.json"
    out = json.loads(file.read_text()) if file.exists() else {"parents": {}}
    out |= {
        "command": "python experiments/split_maps.py", "seed": SEED,
        "tokens": {"calibrate": TOKENS, "choose": study.SEQUENCES * study.WINDOW},
        "versions": metrics.versions(),
        "data_hash": {n: data.data_hash(study.documents()[n]) for n in ("calibrate", "choose")},
    }  # fmt: skip
    for name in names:
        out["parents"][name] = compared(name)
        file.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
