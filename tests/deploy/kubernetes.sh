#!/usr/bin/env bash
# kubernetes.sh SERVER - the manifests of deploy/kubernetes: see kubernetes_test.py. Its packages go
# into an environment of their own in build/, once. make kubernetes-test.
#
#   KUBERNETES_PLAY=0   do not run the pod (needs root, and builds an image)
set -euo pipefail
cd "$(dirname "$0")/../.."

server=$1 model=weights/latte-12m
tools=build/kubernetes-tools wanted=tests/deploy/requirements-kubernetes.txt
image=localhost/latte-server:kubernetes-test

if ! cmp -s "$wanted" "$tools/installed"; then
    python3 -m venv --clear "$tools"
    "$tools/bin/pip" install -q --disable-pip-version-check -r "$wanted"
    cp "$wanted" "$tools/installed"
fi

# The image of the Dockerfile with this build of the server in place of one compiled inside.
make_image() {
    # shellcheck disable=SC2154 # of containers.sh
    local folder=$scratch/image
    mkdir -p "$folder/weights"
    cp "$server" "$folder/latte-server"
    cp -r "$model" "$folder/weights/"
    cp LICENSE "$folder/"
    {
        sed -n '/^ARG DEBIAN=/p' Dockerfile
        sed -n '/ AS runtime$/,/^FROM runtime AS/p' Dockerfile | sed '$d'
        echo 'COPY latte-server /usr/local/bin/'
        echo 'USER 10001:10001'
    } >"$folder/Dockerfile"
    import_base "$(docker_arg DEBIAN)"
    build "the image of the pod" "$image" "$folder"
}

play=${KUBERNETES_PLAY:-1}
if [ "$play" = 1 ] && ! { [ -e tests/deploy/containers.sh ] && [ "$(id -u)" = 0 ]; }; then
    echo "SKIPPED running the pod: needs root and tests/deploy/containers.sh"
    play=0
fi
if [ "$play" = 1 ]; then
    sh deploy/packages.sh kubernetes-play
    # shellcheck source=tests/deploy/containers.sh
    . tests/deploy/containers.sh
    containers_open
    make_image
    # shellcheck disable=SC2154
    export LATTE_IMAGE=$image LATTE_NETNS=$netns
fi
"$tools/bin/python" tests/deploy/kubernetes_test.py "$server" "$model"
