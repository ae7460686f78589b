#!/bin/bash
# Usage: lvm-inside.sh FLEECEFS MODULES
# The part of lvm.sh that runs in its guest, as root and alone there. The guest's first disk is made
# a volume group. MODULES is a folder with the kernel's modules.
set -euo pipefail
fleecefs=$1 modules=$2 work=/run/proof size=16 grown=24 lv=''
# shellcheck source=sequence.sh
. "$(dirname "$0")/sequence.sh"

disk_options() { printf 'driver=host_device,filename=/dev/vg/%s' "$lv"; }
disk_resize() { lvresize -q -q -f -y -L "$1m" "vg/$lv" >/dev/null 2>&1; }
disk_contents() { dd if="/dev/vg/$lv" of="$1" bs=1M status=none; }

# There is no udev here: lvm2 makes its device nodes by itself.
volume_group() {
    modprobe -d "$modules" -a dm_mod dm_snapshot dm_thin_pool fuse loop ext4
    cat >/etc/lvm/lvmlocal.conf <<'CONF'
activation { udev_sync=0 udev_rules=0 monitoring=0 }
global { thin_check_executable="" }
devices { obtain_device_list_from_udev=0 use_devicesfile=0 }
CONF
    lvm vgcreate -q -q vg /dev/vda
    lvm lvcreate -q -q -y -W y -n plain -L "${size}m" vg
    lvm lvcreate -q -q -y --type thin-pool -n pool -L 128m vg
    lvm lvcreate -q -q -y --thinpool vg/pool -n thin -V "${size}m"
    lvm lvcreate -q -q -y -n back -L "${grown}m" vg
    lvm lvcreate -q -q -y --thinpool vg/pool -n thinback -V "${grown}m"
    lvm lvcreate -q -q -y -n parts -L "${size}m" vg
    # What the plain volume will grow into is full of other bytes.
    lvm lvcreate -q -q -y -n gone -L "${size}m" vg
    fill gone "$size"
    lvm lvremove -q -q -y vg/gone
}

# fill LV MIB
fill() { dd if=/dev/zero bs=1M count="$2" status=none | tr '\0' U | dd of="/dev/vg/$1" bs=1M status=none oflag=direct iflag=fullblock; }

# restored LV: the newest point onto another volume, which is full of other bytes.
restored() {
    local got=equal
    fill "$1" "$grown"
    if "$fleecefs" restore "$work/backups" "$(newest)" "/dev/vg/$1" --yes --discard >"$work/said" 2>&1; then
        cmp -n "$((grown << 20))" "/dev/vg/$1" "/dev/vg/$lv" >"$work/said" 2>&1 || got='differs'
    else
        got=failed
    fi
    [ "$got" = equal ] || cat "$work/said"
    row "restore onto /dev/vg/$1 with --discard" equal "$got"
}

# A volume with a partition table: the point's partitions are found, and a file system is mounted.
partitions() {
    local loop got='' point image=$work/parts.raw
    printf '%s\n' "--- a volume with partitions"
    # The state folder knows the target that was here.
    rm -rf "${work:?}/backups" "$work/state"
    mkdir -p "$work/backups" "$work/files" "$work/fs"
    seq 100000 >"$work/files/numbers"
    truncate -s "${size}M" "$image"
    printf 'label: gpt\nstart=1MiB, size=8MiB, type=linux\nstart=9MiB, size=%dMiB, type=linux\n' $((size - 10)) | sfdisk --quiet "$image"
    mke2fs -q -t ext4 -E offset=$((9 << 20)) -d "$work/files" "$image" $((size - 10))M
    dd if="$image" of=/dev/vg/parts bs=1M status=none
    lv=parts
    start_daemon
    good "full" full "FULL, equal"
    write "write -P 1 1M 1M"
    good "inc" inc "INC, equal"
    sequence_end_daemon
    "$fleecefs" mount "$work/backups" "$work/mnt"
    point=$(mounted "$(newest)")
    loop=$(losetup --read-only --partscan --find --show "$point")
    row "losetup -P finds its partitions" "2 partitions" "$(find /dev -name "${loop##*/}p*" | wc -l) partitions"
    mount -o ro,noload "${loop}p2" "$work/fs" && got=$(cmp "$work/fs/numbers" "$work/files/numbers" && echo same)
    row "ext4 on the second is mounted, a file in it" same "$got"
    umount "$work/fs"
    losetup -d "$loop"
    "$fleecefs" umount "$work/mnt"
}

mkdir -p "$work"
trap sequence_clean_up EXIT
volume_group
echo "$(uname -sr), $(lvm version | sed -n 's/ *LVM version: *//p'), $(qemu-storage-daemon --version | head -n 1)"
lv=plain
sequence "a logical volume"
restored back
lv=thin
sequence "a thin volume"
restored thinback
partitions
[ "$bad" = 0 ]
