"""`delve upcycle`: the whole road, from parents to an exported, scored DELVE.

DIR/parents/NAME (compressed), DIR/fused (step 0), DIR/checkpoint (healed), DIR/hf (export),
DIR/report.json and report.png. Text has three roles that never overlap: calibrate (compression and
pool weights), data (healing), report (the numbers shown).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import (
    VerbModule,
    checkpoint,
    data,
    fuse,
    lineage,
    lm,
    look,
    models,
    parents,
    road,
    training,
)
from . import compress as compression
from . import evaluate as evaluation
from .compress import codes, joint
from .compress.allocate import smallest
from .compress.spectra import InMemory
from .config import DelveError, read_json, write_json
from .metrics import versions
from .parents.export import check_blocks
from .train.loop import Saving
from .train.run import Settings

PROXIES = Path(__file__).parent / "proxies"
PROMPT = "def "


def embedded_parents() -> list[str]:
    """The proxy parents that come with the package."""
    found = [str(p) for p in sorted(PROXIES.glob("*")) if (p / "config.json").exists()]
    if not found:
        raise DelveError(f"{PROXIES}: no embedded parents; name some with --parents")
    return found


def roles(
    texts: Sequence[str], calibrate: Sequence[str], report: Sequence[str]
) -> dict[str, list[str]]:
    """Documents per role. A role without its own files gets its split of --data (or the stdlib).

    DelveError: a role is left without text, or report text is also trained or fitted on.
    """
    base = look.texts_of(texts) if texts else data.stdlib_documents()
    own = {"train": [], "calibrate": look.texts_of(calibrate), "report": look.texts_of(report)}
    split_base = not (texts and calibrate and report)
    out = {
        role: own[role] or (data.split(base, role) if split_base or role != "train" else base)
        for role in own
    }
    flags = {"train": "--data", "calibrate": "--calibrate", "report": "--report-text"}
    for role, documents in out.items():
        if not documents:
            raise DelveError(
                f"{flags[role]}: no document of the text falls into the {role} split; give "
                f"{flags[role]} files of its own"
            )
    seen = set(out["train"]) | set(out["calibrate"])
    if shared := sum(document in seen for document in out["report"]):
        raise DelveError(
            f"--report-text: {shared} of its documents are also trained or calibrated on; give "
            "text that is used for nothing else"
        )
    return out


def budgets(configs: list, keep: float, latents: int = 1) -> list[int]:
    """Parameters that each compressed parent may have, so that hub, gate and pool fit in as well.

    The same keep ratio for every parent. DelveError names the smallest possible --keep.
    """
    if not 0 < keep <= 1:
        raise DelveError(f"--keep {keep}: must lie in (0, 1], the kept share of all parameters")
    counts = [look.valid_count(cfg) for _, cfg in configs]
    joints = fuse.joints_count(fuse.joint_config(configs, latents or len(configs)))
    least = max(smallest(cfg) / n for (_, cfg), n in zip(configs, counts, strict=True))
    ratio = keep - joints / sum(counts)
    if ratio < least:
        raise DelveError(
            f"--keep {keep}: rank 1 everywhere needs more; the smallest possible --keep for these "
            f"parents is {np.ceil((least + joints / sum(counts)) * 1e4) / 1e4:.4f}"
        )
    return [int(ratio * n) for n in counts]


def together_budget(configs: list, keep: float, latents: int = 1) -> int:
    """Parameters that parents with common tables may have in all, beside hub, gate and pool."""
    if not 0 < keep <= 1:
        raise DelveError(f"--keep {keep}: must lie in (0, 1], the kept share of all parameters")
    total = sum(look.valid_count(cfg) for _, cfg in configs)
    joints = fuse.joints_count(fuse.joint_config(configs, latents or len(configs)))
    least = joint.smallest([cfg for _, cfg in configs]) + joints / total
    if keep < least:
        raise DelveError(
            f"--keep {keep}: rank 1 everywhere needs more; the smallest possible --keep for these "
            f"parents is {np.ceil(least * 1e4) / 1e4:.4f}"
        )
    return int(keep * total) - joints


def _together(
    named: dict, work: Path, documents, budget: int, tokens: int, latents: int, seed: int
):
    """Compress parents within one budget, tables in common -> work/parents/NAME, work/fused."""
    _say(f"compress {', '.join(named)} to {budget:,} parameters in all")
    parts, windows = [], {}
    for name, src in named.items():
        source = parents.open_layers(src)
        if source is None:
            cfg, params, tokenizer = parents.load(src, dtype="float32")
            source = InMemory(*compression.compress(cfg, params, None, keep=1.0, method="svd")[:2])
        else:
            cfg, tokenizer = source.cfg, source.tokenizer
        windows[name] = road.calibration_windows(cfg, tokenizer, documents, tokens, seed)
        parts.append(joint.Part(name, source, windows[name]))
    out = joint.compress(parts, budget, work / "together", seed=seed)
    teachers = tuple(road.source_of(src) for src in named.values())
    made = [(n, dataclasses.replace(cfg, dtype="float32"), p) for n, cfg, p in out.parents]
    for (name, cfg, params), teacher in zip(made, teachers, strict=True):
        dst = work / "parents" / name
        if not dst.exists():
            facts = {"source": teacher, "method": "delve", "together": out.report}
            cfg, params = codes.alone(cfg, params)
            extra = {"compress.json": facts}
            extra |= lineage.step("compress", [named[name]], {
                "method": "delve", "budget_of_all": budget, "parameters": models.count(cfg),
                "calibration_tokens": int(windows[name].size), "seed": seed,
            })  # fmt: skip
            checkpoint.save(dst, cfg, params, tokenizer, extra=extra)
    _say("fuse")
    shortest = min(windows.values(), key=lambda w: w.shape[1])
    cfg, params, report = fuse.fuse(
        made, shortest[: max(1, len(shortest) // 2)], latents=latents or len(made), shared=True,
        teachers=teachers, seed=seed,
    )  # fmt: skip
    facts = report | {"parameters": models.count(cfg), "connectors": cfg.connectors,
                      "latents": cfg.latents, "seed": seed}  # fmt: skip
    extra = {"fuse.json": report | out.report}
    extra |= lineage.step("fuse", [work / "parents" / n for n in named], facts)
    checkpoint.save(work / "fused", cfg, params, tokenizer, extra=extra)


def score(name: str, model: lm.LM, texts: Sequence[str], window: int) -> dict:
    """One row of the report. Windows overlap by a quarter: the least context of any token."""
    result = evaluation.evaluate(model, texts, window=window, stride=max(1, window * 3 // 4))
    keys = ("parameter_bytes", "nll_per_token", "bits_per_byte", "tokens_per_second", "tokens")
    row = {"name": name, "parameters": look.valid_count(model.config)}
    return row | {k: result[k] for k in keys}


def cut_documents(documents: Sequence[str], size: int) -> list[str]:
    """Whole documents, evenly drawn from the list, until they hold `size` bytes (at least one)."""
    order = np.random.default_rng(0).permutation(len(documents))
    out, total = [], 0
    for i in order:
        if total >= size:
            break
        out.append(documents[i])
        total += len(documents[i].encode())
    return out


def upcycle(
    sources: Sequence[str] = (),
    out: str | Path = "out/delve",
    *,
    keep: float = 0.5,
    method: str = "delve",
    heal_tokens: int | None = None,
    text: Sequence[str] = (),
    calibrate: Sequence[str] = (),
    report_text: Sequence[str] = (),
    calibrate_tokens: int = 65536,
    report_bytes: int = 120_000,
    batch: int = 8,
    lr: float = 2e-3,
    latents: int = 1,
    save_every: int = 200,
    mesh: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict:
    """Parents -> compressed -> fused -> healed -> exported -> report; resumes when repeated.

    keep: all parameters of the DELVE (hub, gate, tables included) over the parents' sum, counted
    at valid vocabulary rows. heal_tokens: default 80,000; 0 stops after fusion. text, calibrate,
    report_text: files of three roles; without them the standard library's documents. What stands in
    `out`: see above. -> report.json: rows (name, parameters, nll_per_token, bits_per_byte, ...).
    DelveError: parents of different tokenizers, a ratio that cannot be met (says which can), report
    text that is trained on.
    """
    heal_tokens = 80_000 if heal_tokens is None else heal_tokens
    sources = [str(s) for s in (sources or embedded_parents())]
    command = {"verb": "upcycle", "parents": sources, "keep": keep, "method": method,
               "heal_tokens": heal_tokens, "data": list(map(str, text)),
               "calibrate": list(map(str, calibrate)), "report_text": list(map(str, report_text)),
               "calibrate_tokens": calibrate_tokens, "report_bytes": report_bytes, "batch": batch,
               "lr": lr, "latents": latents, "seed": seed}  # fmt: skip
    out = Path(out)
    if heal_tokens < 0:
        raise DelveError(f"--heal-tokens {heal_tokens}: must be 0 (no healing) or more")
    if method not in compression.METHODS:
        raise DelveError(f"--method {method}: available are {', '.join(compression.METHODS)}")
    if road.begin(out, command, overwrite, [*text, *calibrate, *report_text]):
        return {**read_json(out / "report.json"), "already": True}
    work = out.with_name(out.name + ".partial")
    texts = roles(text, calibrate, report_text)
    texts["report"] = cut_documents(texts["report"], report_bytes)
    rows, spent, began = _rows_file(work), {}, time.perf_counter()

    def done(stage: str) -> None:
        spent[stage] = round(time.perf_counter() - began - sum(spent.values()), 1)

    known = [parents.peek(src) for src in sources]  # configs and tokenizers, no weights yet
    road.same_tokenizer([(src, tok) for src, (_, tok) in zip(sources, known, strict=True)])
    if known[0][1] is None and known[0][0].vocab_size != 256:
        raise DelveError(f"{sources[0]}: has no tokenizer.json; upcycle needs one to read text")
    names = _unique([road.name_of(s) for s in sources])
    configs = [(n, cfg) for n, (cfg, _) in zip(names, known, strict=True)]
    check_blocks(configs)  # the road ends in an export: better to know before than after
    if method == "delve" and len(sources) > 1:
        budget = together_budget(configs, keep, latents)
        if not (work / "fused").exists():
            _together(dict(zip(names, sources, strict=True)), work, texts["calibrate"], budget,
                      calibrate_tokens, latents, seed)  # fmt: skip
        # many times the model; here, so that a kill behind the fusion does not leave it
        shutil.rmtree(work / "together", ignore_errors=True)
    else:
        each = budgets(configs, keep, latents)
        for (name, _), src, budget in zip(configs, sources, each, strict=True):
            _say(f"compress {name} to {budget:,} parameters")
            road.compress(
                src, work / "parents" / name, budget=budget, method=method,
                documents=texts["calibrate"], calibrate_tokens=calibrate_tokens, seed=seed,
            )  # fmt: skip
        _say("fuse")
        road.fuse(
            [work / "parents" / n for n in names], work / "fused", documents=texts["calibrate"],
            calibrate_tokens=calibrate_tokens // 2, latents=latents, seed=seed,
        )  # fmt: skip
    done("compress and fuse")
    if heal_tokens:
        _say(f"heal for {heal_tokens:,} tokens")
        training.heal(
            work / "fused", work / "checkpoint",
            Settings(tokens=heal_tokens, batch=batch, lr=lr, seed=seed, saving=Saving(save_every)),
            documents=texts["train"], mesh=mesh,
        )  # fmt: skip
    elif not (work / "checkpoint").exists():
        _copy(work / "fused", work / "checkpoint")
    done("heal")
    # one window for every row, whatever each parent could read
    window = min(evaluation.WINDOW, *(cfg.context_length for cfg, _ in known))
    stages = [(n, src) for n, src in zip(names, sources, strict=True)]
    stages += [(f"{n} compressed", work / "parents" / n) for n in names]
    stages += [("DELVE at step 0", work / "fused")]
    stages += [("DELVE healed", work / "checkpoint")] if heal_tokens else []
    for label, src in stages:
        if label not in rows:
            _say(f"evaluate {label}")
            model = lm.load(src)
            rows[label] = score(label, model, texts["report"], window)
            _rows_file(work, rows)
    done("evaluate")
    _say("export")
    scores = {"rows": list(rows.values()), "window": window, "command": command,
              "data_hash": {"report": data.data_hash(texts["report"])}}  # fmt: skip
    exported = road.export(
        work / "checkpoint", work / "hf", results=[scores], overwrite=(work / "hf").exists()
    )
    done("export")
    final = lm.load(work / "checkpoint")
    sample = look.generate(final, PROMPT, max_new_tokens=64)
    report = {
        "rows": list(rows.values()),
        "keep": rows[stages[-1][0]]["parameters"] / sum(rows[n]["parameters"] for n in names),
        "pool": look.info(work / "checkpoint")["pool"],
        "export": {k: exported[k] for k in ("verified", "max_abs_diff", "max_abs_logit")},
        "sample": sample["prompt"] + sample["text"],
        "seeds": {"seed": seed},
        "seconds_of_stages": spent,  # of this call; a resumed one has done some before
        "command": command,
        "versions": versions(),
        "window": window,
        "data_hash": {role: data.data_hash(docs) for role, docs in texts.items()},
    }
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (work / "rows.json").unlink(missing_ok=True)
    from .report import picture

    picture(report, work / "report.png")
    if out.exists():
        shutil.rmtree(out)
    work.rename(out)
    return report


def _rows_file(work: Path, rows: dict | None = None) -> dict:
    """Scores so far, kept beside the work so that a repeated command does not score again."""
    path = work / "rows.json"
    if rows is not None:
        write_json(path, rows)
        return rows
    return read_json(path) if path.exists() else {}


def _copy(src: Path, dst: Path) -> None:
    """A folder under a second name, which it takes when it is whole: the copy may be killed."""
    half = dst.with_name(dst.name + ".partial")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(src, half)
    half.rename(dst)


def _unique(names: list[str]) -> list[str]:
    return [f"{n}-{names[:i].count(n) + 1}" if n in names[:i] else n for i, n in enumerate(names)]


def _say(line: str) -> None:
    print(f"[upcycle] {line}", file=sys.stderr, flush=True)


sys.modules[__name__].__class__ = VerbModule
