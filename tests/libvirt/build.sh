#!/bin/sh
# Unpacks libvirt for the tests that run one of their own: the daemon, its QEMU driver, virsh and the libraries that this
# machine lacks. Nothing is installed, so that no libvirt of the system's starts, and no right is needed: packages are
# fetched from the Debian mirror of the machine's own apt sources, the newest that its release and its backports have.
#
# Usage: build.sh CACHE. Prints the folder, with a `usr` to be laid over that of the machine. Its name is the digest of
# this script and of the libraries that the machine lacked, so a second call returns at once.
set -eu

cache=${1:?usage: build.sh CACHE}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

say() { echo "libvirt: $*" >&2; }
fail() {
    say "$*"
    exit 1
}

# One unpacks, the others wait and find it done.
exec 9>"$cache/libvirt.lock"
flock 9
for tool in apt-get apt-cache dpkg-deb; do
    command -v "$tool" >/dev/null || fail "there is no $tool"
done
key=$( (cat "$here/build.sh" && ls /usr/lib/x86_64-linux-gnu) | sha256sum | cut -c1-16)
out=$cache/libvirt-$key
if [ -e "$out" ]; then echo "$out"; exit 0; fi

work=$(mktemp -d "$cache/libvirt-build.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
mkdir -p "$work/sources" "$work/lists/partial" "$work/apt/archives/partial" "$work/debs" "$work/unpacked"
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep '/debian/*$' | head -n 1)
[ -n "$mirror" ] || fail "apt knows no Debian mirror"
release=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -f "$keyring" ] && signed="[signed-by=$keyring] " || signed=
for suite in "$release" "$release-updates" "$release-backports"; do
    echo "deb $signed$mirror $suite main"
done >"$work/sources/debian.list"
apt() {
    command=$1
    shift
    "apt-$command" -qq -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$work/sources" \
        -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/apt" -o APT::Sandbox::User= -o Debug::NoLocking=1 \
        -o Acquire::Languages=none -o APT::Update::Post-Invoke= -o APT::Update::Post-Invoke-Success= "$@"
}
say "reading a private copy of the package lists"
apt get update >&2 || say "some package lists could not be fetched"

packages="libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients libvirt0"
# Newer releases have these apart; memory is saved by a helper in the second.
for package in libvirt-common libvirt-daemon-common; do
    [ -z "$(apt cache madison $package)" ] || packages="$packages $package"
done
newest=
for package in $packages; do
    version=$(apt cache madison "$package" | cut -d '|' -f 2 | tr -d ' ' | sort -V | tail -n 1)
    [ -n "$version" ] || fail "there is no package $package in the apt sources"
    newest="$newest $package=$version"
done
# shellcheck disable=SC2086
libraries=$(apt get -s install --no-install-recommends $newest | sed -n 's/^Inst \(lib[^ ]*\) (.*/\1/p' | grep -v '^libvirt')
say "fetching$newest and what it needs"
# shellcheck disable=SC2086
(cd "$work/debs" && apt get download $newest $libraries >&2) || fail "apt cannot fetch them"
for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/unpacked"; done
# Where the machine has /lib and /sbin as links into /usr, so must what is laid over it.
for top in bin sbin lib lib64; do
    [ -d "$work/unpacked/$top" ] || continue
    mkdir -p "$work/unpacked/usr/$top"
    cp -a "$work/unpacked/$top/." "$work/unpacked/usr/$top/"
    rm -r "${work:?}/unpacked/$top"
done
chmod 755 "$work/unpacked"
mv "$work/unpacked" "$out"
say "unpacked $(du -sh "$out" | cut -f1)"
echo "$out"
