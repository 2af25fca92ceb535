#!/bin/sh
# The tests. What they need from Debian is installed first where that is possible; where it is not, it is named here, and
# the tests that need it say so as skipped (or as failed where CI=true).
set -eu
cd "$(dirname "$0")/.."

missing=$(sh scripts/debian_packages.sh)
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086
    echo "tests: not here, and not installable without root:" $missing "- what needs them is skipped" >&2
fi
exec .venv/bin/python -m pytest ${missing:+-rs} "$@"
