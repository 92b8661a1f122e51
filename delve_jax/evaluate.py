"""Negative log-likelihood and bits per byte of text, through JAX or transformers.

Every token of a text is scored exactly once, in overlapping windows: a window scores only what the
one before it did not reach. A `Scorer` is all that is asked of a model, so both backends share the
windows, the tokenizer and the arithmetic (`tasks` builds on it). Shapes: tokens_BT, nll_BT (nats).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import VerbModule, data, models
from .config import Config, DelveError, read_json
from .metrics import progress

WINDOW = 1024  # default longest window; shorter where the model's context is
_LOGITS = 1 << 27  # float32 logits that one batch may hold: 512 MiB


@dataclass(frozen=True)
class Model:
    """The least of an LM that can be scored; tokenizer None = raw bytes."""

    config: Config
    params: dict
    tokenizer: Any = None


@dataclass(frozen=True)
class Scorer:
    """What evaluation needs of a model, whichever library runs it."""

    score: Callable  # (tokens_BT, targets_BT) -> nll_BT float32, hit_BT (target is the arg max)
    vocab_size: int  # V: valid ids
    context_length: int
    tokenizer: Any = None
    parameters: int = 0  # at valid vocabulary rows
    parameter_bytes: int = 0  # as stored, not as held in memory
    generate: Callable | None = None  # (lists of ids, n) -> lists of n new ids at most, greedy


def as_scorer(model) -> Scorer:
    """A Scorer of an LM or Model, of a function tokens_BT -> logits_BTV, or the Scorer itself."""
    if isinstance(model, Scorer):
        return model
    if hasattr(model, "params"):
        cfg, score = model.config, functools.partial(_jitted(model.config), model.params)
        size = valid_count(cfg), parameter_bytes(cfg)
        write = functools.partial(_greedy, model) if hasattr(model, "generate") else None
        return Scorer(score, cfg.vocab_size, cfg.context_length, model.tokenizer, *size, write)
    vocab_size = jax.eval_shape(model, jax.ShapeDtypeStruct((1, 1), jnp.int32)).shape[-1]
    score = jax.jit(lambda tokens_BT, targets_BT: nll_of(model(tokens_BT), targets_BT))
    return Scorer(score, vocab_size, WINDOW)


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_BT, mask_BT) of prompts that end together; an empty one is the single id 0."""
    T = max(1, *map(len, prompts))
    tokens_BT, mask_BT = np.zeros((len(prompts), T), np.int32), np.zeros((len(prompts), T), bool)
    for ids, row_T, real_T in zip(prompts, tokens_BT, mask_BT, strict=True):
        n = max(1, len(ids))
        row_T[T - n :] = ids or 0
        real_T[T - n :] = True
    return tokens_BT, mask_BT


def ended(new_BT, ends: Sequence[int]) -> list[list[int]]:
    """The ids of each row before the first that ends a text."""
    return [list(itertools.takewhile(lambda i: i not in ends, row)) for row in new_BT.tolist()]


def _greedy(model, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """At most n new ids after each prompt, until one that ends the text."""
    tokens_BT, mask_BT = _left_padded(prompts)
    end = None if model.tokenizer is None else data.eot_of(model.tokenizer)
    ends = [] if end is None else [end]
    out_BT = np.asarray(model.generate(tokens_BT, n, mask_BT, stop=ends))
    return ended(out_BT[:, tokens_BT.shape[1] :], ends)


def valid_count(cfg: Config) -> int:
    """Parameters as every verb counts them: padding rows of the vocabulary's tables are none."""
    if cfg.family != "delve":
        cfg = dataclasses.replace(cfg, vocab_rows=cfg.vocab_size)
    return models.count(cfg)


def parameter_bytes(cfg: Config) -> int:
    """Bytes of the parameters as stored, in the config's dtype and form of the factored maps."""
    return models.parameter_bytes(cfg)


def nll_of(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log softmax at the targets in float32, and whether each target is the arg max."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    hit_BT = jnp.argmax(logits_BTV, -1) == targets_BT
    picked_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)
    return jax.nn.logsumexp(logits_BTV, -1) - picked_BT1[..., 0], hit_BT


@functools.lru_cache(maxsize=32)
def _jitted(cfg: Config) -> Callable:
    """One compiled scorer per config: evaluating a second time does not compile again."""

    def score(params, tokens_BT, targets_BT):
        # full float32 where weights are float32: reported numbers must not hang on the platform
        with jax.default_matmul_precision("highest"):
            return nll_of(models.forward(cfg, params, tokens_BT)[0], targets_BT)

    return jax.jit(score)


# ---- text ----------------------------------------------------------------------------------------


def nll(model, ids, window: int, stride=None, batch=None, bos: int | None = None) -> np.ndarray:
    """nll_n [n] float32, nats: -log p of each id given those before it in its window.

    `model` as in `as_scorer`. Windows start every `stride` ids (half a window unless given), so
    that but for the start of the text a token has at least window - stride ids of context. The
    first id is scored after `bos`; without one (raw bytes) no model gives its probability, and it
    costs log V, the code of a uniform guess, so that the sum remains the length of a real code.
    """
    return _nll(as_scorer(model), ids, window, stride, batch, bos)[0]


def evaluate(model, texts: Sequence[str], window=None, stride=None, batch=None) -> dict:
    """Scores of a model on documents, joined by `<|endoftext|>` (itself scored) where it exists.

    -> nll_per_token (nats), bits_per_byte (all nats over the UTF-8 bytes of the documents), tokens,
    bytes, parameters, parameter_bytes, tokens_per_second (positions run per second, the overlap
    included, compilation not), window, stride, data_hash. DelveError: nothing to score, ids beyond
    the vocabulary, NaN.
    """
    scorer = as_scorer(model)
    tok, bos = tokenizer_of(scorer)
    ids = data.encode_documents(tok, texts)
    size = sum(len(text.encode("utf-8")) for text in texts)
    if not size or not len(ids):  # empty documents have ends
        raise DelveError("evaluate: the text is empty; name text with --text")
    check_ids(ids, scorer.vocab_size)
    window = window or min(scorer.context_length, WINDOW)
    stride = stride or max(1, window // 2)
    nll_n, per_second = _nll(scorer, ids, window, stride, batch, bos, timed=True)
    total = float(nll_n.sum(dtype=np.float64))
    return {
        "nll_per_token": total / len(ids),
        "bits_per_byte": total / math.log(2) / size,
        "tokens": len(ids),
        "bytes": size,
        "parameters": scorer.parameters,
        "parameter_bytes": scorer.parameter_bytes,
        "tokens_per_second": per_second,
        "window": window,
        "stride": stride,
        "data_hash": data.data_hash(texts),
    }


def spans(n: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(start, first) per window over positions 0..n-1: it reads `window` positions from `start`
    and scores those from `first` on. The last one is moved back to end at n (more context)."""
    out, end = [], 0
    for start in range(0, max(n - window, 0) + stride, stride):
        start = min(start, max(n - window, 0))
        if end < n:
            out.append((start, end))
            end = start + window
    return out


def _nll(scorer: Scorer, ids, window, stride, batch, bos, timed=False) -> tuple[np.ndarray, float]:
    """nll_n and positions per second; targets are stream[1:], inputs stream[:-1]."""
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise DelveError(f"stride {stride}: must be between 1 and the window's {window}")
    stream = np.asarray(ids, np.int32)
    stream = stream if bos is None else np.concatenate([[np.int32(bos)], stream])
    n = len(stream) - 1
    out = np.full(n, np.nan, np.float32)
    window_T = max(1, min(window, -(-n // 64) * 64))  # short texts need no full window
    cuts = spans(n, window_T, min(stride, window_T))
    batch = batch or batch_size(window_T, scorer.vocab_size)
    at_T = np.arange(window_T)

    def rows():
        for i in range(0, len(cuts), batch):
            at_BT = np.array([start for start, _ in cuts[i : i + batch]])[:, None] + at_T
            yield stream[np.minimum(at_BT, n - 1)], stream[np.minimum(at_BT + 1, n)]

    scored, per_second = run_rows(scorer, rows(), batch, window_T, len(cuts), "nll", timed)
    for (start, first), (nll_T, _) in zip(cuts, scored, strict=True):
        last = min(start + window_T, n)
        out[first:last] = nll_T[first - start : last - start]
    if bos is None:
        out = np.concatenate([[np.float32(math.log(scorer.vocab_size))], out])
    return out, per_second


def run_rows(scorer: Scorer, rows, batch: int, window: int, total: int, desc: str, timed=False):
    """[(nll_T, hit_T)] of all rows and positions per second; one shape, so one compilation.

    The first call compiles and does not count; where it is the only one, it is `timed` again.
    """
    out: list[tuple[np.ndarray, np.ndarray]] = []
    seconds, positions = 0.0, 0
    repeat = timed and total <= batch
    with progress(total * window, desc, "token") as bar:
        for tokens_BT, targets_BT in rows:
            n = len(tokens_BT)
            fill = ((0, batch - n), (0, 0))
            tokens_BT, targets_BT = np.pad(tokens_BT, fill), np.pad(targets_BT, fill)
            for _ in range(1 + repeat):
                start = time.perf_counter()
                nll_BT, hit_BT = map(np.asarray, scorer.score(tokens_BT, targets_BT))
                last = time.perf_counter() - start
            if not np.isfinite(nll_BT[:n]).all():
                raise DelveError(f"{desc}: the model gives NaN or Inf; are its weights damaged?")
            if out or repeat:
                seconds, positions = seconds + last, positions + batch * window
            out.extend(zip(nll_BT[:n], hit_BT[:n], strict=True))
            bar.update(n * window)
    return out, positions / seconds if seconds else 0.0


def batch_size(window: int, vocab_size: int, most: int = 16) -> int:
    """Rows per call so that the logits stay within _LOGITS, `most` at most."""
    return max(1, min(most, _LOGITS // (window * vocab_size)))


def tokenizer_of(scorer: Scorer):
    """The tokenizer (raw bytes for a vocabulary of 256 without one) and its `<|endoftext|>`."""
    tok = scorer.tokenizer
    tok = data.load_tokenizer(None, scorer.vocab_size) if tok is None else tok
    return tok, data.eot_of(tok)


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    if len(ids) and ids.max() >= vocab_size:
        raise DelveError(
            f"tokenizer.json: gives id {ids.max()}, the model has {vocab_size}; not its tokenizer"
        )


# ---- transformers --------------------------------------------------------------------------------


def hf_scorer(model_dir: str | Path, trust_remote_code: bool = False) -> Scorer:
    """Any causal LM of a Hugging Face directory or hub id, run by transformers in float32.

    Its own code is run only where it is, file by file, the code that this package exports, or with
    `trust_remote_code`. DelveError: torch missing, not such a directory, damaged weights.
    """
    try:
        import torch
    except ImportError:
        raise DelveError("--backend hf: torch is not installed; pip install torch") from None
    import transformers

    from . import parents

    path = parents.resolve(model_dir)
    config = read_json(path / "config.json")
    if "auto_map" in config and not (trust_remote_code or _is_ours(path, config["auto_map"])):
        raise DelveError(
            f"{path}: brings Python code that delve_jax did not write; read it, then pass "
            "trust_remote_code=True, or use --backend jax"
        )
    tok, vocab_size = None, config.get("vocab_size", 0)
    if (path / "tokenizer.json").exists():
        tok = data.load_tokenizer(data.read_text(path / "tokenizer.json"), vocab_size)
        vocab_size = 1 + max(tok.get_vocab().values())
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            trust_remote_code="auto_map" in config,
            output_loading_info=True,
        )
    except Exception as err:  # transformers raises many kinds for a damaged directory
        raise DelveError(f"{path}: transformers cannot load it ({err})".split("\n")[0]) from None
    # transformers only warns and goes on with random weights
    if lost := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise DelveError(f"{path}: tensor {lost[0]} is missing or has the wrong shape")
    model.eval()

    def score(tokens_BT, targets_BT):
        with torch.inference_mode():
            logits_BTV = model(torch.from_numpy(tokens_BT).long(), use_cache=False).logits
            logits_BTV = logits_BTV[..., :vocab_size].float()
            targets_BT = torch.from_numpy(targets_BT).long()
            picked_BT = logits_BTV.gather(-1, targets_BT[..., None])[..., 0]
            return logits_BTV.logsumexp(-1) - picked_BT, logits_BTV.argmax(-1) == targets_BT

    def write(prompts, n):
        if config.get("model_type") == "rwkv" and len(prompts) > 1:
            # transformers' RWKV ignores the mask, and its cached step mixes the rows of a batch
            return [new for prompt in prompts for new in write([prompt], n)]
        tokens_BT, mask_BT = _left_padded(prompts)
        with torch.inference_mode():
            out_BT = model.generate(
                torch.from_numpy(tokens_BT).long(), attention_mask=torch.from_numpy(mask_BT).long(),
                max_new_tokens=n, do_sample=False, num_beams=1, pad_token_id=0,
            )  # fmt: skip
        ends = np.atleast_1d(model.generation_config.eos_token_id).tolist()  # one, some or None
        return ended(out_BT[:, tokens_BT.shape[1] :], ends)

    # stored once each: tied tables share their memory, and a DELVE's frozen gains are buffers
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    stored, rows = sum(sizes.values()), config.get("vocab_size")
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [end.weight for end in ends if hasattr(end, "weight")]  # a DELVE's has none
    tables = {t.data_ptr(): t for t in tables if len(t) == rows}  # tied: once
    parameters = stored - sum((rows - vocab_size) * t.shape[1] for t in tables.values())
    itemsize = jnp.dtype(config.get("dtype") or config.get("torch_dtype") or "float32").itemsize
    names = ("max_position_embeddings", "context_length", "n_positions")
    # stock Mamba names none: what `parents.mamba` takes it to be, so that both backends cut alike
    least = 2048 if config.get("model_type") == "mamba" else WINDOW
    context = next((config[name] for name in names if config.get(name)), least)
    return Scorer(score, vocab_size, context, tok, parameters, stored * itemsize, write)


def evaluate_hf(
    model_dir: str | Path, texts: Sequence[str], trust_remote_code: bool = False, **options
) -> dict:
    """`evaluate` of a Hugging Face directory through transformers; same windows, same fields."""
    return evaluate(hf_scorer(model_dir, trust_remote_code), texts, **options)


def _is_ours(model_dir: Path, auto_map: dict) -> bool:
    """Whether all code is in the directory and each .py file is one that this package exports."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).digest()  # noqa: E731
    shipped = {digest(p) for p in (Path(__file__).parent / "parents" / "remote").glob("*.py")}
    local = all(
        isinstance(name, str) and (model_dir / f"{name.split('.')[0]}.py").is_file()
        for name in auto_map.values()  # "org/repo--module.Class" would fetch somebody else's
    )
    return local and all(digest(path) in shipped for path in model_dir.rglob("*.py"))


sys.modules[__name__].__class__ = VerbModule
