#!/bin/bash
# test.sh BUILD - whether the manual pages and completions in BUILD/docs are whole and work: every
# option of the programs' own source is in all of them, man and mandoc take the pages, and each
# shell completes. Also what --version tells, and what `make install` lays down.
set -u
build=$1
passed=0 failed=0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# check NAME COMMAND...
check() {
    local name=$1
    shift
    if "$@" >"$scratch/out" 2>&1; then
        passed=$((passed + 1))
        echo "ok      $name"
    else
        failed=$((failed + 1))
        echo "FAILED  $name"
        sed 's/^/    /' "$scratch/out" | tail -n 20
    fi
}

# The options, from the source and not from --help: two tables, and getopt's.
server_options() {
    sed -n '/define OPTION_LIST/,/^$/p' server/options.h | tr '\n' ' ' |
        grep -oE 'X\([a-z_0-9]+, *[A-Z]+,[ \\]*"[a-z0-9-]+"' | grep -oE '"[a-z0-9-]+"' | tr -d '"'
}
getopt_options() {
    grep -ohE '\{"[a-z0-9-]+", *[a-z_0-9]+, *[A-Z0-9]+, *[^}]+\}' "$@" |
        grep -oE '^\{"[a-z0-9-]+"' | tr -d '{"' | grep -vx help
}

run_options() {
    grep -oE '^ +ROW\("[a-z0-9-]+"' engine/run/options.c | grep -oE '"[a-z0-9-]+"' | tr -d '"'
}

# has_all FILE PATTERN OPTION...: PATTERN with @ for the option is in the file, for each.
has_all() {
    local file=$1 pattern=$2 option missing=0
    shift 2
    [ $# -gt 3 ] || { echo "only $# options were found in the source"; return 1; }
    for option; do
        grep -qE -e "${pattern//@/$option}" "$file" && continue
        echo "$file has no $option"
        missing=1
    done
    return $missing
}
has_options() {
    local name=$1
    shift
    has_all "$build/docs/man/$name.1" "\\\\-\\\\-(\\[no\\\\-\\])?@\\\\fR" "${@//-/\\\\\\\\-}" &&
        has_all "$build/docs/bash/$name" "[ \"]--@[ \"]" "$@" &&
        has_all "$build/docs/zsh/_$name" "'--@[=[]" "$@" &&
        has_all "$build/docs/fish/$name.fish" " -l @ " "$@"
}

lints() {
    local found
    # The sections of subcommands are not among the conventional ones, and need not be.
    found=$(mandoc -Tlint -W warning "$1")
    [ -z "$found" ] || { echo "$found"; return 1; }
    found=$(MANROFFSEQ='' LC_ALL=C.UTF-8 man --warnings -E UTF-8 -l -Tutf8 -Z "$1" 2>&1 >/dev/null)
    [ -z "$found" ] || { echo "$found"; return 1; }
    LC_ALL=C.UTF-8 MANWIDTH=100 man -l "$1" | col -bx >"$scratch/page"
    grep -q '^NAME' "$scratch/page" && grep -q '^SYNOPSIS' "$scratch/page"
}

# bash_completes WANTED WORD...: completing the last word offers WANTED.
bash_completes() {
    local wanted=$1
    shift
    bash -c '
        build=$1 wanted=$2
        shift 2
        . "$build/docs/bash/$1"
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        function=$(complete -p "$1" | sed "s/.*-F \([^ ]*\) .*/\1/")
        "$function"
        printf "%s\n" "${COMPREPLY[@]}" | grep -qxF -e "$wanted" && exit 0
        echo "$*: expected $wanted, found: ${COMPREPLY[*]}"
        exit 1
    ' - "$build" "$wanted" "$@"
}

# A zsh on a terminal of its own: type, press Tab, look at the screen.
zsh_completes() {
    local typed=$1 wanted=$2
    ZSH_TEST_DOCS=$build/docs/zsh zsh -f -c '
        zmodload zsh/zpty
        zpty z zsh -f -i
        zpty -w z "fpath=($ZSH_TEST_DOCS \$fpath); autoload -Uz compinit; compinit -u -D; PS1=rea\"\"dy:"
        zpty -r -m z line "*ready:*" || exit 1
        zpty -n -w z "$1"$'"'\\t'"'
        for i in {1..600}; do
            zpty -r -t z piece && all+=$piece
            [[ $all == *"$2"* ]] && exit 0
            sleep 0.1
        done
        print -r -- "typed $1: expected $2, found: $all"
        exit 1
    ' - "$typed" "$wanted"
}
fish_completes() {
    local typed=$1 wanted=$2
    HOME=$scratch fish --no-config -c "source $build/docs/fish/${typed%% *}.fish; complete -C '$typed'" |
        cut -f1 >"$scratch/offers"
    grep -qxF -e "$wanted" "$scratch/offers" && return
    echo "typed $typed: expected $wanted, found: $(tr '\n' ' ' <"$scratch/offers")"
    return 1
}

# The first line is a name and a version, the same in all programs; the facts are those of the
# system's own package and compiler.
tells_version() {
    local text
    text=$("$build/$1" --version)
    echo "$text"
    [ "$(echo "$text" | head -n 1)" = "$1 $(sed -n 's/.*LATTE_VERSION "\(.*\)"/\1/p' engine/base/version.h)" ] &&
        echo "$text" | grep -q "^commit     $(git describe --always --exclude '*' 2>/dev/null || echo unknown)" &&
        echo "$text" | grep -qE "^build      $(basename "$build"), -O" &&
        echo "$text" | grep -qE "^CUDA       (not built in|runtime [0-9.]+, cuBLASLt [0-9.]+)$" &&
        echo "$text" | grep -qF "cJSON $(pkg-config --modversion libcjson)" &&
        if [ "$1" = latte-server ]; then
            echo "$text" | grep -qF "libmicrohttpd $(pkg-config --modversion libmicrohttpd), GnuTLS $(pkg-config --modversion gnutls)"
        fi
}

installs() {
    local root=$scratch/root
    make --no-print-directory BUILD="$build" ${MAKE_ARGS:-} DESTDIR="$root" PREFIX=/usr install || return 1
    local file
    for file in bin/latte-server bin/latte-run bin/latte-bench share/man/man1/latte-server.1 \
        share/man/man1/latte-run.1 share/man/man1/latte-bench.1 \
        share/bash-completion/completions/latte-server share/zsh/vendor-completions/_latte-run \
        share/fish/vendor_completions.d/latte-bench.fish; do
        [ -f "$root/usr/$file" ] || { echo "$file is missing"; return 1; }
    done
    if [ -f deploy/systemd/latte-server.service ]; then
        [ -f "$root/usr/lib/systemd/system/latte-server.service" ] || return 1
    fi
    "$root/usr/bin/latte-server" --version | grep -q '^latte-server ' || return 1
    make --no-print-directory BUILD="$build" ${MAKE_ARGS:-} DESTDIR="$root" PREFIX=/usr uninstall || return 1
    [ -z "$(find "$root" -type f)" ] || { find "$root" -type f; return 1; }
}

check "latte-server: every option is everywhere" has_options latte-server $(server_options)
check "latte-run: every option is everywhere" has_options latte-run $(run_options)
check "latte-bench: every option is everywhere" has_options latte-bench $(getopt_options tests/bench/*.c)
for page in "$build"/docs/man/*.1; do
    check "man and mandoc take ${page##*/}" lints "$page"
done
check "bash: a flag" bash_completes --max-slots latte-server --max-s
check "bash: a negated flag" bash_completes --no-access-log latte-server --no-
check "bash: a choice" bash_completes bf16 latte-server --weight-dtype b
check "bash: a choice behind =" bash_completes int8 latte-server --weight-dtype =
check "bash: a directory" bash_completes deploy latte-server --model dep
check "bash: a file" bash_completes deploy/packages.sh latte-server --tls-cert deploy/pack
check "bash: a subcommand" bash_completes load latte-bench lo
check "bash: a subcommand's flag" bash_completes --burstiness latte-bench load --bur
check "bash: latte-run" bash_completes --perplexity latte-run -m x --perp
check "zsh: a flag" zsh_completes "latte-server --max-slo" "max-slots"
check "zsh: a choice" zsh_completes "latte-server --weight-dtype=bf" "bf16"
check "zsh: a subcommand's flag" zsh_completes "latte-bench load --burs" "burstiness"
check "fish: a flag" fish_completes "latte-server --max-sl" --max-slots
check "fish: a choice" fish_completes "latte-server --weight-dtype b" bf16
check "fish: a subcommand" fish_completes "latte-bench l" load
check "fish: a subcommand's flag" fish_completes "latte-bench load --burst" --burstiness
for program in latte-server latte-run latte-bench; do
    check "$program --version" tells_version "$program"
done
check "make install and uninstall" installs
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
