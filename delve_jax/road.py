"""The verbs on paths: convert, compress, fuse, heal, evaluate, export, generate, info.

Each reads a source, does one thing and leaves a checkpoint directory (or numbers). Work stands in
DST.partial with `run.json` (the arguments); the same call resumes it, a finished one says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from . import checkpoint, data, lm, models, parallel, parents
from . import compress as compression
from . import evaluate as evaluation
from . import fuse as fusion
from .config import Config, DelveError, read_json
from .metrics import versions

CALIBRATION_WINDOW = 512  # longest calibration window; shorter where the context is


def begin(dst: str | Path, command: dict, overwrite: bool = False) -> bool:
    """Claim DST for `command`; True where it stands there finished already.

    DelveError where DST or DST.partial holds the work of other arguments (unless overwrite).
    """
    dst = Path(dst)
    partial = dst.with_name(dst.name + ".partial")
    command = json.loads(json.dumps(command, default=str))
    if dst.exists() and not overwrite:
        record = dst / "run.json"
        if record.exists() and read_json(record).get("command") == command:
            return True
        raise DelveError(
            f"{dst}: exists and was made with other arguments; name another DST or --overwrite"
        )
    record = partial / "run.json"
    if partial.exists() and not (record.exists() and read_json(record)["command"] == command):
        if record.exists() and not overwrite:
            raise DelveError(
                f"{partial}: holds unfinished work of other arguments; repeat those, or --overwrite"
            )
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"command": command, "versions": versions()}, indent=2) + "\n")
    return False


def already(dst: str | Path) -> dict:
    """What a repeated verb answers."""
    return {"path": str(dst), "already": True, **info(dst)}


def texts_of(files: Sequence[str | Path]) -> list[str]:
    """The documents of several text files."""
    return [document for file in files for document in data.read_documents(file)]


def calibration_windows(
    cfg: Config, tokenizer_json: str | None, documents: Sequence[str], tokens: int, seed: int = 0
) -> np.ndarray:
    """Random windows [N, T] of the text's ids, about `tokens` in all."""
    tok = data.load_tokenizer(tokenizer_json, cfg.vocab_size)
    ids = data.encode_documents(tok, documents)
    T = min(cfg.context_length, CALIBRATION_WINDOW, len(ids))
    if T < 2:
        raise DelveError("--calibrate: the text has fewer than 2 tokens; give more text")
    windows = data.windows(ids, T)
    order = np.random.default_rng(seed).permutation(len(windows))
    return windows[np.sort(order[: max(1, tokens // T)])]


def name_of(src: str | Path) -> str:
    """A short name of a source: its directory, file or repository name without revision."""
    return re.sub(r"@.*$", "", str(src).rstrip("/")).rsplit("/", 1)[-1].removesuffix(".pth")


def valid_count(cfg: Config) -> int:
    """Parameters at the valid vocabulary rows (the padding rows of a checkpoint not counted)."""
    if cfg.family != "delve":
        cfg = dataclasses.replace(cfg, vocab_rows=cfg.vocab_size)
    return models.count(cfg)


def convert(src, dst, *, dtype: str | None = None, mesh: str | None = None, overwrite=False):
    """Any source -> checkpoint directory (sharded Orbax, in the source's dtype unless given)."""
    command = {"verb": "convert", "src": src, "dtype": dtype, "mesh": mesh}
    if begin(dst, command, overwrite):
        return already(dst)
    on = parallel.make_mesh(mesh) if mesh else None
    cfg, params, tokenizer = parents.load(src, dtype=dtype, mesh=on)
    if dtype:
        cfg = dataclasses.replace(cfg, dtype=dtype)
    commit = parents.commit(parents.resolve(src))
    extra = {"source.json": {"source": str(src), "commit": commit}}
    checkpoint.save(dst, cfg, params, tokenizer, overwrite, extra)
    return {"path": str(dst), **info(dst)}


def compress(
    src,
    dst,
    *,
    keep: float | None = None,
    budget: int | None = None,
    method: str = "delve",
    calibrate: Sequence[str] = (),
    documents: Sequence[str] | None = None,
    calibrate_tokens: int = 65536,
    seed: int = 0,
    overwrite: bool = False,
):
    """Parent -> factored checkpoint; `keep` is the kept share of ALL parameters.

    calibrate: text files, or `documents` themselves. Leaves DST/compress.json (ranks, errors) and
    DST/spectra.npz (sigma^2 of every map). DelveError: a ratio that cannot be met (says which can).
    """
    command = {"verb": "compress", "src": src, "keep": keep, "budget": budget, "method": method,
               "calibrate": list(map(str, calibrate)), "calibrate_tokens": calibrate_tokens,
               "data_hash": data.data_hash(documents) if documents else None,
               "seed": seed}  # fmt: skip
    if begin(dst, command, overwrite):
        return already(dst)
    cfg, params, tokenizer = parents.load(src, dtype="float32")
    try:
        compression.plan_for(cfg, keep=keep, budget=budget)  # a ratio that fails, fails at once
        windows = None
        if method == "delve" and keep != 1.0:
            if documents is None:
                documents = texts_of(calibrate)
            if not documents:
                raise DelveError(
                    "--calibrate TEXT is missing: --method delve needs activations (svd does not)"
                )
            windows = calibration_windows(cfg, tokenizer, documents, calibrate_tokens, seed)
        cfg, params, report = compression.compress(
            cfg, params, windows, keep=keep, budget=budget, method=method
        )
    except DelveError as err:
        raise DelveError(f"{name_of(src)}: {err}") from None
    cfg = dataclasses.replace(cfg, dtype="float32")
    partial = Path(dst).with_name(Path(dst).name + ".partial")
    np.savez(partial / "spectra.npz", **{k.replace("/", "."): v for k, v in report.spectra.items()})
    absolute = str(Path(src).resolve()) if Path(src).exists() else str(src)
    facts = {"source": absolute, **report.to_json()}
    checkpoint.save(dst, cfg, params, tokenizer, overwrite, {"compress.json": facts})
    return {"path": str(dst), **info(dst)}


def same_tokenizer(named: list[tuple[str, str | None]]) -> None:
    """DelveError unless all (source, tokenizer JSON) pairs give every id the same meaning."""
    first, reference = named[0]
    meaning = lambda text: (  # noqa: E731
        None if text is None else data.load_tokenizer(text, 0).get_vocab(with_added_tokens=True)
    )
    expected = meaning(reference)
    for name, text in named[1:]:
        if text != reference and meaning(text) != expected:
            raise DelveError(
                f"{name}: its tokenizer differs from that of {first}; parents must share one"
            )


def fuse(
    sources,
    dst,
    *,
    calibrate: Sequence[str] = (),
    documents: Sequence[str] | None = None,
    calibrate_tokens: int = 32768,
    latents: int = 1,
    hub_rank: int | None = None,
    teachers: Sequence[str] | None = None,
    seed: int = 0,
    overwrite: bool = False,
):
    """Parents (compressed or dense) -> DELVE at step 0. latents: 1, or 0 for one per parent.

    Pool weights are fitted on the text, equal without it. `teachers` defaults to the dense sources
    that the compressed parents recorded.
    """
    sources = [str(s) for s in sources]
    command = {"verb": "fuse", "sources": sources, "calibrate": list(map(str, calibrate)),
               "calibrate_tokens": calibrate_tokens, "latents": latents, "hub_rank": hub_rank,
               "data_hash": data.data_hash(documents) if documents else None,
               "seed": seed}  # fmt: skip
    if begin(dst, command, overwrite):
        return already(dst)
    loaded = [(s, *parents.load(s, dtype="float32")) for s in sources]
    if odd := [s for s, cfg, _, _ in loaded if cfg.family == "delve"]:
        raise DelveError(f"{odd[0]}: is a DELVE already; fuse takes parents")
    same_tokenizer([(s, text) for s, _, _, text in loaded])
    tokenizer = loaded[0][3]
    parts, taken = [], []
    for s, cfg, params, _ in loaded:
        name = name_of(s)
        taken.append(name)
        if taken.count(name) > 1:
            name = f"{name}-{taken.count(name)}"
        # padding rows of the vocabulary end here: all streams share the valid ids
        cfg, params, _ = compression.compress(cfg, params, None, keep=1.0, method="svd") if (
            cfg.vocab_rows != cfg.vocab_size
        ) else (cfg, params, None)  # fmt: skip
        parts.append((name, dataclasses.replace(cfg, dtype="float32"), params))
    if teachers is None:
        teachers = [_teacher_of(s) for s in sources]
    if documents is None and calibrate:
        documents = texts_of(calibrate)
    windows = None
    if documents:
        shortest = min((c for _, c, _ in parts), key=lambda c: c.context_length)
        windows = calibration_windows(shortest, tokenizer, documents, calibrate_tokens, seed)
    cfg, params, report = fusion.fuse(
        parts, windows, latents=latents or len(parts), hub_rank=hub_rank,
        teachers=tuple(map(str, teachers)), seed=seed,
    )  # fmt: skip
    checkpoint.save(dst, cfg, params, tokenizer, overwrite, {"fuse.json": report})
    return {"path": str(dst), **info(dst), "fit": report}


def _teacher_of(src: str) -> str:
    """The dense source that a compressed checkpoint came from, else the source itself."""
    facts = Path(src) / "compress.json"
    if facts.exists():
        return read_json(facts)["source"]
    return str(Path(src).resolve()) if Path(src).exists() else src


def heal(
    src,
    dst,
    *,
    text: Sequence[str] = (),
    documents: Sequence[str] | None = None,
    tokens: int = 200_000,
    teachers: Sequence[str] | None = None,
    objective: str = "ce+kl",
    batch: int = 8,
    window: int | None = None,
    lr: float = 1e-3,
    kl_weight: float = 0.5,
    save_every: int = 200,
    mesh: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
):
    """Train a compressed or fused checkpoint on text, against its dense parents' pool.

    teachers: default the sources recorded in the config; one that is missing is a DelveError
    (objective "ce" needs none). Leaves metrics.jsonl; a repeated call resumes.
    """
    from .train.heal import heal as run

    command = {"verb": "heal", "src": src, "text": list(map(str, text)), "tokens": tokens,
               "data_hash": data.data_hash(documents) if documents else None,
               "teachers": teachers and list(map(str, teachers)), "objective": objective,
               "batch": batch, "window": window, "lr": lr, "kl_weight": kl_weight, "mesh": mesh,
               "seed": seed}  # fmt: skip
    if objective not in ("ce", "ce+kl"):
        raise DelveError(f"--objective {objective}: choose ce or ce+kl")
    if tokens < 1:
        raise DelveError(f"--tokens {tokens}: must be at least 1")
    if begin(dst, command, overwrite):
        return already(dst)
    on = parallel.make_mesh(mesh)
    if batch % on.shape["data"]:
        raise DelveError(
            f"--batch {batch}: must be a multiple of the mesh's data={on.shape['data']}"
        )
    cfg, params, tokenizer = parents.load(src, dtype="float32", mesh=on)
    loaded = []
    if objective != "ce":
        if teachers is None:
            teachers = cfg.teachers if cfg.family == "delve" else [_teacher_of(str(src))]
        for teacher in teachers:
            try:
                t_cfg, t_params, _ = parents.load(teacher, dtype="float32", mesh=on)
            except DelveError as err:
                raise DelveError(
                    f"teacher {err}; name it with --teachers, or --objective ce"
                ) from None
            loaded.append((t_cfg, t_params))
    tok = data.load_tokenizer(tokenizer, cfg.vocab_size)
    ids = data.encode_documents(tok, documents if documents is not None else texts_of(text))
    T = min(window or cfg.context_length, CALIBRATION_WINDOW if window is None else window)
    windows = data.windows(ids, T + 1, T)
    if len(windows) < batch:
        raise DelveError(
            f"--data: {len(windows)} windows of {T} tokens do not fill a batch of {batch}"
        )
    partial = Path(dst).with_name(Path(dst).name + ".partial")
    params, report = run(
        cfg, params, windows, loaded, tokens=tokens, workdir=partial, batch=batch, lr=lr,
        kl_weight=kl_weight, seed=seed, mesh=on, save_every=save_every,
    )  # fmt: skip
    checkpoint.save(dst, cfg, params, tokenizer, overwrite, {"heal.json": report})
    shutil.rmtree(Path(dst) / "state", ignore_errors=True)  # steps serve resuming only
    return {"path": str(dst), **info(dst), "heal": report}


def evaluate(
    src,
    text: Sequence[str] = (),
    tasks: Sequence[str] = (),
    *,
    backend: str = "jax",
    trust_remote_code: bool = False,
) -> dict:
    """nll and bits per byte on text files, metrics of jsonl tasks; backend "jax" or "hf"."""
    if backend not in ("jax", "hf"):
        raise DelveError(f"--backend {backend}: choose jax or hf")
    if not text and not tasks:
        raise DelveError("nothing to evaluate on: give --text FILE or --tasks FILE.jsonl")
    model = lm.load(src) if backend == "jax" else evaluation.hf_scorer(src, trust_remote_code)
    out = {"model": str(src), "backend": backend}
    if text:
        out |= evaluation.evaluate(model, texts_of(text))
    if tasks:
        out["tasks"] = {Path(t).stem: evaluation.evaluate_task(model, t) for t in tasks}
    return out


def export(src, dst, *, layout: str | None = None, overwrite: bool = False) -> dict:
    """Checkpoint -> Hugging Face directory, reloaded and compared where torch is installed."""
    from .parents.export import export_hf

    if parents.detect(src) != "checkpoint":
        raise DelveError(f"{src}: not a checkpoint directory; run `delve convert {src} DST` first")
    return export_hf(src, dst, layout, overwrite=overwrite)


def generate(
    src, prompt: str, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
):
    """Continue a text -> {"prompt", "text", "tokens"}; greedy at temperature 0."""
    model = src if isinstance(src, lm.LM) else lm.load(src)
    if model.tokenizer is None:
        raise DelveError(f"{src}: has no tokenizer.json, so it cannot continue text")
    ids = model.tokenizer.encode(prompt).ids
    if not ids:
        eot = data.eot_of(model.tokenizer)
        if eot is None:
            raise DelveError("--prompt: is empty; give some text")
        ids = [eot]
    if temperature < 0:
        raise DelveError(f"--temperature {temperature}: must not be negative")
    out = model.generate(np.array([ids]), max_new_tokens, temperature=temperature, seed=seed)
    new = np.asarray(out)[0, len(ids) :].tolist()
    return {"prompt": prompt, "text": model.tokenizer.decode(new), "tokens": new}


def info(src) -> dict:
    """Family, parameters, bytes, ranks, pool weights and tokenizer hash of any source."""
    kind, path = parents.detect(src), parents.resolve(src)
    if kind == "checkpoint":
        cfg = checkpoint.load_config(path)
        tokenizer = checkpoint.load_tokenizer(path)
        pool = checkpoint.restore_part(path, "pool") if cfg.family == "delve" else None
    else:
        cfg, params, tokenizer = parents.load(src)
        pool = params.get("pool")
    out = {
        "family": cfg.family,
        "parameters": valid_count(cfg),
        "parameter_bytes": evaluation.parameter_bytes(cfg),
        "dtype": cfg.dtype,
        "vocab_size": cfg.vocab_size,
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest() if tokenizer else None,
    }
    if cfg.family != "delve":
        return out | {"layers": cfg.n_layers, "width": cfg.d_model, "ranks": _ranks(cfg)}
    if cfg.latents == 1:
        weights = np.asarray(pool["a"], np.float64)
    else:
        weights = np.asarray(jax.nn.softmax(jnp.asarray(pool["log_pi"])), np.float64)
    return out | {
        "latents": cfg.latents,
        "superblocks": cfg.n_superblocks,
        "hub_rank": cfg.hub_rank,
        "pool": dict(zip(cfg.names, weights.tolist(), strict=True)),
        "streams": {
            n: {"family": s.family, "layers": s.n_layers, "width": s.d_model,
                "parameters": models.count(s), "ranks": _ranks(s)}
            for n, s in cfg.streams
        },
        "teachers": list(cfg.teachers),
    }  # fmt: skip


def _ranks(cfg) -> dict:
    return {name: list(ranks) for name, ranks in cfg.ranks}
