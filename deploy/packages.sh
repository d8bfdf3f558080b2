#!/bin/sh
# packages.sh LIST - install the Debian or Ubuntu packages of a list below that are missing.
#
# Does nothing, and needs neither root nor a network, when all are there. Uses sudo when it is
# not run by root. Where packages cannot be installed it says what is missing and lets the
# build go on: other systems may have the same libraries under other names.
set -eu

build="gcc make libc6-dev libmicrohttpd-dev libcjson-dev libpcre2-dev libutf8proc-dev
       libxxhash-dev libhiredis-dev libgnutls28-dev libopenblas-dev"
venv="python3 python3-venv ca-certificates"
containers="buildah podman runc netavark aardvark-dns iptables iproute2 mmdebstrap curl"
kubectl=$(command -v kubectl >/dev/null 2>&1 || echo kubernetes-client)

# CUDA code needs the C++ compiler, in programs and in the tests that run kernels on the host.
cuda_home=${CUDA_HOME:-/usr/local/cuda}
if command -v nvcc >/dev/null 2>&1 || [ -e "$cuda_home/include/cuda_runtime.h" ]; then
    build="$build g++"
fi

case "${1:-}" in
build) wanted=$build ;;
test) wanted="$build libcmocka-dev libcurl4-openssl-dev libyaml-dev curl redis-server" ;;
model) wanted=$venv ;; # weights/smollm2/make.sh
clients) wanted="$build $venv curl libcurl4-openssl-dev" ;;
playground) wanted="$venv chromium fonts-liberation" ;;
docs) wanted=python3 ;;
docs-test) wanted="$build python3 man-db mandoc bsdextrautils pkg-config zsh fish" ;;
nginx) wanted="$build python3 nginx-light openssl curl" ;;
metrics) wanted="prometheus python3" ;;
kubernetes) wanted="$venv prometheus $kubectl" ;;
kubernetes-play) wanted="$containers catatonit" ;;
image) wanted="$containers $venv jq python3-pip" ;;
compose) wanted="$containers $venv jq python3-pip podman-compose" ;;
systemd) wanted="systemd strace curl jq procps" ;;
*)
    echo "usage: deploy/packages.sh LIST; the lists are those in this file" >&2
    exit 2
    ;;
esac

is_installed() {
    dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed
}

give_up() {
    echo "packages: $1" >&2
    echo "packages: going on; what misses them will tell" >&2
    exit 0
}

command -v dpkg-query >/dev/null 2>&1 ||
    give_up "this is not Debian or Ubuntu; needed there: $(echo $wanted)"

missing=""
for package in $wanted; do
    is_installed "$package" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ]; then
    as_root=""
elif command -v sudo >/dev/null 2>&1; then
    as_root="sudo"
else
    give_up "missing:$missing; run as root: apt-get install -y$missing"
fi

echo "packages: installing$missing"
# $missing and $as_root are lists of words.
install() {
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
        --no-install-recommends $missing
}

# A fresh image has no package lists, and old lists name versions that are gone.
if ! install; then
    echo "packages: reading the package lists anew"
    $as_root apt-get update -q
    install
fi
