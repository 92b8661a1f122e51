"""Every test: JAX on the CPU, matmuls in full float32, compiled programs cached between runs.

Set before jax is imported anywhere. Tests that need several devices start their own process.
The models are tiny, so compiling and tracing take most of the time. LLVM's optimisation is off (a
third of the time), and so are XLA's emitters of fused loops, each of which loads all of MLIR anew
(test_delve: 161 CPU seconds with, 68 without). The quickstart, a part of CI, runs with them. A
program is one LLVM module, and each worker has cores of its own: two on the same two cores made
their pools of threads wait for each other (test_delve and test_models: 0.79 and 0.92 of the CPU
time with both). A third of what is left is tracing and lowering in Python: programs do without the
places they come from, and the collector of garbage looks less often (three of the files, one run
each: 162 s to 127 s).
Compiled programs are dropped before a process holds more memory maps than Linux lets it have.
"""

import gc
import os
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "delve_jax" / "jax-tests"

os.environ["JAX_PLATFORMS"] = "cpu"  # the environment, so that tests' own processes inherit it
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for flag in (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
):
    if flag.partition("=")[0] not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker[2:]) % len(cores) :: workers])  # before pools are made

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from delve_jax import models  # noqa: E402

gc.set_threshold(50_000, 20, 10)


# minutes each: begun last, one of them would run alone beside an idle core
LONGEST = ("hybrid_verbs", "cli", "compress", "export", "faults", "train", "notebooks", "proxies",
           "doc_commands", "sweep", "joint")  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first (xdist's own order, the files of most tests first, is off)."""
    rank = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Every compiled program keeps several; past vm.max_map_count (65,530) XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def randomised():
    """(cfg, seed) -> parameters with nothing left at its initial value; logits vary by units."""

    def fill(path, shape, r):
        *above, name = (k.key for k in path)
        normal = r.normal(size=shape)
        if name in ("kernel", "v", "u", "a", "b", "w1", "w2") and len(shape) > 1:
            if above[-1] == "embed":
                return normal
            return normal / shape[-2] ** 0.5 * (3 if above[-1] == "head" else 1)
        if name == "time_decay":
            return r.uniform(-5, 1, size=shape)
        if name.startswith("mix_"):
            return r.uniform(size=shape)
        if name in ("scale", "g", "sigma"):
            return 1 + 0.2 * normal
        if name == "bias":
            return 0.2 * normal - (2 if above[-1] == "dt_proj" else 0)
        return 0.5 * normal

    def make(cfg, seed):
        r = np.random.default_rng(seed)  # not jax.random: that compiles once for every shape
        return jax.tree.map_with_path(
            lambda path, leaf: jnp.asarray(fill(path, leaf.shape, r), jnp.float32),
            models.abstract_params(cfg),
        )

    return make
