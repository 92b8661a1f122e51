"""Every test: JAX on the CPU, matmuls in full float32, compiled programs cached between runs.

Set before jax is imported anywhere. Tests that need several devices start their own process.
"""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

from delve_jax import models  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "delve_jax" / "jax-tests"

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def randomised():
    """(cfg, seed) -> parameters with nothing left at its initial value; logits vary by units."""

    def fill(path, leaf, key):
        *above, name = (k.key for k in path)
        normal, shape = jax.random.normal(key, leaf.shape), leaf.shape
        if name in ("kernel", "v", "u", "a", "b", "w1", "w2") and len(shape) > 1:
            if above[-1] == "embed":
                return normal
            return normal / shape[-2] ** 0.5 * (3 if above[-1] == "head" else 1)
        if name == "time_decay":
            return jax.random.uniform(key, shape, minval=-5.0, maxval=1.0)
        if name.startswith("mix_"):
            return jax.random.uniform(key, shape)
        if name in ("scale", "g", "sigma"):
            return 1 + 0.2 * normal
        if name == "bias":
            return 0.2 * normal - (2 if above[-1] == "dt_proj" else 0)
        return 0.5 * normal

    def make(cfg, seed):
        leaves, tree = jax.tree.flatten_with_path(models.abstract_params(cfg))
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return tree.unflatten(fill(p, leaf, k) for (p, leaf), k in zip(leaves, keys, strict=True))

    return make
