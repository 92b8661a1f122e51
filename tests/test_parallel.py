"""Meshes, placement rules, rows of processes: errors by flag, nothing large is ever whole.

What needs several devices runs in a process of its own: `python tests/test_parallel.py`, 8 virtual
devices, prints one JSON line; with HOST:PORT,2,INDEX it is one of two processes of two devices.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # before jax is imported
    os.environ["JAX_PLATFORMS"] = "cpu"
    count = 2 if sys.argv[1:] else 8
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    )
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from delve_jax import lm, look, models, parallel, upcycle
from delve_jax.config import (
    DelveConfig,
    DelveError,
    MambaConfig,
    NeoxConfig,
    Qwen3Config,
    RwkvConfig,
)
from delve_jax.metrics import read_metrics
from delve_jax.models import attention
from delve_jax.train import loop
from delve_jax.train.loop import init_state
from delve_jax.train.run import Settings, pretrain

# ---- meshes --------------------------------------------------------------------------------------


def test_a_mesh_has_every_axis():
    assert parallel.parse_mesh("data=8, model=2") == {"replica": 1, "data": 8, "model": 2}
    assert parallel.parse_mesh("replica=3") == {"replica": 3, "data": 1, "model": 1}
    for spec in (None, "data=1,model=1"):
        mesh = parallel.make_mesh(spec)
        assert dict(mesh.shape) == {"replica": 1, "data": 1, "model": 1}
        assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
        assert parallel.row_groups(mesh) == 1 and parallel.residual_sharding(mesh) is None


@pytest.mark.parametrize(
    "bad", ["data=0", "rows=2", "data", "data=-1", "data=x", "data=2;model=2", "data=1,", "=2"]
)
def test_a_mesh_that_cannot_be_read(bad):
    with pytest.raises(DelveError, match="--mesh") as caught:
        parallel.make_mesh(bad)
    assert bad in str(caught.value) and "\n" not in str(caught.value)


def test_more_devices_than_there_are():
    with pytest.raises(DelveError, match="--mesh data=64,model=64: 4096 devices asked for, 1 are"):
        parallel.make_mesh("data=64,model=64")


@pytest.mark.parametrize(
    "bad", ["bad", "host:1", "host:1,2", "host,2,0", "host:1,2,x", "host:1,2,2", "host:1,2,-1"]
)
def test_processes_that_cannot_be_read(bad):
    with pytest.raises(DelveError, match="--distributed") as caught:
        parallel.start(bad)
    assert bad in str(caught.value) and "\n" not in str(caught.value)
    assert not jax.distributed.is_initialized() and parallel.start("off") == 1


def test_on_main_is_a_call_in_one_process():
    assert parallel.on_main(lambda a, b=0: {"sum": a + b}, 1, b=2) == {"sum": 3}

    def refuses():
        raise DelveError("no")

    with pytest.raises(DelveError, match="^no$"):
        parallel.on_main(refuses)
    with pytest.raises(ZeroDivisionError):  # not dressed up as bad input
        parallel.on_main(lambda: 1 / 0)
    assert parallel.is_main()


# ---- placement -----------------------------------------------------------------------------------


def abstract_mesh(replica=1, data=4, model=2):
    """Sizes without devices: the rules need no more."""
    return jax.sharding.AbstractMesh((replica, data, model), parallel.AXES)


@pytest.mark.parametrize(
    ("path", "shape", "want"),
    [
        ("layers/in_proj/kernel", (3, 16, 64), P(None, "data", "model")),
        ("layers/in_proj/v", (3, 16, 8), P(None, "data", None)),
        ("layers/in_proj/u", (3, 8, 64), P(None, "data", "model")),
        ("layers/out_proj/kernel", (3, 32, 16), P(None, "model", "data")),
        ("layers/x_proj/v", (3, 32, 8), P(None, "model", "data")),
        ("layers/dt_proj/bias", (3, 32), P(None, "model")),
        ("layers/conv/kernel", (3, 4, 32), P(None, None, "model")),
        ("layers/A_log", (3, 32, 16), P(None, "model", None)),
        ("layers/D", (3, 32), P(None, "model")),
        ("streams/rwkv/layers/ffn/value/u", (3, 8, 16), P(None, None, "data")),
        ("streams/rwkv/layers/ffn/key/kernel", (3, 16, 64), P(None, "data", "model")),
        ("streams/rwkv/layers/att/time_decay", (3, 16), P(None, "model")),
        ("opt/1/0/mu/layers/att/qkv/kernel", (3, 16, 48), P(None, "data", "model")),
        ("opt/0/mu/layers/att/q/kernel", (3, 16, 48), P(None, "data", "model")),  # qwen3
        ("layers/att/v/kernel", (3, 16, 16), P(None, "data", "model")),
        ("layers/att/v/v", (3, 16, 8), P(None, "data", None)),
        ("layers/att/o/kernel", (3, 32, 16), P(None, "model", "data")),
        ("layers/att/o/v", (3, 32, 8), P(None, "model", "data")),
        ("layers/mlp/gate/kernel", (3, 16, 64), P(None, "data", "model")),
        ("layers/mlp/down/u", (3, 8, 16), P(None, None, "data")),
        ("layers/att/q_norm/scale", (3, 128), P()),
        ("embed/kernel", (40, 16), P("model", "data")),
        ("embed/v", (40, 8), P("model", "data")),
        ("embed/u", (8, 16), P("data", "model")),
        ("head/kernel", (16, 37), P("data", None)),  # 37 rows do not divide
        ("head/v", (16, 8), P("data", None)),
        ("layers/norm/scale", (3, 16), P()),
        ("opt/1/0/count", (), P()),
        ("hub/mamba/a", (2, 16, 8), P(None, "data", None)),
        ("hub/mamba/b", (2, 8, 16), P(None, None, "data")),
        ("gate/p/mamba", (16, 32), P()),
    ],
)
def test_placement_rules(path, shape, want):
    assert parallel.spec_for(path, shape, abstract_mesh()) == want
    # copies: weights are never split over "replica"
    assert parallel.spec_for(path, shape, abstract_mesh(replica=4)) == want
    # an axis of one device is not named, so that one device has plain arrays
    assert not any(parallel.spec_for(path, shape, abstract_mesh(1, 1, 1)))


def families(d: int, vocab: int, **more) -> dict:
    """A model of every family, factored maps among them, and their DELVE."""
    shared = dict(vocab_size=vocab, vocab_rows=vocab, d_model=d, n_layers=2, **more)
    out = {
        "mamba": MambaConfig(**shared, d_inner=2 * d, dt_rank=max(2, d // 16)),
        "rwkv": RwkvConfig(**shared, d_att=d, d_ffn=4 * d, ranks=(("ffn/value", (16, 8)),)),
        "neox": NeoxConfig(
            **shared, n_heads=4, d_ffn=4 * d, ranks=(("mlp/up", (8, 16)), ("embed", (16,)))
        ),
        "qwen3": Qwen3Config(**shared, n_heads=4, n_kv_heads=2, head_dim=d // 4, d_ffn=4 * d),
    }
    parents = tuple((n, out[n]) for n in ("mamba", "rwkv", "neox"))
    return out | {"delve": DelveConfig(parents, 2, connectors="hub", hub_rank=8)}


FAMILIES = families(128, 512)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", ["adamw", "adamh"])
def test_every_large_array_is_sharded(family, optimizer):
    """Weights and both optimisers' moments: no map of any family falls through the rules."""
    mesh = abstract_mesh()
    opt = Settings(tokens=1, optimizer=optimizer).make_optimizer(10)
    shapes = models.abstract_params(FAMILIES[family])
    state = jax.eval_shape(lambda p: init_state(p, opt), shapes)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    pieces = {}
    for keys, leaf in leaves:
        path = parallel.path_of(keys)
        sharding = jax.sharding.NamedSharding(mesh, parallel.spec_for(path, leaf.shape, mesh))
        pieces[path] = leaf.size / np.prod(sharding.shard_shape(leaf.shape), dtype=int)
        if leaf.size > 8192:
            assert pieces[path] > 1, path
    # one device's part of all: an eighth, but for factors (a quarter) and small vectors
    total = sum(leaf.size for _, leaf in leaves)
    mine = sum(leaf.size / pieces[parallel.path_of(keys)] for keys, leaf in leaves)
    assert 1 / 8 <= mine / total < 0.2
    # a moment lies where its parameter lies
    moments = [p for p in pieces if "/mu/" in p]
    assert moments
    for path in moments:
        assert pieces[path] == pieces["params/" + path.split("/mu/")[1]], path


# ---- with devices --------------------------------------------------------------------------------

MESHES = {  # mesh -> (shard, shards) of the two processes that would own four devices each
    "data=8": [[0, 2], [1, 2]],
    "data=4,model=2": [[0, 2], [1, 2]],
    "replica=2,data=4": [[0, 2], [1, 2]],
    "replica=2,data=2,model=2": [[0, 2], [1, 2]],
    "data=2,model=4": [[0, 2], [1, 2]],
    "model=8": [[0, 1], [0, 1]],  # both read all rows
    "replica=8": [[0, 2], [1, 2]],
}
TINY = NeoxConfig(
    vocab_size=64, vocab_rows=64, d_model=16, n_layers=2, n_heads=4, d_ffn=32, context_length=16
)
# epsilon keeps AdamW's first steps from turning gradients of round-off size into full ones
SETTINGS = Settings(tokens=4 * 8 * 16, batch=8, window=16, shard_sequence=True, lr=1e-2, eps=1e-6)


@pytest.fixture(scope="module")
def eight():
    """What 8 virtual devices say: the JSON line of this file run as a script."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("spec", MESHES)
def test_rows_of_a_process(eight, spec):
    found = eight["meshes"][spec]
    assert found["alone"] == [0, 1]
    assert found["halves"] == MESHES[spec]
    assert found["rows_arrive"]
    groups = parallel.row_groups(abstract_mesh(*parallel.parse_mesh(spec).values()))
    assert found["rows_per_device"] == 16 // groups


def test_rows_to_and_fro_between_processes_are_theirs(eight):
    """Not one block each; but where they share some rows and not others nobody can be fed."""
    assert eight["to and fro"] == [[0, 2], [1, 2]]
    assert "--mesh" in eight["torn"] and "model=" in eight["torn"]


def test_rows_of_two_processes_arrive_where_they_are_read():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{s.getsockname()[1]},2"
    both = [subprocess.Popen([sys.executable, __file__, f"{where},{i}"], text=True,
                             stdout=subprocess.PIPE) for i in (0, 1)]  # fmt: skip
    try:
        found = [json.loads(one.communicate(timeout=300)[0].splitlines()[-1]) for one in both]
    finally:
        for one in both:
            one.kill()
    assert [f["feed"] for f in found] == [[0, 2], [1, 2]]
    assert [f["places"] for f in found] == [[0, 4], [2, 6]]  # to and fro
    assert [f["rows"] for f in found] == [[0, 2, 4, 6], [1, 3, 5, 7]]  # shard::shards


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a TPU slice, as far as meshes look at one."""

    id: int
    process_index: int
    coords: tuple
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    slice_index: int = 0


@pytest.mark.parametrize("kind, shape, spec, shards", [
    ("TPU v5 lite", (4, 4, 1), "data=16", 4), ("TPU v6 lite", (4, 4, 1), "data=16", 4),
    ("TPU v6 lite", (4, 4, 1), "data=8,model=2", 4), ("TPU v4", (2, 2, 4), "data=16", 4),
    ("TPU v4", (4, 4, 4), "data=32,model=2", 16), ("TPU v5 lite", (4, 8, 1), "data=8,model=4", 4),
])  # fmt: skip
def test_hosts_of_a_tpu_slice_are_fed(kind, shape, spec, shards, monkeypatch):
    """Rings of chips go to and fro between hosts of 2 x 2, and axes are parts of the torus."""
    hosts, chips = {}, []
    for c in np.ndindex(*shape):
        host = hosts.setdefault((c[0] // 2, c[1] // 2, c[2]), len(hosts))
        chips.append(Chip(len(chips), host, c, kind))
    chips.sort(key=lambda chip: chip.process_index)
    monkeypatch.setattr(jax, "devices", lambda: chips)
    mesh = parallel.make_mesh(spec)
    fed = []
    for i in range(len(hosts)):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        fed.append(parallel.feed(mesh, 64))
    each = len(hosts) // shards
    assert sorted(fed) == [(s, shards) for s in range(shards) for _ in range(each)]
    rows = {}
    for chip, (part,) in parallel.batch_sharding(mesh).devices_indices_map((64,)).items():
        rows.setdefault(fed[chip.process_index], set()).add(part.start)
    assert sum(map(len, rows.values())) == parallel.row_groups(mesh)


def test_half_a_cluster_in_the_environment_is_named(monkeypatch):
    """One of N hosts that trains alone would write what the others write."""

    def alone(**_):  # as JAX says it
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", alone)
    assert parallel.start(None) == 1
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.2:9876")
    with pytest.raises(DelveError, match="--distributed 10.0.0.2:9876,PROCESSES,INDEX"):
        parallel.start(None)


def test_rows_of_attention_stay_where_they_are(eight):
    """A long text on several CPU devices: no device computes the heads of another's rows."""
    assert eight["attention"] == 0


def test_a_state_is_never_whole_on_a_device(eight):
    """From random weights and from given ones: the first arrays that exist are split already."""
    for name in ("made", "given", "trained"):
        whole = {p: n for p, (n, pieces) in eight["placed"][name].items() if pieces == 1}
        assert max(whole.values()) <= 64, (name, whole)
        assert eight["placed"][name]["embed/kernel"] == [1024, 8]
        assert eight["placed"][name]["layers/mlp/up/kernel"] == [2 * 16 * 32, 8]
    assert eight["moments_share"] < 0.2


def test_a_split_sequence_gives_the_same_loss(eight):
    single, sequence = eight["losses"]["one"], eight["losses"]["sequence"]
    assert "'model'" in eight["residual"] and len(single) == 4 and single[3] < single[0]
    np.testing.assert_allclose(sequence, single, rtol=2e-6)


def test_a_model_is_scored_and_continued_on_a_mesh(eight):
    """`delve eval` and `generate --mesh`: what one device cannot hold lies on four."""
    (nll, tokens), (nll_4, tokens_4) = eight["read on one"], eight["read on four"]
    assert eight["pieces"] == 4 and len(tokens) == 8
    assert nll_4 == pytest.approx(nll, rel=1e-5) and tokens_4 == tokens


def test_a_mesh_of_some_devices(eight):
    assert eight["four"] == 4
    assert "16 devices asked for, 8 are there" in eight["sixteen"]


def _placed(tree) -> dict:
    """path -> (elements, pieces that devices really hold)."""
    return {
        parallel.path_of(k): (x.size, x.size // x.addressable_shards[0].data.size)
        for k, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _halves(mesh, batch: int) -> list:
    """`feed` of each of two processes that would own half of the mesh's devices."""
    whole, alone = parallel.batch_sharding, jax.process_index

    class Apart:
        def devices_indices_map(self, shape):
            where = whole(mesh).devices_indices_map(shape)
            return {Chip(d.id, d.id // 4, (), ""): rows for d, rows in where.items()}

    parallel.batch_sharding = lambda mesh: Apart()
    try:
        out = []
        for index in range(2):
            jax.process_index = lambda i=index: i
            out.append(parallel.feed(mesh, batch))
        return out
    finally:
        parallel.batch_sharding, jax.process_index = whole, alone


def _refusal(function, *args) -> str:
    try:
        function(*args)
    except DelveError as err:
        return str(err)
    return ""


def _eight_devices() -> dict:
    import contextlib
    import functools
    import tempfile

    import grain

    out = {"meshes": {}, "placed": {}, "losses": {}}
    rows = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    for spec in MESHES:
        mesh = parallel.make_mesh(spec)
        there = parallel.global_batch(mesh, rows)
        out["meshes"][spec] = {
            "alone": parallel.feed(mesh, 16),
            "halves": _halves(mesh, 16),
            "rows_arrive": bool((np.asarray(there) == rows).all()),
            "rows_per_device": there.addressable_shards[0].data.shape[0],
        }
    order = lambda shape, *at: jax.sharding.Mesh(  # noqa: E731
        np.array(jax.devices())[list(at)].reshape(shape), parallel.AXES
    )
    out["to and fro"] = _halves(order((1, 8, 1), 0, 4, 1, 5, 2, 6, 3, 7), 16)
    out["torn"] = _refusal(_halves, order((1, 4, 2), 0, 1, 2, 4, 3, 5, 6, 7), 16)
    out["four"] = parallel.make_mesh("data=2,model=2").size
    out["sixteen"] = _refusal(parallel.make_mesh, "data=16")

    mesh = parallel.make_mesh("data=4,model=2")
    rows = np.cumsum(np.random.default_rng(0).integers(0, 3, (4, 8, 17)), axis=2) % 64
    text = grain.MapDataset.source(list(rows.astype(np.int32)))
    work, make_step = Path(tempfile.mkdtemp()), loop.make_step

    class Seen(Exception):
        pass

    def looked_at(loss, optimizer, mesh, state, *more, name):
        """The state as the loop hands it to its step."""
        out["placed"][name] = _placed(state["params"])
        if name == "given":
            raise Seen
        moments = _placed(state["opt"]).values()
        out["moments_share"] = sum(n / p for n, p in moments) / sum(n for n, _ in moments)
        return make_step(loss, optimizer, mesh, state, *more)

    loop.make_step = functools.partial(looked_at, name="given")
    given = models.init_params(TINY, jax.random.key(0))
    with contextlib.suppress(Seen):
        loop.fit(given, None, text, SETTINGS.make_optimizer(4), steps=1, workdir=work, mesh=mesh)
    for name, on in (("sequence", mesh), ("one", parallel.make_mesh("data=1"))):
        loop.make_step = functools.partial(looked_at, name="made") if on is mesh else make_step
        trained, _ = pretrain(TINY, lambda *_: text, SETTINGS, mesh=on, workdir=work / name)
        out["losses"][name] = [m["loss"] for m in read_metrics(work / name / "metrics.jsonl")]
        if on is mesh:
            out["placed"]["trained"] = _placed(trained)
    out["residual"] = str(SETTINGS.how(TINY, mesh).residual.spec)

    (work / "text.txt").write_text("def area(radius):\n    return 3.14159 * radius ** 2\n" * 4)
    source = next(p for p in upcycle.embedded_parents() if p.endswith("neox"))
    out["pieces"] = max(n for _, n in _placed(lm.load(source, mesh="model=4").params).values())
    for name, on in (("one", None), ("four", "model=4")):
        found = look.evaluate(source, [work / "text.txt"], mesh=on)
        said = look.generate(source, "def area(", max_new_tokens=8, mesh=on)
        out[f"read on {name}"] = found["nll_per_token"], said["tokens"]

    heads = np.ones((8, attention.LOOPED, 2, 8), np.float32)
    keys, mask = heads.swapaxes(1, 2), np.tri(attention.LOOPED, dtype=bool)[None, None]
    attend = lambda *qkv: attention.weighted(*qkv, mask, causal=True).sum()  # noqa: E731
    rows = jax.device_put(
        (heads, keys, keys), parallel.batch_sharding(parallel.make_mesh("data=8"))
    )
    program = jax.jit(jax.grad(attend, argnums=(0, 1, 2))).lower(*rows).compile()
    out["attention"] = program.as_text().count("all-gather")
    return out


def _one_of_two(where: str) -> dict:
    """What a process reads, and the rows that its devices hold then."""
    parallel.start(where)
    mesh = jax.sharding.Mesh(np.array(jax.devices())[[0, 2, 1, 3]].reshape(1, 4, 1), parallel.AXES)
    shard, shards = parallel.feed(mesh, 8)
    batch = parallel.global_batch(mesh, np.arange(8, dtype=np.int32)[shard::shards, None])
    mine = batch.addressable_shards
    return {
        "feed": (shard, shards),
        "places": sorted(s.index[0].start or 0 for s in mine),
        "rows": sorted(int(row) for s in mine for row in np.asarray(s.data).ravel()),
    }


if __name__ == "__main__":
    print(json.dumps(_one_of_two(sys.argv[1]) if sys.argv[1:] else _eight_devices()))
