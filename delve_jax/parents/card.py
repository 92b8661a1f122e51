"""The model card of an exported directory: README.md with Hub metadata, from facts alone.

What it says of parents, steps and text stands in the checkpoint's lineage, what it says of quality
in the results that were handed over; what nobody recorded it calls not recorded. It names no path
of the machine that wrote it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub

from .. import models
from ..config import Config, DelveError, ParentConfig
from .stock import FAMILIES, dense_parents

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
TRANSFORMERS = "transformers>=5.23,<5.25"  # of remote/modeling_delve.py; as in requirements.txt
METRICS = {"bits_per_byte": "bits per byte", "nll_per_token": "nats per token"}
LORA = """\
The linears are low-rank already, so name their inner maps: `target_modules=["u", "v"]` (a name such
as `in_proj` is refused by PEFT where that map is factored). Such an adapter moves only what the
factors let through, and was still a little better than one of about its size beside the whole map
(4.590 against 4.602 nats, delve-jax `experiments/lora.py`). Rates of 1e-2 were the best tried."""


def write(cfg: Config, facts: dict, lineage: Sequence[dict], results: Sequence[dict]) -> str:
    """The card as text.

    facts: of the export (`export.export_hf`); lineage: steps of `delve_jax.lineage`; results: of
    `delve eval --json` or a report of `delve upcycle`.
    """
    remote = facts["model_type"] == "delve"
    sections = [
        _metadata(cfg, facts, lineage),
        f"# {_title(cfg, facts)}",
        _summary(cfg, facts, lineage),
        "## Start\n\n" + _start(cfg, remote),
        "## Made of\n\n" + _made_of(cfg, lineage),
        "## How it was made\n\n" + _steps(lineage),
        "## Results\n\n" + _results(results),
        "## Check\n\n" + _check(facts),
    ]
    if remote:
        sections.append("## Limits of the code\n\n" + _limits(facts))
    sections += ["## Use\n\n" + _use(cfg, lineage), "## Citation\n\n" + _citation(cfg)]
    return "\n\n".join(sections) + "\n"


def _streams(cfg: Config) -> tuple[tuple[str, ParentConfig], ...]:
    return cfg.streams if cfg.family == "delve" else ((cfg.family, cfg),)


def _parents(lineage: Sequence[dict]) -> list[dict]:
    return [entry for entry in lineage if entry["verb"] == "parent"]


def _title(cfg: Config, facts: dict) -> str:
    if cfg.family == "delve":
        return "DELVE of " + ", ".join(cfg.names)
    factored = "factored" if facts["layout"] == "factored" else "compressed"
    return f"{cfg.family}, {factored if cfg.ranks or cfg.neurons else 'dense'}"


def license_of(lineage: Sequence[dict]) -> str | None:
    """The licence that all parents name; None where they differ or one names none."""
    found = {entry.get("license") for entry in _parents(lineage)}
    return found.pop() if len(found) == 1 else None


def _metadata(cfg: Config, facts: dict, lineage: Sequence[dict]) -> str:
    """The YAML head that the Hub reads."""
    base = [str(p["name"]).partition("@")[0] for p in _parents(lineage)]
    base = [name for name in base if HUB_ID.fullmatch(name)]
    families = sorted({sub.family for _, sub in _streams(cfg)})
    data = huggingface_hub.ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license_of(lineage) or "other",
        base_model=base or None,
        tags=["delve-jax", "low-rank", *families],
    ).to_dict()
    if base and cfg.family == "delve":
        data["base_model_relation"] = "merge"
    lines = []
    for name, value in data.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {item}" for item in value)]
        else:
            lines.append(f"{name}: {value}")
    return "\n".join(["---", *lines, "---"])


def _summary(cfg: Config, facts: dict, lineage: Sequence[dict]) -> str:
    itemsize = 2 if facts["dtype"] in ("bfloat16", "float16") else 4
    size = (
        f"{facts['parameters']:,} parameters, {facts['parameters'] * itemsize:,} bytes "
        f"({facts['dtype']}, {facts['layout']} layout), {facts['vocab_size']:,} token ids, "
        f"context {cfg.context_length:,}. Written by delve-jax."
    )
    dense = sum(models.count(parent) for parent in dense_parents(cfg))
    if any(sub.ranks or sub.neurons for _, sub in _streams(cfg)):
        size += f" Kept: {models.count(cfg) / dense:.1%} of its parents' {dense:,} parameters."
    if cfg.family != "delve":
        return size
    head = "log-linear pool (ordinary logits)"
    if cfg.latents > 1:
        head = f"mixture of {cfg.latents} (log p)"
    joint = f"connectors: {cfg.connectors}"
    if cfg.connectors != "none":
        joint += f" of rank {cfg.hub_rank}"
    if cfg.ffn_skip:
        joint += f"; routers: a token skips FFNs of less weight than {cfg.ffn_skip:g}"
    text = f"{size}\n\nPretrained models side by side in one widened residual stream, each by "
    text += f"low-rank factors: {cfg.n_superblocks} superblocks; {joint}; head: {head}."
    if cfg.codes:
        text += f" Vocabulary tables that the streams share: {', '.join(cfg.codes)}."
    return text


def _start(cfg: Config, remote: bool) -> str:
    trust = ", trust_remote_code=True" if remote else ""
    note = (
        "\n\nIts code stands in this directory; read it before you trust it. It needs "
        f"`{TRANSFORMERS}`, the versions that it was tried with."
    )
    code = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'name = "."  # this directory, or its hub id\n'
        f"model = AutoModelForCausalLM.from_pretrained(name{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained(name{trust})\n"
        'inputs = tokenizer("The residual stream", return_tensors="pt", '
        "return_token_type_ids=False)\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n```"
    )
    return code + note if remote else code


def _made_of(cfg: Config, lineage: Sequence[dict]) -> str:
    rows = ["| stream | family | layers | width | factored maps | MLP neurons |",
            "|---|---|---:|---:|---|---|"]  # fmt: skip
    for name, sub in _streams(cfg):
        neurons = ", ".join(map(str, sub.neurons or [getattr(sub, "d_ffn", 0) or "none"]))
        maps = ", ".join(n for n, _ in sub.ranks) or "none"
        rows.append(f"| {name} | {sub.family} | {sub.n_layers} | {sub.d_model} | {maps} | "
                    f"{neurons} |")  # fmt: skip
    known = _parents(lineage)
    if not known:
        return "\n".join([*rows, "", "Its parents were not recorded."])
    rows += ["", "| parent | family | revision | licence |", "|---|---|---|---|"]
    for p in known:
        name = str(p["name"])
        if HUB_ID.fullmatch(name):
            name = f"[{name}](https://huggingface.co/{name.partition('@')[0]})"
        rows.append(f"| {name} | {p['family']} | {p.get('revision') or 'not recorded'} | "
                    f"{p.get('license') or 'not named in its card'} |")  # fmt: skip
    return "\n".join(rows)


def _steps(lineage: Sequence[dict]) -> str:
    lines = [f"{i}. {_step(e)}" for i, e in enumerate(_done(lineage), 1)]
    if not lines:
        return "Not recorded: the checkpoint is older than that."
    used = [e["versions"] for e in _done(lineage) if e.get("versions")]
    if used:
        lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in used[-1].items()) + "."]
    return "\n".join(lines)


def _done(lineage: Sequence[dict]) -> list[dict]:
    return [entry for entry in lineage if entry["verb"] != "parent"]


def _step(entry: dict) -> str:
    """One step in a line: the verb, what it read, and every fact that it recorded."""
    facts = {k: v for k, v in entry.items() if k not in ("verb", "made_from", "versions", "source")}
    shown = ", ".join(f"{k} {_value(v)}" for k, v in facts.items() if v not in (None, "", {}))
    sources = " of " + ", ".join(map(str, entry["made_from"])) if entry.get("made_from") else ""
    return f"**{entry['verb']}**{sources}" + (f": {shown}" if shown else "")


def _value(value) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {_value(v)}" for k, v in value.items()) + ")"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)[:16] if re.fullmatch(r"[0-9a-f]{64}", str(value)) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _results(results: Sequence[dict]) -> str:
    parts = []
    for one in results:
        try:
            found = ["\n".join(part) for part in _tables(one)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as err:
            raise DelveError(f"--results: a damaged result ({type(err).__name__}: {err})") from None
        if not found:
            raise DelveError("--results: neither the output of `delve eval --json` nor a report of "
                             "`delve upcycle`")  # fmt: skip
        parts += found
    return "\n\n".join(parts) or (
        "None were handed to `delve export --results`; score it with `delve eval`."
    )


def _tables(one: dict) -> Iterator[list[str]]:
    """The tables of one result, each with what makes it reproducible."""
    if "rows" in one:
        table = ["| model | parameters | bytes | bits per byte | nats per token |",
                 "|---|---:|---:|---:|---:|"]  # fmt: skip
        for r in one["rows"]:
            table.append(f"| {r['name']} | {r['parameters']:,} | {r['parameter_bytes']:,} | "
                         f"{r['bits_per_byte']:.4f} | {r['nll_per_token']:.4f} |")  # fmt: skip
        yield [*table, "", _text_of(one, one["rows"][0].get("tokens"))]
    elif "nll_per_token" in one:
        cells = ", ".join(f"{label} {one[key]:.4f}" for key, label in METRICS.items())
        yield [f"On held-back text: {cells}.", "", _text_of(one, one.get("tokens"))]
    if one.get("tasks"):
        table = ["| task | examples | metric | value |", "|---|---:|---|---:|"]
        for name, metrics in one["tasks"].items():
            for metric, value in metrics.items():
                if metric != "examples" and isinstance(value, float):
                    table.append(f"| {name} | {metrics.get('examples', '')} | {metric} | "
                                 f"{value:.4f} |")  # fmt: skip
        yield table


def _text_of(one: dict, tokens) -> str:
    """What was scored, and the command, without the paths of whoever ran it."""
    digest = one.get("data_hash") or {}
    digest = digest.get("report") if isinstance(digest, dict) else digest
    bits = [f"{tokens:,} tokens" if tokens else "", f"window {one['window']}" * ("window" in one),
            f"sha256 of the text {digest[:16]}" if digest else ""]  # fmt: skip
    text = "Scored: " + ", ".join(filter(None, bits)) + "."
    command = one.get("command")
    return f"{text} Command: `{_command(command)}`." if isinstance(command, dict) else text


def _command(command: dict) -> str:
    """A verb's arguments as its command line would have them."""
    words = ["delve", str(command["verb"])]
    for name, value in command.items():
        values = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
        if name == "verb" or not values:
            continue
        shown = [Path(v).name if str(v).startswith("/") else str(v) for v in values]
        words += [f"--{name.replace('_', '-')}", *map(shlex.quote, shown)]
    return " ".join(words)


def _check(facts: dict) -> str:
    if not facts["verified"]:
        return "**Not verified**: torch was not installed where it was exported."
    return (
        "This directory was reloaded in transformers and compared with the JAX model on random "
        f"tokens, float32 on both sides: logits differ by {facts['max_abs_diff']:.1e} at most, "
        f"where the largest is {facts['max_abs_logit']:.3g}."
    )


def _limits(facts: dict) -> str:
    text = ("Batches are padded on the left. Assisted generation and static caches do not work: a "
            "recurrent state cannot be cropped. Beam search, sampling, gradient checkpointing and "
            "`Trainer` do.")  # fmt: skip
    return f"{text}\n\n{LORA}" if facts["layout"] == "factored" else text


def _use(cfg: Config, lineage: Sequence[dict]) -> str:
    licence = license_of(lineage)
    text = (
        "A base model for research: it continues text. It was not trained to follow instructions "
        "or to be safe, it has what biases and errors its parents and their text have, and "
        "compression may have changed them in ways that these numbers do not show."
    )
    if licence:
        return f"{text} Licence of its parents: {licence}."
    return f"{text} Its parents' licences differ or are not recorded: see their cards before use."


def _citation(cfg: Config) -> str:
    families = dict.fromkeys(sub.family for _, sub in _streams(cfg))
    papers = [f"[{name}](https://arxiv.org/abs/{number})"
              for name, number in (FAMILIES[f].PAPER for f in families)]  # fmt: skip
    entry = (
        "```bibtex\n@software{delve_jax,\n  title = {delve-jax: low-rank autoregressive hybrids "
        "of pretrained language models},\n  year = {2026}\n}\n```"
    )
    return f"{entry}\n\nIts parents' architectures: {', '.join(papers)}."
