#!/bin/bash
# The whole story on one screen, from a fresh clone on a fresh Debian: installs what is missing,
# builds fleecefs, backs up a running guest three times while a file in it changes, mounts the
# backups, and reads the file back out of an old point and out of the newest.
#
#   demo.sh [--chain]    --chain: no guest; the backups are made with qemu-img and qemu-io
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=lib/deps.sh
. contrib/lib/deps.sh

file=story.txt
work=$(mktemp -d "${TMPDIR:-/tmp}/fleecefs-demo.XXXXXX")
backups=$work/backups mnt=$work/mnt view=$work/view
loop=

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# Shows a command as a user would type it, and runs it.
run() {
    printf '$ %s\n' "$*"
    "$@"
}

clean_up() {
    local status=$?
    set +e
    close_disk
    mountpoint -q "$mnt" && { "$fleecefs" umount "$mnt" 2>/dev/null || fusermount3 -u "$mnt"; }
    contrib/guest/run.sh stop "$work/guest"
    rm -rf "$work"
    exit "$status"
}

fleecefs=${CARGO_TARGET_DIR:-target}/release/fleecefs
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# --- with a guest ---------------------------------------------------------------------------------

in_guest() { contrib/guest/run.sh exec "$work/guest" /bin/sh -c "$1"; }

backup_guest() {
    run "$fleecefs" backup --qmp "$work/guest/qmp.sock" --agent "$work/guest/agent.sock" \
        --level "$1" --target "$backups" --quiesce
}

make_backups_of_guest() {
    say "A guest boots (under emulation if need be)"
    contrib/guest/run.sh start "$work/guest"
    contrib/guest/run.sh wait "$work/guest"
    disk=root.qcow2
    local level=full line
    for line in 'Once upon a time' 'there was a disk,' 'and it was backed up.'; do
        say "In the guest: echo '$line' >> /$file   then a backup (${level})"
        in_guest "echo '$line' >> /$file; sync"
        backup_guest "$level"
        level=inc
        # A point's name has seconds.
        sleep 1
    done
}

# --- without ----------------------------------------------------------------------------------------

# delta OLD NEW IMAGE: writes the 64 KiB blocks that differ between two raw files into an empty qcow2,
# as an incremental backup does.
delta() {
    local block commands=()
    qemu-img create -q -f qcow2 "$3" "$(stat -c %s "$2")"
    while read -r block; do
        dd if="$2" of="$work/block.$block" bs=64k skip="$block" count=1 status=none
        commands+=(-c "write -q -s $work/block.$block $((block * 65536)) 64k")
    done < <(cmp -l "$1" "$2" | awk '{ print int(($1 - 1) / 65536) }' | uniq)
    qemu-io -f qcow2 "${commands[@]}" "$3"
    rm -f "$work"/block.*
}

make_backups_of_image() {
    local now line count=0 level=FULL part="$work/disk.raw?offset=1048576"
    disk=vda.qcow2
    mkdir -p "$backups/$disk"
    now=$(date +%s)
    truncate -s 64M "$work/disk.raw"
    printf 'label: gpt\nstart=1MiB, size=62MiB, type=linux\n' | sfdisk --quiet "$work/disk.raw"
    mke2fs -q -t ext4 -E offset=1048576 "$work/disk.raw" 62M
    for line in 'Once upon a time' 'there was a disk,' 'and it was backed up.'; do
        cp --sparse=always "$work/disk.raw" "$work/before.raw"
        printf '%s\n' "$line" >>"$work/$file"
        debugfs -w -f - "$part" >/dev/null 2>&1 <<<"rm $file
write $work/$file $file"
        local point=$backups/$disk/$level-$((now - 7200 + 3600 * count))-$disk
        say "On the disk: echo '$line' >> /$file   then ${point##*/}"
        if [ $level = FULL ]; then
            qemu-img convert -q -O qcow2 "$work/disk.raw" "$point"
        else
            delta "$work/before.raw" "$work/disk.raw" "$point"
        fi
        level=INC count=$((count + 1))
    done
}

# --- the points -------------------------------------------------------------------------------------

# cat_from POINT: prints the file out of the first partition of a point. As root through a loop device, as
# for any disk image; else with a reader of ext4 that needs no privilege.
cat_from() {
    if [ "$(id -u)" = 0 ] && loop=$(losetup -r -P -f --show "$1" 2>/dev/null) && partition_of "$loop" &&
        mkdir -p "$view" && mount -o ro,noload "${loop}p1" "$view"; then
        printf '$ losetup -r -P -f --show %s; mount -o ro,noload %s /view; cat /view/%s\n' \
            "${1#"$work"/}" "${loop}p1" "$file"
        cat "$view/$file"
    else
        printf '$ debugfs -R "cat /%s" "%s?offset=1048576"\n' "$file" "${1#"$work"/}"
        debugfs -R "cat /$file" "$1?offset=1048576" 2>/dev/null
    fi
    close_disk
}

# Waits for the first partition's device. A kernel built without GPT is told by partx.
partition_of() {
    local tries=0
    until [ -b "$1p1" ]; do
        [ $((tries += 1)) -lt 20 ] || return 1
        [ "$tries" != 5 ] || partx -a "$1" 2>/dev/null || true
        sleep 0.1
    done
}

close_disk() {
    if mountpoint -q "$view"; then umount "$view"; fi
    if [ -n "$loop" ]; then losetup -d "$loop"; fi
    loop=
}

deps_rust
deps_build
deps_fuse
deps_filesystems
deps_qemu
deps_guest
deps_packages python3
say "Building fleecefs"
cargo build --release --quiet
mkdir -p "$backups" "$mnt"

disk=
if [ "${1:-}" != --chain ] && "$fleecefs" backup --help >/dev/null 2>&1; then
    make_backups_of_guest
else
    make_backups_of_image
fi

say "What was backed up"
run "$fleecefs" list "$backups"

say "Mounted, every point is a raw disk"
run "$fleecefs" mount "$backups" "$mnt"
(cd "$mnt" && run ls -l "$disk" "$disk/by-time")

oldest=$(find "$mnt/$disk" -maxdepth 1 -name 'FULL-*.raw')
say "The file as it was in the oldest point"
cat_from "$oldest" >"$work/then"
cat "$work/then"
say "The file as it is in the newest point"
cat_from "$mnt/$disk/latest.raw" >"$work/newest"
cat "$work/newest"

# A demo that shows the wrong thing must not end well.
[ "$(tail -n 1 "$work/then")" = 'Once upon a time' ]
[ "$(tail -n 1 "$work/newest")" = 'and it was backed up.' ]
