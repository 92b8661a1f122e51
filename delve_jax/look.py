"""The verbs that only look: evaluate, generate, info. Nothing is written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import checkpoint, data, lm, models, parents
from . import evaluate as evaluation
from .config import DelveError
from .evaluate import valid_count
from .tasks import evaluate_task


def texts_of(files: Sequence[str | Path]) -> list[str]:
    """The documents of several text files."""
    return [document for file in files for document in data.read_documents(file)]


def evaluate(
    src,
    text: Sequence[str] = (),
    tasks: Sequence[str] = (),
    *,
    backend: str = "jax",
    trust_remote_code: bool = False,
    keep: float | None = None,
    streams: Sequence[str] = (),
    dtype: str = "float32",
    mesh: str | None = None,
    **how,
) -> dict:
    """nll and bits per byte on text files, metrics of jsonl tasks; backend "jax" or "hf".

    keep, streams: a part of the model; dtype: of its parameters in memory (scores are computed in
    float32 from them: in the dtype that is stored nothing is lost); mesh: devices they are spread
    over, as "model=4" (`lm.load`; jax alone). how: limit, shots, shots_from, mmlu, run_code of
    `tasks.evaluate_task`. -> nll_per_token (nats), bits_per_byte, tokens, bytes, parameters,
    parameter_bytes; tasks by file name. DelveError: nothing to score, an unreadable file, a model
    without tokenizer.

    >>> import delve_jax, pathlib
    >>> _ = pathlib.Path("text.txt").write_text("def double(x):\\n    return 2 * x\\n" * 9)
    >>> r = delve_jax.evaluate(delve_jax.upcycle.embedded_parents()[-1], text=["text.txt"])
    >>> r["bytes"], 0 < r["bits_per_byte"] < 8
    (288, True)
    """
    if backend not in ("jax", "hf"):
        raise DelveError(f"--backend {backend}: choose jax or hf")
    if not text and not tasks:
        raise DelveError("nothing to evaluate on: give --text FILE or --tasks FILE.jsonl")
    if backend == "hf":
        if keep is not None or streams:
            raise DelveError("--keep, --streams: for --backend jax; export the part to score it")
        if mesh or dtype != "float32":
            raise DelveError("--dtype, --mesh: for --backend jax; transformers scores in float32")
        model = evaluation.hf_scorer(src, trust_remote_code)
    else:
        model = lm.load(src, dtype, mesh, keep=keep, streams=streams)
    out = {"model": str(src), "backend": backend}
    if text:
        out |= evaluation.evaluate(model, texts_of(text))
    if tasks:
        out["tasks"] = {n: evaluate_task(model, t, **how) for n, t in _task_names(tasks).items()}
    return out


def _task_names(files: Sequence[str | Path]) -> dict[str, str | Path]:
    """{name: file}: the stem, or the whole path of files whose stems are the same."""
    stems = [Path(file).stem for file in files]
    return {
        stem if stems.count(stem) == 1 else str(file): file
        for stem, file in zip(stems, files, strict=True)
    }


def generate(
    src,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    keep: float | None = None,
    streams: Sequence[str] = (),
    dtype: str = "float32",
    mesh: str | None = None,
):
    """Continue a text -> {"prompt", "text", "tokens"}; greedy at temperature 0.

    It ends before `<|endoftext|>`, or after `max_new_tokens`. keep, streams: with a part of the
    model; dtype, mesh: how it lies in memory (`lm.load`). src may be a loaded LM. DelveError: it
    has no tokenizer, an empty prompt.

    >>> import delve_jax
    >>> source = delve_jax.upcycle.embedded_parents()[-1]
    >>> said = delve_jax.generate(source, "def ", max_new_tokens=4)
    >>> sorted(said), len(said["tokens"]) <= 4
    (['prompt', 'text', 'tokens'], True)
    """
    model = src if isinstance(src, lm.LM) else lm.load(src, dtype, mesh, keep=keep, streams=streams)
    if model.tokenizer is None:
        raise DelveError(f"{src}: has no tokenizer.json, so it cannot continue text")
    ids = model.tokenizer.encode(prompt, add_special_tokens=False).ids
    eot = data.eot_of(model.tokenizer)
    if not ids:
        if eot is None:
            raise DelveError("--prompt: is empty; give some text")
        ids = [eot]
    ends = [] if eot is None else [eot]
    out = model.generate(
        np.array([ids]), max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        stop=ends, seed=seed,
    )  # fmt: skip
    new = evaluation.ended(np.asarray(out)[:, len(ids) :], ends)[0]
    return {"prompt": prompt, "text": model.tokenizer.decode(new), "tokens": new}


def info(src) -> dict:
    """Family, parameters, bytes, ranks, pool weights and tokenizer hash of any source.

    No weights are read but a pool's (of an exported DELVE: all). DelveError: no source, or a
    damaged one.

    >>> import delve_jax
    >>> facts = delve_jax.info(delve_jax.upcycle.embedded_parents()[-1])
    >>> facts["family"], facts["parameters"], facts["layers"]
    ('rwkv', 1528448, 3)
    """
    kind, path = parents.detect(src), parents.resolve(src)
    if kind == "checkpoint":
        cfg = checkpoint.load_config(path)
        tokenizer = checkpoint.load_tokenizer(path)
        pool = checkpoint.restore_part(path, "pool") if cfg.family == "delve" else None
    elif kind == "delve":
        cfg, params, tokenizer = parents.load(src)
        pool = params["pool"]
    else:
        (cfg, tokenizer), pool = parents.peek(src), None
    out = {
        "family": cfg.family,
        "parameters": valid_count(cfg),
        "parameter_bytes": evaluation.parameter_bytes(cfg),
        "dtype": cfg.dtype,
        "vocab_size": cfg.vocab_size,
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest() if tokenizer else None,
    }
    if cfg.family != "delve":
        return out | {"layers": cfg.n_layers, "width": cfg.d_model, **_sizes(cfg),
                      "storage": cfg.storage}  # fmt: skip
    a, log_pi = (np.asarray(pool[k], np.float64) if k in pool else None for k in ("a", "log_pi"))
    if log_pi is not None:
        weights = np.exp(log_pi - np.logaddexp.reduce(log_pi))
    if a is not None:  # of a mixture of pools, their mean
        weights = a if log_pi is None else weights @ a
    return out | {
        "latents": cfg.latents,
        "superblocks": cfg.n_superblocks,
        "connectors": cfg.connectors,
        "hub_rank": None if cfg.connectors == "none" else cfg.hub_rank,
        "pool": dict(zip(cfg.names, weights.tolist(), strict=True)),
        "streams": {
            n: {"family": s.family, "layers": s.n_layers, "width": s.d_model,
                "parameters": models.count(s), **_sizes(s)}
            for n, s in cfg.streams
        },
        "teachers": list(cfg.teachers),
    }  # fmt: skip


def _sizes(cfg) -> dict:
    """Ranks of the factored maps; MLP widths where neurons were pruned."""
    ranks = {name: list(ranks) for name, ranks in cfg.ranks}
    return {"ranks": ranks, **({"neurons": list(cfg.neurons)} if cfg.neurons else {})}
