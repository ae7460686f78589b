#!/bin/bash
# Usage: recovery-inside.sh FLEECEFS MODULES
# The part of recovery.sh that runs in its guest, as root and alone there, so that the paths of the page can be used as they
# are written. The guest's first disk is the "host's": a volume group that is in use.
set -euo pipefail
fleecefs=$1 modules=$2 work=/run/proof bad=0
page=$(dirname "$0")/../doc/recovery.md

row() {
    local verdict=ok
    [ "$2" = "$3" ] || { verdict=DIFFERS && bad=1; }
    printf '%-70s %s\n' "$1" "$verdict"
    [ "$verdict" = ok ] || diff <(echo "$2") <(echo "$3") | sed 's/^/    /' || true
}

# block FIRST-WORDS: the indented lines of the page that begin with a line of these words.
block() {
    local lines
    lines=$(awk -v first="    $1" 'index($0, first) == 1 { on = 1 } on && !/^    / { exit } on { print substr($0, 5) }' "$page")
    [ -n "$lines" ] || { echo "the page has no '$1'" >&2 && exit 1; }
    printf '%s\n' "$lines"
}

# line WORDS: the commands in backticks on the page that begin with these words.
line() {
    local found
    found=$(grep -o "\`$1[^\`]*\`" "$page" | head -n 1 | tr -d '\`')
    [ -n "$found" ] || { echo "the page has no '$1'" >&2 && exit 1; }
    printf '%s\n' "$found"
}

# looked COMMANDS: runs them, with a look into /view before it is unmounted.
looked() {
    local commands=${1//umount \/view/cat \/view\/file; umount \/view}
    (set -e && eval "$commands") 2>&1 || echo "failed: $?"
}

start() {
    echo 1 >/proc/sys/kernel/printk
    modprobe -d "$modules" -a dm_mod dm_crypt xts aes_generic sha256_generic algif_skcipher fuse loop ext4 2>/dev/null || true
    /lib/systemd/systemd-udevd --daemon 2>/dev/null && udevadm trigger && udevadm settle
    ln -sf "$fleecefs" /usr/local/sbin/fleecefs
    ln -sfn /proc/self/fd /dev/fd
}

host() {
    lvm vgcreate -q -q vg /dev/vda
    lvm lvcreate -q -q -y -n root -L 64m vg
    mkfs.ext4 -q /dev/vg/root
}

# settings DEVICE: LVM sees this device alone, as the page has it.
settings() {
    rm -rf "$work/lvm"
    cp -r /etc/lvm "$work/lvm"
    local said
    said=$(grep -o 'filter=\[[^`]*\]' "$page")
    said=${said//\/dev\/loop3p2/$1}
    printf 'devices {\n%s\nglobal_%s\nuse_devicesfile=0\n}\n' "$said" "$said" >"$work/lvm/lvm.conf"
    export LVM_SYSTEM_DIR=$work/lvm
}

# A file system on DEVICE with a file that says WHAT, and a journal that is to be replayed.
filled() {
    mkfs.ext4 -q "$1"
    mkdir -p "$work/fs"
    mount "$1" "$work/fs"
    echo "$2" >"$work/fs/file"
    umount "$work/fs"
}

# The disk of a VM: a file system, a volume group of the host's name, and LUKS.
guest() {
    local disk=$work/disk loop
    truncate -s 160M "$disk"
    printf 'label: gpt\nsize=40M\nsize=60M\nsize=+\n' | sfdisk -q "$disk"
    loop=$(losetup -P -f --show "$disk")
    udevadm settle
    filled "${loop}p1" plain
    settings "${loop}p2"
    lvm vgcreate -q -q vg "${loop}p2"
    lvm lvcreate -q -q -y -n root -l 100%FREE vg
    filled /dev/vg/root volume
    lvm vgchange -q -q -an vg
    unset LVM_SYSTEM_DIR
    printf secret >"$work/key"
    cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "${loop}p3" "$work/key"
    cryptsetup open --key-file "$work/key" "${loop}p3" inner
    filled /dev/mapper/inner secret
    cryptsetup close inner
    losetup -d "$loop"
    mkdir -p /backups/vm1/sda.qcow2
    qemu-img convert -f raw -O qcow2 "$disk" /backups/vm1/sda.qcow2/FULL-1706260639-sda.qcow2
    rm "$disk"
    udevadm settle
}

state() {
    dmsetup table | sort
    losetup -n -O NAME,BACK-FILE
    grep -v proof /proc/mounts
    lvm vgs --noheadings -o vg_name,vg_uuid,lv_count | sort
}

by_hand() {
    local before writable open device
    before=$(state)
    row "a file system without its journal" plain "$(looked "$(block 'mkdir -p /mnt/points /view')" | tail -n 1)"
    row "the host is as before" "$before" "$(state)"
    writable=$(block 'fleecefs mount --writable /backups/vm1 /mnt/points')
    row "a file system with its journal" plain "$(looked "$writable" | tail -n 1)"
    row "the host is as before" "$before" "$(state)"

    eval "$(head -n 2 <<<"$writable")"
    udevadm settle
    device=${L}p2
    settings "$device"
    open=$(block 'lvm vgimportclone')
    row "a group of the host's own name" volume "$(looked "${open//\/dev\/loop3p2/$device}" | grep -x volume)"
    unset LVM_SYSTEM_DIR

    open=$(line 'cryptsetup open')
    open=${open//\/dev\/loop3p2/${L}p3}
    open=${open//FILE/$work/key}
    eval "${open//NAME/guest}"
    mount -o ro,noload /dev/mapper/guest /view
    row "LUKS" secret "$(cat /view/file)"
    umount /view
    eval "$(line 'cryptsetup close' | sed 's/NAME/guest/')"
    eval "$(grep -o 'losetup -d .*' <<<"$writable")"
    udevadm settle
    row "the host is as before" "$before" "$(state)"
}

mkdir -p "$work"
start
# (The kernel has one group of a name at a time.)
guest
host
by_hand
[ "$bad" = 0 ]
