# containers.sh - sourced by the tests of this folder: containers without a daemon and without a
# registry.
#
# buildah builds; podman and runc run, in a network namespace of their own, so that no port can
# clash and nothing of the machine's network changes. Images, containers and settings live in a
# scratch folder that is removed at the end. The base image is made of Debian packages and gets the
# name that the Dockerfile asks for, so the Dockerfile is built as it is. Its archive stays in
# build/deploy for the next run: it holds this machine's apt sources and belongs nowhere else.
#
#   DEPLOY_STORE=DIR   keep the images there for the next run, which then builds what has changed
#
# Needs root. Work begins with containers_open; checks go through check, skip and finish.
# shellcheck shell=bash

passed=0 failed=0 skipped=0
scratch='' store='' netns=''
cache=build/deploy

say() {
    printf '[%4d s] %s\n' "$SECONDS" "$*"
}

# Text behind the sentence is shown only when it failed.
good() {
    passed=$((passed + 1))
    say "ok    $1"
}

bad() {
    failed=$((failed + 1))
    say "FAIL  $1"
    [ $# = 1 ] || printf '%s\n' "${@:2}" | sed 's/^/              /' | tail -n 40
}

skip() {
    skipped=$((skipped + 1))
    say "SKIPPED  $1"
}

# check SENTENCE COMMAND...: whether the command succeeds.
check() {
    local sentence=$1 output
    shift
    if output=$("$@" 2>&1); then good "$sentence"; else bad "$sentence" "$* failed:" "$output"; fi
}

# expect SENTENCE WANTED FOUND: whether two texts are the same.
expect() {
    if [ "$2" = "$3" ]; then good "$1"; else bad "$1" "expected: $2" "found:    $3"; fi
}

# expect_in SENTENCE PATTERN TEXT: whether an extended regular expression is found.
expect_in() {
    if grep -qE -- "$2" <<<"$3"; then good "$1"; else bad "$1" "expected: $2" "found: $3"; fi
}

# await SECONDS COMMAND...: until it succeeds; false when time has run out.
await() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.5
    done
}

finish() {
    printf '%d passed, %d failed%s\n' "$passed" "$failed" \
        "$([ "$skipped" = 0 ] || echo ", $skipped skipped")"
    [ "$failed" = 0 ]
}

stop_early() {
    bad "$@"
    finish
    exit 1
}

# ---- Opening and closing ----

containers_close() {
    local code=$?
    trap - EXIT
    {
        podman rm -a -f -t 2
        podman network prune -f
        buildah rm -a
        podman umount -a
    } >/dev/null 2>&1
    # aardvark-dns ends with its last container; if not, it and whatever else is in our network is
    # ended here.
    [ -z "$netns" ] || ip netns pids "$netns" | xargs -r kill 2>/dev/null
    [ -z "$netns" ] || ip netns del "$netns"
    awk -v a="$scratch/" -v b="$store/" 'index($5, a) == 1 || index($5, b) == 1 { print $5 }' \
        /proc/self/mountinfo | sort -r | xargs -r umount -l
    rm -rf --one-file-system "$scratch"
    exit "$code"
}

# Low limits on purpose: raising the machine's hard ones is not for every root.
write_settings() {
    cat >"$scratch/containers.conf" <<END
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[network]
network_backend = "netavark"
network_config_dir = "$scratch/networks"
END
    cat >"$scratch/storage.conf" <<END
[storage]
driver = "$1"
graphroot = "$store"
runroot = "$scratch/run"
END
}

containers_open() {
    [ "$(id -u)" = 0 ] || stop_early "root is needed to build and run containers"
    mkdir -p "$cache"
    scratch=$(mktemp -d "$PWD/$cache/scratch.XXXXXX")
    store=${DEPLOY_STORE:-$scratch/store}
    # Of a store that stays, the images do. podman's database would have it work in the folders of
    # the run that made it.
    rm -rf "$store/libpod" "$store/volumes" "$store/secrets"
    trap containers_close EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    export CONTAINERS_CONF=$scratch/containers.conf CONTAINERS_STORAGE_CONF=$scratch/storage.conf
    export BUILDAH_ISOLATION=chroot TMPDIR=$scratch
    unset STORAGE_DRIVER STORAGE_OPTS
    write_settings overlay
    if ! podman info >"$scratch/info" 2>&1; then
        rm -rf "$scratch/store" "$scratch/run" # not one that was given
        write_settings vfs
        podman info >"$scratch/info" 2>&1 || stop_early "podman works" "$(cat "$scratch/info")"
    fi
    netns=latte-test-$$
    ip netns add "$netns" || stop_early "a network namespace can be made"
    in_net ip link set lo up
}

# Not ip netns exec, which hides the control groups.
in_net() {
    nsenter --net="/run/netns/$netns" "$@"
}

# ---- Images ----

# The same packages and cuts as in Debian's slim image; apt goes where this machine's goes.
make_base_archive() {
    local options=() line
    # shellcheck disable=SC2016 # apt's own variables
    apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
        'Created-By: Packages' 'Origin: Debian' | sort -u >"$scratch/sources"
    grep -q ' bookworm ' "$scratch/sources" || return 1
    while IFS= read -r line; do
        options+=(--aptopt="$line")
    done < <(apt-config dump | grep -E '^Acquire::(https?::Proxy|Check-Valid-Until|Check-Date) ')
    printf '%s\n' 'path-exclude /usr/share/doc/*' 'path-include /usr/share/doc/*/copyright' \
        'path-exclude /usr/share/man/*' 'path-exclude /usr/share/locale/*' \
        'path-exclude /usr/share/info/*' >"$scratch/slim"
    echo 'Acquire::Languages "none";' >"$scratch/languages"
    # Not by --dpkgopt, which starts Python for each package.
    # shellcheck disable=SC2016 # mmdebstrap's own variable
    mmdebstrap --mode=root --format=tar --variant=minbase --quiet "${options[@]}" \
        --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr --include=usr-is-merged \
        --customize-hook="cp '$scratch/slim' \"\$1/etc/dpkg/dpkg.cfg.d/slim\"" \
        --customize-hook="cp '$scratch/languages' \"\$1/etc/apt/apt.conf.d/languages\"" \
        --customize-hook='cd "$1" && rm -rf usr/share/man usr/share/info usr/share/locale &&
            find usr/share/doc ! -type d ! -name copyright -delete' \
        --customize-hook='cd "$1" && rm -f etc/resolv.conf etc/hostname var/cache/apt/*.bin' \
        bookworm "$1" - <"$scratch/sources"
}

# import_base NAME: the base image under the name that a FROM says.
import_base() {
    local archive=$cache/base-bookworm.tar
    if [ ! -s "$archive" ]; then
        say "making the base image of Debian's packages"
        make_base_archive "$scratch/base.tar" >"$scratch/base.log" 2>&1 || {
            apt-get update -q >/dev/null 2>&1
            make_base_archive "$scratch/base.tar" >"$scratch/base.log" 2>&1
        } || stop_early "the base image can be made" "$(cat "$scratch/base.log")"
        mv "$scratch/base.tar" "$archive"
    fi
    podman import -q -c 'CMD ["bash"]' \
        -c 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
        "$archive" "$1" >/dev/null || stop_early "the base image can be imported"
}

# build SENTENCE TAG ARGUMENT...: an image that the rest of the test needs.
build() {
    local sentence=$1 tag=$2
    shift 2
    say "building $tag"
    if buildah build --network host --pull=never --format docker --layers -t "$tag" "$@" \
        >"$scratch/build.log" 2>&1; then
        good "$sentence"
    else
        stop_early "$sentence" "$(tail -n 60 "$scratch/build.log")"
    fi
}

# The default of an ARG of the Dockerfile.
docker_arg() {
    sed -n "s/^ARG $1=//p" Dockerfile
}
