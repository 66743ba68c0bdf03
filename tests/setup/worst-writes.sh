#!/bin/sh
# Prints, for each test that had a guest or a writer, the slowest single write that it saw, the slowest test first.
# Some tests freeze, stop or starve their guest on purpose; what a guest sees without any backup is in the house's `guest_boots`.
#
# Usage: worst-writes.sh FILE
set -eu
[ -s "${1:?usage: worst-writes.sh FILE}" ] || exit 0
echo
echo "Slowest single write, its sync included, by the clock of whoever wrote:"
sort -t "$(printf '\t')" -k1,3 -k4,4nr "$1" |
    awk -F '\t' '!seen[$1 FS $2 FS $3]++ { printf "%10.1f ms  %-14s %s: %s\n", $4 / 1000, $3, $1, $2 }' | sort -nr
