#!/bin/sh
# Makes .venv ready: `setup.sh run` for `make run`, `setup.sh test` for everything else but the other orchestrators that
# the benchmarks compare with: `setup.sh peers` gives those an environment of their own, .venv-peers.
# Does nothing when the same set-up has already succeeded; an interrupted one is done again.
set -eu
cd "$(dirname "$0")/.."

mode=${1:-run}
venv=.venv
[ "$mode" = peers ] && venv=.venv-peers
lock=requirements/$mode.txt

fail() {
    printf 'set-up: %s\n' "$*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or newer"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer was not found; install it, or name it: make PYTHON=/path/to/python3.11 $mode"
}

# Script paths inside a venv are absolute, so the folder is part of what makes a set-up valid.
fingerprint() {
    pwd
    cksum "requirements/$1.txt" requirements/build.txt pyproject.toml
}

is_ready() {
    [ -x "$venv/bin/python" ] && [ -f "$venv/.ready-$1" ] && [ "$(fingerprint "$1")" = "$(cat "$venv/.ready-$1")" ]
}

exit_if_ready() {
    if is_ready "$mode" || { [ "$mode" = run ] && is_ready test; }; then
        exit 0
    fi
}

case $mode in
    test) size=1100 ;;
    *) size=600 ;;
esac
[ -f "$lock" ] || fail "$mode is not accepted: run, test or peers"
exit_if_ready
if command -v flock >/dev/null 2>&1; then
    exec 9<scripts/setup.sh
    flock -n 9 || { echo "set-up: waiting for another set-up in this folder"; flock 9; }
    exit_if_ready
fi

printf 'set-up: installing requirements/%s.txt into %s (about %s MB; once)\n' "$mode" "$venv" "$size"
# A moved environment has the old paths in its scripts; a half-unpacked package can break pip itself. Both start over.
if ! grep -qs "$(pwd)/$venv" "$venv/bin/activate" || [ -e "$venv/.incomplete" ] ||
    ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        fail "$python has no venv and ensurepip modules; install them first (Debian and Ubuntu: apt-get install python3-venv)"
    "$python" -m venv --clear "$venv" || fail "$python -m venv $venv failed, see above"
fi

rm -f "$venv/.ready-run" "$venv/.ready-test"
: >"$venv/.incomplete"
# Whoever only runs the program has no compiler; some test tools come as source on some machines.
only_wheels=
[ "$mode" = run ] && only_wheels="-- --only-binary=:all:"
# shellcheck disable=SC2086
"$venv/bin/python" scripts/install.py "$venv/set-up.log" requirements/build.txt "$lock" $only_wheels ||
    fail "pip could not install $lock on $(uname -m) with $("$venv/bin/python" -V), see above and $venv/set-up.log"
if [ "$mode" != peers ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
        --no-deps --no-build-isolation --editable . 2>>"$venv/set-up.log" ||
        fail "pip could not install the project itself, see $venv/set-up.log"
fi
fingerprint "$mode" >"$venv/.ready-$mode"
rm "$venv/.incomplete"
printf 'set-up: done\n'
