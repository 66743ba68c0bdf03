#!/bin/sh
# Unpacks the QEMU of an older Debian beside the machine's own, installs nothing, and prints the folder where its
# programs are. What was unpacked is kept.
#
#   tests/setup/older-qemu.sh bullseye|bookworm
#
# bookworm has 7.2, the oldest that is supported; bullseye has 5.2, which cannot do what is needed.
set -eu

release=$1
case "$release" in
bullseye) packages="qemu-utils qemu-system-common liburing1" ;;
bookworm) packages="qemu-utils qemu-system-common qemu-system-x86 liburing2" ;;
*) echo "usage: $0 bullseye|bookworm" >&2 && exit 2 ;;
esac
cache=${FLEECEBOX_CACHE:-.cache}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
done=$cache/qemu-of-$release
if [ -d "$done" ]; then
    echo "$done"
    exit
fi

apt=$(mktemp -d)
trap 'rm -rf "$apt"' EXIT
trap 'exit 1' HUP INT TERM
mkdir -p "$apt/sources" "$apt/lists/partial" "$apt/root"
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep '/debian/*$' | head -n 1)
[ -n "$mirror" ] || { echo "apt knows no Debian mirror to ask for $release" >&2 && exit 1; }
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release main" >"$apt/sources/older.list"

# apt with this release alone, as if nothing were installed; neither its lists nor its caches are the machine's.
older() {
    apt-get -q -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$apt/sources" \
        -o "Dir::State::Lists=$apt/lists" -o Dir::State::status=/dev/null -o "Dir::Cache=$apt" \
        -o APT::Sandbox::User= -o APT::Update::Post-Invoke= -o APT::Update::Post-Invoke-Success= "$@" >&2
}
older update
(
    cd "$apt"
    # shellcheck disable=SC2086
    older download $packages
    for package in ./*.deb; do
        dpkg-deb -x "$package" root
    done
)
mv "$apt/root" "$done.$$"
# Of two that unpack at once, one comes first.
mv -T "$done.$$" "$done" 2>/dev/null || rm -rf "$done.$$"
echo "$done"
