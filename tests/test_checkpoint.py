"""Checkpoints: bit-exact, atomic under kills and full disks, damage named; placement by rules."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from delve_jax import checkpoint, models, parallel
from delve_jax.config import DelveError, MambaConfig, NeoxConfig

# reads that a damaged file cuts short end on a closed event loop
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CFG = MambaConfig(
    vocab_size=37, vocab_rows=40, d_model=16, n_layers=3, d_inner=32, d_state=4, dt_rank=2,
    ranks=(("in_proj", (2, 5, 3)),), hf_config='{"a": "ü"}',
)  # fmt: skip


def random_params(seed: int) -> dict:
    rng, tree = np.random.default_rng(seed), models.abstract_params(CFG)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


@pytest.fixture(scope="module")
def params():
    return random_params(0)


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def run(code: str, *argv) -> subprocess.CompletedProcess:
    """Run a script that has CFG, params and the modules, in a process of its own."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    head = f"""
        import os, resource, signal, sys
        sys.path[:0] = {paths}
        import jax
        from delve_jax import checkpoint, models
        from delve_jax.config import DelveError
        from test_checkpoint import CFG, random_params
        params = random_params(1)
        """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code), *map(str, argv)],
        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_round_trip_is_bit_exact(tmp_path, params, dtype):
    tree = jax.tree.map(lambda x: x.astype(dtype), params)
    tree["layers"]["D"] = params["layers"]["D"]  # dtypes may be mixed
    checkpoint.save(tmp_path / "c", CFG, tree, '{"a": 1}', extra={"moments.json": {"n": 3}})
    cfg, back = checkpoint.restore(tmp_path / "c")
    assert cfg == CFG and same(tree, back)
    assert checkpoint.load_tokenizer(tmp_path / "c") == '{"a": 1}'
    assert json.loads((tmp_path / "c" / "moments.json").read_text()) == {"n": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_restore_casts_and_places(tmp_path, params):
    checkpoint.save(tmp_path / "c", CFG, params)
    _, half = checkpoint.restore(tmp_path / "c", parallel.make_mesh(None), "bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(half)} == {"bfloat16"}
    assert same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert isinstance(half["norm_f"]["scale"].sharding, jax.sharding.NamedSharding)


def test_a_taken_name_is_refused_and_logs_move_along(tmp_path, params):
    checkpoint.save(tmp_path / "c", CFG, params)
    with pytest.raises(DelveError, match="--overwrite"):
        checkpoint.save(tmp_path / "c", CFG, params)
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial" / "metrics.jsonl").write_text("{}\n")
    checkpoint.save(tmp_path / "c", CFG, params, overwrite=True)
    assert (tmp_path / "c" / "metrics.jsonl").read_text() == "{}\n"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_kill_in_the_middle_leaves_the_old_checkpoint(tmp_path, params):
    """SIGKILL after the arrays and before the config: DST is as it was, the next run succeeds."""
    checkpoint.save(tmp_path / "old", CFG, params)
    done = run(
        """
        checkpoint.to_json = lambda cfg: os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.save(sys.argv[1], CFG, params, overwrite=True)
        """,
        tmp_path / "old",
    )
    assert done.returncode == -9
    assert same(checkpoint.restore(tmp_path / "old")[1], params)
    done = run("checkpoint.save(sys.argv[1], CFG, params, overwrite=True)", tmp_path / "old")
    assert done.returncode == 0, done.stderr
    assert not same(checkpoint.restore(tmp_path / "old")[1], params)  # the other seed
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_kill_between_the_two_renames_is_mended(tmp_path, params):
    checkpoint.save(tmp_path / "c", CFG, params)
    (tmp_path / "c").rename(tmp_path / ".c.replaced")
    assert same(checkpoint.restore(tmp_path / "c")[1], params)


def test_refused_writes_leave_nothing(tmp_path):
    """The kernel refuses the bytes (file size limit, as a full disk would): one line, no DST."""
    done = run(
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            checkpoint.save(sys.argv[1], CFG, params)
        except DelveError as err:
            print("REFUSED", err)
        """,
        tmp_path / "c",
    )
    assert done.stdout.startswith(f"REFUSED {tmp_path / 'c'}"), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "c").exists() and not list(tmp_path.glob("c.partial/params*"))


@pytest.mark.parametrize("how", ["truncate", "delete"])
def test_damage_is_named(tmp_path, params, how):
    checkpoint.save(tmp_path / "c", CFG, params)
    files = [p for p in (tmp_path / "c" / "params").rglob("*") if p.is_file()]
    chunks = [p for p in files if p.parent.name.startswith(("layers.", "embed.", "norm_f."))]
    for file in (max(chunks, key=lambda p: p.stat().st_size), *(
        p for p in files if p.name in ("_METADATA", ".zarray")
    )):  # fmt: skip
        data = file.read_bytes()
        file.unlink() if how == "delete" else file.write_bytes(data[: len(data) // 2])
        with pytest.raises(DelveError, match="damaged checkpoint") as caught:
            checkpoint.restore(tmp_path / "c")
        assert "\n" not in str(caught.value)
        file.write_bytes(data)
    assert same(checkpoint.restore(tmp_path / "c")[1], params)


def test_config_and_arrays_must_agree(tmp_path, params):
    checkpoint.save(tmp_path / "c", CFG, params)
    file = tmp_path / "c" / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "d_inner": 48}))
    with pytest.raises(DelveError, match="layers/"):
        checkpoint.restore(tmp_path / "c")
    file.write_text(file.read_text()[:50])
    with pytest.raises(DelveError, match="config.json"):
        checkpoint.restore(tmp_path / "c")
    with pytest.raises(DelveError, match="no such"):
        checkpoint.restore(tmp_path / "nothing")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(DelveError, match="params"):
        checkpoint.restore(tmp_path / "bare")


def test_training_state_steps(tmp_path, params):
    """Optimiser state (named tuples, counters) comes back bit for bit; old steps go."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {"params": params, "opt": optimizer.init(params)}
    assert checkpoint.latest_step(tmp_path / "state") is None
    for step in (3, 20, 100):
        state["opt"] = jax.tree.map(lambda x, step=step: x + step, state["opt"])
        checkpoint.save_step(tmp_path / "state", step, state)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["00000020", "00000100"]
    (tmp_path / "state" / "00000200.partial").mkdir()  # a kill while step 200 was written
    assert checkpoint.latest_step(tmp_path / "state") == 100
    abstract = parallel.abstract(parallel.make_mesh(None), jax.eval_shape(lambda: state))
    assert same(checkpoint.restore_step(tmp_path / "state", 100, abstract), state)
    with pytest.raises(DelveError, match="damaged|no such"):
        checkpoint.restore_step(tmp_path / "state", 7, abstract)


def mesh_42():
    """Four by two, without devices: the rules need the sizes alone."""
    return jax.sharding.AbstractMesh((4, 2), parallel.AXES)


@pytest.mark.parametrize(
    ("path", "shape", "want"),
    [
        ("layers/in_proj/kernel", (3, 16, 64), P(None, "data", "model")),
        ("layers/in_proj/v", (3, 16, 8), P(None, "data", None)),
        ("layers/in_proj/u", (3, 8, 64), P(None, "data", "model")),
        ("layers/out_proj/kernel", (3, 32, 16), P(None, "model", "data")),
        ("streams/rwkv/layers/ffn/value/u", (3, 8, 16), P(None, None, "data")),
        ("streams/rwkv/layers/ffn/key/kernel", (3, 16, 64), P(None, "data", "model")),
        ("opt/1/0/mu/layers/att/qkv/kernel", (3, 16, 48), P(None, "data", "model")),
        ("embed/kernel", (40, 16), P("model", "data")),
        ("head/kernel", (16, 37), P("data", None)),  # 37 rows do not divide
        ("layers/norm/scale", (3, 16), P()),
        ("layers/D", (3, 32), P(None, "model")),
        ("opt/1/0/count", (), P()),
        ("hub/mamba/a", (2, 16, 8), P(None, "data", None)),
    ],
)
def test_placement_rules(path, shape, want):
    assert parallel.spec_for(path, shape, mesh_42()) == want


def test_every_large_array_is_sharded():
    """No map of any family falls through the rules: pieces are 1/8 of a model of useful size."""
    sizes = dict(vocab_size=512, vocab_rows=512, d_model=64, n_layers=2)
    for cfg in (
        MambaConfig(**sizes, d_inner=128, d_state=16, dt_rank=4),
        NeoxConfig(**sizes, n_heads=4, d_ffn=256, ranks=(("mlp/up", (8, 16)), ("embed", (32,)))),
    ):
        tree = jax.tree_util.tree_flatten_with_path(models.abstract_params(cfg))[0]
        for keys, leaf in tree:
            spec = parallel.spec_for(parallel.path_of(keys), leaf.shape, mesh_42())
            if leaf.size > 4096:
                assert any(spec), parallel.path_of(keys)


def test_mesh_specs():
    mesh = parallel.make_mesh("data=1,model=1")
    assert dict(mesh.shape) == {"data": 1, "model": 1}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    for bad in ("data=0", "rows=2", "data", "data=4096", "data=-1"):
        with pytest.raises(DelveError, match="--mesh"):
            parallel.make_mesh(bad)
