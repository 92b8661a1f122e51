"""All model families behind one signature: (params, tokens_BT, state) -> (logits, state).

Letters in names: B batch, T time, S cache length, L layer, V vocabulary, D model width, E inner
(2D in Mamba), N state, R dt-rank, K rank of a factor (streams in a DELVE), H head, h head width,
F MLP, W convolution width, A attention width (RWKV), I/O in and out of a map.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from ..config import Config, ParentConfig
from . import mamba, neox, rwkv
from .linear import Linear, Norm, Table, layer_norm, linear, lookup, rms_norm, transposed

FAMILY = {"mamba": mamba, "rwkv": rwkv, "neox": neox}


def embed_tokens(cfg: ParentConfig, params: dict, tokens_BT: jax.Array) -> jax.Array:
    """Token ids -> x_BTD, the input of the first layer (RWKV: after its extra LayerNorm)."""
    x_BTD = lookup(params["embed"], tokens_BT).astype(jnp.float32)
    return layer_norm(params["ln0"], x_BTD, cfg.norm_eps) if "ln0" in params else x_BTD


def final_features(cfg: ParentConfig, params: dict, x_BTD: jax.Array) -> jax.Array:
    """f = final norm of the residual stream, the input of the head."""
    if cfg.family == "mamba":
        return rms_norm(x_BTD, cfg.norm_eps, params["norm_f"]["scale"])
    eps = rwkv.FINAL_EPS if cfg.family == "rwkv" else cfg.norm_eps
    return layer_norm(params["norm_f"], x_BTD, eps)


def head_logits(cfg: ParentConfig, params: dict, f_BTD: jax.Array) -> jax.Array:
    """float32 logits over the V valid ids; padding rows of the table are cut."""
    out = linear(params["head"], f_BTD) if "head" in params else transposed(params["embed"], f_BTD)
    return out[..., : cfg.vocab_size].astype(jnp.float32)


def block_apply(cfg: ParentConfig, layer: dict, x_BTD, ctx=None, mutable=False):
    """One layer without cache; with mutable=["moments"] -> (x, {"moments": sums per map})."""
    if ctx is None:
        ctx, _ = FAMILY[cfg.family].context(cfg, x_BTD.shape[1], None, None)
    block = FAMILY[cfg.family].Block(cfg)
    out = block.apply({"params": layer}, x_BTD, None, ctx, mutable=mutable)
    return (out[0][0], out[1]) if mutable else out[0]


def run_layers(cfg: ParentConfig, layers: dict, x_BTD, state, ctx, remat=False):
    """Scan x through stacked layers; `state` holds the layers' states or is None."""
    block = FAMILY[cfg.family].Block(cfg)

    def body(x, slot):
        layer, layer_state = slot
        return block.apply({"params": layer}, x, layer_state, ctx)

    if remat:
        body = jax.checkpoint(body, prevent_cse=False)
    return lax.scan(body, x_BTD, (layers, state))


def backbone(cfg: ParentConfig, params: dict, x_BTD, state=None, mask_BT=None, remat=False):
    """All layers and the final norm: x_BTD -> (f_BTD, state)."""
    ctx, book = FAMILY[cfg.family].context(cfg, x_BTD.shape[1], mask_BT, state)
    old = None if state is None else state["layers"]
    x_BTD, new = run_layers(cfg, params["layers"], x_BTD, old, ctx, remat)
    f_BTD = final_features(cfg, params, x_BTD)
    return f_BTD, None if state is None else {"layers": new, **book}


def forward(cfg: Config, params: dict, tokens_BT, state=None, mask_BT=None, remat=False):
    """-> (logits_BTV float32, state). Pure; cfg is static.

    state None: a whole text, nothing cached (training, scoring). With a state from `init_state` the
    call continues it: prefill of any length and single steps alike. mask_BT marks real tokens of a
    LEFT-padded batch. A DELVE with J = K returns log-probabilities.
    """
    if cfg.family == "delve":
        return delve.forward(cfg, params, tokens_BT, state, mask_BT, remat)
    x_BTD = embed_tokens(cfg, params, tokens_BT)
    f_BTD, state = backbone(cfg, params, x_BTD, state, mask_BT, remat)
    return head_logits(cfg, params, f_BTD), state


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
    if cfg.family != "neox":
        return state
    size = state["valid_BS"].shape[1]
    more = int(state["index"]) + n - size
    if more <= 0:
        return state
    more = max(more, size)
    pad = lambda a: jnp.pad(a, ((0, 0),) * 2 + ((0, more),) + ((0, 0),) * 2)  # noqa: E731
    return {
        **state,
        "layers": jax.tree.map(pad, state["layers"]),
        "valid_BS": jnp.pad(state["valid_BS"], ((0, 0), (0, more))),
    }


def _init_parent(cfg: ParentConfig, key: jax.Array) -> dict:
    """Random parameters of one parent, layers stacked."""
    fam = FAMILY[cfg.family]
    k_layers, k_embed, k_head, k_more = jax.random.split(key, 4)
    x = jnp.zeros((1, 1, cfg.d_model))
    ctx, _ = fam.context(cfg, 1, None, None)
    block = lambda k: fam.Block(cfg).init(k, x, None, ctx)["params"]  # noqa: E731
    layers = jax.vmap(block)(jax.random.split(k_layers, cfg.n_layers))
    table = Table(cfg.vocab_rows, cfg.d_model, cfg.pad_rank("embed"))
    norm = Norm("rms" if cfg.family == "mamba" else "layer", cfg.norm_eps)
    params = {
        "embed": table.init(k_embed, jnp.zeros((1,), int))["params"],
        "layers": fam.init_layers(cfg, layers, k_more),
        "norm_f": norm.init(key, x)["params"],
    }
    if cfg.family == "rwkv":
        params["ln0"] = Norm("layer", cfg.norm_eps).init(key, x)["params"]
    if not cfg.tie_embeddings:
        head = Linear(cfg.vocab_rows, cfg.pad_rank("head"))
        params["head"] = head.init(k_head, x)["params"]
    return params


def init_params(cfg: Config, key: jax.Array) -> dict:
    """Random parameters (float32) as a plain nested dict."""
    return (delve.init_params if cfg.family == "delve" else _init_parent)(cfg, key)


def abstract_params(cfg: Config) -> dict:
    """The tree of shapes that `init_params` would make; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def _padding(cfg: ParentConfig, params: dict) -> int:
    """Elements of factors beyond each layer's true rank: stored, never counted."""
    total = 0
    for name, ranks in cfg.ranks:
        leaf = params if name in ("embed", "head") else params["layers"]
        for part in name.split("/"):
            leaf = leaf[part]
        sides = leaf["v"].shape[-2] + leaf["u"].shape[-1]
        total += sum(max(ranks) - r for r in ranks) * sides
    return total


def count(cfg: Config) -> int:
    """Parameters, everything included, at true ranks and valid vocabulary rows as stored."""
    params = abstract_params(cfg)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    if cfg.family == "delve":
        return total - sum(_padding(sub, params["streams"][name]) for name, sub in cfg.streams)
    return total - _padding(cfg, params)


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
