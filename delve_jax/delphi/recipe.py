"""The Delphi recipe: a budget of FLOPs -> width, depth, batch, steps and every rate of the run.

Fields are the constants, methods the formulas of Marin's `completed_adamh` sweep (design notes,
delphi.md sections 1, 2, 4, 5; all 78 candidates and 10 logged configurations are reproduced).
H width, L layers, B rows of a step, S row length, T tokens, C training FLOPs. Rounding is Python's:
`round` is half to even, `int` truncates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import DelveError, read_json


@dataclass(frozen=True)
class Candidate:
    """One width at one budget; tokens and flops are those of whole steps, not of the budget."""

    hidden: int
    layers: int
    heads: int
    batch_size: int  # rows
    steps: int
    tokens: int
    params: int
    flops: int  # training


@dataclass(frozen=True)
class Recipe:
    """Constants as published; `dataclasses.replace` makes another recipe."""

    seq_len: int = 4096  # S
    vocab_size: int = 128256  # V, of Llama 3's tokenizer
    head_dim: int = 128  # heads are H / 128, each with its own keys and values
    mlp_ratio: int = 4  # F = 4H (SwiGLU)
    depth_base: int = 55  # of the width over the depth, grows with 4 log2 H
    min_hidden: int = 512
    max_hidden: int = 131072  # not itself a candidate
    fine_step: int = 128  # of widths ...
    coarse_step: int = 256  # ... above coarse_from FLOPs
    coarse_from: float = 2e19
    max_steps: int = 2**16  # what the batch is sized for; its reductions may exceed it
    min_batch: int = 8
    max_batch: int = 8192
    max_tokens_per_param: float = 250.0
    params_at_most: float = 12e9  # up to sweep_flops, then as sqrt(C) up to params_ceiling
    params_ceiling: float = 1e12
    sweep_flops: float = 3e20  # the largest budget of the isoFLOP sweep; larger ones are held out
    B0: int = 64  # the batch and tokens at which the rates were tuned (about 130M parameters)
    T0: float = 2.5e9
    lr0: float = 0.00630  # AdamH: relative step of the linear maps
    adam_lr0: float = 0.000656  # Adam: embedding and norms
    epsilon0: float = 1.85e-8
    lr_exponent: float = 0.3
    max_lr: float = 0.01
    beta1: float = 0.9
    beta2_0: float = 0.9999
    beta2_min: float = 0.9
    beta2_max: float = 0.9999
    max_grad_norm: float = 0.1  # of each of the two groups
    z_loss: float = 1e-7
    warmup: float = 0.1  # shares of the steps
    decay: float = 0.2
    token_coefficient: float = 0.026719627901911736  # T* = A C^a, fitted on c4_en bits per byte
    token_exponent: float = 0.5800829529762268

    # ---- width -> shape --------------------------------------------------------------------------

    def layers(self, H: int) -> int:
        """L = round(H / (55 + 4 log2 H)), at least 1."""
        return max(1, round(H / (self.depth_base + 4 * math.log2(H))))

    def heads(self, H: int) -> int:
        """Query heads; as many key and value heads."""
        return H // self.head_dim

    def params(self, H: int, qk_norm: bool = True) -> int:
        """Parameters: two tables, L blocks with two norms (and two QK-norms), a final norm."""
        maps = (4 + 3 * self.mlp_ratio) * H * H  # q, k, v, o; gate, up, down
        block = maps + 2 * H + (2 * self.head_dim if qk_norm else 0)
        return 2 * self.vocab_size * H + self.layers(H) * block + H

    def forward_flops(self, H: int) -> int:
        """Forward FLOPs a token: 2 a weight, attention over the full S; no embedding, no norms."""
        block = 2 * (4 + 3 * self.mlp_ratio) * H * H + self.seq_len * (4 * H + 3 * self.heads(H))
        return self.layers(H) * block + 2 * H * self.vocab_size

    def train_flops(self, H: int, tokens: int) -> int:
        """Forward and backward: three times forward."""
        return 3 * self.forward_flops(H) * tokens

    def target_tokens(self, C: float, H: int) -> float:
        """T that spends C exactly; not rounded."""
        return C / (3 * self.forward_flops(H))

    # ---- batch and tokens -> rates ---------------------------------------------------------------

    def hyperparameters(self, B: int, T: float) -> dict[str, float]:
        """lr, adam_lr, beta2 and epsilon, capped; B rows, T tokens."""
        ratio = B * self.T0 / (self.B0 * T)
        lr = self.lr0 * math.sqrt(B / self.B0) * (self.T0 / T) ** self.lr_exponent
        beta2 = self.beta2_0 ** (B / self.B0)  # a constant half-life in tokens
        return {
            "lr": min(self.max_lr, lr),
            "adam_lr": min(self.max_lr, self.adam_lr0 * math.sqrt(ratio)),
            "beta2": min(max(beta2, self.beta2_min), self.beta2_max),
            "epsilon": self.epsilon0 * math.sqrt(1 / ratio),
        }

    def batch(self, T: float) -> int:
        """Rows: T over max_steps steps up to a power of two, halved while a rate is at its limit.

        It never goes up to min_batch: a width whose batch is smaller is no candidate.
        """
        ratio = T / (self.max_steps * self.seq_len)
        B = 2 ** math.ceil(math.log2(ratio)) if ratio > 1 else 1
        while B > self.min_batch:
            h = self.hyperparameters(B, T)
            below = h["lr"] < self.max_lr and h["adam_lr"] < self.max_lr
            if below and h["beta2"] > self.beta2_min:
                break
            B //= 2
        return B

    def schedule(self, steps: int) -> dict[str, int]:
        """Warm-up, stable, linear decay to 0 (WSD), in steps: w = int(0.1 N), d = int(0.2 N)."""
        w, d = int(self.warmup * steps), int(self.decay * steps)
        return {"warmup": w, "stable": steps - w - d, "decay": d}

    # ---- budget -> candidates --------------------------------------------------------------------

    def max_params(self, C: float) -> float:
        """Pmax(C)."""
        growing = self.params_at_most * math.sqrt(C / self.sweep_flops)
        return min(max(self.params_at_most, growing), self.params_ceiling)

    def outside(self, C: float, H: int) -> str | None:
        """Why the sweep leaves this width out at C, in words; None: it does not.

        The two rules count parameters without QK-norms.
        """
        params, T = self.params(H, qk_norm=False), self.target_tokens(C, H)
        if params > self.max_params(C):
            return f"{params:,} parameters exceed {self.max_params(C):.4g}"
        if T / params > self.max_tokens_per_param:
            return f"{T / params:.0f} tokens a parameter exceed {self.max_tokens_per_param:g}"
        B = self.batch(T)
        if not self.min_batch <= B <= self.max_batch:
            return f"batch {B} is not in [{self.min_batch}, {self.max_batch}]"
        return None

    def candidate(self, C: float, H: int, B: int | None = None) -> Candidate:
        """Width H at budget C in whole steps; B: the batch, unless it is the recipe's own."""
        T = self.target_tokens(C, H)
        own = self.batch(T)
        if B is not None and C > self.sweep_flops and own >= self.min_batch:
            T = round(T / (own * self.seq_len)) * own * self.seq_len  # as Marin's held-out runs
        B = own if B is None else B
        steps = round(T / (B * self.seq_len))
        tokens = B * steps * self.seq_len
        return Candidate(
            H, self.layers(H), self.heads(H), B, steps, tokens, self.params(H),
            self.train_flops(H, tokens),
        )  # fmt: skip

    def candidates(self, C: float) -> list[Candidate]:
        """All widths of the sweep at budget C, narrow to wide; DelveError where there is none."""
        _positive("--flops", C)
        step = self.coarse_step if C > self.coarse_from else self.fine_step
        widths = range(self.min_hidden, self.max_hidden, step)
        found = [self.candidate(C, H) for H in widths if self.outside(C, H) is None]
        if not found:
            # above this many tokens the batch of the narrowest width reaches min_batch
            T = self.min_batch // 2 * self.max_steps * self.seq_len
            least = self.train_flops(self.min_hidden, T)
            why = self.outside(C, self.min_hidden)
            raise DelveError(
                f"--flops {C:g}: no width of the recipe fits this budget (width "
                f"{self.min_hidden}: {why}); the smallest with one is about {least:.1e}"
            )
        return found

    def optimal_tokens(self, C: float) -> float:
        """T*(C) of the published law."""
        return self.token_coefficient * C**self.token_exponent

    def select(self, C: float, law: Callable[[float], float] | None = None) -> Candidate:
        """The candidate with the smallest tokens >= T*(C), else the one with the most tokens."""
        target = (law or self.optimal_tokens)(C)
        found = self.candidates(C)
        enough = [c for c in found if c.tokens >= target]
        return min(enough, key=lambda c: c.tokens) if enough else max(found, key=lambda c: c.tokens)

    def config(
        self,
        C: float,
        hidden: int | None = None,
        batch: int | None = None,
        law: Callable[[float], float] | None = None,
    ) -> dict:
        """The whole configuration at budget C: `Candidate`'s fields and every rate.

        hidden: the width, else that of the T* rule; batch: rows, else the recipe's. T of the rates
        is the unrounded one up to sweep_flops and above it the candidate's own, as at Marin.
        """
        _positive("--flops", C)
        H = self.select(C, law).hidden if hidden is None else self._width(hidden)
        own = self.candidate(C, H)
        if batch is None and not self.min_batch <= own.batch_size <= self.max_batch:
            raise DelveError(
                f"--hidden {H}: the recipe's batch at {C:g} FLOPs, {own.batch_size}, is not in "
                f"[{self.min_batch}, {self.max_batch}]; give --batch, or a width of "
                "`delve delphi candidates`"
            )
        if batch is not None and not self.min_batch <= batch <= self.max_batch:
            raise DelveError(
                f"--batch {batch}: must lie in [{self.min_batch}, {self.max_batch}] (rows)"
            )
        run = self.candidate(C, H, batch)
        if run.steps < 1:
            raise DelveError(f"--flops {C:g}: less than one step of width {H} at batch {batch}")
        held_out = C > self.sweep_flops and own.batch_size >= self.min_batch
        T = own.tokens if held_out else self.target_tokens(C, H)
        rates = self.hyperparameters(run.batch_size, T)
        return dataclasses.asdict(run) | {
            "lr": rates["lr"], "adam_lr": rates["adam_lr"],
            "beta1": self.beta1, "beta2": rates["beta2"], "epsilon": rates["epsilon"],
            "max_grad_norm": self.max_grad_norm, "z_loss": self.z_loss,
            "warmup": self.warmup, "decay": self.decay,
        }  # fmt: skip

    def _width(self, H: int) -> int:
        if H < self.head_dim or H % self.head_dim:
            raise DelveError(f"--hidden {H}: must be a positive multiple of {self.head_dim}")
        return H


DELPHI = Recipe()


def read(file: str | Path | None) -> Recipe:
    """Delphi's recipe, with the constants that a JSON file names in the place of the published.

    DelveError: an unknown field, or a value that is no positive number of the field's kind.
    """
    if file is None:
        return DELPHI
    given, known = read_json(file), dataclasses.asdict(DELPHI)
    for name, value in given.items():
        if name not in known:
            raise DelveError(f"{file}: unknown field '{name}'; there are {', '.join(known)}")
        kinds = (int,) if isinstance(known[name], int) else (int, float)
        if type(value) not in kinds or not 0 < value < math.inf:
            raise DelveError(
                f"{file}: field '{name}' must be a positive {kinds[-1].__name__}, not {value!r}"
            )
    return dataclasses.replace(DELPHI, **given)


def _positive(flag: str, value: float) -> None:
    if not 0 < value < math.inf:  # nan fails too
        raise DelveError(f"{flag} {value:g}: must be a positive, finite number of FLOPs")
