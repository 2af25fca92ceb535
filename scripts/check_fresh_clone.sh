#!/bin/sh
# For people, before a release: copies the tree as git has it into a new folder, runs `make test` there, then `make run`
# until it answers, then Ctrl-C, and looks whether anything is left running.
# `check_fresh_clone.sh --quick` leaves `make test` out.
set -eu
cd "$(dirname "$0")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if command -v git >/dev/null 2>&1 && git rev-parse --verify --quiet HEAD >/dev/null; then
    git clone --quiet . "$folder/clone"
else
    mkdir "$folder/clone"
    tar --exclude=./.venv --exclude=./.venv-peers --exclude=./.run --exclude=./.git -cf - . | tar -C "$folder/clone" -xf -
fi
cd "$folder/clone"

if [ "${1:-}" != --quick ]; then
    make test
fi
python3 scripts/check_run.py
