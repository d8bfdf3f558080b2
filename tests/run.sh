#!/bin/sh
# run.sh BUILD [unit|http...] - run the test programs of a build directory, one after another,
# and count what cmocka reports. Exits with 1 when a test failed, a program crashed or hung, or
# there was nothing to run.
#
#   TEST_TIMEOUT   seconds a program may take (default 300)
#   TEST_ONLY      run only programs whose path contains one of these words
set -u

build=${1:?usage: tests/run.sh BUILD [unit|http...]}
shift
[ $# -gt 0 ] || set -- unit http
timeout_s=${TEST_TIMEOUT:-300}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0 failed=0 skipped=0

# cmocka's closing lines: "[  PASSED  ] 7 test(s)."
count() {
    n=$(sed -n "s/^\[  *$1  *\] \([0-9][0-9]*\) test(s).*/\1/p" "$log" |
        awk '{ n += $1 } END { print n + 0 }')
    echo "$n"
}

run_one() {
    started=$(date +%s)
    timeout -k 10 "$timeout_s" "$1" >"$log" 2>&1 </dev/null
    code=$?
    seconds=$(($(date +%s) - started))
    p=$(count PASSED) f=$(count FAILED) s=$(count SKIPPED)
    # A program that died, hung or ran nothing is a failure of its own.
    why=""
    if [ "$code" = 124 ] || [ "$code" = 137 ]; then
        why=", timed out after $timeout_s s"
    elif [ "$code" -ne 0 ] && [ "$f" = 0 ]; then
        why=", exit code $code"
    elif [ $((p + f + s)) = 0 ]; then
        why=", ran no test"
    fi
    [ -z "$why" ] || f=$((f + 1))
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    printf '%-36s %4d passed, %d failed%s%s  (%d s)\n' "${1#"$build"/tests/}" "$p" "$f" \
        "$([ "$s" = 0 ] || echo ", $s skipped")" "$why" "$seconds"
    # Skips are said aloud.
    [ "$s" = 0 ] || grep -i 'skip' "$log" | grep -v '^\[\|TEST(S)' | sed 's/^/    /'
    if [ "$f" != 0 ]; then
        echo "--- output of $1"
        tail -n 200 "$log"
        echo "---"
    fi
}

is_wanted() {
    [ -n "${TEST_ONLY:-}" ] || return 0
    for word in $TEST_ONLY; do
        case $1 in *"$word"*) return 0 ;; esac
    done
    return 1
}

for kind in "$@"; do
    for program in "$build/tests/$kind"/test_*; do
        # What is left of a renamed test has no source any more.
        [ -f "tests/$kind/${program##*/}.c" ] || continue
        if is_wanted "$program"; then
            run_one "$program"
        fi
    done
done

if [ "$skipped" = 0 ]; then
    echo "$passed passed, $failed failed"
else
    echo "$passed passed, $failed failed, $skipped skipped"
fi
[ "$failed" = 0 ] && [ $((passed + skipped)) -gt 0 ]
