#!/bin/sh
# run.sh SERVER [pytest's arguments] - the playground in Debian's Chromium. Installs what is missing:
# the browser by deploy/packages.sh, the Python packages into build/playground-venv.
set -eu

here=$(dirname "$0")
server=$1
shift
venv=build/playground-venv
wanted=$venv/requirements.txt

sh deploy/packages.sh playground
if ! cmp -s "$here/requirements.txt" "$wanted"; then
    rm -rf "$venv"
    mkdir -p build
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$wanted"
fi
# Python's caches stay out of the tree.
LATTE_SERVER=$server PYTHONDONTWRITEBYTECODE=1 \
    exec "$venv/bin/python" -m pytest -q -p no:cacheprovider "$here" "$@"
