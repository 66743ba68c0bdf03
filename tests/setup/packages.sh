#!/bin/sh
# Sees to the programs that are run beside Fleecebox, and installs what is missing from Debian's packages.
#
#   tests/setup/packages.sh demo|demo-vm|test|bench
#
# What is there already is left alone, whoever installed it. What is missing is named first and then installed, if
# this runs as root; else the command to type is printed, and the exit code is 1. Apt's sources and package lists are
# not changed: where Debian's stable QEMU is too old, the one from its backports is found through lists of our own.
set -eu

# The oldest QEMU that the tests were run with.
QEMU_VERSION=10.0

say() { echo "packages: $*" >&2; }
fail() {
    say "error: $*"
    exit 1
}

# Debian keeps mkfs and fsck out of a user's PATH.
PATH=$PATH:/usr/sbin:/sbin

# What all commands run besides, though Debian's installer or git mostly brought it: certificates for cargo, and what
# unpacks archives for the wasm target's standard library.
always="ca-certificates xz-utils e2fsprogs qemu-utils"

# What builds providers in C, Python and JavaScript; the last two fetch the rest by themselves.
languages="clang-19 lld-19 libclang-rt-19-dev-wasm32 wasi-libc python3-venv nodejs npm"

main() {
    case "${1:-}" in
    demo) wanted="$always" ;;
    demo-vm) wanted="$always qemu-system-x86" ;;
    test) wanted="$always qemu-system-x86 mount libnbd-bin zstd exfatprogs exfat-fuse docker-registry skopeo $languages" ;;
    bench) wanted="$always libnbd-bin zstd $languages" ;;
    *) fail "usage: $0 demo|demo-vm|test|bench" ;;
    esac
    missing=
    for package in $wanted; do
        has "$package" || missing="$missing $package"
    done
    [ -n "$missing" ] || exit 0

    say "missing or too old:$missing"
    command -v apt-get >/dev/null ||
        fail "this machine has no apt-get; install what Debian calls$missing (QEMU $QEMU_VERSION or newer)"
    [ "$(id -u)" = 0 ] || fail "installing needs root; type: sudo $0 $1"
    # shellcheck disable=SC2086
    install_packages $missing
    for package in $missing; do
        has "$package" || fail "$package is installed, and its programs are still missing or too old"
    done
}

has() {
    case "$1" in
    qemu-utils) new_enough qemu-img && new_enough qemu-storage-daemon && command -v qemu-io && command -v qemu-nbd ;;
    qemu-system-x86) new_enough qemu-system-x86_64 ;;
    ca-certificates) test -f /etc/ssl/certs/ca-certificates.crt ;;
    xz-utils) command -v xz ;;
    mount) command -v mount && command -v losetup ;;
    e2fsprogs) command -v mkfs.ext4 && command -v e2fsck && command -v debugfs ;;
    libnbd-bin) command -v nbdcopy && command -v nbdinfo ;;
    zstd) command -v zstd ;;
    exfatprogs) command -v mkfs.exfat ;;
    exfat-fuse) command -v mount.exfat-fuse ;;
    docker-registry) command -v docker-registry ;;
    skopeo) command -v skopeo ;;
    clang-19) command -v clang-19 ;;
    lld-19) command -v wasm-ld-19 ;;
    libclang-rt-19-dev-wasm32) test -f "$(clang-19 --target=wasm32-wasi -print-libgcc-file-name 2>/dev/null)" ;;
    wasi-libc) test -f "$(clang-19 --target=wasm32-wasi -print-file-name=libc.a 2>/dev/null)" ;;
    python3-venv) python3 -c 'import ensurepip, venv, tomllib' 2>&1 ;;
    nodejs) command -v node ;;
    npm) command -v npm ;;
    esac >/dev/null
}

# "qemu-img version 10.0.2 (...)" and "QEMU emulator version 10.0.2 (...)"
new_enough() {
    command -v "$1" >/dev/null &&
        at_least "$("$1" --version | sed -n '1s/.*version \([0-9.]*\).*/\1/p')"
}

at_least() {
    [ "$(printf '%s\n' "$QEMU_VERSION" "$1" | sort -V | head -n 1)" = "$QEMU_VERSION" ]
}

install_packages() {
    apt=$(mktemp -d)
    trap 'rm -rf "$apt"' EXIT
    trap 'exit 1' HUP INT TERM
    mkdir -p "$apt/sources" "$apt/lists/partial"
    for source in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        [ -f "$source" ] && cp "$source" "$apt/sources/"
    done
    say "reading the package lists of this machine's apt sources"
    update_lists
    release=
    for package in "$@"; do
        case "$package" in
        qemu-*) choose_qemu "$package" ;;
        esac
    done
    say "installing:$(printf ' %s' "$@")${release:+ (from $release)}"
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt install -y --no-install-recommends ${release:+-t $release} "$@" >&2 ||
        fail "apt-get could not install them"
}

# Sets $release to Debian's backports if what the plain release has of this package of QEMU's is too old. Each is asked
# for: where one came from the backports already, its own candidate is new, and that of the others is not.
choose_qemu() {
    [ -z "$release" ] || return 0
    candidate=$(apt policy "$1" | sed -n 's/^ *Candidate: *\([0-9]*:\)\{0,1\}\([0-9.]*\).*/\2/p')
    at_least "${candidate:-0}" && return
    release=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)-backports
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep '/debian/*$' | head -n 1)
    [ -n "$mirror" ] || fail "QEMU $QEMU_VERSION or newer is needed, and apt knows no Debian mirror to ask for $release"
    say "this release's $1 is ${candidate:-missing}; asking for $release"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -f "$keyring" ] && signed="[signed-by=$keyring] " || signed=
    echo "deb $signed$mirror $release main" >"$apt/sources/backports-for-qemu.list"
    update_lists
    apt policy "$1" | grep -q "$release" || fail "$release has no $1"
}

# A source that cannot be read must not stop us; a package that is then missing does.
update_lists() {
    apt update >"$apt/log" 2>&1 || {
        cat "$apt/log" >&2
        say "some package lists could not be read"
    }
}

# apt with our own sources and lists, and the machine's own database of what is installed.
apt() {
    command=apt-get
    [ "$1" = policy ] && command=apt-cache
    "$command" -q -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$apt/sources" \
        -o "Dir::State::Lists=$apt/lists" -o APT::Sandbox::User= -o APT::Update::Post-Invoke= \
        -o APT::Update::Post-Invoke-Success= "$@"
}

main "$@"
