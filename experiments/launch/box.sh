#!/usr/bin/env bash
# One machine: run a delve command detached from the terminal, once, and follow its log.
#
#   experiments/launch/box.sh [--name RUN] [--runs DIR] [--dry-run] -- delve heal out/fused \
#       out/healed --data out/tokens --tokens 1000000000 --mesh data=8 --batch 32
#   experiments/launch/box.sh [--name RUN] [--runs DIR] --stop
#
# A GPU box needs nothing else: one process drives all its GPUs. To install there:
#   python3.12 -m venv .venv && .venv/bin/pip install -r requirements.txt 'jax[cuda13]'
#   .venv/bin/pip install --no-deps -e .
# Called again while RUN goes on, it follows the log; after its end, it starts the command again,
# which goes on where it stopped or says that it is done. Ctrl-C ends the following, not the run;
# --stop sends SIGTERM: delve saves the step and ends. The exit code is the command's. The log is
# RUNS/RUN/log (default: ~/delve-runs/run/log). `delve` and `experiments/upcycle_*.py` are those of
# this checkout and its .venv; NAME=VALUE words may stand before them. tpu_vm.sh calls this script
# on every worker.
#
# Tried: all of this on one Linux machine without a GPU (tests/test_launch.py). Not tried: a GPU,
# the two lines that install.
set -euo pipefail
# shellcheck source=experiments/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name=run runs=${DELVE_RUNS:-$HOME/delve-runs} dry='' stop=''
while (($#)); do
    case $1 in
        --name | --runs)
            (($# > 1)) || fail "$1: its value is missing"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --stop) stop=1 && shift ;;
        --dry-run) dry=1 && shift ;;
        --help) usage "${BASH_SOURCE[0]}" && exit ;;
        --) shift && break ;;
        *) fail "$1: unknown; flags, then -- and the command (see --help)" ;;
    esac
done
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || fail "--name $name: letters, digits, '.', '_' and '-' only"
home=$runs/$name
for tool in flock setsid; do
    [[ $dry ]] || command -v "$tool" >/dev/null || fail "$tool is missing (package util-linux)"
done

if [[ $stop ]]; then
    [[ -f $home/pid ]] || fail "--name $name: no such run in $runs"
    if flock -n "$home/lock" true; then fail "--name $name: is not running"; fi
    kill -TERM -- "-$(<"$home/pid")" # the group of the run
    exit
fi

take_command "$@"
resolve "$root/.venv"
if [[ $dry ]]; then
    printf '%s > %s\n' "$(quoted "${command[@]}")" "$(quoted "$home/log")"
    exit
fi
mkdir -p "$home"
exec 9>>"$home/lock"
if flock -n 9; then
    if [[ -f $home/log ]]; then mv "$home/log" "$home/log.before"; fi
    rm -f "$home/code"
    printf '[box] %s\n' "$(quoted "${command[@]}")" >"$home/log"
    # the run inherits descriptor 9 and holds the lock while any of its processes lives
    # shellcheck disable=SC2016
    setsid bash -c 'trap : TERM; code=$1; shift; "$@"; echo $? >"$code"' run "$home/code" \
        "${command[@]}" >>"$home/log" 2>&1 </dev/null &
    echo $! >"$home/pid"
else
    printf '[box] %s is running already; this follows it\n' "$name" >&2
fi
exec 9>&-
tail -n +1 --pid="$(<"$home/pid")" -f "$home/log"
[[ -f $home/code ]] || fail "$home/log: the run was killed; the same command goes on"
exit "$(<"$home/code")"
