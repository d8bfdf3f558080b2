#!/bin/sh
# run.sh BUILD [unit|http|emulated|gpu...] - run the test programs of a build directory and count
# what cmocka reports. Exits with 1 when a test failed, a program crashed or hung, or there was
# nothing to run. A GPU's one after another unless TEST_JOBS says otherwise; unit and HTTP tests,
# which wait a good deal, two at a time; emulated ones, which only compute, on all cores.
#
#   TEST_TIMEOUT   seconds a program may take (default 300)
#   TEST_ONLY      run only programs whose path contains one of these words
#   TEST_EXCEPT    leave out those whose path contains one of these
#   TEST_UNDER     a command to run each program under
#   TEST_JOBS      programs at a time
#
# gpu says first what it runs on; without a GPU it skips all, aloud.
set -u

# cmocka's closing lines: "[  PASSED  ] 7 test(s)."
count() {
    sed -n "s/^\[  *$1  *\] \([0-9][0-9]*\) test(s).*/\1/p" "$log" |
        awk '{ n += $1 } END { print n + 0 }'
}

report() {
    printf '%-36s %4d passed, %d failed%s%s  (%d s)\n' "$2/${1##*/}" "$p" "$f" \
        "$([ "$s" = 0 ] || echo ", $s skipped")" "$why" "$seconds"
    # Skips are said aloud.
    [ "$s" = 0 ] || grep -i 'skip' "$log" | grep -v '^\[\|TEST(S)' | sort -u | sed 's/^/    /'
    if [ "$f" != 0 ]; then
        echo "--- output of $1"
        tail -n 200 "$log"
        echo "---"
    fi
}

# The program and what of its output says why, for the end of a long log.
remember() {
    {
        printf 'failed: %s%s\n' "$2/${1##*/}" "$why"
        grep -a '^\[ RUN' "$log" | tail -n 1
        grep -aE '^(\[  (FAILED|ERROR)|ERROR)' "$log" | cut -c 1-300 | head -n 12
    } | sed '2,$s/^/failed:   /' >>"$TEST_COUNTS.failed"
}

# run_one PROGRAM KIND: adds a line "passed failed skipped" to $TEST_COUNTS.
run_one() {
    log=$(mktemp)
    timeout_s=${TEST_TIMEOUT:-300}
    started=$(date +%s)
    # shellcheck disable=SC2086 # words
    timeout -k 10 "$timeout_s" ${TEST_UNDER:-} "$1" >"$log" 2>&1 </dev/null
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
    echo "$p $f $s" >>"$TEST_COUNTS"
    [ "$f" = 0 ] || remember "$1" "$2"
    lines=$(report "$1" "$2") # one write, also beside others
    printf '%s\n' "$lines"
    rm -f "$log"
}

if [ "${1:-}" = --one ]; then
    run_one "$3" "$2"
    exit 0
fi

build=${1:?usage: tests/run.sh BUILD [unit|http|emulated|gpu...]}
shift
[ $# -gt 0 ] || set -- unit http
TEST_COUNTS=$(mktemp)
export TEST_COUNTS
trap 'rm -f "$TEST_COUNTS" "$TEST_COUNTS.failed"' EXIT

is_wanted() {
    for word in ${TEST_EXCEPT:-}; do
        case $1 in *"$word"*) return 1 ;; esac
    done
    [ -n "${TEST_ONLY:-}" ] || return 0
    for word in $TEST_ONLY; do
        case $1 in *"$word"*) return 0 ;; esac
    done
    return 1
}

# What is left of a renamed test has no source any more.
has_source() {
    name=${1##*/}
    case $2 in
    unit | http) [ -f "tests/$2/$name.c" ] ;;
    *) [ -f "tests/cuda/$name.cu" ] || [ -f "tests/cuda/$name.c" ] || [ -f "tests/unit/$name.c" ] ;;
    esac
}

wanted() {
    for program in "$build/tests/$1"/test_*; do
        if has_source "$program" "$1" && is_wanted "$program"; then
            echo "$program"
        fi
    done
}

gpu_names() {
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null
}

for kind in "$@"; do
    jobs=1
    case $kind in
    emulated) jobs=$(nproc) ;;
    unit | http) jobs=2 ;;
    esac
    jobs=${TEST_JOBS:-$jobs}
    if [ "$kind" = gpu ]; then
        if ! gpus=$(gpu_names); then
            echo "GPU tests SKIPPED: nvidia-smi finds no GPU on this machine"
            echo "0 0 1" >>"$TEST_COUNTS"
            continue
        fi
        # Libraries that came with the tests: make gpu-bundle.
        export LD_LIBRARY_PATH="$build/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        echo "commit $(cat "$build/commit" 2>/dev/null || echo unknown), GPU and driver: $gpus"
    fi
    # Of the emulated ones the last in the alphabet take longest.
    wanted "$kind" | if [ "$kind" = emulated ]; then sort -r; else cat; fi |
        xargs -r -n 1 -P "$jobs" sh "$0" --one "$kind"
done

[ ! -f "$TEST_COUNTS.failed" ] || cat "$TEST_COUNTS.failed"
awk '{ p += $1; f += $2; s += $3 }
     END { printf "%d passed, %d failed%s\n", p, f, s ? ", " s " skipped" : ""
           exit f > 0 || p + s == 0 }' "$TEST_COUNTS"
