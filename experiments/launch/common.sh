# What the launch scripts share; it is sourced and does nothing by itself.

((BASH_VERSINFO[0] >= 5)) || { echo "error: bash 5 or newer is needed" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd) # the checkout

# One line on stderr, exit code 2.
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Its words as a shell reads them, quoted only where they must be.
quoted() {
    local word out=()
    for word; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then out+=("$word"); else out+=("${word@Q}"); fi
    done
    printf '%s' "${out[*]}"
}

# The comment at the head of a script.
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$1"; }

# The command behind `--` as variables=(NAME=VALUE...) and words=(delve VERB... or a tier's script).
take_command() {
    variables=() words=()
    while (($#)) && [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; do variables+=("$1") && shift; done
    (($#)) || fail "name the command after --, as: -- delve heal SRC DST --data TEXT --tokens N"
    case $1 in
        delve | experiments/upcycle_*.py) words=("$@") ;;
        *) fail "$1: expected delve or experiments/upcycle_*.py" ;;
    esac
}

# Whether the words can run in several processes.
parallel() { [[ ${words[0]} == delve && ${words[1]-} =~ ^(heal|train)$ ]]; }

# command=(...): what is run where delve is installed in the environment $1.
resolve() {
    local program=("$1/bin/delve")
    if [[ ${words[0]} != delve ]]; then program=("$1/bin/python" "$root/${words[0]}"); fi
    command=(env "${variables[@]}" "${program[@]}" "${words[@]:1}")
}
