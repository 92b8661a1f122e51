"""Optimiser and schedule of healing and of the proxies' training: AdamW with WSD.

Decay acts on kernels and factors only; gains, biases, decays of recurrences and the pool are free.
"""

import jax
import optax

DECAYED = ("kernel", "u", "v")


def wsd(peak: float, steps: int, warmup: float = 0.05, decay: float = 0.3):
    """Warm-up, stable, linear decay to zero; fractions of `steps` (MiniCPM, arXiv 2404.06395)."""
    n_warm, n_decay = max(1, int(steps * warmup)), max(1, int(steps * decay))
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / n_warm, peak, n_warm),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, n_decay),
        ],
        [n_warm, max(n_warm, steps - n_decay)],
    )


def adamw(schedule, weight_decay: float = 0.1, clip: float = 1.0, b2: float = 0.95):
    """AdamW with global-norm clipping; zero-padded factors get zero updates and stay zero."""

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b1=0.9, b2=b2, weight_decay=weight_decay, mask=decays),
    )
