"""A ladder of our own: tune the reference point, fit the laws, forecast, and only then run.

Command: python experiments/ladder.py STAGE, in this order; each goes on where it was stopped:
  reference   rates at the reference point of the transfer rule, by the choose split (AdamH, AdamW)
  ladder      the recipe's candidates at five budgets over one and a half decades
  forecast    fit and forecast TARGET; refuses once a run at TARGET exists. Commit what it writes
  target      the forecast configuration, three seeds, and the comparison with the forecast
  adamw       AdamW, tuned at the same reference point, at equal compute, three seeds
  far_forecast, far   the same for FAR, 31 times the largest fitted budget, from the same ladder,
              with AdamW beside; for a GPU
  table       what is there on one screen, and the picture
Raw bytes (no tokenizer), rows of 128, 24 MB of the train split; a point's loss is nats per byte on
300 kB of the report split, what was tuned on saw the choose split alone. Toy scale: the published
reference point (130M parameters, 2.5e9 tokens) caps the rates here, so that its constants are
fitted anew (RECIPE). Cost: see the results; about three hours of one core.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from delve_jax import data, metrics, sweep
from delve_jax.config import DelveError, read_json
from delve_jax.delphi import forecast, points, recipe

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT.parent / "shared" / "data" / "text"
RESULTS = ROOT / "experiments" / "results"
WORK = ROOT / "out" / "ladder"
OUT = RESULTS / "ladder.json"

# sizes and shares of the toy suite; its rates come from the stage `reference`
TOY = {"seq_len": 128, "vocab_size": 256, "head_dim": 8, "min_hidden": 16, "fine_step": 8,
       "coarse_step": 8, "depth_base": 1, "max_steps": 1024, "min_batch": 2,
       "max_tokens_per_param": 250.0, "max_lr": 0.5}  # fmt: skip
REFERENCE = {"flops": 6e11, "hidden": 64}  # where rates are tuned; B0 and T0 are this run's
BUDGETS = (1e11, 2.4e11, 5.7e11, 1.35e12, 3.2e12)
TARGET, FAR = 1e13, 1e14
FORECASTS = {TARGET: RESULTS / "ladder_forecast.json", FAR: RESULTS / "ladder_far_forecast.json"}
SEEDS = (0, 1, 2)
SIZES = 6  # widths of a budget: those whose tokens a parameter are nearest to RATIO
RATIO = 25.0  # 8 at first: the optima then lay at the smallest widths, so smaller ones were added
BYTES = {"train": 24_000_000, "choose": 300_000, "report": 300_000}
# coordinate search: each grid in turn, the best so far kept
ADAMH = (("lr", (0.005, 0.01, 0.02, 0.04, 0.08)),
         ("adam_lr", (0.0005, 0.0015, 0.005, 0.015, 0.045)),
         ("beta2", (0.99, 0.999, 0.9999)))  # fmt: skip
ADAMW = (("lr", (0.001, 0.003, 0.01, 0.03)), ("weight_decay", (0.01, 0.1, 0.3)))


def texts():
    """{split: file} of documents drawn from the shared text, whole documents up to BYTES."""
    files = {name: WORK / f"{name}.txt" for name in BYTES}
    if not all(file.exists() for file in files.values()):
        WORK.mkdir(parents=True, exist_ok=True)
        documents = data.shared_documents(TEXT)
        for name, size in BYTES.items():
            part, some, held = data.split(documents, name), [], 0
            for i in np.random.default_rng(0).permutation(len(part)):
                if held < size:
                    some.append(part[i])
                    held += len(part[i].encode())
            half = files[name].with_suffix(".writing")
            half.write_text("\n<|endoftext|>\n".join(some))
            half.replace(files[name])
    return files


def rules_file(name, constants):
    """A recipe of the toy suite as a file that the verb takes."""
    file = WORK / f"{name}.json"
    WORK.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(TOY | constants))
    return file


def trained(place, constants, scored="report", **how):
    """The rows of a sweep under the toy recipe with these constants."""
    files = texts()
    return sweep.sweep(
        WORK / place, text=[files["train"]], report_text=[files[scored]],
        recipe=rules_file(place.replace("/", "-"), constants), **how,
    )["rows"]  # fmt: skip


def save(**parts):
    """The results with these parts in the place of older ones."""
    result = read_json(OUT) if OUT.exists() else {}
    result |= {
        "command": "python experiments/ladder.py STAGE", "versions": metrics.versions(),
        "data_hash": {name: data.data_hash(data.read_documents(f)) for name, f in texts().items()},
        "toy": TOY, "seeds": SEEDS, **parts,
    }  # fmt: skip
    half = OUT.with_suffix(".writing")
    half.write_text(json.dumps(result, indent=1) + "\n")
    half.replace(OUT)
    return result


def published_at_reference():
    """Batch and tokens of the reference run, as constants of the rule."""
    rules = dataclasses.replace(recipe.DELPHI, **TOY)
    run = rules.candidate(REFERENCE["flops"], REFERENCE["hidden"])
    return {"B0": run.batch_size, "T0": float(run.tokens)}


# ---- stages --------------------------------------------------------------------------------------


def reference():
    """Coordinate searches at the reference run -> the recipe's constants, AdamW's settings."""
    base = published_at_reference()
    names = {"lr": "lr0", "adam_lr": "adam_lr0", "beta2": "beta2_0"}
    best = {"lr0": 0.02, "adam_lr0": 0.005, "beta2_0": 0.999}
    rows = []
    for name, grid in ADAMH:
        for value in grid:
            constants = base | best | {names[name]: value}
            place = "reference/adamh-" + "-".join(f"{constants[n]:g}" for n in names.values())
            (row,) = trained(place, constants, "choose", flops=[REFERENCE["flops"]],
                             widths=[REFERENCE["hidden"]])  # fmt: skip
            rows.append({n: constants[n] for n in names.values()} | {"loss": row["loss"]})
            print(rows[-1], flush=True)
        best |= {k: v for k, v in min(rows, key=lambda r: r["loss"]).items() if k != "loss"}
    plain, plain_rows = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}, []
    for name, grid in ADAMW:
        for value in grid:
            given = plain | {name: value}
            place = f"reference/adamw-{given['lr']:g}-{given['weight_decay']:g}"
            (row,) = trained(place, base | best, "choose", flops=[REFERENCE["flops"]],
                             widths=[REFERENCE["hidden"]], given=given)  # fmt: skip
            plain_rows.append(given | {"loss": row["loss"]})
            print(plain_rows[-1], flush=True)
        plain |= {k: v for k, v in min(plain_rows, key=lambda r: r["loss"]).items() if k != "loss"}
    save(reference={"run": REFERENCE | base, "adamh": rows, "adamw": plain_rows,
                    "recipe": base | best, "adamw_given": plain})  # fmt: skip


def constants():
    """The fitted constants of the transfer rule."""
    if not OUT.exists() or "reference" not in read_json(OUT):
        raise DelveError("run the stage `reference` first")
    return read_json(OUT)["reference"]["recipe"]


def widths(rules, C):
    """The SIZES candidates of a budget that are nearest to RATIO tokens a parameter."""
    found = rules.candidates(C)
    found.sort(key=lambda c: abs(np.log(c.tokens / c.params / RATIO)))
    return sorted(c.hidden for c in found[:SIZES])


def ladder():
    """Five budgets, one seed."""
    rules = dataclasses.replace(recipe.DELPHI, **TOY, **constants())
    for C in BUDGETS:
        rows = trained("ladder", constants(), flops=[C], widths=widths(rules, C))
        save(ladder=rows)


def points_file():
    """The ladder's rows as the CSV that the verb reads."""
    rows = read_json(OUT)["ladder"]
    names = ("flops", "params", "tokens", "loss")
    file = WORK / "points.csv"
    WORK.mkdir(parents=True, exist_ok=True)
    lines = [",".join(repr(row[n]) for n in names) for row in rows]
    file.write_text("\n".join([",".join(names), *lines]) + "\n")
    return file


PLACES = {TARGET: "target", FAR: "far"}  # of the runs


def make_forecast(C=TARGET):
    """What C will give, written before any run of that size exists."""
    place = WORK / PLACES[C]
    if place.exists() or PLACES[C] in read_json(OUT):
        raise DelveError(f"{place}: runs at the target exist; a forecast comes before")
    rules = dataclasses.replace(recipe.DELPHI, **TOY, **constants())
    out = forecast.forecast(points_file(), [C], recipe=rules)
    out["fit"]["source"] = "experiments/results/ladder.json"
    stage = "forecast" if C == TARGET else "far_forecast"
    facts = {
        "command": f"python experiments/ladder.py {stage}", "versions": metrics.versions(),
        "seeds": {"bootstrap": forecast.SEED}, "target": C, "recipe": constants(),
    }  # fmt: skip
    FORECASTS[C].write_text(json.dumps(facts | out, indent=1) + "\n")
    print(json.dumps(out["forecasts"], indent=1))


def told(C=TARGET):
    """The committed forecast of C."""
    if not FORECASTS[C].exists():
        raise DelveError("run the stage `forecast` first, and commit what it writes")
    return read_json(FORECASTS[C])["forecasts"][0]


def against(said, rows):
    """How far off the forecast was."""
    losses = np.array([r["loss"] for r in rows])
    low, high = said["interval"]
    C = rows[0]["flops"]
    return {
        "flops": C, "times_the_largest_fitted": C / max(BUDGETS),
        "forecast": said["loss"], "interval": said["interval"], "loss": float(losses.mean()),
        "spread_of_seeds": float(losses.std(ddof=1)), "error": said["loss"] / losses.mean() - 1,
        "inside": [bool(low <= x <= high) for x in losses],
    }  # fmt: skip


def target():
    """The run that was forecast, three seeds, and how far off the forecast was."""
    said = told()
    rows = trained("target", constants(), flops=[TARGET], widths=[said["config"]["hidden"]],
                   seeds=SEEDS)  # fmt: skip
    save(target=rows, comparison=against(said, rows))


def far():
    """FAR as it was forecast, and AdamW at equal compute: at its tuned and the transferred rate."""
    said, base = told(FAR), constants()
    H, given = said["config"]["hidden"], read_json(OUT)["reference"]["adamw_given"]
    rules = dataclasses.replace(recipe.DELPHI, **TOY, **base)
    ways = {"adamh": {}, **{
        name: {"given": given | {"lr": rate}} for name, rate in (
            ("adamw", given["lr"]),
            ("adamw, transferred rate", rules.config(FAR, H)["lr"] / rules.lr0 * given["lr"]),
        )
    }}  # fmt: skip
    rows = {name: trained(f"far/{name.replace(', ', '-').replace(' ', '-')}", base, flops=[FAR],
                          widths=[H], seeds=SEEDS, **how)
            for name, how in ways.items()}  # fmt: skip
    import jax

    save(far={"rows": rows, "device": jax.devices()[0].device_kind,
              "comparison": against(said, rows["adamh"])})  # fmt: skip


def adamw():
    """Both optimisers at the largest fitted budget, at the forecast's kind of width, three seeds.

    AdamW keeps the rate that was tuned at the reference run, and takes the rate that the transfer
    rule would give it as well: the better of the two stands in the comparison.
    """
    said, result = told(), read_json(OUT)
    C, base, given = BUDGETS[-1], constants(), result["reference"]["adamw_given"]
    rules = dataclasses.replace(recipe.DELPHI, **TOY, **base)
    found = rules.candidates(C)
    H = min(found, key=lambda c: abs(c.hidden - said["config"]["hidden"])).hidden
    lr = rules.config(C, H)["lr"] / rules.lr0 * given["lr"]
    parts = {"adamh": trained("adamw/adamh", base, flops=[C], widths=[H], seeds=SEEDS)}
    for name, rate in (("adamw", given["lr"]), ("adamw, transferred rate", lr)):
        place = "adamw/" + name.replace(", ", "-").replace(" ", "-")
        parts[name] = trained(place, base, flops=[C], widths=[H], seeds=SEEDS,
                              given=given | {"lr": rate})  # fmt: skip
    save(optimizers={
        "flops": C, "hidden": H,
        **{name: {"losses": [r["loss"] for r in rows], "lr": rows[0]["lr"]}
           for name, rows in parts.items()},
    })  # fmt: skip


def table():
    """All numbers on one screen; pictures beside the results."""
    from delve_jax.delphi import plots

    r = read_json(OUT)
    for key in ("reference", "comparison", "optimizers", "far"):
        print(key, json.dumps(r.get(key), indent=1))
    if FORECASTS[TARGET].exists():
        told = read_json(FORECASTS[TARGET])
        runs = points.read(points_file())
        columns = np.stack([runs.C, runs.N, runs.T, runs.L], 1).tolist()
        names = ("flops", "params", "tokens", "loss")
        told["runs"] = [dict(zip(names, row, strict=True)) for row in columns]
        plots.draw("isoflop", told, RESULTS / "ladder_isoflop.png")


STAGES = {"reference": reference, "ladder": ladder, "forecast": make_forecast, "target": target,
          "adamw": adamw, "far_forecast": lambda: make_forecast(FAR), "far": far,
          "table": table}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    STAGES[parser.parse_args().stage]()


if __name__ == "__main__":
    try:
        main()
    except DelveError as err:
        sys.exit(f"error: {err}")
