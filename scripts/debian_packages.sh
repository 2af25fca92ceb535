#!/bin/sh
# Prints the names of the programs that tests need and that are not here, one a line.
# As root on Debian or Ubuntu it first installs them; services that packages would start stay stopped.
set -eu

packages="chromium haproxy"

missing() {
    for program in $packages; do
        command -v "$program" >/dev/null 2>&1 || printf '%s\n' "$program"
    done
}

wanted=$(missing)
if [ -n "$wanted" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    log=$(mktemp)
    policy=/usr/sbin/policy-rc.d
    ours=
    trap 'rm -f "$log"; [ -z "$ours" ] || rm -f "$policy"' EXIT
    if [ ! -e "$policy" ]; then
        ours=yes
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    # shellcheck disable=SC2086
    echo "test set-up: installing from Debian:" $wanted >&2
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086
    if ! { apt-get update -q && apt-get install -q -y --no-install-recommends $wanted; } >"$log" 2>&1 </dev/null; then
        tail -n 5 "$log" >&2
    fi
fi
missing
