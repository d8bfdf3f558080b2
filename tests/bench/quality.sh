#!/bin/sh
# quality.sh [DEVICE [MODEL [TEXT]]] - what smaller storage costs: the perplexity of a text under
# each way of keeping weights and attention windows, and how far it is from f32's.
#
#   tests/bench/quality.sh cuda:0 weights/latte-12m some.txt
#
# TEXT is best one that the model has not seen, and long; by default this repository's documents.
# Run it in the root of the repository after `make`.
set -eu

device=${1:-cuda:0}
model=${2:-weights/latte-12m}
text=${3:-}
run=${LATTE_RUN:-build/release/latte-run}
temporary=
if [ -z "$text" ]; then
    temporary=$(mktemp)
    trap 'rm -f "$temporary"' EXIT
    cat README.md weights/README.md weights/latte-12m/README.md >"$temporary"
    text=$temporary
fi

base=
printf '%-8s %-8s %12s %9s\n' weights window perplexity change
for pair in f32:f32 bf16:f32 bf16:bf16 bf16:f8 int8:bf16 int8:f8; do
    if ! out=$("$run" -m "$model" --device "$device" --weight-dtype "${pair%:*}" \
        --window-dtype "${pair#*:}" --perplexity "$text" --quiet 2>/dev/null); then
        printf '%-8s %-8s %12s\n' "${pair%:*}" "${pair#*:}" "not here"
        continue
    fi
    value=$(printf '%s\n' "$out" | sed -n 's/.*perplexity \([0-9.]*\).*/\1/p')
    : "${base:=$value}"
    awk -v a="${pair%:*}" -v b="${pair#*:}" -v v="$value" -v base="$base" \
        'BEGIN { printf "%-8s %-8s %12.4f %+8.3f%%\n", a, b, v, 100 * (v / base - 1) }'
done
