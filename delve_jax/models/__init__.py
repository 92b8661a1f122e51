"""All model families behind one signature: (params, tokens_BT, state) -> (logits, state).

Letters in names: B batch, T time, S cache length, L layer, V vocabulary, D model width, E inner
(2D in Mamba), N state, R dt-rank, K rank of a factor (streams in a DELVE), H head, G head of keys
and values where they are fewer, h head width, F MLP, W convolution width, A attention width (RWKV),
I/O in and out of a map.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import NamedSharding

from ..config import Config, DelveError, ParentConfig
from . import attention, mamba, neox, qwen3, rwkv
from .linear import (
    Linear,
    Norm,
    Table,
    at_least_f32,
    dims,
    layer_norm,
    linear,
    lookup,
    parameters,
    rms_norm,
    transposed,
    truncated,
)

# Beside its `Block` a family says: FACTORABLE and MLP, its maps in the order in which they run;
# NORM, the kind of its final norm (layer, rms, or bare: no parameters); KEEP_WIDE, ends of paths of
# leaves that are not rounded to 16 bits (`kept_dtype`); RESIDUAL, the outputs that are added to the
# residual stream as they are, and where of the block the stream stands that `compress.anchor`
# compares (in, out). `parents.register` adds families from outside.
FAMILY = {"mamba": mamba, "rwkv": rwkv, "neox": neox, "qwen3": qwen3}


def _products(primitive, *args, **params) -> bool:
    """Whether a result is kept in the backward pass: of matmuls, and of attention, whose two
    (outputs, sums of the softmax) would cost its forward pass once more."""
    if primitive.name.startswith("dot_product_attention_fwd") or (
        primitive.name == "name" and params["name"] == attention.ATTENDED
    ):
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


REMAT = {
    "layer": None,  # nothing kept but the input of each layer
    "dots": _products,
}


@dataclass(frozen=True)
class Compute:
    """How a forward pass is computed, not what: static and hashable."""

    dtype: str = "float32"  # activations and matmuls; norms, softmaxes, states, logits: >= float32
    remat: str = "none"  # recompute in the backward pass: "layer" all, "dots" all but matmuls
    residual: NamedSharding | None = None  # of x_BTD, after the embedding and every layer

    def __post_init__(self):
        if self.remat not in ("none", *REMAT):
            raise DelveError(f"remat '{self.remat}': must be none, {' or '.join(REMAT)}")

    def placed(self, x_BTD: jax.Array) -> jax.Array:
        """x_BTD under the constraint `residual`."""
        if self.residual is None:
            return x_BTD
        return lax.with_sharding_constraint(x_BTD, self.residual)


F32 = Compute()


def embed_tokens(cfg: ParentConfig, params: dict, tokens_BT, how: Compute = F32) -> jax.Array:
    """Token ids -> x_BTD, the input of the first layer (RWKV: after its extra LayerNorm)."""
    x_BTD = how.placed(lookup(params["embed"], tokens_BT, how.dtype))
    return layer_norm(params["ln0"], x_BTD, cfg.norm_eps) if "ln0" in params else x_BTD


def final_features(cfg: ParentConfig, params: dict, x_BTD: jax.Array) -> jax.Array:
    """f = final norm of the residual stream, the input of the head."""
    if FAMILY[cfg.family].NORM == "rms":
        return rms_norm(x_BTD, cfg.norm_eps, params["norm_f"]["scale"])
    eps = rwkv.FINAL_EPS if cfg.family == "rwkv" else cfg.norm_eps
    return layer_norm(params.get("norm_f", {}), x_BTD, eps)  # a bare one has no parameters


def head_logits(cfg: ParentConfig, params: dict, f_BTD: jax.Array) -> jax.Array:
    """Logits over the V valid ids, summed in at least float32; padding rows are cut."""
    out = at_least_f32(f_BTD.dtype)
    if "head" in params:
        return linear(params["head"], f_BTD, out)[..., : cfg.vocab_size]
    return transposed(params["embed"], f_BTD, out)[..., : cfg.vocab_size]


def block_apply(cfg: ParentConfig, layer: dict, x_BTD, mutable=False):
    """One layer without cache; with mutable=["moments"] -> (x, {"moments": sums per map})."""
    ctx, _ = FAMILY[cfg.family].context(cfg, x_BTD)
    block = FAMILY[cfg.family].Block(cfg)
    out = block.apply({"params": layer}, x_BTD, None, ctx, mutable=mutable)
    return (out[0][0], out[1]) if mutable else out[0]


def run_layers(
    cfg: ParentConfig, layers: dict, x_BTD, state, ctx, how: Compute = F32, first=0
):  # fmt: skip
    """Scan x through stacked layers; they update theirs of all layers' states, from `first` on.

    The states are carried, not handed out and gathered, so that XLA can update them in place.
    """
    block = FAMILY[cfg.family].Block(cfg)

    def body(carry, slot):
        (x, states), (layer, i) = carry, slot
        if states is None or "k" in states:  # caches: a token adds to them in place
            x, states = block.apply({"params": layer}, x, states, {**ctx, "layer": i})
        else:  # recurrent: all of a layer's state is new
            mine = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), states)
            x, new = block.apply({"params": layer}, x, mine, ctx)
            put = lambda a, b: lax.dynamic_update_index_in_dim(a, b.astype(a.dtype), i, 0)  # noqa: E731
            states = jax.tree.map(put, states, new)
        return (how.placed(x), states), None

    if how.remat != "none":
        body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[how.remat])
    if isinstance(layers, tuple):  # each layer by itself (`LM.generate`): no loop, nothing sliced
        for i, layer in enumerate(layers):
            (x_BTD, state), _ = body((x_BTD, state), (layer, jnp.int32(first + i)))
        return x_BTD, state
    n = jax.tree.leaves(layers)[0].shape[0]
    return lax.scan(body, (x_BTD, state), (layers, first + jnp.arange(n, dtype=jnp.int32)))[0]


def features(
    cfg: Config, params: dict, tokens_BT, state=None, mask_BT=None, segments_BT=None,
    how: Compute = F32,
):  # fmt: skip
    """All but the head -> (f_BTD after the final norm, state); a DELVE: {stream: f_BTD}.

    state None: a whole text, nothing cached (training, scoring). With a state from `init_state` the
    call continues it: prefill of any length and single steps alike. mask_BT marks real tokens of a
    LEFT-padded batch. segments_BT, non-decreasing along T: the document of each token; nothing
    passes from one to another (None: one document a row; not with a state).
    """
    if state is not None and segments_BT is not None:
        raise ValueError("segments_BT: a state continues one document a row")
    if cfg.family == "delve":
        return delve.features(cfg, params, tokens_BT, state, mask_BT, segments_BT, how)
    x_BTD = embed_tokens(cfg, params, tokens_BT, how)
    ctx, book = FAMILY[cfg.family].context(cfg, x_BTD, mask_BT, state, segments_BT)
    old = None if state is None else state["layers"]
    x_BTD, new = run_layers(cfg, params["layers"], x_BTD, old, ctx, how)
    f_BTD = final_features(cfg, params, x_BTD)
    return f_BTD, None if state is None else {"layers": new, **book}


def head(cfg: Config, params: dict, f) -> jax.Array:
    """What `features` gives -> logits [.., V], float32 (float64 of float64 features).

    Reads only `head_params`; a DELVE with J = K returns log-probabilities.
    """
    return (delve.head if cfg.family == "delve" else head_logits)(cfg, params, f)


def head_params(cfg: Config, params: dict) -> dict:
    """The part of the tree that `head` reads: a loss can differentiate it chunk by chunk."""
    if cfg.family == "delve":
        streams = {n: head_params(sub, params["streams"][n]) for n, sub in cfg.streams}
        out = {"streams": streams, **{k: params[k] for k in ("pool", "gate") if k in params}}
        if cfg.codes:
            out["codes"] = {k: p for k, p in params["codes"].items() if k == "head"}
        return out
    name = "head" if "head" in params else "embed"
    return {name: params[name]}


def forward(
    cfg: Config, params: dict, tokens_BT, state=None, mask_BT=None, segments_BT=None,
    how: Compute = F32,
):  # fmt: skip
    """-> (logits_BTV, state): `head` of `features`. Pure; cfg and how are static."""
    f, state = features(cfg, params, tokens_BT, state, mask_BT, segments_BT, how)
    return head(cfg, params, f), state


def init_state(cfg: Config, batch: int, max_len: int, dtype=jnp.float32) -> dict:
    """An empty state for `batch` rows; `max_len` bounds the attention caches."""
    if cfg.family == "delve":
        return {n: init_state(sub, batch, max_len, dtype) for n, sub in cfg.streams}
    return FAMILY[cfg.family].init_state(cfg, batch, max_len, dtype)


def grow(cfg: Config, state: dict, n: int) -> dict:
    """The state with room for `n` more tokens: full attention caches at least double (host side).

    Without it a write past the end would be clamped by XLA and silently wrong.
    """
    if cfg.family == "delve":
        return {name: grow(sub, state[name], n) for name, sub in cfg.streams}
    return attention.grow(state, n) if "valid_BS" in state else state


def begun(cfg: Config, state: dict) -> jax.Array:
    """[B] whether a recurrent stream has read a token of the row: then padding would be one more.

    What its first layer keeps of the last inputs is zero before (attention masks padding out).
    """
    if cfg.family == "delve":
        return jnp.stack([begun(sub, state[name]) for name, sub in cfg.streams]).any(0)
    kept = [a[0] for n, a in state["layers"].items() if n in ("conv", "ssm", "att_shift")]
    out_B = jnp.zeros(jax.tree.leaves(state["layers"])[0].shape[1], bool)
    for a in kept:
        out_B |= (a != 0).reshape(len(out_B), -1).any(1)
    return out_B


def _init_parent(cfg: ParentConfig, key: jax.Array) -> dict:
    """Random parameters of one parent, layers stacked."""
    fam = FAMILY[cfg.family]
    k_layers, k_embed, k_head, k_more = jax.random.split(key, 4)
    x = jnp.zeros((1, 1, cfg.d_model))
    ctx, _ = fam.context(cfg, x)
    block = lambda k: fam.Block(cfg).init(k, x, None, ctx)["params"]  # noqa: E731
    layers = jax.vmap(block)(jax.random.split(k_layers, cfg.n_layers))
    of_embed = of_head = nn.initializers.normal(0.02)
    if cfg.family == "qwen3":
        of_embed, of_head = truncated(1 / cfg.d_model), truncated(cfg.d_model**-0.5)
    table = Table(cfg.vocab_rows, cfg.d_model, cfg.factored("embed"), of_embed)
    params = {
        "embed": table.init(k_embed, jnp.zeros((1,), int))["params"],
        "layers": fam.init_layers(cfg, layers, k_more),
    }
    if fam.NORM != "bare":
        params["norm_f"] = Norm(fam.NORM, cfg.norm_eps).init(key, x)["params"]
    if cfg.family == "rwkv":
        params["ln0"] = Norm("layer", cfg.norm_eps).init(key, x)["params"]
    if not cfg.tie_embeddings:
        head = Linear(cfg.vocab_rows, cfg.factored("head"), False, of_head)
        params["head"] = head.init(k_head, x)["params"]
    for name, ranks in cfg.ranks:
        if cfg.storage == "uv" and min(ranks) < max(1, *ranks):  # zero beyond a layer's own rank
            leaf = leaf_of(params, name)
            inside_LK = jnp.arange(max(1, *ranks)) < jnp.array(ranks)[:, None]
            leaf["v"] = leaf["v"] * inside_LK[:, None]
            leaf["u"] = leaf["u"] * inside_LK[:, :, None]
    return params


def init_params(cfg: Config, key: jax.Array) -> dict:
    """Random parameters (float32) as a plain nested dict."""
    params = (delve.init_params if cfg.family == "delve" else _init_parent)(cfg, key)
    return cast(params, jnp.float32)  # under x64 they are float64


def kept_dtype(path: str, stored, asked) -> jnp.dtype:
    """The dtype in which the leaf at `path` ("layers/A_log") is kept where `asked` is asked for.

    Integers and the scales that belong to them stay what they are: both are part of a storage form,
    and a scale in bfloat16 would cost as much as its int8 factors do. Decays (the families'
    KEEP_WIDE) and a DELVE's pool, all of which models compute with in float32, are not rounded to
    fewer bits.
    """
    stored, asked = jnp.dtype(stored), jnp.dtype(asked)
    if path.endswith("q_scale") or not jnp.issubdtype(stored, jnp.floating):
        return stored
    names = [f"/{name}" for family in FAMILY.values() for name in family.KEEP_WIDE]
    if path.endswith(tuple(names)) or path.startswith("pool/"):
        return jnp.promote_types(asked, jnp.float32) if stored.itemsize >= 4 else asked
    return asked


def cast(params: dict, dtype) -> dict:
    """Arrays or shapes in `dtype`, but for what `kept_dtype` excepts."""

    def one(keys, a):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        new = kept_dtype(path, a.dtype, dtype)
        return a.astype(new) if hasattr(a, "astype") else jax.ShapeDtypeStruct(a.shape, new)

    return jax.tree_util.tree_map_with_path(one, params)


def abstract_params(cfg: Config) -> dict:
    """The tree of shapes that `init_params` would make; nothing is allocated."""
    leaves, structure = _abstract(cfg)
    return jax.tree.unflatten(structure, leaves)  # dicts of the caller's own


@functools.lru_cache(maxsize=64)  # tracing takes 0.1 to 0.7 s, and all that reads a checkpoint asks
def _abstract(cfg: Config) -> tuple:
    return jax.tree.flatten(jax.eval_shape(lambda: init_params(cfg, jax.random.key(0))))


def leaf_of(params: dict, name: str) -> dict:
    """The parameters of the map `name`: a vocabulary table's, or a stacked layer map's."""
    leaf = params if name in ("embed", "head") else params["layers"]
    for part in name.split("/"):
        leaf = leaf[part]
    return leaf


def factored_maps(cfg: ParentConfig, params: dict):
    """Yields (leaf, [(rank, I, O) of each layer]) of every factored map, true ranks and widths."""
    mlp = FAMILY[cfg.family].MLP if cfg.neurons else ()
    for name, ranks in cfg.ranks:
        leaf = leaf_of(params, name)
        n_in, n_out = dims(leaf, min(ranks))
        ins, outs = [n_in] * len(ranks), [n_out] * len(ranks)
        if name in mlp:  # the last of the MLP's maps reads the neurons that the others make
            ins, outs = (cfg.neurons, outs) if name == mlp[-1] else (ins, cfg.neurons)
        yield leaf, list(zip(ranks, ins, outs, strict=True))


def _padding(cfg: ParentConfig, params: dict) -> int:
    """Stored numbers that are no parameters: zeros beyond true ranks and widths, permutations."""
    total = 0
    for leaf, layers in factored_maps(cfg, params):
        total += sum(a.size for name, a in leaf.items() if name != "bias")
        total -= sum(parameters(cfg.storage, *layer) for layer in layers)
    for name in FAMILY[cfg.family].MLP if cfg.neurons else ():
        column = 0 if cfg.rank(name) else cfg.d_model  # of a dense map, as long as its other side
        bias = "bias" in leaf_of(params, name) and name != FAMILY[cfg.family].MLP[-1]
        total += sum(cfg.d_ffn - f for f in cfg.neurons) * (column + bias)
    return total


def count(cfg: Config) -> int:
    """Parameters, everything included, at true ranks and valid vocabulary rows as stored."""
    params = abstract_params(cfg)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    if cfg.family == "delve":
        streams = delve.whole(cfg, params)
        return total - sum(_padding(sub, streams[name]) for name, sub in cfg.streams)
    return total - _padding(cfg, params)


def parameter_bytes(cfg: Config) -> int:
    """Bytes of the parameters as stored: their true count in the config's dtype, int8 factors one
    byte each, their scales and a pivot form's permutation four."""
    size = jnp.dtype(cfg.dtype).itemsize
    total = count(cfg) * size
    for sub in dict(cfg.streams).values() if cfg.family == "delve" else (cfg,):
        for leaf, layers in factored_maps(sub, abstract_params(sub)):
            for rank, n_in, n_out in layers:
                if sub.storage == "int8":
                    total -= rank * (n_in + n_out) * (size - 1) + rank * (size - 4)
                elif sub.storage == "pivot":
                    total += 4 * (n_out if "u_rest" in leaf else n_in)
    return total


class LM(nn.Module):
    """Any family as a Linen module: `LM(cfg).init(key, tokens)`, `.apply(vars, tokens, state)`."""

    cfg: Config

    @nn.compact
    def __call__(self, tokens_BT, state=None, mask_BT=None):
        names = abstract_params(self.cfg)
        params = {
            name: self.param(name, lambda key, name=name: init_params(self.cfg, key)[name])
            for name in names
        }
        return forward(self.cfg, params, tokens_BT, state, mask_BT)


from . import delve  # noqa: E402  (a DELVE is made of the parents above)
