#!/bin/sh
# packages.sh build|test|model|docs|docs-test|nginx - install the Debian or Ubuntu packages that are missing.
#
# Does nothing, and needs neither root nor a network, when all are there. Uses sudo when it is
# not run by root. Where packages cannot be installed it says what is missing and lets the
# build go on: other systems may have the same libraries under other names.
set -eu

build="gcc make libc6-dev libmicrohttpd-dev libcjson-dev libpcre2-dev libutf8proc-dev
       libxxhash-dev libhiredis-dev libgnutls28-dev libopenblas-dev"
test="libcmocka-dev libcurl4-openssl-dev libyaml-dev curl redis-server"
docs="python3"
docs_test="$build $docs man-db mandoc bsdextrautils pkg-config zsh fish" # deploy/docs/test.sh
nginx="$build python3 nginx-light openssl curl"                  # deploy/nginx/test.py
model="python3 python3-venv ca-certificates" # weights/smollm2/make.sh

# CUDA code needs the C++ compiler, in programs and in the tests that run kernels on the host.
cuda_home=${CUDA_HOME:-/usr/local/cuda}
if command -v nvcc >/dev/null 2>&1 || [ -e "$cuda_home/include/cuda_runtime.h" ]; then
    build="$build g++"
fi

case "${1:-}" in
build) wanted=$build ;;
test) wanted="$build $test" ;;
model) wanted=$model ;;
docs) wanted=$docs ;;
docs-test) wanted=$docs_test ;;
nginx) wanted=$nginx ;;
*)
    echo "usage: deploy/packages.sh build|test|model|docs|docs-test|nginx" >&2
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
