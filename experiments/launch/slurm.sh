#!/usr/bin/env bash
# Slurm: the same delve command in one process a node (or a GPU), resumed until it is done.
#
#   experiments/launch/slurm.sh --nodes 2 --gpus 8 [--per-gpu] [--time 24:00:00] [--name JOB]
#       [--venv DIR] [--dry-run] -- delve heal out/fused out/healed --data out/tokens \
#       --tokens 1000000000 --mesh data=16 --batch 32
#
# --gpus: of each node; --mesh must name all devices of all nodes. Partition, account and the like
# are Slurm's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT, ...). --venv: where delve is
# installed, on the file system that all nodes share (default: this checkout's .venv):
#   python3.12 -m venv .venv && .venv/bin/pip install -r requirements.txt 'jax[cuda13]'
#   .venv/bin/pip install --no-deps -e .
#
# The script submits itself; in the job it starts srun, and JAX finds the processes by itself from
# SLURM_JOB_ID, _STEP_NODELIST, _NTASKS, _PROCID and _LOCALID. Every task must see all GPUs of its
# node, so there is no --gpus-per-task: JAX gives a process those that JAX_LOCAL_DEVICE_IDS names
# (set here, one process a node) or the one of its SLURM_LOCALID (--per-gpu). Three minutes before
# the time limit delve is told to save its step, and the job is queued again; the command goes on
# from there. Submitted twice, the second job waits for the first (--dependency=singleton).
# Several processes: `delve heal` and `delve train`. All else runs in one: --nodes 1, not --per-gpu.
# The log is JOB.log in this folder.
#
# Tried: the part that runs in the job, for real with two processes and stand-ins for srun, scancel
# and scontrol, and what is submitted (tests/test_launch.py). Not tried: a cluster, a GPU.
set -euo pipefail

if [[ ${1-} == --in-job ]]; then # what sbatch starts on the first node, from a copy of this file
    shift
    stopping=''
    on_time() { stopping=1 && scancel --signal=TERM "$SLURM_JOB_ID"; } # its steps, not this shell
    trap on_time USR1
    srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$@" &
    step=$!
    wait "$step" || true # ends early when the signal comes
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
    code=0
    wait "$step" || code=$?
    # 143: ended by the signal; verbs that do not train go on from what they had written
    if [[ $stopping ]] && ((code == 0 || code == 143)); then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$code"
fi

# shellcheck source=experiments/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
nodes='' gpus='' time=24:00:00 name='' venv=$root/.venv per_gpu='' dry=''
while (($#)); do
    case $1 in
        --nodes | --gpus | --time | --name | --venv)
            (($# > 1)) || fail "$1: its value is missing"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --per-gpu) per_gpu=1 && shift ;;
        --dry-run) dry=1 && shift ;;
        --help) usage "${BASH_SOURCE[0]}" && exit ;;
        --) shift && break ;;
        *) fail "$1: unknown; flags, then -- and the command (see --help)" ;;
    esac
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes '$nodes': name a number of nodes"
[[ $gpus =~ ^(0|[1-9][0-9]*)$ ]] || fail "--gpus '$gpus': name the number of GPUs of a node, or 0"
if [[ $per_gpu ]] && ((gpus == 0)); then fail "--per-gpu: needs --gpus above 0"; fi
tasks=1
if [[ $per_gpu ]]; then tasks=$gpus; fi

take_command "$@"
if ((nodes * tasks > 1)) && ! parallel; then
    fail "${words[*]:0:2}: runs in one process; use --nodes 1 without --per-gpu"
fi
if ((gpus && tasks == 1)); then
    variables+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))")
fi
resolve "$venv"
name=${name:-delve-$(printf '%s\0' "${command[@]}" | cksum | cut -d' ' -f1)}
submit=(
    sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$tasks" --time="$time"
    --requeue --dependency=singleton --signal=B:USR1@180
    --open-mode=append --output=%x.log --chdir="$PWD"
)
if ((gpus)); then submit+=(--gpus-per-node="$gpus"); fi
submit+=("$root/experiments/launch/slurm.sh" --in-job "${command[@]}")
if [[ $dry ]]; then
    printf '%s\n' "$(quoted "${submit[@]}")"
    exit
fi
command -v sbatch >/dev/null || fail "sbatch is missing; call this where Slurm is, or use box.sh"
[[ -x $venv/bin/delve ]] || fail "--venv $venv: has no bin/delve; install there (see --help)"
"${submit[@]}"
