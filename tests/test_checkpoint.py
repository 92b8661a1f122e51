"""Checkpoints and states: bit-exact, atomic under kills and full disks, damage named."""

import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from delve_jax import arrays, checkpoint, models, parallel
from delve_jax.config import DelveError, MambaConfig

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
        from delve_jax import arrays, checkpoint, models
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
    assert same(half, models.cast(params, "bfloat16"))
    of_dtype = {}
    for keys, x in jax.tree_util.tree_flatten_with_path(half)[0]:
        of_dtype.setdefault(x.dtype.name, set()).add(parallel.path_of(keys))
    assert of_dtype["float32"] == {"layers/A_log", "layers/D", "layers/dt_proj/bias"}
    assert "layers/in_proj/v" in of_dtype["bfloat16"] and len(of_dtype) == 2
    # what is stored in 16 bits already is not widened
    checkpoint.save(tmp_path / "h", CFG, jax.tree.map(lambda x: x.astype(jnp.float16), params))
    _, again = checkpoint.restore(tmp_path / "h", dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(again)} == {"bfloat16"}
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


def test_what_a_refused_write_brings_back_goes_too(tmp_path, monkeypatch):
    """Tensors that were under way when another failed write on: each wait here makes one anew."""
    late, waits = tmp_path / "c.partial" / "params.orbax-checkpoint-tmp" / "layers.D", []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) in (1, 3, 8):
            late.mkdir(parents=True)
            (late / ".zarray").write_text("{}")

    monkeypatch.setattr(arrays, "time", types.SimpleNamespace(sleep=sleep))
    sleep(0)
    err = arrays.refused(tmp_path / "c.partial" / "params", OSError("No space left on device"))
    assert len(waits) > 8 and not list((tmp_path / "c.partial").iterdir())
    assert str(err) == f"{tmp_path / 'c'}: cannot be written (no space left on the device)"


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


STATE = {"a": np.arange(30_000, dtype=np.float32), "count": np.zeros((), np.int32)}


def state_at(step: int) -> dict:
    """A state that tells its step."""
    return jax.tree.map(lambda x: jnp.asarray(x + step), STATE)


def abstract_state() -> dict:
    return parallel.abstract(parallel.make_mesh(None), jax.eval_shape(lambda: state_at(0)))


def flip(file: Path) -> None:
    """One bit in the middle of a file."""
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_flipped_bit_is_refused_by_its_file(tmp_path, params):
    """zarr alone would read it without complaint."""
    checkpoint.save(tmp_path / "c", CFG, params)
    file = largest(tmp_path / "c" / "params")
    flip(file)
    name = file.relative_to(tmp_path / "c" / "params").as_posix()
    with pytest.raises(DelveError, match="other bytes") as caught:
        checkpoint.restore(tmp_path / "c")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "c") in str(caught.value) and name in str(caught.value)
    flip(file)
    assert same(checkpoint.restore(tmp_path / "c")[1], params)


def test_lost_checksums_are_damage(tmp_path, params):
    checkpoint.save(tmp_path / "c", CFG, params)
    sums = tmp_path / "c" / "params" / arrays.SUMS
    text = sums.read_text()
    files = {p.relative_to(sums.parent).as_posix() for p in sums.parent.rglob("*") if p.is_file()}
    assert files - set(json.loads(text)) == {arrays.SUMS, "_CHECKPOINT_METADATA"}
    for content in (None, text[:40]):
        sums.unlink()
        if content:
            sums.write_text(content)
        with pytest.raises(DelveError, match=arrays.SUMS) as caught:
            checkpoint.restore(tmp_path / "c")
        assert "\n" not in str(caught.value)
        sums.write_text(text)
    assert same(checkpoint.restore(tmp_path / "c")[1], params)


def test_optimizer_states_come_back_bit_for_bit(tmp_path, params):
    """Named tuples, counters, float32 moments of bfloat16 weights."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {"params": params, "opt": optimizer.init(params)}
    state["half"] = params["embed"]["kernel"].astype(jnp.bfloat16)
    states = checkpoint.Steps(tmp_path / "state")
    assert states.restore(jax.eval_shape(lambda: state)) is None
    state["opt"] = jax.tree.map(lambda x: x + 7, state["opt"])
    states.save(7, state)
    states.wait()
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["00000007"]
    abstract = parallel.abstract(parallel.make_mesh(None), jax.eval_shape(lambda: state))
    step, back = states.restore(abstract)
    assert step == 7 and same(back, state)


def test_what_is_saved_is_what_stood_there_at_the_call(tmp_path):
    """The next steps take the same buffers (donation) while the writer still reads."""
    ahead = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    states = checkpoint.Steps(tmp_path, keep=9)
    state = ahead(state_at(0))
    for step in (1, 4, 7):
        states.save(step, state)
        for _ in range(3):
            state = ahead(state)
    states.wait()
    assert states.numbers() == [1, 4, 7]
    for step in (7, 4, 1):
        found, back = checkpoint.Steps(tmp_path).restore(abstract_state())
        assert found == step and same(back, state_at(step))
        flip(largest(states.path(step)))  # so that the one before it is next
    said = []
    assert states.restore(abstract_state(), said.append) is None and len(said) == 3


@pytest.mark.parametrize(
    ("keep", "every", "left"), [(2, None, [8, 10]), (1, 4, [4, 8, 10]), (3, 5, [6, 8, 10])]
)
def test_retention(tmp_path, keep, every, left):
    states = checkpoint.Steps(tmp_path, keep, every)
    for step in range(2, 11, 2):
        states.save(step, state_at(step))
        # a state goes only once a newer one is sound
        assert len([n for n in states.numbers() if n < step]) >= min(keep, step // 2 - 1)
    states.wait()
    assert states.numbers() == left


def test_states_past_which_a_run_went_back_do_not_push_out_new_ones(tmp_path):
    states = checkpoint.Steps(tmp_path)
    for step in (6, 8):
        states.save(step, state_at(step))
    states.wait()
    for step in (6, 8):
        flip(largest(states.path(step)))
    again = checkpoint.Steps(tmp_path)  # begun anew, and killed before it comes to 6
    assert again.restore(abstract_state()) is None
    again.save(4, state_at(4))
    again.wait()
    step, back = checkpoint.Steps(tmp_path).restore(abstract_state())
    assert step == 4 and same(back, state_at(4))


def test_work_that_cannot_be_restored_is_not_begun_anew(tmp_path):
    """Checksums hold, but the state is that of another optimiser (a package that changed, say)."""
    states = checkpoint.Steps(tmp_path)
    states.save(3, state_at(3))
    states.wait()
    other = abstract_state() | {"more": jax.ShapeDtypeStruct((2,), jnp.float32)}
    other = parallel.abstract(parallel.make_mesh(None), other)
    with pytest.raises(DelveError, match="no state can be restored, though checksums hold"):
        states.restore(other)
    states.save(6, state_at(6))  # one flipped bit there is passed over as ever
    states.wait()
    flip(largest(states.path(6)))
    assert states.restore(abstract_state())[0] == 3


def test_leavings_of_a_kill_are_no_states_and_go(tmp_path):
    """SIGKILL while a state is written: what stands half is not counted, then removed."""
    done = run(
        """
        import numpy as np
        from test_checkpoint import state_at
        states = checkpoint.Steps(sys.argv[1])
        states.save(3, state_at(3))
        states.wait()
        arrays.write_sums = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        states.save(6, state_at(6))
        states.wait()
        """,
        tmp_path / "state",
    )
    assert done.returncode == -9, done.stderr
    names = sorted(p.name for p in (tmp_path / "state").iterdir())
    assert len(names) == 2 and names[1].startswith("00000006.orbax-checkpoint-tmp"), names
    states = checkpoint.Steps(tmp_path / "state")
    assert states.numbers() == [3]
    step, back = states.restore(abstract_state())
    assert step == 3 and same(back, state_at(3))
    states.save(6, state_at(6))
    states.wait()
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["00000003", "00000006"]
    assert same(states.restore(abstract_state())[1], state_at(6))


def test_a_failed_state_costs_only_itself(tmp_path):
    """As a full disk that is cleared later: one line, older states stand, the next save works."""
    done = run(
        """
        from test_checkpoint import abstract_state, state_at
        states = checkpoint.Steps(sys.argv[1])
        states.save(1, state_at(1))
        states.wait()
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))
        try:
            states.save(2, state_at(2))
            states.wait()
        except DelveError as err:
            print("REFUSED", err)
        print(sorted(os.listdir(sys.argv[1])))
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        states.wait()  # said once, not again
        states.save(3, state_at(3))
        states.wait()
        print(states.numbers(), float(states.restore(abstract_state())[1]["a"][0]))
        """,
        tmp_path / "state",
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done.stdout + done.stderr
    assert lines[0].startswith(f"REFUSED {tmp_path / 'state'}: cannot be written")
    assert lines[1:] == ["['00000001']", "[1, 3] 3.0"]
    assert "Traceback" not in done.stderr


# ---- one layer at a time -------------------------------------------------------------------------


def test_a_layer_is_a_chunk_of_a_large_stack(tmp_path, params, monkeypatch):
    """Also on old checkpoints nothing wrong is read: they are refused as sources of layers."""
    checkpoint.save(tmp_path / "old", CFG, params)  # nothing here is larger than 64 MiB
    largest = max(x.nbytes for x in jax.tree.leaves(params["layers"]))
    monkeypatch.setattr(arrays, "CHUNK_BYTES", largest - 4)
    assert checkpoint.layerwise(tmp_path / "old") is None
    checkpoint.save(tmp_path / "new", CFG, params)
    stored = checkpoint.layerwise(tmp_path / "new")
    chunks = {name: a.chunk_layout.read_chunk.shape for name, a in stored.items()}
    assert any(shape[0] == 1 < CFG.n_layers for shape in chunks.values() if len(shape) == 3)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        array = stored[jax.tree_util.keystr(path, simple=True, separator="/")]
        np.testing.assert_array_equal(array[1:2].read().result(), leaf[1:2])
    assert same(checkpoint.restore(tmp_path / "new")[1], params)
