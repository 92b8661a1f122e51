"""What the attention families share: rotary angles, caches, and who may look at whom.

State: k, v [L,B,G,S,h] caches, `index` tokens written, `pos_B` next position of each row and
`valid_BS` (False where a row is left-padded). S is fixed: `LM.step` grows it when it is full.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .linear import at_least_f32, on_cuda, wide

# how a whole text of 16-bit numbers is attended to, per platform of jax; "blocks": the form below
# (any dtype and platform, the reference of the others), "cudnn": the library's fused kernel
DEFAULT = {"gpu": "cudnn"}
WIDEST_HEAD = 128  # that cuDNN's kernels take on every GPU that has them; a multiple of 8
ATTENDED = "attended"  # name of what "blocks" gives, for policies of recomputing
QUERIES = 128  # of a block of attention, at least
MAX_BLOCKS = 16  # of one call: they are unrolled
# tokens from which a CPU takes the heads of a causal text one by one: 0.6 to 1.05 of the time, of
# shorter ones 0.7 to 1.3 (results/attention_cpu.json)
LOOPED = 512


def frequencies(base: float, rotated: int) -> np.ndarray:
    """Radians per position of each of the `rotated` / 2 pairs of dims, float64."""
    return float(base) ** (-np.arange(0, rotated, 2) / rotated)


def rotary(x_BTHh, ctx):
    """Rotate the first 2r dims of each head in half-split form; the others pass through."""
    r = ctx["cos"].shape[-1]
    cos, sin = ctx["cos"][:, :, None], ctx["sin"][:, :, None]
    a, b = wide(x_BTHh[..., :r]), wide(x_BTHh[..., r : 2 * r])
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHh.dtype)
    return jnp.concatenate([turned, x_BTHh[..., 2 * r :]], axis=-1)


def attend(q_BTHh, k_BTGh, v_BTGh, state, ctx):
    """Causal attention over this call's tokens and the caches -> (y_BTHh, caches or None).

    The caches are those of all layers, written where `ctx["layer"]` says: a token's step moves what
    it adds and reads, not the caches. Where they are known to be empty (index is the number 0, not
    an array) a prompt is a causal text: keys after a block of queries are left out.
    """
    q, k_BTGh = rotary(q_BTHh, ctx), rotary(k_BTGh, ctx)
    k, v = jnp.moveaxis(k_BTGh, 1, 2), jnp.moveaxis(v_BTGh, 1, 2)
    if state is None:
        return weighted(q, k, v, ctx["mask_B1TS"], causal=True), None
    layer, zero = ctx["layer"], jnp.int32(0)
    at = (layer, zero, zero, jnp.int32(ctx["index"]), zero)
    new = {name: a.astype(state[name].dtype) for name, a in (("k", k), ("v", v))}
    state = {n: lax.dynamic_update_slice(state[n], new[n][None], at) for n in new}
    empty = isinstance(ctx["index"], int)
    seen = {n: new[n] if empty else lax.dynamic_index_in_dim(state[n], layer, keepdims=False)
            for n in new}  # fmt: skip
    k, v = (seen[n].astype(q.dtype) for n in ("k", "v"))
    mask_B1TS = ctx["mask_B1TS"][..., : k.shape[2]]
    return weighted(q, k, v, mask_B1TS, causal=empty, impl="blocks"), state


def choice(dtype, impl: str | None = None) -> str:
    """How a whole text in `dtype` is attended to on this platform: "cudnn" or "blocks"."""
    best = impl or DEFAULT.get(jax.default_backend(), "blocks")
    if best not in ("cudnn", "blocks"):
        raise ValueError(f"attention: impl {best!r}")
    if best == "blocks" or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return "blocks"
    return "cudnn" if impl or on_cuda() else "blocks"


def weighted(q_BTHh, k_BGSh, v_BGSh, mask_B1TS, causal: bool = False, impl: str | None = None):
    """softmax(q k / sqrt h) v where the mask is True, G heads of k and v shared by H of q.

    It goes by blocks of queries and keeps one number a query for the backward pass
    (FlashAttention, arXiv 2205.14135), so that [B,H,T,S] is never held. causal: T = S, and keys
    after a block are left out; a mask of None is then all of it. `jax.nn.dot_product_attention`
    holds and computes them all, and takes the softmax of float64 in float32, but for its form for
    cuDNN, which a causal text takes where `choice` says so; impl: "blocks" or "cudnn" (CUDA).
    """
    (b, T, H, h), G = q_BTHh.shape, k_BGSh.shape[1]
    # short texts gain nothing; as a bias, a mask of an odd length is refused
    fits = causal and T >= QUERIES and h <= WIDEST_HEAD and h % 8 == 0
    fits &= mask_B1TS is None or T % 2 == 0
    if fits and choice(q_BTHh.dtype, impl) == "cudnn":
        # a mask (documents, padding) is read as a bias of the scores, whose gradient nobody asks
        # for; its packed rows (offsets) need a bound of the documents a row, and memory by it
        k_BSGh, v_BSGh = jnp.moveaxis(k_BGSh, 1, 2), jnp.moveaxis(v_BGSh, 1, 2)
        return jax.nn.dot_product_attention(
            q_BTHh, k_BSGh, v_BSGh, mask=mask_B1TS, is_causal=True, implementation="cudnn"
        )
    if mask_B1TS is None:
        mask_B1TS = jnp.tri(T, dtype=bool)[None, None]
    # heads before positions; scaling q touches less than scaling the scores
    q = jnp.moveaxis((q_BTHh * h**-0.5).reshape(b, T, G, H // G, h), 1, 3)
    y_BGnTh = _attention(causal, q, k_BGSh, v_BGSh, mask_B1TS)
    return jnp.moveaxis(y_BGnTh, 3, 1).reshape(b, T, H, h)


def _blocks(causal: bool, T: int, S: int):
    """(queries, keys) of each block, as slices."""
    size = max(QUERIES, -(-T // MAX_BLOCKS))
    for at in range(0, T, size):
        end = min(at + size, T)
        yield slice(at, end), slice(0, end if causal else S)


def _scores(q_Nh, k_hs, mask_ts):
    """Scores [N, s] of n heads' queries in one axis, N = n t."""
    dtype = at_least_f32(q_Nh.dtype)
    scores = jnp.matmul(q_Nh, k_hs, preferred_element_type=dtype)
    scores_nts = scores.reshape(-1, *mask_ts.shape)
    return jnp.where(mask_ts, scores_nts, jnp.finfo(dtype).min / 2).reshape(scores.shape)


def _each(fn, arrays_BG, mask_B1TS, loop: bool):
    """fn(*arrays, mask_TS) of every row and head of keys: at once, or in a loop over them.

    The loop is for a CPU: its products are of plain matrices whose parts are no copies, and what a
    head needs stays in the cache. Two heads a turn, so that there is work for two threads.
    """
    rows, (B, G) = mask_B1TS.shape[0], arrays_BG[0].shape[:2]
    if not loop:
        by_head = jax.vmap(fn, (0,) * len(arrays_BG) + (None,))
        by_row = jax.vmap(by_head, (0,) * len(arrays_BG) + (None if rows == 1 else 0,))
        return by_row(*arrays_BG, mask_B1TS[0, 0] if rows == 1 else mask_B1TS[:, 0])

    def turn(_, slot):
        i, arrays = slot
        return None, fn(*arrays, mask_B1TS[0 if rows == 1 else i // G, 0])

    flat = [a.reshape(B * G, *a.shape[2:]) for a in arrays_BG]
    _, out = lax.scan(turn, None, (jnp.arange(B * G), flat), unroll=2)
    return jax.tree.map(lambda a: a.reshape(B, G, *a.shape[1:]), out)


def _looped(causal: bool, T: int) -> bool:
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False  # XLA cannot split a loop over devices: each would do all rows and heads
    return causal and T >= LOOPED


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(causal, q_BGnTh, k_BGSh, v_BGSh, mask_B1TS):
    """Attention of scaled queries, heads first."""
    return _forward(causal, q_BGnTh, k_BGSh, v_BGSh, mask_B1TS)[0]


def _forward(causal, q, k, v, mask):
    def one(q_nTh, k_Sh, v_Sh, mask_TS):
        (n, T, h), k_hS, ys, logs = q_nTh.shape, k_Sh.T, [], []
        for t, s in _blocks(causal, T, k_Sh.shape[0]):
            scores = _scores(q_nTh[:, t].reshape(-1, h), k_hS[:, s], mask_TS[t, s])
            top = scores.max(-1, keepdims=True)
            e = jnp.exp(scores - top)
            total = e.sum(-1, keepdims=True)
            y = e.astype(v_Sh.dtype) @ v_Sh[s]
            ys.append((y / total).astype(v_Sh.dtype))  # dividing y touches less than dividing e
            logs.append(top + jnp.log(total))
        return tuple(
            jnp.concatenate([a.reshape(n, -1, a.shape[-1]) for a in parts], axis=1)
            for parts in (ys, logs)
        )

    y, log = _each(one, (q, k, v), mask, _looped(causal, q.shape[3]))
    y, log = checkpoint_name(y, ATTENDED), checkpoint_name(log, ATTENDED)
    return y, (q, k, v, mask, y, log)


def _backward(causal, saved, g_BGnTh):
    """With weights p: dv = p'g, ds = p (g v' - sum(g y)), dq = ds k, dk = ds'q.

    dk and dv are summed up transposed: then only narrow matrices are, never p or ds.
    """
    q, k, v, mask, y, log = saved
    dtype = at_least_f32(q.dtype)
    mean_BGnT1 = (wide(g_BGnTh) * wide(y)).sum(-1, keepdims=True)

    def one(q_nTh, k_Sh, v_Sh, g_nTh, log_nT1, mean_nT1, mask_TS):
        n, T, h = q_nTh.shape
        k_hS, v_hS = k_Sh.T, v_Sh.T
        dq, dk, dv = [], jnp.zeros(k_hS.shape, dtype), jnp.zeros(v_hS.shape, dtype)
        for t, s in _blocks(causal, T, k_Sh.shape[0]):
            q_t, g_t, log_t, mean_t = (
                a[:, t].reshape(-1, a.shape[-1]) for a in (q_nTh, g_nTh, log_nT1, mean_nT1)
            )
            p = jnp.exp(_scores(q_t, k_hS[:, s], mask_TS[t, s]) - log_t)
            dp = jnp.matmul(g_t, v_hS[:, s], preferred_element_type=dtype)
            ds = (p * (dp - mean_t)).astype(q_t.dtype)
            dq.append((ds @ k_Sh[s]).reshape(n, -1, h))
            dk = dk.at[:, s].add(jnp.matmul(q_t.T, ds, preferred_element_type=dtype))
            p = p.astype(g_t.dtype)
            dv = dv.at[:, s].add(jnp.matmul(g_t.T, p, preferred_element_type=dtype))
        return jnp.concatenate(dq, axis=1), dk.T.astype(k_Sh.dtype), dv.T.astype(v_Sh.dtype)

    arrays = (q, k, v, g_BGnTh, log, mean_BGnT1)
    return *_each(one, arrays, mask, _looped(causal, q.shape[3])), None


_attention.defvjp(_forward, _backward)


def flops(T: int, heads: int, head_dim: int) -> int:
    """FLOPs of a token and layer over the full T: scores, what they weigh, 3 a softmax weight."""
    return 4 * T * heads * head_dim + 3 * T * heads


def init_caches(cfg, batch: int, max_len: int, n_kv: int, head_dim: int, dtype) -> dict:
    """Empty caches for `max_len` tokens."""
    shape = (cfg.n_layers, batch, n_kv, max_len, head_dim)
    return {
        "layers": {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)},
        "index": jnp.int32(0),
        "pos_B": jnp.zeros((batch,), jnp.int32),
        "valid_BS": jnp.zeros((batch, max_len), bool),
    }


def grow(state: dict, n: int) -> dict:
    """The state with room for `n` more tokens; full caches at least double (host side)."""
    size = state["valid_BS"].shape[1]
    more = int(state["index"]) + n - size
    if more <= 0:
        return state
    more = max(more, size)
    pad = lambda a: jnp.pad(a, ((0, 0),) * 3 + ((0, more), (0, 0)))  # noqa: E731
    return {
        **state,
        "layers": jax.tree.map(pad, state["layers"]),
        "valid_BS": jnp.pad(state["valid_BS"], ((0, 0), (0, more))),
    }


def angles_and_mask(freq, x_BTD, mask_BT, state, segments_BT) -> tuple[dict, dict]:
    """`context` of an attention family: rotary angles and mask of this call, new bookkeeping.

    Positions run through a row of several documents: only their differences act.
    """
    T, dtype = x_BTD.shape[1], at_least_f32(x_BTD.dtype)
    index = 0 if state is None else state["index"]
    # rows of a left-padded batch count their own positions; unpadded rows all count the same
    ones = jnp.ones((1, T), bool) if mask_BT is None else mask_BT.astype(bool)
    start_B1 = jnp.zeros((1, 1), jnp.int32) if state is None else state["pos_B"][:, None]
    pos_BT = start_B1 + jnp.maximum(jnp.cumsum(ones, axis=1, dtype=jnp.int32) - 1, 0)
    row_T = index + jnp.arange(T)
    book = {}
    if state is None:
        valid_BS, S = ones, T
    else:
        written = jnp.broadcast_to(ones, (state["valid_BS"].shape[0], T))
        valid_BS = lax.dynamic_update_slice_in_dim(state["valid_BS"], written, index, axis=1)
        S = valid_BS.shape[1]
        pos_B = state["pos_B"] + written.sum(1, dtype=jnp.int32)
        book = {"index": jnp.int32(index + T), "pos_B": pos_B, "valid_BS": valid_BS}
    visible_BTS = (jnp.arange(S)[None, :] <= row_T[:, None])[None] & valid_BS[:, None]
    if segments_BT is not None:
        visible_BTS &= segments_BT[:, :, None] == segments_BT[:, None]
    plain = state is None and mask_BT is None and segments_BT is None
    angle = pos_BT[..., None].astype(dtype) * jnp.asarray(freq, dtype)
    ctx = {
        "cos": jnp.cos(angle),
        "sin": jnp.sin(angle),
        # a kernel that knows what causal is needs no mask
        "mask_B1TS": None if plain and choice(x_BTD.dtype) == "cudnn" else visible_BTS[:, None],
        "index": index,
    }
    return ctx, book
