"""The launch scripts: what they would run, what they refuse, and runs with stand-ins for the tools.

No gcloud and no Slurm is called: stand-ins that note their arguments stand first on the PATH.
"""

import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from delve_jax import cli
from delve_jax.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "experiments" / "launch"
HEAL = ("delve", "heal", "fused", "healed", "--data", "my tokens", "--tokens", "1000")
TPU = ("--tpu", "vm", "--zone", "z", "--type", "v5litepod-8")
POD = ("--tpu", "vm", "--zone", "z", "--type", "v5litepod-64", "--nfs", "10.0.0.2:/delve")
ON_CPU = ("--worker", "0", "--", "JAX_PLATFORMS=cpu", "experiments/upcycle_7b.py", "--keep", "0.5")


def launch(script, *flags, **how):
    """The finished process of a script."""
    return subprocess.run(
        [LAUNCH / script, *map(str, flags)], capture_output=True, text=True, check=False, **how
    )


def printed(script, *flags) -> list[list[str]]:
    """The commands of a dry run as words; it calls nothing, so the PATH holds git and bash only."""
    done = launch(script, *flags)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    return [shlex.split(line.replace("=$'", "='")) for line in lines if "$'" not in line]


def parses(words: list[str], verb: str):
    """The delve command among `words` as its parser reads it."""
    at = next(i for i, word in enumerate(words) if Path(word).name == "delve")
    args = cli.parser().parse_args(words[at + 1 :])
    assert args.verb == verb
    return args


@pytest.fixture
def stand_ins(tmp_path):
    """make(name, script) puts a program on the PATH of the returned environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    env["CALLS"] = str(tmp_path / "calls")

    def make(name, script):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)

    make.env, make.calls = env, lambda: (tmp_path / "calls").read_text().splitlines()
    return make


def test_scripts_are_bash_and_say_how_to_use_them():
    for script in sorted(LAUNCH.glob("*.sh")):
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
        if script.name != "common.sh":
            said = launch(script.name, "--help").stdout
            assert f"experiments/launch/{script.name}" in said and "Not tried" in said
            assert "set -e" not in said


def test_tpu_dry_run():
    flags = ("--project", "p", "--send", "fused", "--fetch", "healed", "--delete", "--dry-run")
    commands = printed("tpu_vm.sh", *TPU, *flags, "--", *HEAL)
    verbs = [c[4] if c[0] == "gcloud" else c[0] for c in commands]
    # that which installs is printed on a line of its own form (newlines)
    assert verbs == ["describe", "create", "git", "scp", "ssh", "scp", "ssh", "mkdir", "scp",
                     "delete"]  # fmt: skip
    for c in commands:
        if c[0] == "gcloud":
            assert (
                c[1:4] == ["compute", "tpus", "tpu-vm"] and "--zone=z" in c and "--project=p" in c
            )
    assert {"--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite"} <= {*commands[1]}
    assert commands[3][-1] == "vm:" and "--worker=all" in commands[3]
    assert commands[5][-2:] == ["fused", "vm:delve-work/"]
    assert commands[8][-2:] == ["vm:delve-work/healed", "fetched"]
    remote = commands[6][-1].removeprefix("--command=")
    assert "--worker=all" in commands[6] and remote.startswith("cd $HOME/delve-work && ")
    assert parses(shlex.split(remote), "heal").data == ["my tokens"]
    whole = launch("tpu_vm.sh", *TPU, "--dry-run", "--", *HEAL).stdout
    assert "requirements.txt \\'jax[tpu]\\'" in whole and "--no-deps -e ." in whole


def test_tpu_of_several_hosts():
    commands = printed("tpu_vm.sh", *POD, "--spot", "--dry-run", "--", *HEAL)
    assert "--spot" in commands[1]
    assert commands[-1][-1].startswith("--command=cd /mnt/delve && ")
    commands = printed("tpu_vm.sh", *POD, "--dry-run", *ON_CPU)
    assert "--worker=0" in commands[-1]
    assert "-- JAX_PLATFORMS=cpu experiments/upcycle_7b.py --keep 0.5" in commands[-1][-1]
    assert "mount -t nfs 10.0.0.2:/delve" in launch(
        "tpu_vm.sh", *POD, "--dry-run", "--", *HEAL).stdout  # fmt: skip


def test_slurm_dry_run():
    (words,) = printed("slurm.sh", "--nodes", 2, "--gpus", 4, "--dry-run", "--", *HEAL)
    assert words[0] == "sbatch" and {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4",
                                     "--requeue", "--dependency=singleton"} <= {*words}  # fmt: skip
    at = words.index("--in-job")
    assert words[at + 1 : at + 3] == ["env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"]
    assert parses(words, "heal").tokens == 1000 and not any("gpus-per-task" in w for w in words)
    (again,) = printed("slurm.sh", "--nodes", 2, "--gpus", 4, "--dry-run", "--", *HEAL)
    (other,) = printed("slurm.sh", "--nodes", 2, "--gpus", 4, "--dry-run", "--", *HEAL, "--lr", "1")
    assert words == again and words[1] != other[1]  # the singleton is the command
    (words,) = printed("slurm.sh", "--nodes", 2, "--gpus", 4, "--per-gpu", "--dry-run", "--", *HEAL)
    assert "--ntasks-per-node=4" in words and "JAX_LOCAL_DEVICE_IDS" not in " ".join(words)
    tier = ("X=1", "experiments/upcycle_04b.py", "--mesh", "data=4")
    (words,) = printed("slurm.sh", "--nodes", 1, "--gpus", 4, "--dry-run", "--", *tier)
    at = words.index("--in-job")
    assert words[at + 1 : at + 3] == ["env", "X=1"]
    assert words[-4:-2] == [str(ROOT / ".venv/bin/python"), str(ROOT / tier[1])]


BAD = [
    ("tpu_vm.sh", (), "--tpu"),
    ("tpu_vm.sh", (*TPU[:4], "--", *HEAL), "--type"),
    ("tpu_vm.sh", (*TPU[:4], "--type", "h100-8", "--", *HEAL), "--type h100-8"),
    ("tpu_vm.sh", (*TPU, "--spot", "--", *HEAL), "--nfs"),
    ("tpu_vm.sh", (*POD[:6], "--", *HEAL), "--nfs"),
    ("tpu_vm.sh", (*TPU, "--nfs", "x; rm -r y", "--", *HEAL), "--nfs"),
    ("tpu_vm.sh", (*TPU, "--run", "a b", "--", *HEAL), "--run"),
    ("tpu_vm.sh", (*POD, "--", "delve", "upcycle"), "--worker 0"),
    ("tpu_vm.sh", (*POD, "--worker", "0", "--", *HEAL), "JAX_PLATFORMS=cpu"),
    ("tpu_vm.sh", (*TPU, "--worker", "3", "--", *HEAL), "--worker 3"),
    ("tpu_vm.sh", (*TPU, "--", "rm", "-r"), "rm: expected delve"),
    ("tpu_vm.sh", TPU, "after --"),
    ("slurm.sh", ("--nodes", "x", "--gpus", "1", "--", *HEAL), "--nodes"),
    ("slurm.sh", ("--nodes", "2", "--", *HEAL), "--gpus"),
    ("slurm.sh", ("--nodes", "2", "--gpus", "0", "--per-gpu", "--", *HEAL), "--per-gpu"),
    ("slurm.sh", ("--nodes", "2", "--gpus", "8", "--", "delve", "eval", "x"), "one process"),
    ("slurm.sh", ("--nodes", "1", "--gpus", "8", "--venv", "/none", "--", *HEAL), "sbatch|/none"),
    ("slurm.sh", ("--nodes",), "its value"),
    ("box.sh", ("--nonsense",), "--nonsense"),
    ("box.sh", ("--name", "../x", "--", *HEAL), "--name"),
    ("box.sh", ("--runs", "/none", "--stop"), "no such run"),
]


@pytest.mark.parametrize(("script", "flags", "word"), BAD)
def test_bad_flags_are_one_line_and_exit_2(script, flags, word):
    done = launch(script, *flags)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert any(w in done.stderr for w in word.split("|")), done.stderr


GCLOUD = """
shift 3; echo "$1" "${@: -1}" >>"$CALLS"
case $1 in
    describe) [[ $STATE ]] || { echo 'ERROR: NOT_FOUND: no node vm' >&2; exit 1; }
        [[ $STATE != denied ]] || { echo 'ERROR: PERMISSION_DENIED: log in' >&2; exit 1; }
        echo "$STATE" ;;
    ssh) [[ "$*" != *'test -e'* ]] || exit "$INSTALLED" ;;
esac
"""


@pytest.mark.parametrize(
    ("state", "installed", "calls"),
    [
        ("", 1, ["describe", "create", "ssh", "scp", "ssh", "ssh", "ssh", "scp"]),
        ("READY", 0, ["describe", "ssh", "ssh", "ssh", "scp"]),
        (
            "PREEMPTED",
            1,
            ["describe", "delete", "create", "ssh", "scp", "ssh", "ssh", "ssh", "scp"],
        ),
        ("STOPPED", 0, ["describe", "start", "ssh", "ssh", "ssh", "scp"]),
        ("CREATING", 0, ["describe"]),
        ("denied", 0, ["describe"]),
    ],
)
def test_tpu_reuses_what_is_there(stand_ins, tmp_path, state, installed, calls):
    stand_ins("gcloud", GCLOUD)
    env = {**stand_ins.env, "STATE": state, "INSTALLED": str(installed), "TMPDIR": str(tmp_path)}
    flags = (*TPU, "--fetch", "healed", "--to", tmp_path / "got", "--", *HEAL)
    done = launch("tpu_vm.sh", *flags, env=env)
    made = [line.split()[0] for line in stand_ins.calls() if line.split()[0].isalpha()]
    assert [
        m for m in made if m in {"describe", "create", "delete", "start", "ssh", "scp"}
    ] == calls
    if len(calls) == 1:
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        assert ("PERMISSION_DENIED" if state == "denied" else "CREATING") in done.stderr
    else:
        assert done.returncode == 0 and (tmp_path / "got").is_dir()
        assert any("box.sh --name run -- delve heal" in line for line in stand_ins.calls())


def test_box_runs_once_follows_and_stops(tmp_path):
    """For real, with a program that waits in the place of delve: a checkout of two scripts."""
    there = tmp_path / "checkout" / "experiments" / "launch"
    there.mkdir(parents=True)
    for script in ("box.sh", "common.sh"):
        (there / script).write_bytes((LAUNCH / script).read_bytes())
    delve = tmp_path / "checkout" / ".venv" / "bin" / "delve"
    delve.parent.mkdir(parents=True)
    delve.write_text(
        '#!/usr/bin/env bash\necho "got $WHO $*"\n[[ $1 != bad ]] || exit 2\n'
        '[[ $1 != long ]] || { trap "echo saved; exit 0" TERM; while :; do sleep 0.05; done; }\n'
    )
    delve.chmod(0o755)
    flags = ("bash", there / "box.sh", "--runs", tmp_path / "runs")

    def box(*more):
        return subprocess.run([*flags, *more], capture_output=True, text=True, check=False)

    done = box("--", "WHO=me", "delve", "quick", "a b")
    assert done.returncode == 0 and "got me quick a b" in done.stdout
    assert box("--", "delve", "bad").returncode == 2
    assert "not running" in box("--stop").stderr
    with subprocess.Popen([*flags, "--", "delve", "long"], stdout=subprocess.PIPE) as first:
        while b"got" not in first.stdout.readline():
            pass
        second = subprocess.Popen(
            [*flags, "--", "delve", "long"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert b"running already" in second.stderr.readline()
        assert box("--stop").returncode == 0
        assert b"saved" in second.communicate(timeout=120)[0] and second.returncode == 0
        assert first.wait(timeout=120) == 0
    assert (tmp_path / "runs" / "run" / "log").read_text().count("got") == 1


STEPS = 24  # each of which is logged
SRUN = """
# tasks on this machine, with what srun tells them
echo srun "$@" >>"$CALLS"
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=$TASKS
for ((i = 0; i < TASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" >>"task-$i.log" 2>&1 &
    tasks+=($!)
done
echo "${tasks[@]}" >step
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""


def test_slurm_job_is_stopped_queued_again_and_resumed(stand_ins, tmp_path):
    """Two real processes that find each other as JAX finds them under Slurm; then one goes on."""
    stand_ins("srun", SRUN)
    stand_ins("scancel", 'echo scancel "$@" >>"$CALLS"; kill -TERM $(<step)')
    stand_ins("scontrol", 'echo scontrol "$@" >>"$CALLS"')
    (tmp_path / "text.txt").write_text((ROOT / "LICENSE").read_text())
    parent = ROOT / "delve_jax" / "proxies" / "neox"
    command = (
        "--in-job", Path(sys.executable).with_name("delve"), "heal", parent, "healed",
        "--objective", "ce", "--data", "text.txt", "--tokens", STEPS * 32, "--batch", 2,
        "--window", 16, "--save-every", 1000,
    )  # fmt: skip
    env = {**stand_ins.env, "SLURM_JOB_ID": str(free_job()), "SLURM_CPUS_PER_TASK": "1"}
    env["TASKS"] = "2"
    flags = [LAUNCH / "slurm.sh", *map(str, command)]
    log = tmp_path / "healed.partial" / "metrics.jsonl"
    job = subprocess.Popen(flags, env=env, cwd=tmp_path)
    for _ in range(2400):  # until training is prepared, at most two minutes
        if job.poll() is not None or log.exists():
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@180 sends
    said = lambda: "\n".join(p.read_text()[-2000:] for p in tmp_path.glob("task-*.log"))  # noqa: E731
    assert job.wait(timeout=300) == 0, said()
    (state,) = (tmp_path / "healed.partial" / "state").glob("[0-9]*")
    stopped_at, before = int(state.name), read_metrics(log)
    number = env["SLURM_JOB_ID"]
    assert stand_ins.calls()[0].startswith("srun --kill-on-bad-exit=1 --cpus-per-task=1 ")
    assert stand_ins.calls()[1:] == [
        f"scancel --signal=TERM {number}",
        f"scontrol requeue {number}",
    ]
    assert 0 < stopped_at < STEPS
    assert "2 processes" in said() or "connected to 1 peer" in said()

    env |= {"SLURM_JOB_ID": str(free_job()), "TASKS": "1"}
    assert subprocess.run(flags, env=env, cwd=tmp_path, check=False).returncode == 0, said()
    lines = read_metrics(tmp_path / "healed" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert before and lines[: len(before)] == before  # with its times: not trained again
    facts = json.loads((tmp_path / "healed" / "heal.json").read_text())
    assert facts["tokens"] == STEPS * 32 and "requeue" not in stand_ins.calls()[-1]


def free_job() -> int:
    """A job number whose port, which JAX derives from it, is free."""
    for number in itertools.count(os.getpid()):
        with socket.socket() as s:
            try:
                s.bind(("localhost", number % 2**12 + 65535 - 2**12 + 1))
                return number
            except OSError:
                continue
