#!/bin/sh
# Prints what the tests could not show on this machine, each with its reason and the tests that say so.
#
# Usage: not-shown.sh FILE
set -eu
echo
[ -s "${1:?usage: not-shown.sh FILE}" ] || {
    echo "Nothing was left out on this machine."
    exit 0
}
echo "Left out on this machine:"
sort -t "$(printf '\t')" -u -k3 -k1,2 "$1" |
    awk -F '\t' '$3 != why { why = $3; print "  " why } { print "      " $1 ": " $2 }'
