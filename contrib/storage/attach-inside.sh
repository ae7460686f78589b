#!/bin/bash
# Usage: attach-inside.sh FLEECEFS MODULES
# The part of attach.sh that runs in its guest, as root and alone there. The guest's first disk is the "host's": a volume
# group that is in use. MODULES is a folder with the kernel's modules.
set -euo pipefail
fleecefs=$1 modules=$2 work=/run/proof bad=0

row() {
    local verdict=ok
    [ "$2" = "$3" ] || { verdict=DIFFERS && bad=1; }
    printf '%-70s %s\n' "$1" "$verdict"
    [ "$verdict" = ok ] || diff <(echo "$2") <(echo "$3") | sed 's/^/    /' || true
}

# What the host has: volumes and their tables, loop devices, mounts, links by UUID.
state() {
    dmsetup table | sort
    losetup -n -O NAME,BACK-FILE
    grep -v fleecefs-proof /proc/mounts
    find /dev/disk/by-uuid -type l -printf '%f %l\n' 2>/dev/null | sort
    vgs --noheadings -o vg_name,vg_uuid,lv_count 2>/dev/null | sort
    find /etc/lvm /run/udev/rules.d -type f -exec sha256sum {} + 2>/dev/null | sort
    ls -d /dev/fleecefs_* 2>/dev/null || true
}

# point DISK FILE: a FULL of a raw image, all of one run's time.
point() {
    mkdir -p "$work/backups/$1"
    qemu-img convert -f raw -O qcow2 "$2" "$work/backups/$1/FULL-1706260639-$1.qcow2"
}

fresh() {
    rm -rf "$work/backups" "$work/state"
    mkdir -p "$work/backups" "$work/state" "$work/view"
    chmod 700 "$work/state"
}

attach() { "$fleecefs" attach --state-dir "$work/state" --mount "$work/view" "$work/backups" "$@" >"$work/said" 2>&1; }
detach() { "$fleecefs" detach --state-dir "$work/state" --all >>"$work/said" 2>&1; }

left() { find "$work/state" "$work/view" -mindepth 1; }

# proof TITLE WHAT-IS-MOUNTED EXPECTED-FILE-CONTENT attach-options...
proof() {
    local title=$1 volume=$2 expected=$3 before got
    shift 3
    before=$(state)
    got=failed
    if attach "$@"; then got=$(cat "$work/view/$volume/file" 2>&1) || true; fi
    [ "$got" = "$expected" ] || cat "$work/said"
    row "$title" "$expected" "$got"
    if [ -e /run/udev/control ]; then
        udevadm settle
        row "$title: links by UUID are the host's" "$(find /dev/disk/by-uuid -printf '%f %l\n' | sort)" "$links"
    fi
    detach || cat "$work/said"
    row "$title: detached, the host is as before" "$before" "$(state)"
    row "$title: nothing is left" "" "$(left)"
}

killed() {
    local step before
    before=$(state)
    for step in "lvm import" "lvm activate" crypt "mount folder" mount; do
        # The shell would tell that it was killed.
        (FLEECEFS_CRASH_AT=$step attach "$@" || true) 2>/dev/null
        detach || cat "$work/said"
        row "killed after step '$step' and detached: the host is as before" "$before" "$(state)"
    done
}

host() {
    # What it says about loop devices without holes.
    echo 1 >/proc/sys/kernel/printk
    modprobe -d "$modules" -a dm_mod dm_crypt xts aes_generic sha256_generic algif_skcipher fuse loop ext4 vfat exfat nls_ascii nls_utf8 nls_cp437 nls_iso8859_1 ntfs3 xfs btrfs 2>/dev/null || true
    /lib/systemd/systemd-udevd --daemon 2>/dev/null && udevadm trigger && udevadm settle
    lvm vgcreate -q -q vg /dev/vda
    lvm lvcreate -q -q -y -n root -L 64m vg
    mkfs.ext4 -q /dev/vg/root
    mkdir -p /run/fleecefs-proof-root
    mount /dev/vg/root /run/fleecefs-proof-root
    echo copied >/run/fleecefs-proof-root/file
    sync -f /run/fleecefs-proof-root/file
    udevadm settle
    links=$(find /dev/disk/by-uuid -printf '%f %l\n' | sort)
    row "udev has a link to the host's volume" 1 "$(grep -c "$(blkid -p -o value -s UUID /dev/vg/root)" <<<"$links")"
}

same_name() {
    fresh
    dd if=/dev/vda of="$work/disk" bs=1M conv=sparse status=none
    echo host >/run/fleecefs-proof-root/file
    sync -f /run/fleecefs-proof-root/file
    point vda "$work/disk"
    proof "a group with the name and the ids of the host's own" vg-root copied vda/latest
    row "the host's own volume is as it was" host "$(cat /run/fleecefs-proof-root/file)"
    killed vda/latest
    fresh
    point vda "$work/disk"
    attach vda/latest --no-replay && row "without replay a group is not activated" failed attached
    [ -z "$(left)" ] || cat "$work/said"
    row "without replay: nothing is left" "" "$(left)"
    row "without replay it is said" 1 "$(grep -c 'not activated' "$work/said")"
}

# Groups of guests are made on files, and gone before they are attached.
on_loops() {
    local n made=()
    for n in 1 2; do
        rm -f "$work/disk$n"
        truncate -s 200M "$work/disk$n"
        made+=("$(losetup -f --show "$work/disk$n")")
    done
    loops=("${made[@]}")
}

two_disks() {
    fresh
    on_loops
    lvm vgcreate -q -q data "${loops[@]}"
    lvm lvcreate -q -q -y -n all -i 2 -l 100%FREE data
    mkfs.xfs -q /dev/data/all
    mount /dev/data/all "$work/view"
    echo striped >"$work/view/file"
    umount "$work/view"
    lvm vgchange -q -q -an data
    losetup -d "${loops[@]}"
    point vda "$work/disk1"
    point vdb "$work/disk2"
    udevadm settle
    proof "a group on two disks, with --run" data-all striped vda/latest --run
    attach vda/latest && row "one of two disks is refused" failed attached
    row "one of two disks: nothing is left" "" "$(left)"
}

encrypted() {
    fresh
    on_loops
    printf secret >"$work/key"
    printf wrong >"$work/wrong"
    cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "${loops[0]}" "$work/key"
    cryptsetup open --key-file "$work/key" "${loops[0]}" inner
    lvm vgcreate -q -q vg-crypt /dev/mapper/inner
    lvm lvcreate -q -q -y -n root -l 100%FREE vg-crypt
    mkfs.ext4 -q /dev/vg-crypt/root
    mount /dev/vg-crypt/root "$work/view"
    echo encrypted >"$work/view/file"
    umount "$work/view"
    lvm vgchange -q -q -an vg-crypt
    cryptsetup close inner
    losetup -d "${loops[@]}"
    point vda "$work/disk1"
    udevadm settle
    proof "LVM in LUKS, with --key-file" vg--crypt-root encrypted vda/latest --key-file "$work/key"
    attach vda/latest --key-file "$work/wrong" && row "a wrong key is refused" failed attached
    row "a wrong key is told" 1 "$(grep -c 'does not open it' "$work/said")"
    killed vda/latest --key-file "$work/key"
}

of_windows() {
    local kind
    for kind in fat exfat ntfs; do
        fresh
        rm -f "$work/disk1"
        truncate -s 64M "$work/disk1"
        case $kind in
            fat) mkfs.fat -F 16 "$work/disk1" >/dev/null ;;
            exfat) mkfs.exfat "$work/disk1" >/dev/null 2>&1 ;;
            ntfs) mkntfs -q -Q -F "$work/disk1" ;;
        esac
        loops=("$(losetup -f --show "$work/disk1")")
        case $kind in
            fat) mount -t vfat "${loops[0]}" "$work/view" ;;
            exfat) mount -t exfat "${loops[0]}" "$work/view" ;;
            ntfs) ntfs-3g "${loops[0]}" "$work/view" ;;
        esac
        echo "$kind" >"$work/view/file"
        umount "$work/view"
        losetup -d "${loops[0]}"
        point vda "$work/disk1"
        udevadm settle
        proof "$kind" disk "$kind" vda/latest
    done
}

# A group that belongs to another machine, by its system id.
other_machine() {
    fresh
    on_loops
    lvm vgcreate -q -q foreign "${loops[0]}"
    lvm lvcreate -q -q -y -n root -l 100%FREE foreign
    mkfs.ext4 -q /dev/foreign/root
    mount /dev/foreign/root "$work/view"
    echo foreign >"$work/view/file"
    umount "$work/view"
    lvm vgchange -q -q -an foreign
    lvm vgchange -q -q -y --systemid other.machine foreign
    losetup -d "${loops[@]}"
    point vda "$work/disk1"
    udevadm settle
    proof "a group of another machine (system id)" foreign-root foreign vda/latest
}

# harmless TITLE attach-options...: whatever comes of it, it ends, and the host is as before.
harmless() {
    local title=$1 before ended=0
    shift
    before=$(state)
    timeout 100 "$fleecefs" attach --state-dir "$work/state" --mount "$work/view" "$work/backups" "$@" >"$work/said" 2>&1 || ended=$?
    [ "$ended" != 124 ] || row "$title: attach ends" yes no
    # Whoever lists a folder of it may be told of damage.
    timeout 100 find "$work/view" >/dev/null 2>&1 || [ $? != 124 ] || row "$title: find ends" yes no
    timeout 100 "$fleecefs" detach --state-dir "$work/state" --all >>"$work/said" 2>&1 || row "$title: detach" yes "$(cat "$work/said")"
    [ -z "$(left)" ] || row "$title: nothing is left" "" "$(left)"
    [ "$before" = "$(state)" ] || row "$title: the host is as before" "$before" "$(state)"
}

# A group whose other physical volume has the id of the host's.
names_of_the_host() {
    local id bad_before=$bad
    fresh
    on_loops
    id=$(lvm pvs --noheadings -o pv_uuid /dev/vda | tr -d ' ')
    mkdir -p "$work/lvm"
    cat >"$work/lvm/lvm.conf" <<CONF
devices { filter=["a|^${loops[0]}\$|","a|^${loops[1]}\$|","r|.*|"] use_devicesfile=0 obtain_device_list_from_udev=0 hints="none" }
activation { udev_sync=0 udev_rules=0 }
backup { backup=0 archive=0 }
CONF
    LVM_SYSTEM_DIR=$work/lvm lvm pvcreate -q -q -f --uuid "$id" --norestorefile "${loops[1]}"
    LVM_SYSTEM_DIR=$work/lvm lvm vgcreate -q -q evil "${loops[@]}"
    LVM_SYSTEM_DIR=$work/lvm lvm lvcreate -q -q -an -Zn -Wn -n root -i 2 -l 8 evil
    losetup -d "${loops[@]}"
    point vda "$work/disk1"
    udevadm settle
    harmless "a group that names the host's physical volume" vda/latest
    row "a group that names the host's physical volume is refused" 1 "$(grep -c 'missing\|needs all disks' "$work/said")"
    point vda "$work/disk2"
    harmless "a copy of the id of the host's physical volume" vda/latest
    [ "$bad" = "$bad_before" ] || return 0
    row "whatever a group names, the host is as before" "" ""
}

# File systems with bytes changed at random (the same ones each time), as a fuzzer makes them.
mutated() {
    local kind seed before=$bad RANDOM
    for kind in ext4 xfs btrfs ntfs fat exfat; do
        rm -f "$work/disk1"
        truncate -s 320M "$work/disk1"
        case $kind in
            ext4) mkfs.ext4 -q "$work/disk1" ;;
            xfs) mkfs.xfs -q "$work/disk1" ;;
            btrfs) mkfs.btrfs -q "$work/disk1" ;;
            ntfs) mkntfs -q -Q -F "$work/disk1" >/dev/null 2>&1 ;;
            fat) mkfs.fat -F 32 "$work/disk1" >/dev/null ;;
            exfat) mkfs.exfat "$work/disk1" >/dev/null 2>&1 ;;
        esac
        for seed in 1 2 3; do
            fresh
            RANDOM=$seed
            cp --sparse=always "$work/disk1" "$work/disk2"
            for _ in $(seq $((seed * 8))); do
                # shellcheck disable=SC2059
                printf "\\x$(printf %02x $((RANDOM % 256)))" |
                    dd of="$work/disk2" bs=1 seek=$((RANDOM * (seed % 3 * 60 + 1) + RANDOM % 4096)) conv=notrunc status=none
            done
            point vda "$work/disk2"
            harmless "$kind, mutant $seed" vda/latest
            harmless "$kind, mutant $seed, without replay" vda/latest --no-replay
        done
        row "$kind: mutants are attached or refused, and the host is as before" "$before" "$bad"
    done
}

mkdir -p "$work"
host
echo "$(uname -sr), $(lvm version | sed -n 's/ *LVM version: *//p'), $(cryptsetup --version), udev $(udevadm --version)"
same_name
two_disks
encrypted
of_windows
other_machine
names_of_the_host
mutated
[ "$bad" = 0 ]
