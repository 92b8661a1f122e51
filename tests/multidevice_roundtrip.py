"""HF -> Orbax saved on 8 virtual devices -> restored on 4 -> HF, bit-exact; own process.

python tests/multidevice_roundtrip.py WORKDIR SRC...      prints one line per source
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from delve_jax import checkpoint, parallel, parents  # noqa: E402
from delve_jax.parents.io import Source, weight_files  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "delve_jax" / "jax-tests"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # dozens of tiny slices


def parts(tree) -> int:
    """The most pieces that any array is really split into."""
    return max(x.size // x.addressable_shards[0].data.size for x in jax.tree.leaves(tree))


def tensors(path: Path) -> dict:
    """Every tensor of a source under its canonical name."""
    source, _, _ = parents.describe(path)
    return {name: np.array(source.read(name)) for name in source.tensors}


def roundtrip(src: Path, work: Path) -> str:
    eight, four = parallel.make_mesh("data=4,model=2"), parallel.make_mesh("data=2,model=2")
    cfg, params, tokenizer = parents.load(src, mesh=eight)
    assert len(jax.devices()) == 8 and parts(params) == 8
    checkpoint.save(work / "ckpt", cfg, params, tokenizer, overwrite=True)
    cfg, params = checkpoint.restore(work / "ckpt", mesh=four)
    assert parts(params) == 4
    parents.export_stock(cfg, params, work / "hf", tokenizer, overwrite=True)
    before, after = tensors(src), tensors(work / "hf")
    stored = Source(work / "hf", weight_files(work / "hf")).tensors
    assert set(before) == set(stored) == set(after), set(before) ^ set(stored)
    for name, x in before.items():
        assert x.dtype == after[name].dtype, (name, x.dtype, after[name].dtype)
        assert x.tobytes() == after[name].tobytes() and x.shape == after[name].shape, name
    return f"ok {src} {len(before)} tensors"


if __name__ == "__main__":
    for one in sys.argv[2:]:
        print(roundtrip(Path(one), Path(sys.argv[1])), flush=True)
