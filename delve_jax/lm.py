"""`load(src)` -> LM: config, parameters, tokenizer, and the four things one does with them.

Sources: a hub id (`org/name@revision`), a directory, a checkpoint, an RWKV .pth.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import operator
import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import models, parallel
from .config import Config, DelveError, to_json

STATE_FORMAT = 2  # of saved states; those of another are refused (2: caches heads first)
BFLOAT16 = ".bfloat16"  # ends the names of such arrays in saved states
MOST_APART = 64  # layers of a step that is no loop: each takes a fifth of a second to compile
PAD_TO = 32  # prompts are left-padded to multiples of this, so few lengths are compiled


class LM:
    """A loaded model. `params` is a nested dict of jax.Array, `tokenizer` may be None.

    A text in pieces of any length, the state carried along:

    >>> import delve_jax, numpy as np
    >>> lm = delve_jax.load(delve_jax.upcycle.embedded_parents()[-1])
    >>> first, state = lm.step([[5, 6, 7]], lm.init_state(batch=1))
    >>> second, state = lm.step([[8]], state)
    >>> whole = lm.logits([[5, 6, 7, 8]])
    >>> bool(np.allclose(second[:, 0], whole[:, 3], atol=1e-3))
    True
    """

    def __init__(self, config: Config, params: dict, tokenizer=None, compute: str | None = None):
        """compute: dtype of activations and matmuls; default: `compute_of` the parameters."""
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.how = models.Compute(dtype=compute or compute_of(params))
        chosen = ("sample", "top_k")
        self._forward = jax.jit(functools.partial(models.forward, config, how=self.how))
        self._prefill = jax.jit(
            functools.partial(_prefill, config, self.how), static_argnames=("room", *chosen)
        )
        self._decode = jax.jit(
            functools.partial(_decode, config, self.how),
            static_argnames=("n", "stop", *chosen), donate_argnames="state",
        )  # fmt: skip

    def logits(self, tokens_BT, mask_BT=None) -> jax.Array:
        """float32 logits [B, T, V] over the valid ids; log-probabilities of a DELVE with J > 1.

        mask_BT: True on real tokens of a LEFT-padded batch. DelveError: ids out of range.
        """
        tokens_BT = self._checked(tokens_BT)
        mask_BT = _checked_mask(mask_BT, tokens_BT)
        return self._forward(self.params, tokens_BT, None, mask_BT)[0]

    def init_state(self, batch: int, max_len: int = 256) -> dict:
        """An empty state; attention caches of `max_len` tokens that `step` grows when full."""
        return models.init_state(self.config, batch, max_len, self.how.dtype)

    def step(self, tokens_BT, state: dict, mask_BT=None) -> tuple[jax.Array, dict]:
        """Continue a state by T >= 1 tokens -> (logits [B, T, V], new state).

        mask_BT: as in `logits`; a row's padding may go on over several calls. DelveError: it comes
        behind text that a recurrent stream has read.
        """
        tokens_BT = self._checked(tokens_BT)
        mask_BT = _checked_mask(mask_BT, tokens_BT)
        if mask_BT is not None:
            late = np.asarray(models.begun(self.config, state)) & ~np.asarray(mask_BT[:, 0])
            if late.any():
                raise DelveError(f"mask: row {late.argmax()} has a state, and padding would enter "
                                 "it; step rows of other lengths by themselves")  # fmt: skip
        state = models.grow(self.config, state, tokens_BT.shape[1])
        return self._forward(self.params, tokens_BT, state, mask_BT)

    def generate(
        self,
        tokens_BT,
        max_new_tokens: int = 32,
        mask_BT=None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[int] = (),
        seed: int = 0,
    ) -> jax.Array:
        """Prompt and `max_new_tokens` new ids, [B, T + n]: greedy, or sampled at a temperature.

        top_k, top_p: sample among the k likeliest ids (0: all), or the fewest of them that hold the
        share top_p. stop: ids that end a row, which is filled up with the id that ended it; the
        loop ends when all rows have. Cached and compiled: a prefill, then one loop on the device.
        """
        tokens_BT = self._checked(tokens_BT)
        for name, value, fits, must in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "be at least 1"),
            ("temperature", temperature, 0 <= temperature < math.inf, "not be negative"),
            ("top_k", top_k, top_k >= 0, "not be negative"),
            ("top_p", top_p, 0 < top_p <= 1, "lie in (0, 1]"),
        ):
            if not fits:
                raise DelveError(f"{name} {value}: must {must}")
        b, T = tokens_BT.shape
        pad = -T % PAD_TO
        mask_BT = _checked_mask(mask_BT, tokens_BT)
        if pad or mask_BT is not None:
            mask_BT = jnp.ones((b, T), bool) if mask_BT is None else mask_BT
            mask_BT = jnp.pad(mask_BT, ((0, 0), (pad, 0)))
        padded_BT = jnp.pad(tokens_BT, ((0, 0), (pad, 0)))
        picking = {
            "keys": jax.random.split(jax.random.key(seed), max_new_tokens) if temperature else None,
            "temperature": jnp.float32(temperature or 1.0),
            "top_p": jnp.float32(top_p) if top_p < 1 else None,
            "top_k": min(top_k, self.config.vocab_size), "sample": temperature > 0,
        }  # fmt: skip
        room = T + pad + max_new_tokens
        first_B, state = self._prefill(self.params, padded_BT, mask_BT, room=room, **picking)
        new_BT = first_B[:, None]
        if max_new_tokens > 1:
            new_BT, _ = self._decode(
                layers_apart(self.config, self.params), first_B, state,
                n=max_new_tokens, stop=tuple(map(int, stop)), **picking,
            )  # fmt: skip
        return jnp.concatenate([tokens_BT, new_BT], axis=1)

    def save_state(self, path, state: dict) -> None:
        """Write a state to a file, to go on from with `load_state` in another process."""
        leaves = {}
        for i, a in enumerate(map(np.asarray, jax.tree.leaves(state))):
            short = a.dtype == jnp.bfloat16  # which NumPy's files do not know
            leaves[f"{i:04}{BFLOAT16 * short}"] = a.view(np.uint16) if short else a
        half = Path(path).with_name(Path(path).name + ".writing")
        with half.open("wb") as file:
            np.savez(file, model=self._fingerprint(), **leaves)
        half.replace(path)

    def load_state(self, path) -> dict:
        """The state that `save_state` wrote, in the dtypes of this model's states.

        DelveError: damaged, or of another architecture.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                made_for = str(file["model"])
                names = sorted(name for name in file.files if name != "model")
                leaves = [
                    file[n].view(jnp.bfloat16) if n.endswith(BFLOAT16) else file[n] for n in names
                ]
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as err:
            raise DelveError(f"{path}: not a readable state ({err})") from None
        if made_for != self._fingerprint():
            raise DelveError(
                f"{path}: was made by a model of another configuration, or by another version"
            )
        like, form = jax.tree.flatten(self.init_state(1))
        pairs = zip(leaves, like, strict=True)
        return jax.tree.unflatten(form, [jnp.asarray(a).astype(b.dtype) for a, b in pairs])

    def _fingerprint(self) -> str:
        known = json.dumps([STATE_FORMAT, to_json(self.config)])
        return hashlib.sha256(known.encode()).hexdigest()

    def _checked(self, tokens_BT) -> jax.Array:
        try:
            tokens = np.asarray(tokens_BT)
        except ValueError:
            raise DelveError(
                "tokens: rows of several lengths; pad on the left and pass mask_BT"
            ) from None
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
            raise DelveError(f"tokens: integer ids [B, T] expected, got {tokens.dtype} "
                             f"{list(tokens.shape)}")  # fmt: skip
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            bad = tokens.min() if tokens.min() < 0 else tokens.max()
            raise DelveError(f"tokens: id {bad} is outside 0..{self.config.vocab_size - 1}")
        return jnp.asarray(tokens, jnp.int32)


def _checked_mask(mask_BT, tokens_BT):
    """The mask as booleans; only left padding is defined for recurrent streams."""
    if mask_BT is None:
        return None
    mask = np.asarray(mask_BT).astype(bool)
    if mask.shape != tokens_BT.shape:
        raise DelveError(f"mask: shape {list(mask.shape)} is not that of tokens")
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise DelveError("mask: a padded position follows a real one; pad batches on the left")
    return None if mask.all() else jnp.asarray(mask)


def compute_of(params: dict) -> str:
    """dtype of the activations: bfloat16 where the parameters are and an accelerator computes.

    Else float32: a CPU is no faster with 16 bits, and the range of float16 is too small for states
    and residual streams of some parents.
    """
    kinds = lambda tree: [a.dtype for a in jax.tree.leaves(tree)]  # noqa: E731
    shapes = jax.eval_shape(lambda: params)
    rounded = kinds(shapes) == kinds(models.cast(shapes, jnp.bfloat16))  # all that would be
    return "bfloat16" if rounded and jax.default_backend() != "cpu" else "float32"


def layers_apart(cfg: Config, params: dict) -> dict:
    """The tree with a tuple of the layers' trees in the place of their stacks, for single steps.

    In a loop over stacks XLA copies every layer's weights out before a product reads them: 30 to
    53 % of a step of one row on a CPU (results/decode_cpu.json). Here the layers are views there,
    without bytes of their own; on a GPU a second copy of the layers as long as a call, where it has
    room. Of a DELVE the layers of all streams, and the hub's sync points. The stacks as they are:
    on other devices, of sharded or very deep models, in int8 (a loop's constants get converted once
    and then stay: four times their bytes).
    """
    joined = cfg.family == "delve"
    subs = dict(cfg.streams if joined else [("", cfg)])
    if sum(sub.n_layers for sub in subs.values()) > MOST_APART:
        return params
    if any(sub.storage == "int8" for sub in subs.values()):
        return params
    parents = params["streams"] if joined else {"": params}
    stacks = [{n: parents[n]["layers"] for n in subs}, {k: params[k] for k in params if k == "hub"}]
    stacks = jax.tree.map(jnp.asarray, stacks)
    leaves = jax.tree.leaves(stacks)
    device, *others = leaves[0].devices()
    if others or device.platform not in ("cpu", "gpu"):
        return params
    if device.platform == "cpu":
        rows = _rows(jax.tree.map(np.asarray, stacks))
        rows = jax.device_put(rows, device, may_alias=True)
    else:
        known = device.memory_stats() or {}
        free = known.get("bytes_limit", 0) - known.get("bytes_in_use", 0)
        if 1.2 * sum(a.nbytes for a in leaves) > free:  # 0.2: what else a call needs
            return params
        rows = jax.jit(_rows)(stacks)
    layers, hub = rows
    parents = {n: {**p, "layers": layers[n]} for n, p in parents.items()}
    return {**params, "streams": parents, **hub} if joined else parents[""]


def _rows(stacks: list[dict]) -> list[dict]:
    """Of every stacked tree the tuple of its layers' trees."""

    def rows(tree):
        n = len(jax.tree.leaves(tree)[0])
        return tuple(jax.tree.map(operator.itemgetter(i), tree) for i in range(n))

    return [{name: rows(tree) for name, tree in trees.items()} for trees in stacks]


def _pick(logits_BV, i, keys, temperature, top_p, sample, top_k):
    """The new ids [B] at place i: the likeliest ones, or drawn by keys[i]."""
    if sample:
        logits_BV = truncated(logits_BV / temperature, top_k, top_p)
        return jax.random.categorical(keys[i], logits_BV).astype(jnp.int32)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _prefill(cfg, how, params, tokens_BT, mask_BT, *, room, **picking):
    """The prompt -> (first new ids [B], state with caches of `room` tokens)."""
    state = models.init_state(cfg, len(tokens_BT), room, how.dtype)
    f, state = models.features(cfg, params, tokens_BT, _empty(state), mask_BT, how=how)
    # the head of a prompt's last position only: all of them would be most of a small model's work
    logits = models.head(cfg, params, jax.tree.map(lambda a: a[:, -1:], f))
    return _pick(logits[:, -1], 0, **picking), state


def _decode(cfg, how, steps, first_B, state, *, n, stop, **picking):
    """At most n - 1 single steps in one compiled loop -> (new ids [B, n], state).

    steps: the parameters as `layers_apart` gives them. The state is returned so that the loop works
    in the caches that it was given.
    """

    def ended(token_B):
        return (token_B[:, None] == jnp.array(stop, jnp.int32)).any(-1)

    def going(carry):
        i, token_B, _, _ = carry
        return (i < n) & ~(ended(token_B).all() & bool(stop))

    def one(carry):
        i, token_B, state, new_nB = carry
        logits, state = models.forward(cfg, steps, token_B[:, None], state, how=how)
        token_B = jnp.where(ended(token_B), token_B, _pick(logits[:, -1], i, **picking))
        return i + 1, token_B, state, new_nB.at[i].set(token_B)

    new_nB = jnp.broadcast_to(first_B, (n, len(first_B)))
    last, token_B, state, new_nB = lax.while_loop(going, one, (1, first_B, state, new_nB))
    new_nB = jnp.where(jnp.arange(n)[:, None] < last, new_nB, token_B)  # all rows ended before n
    return new_nB.T, state


def _empty(state: dict) -> dict:
    """A state that nothing was written to, and says so where it is traced (`attention.attend`)."""
    return {
        k: _empty(v) if isinstance(v, dict) else 0 if k == "index" else v for k, v in state.items()
    }


def truncated(logits_BV, top_k: int, top_p) -> jax.Array:
    """Logits with -inf for all but the top_k largest (0: all), and of those for all but the fewest
    that hold the share top_p of the probability (nucleus sampling, arXiv 1904.09751; None: all)."""
    if top_k:
        least_B1 = lax.top_k(logits_BV, top_k)[0][..., -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p is None:  # no sorting of the vocabulary at every step
        return logits_BV
    sorted_BV = jnp.sort(logits_BV, descending=True, axis=-1)
    share_BV = jax.nn.softmax(sorted_BV, axis=-1)
    inside_BV = jnp.cumsum(share_BV, axis=-1) - share_BV < top_p  # the likeliest always is
    least_B1 = jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def load(
    src,
    dtype: str | None = "float32",
    mesh=None,
    *,
    keep: float | None = None,
    streams: Sequence[str] = (),
) -> LM:
    """Load a Hugging Face directory, hub id (`id@revision`), RWKV .pth or checkpoint directory.

    dtype: of the parameters in memory (None: as stored); mesh: what they are spread over, a Mesh or
    as in `parallel.make_mesh` ("model=4"); None is the first device. keep: at most this share of
    the dense parents' parameters, by fewer ranks of every factored map; streams: only these of a
    DELVE (("mamba", "rwkv") needs memory that does not grow with the text).
    DelveError where the source is damaged, of an unknown architecture, or cannot be cut so.

    >>> import delve_jax
    >>> lm = delve_jax.load(delve_jax.upcycle.embedded_parents()[-1])  # or any source
    >>> lm.config.family, lm.logits([[5, 6, 7]]).shape
    ('rwkv', (1, 3, 3840))
    >>> lm.generate([[5, 6, 7], [8, 9, 10]], max_new_tokens=4).shape
    (2, 7)
    """
    from . import data, parents

    if isinstance(mesh, str):
        mesh = parallel.make_mesh(mesh)
    cfg, params, tokenizer_json = parents.load(
        src, dtype=dtype, mesh=mesh, keep=keep, streams=streams
    )
    known = tokenizer_json is not None or cfg.vocab_size == 256
    return LM(cfg, params, data.load_tokenizer(tokenizer_json, cfg.vocab_size) if known else None)
