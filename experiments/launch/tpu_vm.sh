#!/usr/bin/env bash
# A TPU VM slice: create or reuse it, install, run a delve command on its workers, fetch results.
#
#   experiments/launch/tpu_vm.sh --tpu NAME --zone ZONE --type v5litepod-8 [--version IMAGE]
#       [--project P] [--spot] [--nfs HOST:/EXPORT] [--send PATH]... [--worker all|0] [--run NAME]
#       [--fetch PATH]... [--to DIR] [--delete] [--dry-run] -- delve heal fused healed \
#       --data tokens --tokens 1000000000 --mesh data=8 --batch 32
#
# The committed code (git HEAD) goes to every worker with a Python 3.12 of its own. Paths of the
# command and of --fetch are relative to the work folder: ~/delve-work on a slice of one host,
# /mnt/delve (the --nfs folder, mounted) on one of several, which must share one (no gs://). --send
# copies local files and folders there, each time. Repeat the same command after anything: it
# reuses the slice, makes a preempted one anew, follows a run that still goes on, and starts one
# that ended again, which goes on where it stopped or says that it is done. A work folder without
# --nfs is lost with its VM, so --spot asks for --nfs. --fetch: copied to --to (default: fetched)
# after a run that ended well; --delete: then the slice is deleted. --dry-run prints all commands.
#
# JAX finds the processes of a slice by itself. On several hosts `delve heal` and `delve train` run
# on all workers; everything else on one, on its CPU: --worker 0 -- JAX_PLATFORMS=cpu delve ...
# Before using several workers: ssh-add ~/.ssh/google_compute_engine
#
# Tried: dry runs; the order of calls with a stand-in for gcloud (tests/test_launch.py); all flags
# but those of `create` were read in the help of Google Cloud SDK 528. Not tried: a TPU, gcloud
# against Google, installing on a worker.
set -euo pipefail
# shellcheck source=experiments/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tpu='' zone='' type='' version='' project='' nfs='' worker=all run=run to=fetched
spot='' delete='' dry='' send=() fetch=()
while (($#)); do
    case $1 in
        --tpu | --zone | --type | --version | --project | --nfs | --worker | --run | --to)
            (($# > 1)) || fail "$1: its value is missing"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --send | --fetch)
            (($# > 1)) || fail "$1: its value is missing"
            if [[ $1 == --send ]]; then send+=("$2"); else fetch+=("$2"); fi
            shift 2
            ;;
        --spot) spot=1 && shift ;;
        --delete) delete=1 && shift ;;
        --dry-run) dry=1 && shift ;;
        --help) usage "${BASH_SOURCE[0]}" && exit ;;
        --) shift && break ;;
        *) fail "$1: unknown; flags, then -- and the command (see --help)" ;;
    esac
done
for flag in tpu zone type; do [[ ${!flag} ]] || fail "--$flag: is missing (see --help)"; done
[[ $worker =~ ^(all|0)$ ]] || fail "--worker $worker: choose all or 0"
[[ $run =~ ^[A-Za-z0-9._-]+$ ]] || fail "--run $run: letters, digits, '.', '_' and '-' only"
case $type in
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v6e-*) image=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) image=tpu-ubuntu2204-base ;;
    *) fail "--type $type: expected v2-, v3-, v4-, v5litepod-, v5p- or v6e- and a number" ;;
esac
[[ ${type##*-} =~ ^[1-9][0-9]*$ ]] || fail "--type $type: '${type##*-}' is not a number"
several='' # hosts: the number counts chips (v5e, v6e) or cores, and a host has at most 8 of either
if ((${type##*-} > 8)); then several=1; fi
if [[ $several && ! $nfs ]]; then
    fail "--type $type: has several hosts; name the folder they share with --nfs HOST:/EXPORT"
fi
if [[ $spot && ! $nfs ]]; then
    fail "--spot: a preempted VM loses its disk; name a folder that stays with --nfs HOST:/EXPORT"
fi
if [[ $nfs && ! $nfs =~ ^[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*$ ]]; then
    fail "--nfs $nfs: expected HOST:/EXPORT"
fi
take_command "$@"
if [[ $several && $worker == all ]] && ! parallel; then
    fail "${words[*]:0:2}: runs in one process; use --worker 0 -- JAX_PLATFORMS=cpu ${words[0]} ..."
fi
if [[ $several && $worker == 0 && " ${variables[*]} " != *" JAX_PLATFORMS=cpu "* ]]; then
    fail "--worker 0: its TPU waits for the other hosts; use -- JAX_PLATFORMS=cpu ${words[0]} ..."
fi
for tool in git gcloud; do
    [[ $dry && $tool == gcloud ]] || command -v "$tool" >/dev/null || fail "$tool is missing"
done
commit=$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null) || fail "$root: no git checkout"

act() { if [[ $dry ]]; then printf '%s\n' "$(quoted "$@")"; else "$@"; fi; }
where=(--zone="$zone")
if [[ $project ]]; then where+=(--project="$project"); fi
vm() { act gcloud compute tpus tpu-vm "$1" "$tpu" "${where[@]}" "${@:2}"; }
on() { vm ssh --worker="$1" --command="$2"; } # on WORKERS COMMAND
copy() { act gcloud compute tpus tpu-vm scp --recurse --worker="$1" "${where[@]}" "${@:2}"; }

# 1. the slice
create=(create --accelerator-type="$type" --version="${version:-$image}")
if [[ $spot ]]; then create+=(--spot); fi
if [[ $dry ]]; then
    vm describe '--format=value(state)'
    printf '# unless it is READY (STOPPED: start; PREEMPTED or TERMINATED: delete before):\n'
    vm "${create[@]}"
else
    said=$(mktemp)
    if ! state=$(vm describe '--format=value(state)' 2>"$said"); then
        grep -q NOT_FOUND "$said" || fail "gcloud: $(grep . "$said" | tail -n 1)"
    fi
    case $state in
        READY) ;;
        '') vm "${create[@]}" ;;
        STOPPED) vm start ;;
        PREEMPTED | TERMINATED) vm delete --quiet && vm "${create[@]}" ;;
        *) fail "--tpu $tpu: its state is $state; repeat this once that has passed" ;;
    esac
fi

# 2. the code, one folder a commit, so that a run under way keeps its own
code=delve-jax-$commit
install="set -e; mkdir -p $code; tar xzf $code.tgz -C $code; cd $code; rm -rf .venv
export PATH=\$HOME/.local/bin:\$PATH
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
uv venv --quiet --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python -r requirements.txt 'jax[tpu]'
uv pip install --quiet --python .venv/bin/python --no-deps -e .
touch .ready"
if [[ $dry ]]; then printf '# unless all workers have this commit:\n'; fi
if [[ $dry ]] || ! on all "test -e $code/.ready"; then
    archive=${TMPDIR:-/tmp}/$code.tgz
    act git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    copy all "$archive" "$tpu:"
    on all "$install"
fi

# 3. the work folder
# shellcheck disable=SC2016
work='$HOME/delve-work' there=delve-work
mount="mkdir -p $work"
if [[ $nfs ]]; then
    work=/mnt/delve there=/mnt/delve
    mount="set -e; if ! mountpoint -q $work; then
sudo apt-get -qq update; sudo apt-get -qq install -y nfs-common; sudo mkdir -p $work
sudo mount -t nfs $nfs $work; sudo chown \$(id -u) $work; fi"
fi
on all "$mount"
if ((${#send[@]})); then copy 0 "${send[@]}" "$tpu:$there/"; fi

# 4. the run, and 5. its results
start="\$HOME/$code/experiments/launch/box.sh --name $run"
on "$worker" "cd $work && $start -- $(quoted "${variables[@]}" "${words[@]}")"
if ((${#fetch[@]})); then
    act mkdir -p "$to"
    copy 0 "${fetch[@]/#/$tpu:$there/}" "$to"
fi
if [[ $delete ]]; then vm delete --quiet; fi
