#!/bin/sh
# Builds the guest that the end-to-end tests boot: a Debian kernel and an initramfs of busybox,
# the QEMU guest agent and our own writer. Nothing is installed and no right is needed: packages
# are fetched from the machine's own apt sources and unpacked below the cache folder.
#
# Usage: build.sh CACHE. Prints the folder that holds `vmlinuz` and `initramfs.gz`. The folder's
# name is the digest of what goes in, so a second call returns at once.
set -eu

cache=${1:?usage: build.sh CACHE}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
key=$(cat "$here/build.sh" "$here/init" "$here/writer.rs" | sha256sum | cut -c1-16)
out=$cache/guest-$key

say() { echo "guest image: $*" >&2; }
fail() { say "$*"; exit 1; }

# Test binaries run side by side: one builds, the others wait and find it done.
exec 9>"$cache/guest.lock"
flock 9
if [ -e "$out/initramfs.gz" ]; then echo "$out"; exit 0; fi

for tool in apt-get apt-cache dpkg-deb rustc cc gzip; do
    command -v "$tool" >/dev/null || fail "$tool is needed and missing"
done

work=$(mktemp -d "$cache/guest-build.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/apt/archives/partial" "$work/debs" "$work/unpacked"
# A private state: the machine's package lists may be absent or old, and are not ours to refresh.
apt_options="-qq -o Dir::State::lists=$work/lists -o Dir::Cache=$work/apt -o APT::Sandbox::User= \
    -o Debug::NoLocking=1 -o APT::Update::Post-Invoke= -o APT::Update::Post-Invoke-Success="

say "refreshing a private copy of the package lists"
# One broken source of the machine must not stop us; a package that is then missing does.
# shellcheck disable=SC2086
apt-get $apt_options update >&2 || say "some package lists could not be fetched"

# shellcheck disable=SC2086
depends() { apt-cache $apt_options depends "$@" | sed -n 's/^ *\(Pre\)\{0,1\}Depends: \([a-z0-9].*\)/\2/p' | sort -u; }
kernel=$(depends linux-image-cloud-amd64 | grep '^linux-image-' | head -n 1)
[ -n "$kernel" ] || fail "no package linux-image-cloud-amd64 in the apt sources"
libraries=$(depends qemu-guest-agent | grep '^lib')
# shellcheck disable=SC2086
libraries=$( (echo "$libraries"; depends $libraries | grep -E '^(lib|zlib)') | sort -u)

say "fetching $kernel, busybox-static, qemu-guest-agent and its libraries"
# shellcheck disable=SC2086
(cd "$work/debs" && apt-get $apt_options download $kernel busybox-static qemu-guest-agent $libraries >&2)
for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/unpacked"; done

from=$work/unpacked
busybox=$from/bin/busybox
[ -x "$busybox" ] || busybox=$from/usr/bin/busybox
root=$work/root
mkdir -p "$root/bin" "$root/dev" "$root/proc" "$root/sys" "$root/run" "$root/lib" "$root/lib64" \
    "$root/disk/a" "$root/disk/b" "$root/modules"
cp "$busybox" "$root/bin/busybox"
cp "$here/init" "$root/init"
chmod 755 "$root/init"

say "compiling the writer"
rustc --edition 2024 -O -C target-feature=+crt-static -C strip=symbols \
    -o "$root/bin/writer" "$here/writer.rs" >&2

# The agent's libraries, as its own dynamic loader finds them in what was unpacked.
agent=$from/usr/sbin/qemu-ga
[ -x "$agent" ] || agent=$from/usr/bin/qemu-ga
loader=$(find "$from" -name 'ld-linux-x86-64.so.2' | head -n 1)
search=$(find "$from" -type d -name 'x86_64-linux-gnu' | tr '\n' ':')
"$loader" --inhibit-cache --library-path "$search" --list "$agent" >"$work/libraries"
if grep 'not found' "$work/libraries" >&2; then fail "the guest agent lacks these libraries"; fi
sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' "$work/libraries" | while read -r library; do
    case $library in
        "$from"/*) cp -L "$library" "$root/lib/" ;;
        */ld-linux-*) ;;
        *) fail "the guest agent would take $library from this machine" ;;
    esac
done
cp -L "$loader" "$root/lib64/ld-linux-x86-64.so.2"
cp "$agent" "$root/bin/qemu-ga"

# Modules in the order in which they must be inserted, each after what it depends on.
modules=$(find "$from" -type d -path '*/modules/*' -name kernel | head -n 1)
modules=${modules%/kernel}
version=$(basename "$modules")
depends_of() {
    name=$(basename "$1"); name=${name%%.ko*}
    grep -qx "$name" "$work/seen" && return 0
    echo "$name" >>"$work/seen"
    # A module names what it needs in its own `depends=` field.
    for needed in $(unpack_module "$1" | tr '\0' '\n' | sed -n 's/^depends=//p' | tr ',' ' '); do
        found=$(find_module "$needed")
        [ -z "$found" ] || (depends_of "$found")
    done
    unpack_module "$1" >"$root/modules/$name.ko"
    echo "$name" >>"$root/modules/order"
}
# File names and the names in `depends=` mix '-' and '_'.
find_module() {
    pattern=$(echo "$1" | sed 's/[-_]/[-_]/g')
    find "$modules" -name "$pattern.ko" -o -name "$pattern.ko.xz" | head -n 1
}
unpack_module() { case $1 in *.xz) xz -dc "$1" ;; *) cat "$1" ;; esac; }
: >"$work/seen"
# The checksum of ext4 is asked for by name at mount time, so `depends=` does not list it.
for wanted in virtio_pci virtio_blk virtio_scsi sd_mod virtio_console crc32c_generic ext4; do
    found=$(find_module "$wanted")
    # What is built into the kernel has no file.
    if [ -n "$found" ]; then
        depends_of "$found"
    else
        grep -q "/$wanted.ko" "$modules/modules.builtin" || fail "$version has no module $wanted"
    fi
done

say "packing"
mkdir "$work/result"
cp "$from/boot/vmlinuz-$version" "$work/result/vmlinuz"
(cd "$root" && find . | "$busybox" cpio -o -H newc 2>/dev/null | gzip -9) >"$work/result/initramfs.gz"
mv "$work/result" "$out"
say "built $(du -sh "$out" | cut -f1) of kernel $version"
echo "$out"
