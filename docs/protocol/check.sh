#!/bin/sh
# Searches the model of the job protocol whole: the protocol must keep its promises, and each mutant must break one.
# Needs spin (apt-get install spin) and a C compiler. Usage: docs/protocol/check.sh [WORKERS], 2 by default.
set -eu

model=$(cd "$(dirname "$0")" && pwd)/forgetd.pml
workers=${1:-2}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
failed=0

# search NAME DEFINES COMPILER-FLAGS RUN-FLAGS: one exhaustive search; its log is in $NAME.log
search() {
    # shellcheck disable=SC2086  # flags are several words
    spin -a $2 -DWORKERS="$workers" "$model" >"$1.spin" 2>&1 || { cat "$1.spin"; exit 2; }
    # shellcheck disable=SC2086
    cc -O2 $3 -o pan pan.c
    # shellcheck disable=SC2086
    ./pan -m1000000 $4 >"$1.log" 2>&1 || true
    errors=$(sed -n 's/.*errors: \([0-9]*\).*/\1/p' "$1.log")
    states=$(sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' "$1.log")
    why=$(sed -n 's/^pan:[0-9]*: assertion violated \(.*\) (at depth.*/\1/p; s/^pan:[0-9]*: \(.*\) (at depth.*/\1/p' "$1.log" | head -n 1)
    if grep -q 'max search depth too small\|out of memory' "$1.log"; then
        cat "$1.log"
        exit 2
    fi
}

# holds WHAT COMPILER-FLAGS RUN-FLAGS
holds() {
    search right "" "$2" "$3"
    if [ "$errors" = 0 ]; then
        printf 'holds   %-28s %9s states\n' "$1" "$states"
    else
        printf 'BROKEN  %-28s %9s states: %s\n' "$1" "$states" "$why"
        failed=1
    fi
}

# breaks DEFINE SAID [COMPILER-FLAGS RUN-FLAGS]: the mutant must fail, and of this
breaks() {
    search mutant "-D$1" "${3--DSAFETY -DNOCLAIM}" "${4-}"
    if [ "$errors" != 0 ] && printf '%s' "$why" | grep -qF "$2"; then
        printf 'caught  %-28s %9s states: %s\n' "$1" "$states" "$why"
    else
        printf 'MISSED  %-28s %9s states: %s\n' "$1" "$states" "$why"
        failed=1
    fi
}

holds "one end, one publication" "-DSAFETY -DNOCLAIM" ""
holds "what is named stays" "" "-a -N stays_readable"
holds "every job ends" "-DNFAIR=16" "-a -f -N ends"
breaks NO_TOKEN only_the_holder_publishes
breaks NO_QUEUED a_claim_takes_from_nobody
breaks NO_STATUS an_end_is_final
breaks NO_REAPER "acceptance cycle" "-DNFAIR=16" "-a -f -N ends"
breaks ALL_AS_IT_IS "" "" "-a -N nothing_is_published"
exit "$failed"
