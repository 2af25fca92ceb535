#!/bin/sh
# Style, types and layers; runs all of them, then fails if one failed.
set -u
cd "$(dirname "$0")/.." || exit 1

status=0
check() {
    echo "lint: $*"
    tool=$1
    shift
    ".venv/bin/$tool" "$@" || status=1
}

check ruff check .
check ruff format --check .
check mypy
check lint-imports --no-logo
check hadolint Dockerfile
# Has a build for x86-64 only.
[ ! -x .venv/bin/shellcheck ] || check shellcheck scripts/*.sh .ci/run
exit $status
