#!/bin/sh
# Runs the fuzz targets one after the other and says what each came to.
#
#   tests/fuzz/fuzz.sh SECONDS [TARGET...]
#
# Needs a nightly compiler, cargo-fuzz and a C++ compiler, and says which of them is missing. What a target has learnt
# is kept in tests/fuzz/corpus, and an input that breaks the product in tests/fuzz/artifacts; neither goes into git.
# What random bytes would hardly ever become, as a component, begins with tests/fuzz/seeds.
# Ends with 1 where a target found something.
#
# There is no sanitizer: but for the loading of machine code neither Fleecebox nor these targets have unsafe code, and
# without one an execution takes a fraction of the time.
#
# Environment:
#   CARGO_TARGET_DIR  where things are built, in a folder `fuzz`; target in the checkout unless set.
set -eu

fail() {
    echo "fuzz: error: $*" >&2
    exit 1
}

[ $# -ge 1 ] || fail "usage: $0 SECONDS [TARGET...]"
seconds=$1
shift

cargo +nightly --version >/dev/null 2>&1 || fail "there is no nightly compiler; type: rustup toolchain install nightly"
cargo fuzz --version >/dev/null 2>&1 || fail "there is no cargo-fuzz; type: cargo install --locked cargo-fuzz"
command -v c++ >/dev/null || fail "there is no C++ compiler for libFuzzer itself; Debian has it in the package g++"

cd "$(dirname "$0")/../.."
target_dir=${CARGO_TARGET_DIR:-target}/fuzz
fuzz() {
    command=$1
    shift
    cargo +nightly fuzz "$command" --fuzz-dir tests/fuzz --target-dir "$target_dir" --sanitizer none "$@"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM
# The targets' archives; a file system in memory spares the disk.
[ -w /dev/shm ] && TMPDIR=$(mktemp -d -p /dev/shm) || TMPDIR=$scratch
export TMPDIR
trap 'rm -rf "$scratch" "$TMPDIR"' EXIT

[ $# -gt 0 ] || set -- $(cargo +nightly fuzz list --fuzz-dir tests/fuzz)
echo "fuzz: building; the first time takes as long as building Fleecebox does twice"
fuzz build
found=
for target; do
    echo "fuzz: $target for $seconds s"
    mkdir -p "tests/fuzz/corpus/$target"
    seeds=
    [ ! -d "tests/fuzz/seeds/$target" ] || seeds=$PWD/tests/fuzz/seeds/$target
    # A pipe would hide the exit code. The seeds come after the folder that what is learnt goes to.
    if fuzz run "$target" "$PWD/tests/fuzz/corpus/$target" $seeds -- "-max_total_time=$seconds" -print_final_stats=1 -timeout=120 >"$scratch/log" 2>&1; then
        sed -n -e '/INITED/p' -e '/^#.*DONE/p' -e '/^stat::number_of_executed_units/p' "$scratch/log"
    else
        cat "$scratch/log"
        found="$found $target"
    fi
done
[ -z "$found" ] || fail "something was found in:$found"
