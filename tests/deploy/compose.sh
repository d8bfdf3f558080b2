#!/usr/bin/env bash
# compose.sh - deploy/compose.yaml for real: server, Redis and Prometheus are started by
# podman-compose and used. make compose-test.
#
# Redis and Prometheus are Debian's (compose.test.yaml). Grafana is not started: there is no image
# of it here; its files are compared with each other, and Prometheus is asked what it would ask.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/deploy/containers.sh
. tests/deploy/containers.sh

image=localhost/latte-server:test
url=http://127.0.0.1:8080
prometheus=http://127.0.0.1:9090

compose() {
    # It says what it runs, and of health checks that no systemd is here to run them.
    TEST_PROMETHEUS_DIR=$scratch/prometheus in_net podman-compose -p latte \
        -f deploy/compose.yaml -f tests/deploy/compose.test.yaml "$@" >>"$scratch/compose.log" 2>&1
}

container() {
    podman ps -a --filter "label=com.docker.compose.service=$1" --format '{{.Names}}'
}

is_running() {
    [ "$(podman inspect "$(container "$1")" --format '{{.State.Status}}' 2>/dev/null)" = running ]
}

log_of() {
    podman logs "$(container "$1")" 2>&1 | tail -n 20
}

post() {
    in_net curl -sS -m 120 -H 'Content-Type: application/json' -d "$2" "$url$1"
}

# The value of a query to Prometheus, nothing when it has no data.
query() {
    in_net curl -sS -m 10 -G "$prometheus/api/v1/query" --data-urlencode "query=$1" |
        jq -r '.data.result[0].value[1] // empty'
}

has_value() {
    [ -n "$(query "$1")" ] && [ "$(query "$1")" != 0 ]
}

# The shipped configuration, asking every second.
prepare_prometheus() {
    mkdir -p "$scratch/prometheus"
    cp deploy/prometheus/* "$scratch/prometheus/"
    sed -i -E 's/((scrape|evaluation)_interval): .*/\1: 1s/' "$scratch/prometheus/prometheus.yml"
    chmod -R a+rX "$scratch/prometheus"
    chmod a+x "$scratch" # the container's user passes through
}

start_all() {
    compose up -d latte redis prometheus
    local service
    for service in redis prometheus latte; do
        await 60 is_running "$service"
        check "$service runs" is_running "$service"
    done
    if ! await 300 podman healthcheck run "$(container latte)"; then
        stop_early "the server is healthy" "$(cat "$scratch/compose.log")" "$(log_of latte)"
    fi
    good "the server is healthy"
    check "Redis is healthy" podman healthcheck run "$(container redis)"
}

test_limits() {
    local name
    for name in latte redis prometheus; do
        expect "$name: not root, no capabilities, read-only root" "true 0000000000000000 true" \
            "$(podman inspect "$(container $name)" --format '{{.State.Pid}} {{.HostConfig.ReadonlyRootfs}}' |
                while read -r pid read_only; do
                    awk -v r="$read_only" '/^Uid:/ { user = $2 != 0 ? "true" : "false" }
                        /^CapEff:/ { print user, $2, r }' "/proc/$pid/status"
                done)"
    done
}

# Redis has the session: the server is replaced, then Redis itself.
test_sessions() {
    local id turn position
    id=$(post /v1/sessions '{}' | jq -r .id)
    turn='{"session_id":"'$id'","prompt":"Once upon a time","max_tokens":8,"ignore_eos":true}'
    position=$(post /v1/completions "$turn" | jq .session.position)
    check "a turn of a session moves its position ($position)" test "${position:-0}" -ge 8
    check "Redis has it" test "$(podman exec "$(container redis)" redis-cli dbsize)" -gt 0
    compose restart latte
    await 300 podman healthcheck run "$(container latte)"
    expect "after a restart of the server it is where it was" "$position" \
        "$(in_net curl -sS -m 20 "$url/v1/sessions/$id" | jq .position)"
    compose restart redis
    await 120 podman healthcheck run "$(container redis)"
    expect "and after one of Redis" "$position" \
        "$(in_net curl -sS -m 20 --retry 5 --retry-all-errors "$url/v1/sessions/$id" | jq .position)"
    check "and goes on" test "$(post /v1/completions "$turn" | jq .session.position)" -gt "$position"
}

test_prometheus() {
    local up='up{job="latte"}'
    await 60 has_value "$up"
    expect "Prometheus reaches the server" 1 "$(query "$up")"
    local requests='sum(latte_http_requests_total{route="/v1/completions"})'
    await 30 has_value "$requests"
    check "and counts its requests" has_value "$requests"
}

# What Grafana is given: folders where it looks for them, and a Prometheus that is there.
test_grafana_files() {
    local grafana=deploy/grafana from
    while read -r from; do
        check "compose.yaml mounts deploy/$from, which is there" test -d "deploy/$from"
    done < <(sed -n 's,^ *- \./\(grafana/[a-z]*\):.*,\1,p' deploy/compose.yaml)
    expect "the dashboards lie where their provider looks" \
        "$(sed -n 's,^ *path: ,,p' $grafana/provisioning/dashboards/*.yaml)" \
        "$(sed -n 's,^ *- \./grafana/dashboards:\(.*\):ro,\1,p' deploy/compose.yaml)"
    expect_in "Prometheus is where the data source says, for the services" '^up\{.* => 1 @' \
        "$(podman exec "$(container prometheus)" promtool query instant \
            "$(sed -n 's,^ *url: ,,p' $grafana/provisioning/datasources/*.yaml)" 'up{job="latte"}' 2>&1)"
    skip "Grafana itself: there is no image of it here"
}

# Every query of the dashboard as Grafana would send it. What they tell is for make metrics-test.
test_dashboard() {
    local expression answer silent='' n=0
    while read -r expression; do
        expression=${expression//\$job/latte}
        expression=${expression//\$instance/.*}
        expression=${expression//\$__rate_interval/1m}
        answer=$(in_net curl -sS -m 10 -G "$prometheus/api/v1/query" \
            --data-urlencode "query=$expression")
        n=$((n + 1))
        [ "$(jq '.data.result | length' <<<"$answer")" -gt 0 ] || silent+="$expression: $answer"$'\n'
    done < <(jq -r '.. | .expr? // empty' deploy/grafana/dashboards/latte.json)
    check "the dashboard has $n queries, more than 40" test "$n" -gt 40
    expect "Prometheus has data for each of them" "" "$silent"
}

stop_all() {
    local name code
    for name in latte redis prometheus; do
        compose stop -t 45 "$name"
        code=$(podman inspect "$(container $name)" --format '{{.State.ExitCode}}')
        expect "$name: exit code after a stop" 0 "$code"
    done
    compose down
    expect "nothing is left" "" "$(podman ps -a --format '{{.Names}}')"
}

sh deploy/packages.sh compose
containers_open
import_base "$(docker_arg DEBIAN)"
expect "compose.yaml and the Dockerfile have one version" "$(docker_arg VERSION)" \
    "$(sed -n 's,.*image: localhost/latte-server:,,p' deploy/compose.yaml)"
build "the server's image" "$image" --target cpu .
for part in redis prometheus; do
    build "a stand-in for $part" "localhost/latte-test/$part" --target "$part" \
        --build-arg DEBIAN="$(docker_arg DEBIAN)" -f tests/deploy/compose.dockerfile tests/deploy
done
prepare_prometheus
start_all
test_limits
test_sessions
test_prometheus
test_grafana_files
test_dashboard
stop_all
finish
