"""What a DELVE does on a text, to look at: whom its pool trusts, what its hub says, where it gains.

Text is read in the windows of `evaluate` and every token scored once, so that the pooled numbers
are those of `delve eval`. Dense parents read the same windows, one after the other in memory.
Letters beside those of `models`: B windows, T positions in a window, K streams, s sync points (s of
them, one before each superblock but the first). nll_BT: nats; a gain is the nll of the best single
parent over the whole text minus the pooled one: positive where the hybrid is better.

Token types, decided by the first character that is no space, and the character before the token:
  word start         an ASCII letter behind a space (own or the token before's), symbol or the start
  word continuation  an ASCII letter directly behind a letter or digit of the token before
  space              nothing but whitespace (newlines included)
  digit, symbol      any other ASCII character; `_` is a symbol
  other              special tokens, and all that is not pure ASCII (pieces of a character included)
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from . import data, lm, parallel
from . import evaluate as evaluation
from .config import DelveConfig, DelveError
from .look import texts_of
from .models import delve
from .report import inspection_picture
from .road import load_teacher

ALARM = 0.5  # hub update over the stream that it is added to (hybrid.md, section 5)
TYPES = ("word start", "word continuation", "space", "digit", "symbol", "other")
COPYING = ("first in its window", "seen before in it")
QUARTERS = tuple(f"quarter {i} of a window" for i in (1, 2, 3, 4))
SAMPLES, SEED = 1000, 0  # of the bootstrap
FEWEST = 10  # documents that are drawn in the place of windows
EXAMPLE = 64  # tokens whose weights are drawn: as many as can be labelled
BINS = 24


def inspect(
    src, text: Sequence[str], *, out: str | Path | None = None,
    parents: Sequence[str] | None = None, window: int | None = None, limit: int | None = None,
    dtype: str = "float32", mesh: str | None = None,
) -> dict:  # fmt: skip
    """Diagnostics of a DELVE (a source, or an LM) on text files; JSON values.

    parents: the dense models to beat (default: those recorded in the config; where one of these
    cannot be read, the comparison is with the streams as they stand in the hybrid, and says so).
    window: positions read at once, as in `evaluate`; limit: the first so many tokens of the text.
    dtype, mesh: how the DELVE and its parents lie in memory (`lm.load`).
    out: a directory that gets inspect.json and inspect.png. DelveError: src is no DELVE or has no
    tokenizer, too little text, a named parent that cannot be read or has other ids.
    """
    if not text:
        raise DelveError("nothing to inspect on: give --text FILE")
    for flag, value in (("window", window), ("limit", limit)):
        if value is not None and value < 2:
            raise DelveError(f"--{flag} {value}: must be at least 2")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise DelveError(f"--out {out}: is a file; name a directory")
    on = parallel.make_mesh(mesh) if mesh else None
    loaded = isinstance(src, lm.LM)
    model, named = (src, "the model") if loaded else (lm.load(src, dtype, on), str(src))
    cfg = model.config
    if cfg.family != "delve":
        raise DelveError(f"{named}: is {cfg.family}, not a DELVE; `delve eval` scores it")
    try:
        tok = model.tokenizer or data.load_tokenizer(None, cfg.vocab_size)
    except DelveError as err:
        raise DelveError(f"{named}: {err}") from None
    documents, bos = texts_of(text), data.eot_of(tok)
    ids = data.encode_documents(tok, documents)
    evaluation.check_ids(ids, cfg.vocab_size)
    size = sum(len(document.encode("utf-8")) for document in documents)
    if limit is not None and limit < len(ids):
        ids = ids[:limit]
        raw = isinstance(tok, data.ByteTokenizer)
        size = limit if raw else max(1, len(tok.decode(ids.tolist()).encode("utf-8")))
    if len(ids) < 2:
        raise DelveError(f"--text {' '.join(map(str, text))}: {len(ids)} token; give more text")

    stream = ids if bos is None else np.concatenate([[np.int32(bos)], ids])
    n = len(stream) - 1  # tokens that are predicted
    T = min(window or min(cfg.context_length, evaluation.WINDOW), -(-n // 64) * 64)
    start_B, first_B = np.array(evaluation.spans(n, T, max(1, T // 2))).T
    at_BT = start_B[:, None] + np.arange(T)
    read_BT = at_BT < n
    scored_BT = read_BT & (at_BT >= first_B[:, None])
    target_BT = np.minimum(at_BT + 1, n)  # where in the stream the predicted token stands
    rows = stream[np.minimum(at_BT, n - 1)], stream[target_BT]

    K = len(cfg.names)
    score = functools.partial(_traced(cfg), model.params)
    # pooled and K streams' logits are alive at once, and one more while a softmax is taken
    batch = evaluation.batch_size(T, cfg.vocab_size * (K + 2))
    nll_BTM, more_BTX = _run(evaluation.Scorer(score, cfg.vocab_size, T), rows, batch, "hybrid")
    pooled_BT = nll_BTM[..., 0]
    streams = {name: nll_BTM[..., 1 + k] for k, name in enumerate(cfg.names)}
    text_of = getattr(model.tokenizer, "to_str", None)  # raw bytes have none
    dense, missing = _parents(cfg, text_of and text_of(), parents, rows, on, dtype)
    rivals = streams if missing or not dense else dense

    def scores(nll_BT) -> dict:
        # without `<|endoftext|>` nothing predicts the first token: log V, as in `evaluate`
        total = nll_BT[scored_BT].sum(dtype=np.float64)
        total = float(total) + (math.log(cfg.vocab_size) if bos is None else 0.0)
        return {"nll_per_token": total / len(ids), "bits_per_byte": total / math.log(2) / size}

    best = min(rivals, key=lambda name: rivals[name][scored_BT].sum(dtype=np.float64))
    both = pooled_BT, rivals[best]
    b = len(at_BT) // 2
    middle = b, np.flatnonzero(scored_BT[b])[:EXAMPLE]
    seen_BT = _seen_at(stream)[target_BT] >= start_B[:, None]
    quarter_BT = np.broadcast_to(np.arange(T) * 4 // T, at_BT.shape)
    # what is drawn: windows of one document err alike, those of few documents tell no spread
    document_B = np.cumsum(stream[:-1] == bos)[first_B] if bos is not None else np.zeros(len(rows))
    drawn = "documents" if len(np.unique(document_B)) >= FEWEST else "windows"
    unit_B = document_B if drawn == "documents" else np.arange(len(at_BT))
    # windows overlap and score their second half: positions are compared in disjoint ones
    apart = (a[_disjoint(start_B, T)] for a in (unit_B, quarter_BT, read_BT, *both))
    report = {
        "model": named, "text": list(map(str, text)), "data_hash": data.data_hash(documents),
        "tokens": len(ids), "bytes": size, "limit": limit, "window": T, "windows": len(at_BT),
        **scores(pooled_BT),
        "streams": {name: scores(nll_BT) for name, nll_BT in streams.items()},
        "parents": {name: scores(nll_BT) for name, nll_BT in dense.items()},
        "parents_missing": missing,
        "compared_with": "streams" if rivals is streams else "parents", "best": best,
        "intervals_over": drawn,
        "gain": grouped(("all",), unit_B, np.zeros_like(at_BT), scored_BT, *both)["all"],
        "by_type": grouped(TYPES, unit_B, token_types(tok, stream)[target_BT], scored_BT, *both),
        "by_copying": grouped(COPYING, unit_B, seen_BT, scored_BT, *both),
        "by_position": grouped(QUARTERS, *apart),
        "pool": _pool(cfg, model.params, more_BTX[..., :K][scored_BT]),
        "hub": _hub(cfg, more_BTX[..., K:][scored_BT]),
        "example": {
            "tokens": [tok.decode([int(i)], skip_special_tokens=False) for i in rows[1][middle]],
            "weights": _by(cfg.names, more_BTX[..., :K][middle].T),
        },
    }  # fmt: skip
    if out is None:
        return report
    _write(Path(out), report)
    return report | {"path": str(out)}


def _parents(cfg: DelveConfig, tokenizer: str | None, asked: Sequence[str] | None, rows, *how):
    """({name: nll_BT of the dense parent}, {name: why it cannot be read}); one in memory a time."""
    sources = list(map(str, cfg.teachers if asked is None else asked))
    names = cfg.names if len(sources) == len(cfg.names) else sources
    dense, missing = {}, {}
    for name, source in zip(names, sources, strict=True):
        try:
            sub, params = load_teacher(source, tokenizer, asked is None, *how)
            if sub.vocab_size != cfg.vocab_size:
                raise DelveError(f"{source}: has {sub.vocab_size} ids, the DELVE {cfg.vocab_size}")
        except DelveError as err:
            if asked is not None:
                raise DelveError(f"--parents {err}") from None
            missing[name] = str(err)
            continue
        scorer = evaluation.as_scorer(evaluation.Model(sub, params))
        batch = evaluation.batch_size(rows[0].shape[1], sub.vocab_size)
        dense[name] = _run(scorer, rows, batch, f"parent {name}")[0]
    return dense, missing


def _run(scorer, rows, batch: int, desc: str) -> tuple[np.ndarray, np.ndarray]:
    """Both of what `scorer.score` gives, for all windows [B, T, ..], a batch at a time."""
    B, T = rows[0].shape
    parts = ([a_BT[i : i + batch] for a_BT in rows] for i in range(0, B, batch))
    out, _ = evaluation.run_rows(scorer, parts, batch, T, B, desc)
    return tuple(np.stack(part) for part in zip(*out, strict=True))


@functools.lru_cache(maxsize=8)
def _traced(cfg: DelveConfig) -> Callable:
    """jit of (params, tokens_BT, targets_BT) -> nll_BTM, pooled and then each stream's own, and
    [B, T, K + s K]: weights w_BTK beside the hub's ratios."""

    def run(params, tokens_BT, targets_BT):
        with jax.default_matmul_precision("highest"):
            f, _, way = delve.traced(cfg, params, tokens_BT)
            logits = [delve.head(cfg, params, f), *delve.stream_logits(cfg, params, f)]
            nll_BTM = jnp.stack([evaluation.nll_of(x, targets_BT)[0] for x in logits], -1)
            delta = jnp.zeros(delve.gate_outputs(cfg))
            if cfg.gate_proj:
                delta = delve.gate(cfg, params["gate"], f)
            w_BTK = stream_weights(cfg, params["pool"], delta)
            more = [jnp.broadcast_to(w_BTK, (*tokens_BT.shape, len(cfg.names)))]
            if "hub" in params:
                ratio_BTsK = hub_ratios(cfg, params["hub"], way["h"])
                more.append(ratio_BTsK.reshape(*tokens_BT.shape, -1))
        return nll_BTM, jnp.concatenate(more, -1)

    return jax.jit(run)


def stream_weights(cfg: DelveConfig, pool: dict, delta) -> jax.Array:
    """w [.., K], sum 1: the part that each stream has in the pool where the gate says delta.

    J = K: the mixture's weights. Else |a| over its sum (training may turn an a negative), for
    1 < J < K the a of the latents averaged by pi first. Equal where every a is 0 (a fit to parents
    that know nothing ends there: any weight would only hurt).
    """
    a_JK, log_pi_J = delve.pool_weights(cfg, pool, delta)
    if a_JK is None:
        return jnp.exp(log_pi_J)
    if log_pi_J is None:
        w = jnp.abs(a_JK[..., 0, :])
    else:
        w = jnp.einsum("...j,...jk->...k", jnp.exp(log_pi_J), jnp.abs(a_JK))
    total = w.sum(-1, keepdims=True)
    return jnp.where(total > 0, w / jnp.where(total > 0, total, 1), 1 / w.shape[-1])


def hub_ratios(cfg: DelveConfig, hubs: dict, h: dict) -> jax.Array:
    """ratio_BTsK: norm of what the hub adds to each stream over the norm of the stream before.

    h: {name: h_SBTD} as `delve.traced` gives it; the last superblock's end has no hub behind it.
    """
    before = {name: h[name][:-1] for name in cfg.names}
    after = jax.vmap(functools.partial(delve.hub, cfg))(hubs, before)
    norm = functools.partial(jnp.linalg.norm, axis=-1)
    tiny = jnp.finfo(jnp.float32).tiny  # a stream of zeros must not give NaN
    ratios = [norm(after[n] - before[n]) / jnp.maximum(norm(before[n]), tiny) for n in cfg.names]
    return jnp.moveaxis(jnp.stack(ratios, -1), 0, 2)


# ---- tokens --------------------------------------------------------------------------------------


def token_types(tok, ids) -> np.ndarray:
    """[n] index in TYPES of each token, from its text and the last character before it."""
    known, at_n = np.unique(ids, return_inverse=True)
    texts = [tok.decode([int(i)]) for i in known]  # a special token has none
    kinds_2u = np.array([[TYPES.index(_type(t, inside)) for t in texts] for inside in (0, 1)])
    word_u = np.array([t[-1:].isalnum() for t in texts])
    inside_n = np.concatenate([[False], word_u[at_n][:-1]])
    return kinds_2u[inside_n.astype(int), at_n]


def _type(text: str, inside: bool) -> str:
    """The type of a token; inside: a letter or digit stands directly before it."""
    if not text or not text.isascii():
        return "other"
    core = text.lstrip()
    if not core:
        return "space"
    if core[0].isalpha():
        return "word continuation" if inside and core == text else "word start"
    return "digit" if core[0].isdigit() else "symbol"


def _seen_at(stream) -> np.ndarray:
    """[n] where each id of the stream stood the last time before, -1 where never."""
    order = np.argsort(stream, kind="stable")
    same = stream[order][1:] == stream[order][:-1]
    out = np.full(len(stream), -1)
    out[order[1:][same]] = order[:-1][same]
    return out


def _disjoint(start_B, T: int) -> list[int]:
    """Windows, from the first on, that together read no token twice."""
    out = [0]
    for b, start in enumerate(start_B):
        if start >= start_B[out[-1]] + T:
            out.append(b)
    return out


def grouped(names: Sequence[str], unit_B, label_BT, mask_BT, pooled_BT, best_BT) -> dict:
    """{group: tokens, share, nll of both models, gain and its interval} of groups that occur.

    label_BT: index in `names`; only tokens under mask_BT count. interval: 95 % of the gain, paired
    bootstrap over what unit_B names of each window (its document, or itself), whose tokens are not
    independent; None from fewer than two of these.
    """
    total, out = int(mask_BT.sum()), {}
    unit_B = np.unique(unit_B, return_inverse=True)[1]
    U = unit_B.max() + 1
    draws_nU = np.random.default_rng(SEED).multinomial(U, np.full(U, 1 / U), SAMPLES)

    def summed(x_B):
        return np.bincount(unit_B, x_B, U)

    for index, name in enumerate(names):
        hit_BT = mask_BT & (label_BT == index)
        count_B = hit_BT.sum(1)
        if not count_B.any():
            continue
        pooled_B, best_B = ((x * hit_BT).sum(1, dtype=np.float64) for x in (pooled_BT, best_BT))
        interval, count = None, int(count_B.sum())
        if np.count_nonzero(count_U := summed(count_B)) > 1:
            drawn_n, gain_n = draws_nU @ count_U, draws_nU @ summed(best_B - pooled_B)
            gain_n = gain_n[drawn_n > 0] / drawn_n[drawn_n > 0]
            interval = np.quantile(gain_n, (0.025, 0.975)).tolist()
        ours, theirs = float(pooled_B.sum() / count), float(best_B.sum() / count)
        out[name] = {
            "tokens": count, "share": count / total, "nll_per_token": ours,
            "best_nll_per_token": theirs, "gain": theirs - ours, "interval": interval,
        }  # fmt: skip
    return out


# ---- the report ----------------------------------------------------------------------------------


def _by(names, values) -> dict:
    """{name: plain value} of arrays in the order of the streams."""
    return {name: np.asarray(v, np.float64).tolist() for name, v in zip(names, values, strict=True)}


def _spread(x_N) -> dict:
    """Mean and quantiles over tokens."""
    values = {f"p{p}": float(np.percentile(x_N, p)) for p in (5, 25, 50, 75, 95)}
    return {"mean": float(x_N.mean(dtype=np.float64)), **values}


def effective_number(w_NK) -> np.ndarray:
    """exp(entropy) of weights that sum to 1: 1 where one stream has all, K where all are equal."""
    w_NK = np.asarray(w_NK, np.float64)
    return np.exp(-(w_NK * np.log(np.where(w_NK > 0, w_NK, 1))).sum(-1))


def _pool(cfg: DelveConfig, params: dict, w_NK) -> dict:
    """Static and gated weights of the streams over scored tokens, how many streams they amount to.

    inverse_temperature: the sum of the static a of a log-linear pool, None with several latents.
    """
    static_K = stream_weights(cfg, params["pool"], jnp.zeros(delve.gate_outputs(cfg)))
    number_N, most = effective_number(w_NK), max(2, len(cfg.names))
    counts, edges = np.histogram(np.clip(number_N, 1, most), BINS, (1, most))
    return {
        "latents": cfg.latents,
        "inverse_temperature": float(params["pool"]["a"].sum()) if cfg.latents == 1 else None,
        "static": _by(cfg.names, static_K),
        "gated": {name: _spread(w_NK[:, k]) for k, name in enumerate(cfg.names)},
        "effective_streams": {
            "static": float(effective_number(static_K)), **_spread(number_N),
            "histogram": {"edges": edges.tolist(), "tokens": counts.tolist()},
        },
    }  # fmt: skip


def _hub(cfg: DelveConfig, ratio_NX) -> dict | None:
    """Mean ratios over scored tokens, from the first sync point on; None without a hub."""
    if not ratio_NX.shape[1]:
        return None
    ratio_sK = ratio_NX.mean(0, dtype=np.float64).reshape(-1, len(cfg.names))
    alarms = [
        {"stream": cfg.names[k], "sync_point": int(s) + 1, "ratio": float(ratio_sK[s, k])}
        for s, k in np.argwhere(ratio_sK > ALARM)
    ]
    found = {"connectors": cfg.connectors, "update_ratio": _by(cfg.names, ratio_sK.T)}
    return found | {"alarm_above": ALARM, "alarms": alarms}


def _write(out: Path, report: dict) -> None:
    """inspect.json and inspect.png, both whole before either takes its name."""
    drawn = io.BytesIO()
    inspection_picture(report, drawn, ALARM)
    text = json.dumps(report, indent=2) + "\n"
    files = {"inspect.json": text.encode(), "inspect.png": drawn.getvalue()}
    partial = {name: out / f"{name}.partial" for name in files}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, raw in files.items():
            partial[name].write_bytes(raw)
        for name in files:
            partial[name].replace(out / name)
    except OSError as err:
        raise DelveError(f"--out {out}: cannot be written ({err.strerror or err})") from None
    finally:
        for path in partial.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
