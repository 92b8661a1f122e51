"""DELVE in PyTorch: K small experts (Mamba-1, RWKV-4, GPT-NeoX) side by side, pooled by one head.

S superblocks: superblock s runs its share of every expert's layers, and before each but the first
a low-rank hub lets the streams read each other. Shapes are the letters of a name: B batch, T time,
S keys, D width, E Mamba inner, N state, A RWKV attention, H heads, h head width, V vocabulary.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import transformers
from torch import nn

if not hasattr(transformers.DynamicCache, "get_recurrent_state"):
    found = transformers.__version__
    raise ImportError(f"a DELVE needs transformers 5.23 or 5.24; this is transformers {found}")

from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_delve import ATTENTION, DelveConfig

# what `generate` calls the cache, in its keywords and in outputs: renamed in transformers 5.24
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"

EPS = 1e-6  # of the gainless RMS that hub and gate read
EMPTY = -1e38  # log-weight of an empty RWKV state
CHUNK = 64  # steps whose inputs are prepared at once in the recurrences


class LowRank(nn.Module):
    """y = u(v(x)): a linear map of rank r; LoRA targets are the inner `u` and `v`."""

    def __init__(self, d_in, d_out, rank, bias):
        super().__init__()
        self.v = nn.Linear(d_in, rank, bias=False)
        self.u = nn.Linear(rank, d_out, bias=bias)

    def forward(self, x):
        return self.u(self.v(x))


# Weights are read in the forward of the module that has them and nowhere else: where a model is
# spread over devices or the disk, accelerate puts them in place for that call only.


class Table(nn.Embedding):
    """Rows of ids; of features their products with all rows, the logits of a tied head."""

    def forward(self, x):
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class Up(nn.Module):
    """x W^T, and x W on the way back: no nn.Linear, whose weight is packed where quantised."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_out, d_in))

    def forward(self, x, back=False):
        return x @ self.weight if back else F.linear(x, self.weight)


class LowRankTable(nn.Module):
    """Vocabulary table [V, D] = table [V, r] times up^T [r, D], read both ways like `Table`."""

    def __init__(self, rows, d_model, rank):
        super().__init__()
        self.table = Table(rows, rank)
        self.up = Up(rank, d_model)

    def forward(self, x):
        if x.is_floating_point():
            return self.table(self.up(x, back=True))
        return self.up(self.table(x))


class LowRankHead(nn.Module):
    """Logits of a factored head: table(down(f)). Names differ from LowRank's to spare it LoRA."""

    def __init__(self, d_model, rows, rank):
        super().__init__()
        self.down = nn.Linear(d_model, rank, bias=False)
        self.table = nn.Linear(rank, rows, bias=False)

    def forward(self, f):
        return self.table(self.down(f))


class SharedTable(nn.Module):
    """One stream's side of an input table that all share: codes [.., r] to its width."""

    def __init__(self, d_model, rank):
        super().__init__()
        self.up = nn.Linear(rank, d_model, bias=False)

    def forward(self, codes):
        return self.up(codes)


class SharedHead(nn.Module):
    """One stream's side of a head that all share: its features to codes [.., r]."""

    def __init__(self, d_model, rank):
        super().__init__()
        self.down = nn.Linear(d_model, rank, bias=False)

    def forward(self, f):
        return self.down(f)


class Norm(nn.Module):
    """RMSNorm or LayerNorm, computed in float32, returned in the dtype of the weights."""

    def __init__(self, dim, eps, rms=False):
        super().__init__()
        self.eps, self.rms = eps, rms
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = None if rms else nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        x = x.float()
        x = x if self.rms else x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return (y if self.rms else y + self.bias.float()).to(self.weight.dtype)


def rms(x):
    """RMS normalisation without gain, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


@dataclass
class Step:
    """What the blocks of one stream need to know of a forward call; `cache` may be None."""

    cache: DynamicCache | None
    pad_BT1: torch.Tensor | None  # True where a token is padding; None where none is
    mask_B1TS: torch.Tensor | None = None  # True where a query may look; None: plain causal
    rotary: tuple | None = None  # cos, sin [B, 1, T, r]

    def to(self, device, **kwargs):
        """What accelerate calls before a layer that has a device of its own."""
        tensors = self.pad_BT1, self.mask_B1TS, *(self.rotary or ())
        pad, mask, *rotary = (x if x is None else x.to(device, **kwargs) for x in tensors)
        return replace(self, pad_BT1=pad, mask_B1TS=mask, rotary=tuple(rotary) or None)

    def zero_padding(self, x_BTC):
        """A padded position must look like "before the text": its inputs are zero."""
        return x_BTC if self.pad_BT1 is None else x_BTC.masked_fill(self.pad_BT1, 0)

    def window(self, index, x_BTC, kernel, back, which=0):
        """[B, C, back + T]: the `back` inputs before this call (zeros at the start) and its own."""
        x_BCT = x_BTC.transpose(1, 2)
        want = back + x_BCT.shape[-1]
        if self.cache is not None:
            x_BCT = self.cache.update_conv_state(
                x_BCT, index, state_idx=which, conv_kernel_size=kernel
            )
        return F.pad(x_BCT, (max(want - x_BCT.shape[-1], 0), 0))[..., -want:]

    def shifted(self, index, h_BTD, which):
        """Token shift: the input of the position before, zero before the text."""
        return self.window(index, h_BTD, 1, 1, which)[..., :-1].transpose(1, 2)

    def state(self, index):
        """The recurrent state that the cache holds for a block, or None at the start.

        Ask before `window`, which marks the block as started. A copy: the cache writes in place.
        """
        if self.cache is None or not self.cache.has_previous_state(index, 0):
            return None
        return self.cache.get_recurrent_state(index).clone()

    def keep(self, index, state):
        """Store a block's recurrent state, if there is a cache."""
        if self.cache is not None:
            self.cache.update_recurrent_state(state, index)


def right_padded(real_BT):
    """Whether padding follows text, which a recurrent state cannot skip."""
    return bool((real_BT[:, :-1] & ~real_BT[:, 1:]).any())


def routed(ffn, weight_BT1, h_BTD, *more):
    """ffn(h) times the tokens' weights (None: all 1); one token without any is spared the work."""
    if weight_BT1 is None:
        return ffn(h_BTD, *more)
    if h_BTD.shape[1] == 1 and not weight_BT1.any():
        return torch.zeros_like(h_BTD)
    y = ffn(h_BTD, *more)
    return weight_BT1.to(y.dtype) * y


def selective_scan(u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, s_BEN):
    """s_t = exp(dt A) s_{t-1} + dt u B;  y_t = s_t C, in float32 -> (y_BTE, last state)."""
    y_parts = []
    parts = (x.float().split(CHUNK, 1) for x in (u_BTE, dt_BTE, B_BTN, C_BTN))
    for u, dt, b, c in zip(*parts, strict=True):
        decay = torch.exp(dt[..., None] * A_EN).unbind(1)
        drive = ((dt * u)[..., None] * b[:, :, None]).unbind(1)
        states = []
        for a_BEN, x_BEN in zip(decay, drive, strict=True):
            s_BEN = a_BEN * s_BEN + x_BEN
            states.append(s_BEN)
        y_parts.append(torch.einsum("bten,btn->bte", torch.stack(states, 1), c))
    return torch.cat(y_parts, 1), s_BEN


def wkv(k_BTA, v_BTA, w_A, u_A, state_B3A, pad_BT1):
    """RWKV-4's weighted mean, max-stabilised, in float32 -> (y_BTA, last state [a, b, p]).

    y_t = (sum_{i<t} e^{(t-1-i)w + k_i} v_i + e^{u+k_t} v_t) / (the same without v), w < 0.
    """
    a, b, p = state_B3A.unbind(1)
    pads = [None] * k_BTA.shape[1] if pad_BT1 is None else pad_BT1.unbind(1)
    y = []
    inputs = zip(k_BTA.float().unbind(1), v_BTA.float().unbind(1), pads, strict=True)
    for k, v, pad in inputs:
        q = torch.maximum(p, u_A + k)
        old, new = torch.exp(p - q), torch.exp(u_A + k - q)
        y.append((old * a + new * v) / (old * b + new))
        q = torch.maximum(p + w_A, k)
        old, new = torch.exp(p + w_A - q), torch.exp(k - q)
        step = old * a + new * v, old * b + new, q
        if pad is None:
            a, b, p = step
        else:  # padding leaves the state untouched
            kept = zip((a, b, p), step, strict=True)
            a, b, p = (torch.where(pad, x, x_new) for x, x_new in kept)
    return torch.stack(y, 1), torch.stack([a, b, p], 1)


class Block(GradientCheckpointingLayer):
    """A residual layer: forward(x_BTD, ffn_BT1, step), ffn_BT1 a token's weight of its FFN or None.

    It does not change `step`: what is recomputed in the backward pass reads the same again.
    """


class MambaBlock(Block):
    """x + out_proj(scan(silu(conv(u))) * silu(z)),  [u | z] = in_proj(RMSNorm(x))."""

    def __init__(self, cfg, layer, index):
        super().__init__()
        d, e, n, r = (cfg[k] for k in ("d_model", "d_inner", "d_state", "dt_rank"))
        bias, self.index, self.width, self.sizes = cfg["use_bias"], index, cfg["d_conv"], (r, n, n)
        self.norm = Norm(d, cfg["norm_eps"], rms=True)
        self.in_proj = linear(cfg, "in_proj", layer, d, 2 * e, bias)
        self.conv1d = nn.Conv1d(e, e, self.width, groups=e, bias=cfg["use_conv_bias"])
        self.x_proj = linear(cfg, "x_proj", layer, e, r + 2 * n)
        self.dt_proj = linear(cfg, "dt_proj", layer, r, e, True)
        self.A_log = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(e, 1))
        self.D = nn.Parameter(torch.ones(e))
        self.out_proj = linear(cfg, "out_proj", layer, e, d, bias)

    def forward(self, x_BTD, ffn_BT1, step):
        u, z = self.in_proj(self.norm(x_BTD)).chunk(2, -1)
        s_BEN = step.state(self.index)
        if s_BEN is None:
            s_BEN = u.new_zeros((u.shape[0], *self.A_log.shape), dtype=torch.float32)
        # masked before the convolution and after it, where its bias has spoken
        u = step.window(self.index, step.zero_padding(u), self.width, self.width - 1)
        u = step.zero_padding(F.silu(self.conv1d(u)).transpose(1, 2))
        dt, B, C = self.x_proj(u).split(self.sizes, -1)
        dt = F.softplus(self.dt_proj(dt).float())
        y, s_BEN = selective_scan(u, dt, -torch.exp(self.A_log.float()), B, C, s_BEN)
        step.keep(self.index, s_BEN)
        y = (y + self.D.float() * u.float()).to(z.dtype)
        return x_BTD + self.out_proj(y * F.silu(z))


def mix(h, prev, m):
    """Interpolate an input with its predecessor, per channel."""
    return h * m + prev * (1 - m)


class RwkvTimeMix(nn.Module):
    """output(sigmoid(r) * wkv(k, v)), each read from a mix of this token and the last."""

    def __init__(self, cfg, layer):
        super().__init__()
        d, a = cfg["d_model"], cfg["d_att"]
        self.time_decay = nn.Parameter(torch.zeros(a))
        self.time_first = nn.Parameter(torch.zeros(a))
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.ones(d)) for _ in range(3))
        self.key = linear(cfg, "att/key", layer, d, a)
        self.value = linear(cfg, "att/value", layer, d, a)
        self.receptance = linear(cfg, "att/receptance", layer, d, a)
        self.output = linear(cfg, "att/output", layer, a, d)

    def forward(self, h, prev, state_B3A, pad_BT1):
        k = self.key(mix(h, prev, self.mix_k))
        v = self.value(mix(h, prev, self.mix_v))
        r = self.receptance(mix(h, prev, self.mix_r))
        if state_B3A is None:
            state_B3A = k.new_zeros((k.shape[0], 3, k.shape[-1]), dtype=torch.float32)
            state_B3A[:, 2] = EMPTY
        w_A, u_A = -torch.exp(self.time_decay.float()), self.time_first.float()
        y, state_B3A = wkv(k, v, w_A, u_A, state_B3A, pad_BT1)
        return self.output(torch.sigmoid(r) * y.to(r.dtype)), state_B3A


class RwkvChannelMix(nn.Module):
    """sigmoid(r) * value(relu(key)^2)."""

    def __init__(self, cfg, layer):
        super().__init__()
        d, f = cfg["d_model"], neurons(cfg, layer)
        self.mix_k, self.mix_r = (nn.Parameter(torch.ones(d)) for _ in range(2))
        self.key = linear(cfg, "ffn/key", layer, d, f)
        self.value = linear(cfg, "ffn/value", layer, f, d)
        self.receptance = linear(cfg, "ffn/receptance", layer, d, d)

    def forward(self, h, prev):
        k = F.relu(self.key(mix(h, prev, self.mix_k))).square()
        return torch.sigmoid(self.receptance(mix(h, prev, self.mix_r))) * self.value(k)


class RwkvBlock(Block):
    """Time-mix, then channel-mix; both shift the normalised input by one token."""

    def __init__(self, cfg, layer, index):
        super().__init__()
        self.index = index
        self.ln1 = Norm(cfg["d_model"], cfg["norm_eps"])
        self.ln2 = Norm(cfg["d_model"], cfg["norm_eps"])
        self.att = RwkvTimeMix(cfg, layer)
        self.ffn = RwkvChannelMix(cfg, layer)

    def forward(self, x_BTD, ffn_BT1, step):
        state = step.state(self.index)
        h = step.zero_padding(self.ln1(x_BTD))
        y, state = self.att(h, step.shifted(self.index, h, 0), state, step.pad_BT1)
        step.keep(self.index, state)
        x_BTD = x_BTD + y
        h = step.zero_padding(self.ln2(x_BTD))
        return x_BTD + routed(self.ffn, ffn_BT1, h, step.shifted(self.index, h, 1))


class NeoxAttention(nn.Module):
    """Rotary causal attention; rows of `qkv` are head-major, [q | k | v] inside each head."""

    def __init__(self, cfg, layer, index):
        super().__init__()
        d, bias, self.heads, self.index = cfg["d_model"], cfg["use_bias"], cfg["n_heads"], index
        self.qkv = linear(cfg, "att/qkv", layer, d, 3 * d, bias)
        self.out = linear(cfg, "att/out", layer, d, d, bias)

    def forward(self, h_BTD, step):
        b, t, d = h_BTD.shape
        qkv = self.qkv(h_BTD).view(b, t, self.heads, 3, d // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        q, k = rotate(q, *step.rotary), rotate(k, *step.rotary)
        if step.cache is not None:
            k, v = step.cache.update(k, v, self.index)
        mask = step.mask_B1TS
        causal = mask is None and t > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


def rotate(x_BHTh, cos, sin):
    """Rotate the first 2r dims of each head, half-split; the others pass through."""
    r = cos.shape[-1]
    a, b = x_BHTh[..., :r].float(), x_BHTh[..., r : 2 * r].float()
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BHTh.dtype)
    return torch.cat([turned, x_BHTh[..., 2 * r :]], -1)


class NeoxMlp(nn.Module):
    """down(gelu(up(h))) with the exact (erf) GELU."""

    def __init__(self, cfg, layer):
        super().__init__()
        d, f = cfg["d_model"], neurons(cfg, layer)
        self.up = linear(cfg, "mlp/up", layer, d, f, True)
        self.down = linear(cfg, "mlp/down", layer, f, d, True)

    def forward(self, h):
        return self.down(F.gelu(self.up(h)))


class NeoxBlock(Block):
    """Parallel residual (Pythia): both read the same x; sequential (INCITE): in turn."""

    def __init__(self, cfg, layer, index):
        super().__init__()
        self.parallel = cfg["parallel_residual"]
        self.ln1 = Norm(cfg["d_model"], cfg["norm_eps"])
        self.ln2 = Norm(cfg["d_model"], cfg["norm_eps"])
        self.att = NeoxAttention(cfg, layer, index)
        self.mlp = NeoxMlp(cfg, layer)

    def forward(self, x_BTD, ffn_BT1, step):
        after = x_BTD + self.att(self.ln1(x_BTD), step)
        return after + routed(self.mlp, ffn_BT1, self.ln2(x_BTD if self.parallel else after))


def linear(cfg, name, layer, d_in, d_out, bias=False):
    """The map `name` of a layer: low-rank where the config gives it a rank, else dense."""
    ranks = cfg["ranks"].get(name)
    if ranks is None:
        return nn.Linear(d_in, d_out, bias=bias)
    return LowRank(d_in, d_out, ranks[layer], bias)


def neurons(cfg, layer):
    """Width of a layer's MLP: layers that were pruned have their own."""
    return cfg["neurons"][layer] if cfg.get("neurons") else cfg["d_ffn"]


BLOCKS = {"mamba": MambaBlock, "rwkv": RwkvBlock, "neox": NeoxBlock}
ROUTED = ("rwkv", "neox")  # families with stateless sub-layers


class Expert(nn.Module):
    """One stream: embedding, blocks, final norm, head. `first` is its first cache index.

    shared: the tables, "embed" or "head", of which it has its own side only.
    """

    def __init__(self, cfg, first, shared=()):
        super().__init__()
        self.cfg, self.shared = cfg, shared
        d, rows, family, eps = cfg["d_model"], cfg["vocab_rows"], cfg["family"], cfg["norm_eps"]
        rank = {name: (cfg["ranks"].get(name) or [None])[0] for name in ("embed", "head")}
        if "embed" in shared:
            self.embed = SharedTable(d, rank["embed"])
        elif rank["embed"]:
            self.embed = LowRankTable(rows, d, rank["embed"])
        else:
            self.embed = Table(rows, d)
        if family == "rwkv":
            self.ln0 = Norm(d, eps)
            eps = 1e-5  # the final norm of RWKV-4 ignores the config
        self.layers = nn.ModuleList(
            BLOCKS[family](cfg, layer, first + layer) for layer in range(cfg["n_layers"])
        )
        self.norm_f = Norm(d, eps, rms=family == "mamba")
        if "head" in shared:
            self.head = SharedHead(d, rank["head"])
        elif not cfg["tie_embeddings"]:
            self.head = (
                LowRankHead(d, rows, rank["head"])
                if rank["head"]
                else nn.Linear(d, rows, bias=False)
            )

    def start(self, ids, codes):
        """x_BTD in float32: the residual streams stay there in every dtype of the weights."""
        x = self.embed(codes if "embed" in self.shared else ids)
        x = (self.ln0(x) if self.cfg["family"] == "rwkv" else x).float()
        # a reentrant checkpoint hands gradients on only where an input asks for one
        return x.requires_grad_() if self.checkpointing() else x

    def checkpointing(self):
        """Whether layers run again in the backward pass."""
        return self.training and any(block.gradient_checkpointing for block in self.layers)

    def logits(self, f, codes_head=None):
        """float32 logits of this stream alone, over the valid ids of its table."""
        if "head" in self.shared:
            out = codes_head(self.head(f))
        elif not self.cfg["tie_embeddings"]:
            out = self.head(f)
        else:
            out = self.embed(f)
        return out[..., : self.cfg["vocab_size"]].float()

    def angles(self, position_ids):
        """cos, sin [B, 1, T, r] of the rotary dims; None for families without them."""
        if self.cfg["family"] != "neox":
            return None
        dims = int(self.cfg["d_model"] // self.cfg["n_heads"] * self.cfg["rotary_pct"])
        exponent = torch.arange(0, dims, 2, device=position_ids.device).float() / dims
        angle = position_ids[:, None, :, None].float() * self.cfg["rotary_base"] ** -exponent
        return angle.cos(), angle.sin()


class Hub(nn.Module):
    """One stream's side of the connectors: reads rms(h) by `a`, writes sigma * (g z) b.

    skip: a token does without the FFNs that its router gives less weight (0: no router).
    """

    def __init__(self, joints, d_model, rank, skip=0.0):
        super().__init__()
        self.a = nn.Parameter(torch.randn(joints, d_model, rank) / math.sqrt(d_model))
        self.b = nn.Parameter(torch.zeros(joints, rank, d_model))
        self.g = nn.Parameter(torch.ones(joints, rank))
        self.register_buffer("sigma", torch.ones(joints))  # frozen after calibration
        self.skip = skip
        if skip:
            self.skip_v = nn.Parameter(torch.zeros(joints, rank))
            self.skip_c = nn.Parameter(torch.zeros(joints))

    def forward(self, x, joint, write=False):
        """What the stream says, of its h; `write`: what is added to h, of the z that it heard, and
        its tokens' FFN weights up to the next joint, [B, T, 1] float32 (None without a router)."""
        if not write:
            a = self.a[joint]
            return rms(x).to(a.dtype) @ a
        y = self.sigma[joint].float() * ((self.g[joint] * x) @ self.b[joint]).float()
        return y, self.weights(x, joint)

    def weights(self, z, joint):
        if not self.skip:
            return None
        v, c = self.skip_v[joint].float(), self.skip_c[joint].float()
        m = 2 * torch.sigmoid(z.float() @ v[:, None] + c)
        return torch.where(m >= self.skip, m, 0.0)


class Gate(nn.Module):
    """delta_BTK of the token gate: w2(silu(w1(concat_k p_k(rms(f_k)))))."""

    def __init__(self, widths, proj, hidden, outputs):
        super().__init__()
        self.p = nn.ModuleList(nn.Linear(d, proj, bias=False) for d in widths)
        self.w1 = nn.Linear(proj * len(widths), hidden, bias=False)
        self.w2 = nn.Linear(hidden, outputs, bias=False)

    def forward(self, features):
        dtype = features[0].dtype  # not of the weights, which are integers where quantised
        parts = [p(rms(f).to(dtype)) for p, f in zip(self.p, features, strict=True)]
        return self.w2(F.silu(self.w1(torch.cat(parts, -1)))).float()


class RecurrentCache(DynamicCache):
    """DynamicCache that counts tokens itself: without an attention stream nothing else does, and
    `generate` asks for the length."""

    seen = 0

    def get_seq_length(self, layer_idx=0):
        return self.seen

    def reset(self):
        super().reset()
        self.seen = 0


class DelvePreTrainedModel(PreTrainedModel):
    config_class = DelveConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # recurrent states cannot be cropped: no assisted generation
    _can_compile_fullgraph = False
    _supports_sdpa = True
    _no_split_modules = ["MambaBlock", "RwkvBlock", "NeoxBlock", "Hub", "Gate"]
    _keep_in_fp32_modules_strict = ["A_log", r"\.D$", "time_decay", "time_first", "pool"]

    @torch.no_grad()
    def _init_weights(self, module):
        """Fresh weights for `from_config`; checkpoints overwrite them all."""
        std, init = self.config.initializer_range, nn.init
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, Up)):
            init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Norm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, MambaBlock):
            if not getattr(module.A_log, "_is_hf_initialized", False):
                module.A_log.copy_(torch.arange(1.0, module.A_log.shape[1] + 1).log())
            init.ones_(module.D)
        elif isinstance(module, (RwkvTimeMix, RwkvChannelMix)):
            for name, value in module.named_parameters(recurse=False):
                init.constant_(value, 0.5 if name.startswith("mix") else 0.0)
        elif isinstance(module, Hub):
            init.normal_(module.a, std=module.a.shape[1] ** -0.5)
            init.zeros_(module.b)  # with the gate's w2, what makes a fresh DELVE a plain pool
            init.ones_(module.g)
            init.ones_(module.sigma)
            if module.skip:
                init.zeros_(module.skip_v)
                init.zeros_(module.skip_c)
        elif isinstance(module, Gate):
            init.zeros_(module.w2.weight)
        elif isinstance(module, DelveForCausalLM):
            # J = 1: weights that sum to one; J = K: log-weights, equal
            mixture = 1 < self.config.latents == len(module.streams)
            init.constant_(module.pool, 0.0 if mixture else 1 / len(module.streams))
            if module.pools_mixed():
                init.zeros_(module.pool_log_pi)


class DelveForCausalLM(DelvePreTrainedModel, GenerationMixin):
    """The model; `logits` are ordinary logits (J = 1) or log-probabilities (J > 1)."""

    def __init__(self, config):
        super().__init__(config)
        streams = config.streams
        depths, widths = ([stream[k] for stream in streams] for k in ("n_layers", "d_model"))
        shared = tuple(config.codes)
        self.streams = nn.ModuleList(
            Expert(stream, sum(depths[:k]), shared) for k, stream in enumerate(streams)
        )
        if shared:
            v, rank = config.vocab_size, {t: streams[0]["ranks"][t][0] for t in shared}
            self.codes = nn.ModuleDict()
            if "embed" in shared:
                self.codes["embed"] = nn.Embedding(v, rank["embed"])
            if "head" in shared:
                self.codes["head"] = nn.Linear(rank["head"], v, bias=False)
        # J = 1: weights [K]; J = K: log-weights [K]; between: weights [J, K], log-weights [J]
        if self.pools_mixed():
            self.pool = nn.Parameter(torch.zeros(config.latents, len(streams)))
            self.pool_log_pi = nn.Parameter(torch.zeros(config.latents))
        else:
            self.pool = nn.Parameter(torch.zeros(len(streams)))
        if config.n_superblocks > 1 and config.connectors != "none":
            joints = config.n_superblocks - 1
            skips = [config.ffn_skip * (stream["family"] in ROUTED) for stream in streams]
            self.hub = nn.ModuleList(
                Hub(joints, d, config.hub_rank, skip) for d, skip in zip(widths, skips, strict=True)
            )
        if config.gate_proj:
            outputs = len(streams) + (config.latents if self.pools_mixed() else 0)
            self.gate = Gate(widths, config.gate_proj, config.gate_hidden, outputs)
        self.attention_index = next(
            (i for i, kind in enumerate(config.layer_types) if kind == ATTENTION), None
        )
        self.post_init()

    @property
    def dtype(self):
        """Of most weights; the first of all, the pool, is float32 in every dtype of the rest."""
        return self.streams[0].norm_f.weight.dtype

    def pools_mixed(self):
        """Whether the head is a mixture of log-linear pools."""
        return 1 < self.config.latents < len(self.config.streams)

    def get_input_embeddings(self):
        """The table that the streams share, or the first stream's where each has its own."""
        return self.codes["embed"] if "embed" in self.config.codes else self.streams[0].embed

    def set_input_embeddings(self, value):
        raise NotImplementedError("a DELVE has one vocabulary table per stream: streams[k].embed")

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError("each stream of a DELVE has its own tables; they keep their size")

    def get_output_embeddings(self):
        return None  # the pooled head is no single matrix

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if self.attention_index is None and type(model_kwargs.get(CACHE)) is DynamicCache:
            model_kwargs[CACHE] = RecurrentCache(config=self.config)

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """The forward pass builds its own masks from the 2-D one."""
        return attention_mask

    def _steps(self, ids, attention_mask, position_ids, cache):
        """One Step per stream: padding, attention mask and rotary angles of this call."""
        t, device = ids.shape[1], ids.device
        past = 0
        if cache is not None and self.attention_index is not None:
            past = cache.get_seq_length(self.attention_index)
        elif isinstance(cache, RecurrentCache):
            past = cache.seen
        real = None
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError("attention_mask must be [batch, length]")
            if self.attention_index is not None and attention_mask.shape[1] != past + t:
                raise ValueError(
                    f"attention_mask must cover all {past + t} tokens, cached ones included, "
                    f"not {attention_mask.shape[1]}"
                )
            real = attention_mask.bool()
            if real.all():
                real = None
            elif cache is not None and right_padded(real):
                raise ValueError("with a cache, padding must be on the left (padding_side='left')")
        if position_ids is None:
            if real is None:
                position_ids = torch.arange(past, past + t, device=device)[None]
            else:
                position_ids = (real.long().cumsum(1) - 1).clamp(min=0)[:, -t:]
        mask = None
        if self.attention_index is not None and (real is not None or (past and t > 1)):
            rows = torch.arange(past, past + t, device=device)[:, None]
            columns = torch.arange(past + t, device=device)[None]
            mask = (columns <= rows)[None, None]
            if real is not None:
                # a padded query sees itself, so that no row of the softmax is empty
                mask = mask & real[:, None, None, :] | (columns == rows)
        pad = None if real is None or real[:, -t:].all() else ~real[:, -t:, None]
        return [Step(cache, pad, mask, expert.angles(position_ids)) for expert in self.streams]

    def features(self, input_ids, steps):
        """All streams through all superblocks -> their normalised features [B, T, D_k]."""
        codes = self.codes["embed"](input_ids) if "embed" in self.config.codes else None
        h = [expert.start(input_ids, codes) for expert in self.streams]
        bounds = [self.config.boundaries(k) for k in range(len(h))]
        weights = [None] * len(h)
        for s in range(self.config.n_superblocks):
            if s > 0 and self.config.connectors != "none":
                said = [hub(x, s - 1).to(h[0].device) for hub, x in zip(self.hub, h, strict=True)]
                for k, (hub, z) in enumerate(zip(self.hub, self.heard(said), strict=True)):
                    y, weights[k] = hub(z, s - 1, write=True)
                    h[k] = h[k] + y.to(h[k].device)
            for k, expert in enumerate(self.streams):
                for block in expert.layers[bounds[k][s] : bounds[k][s + 1]]:
                    h[k] = block(h[k], weights[k], steps[k])
        return [expert.norm_f(x) for expert, x in zip(self.streams, h, strict=True)]

    def heard(self, said):
        """What each stream hears at a hub, of what all of them said."""
        if self.config.connectors == "self":
            return said
        total = sum(said)
        return [total - z if self.config.connectors == "cross" else total for z in said]

    def pooled(self, features):
        """Pooled logits, or log p for J > 1, of features [.., D_k]; one [.., V] table at a time."""
        n, latents = len(self.streams), self.config.latents
        head = self.codes["head"] if "head" in self.config.codes else None
        delta = self.gate(features) if self.config.gate_proj else features[0].new_zeros(n + latents)
        device, wide = features[0].device, torch.float32  # streams may have devices of their own
        delta, weight = delta.to(device, wide), self.pool.to(device, wide)
        if 1 < latents == n:
            log_w = torch.log_softmax(weight + delta[..., :n], -1)
            out = None
            for k, (expert, f) in enumerate(zip(self.streams, features, strict=True)):
                log_p = torch.log_softmax(expert.logits(f, head).to(device), -1)
                log_p = log_w[..., k, None] + log_p
                out = log_p if out is None else torch.logaddexp(out, log_p)
            return out
        weight = weight.view(-1, n) * torch.exp(2 * torch.tanh(delta[..., None, :n] / 2))
        own = [
            (expert.head(f) if head is not None else expert.logits(f)).to(device, wide)
            for expert, f in zip(self.streams, features, strict=True)
        ]
        parts = [
            sum(weight[..., j, k, None] * x for k, x in enumerate(own)) for j in range(latents)
        ]
        if head is not None:  # codes were pooled: one product with the long side a latent
            parts = [head(z.to(features[0].dtype)).to(device, wide) for z in parts]
        if latents == 1:
            return parts[0]
        log_pi = torch.log_softmax(self.pool_log_pi.to(device, wide) + delta[..., n:], -1)
        terms = [log_pi[..., j, None] + torch.log_softmax(x, -1) for j, x in enumerate(parts)]
        return torch.logsumexp(torch.stack(terms), 0)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """input_ids [B, T] -> logits [B, T, V] float32 (last `logits_to_keep` positions; 0: all).

        attention_mask [B, all tokens so far]: 0 marks padding, on the left where a cache is used.
        cache: from transformers 5.24 on the name of past_key_values.
        labels [B, T]: shifted inside; -100 is ignored.
        """
        if input_ids is None:
            raise ValueError("input_ids are needed: each stream has its own embedding table")
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
            if attention_mask is not None and right_padded(attention_mask.bool()):
                use_cache = False
        cache = past_key_values if cache is None else cache
        if any(expert.checkpointing() for expert in self.streams):
            use_cache, cache = False, None  # a layer that runs twice would write its state twice
        if use_cache and cache is None:
            kind = DynamicCache if self.attention_index is not None else RecurrentCache
            cache = kind(config=self.config)
        steps = self._steps(input_ids, attention_mask, position_ids, cache)
        features = self.features(input_ids, steps)
        if isinstance(cache, RecurrentCache):
            cache.seen += input_ids.shape[1]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.pooled([f[:, keep] for f in features])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})


__all__ = ["DelveForCausalLM", "DelvePreTrainedModel"]
