#!/bin/sh
# Runs a command of the README's in a fresh Debian 12, made by debootstrap, in a new checkout of this one's last commit.
#
#   tests/setup/fresh.sh STATE COMMAND…        tests/setup/fresh.sh utils-from-backports make test
#
# STATE is what it has beside git, make, cc and this machine's Rust:
#
#   nothing               no more
#   stable                Debian 12's own QEMU, which is too old
#   utils-from-backports  qemu-utils of its backports alone
#   backports             these and qemu-system-x86
#   user                  nothing, and the command is an unprivileged user's: where it fails, root does first what
#                         tests/setup/packages.sh does for it, and then it has to pass
#
# It needs root, debootstrap, and a kernel with overlayfs. All processes and mounts go with it, and its folder too. It
# uses Rust, cargo's registry and what was built in the target folder, and changes none of them. All of these have the
# paths there that they have here, and files their times: cargo builds anew what has moved or is younger.
#
# Environment:
#   FLEECEBOX_CACHE   holds the fresh Debian and what is run in it; .cache in the checkout unless set.
#   CARGO_TARGET_DIR  spares compiling dependencies where it has been built; target in the checkout unless set.
set -eu

SUITE=bookworm

say() { echo "fresh: $*" >&2; }
fail() {
    say "error: $*"
    exit 1
}

checkout=$(cd "$(dirname "$0")/../.." && pwd)
cache=${FLEECEBOX_CACHE:-$checkout/.cache}/fresh
built=${CARGO_TARGET_DIR:-$checkout/target}
cargo=${CARGO_HOME:-$HOME/.cargo}
rustup=${RUSTUP_HOME:-$HOME/.rustup}
PATH=$PATH:/usr/sbin:/sbin

main() {
    [ $# -ge 2 ] || fail "usage: $0 nothing|stable|utils-from-backports|backports|user COMMAND…"
    state=$1
    shift
    case $state in nothing | stable | utils-from-backports | backports | user) ;; *) fail "there is no state $state" ;; esac
    [ "$(id -u)" = 0 ] || fail "a fresh system needs root"
    command -v debootstrap >/dev/null || fail "there is no debootstrap; type: apt-get install debootstrap"
    mkdir -p "$cache"
    cache=$(cd "$cache" && pwd)
    [ -d "$built" ] && built=$(cd "$built" && pwd) || built=
    # With these namespaces all that is mounted and all that runs goes, however this ends.
    [ -n "${FLEECEBOX_FRESH_ROOT:-}" ] || {
        FLEECEBOX_FRESH_ROOT=$(mktemp -d "$cache/root.XXXXXX")
        export FLEECEBOX_FRESH_ROOT
        trap 'rm -rf --one-file-system "$FLEECEBOX_FRESH_ROOT"' EXIT
        trap 'exit 1' HUP INT TERM
        code=0
        unshare --mount --pid --fork --kill-child -- "$0" "$state" "$@" || code=$?
        exit $code
    }
    root=$FLEECEBOX_FRESH_ROOT/root
    make_base
    say "a fresh Debian 12, with $state"
    cp -a --reflink=auto "$cache/base" "$root"
    mount_all
    prepare
    run "$@"
}

make_base() {
    exec 9>"$cache/base.lock"
    flock 9
    [ ! -d "$cache/base" ] || return 0
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep '/debian/*$' | head -n 1)
    [ -n "$mirror" ] || fail "apt knows no Debian mirror"
    say "making it by debootstrap, once"
    rm -rf "$cache/base.new"
    debootstrap "$SUITE" "$cache/base.new" "$mirror" >"$cache/log" || fail "debootstrap failed: $cache/log"
    echo "deb $mirror $SUITE-updates main" >>"$cache/base.new/etc/apt/sources.list"
    # How this machine's apt comes to its mirror, through a proxy for example.
    apt-config dump Acquire >"$cache/base.new/etc/apt/apt.conf.d/00this-machine"
    install -m 644 /etc/resolv.conf "$cache/base.new/etc/resolv.conf"
    # Certificates that this machine's administrator has added hold for its networks.
    mkdir -p "$cache/base.new/usr/local/share/ca-certificates"
    cp /usr/local/share/ca-certificates/*.crt "$cache/base.new/usr/local/share/ca-certificates/" 2>/dev/null || :
    inside "$cache/base.new" apt-get install -y git make gcc
    mv "$cache/base.new" "$cache/base"
}

# A command there, whose output only matters where it fails.
inside() {
    in=$1
    shift
    chroot "$in" env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@" \
        >"$FLEECEBOX_FRESH_ROOT/log" 2>&1 || {
        cat "$FLEECEBOX_FRESH_ROOT/log" >&2
        fail "$*"
    }
}

# Shows a folder of this machine's. What is written over it goes into a folder beside the root.
over() {
    mkdir -p "$FLEECEBOX_FRESH_ROOT/$2/upper" "$FLEECEBOX_FRESH_ROOT/$2/work" "$root$1"
    mount -t overlay overlay "$root$1" \
        -o "lowerdir=$1,upperdir=$FLEECEBOX_FRESH_ROOT/$2/upper,workdir=$FLEECEBOX_FRESH_ROOT/$2/work"
}

# The last commit's files; those that the checkout has unchanged are as old as there.
check_out() {
    git clone -q "$checkout" "$root$checkout"
    git -C "$checkout" ls-files -z | (cd "$root$checkout" && xargs -0 sh -c '
        here=$1
        shift
        for file; do ! cmp -s "$here/$file" "$file" || touch -c -r "$here/$file" "$file"; done' sh "$checkout")
}

# Lets anybody come to a folder, as home folders do not.
open_way_to() {
    way=$1
    while [ "$way" != / ]; do
        way=$(dirname "$way")
        chmod a+x "$root$way"
    done
}

mount_all() {
    mount --make-rprivate /
    # As the root of a machine is: what unshares its mounts there asks for a mount point.
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    over "$rustup" rustup
    mkdir -p "$root$cargo"
    for part in bin registry; do
        [ ! -d "$cargo/$part" ] || over "$cargo/$part" "cargo-$part"
    done
    check_out
    [ -z "$built" ] || over "$built" target
    for folder in "$rustup" "$cargo" "$checkout"; do open_way_to "$folder"; done
    if [ -n "${FLEECEBOX_RUST_LIBRARY:-}" ]; then
        install -D -m 644 "$FLEECEBOX_RUST_LIBRARY" "$root/opt/rust/${FLEECEBOX_RUST_LIBRARY##*/}"
    fi
}

prepare() {
    case $state in
    stable) inside "$root" apt-get install -y --no-install-recommends qemu-utils qemu-system-x86 ;;
    utils-from-backports | backports)
        backports=$SUITE-backports
        sed -n "s/ $SUITE main/ $backports main/p" "$root/etc/apt/sources.list" >"$root/etc/apt/sources.list.d/backports.list"
        inside "$root" apt-get update
        [ "$state" = backports ] && system=qemu-system-x86 || system=
        inside "$root" apt-get install -y --no-install-recommends -t "$backports" qemu-utils $system
        # Left there, the machine's own sources would have the backports: each state must do without.
        rm "$root/etc/apt/sources.list.d/backports.list"
        ;;
    user)
        inside "$root" useradd --uid 1000 --create-home --shell /bin/sh user
        # All but files of this machine's, which would be copied.
        find "$root$checkout" -path "$root$built" -prune -o -exec chown -h 1000:1000 {} +
        find ${built:+"$root$built"} "$root$cargo" \( -type d -o -name '.*lock' -o -name '.package-cache*' \) -exec chown 1000:1000 {} +
        ;;
    esac
}

# As whom, and then the command.
there() {
    if [ "$1" = user ]; then home=/home/user as="setpriv --reuid=user --regid=user --init-groups"; else home=/root as=; fi
    shift
    set -- chroot "$root" $as env -i "HOME=$home" TERM=dumb "RUSTUP_HOME=$rustup" "CARGO_HOME=$cargo" \
        ${built:+"CARGO_TARGET_DIR=$built"} "PATH=$cargo/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
        ${http_proxy:+"http_proxy=$http_proxy"} ${https_proxy:+"https_proxy=$https_proxy"} \
        ${no_proxy:+"no_proxy=$no_proxy"} ${PIP_CERT:+"PIP_CERT=$PIP_CERT"} \
        ${NODE_EXTRA_CA_CERTS:+"NODE_EXTRA_CA_CERTS=$NODE_EXTRA_CA_CERTS"} \
        ${FLEECEBOX_RUST_LIBRARY:+"FLEECEBOX_RUST_LIBRARY=/opt/rust/${FLEECEBOX_RUST_LIBRARY##*/}"} \
        sh -c 'cd "$1" && shift && exec "$@"' sh "$checkout" "$@"
    "$@"
}

run() {
    if [ "$state" != user ]; then
        there root "$@"
        return
    fi
    there user "$@" && return
    say "root does what it printed"
    case "$*" in *bench*) for_what=bench ;; *demo-vm*) for_what=demo-vm ;; *demo*) for_what=demo ;; *) for_what=test ;; esac
    there root tests/setup/packages.sh "$for_what"
    there user "$@"
}

main "$@"
