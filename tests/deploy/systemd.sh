#!/usr/bin/env bash
# systemd.sh - deploy/systemd: what systemd-analyze says of the unit and of its drop-in for GPUs,
# what the server asks of the kernel against what the unit lets it, and the unit for real: a
# container in which systemd starts it. make systemd-test.
#
#   SYSTEMD_ONLY=analyze   systemd-analyze and the system calls alone: no container
#   SERVER=FILE            a server for the system calls; without one it is built
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/deploy/containers.sh
. tests/deploy/containers.sh

unit=latte-server.service
model=weights/latte-12m
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# ---- systemd-analyze ----

# A folder with the unit as it would be installed; its program need only exist.
lay_out() {
    mkdir -p "$work/$1"
    sed 's,^ExecStart=/usr/local/bin/latte-server,ExecStart=/bin/true,' "deploy/systemd/$unit" \
        >"$work/$1/$unit"
}

# analyze SENTENCE FOLDER THRESHOLD: verify only warns of unknown names, and exits with 0, so any
# word is a failure. The exposure is from 0 (best) to 10; the threshold is ten times that.
analyze() {
    local file=$work/$2/$unit output code
    expect "$1: systemd-analyze verify has nothing to say" "" "$(systemd-analyze verify "$file" 2>&1)"
    output=$(systemd-analyze security --offline=true --threshold="$3" "$file" 2>&1)
    code=$?
    expect "$1: exposure at most $3 of 100 ($(sed -n 's/.*level for [^ ]* //p' <<<"$output"))" 0 $code
}

test_analyze() {
    lay_out cpu
    lay_out gpu
    mkdir "$work/gpu/$unit.d"
    cp deploy/systemd/gpu.conf "$work/gpu/$unit.d/"
    analyze "the unit" cpu 15
    analyze "the unit for GPUs" gpu 25
    expect "its stop takes longer than the server's drain timeout" yes \
        "$(awk -F= '/^TimeoutStopSec/ { print ($2 >= 40 ? "yes" : "no") }' "deploy/systemd/$unit")"
}

# ---- System calls ----

# The names in a group, with those of the groups it is made of.
calls_of() {
    local name
    systemd-analyze syscall-filter "$1" | sed -n 's/^ *\([-@a-z_0-9]*\)$/\1/p' | sort -u |
        while read -r name; do
            case $name in
            "$1") ;;
            @*) calls_of "$name" ;;
            *) echo "$name" ;;
            esac
        done
}

# What the unit lets through: what is named, without what is named behind ~.
allowed_calls() {
    local group
    sed -n 's/^SystemCallFilter=\([^~].*\)/\1/p' "deploy/systemd/$unit" |
        while read -r group; do calls_of "$group"; done | sort -u >"$work/named"
    sed -n 's/^SystemCallFilter=~//p' "deploy/systemd/$unit" |
        while read -r group; do calls_of "$group"; done | sort -u >"$work/refused"
    comm -23 "$work/named" "$work/refused"
}

# A short life of the server: a session in a store, a stream, health, metrics, SIGTERM.
live() {
    local url
    await 60 grep -q 'listening on' "$work/out" || return 1
    url=$(sed -n 's/.*listening on //p' "$work/out")
    await 300 curl -fsS "$url/health/ready" || return 1
    curl -sS "$url/v1/sessions" -d '{}' >"$work/session"
    curl -sS "$url/v1/completions" -d '{"prompt":"Once","max_tokens":8,"stream":true,
        "session_id":"'"$(jq -r .id "$work/session")"'"}' >"$work/events"
    curl -sS "$url/metrics" >/dev/null
    grep -q 'data: \[DONE\]' "$work/events"
}

test_calls() {
    local server=${SERVER:-} pid
    if [ -z "$server" ]; then
        sh deploy/packages.sh build
        make -j"$(nproc)" CUDA=0 BUILD=build/deploy/server build/deploy/server/latte-server \
            >"$work/make.log" 2>&1 || stop_early "the server is built" "$(tail "$work/make.log")"
        server=build/deploy/server/latte-server
    fi
    strace -f -qq -e signal=none -o "$work/trace" "$server" --model $model --port 0 --no-access-log \
        --store "$work/store" >"$work/out" 2>"$work/log" &
    pid=$!
    if live; then good "the server works, watched"; else bad "the server works, watched" "$(cat "$work/log")"; fi
    pkill -TERM -P "$pid"
    wait "$pid"
    sed -n 's/^[0-9]* *\([a-z_0-9]*\)(.*/\1/p' "$work/trace" | sort -u >"$work/used"
    allowed_calls >"$work/allowed"
    check "it made $(wc -l <"$work/used") different system calls" \
        test "$(wc -l <"$work/used")" -gt 40
    expect "the unit lets all of them through" "" "$(comm -23 "$work/used" "$work/allowed")"
}

# ---- systemd itself ----

in_machine() {
    podman exec latte-systemd "$@"
}

is_active() {
    [ "$(in_machine systemctl is-active "$unit" 2>/dev/null)" = active ]
}

test_for_real() {
    local image=localhost/latte-server:test main
    containers_open
    import_base "$(docker_arg DEBIAN)"
    build "the server's image" "$image" --target cpu .
    build "a machine with systemd and the server" localhost/latte-test/systemd \
        --build-arg IMAGE="$image" -f tests/deploy/systemd.dockerfile deploy/systemd
    in_net podman run -d --name latte-systemd --privileged --systemd=always --network none \
        localhost/latte-test/systemd >"$scratch/run.log" 2>&1
    if ! await 60 in_machine systemctl is-system-running --wait; then
        in_machine systemctl is-system-running >"$scratch/state" 2>&1
        grep -q degraded "$scratch/state" ||
            stop_early "systemd runs in a container" "$(cat "$scratch/run.log" "$scratch/state")" \
                "$(podman logs latte-systemd 2>&1)"
    fi
    await 60 is_active
    check "systemd started the unit" is_active
    await 120 in_machine latte-server --healthcheck
    check "the server is ready" in_machine latte-server --healthcheck
    main=$(in_machine systemctl show -P MainPID "$unit")
    in_machine grep -E '^(Uid|CapEff|Seccomp):' "/proc/$main/status" >"$scratch/status"
    expect_in "it is not root" '^Uid:	[1-9]' "$(cat "$scratch/status")"
    expect_in "it has no capabilities" '^CapEff:	0000000000000000' "$(cat "$scratch/status")"
    expect_in "its system calls are filtered" '^Seccomp:	2' "$(cat "$scratch/status")"
    expect_in "its log is in the journal" '"event":"listening"' \
        "$(in_machine journalctl -u "$unit" -o cat --no-pager)"
    expect_in "its store is in its own folder" '.' "$(in_machine ls /var/lib/private/latte-server)"
    in_machine sh -c "kill -9 $main"
    await 60 in_machine sh -c "latte-server --healthcheck &&
        test \$(systemctl show -P MainPID $unit) != $main"
    expect "after a crash systemd starts it again" 1 \
        "$(in_machine systemctl show -P NRestarts "$unit")"
    check "and it is ready" in_machine latte-server --healthcheck
    in_machine systemctl stop "$unit"
    expect "systemctl stop: exit code 0" "success 0" \
        "$(in_machine systemctl show -P Result "$unit") $(in_machine systemctl show -P ExecMainStatus "$unit")"
}

sh deploy/packages.sh systemd
test_analyze
test_calls
rm -rf "$work" # before containers_open takes the trap
if [ "${SYSTEMD_ONLY:-}" != analyze ]; then
    sh deploy/packages.sh image
    test_for_real
fi
finish
