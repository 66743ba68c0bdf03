#!/bin/sh
# Runs libvirtd where nothing of the machine's own is touched: in namespaces of its own (unshare --mount --pid --net --ipc
# --fork --kill-child), with what was unpacked laid over /usr and /etc, and /run and /var that go with it.
#
# Usage: run.sh UNPACKED FOLDER. UNPACKED is what build.sh prints; the sockets are in FOLDER/run.
set -eu
unpacked=${1:?usage: run.sh UNPACKED FOLDER}
folder=${2:?usage: run.sh UNPACKED FOLDER}

cd "$folder"
mount --make-rprivate /
# In memory: not every file system can be written to through an overlay.
mkdir layers
mount -t tmpfs tmpfs layers
lay() {
    mkdir -p "layers/$1/upper" "layers/$1/work"
    mount -t overlay overlay "/$1" \
        -o "lowerdir=$2,upperdir=$folder/layers/$1/upper,workdir=$folder/layers/$1/work"
}
lay usr "$unpacked/usr:/usr"
lay etc "$unpacked/etc:/etc"
lay var /var
mount -t tmpfs tmpfs /run
mount -t proc proc /proc
# It may lie below one of those.
mkdir -p "$folder"
mount --bind . "$folder"
# Where KVM does not work, each look at it takes a minute. Nobody may open what stands in its place: by what can be opened
# libvirt believes in KVM, and asks QEMU again for all that it can do whenever it needs to know.
: >layers/none
chmod 000 layers/none
[ ! -e /dev/kvm ] || mount --bind layers/none /dev/kvm
ldconfig

mkdir -p /var/lib/libvirt/qemu /var/log/libvirt/qemu /var/cache/libvirt run
# As Debian's package makes it.
grep -q '^libvirt-qemu:' /etc/passwd || {
    echo "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin" >>/etc/passwd
    echo "libvirt-qemu:x:64055:" >>/etc/group
}
chmod 711 .
cat >/etc/libvirt/libvirtd.conf <<END
unix_sock_dir = "$folder/run"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_filters = "1:qemu.qemu_agent"
log_outputs = "1:file:$folder/agent.log 2:stderr"
END
cat >/etc/libvirt/qemu.conf <<END
security_driver = "none"
cgroup_controllers = [ ]
namespaces = [ ]
stdio_handler = "file"
END
# Not in the place of this shell, which waits for children that nobody else does. One that ends is started again after
# a moment, as a service is: its QEMUs go on meanwhile.
while :; do
    libvirtd &
    wait $! || :
    sleep 1
done
