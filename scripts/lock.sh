#!/bin/sh
# Writes requirements/*.txt anew from pyproject.toml: exact versions with hashes, one answer for every Python from 3.11.
# `lock.sh --upgrade` takes the newest releases; without it what is locked stays where it still fits.
set -eu
cd "$(dirname "$0")/.."

tool=.run/lock
[ -x "$tool/bin/uv" ] || "$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')" -m venv "$tool"
"$tool/bin/python" -m pip install --quiet --disable-pip-version-check uv

lock() {
    output=requirements/$1.txt
    shift
    echo "lock: $output"
    "$tool/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-emit-find-links --no-header \
        --output-file "$output" "$@"
    { echo "# Written by \`make lock\`; not to be edited."; grep -v '^# Written by' "$output"; } >"$output.new"
    mv "$output.new" "$output"
}

# The widest file first: the others take their versions from it, so that one virtual environment can serve them all.
lock test "$@" --extra auth --extra embedded --extra local --extra bench --extra test pyproject.toml
lock run "$@" --constraint requirements/test.txt --extra auth --extra embedded --extra local pyproject.toml
lock server "$@" --constraint requirements/test.txt --extra auth pyproject.toml
lock build "$@" --constraint requirements/test.txt requirements/build.in
lock peers "$@" --extra peers pyproject.toml
