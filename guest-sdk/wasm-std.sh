#!/bin/sh
# Makes the Rust toolchain able to build providers for wasm32-unknown-unknown.
#
#   guest-sdk/wasm-std.sh
#
# Prints the path of a cargo configuration file for such builds on stdout; says what it does on stderr:
#
#   cargo build --release --target wasm32-unknown-unknown --config "$(guest-sdk/wasm-std.sh)" -p chunked
#
# The target's standard library is the first of these that is there:
#   1. the toolchain's own (`rustup target add wasm32-unknown-unknown` was run before);
#   2. one that this script built earlier for exactly this compiler;
#   3. what `rustup target add` fetches, within a time limit;
#   4. one built from the library's sources, into the cache folder; it takes about a minute. The sources are
#      the archive that FLEECEBOX_RUST_LIBRARY names, or those in the toolchain (`rustup component add
#      rust-src`), or Debian's package rust-src, which is unpacked and not installed.
#
# Environment:
#   FLEECEBOX_CACHE         where everything goes; .cache in the checkout unless set.
#   FLEECEBOX_RUST_LIBRARY  a tar archive with the folder `library` of the compiler's sources. Naming it means
#                           "build from this", so step 3 is left out.
set -eu

TARGET=wasm32-unknown-unknown
# Long enough for 20 MB over a slow line; a server that cannot be reached often hangs rather than fails.
RUSTUP_SECONDS=60
# The suite that carries, for stable Debian, the newest compiler's sources.
DEBIAN_SUITE=trixie-backports

checkout=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${FLEECEBOX_CACHE:-$checkout/.cache}/wasm"
cache=$(cd "${FLEECEBOX_CACHE:-$checkout/.cache}/wasm" && pwd)

say() { echo "wasm-std: $*" >&2; }
fail() {
    say "error: $*"
    exit 1
}

command -v cargo >/dev/null && command -v rustc >/dev/null ||
    fail "cargo and rustc are not on the PATH; https://rustup.rs installs them"

version=$(rustc -vV)
release=$(echo "$version" | sed -n 's/^release: //p')
commit=$(echo "$version" | sed -n 's/^commit-hash: //p')
host=$(echo "$version" | sed -n 's/^host: //p')
toolchain=$(rustc --print sysroot)
# The compiler's standard library must match it exactly, so the commit names the folder; and so do the library's own
# files, because one that is built anew fits nothing that was built with the last one, which cargo sees by this path alone.
sysroot=$(find "$cache" -maxdepth 1 -name "sysroot-$commit-*" | head -n 1)

main() {
    tools=$toolchain/lib/rustlib/$host/bin
    [ -x "$tools/wasm-component-ld" ] ||
        fail "$toolchain has no wasm-component-ld: this compiler is not one that rustup installed"
    if toolchain_has_std; then
        write_config
    else
        [ -n "$sysroot" ] || { [ -z "${FLEECEBOX_RUST_LIBRARY:-}" ] && add_by_rustup; } || build_std
        if toolchain_has_std; then write_config; else write_config "--sysroot=$sysroot"; fi
    fi
}

toolchain_has_std() {
    ls "$toolchain/lib/rustlib/$TARGET/lib"/libcore-*.rlib >/dev/null 2>&1
}

# A file and not a variable of flags, because paths may hold spaces.
write_config() {
    config=$cache/cargo-$commit.toml
    {
        echo "[target.$TARGET]"
        echo "linker = '$tools/wasm-component-ld'"
        echo "rustflags = ["
        for flag in "$@"; do echo "    '$flag',"; done
        echo "    '-Clink-arg=--wasm-ld-path=$tools/gcc-ld/wasm-ld',"
        echo "    '-Ctarget-feature=+simd128',"
        echo "]"
    } >"$config.$$"
    mv "$config.$$" "$config"
    echo "$config"
}

add_by_rustup() {
    command -v rustup >/dev/null || return 1
    say "asking rustup for the target $TARGET (gives up after $RUSTUP_SECONDS s)"
    log=$cache/rustup.log
    if timeout "$RUSTUP_SECONDS" rustup target add "$TARGET" >"$log" 2>&1 && toolchain_has_std; then
        say "rustup has added it"
    else
        say "rustup could not fetch it, which is fine: it is built from source instead (rustup's words: $log)"
        return 1
    fi
}

build_std() {
    work=$(mktemp -d "$cache/build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    find_library
    say "building the standard library of $release for $TARGET, about a minute"
    mkdir -p "$work/crate/src" "$work/crate/.cargo"
    echo '#![no_std]' >"$work/crate/src/lib.rs"
    printf '[package]\nname = "nothing"\nversion = "0.0.0"\nedition = "2024"\n[workspace]\n' >"$work/crate/Cargo.toml"
    cat >"$work/crate/.cargo/config.toml" <<CONFIG
[source.crates-io]
replace-with = "vendored"
[source.vendored]
directory = '$library/vendor'
CONFIG
    # Cargo builds std for a target only under its unstable flag; an own CARGO_HOME and target folder keep the
    # user's settings and caches out of it. Bitcode is what a provider's link-time optimisation needs.
    (
        cd "$work/crate"
        unset CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_TARGET CARGO_BUILD_RUSTFLAGS RUSTC_WRAPPER MAKEFLAGS CARGO_MAKEFLAGS
        RUSTC_BOOTSTRAP=1 __CARGO_TESTS_ONLY_SRC_ROOT=$library RUSTFLAGS=-Cembed-bitcode=yes \
            CARGO_HOME=$work/cargo-home CARGO_TARGET_DIR=$work/target \
            cargo build --release --offline -Z build-std=std,panic_abort,panic_unwind --target "$TARGET" >&2
    ) || fail "the standard library could not be built from $library"
    lib=$work/sysroot/lib/rustlib/$TARGET/lib
    mkdir -p "$lib"
    cp "$work/target/$TARGET/release/deps"/*.rlib "$lib/"
    rm "$lib"/libnothing-*.rlib
    sysroot=$cache/sysroot-$commit-$(cat "$lib"/* | cksum | cut -d ' ' -f 1)
    # A rename, so that a run that is cut off leaves no half of a sysroot behind.
    [ -e "$sysroot" ] || mv -T "$work/sysroot" "$sysroot"
    say "it is in $sysroot"
}

# Sets $library to a folder with the sources of exactly this compiler's standard library.
find_library() {
    if [ -n "${FLEECEBOX_RUST_LIBRARY:-}" ]; then
        say "unpacking $FLEECEBOX_RUST_LIBRARY"
        [ -f "$FLEECEBOX_RUST_LIBRARY" ] || fail "FLEECEBOX_RUST_LIBRARY: $FLEECEBOX_RUST_LIBRARY is not a file"
        mkdir "$work/sources"
        tar -xf "$FLEECEBOX_RUST_LIBRARY" -C "$work/sources" || fail "it cannot be unpacked"
    elif [ -f "$toolchain/lib/rustlib/src/rust/library/Cargo.toml" ]; then
        library=$toolchain/lib/rustlib/src/rust/library
        say "using the toolchain's sources in $library"
        return
    else
        fetch_debian_sources
    fi
    vendor=$(find "$work/sources" -type d -path '*/library/vendor' | head -n 1)
    [ -n "$vendor" ] || fail "the sources hold no folder library/vendor"
    library=$(dirname "$vendor")
}

# Asks the machine's own Debian mirror. All of apt's state is in $work, so neither rights nor changes are needed.
fetch_debian_sources() {
    how="set FLEECEBOX_RUST_LIBRARY to an archive of the compiler's folder 'library', or run 'rustup target add $TARGET'"
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
        fail "no sources of Rust $release's standard library: $how"
    apt=$work/apt
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 2>/dev/null |
        grep '/debian/*$' | head -n 1)
    [ -n "$mirror" ] || fail "no sources of Rust $release's standard library, and apt knows no Debian mirror: $how"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -f "$keyring" ] && signed="[signed-by=$keyring] " || signed=
    echo "deb $signed$mirror $DEBIAN_SUITE main" >"$apt/sources.list"
    say "fetching Debian's rust-src $release ($DEBIAN_SUITE) from this machine's mirror into the cache folder; nothing is installed"
    set -- -q -o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o Acquire::Languages=none \
        -o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false -o APT::Sandbox::User= \
        -o Debug::NoLocking=true
    apt-get "$@" update >"$apt/log" 2>&1 || { cat "$apt/log" >&2; fail "apt cannot read $DEBIAN_SUITE: $how"; }
    package=$(apt-cache "$@" madison rust-src | sed 's/ //g' | awk -F '|' -v v="$release" \
        'index($2, v "+") == 1 || index($2, v "-") == 1 { print $2; exit }')
    [ -n "$package" ] || fail "$DEBIAN_SUITE has no rust-src of version $release: $how"
    (cd "$apt" && apt-get "$@" download "rust-src=$package" >"$apt/log" 2>&1) ||
        { cat "$apt/log" >&2; fail "apt cannot download rust-src $package: $how"; }
    mkdir "$work/sources"
    dpkg-deb --fsys-tarfile "$apt"/rust-src_*.deb |
        tar -x -C "$work/sources" --wildcards '*/rustc-*/library/*' || fail "rust-src $package cannot be unpacked"
}

main
