"""The tiers' scripts and their recorded plans agree with the presets; nothing large is compiled."""

import dataclasses
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delve_jax import fuse, models, presets
from delve_jax.config import NeoxConfig, RwkvConfig
from delve_jax.models import delve

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
SCRIPTS = {"delve-0.4b": "upcycle_04b", "delve-1.4b": "upcycle_14b", "delve-7b": "upcycle_7b"}


@pytest.fixture(scope="module", autouse=True)
def shapes_once():
    """Shapes of a configuration are asked for again and again: traced once, the tests are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "abstract_params", functools.cache(models.abstract_params))
        yield


@pytest.fixture(scope="module")
def scripts():
    """The modules of experiments/ by name."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        yield {n: importlib.import_module(n) for n in ("tiers", *SCRIPTS.values())}
    finally:
        sys.path.remove(str(EXPERIMENTS))


@pytest.fixture(scope="module")
def tiers(scripts):
    return scripts["tiers"]


def test_hub_ids_are_the_presets_parents(tiers):
    """In the order of the streams; a repository's name starts with its preset's."""
    assert set(tiers.TIERS) == set(presets.TIERS)
    for name, tier in tiers.TIERS.items():
        for source, of in zip(tier.parents, presets.TIERS[name].values(), strict=True):
            assert source.split("/")[1].lower().startswith(of)


def test_every_row_is_recorded_and_as_planned_now(tiers):
    """Rows that need no compilation again: parameters, state, hours, dollars; all within 24 GB."""
    rows, jobs = tiers.recorded(), tiers.jobs()
    assert list(rows) == list(jobs)
    for name, tier in tiers.TIERS.items():
        for row, r in rows.items():
            if row.startswith(f"{name} ") and " step " not in row:
                cfg = presets.preset(name)
                assert r["parameters"] == models.count(cfg)
                assert r.get("superblocks", cfg.n_superblocks) == cfg.n_superblocks
        for how in tier.healings:
            now = tiers.healing(name, how, tier.tokens, no_compile=True)
            then = rows[tiers.step_name(name, how)]
            for key in ("parameters", "device_bytes", "tokens", "devices", "dollars_per_hour"):
                assert then[key] == now[key], key
            assert then["hours"] == pytest.approx(now["hours"])
            assert then["dollars"] == pytest.approx(now["dollars"])
            sizes = then["bytes"]
            assert {k: sizes[k] for k in now["bytes"]} == now["bytes"]
            assert sizes["peak"] == sizes["activations"] + sum(now["bytes"].values())
            assert then["fits"] == (sizes["peak"] < then["device_bytes"])
    assert max(r["peak_rss"] for r in rows.values()) < 24e9


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstrings_hold_the_recorded_numbers(name, tiers, scripts):
    text = " ".join(scripts[SCRIPTS[name]].__doc__.split())
    for line in tiers.summary(name, tiers.recorded()):
        assert line in text, line
    tier = tiers.TIERS[name]
    for device in ("h200", "v5e"):  # each is documented with a way that fits
        ways = [tiers.recorded()[tiers.step_name(name, h)] for h in tier.healings
                if h.device == device]  # fmt: skip
        assert any(way["fits"] for way in ways)
        assert f"${tiers.DOLLARS[device]:.2f}" in text
    assert f"{tiers.MFU:.0%} of the" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_documented_commands_are_the_planned_ones(name, tiers, scripts, monkeypatch):
    """Each parses; each healing command is a row of the table, on its mesh, batch and ratio."""
    from delve_jax import cli

    run = []
    monkeypatch.setattr(cli, "main", lambda argv: run.append(argv) or 0)
    text = scripts[SCRIPTS[name]].__doc__.replace("\\\n", " ")
    keep, planned = tiers.KEEP, {(h.mesh, h.batch, h.keep, h.objective): h.device
                                 for h in tiers.TIERS[name].healings}  # fmt: skip
    devices = set()
    for line in filter(lambda x: x.startswith("    ") and " --" in x, text.splitlines()):
        words = [word for word in line.split() if "=" not in word or word.startswith("data=")]
        if words[0] == "python":
            assert words[1] == f"experiments/{SCRIPTS[name]}.py"
            assert scripts[SCRIPTS[name]].main(words[2:]) == 0
            args = cli.parser().parse_args(run[-1])
            keep, tokens, objective = args.keep, args.heal_tokens, "ce+kl"
        else:
            assert words[0] == "delve"
            args = cli.parser().parse_args(words[1:])
            if args.verb != "heal":
                continue
            tokens, objective = args.tokens, getattr(args, "objective", "ce+kl")
            assert args.lr == 1e-4
        if tokens:
            assert tokens == tiers.TIERS[name].tokens
            devices.add(planned[args.mesh or "data=1", args.batch, keep, objective])
    assert devices == {"h200", "v5e"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_says_the_plan(name, tiers, scripts, capsys):
    """Counts of hybrid.md section 2 at keep 1; flags reach the plan; nothing is fetched."""
    main = scripts[SCRIPTS[name]].main
    flags = ["--dry-run", "--no-compile", "--keep", "1.0", "--heal-tokens", "1000000", "--json"]
    assert main([*flags, "--device", "v5e", "--mesh", "data=4,model=2", "--batch", "8"]) == 0
    plan = json.loads(capsys.readouterr().out)
    joints = fuse.joints_count(presets.preset(name, keep=1.0))
    sums = {"delve-0.4b": 1_207_189_504, "delve-1.4b": 5_313_486_848, "delve-7b": 21_194_604_544}
    assert plan["parameters"] - joints == sums[name]
    assert plan["devices"] == 8 and plan["batch"] == 8 and plan["device"] == "v5e"
    assert plan["tokens"] >= 1_000_000 and plan["fits"] is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--dry-run", "--device", "tpu9"], "--device"),
        (["--dry-run", "--no-compile", "--keep", "2"], "--keep 2"),
        (["--dry-run", "--no-compile", "--mesh", "rows=2"], "--mesh rows=2"),
        (["--dry-run", "--no-compile", "--parents", "some/where"], "--parents"),
        ([], "--data"),
    ],
)
def test_refusals_are_one_line_and_exit_2(flags, said, scripts, capsys):
    try:
        code = scripts["upcycle_04b"].main(flags)
    except SystemExit as err:  # argparse
        code = err.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and said in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_script_runs_as_a_program(tiers):
    """Each is the same three lines; one is enough."""
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / "upcycle_7b.py"), "--dry-run", "--no-compile"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(source in done.stdout for source in tiers.TIERS["delve-7b"].parents)
    assert f"{models.count(presets.preset('delve-7b')):,} parameters" in done.stdout


def test_flags_pass_through(tiers, scripts, monkeypatch, tmp_path):
    """What is given comes after the tier's own flags, so it counts."""
    from delve_jax import cli

    seen = []
    monkeypatch.setattr(cli, "main", lambda argv: seen.append(argv) or 0)
    argv = ["--data", "a.txt", "--keep", "0.25", "--heal-tokens", "0", "--out", str(tmp_path)]
    assert scripts["upcycle_14b"].main(argv) == 0
    args = cli.parser().parse_args(seen[0])
    assert args.parents == list(tiers.TIERS["delve-1.4b"].parents)
    assert (args.data, args.keep, args.heal_tokens) == (["a.txt"], 0.25, 0)
    assert args.batch == 16 and args.out == str(tmp_path)


# ---- all parents, in miniature -------------------------------------------------------------------


def small(v: int) -> dict:
    """Unequal widths, and depths of which one leaves a superblock empty, as 6 does of 8."""
    shared = dict(vocab_size=v, vocab_rows=v, context_length=16)
    return {
        "pythia": NeoxConfig(**shared, d_model=8, n_layers=3, n_heads=2, d_ffn=16),
        "rwkv": RwkvConfig(**shared, d_model=16, n_layers=4, d_att=16, d_ffn=32),
    }


def test_streams_of_unequal_depth_and_width_are_their_pool():
    """Step 0 with superblocks that are empty of a stream's layers: a text, and token by token."""
    parents, T = small(48), 3
    cfg = dataclasses.replace(fuse.joint_config(list(parents.items())), n_superblocks=4)
    assert np.diff(delve.boundaries(3, 4)).tolist() == [1, 1, 0, 1]
    params = jax.jit(functools.partial(models.init_params, cfg))(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, T)), jnp.int32)
    run = jax.jit(lambda p, t, s: models.forward(cfg, p, t, s))
    pool = jax.jit(
        lambda p, t: sum(models.forward(sub, p[n], t)[0] for n, sub in parents.items()) / 2
    )
    want = pool(params["streams"], tokens)
    np.testing.assert_allclose(run(params, tokens, None)[0], want, rtol=0, atol=2e-5)
    state, steps = models.init_state(cfg, 2, 8), []
    for t in range(T):
        logits, state = run(params, tokens[:, t : t + 1], state)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), want, rtol=0, atol=2e-5)


def test_fusion_is_planned_program_by_program(tiers, monkeypatch):
    """The rehearsal of `fuse.fuse` meets its programs and the state that it would hold."""
    monkeypatch.setattr(fuse, "jax", fuse.jax)  # put back afterwards
    cfg = fuse.joint_config(list(small(256).items()))
    found = tiers.fusion(cfg, None, None, ())
    sizes = found["bytes"]
    assert set(sizes) == {"parameters", "features", "nll", "newton", "peak"}
    assert sizes["parameters"] == 4 * models.count(cfg)
    assert sizes["newton"] > 4 * 2 * 256 * fuse.ROWS  # the logits of all parents live at once
    assert sizes["peak"] == sizes["parameters"] + max(
        sizes[k] for k in ("features", "nll", "newton")
    )
