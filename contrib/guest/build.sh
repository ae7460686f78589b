#!/bin/bash
# Builds the tiny guest that tests and the demo boot, and prints the directory it lies in:
#
#   vmlinuz initrd      Debian's kernel, decompressed; an initramfs that loads the disk drivers, finds the root
#   root.qcow2          GPT, one ext4 partition (label fleece-root): busybox, qemu-ga, the writer
#   data.qcow2          GPT, one XFS partition (label fleece-data), empty
#
# Everything is unpacked from Debian's packages; nothing is mounted and root is not needed. It takes
# some seconds once, and is kept in $FLEECEFS_GUEST_CACHE or the user's cache directory.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=../lib/deps.sh
. "$here/../lib/deps.sh"
# shellcheck source=../lib/initrd.sh
. "$here/../lib/initrd.sh"

packages=(busybox-static qemu-guest-agent)
# Buses a test may ask for, the agent's port, and the two file systems.
modules=(virtio_pci virtio_blk virtio_scsi sd_mod ahci nvme virtio_console virtio_rng ext4 xfs)

say() { printf 'guest: %s\n' "$*" >&2; }

# A new builder or another Debian release makes another guest, beside the old one.
cache_dir() {
    local base=${FLEECEFS_GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/fleecefs/guest} key
    key=$(cat "$here"/build.sh "$here"/../lib/initrd.sh "$here"/writer.rs "$here"/initramfs-init "$here"/rootfs/* /etc/os-release |
        sha256sum | cut -c 1-16)
    printf '%s/%s' "$base" "$key"
}

# (Not the cloud kernel: it has no AHCI.) Debian's kernel metapackage depends on the package that holds the kernel.
kernel_package() {
    apt-cache depends linux-image-amd64 |
        sed -n 's/ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1
}

# The agent's libraries, by package name.
library_packages() {
    apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
        --no-replaces --no-enhances qemu-guest-agent | grep -E '^lib[a-z0-9.+-]+$' | sort -u
}

download() {
    local kernel libraries
    if [ -z "$(kernel_package)" ]; then deps_apt_update; fi
    kernel=$(kernel_package)
    [ -n "$kernel" ] || deps_die "no linux-image-amd64 in the package lists"
    mapfile -t libraries < <(library_packages)
    say "fetching $kernel and ${packages[*]}"
    # Lists from before the mirror's last update name packages that are gone: refresh, try again.
    fetch "$kernel" "${packages[@]}" "${libraries[@]}" || {
        deps_apt_update
        fetch "$(kernel_package)" "${packages[@]}" "${libraries[@]}"
    } || deps_die "apt-get download failed"
}

fetch() {
    (cd "$work/debs" && apt-get -qq -o APT::Sandbox::User=root download "$@" >/dev/null)
}

unpack() {
    local deb
    for deb in "$work"/debs/*.deb; do
        case ${deb##*/} in
            linux-image-*) dpkg-deb -x "$deb" "$work/kernel" ;;
            *) dpkg-deb -x "$deb" "$work/files" ;;
        esac
    done
    # Debian 13 keeps everything below usr.
    [ -e "$work/kernel/lib" ] || ln -s usr/lib "$work/kernel/lib"
}

busybox_of() { find "$work/files" -path '*/bin/busybox' -type f | head -n 1; }

build_initramfs() {
    local tree=$work/initramfs version
    version=$(basename "$work"/kernel/lib/modules/*)
    mkdir -p "$tree"/{bin,dev,proc,sys,newroot,modules}
    cp "$(busybox_of)" "$tree/bin/busybox"
    install -m 755 "$here/initramfs-init" "$tree/init"
    depmod -b "$work/kernel" "$version" 2>/dev/null
    initrd_modules "$work/kernel" "$version" "$tree" "${modules[@]}"
    initrd_pack "$tree" >"$work/out/initrd"
    decompress "$work"/kernel/boot/vmlinuz-"$version" >"$work/out/vmlinuz"
}

# An emulated processor takes longer to decompress a kernel than to boot it. Each of the formats that Debian has had
# begins with bytes of its own; a kernel in another is taken as it is.
decompress() {
    local kernel=$1 magic tool at out=$work/vmlinux
    while read -r magic tool; do
        at=$(LC_ALL=C grep -Pabo -m 1 "$magic" "$kernel" | head -n 1 | cut -d: -f1) || true
        if [ -z "$at" ] || ! command -v "$tool" >/dev/null; then continue; fi
        # There is something behind it, which some tools complain of.
        tail -c "+$((at + 1))" "$kernel" | "$tool" -dcq >"$out" 2>/dev/null || true
        # What can be booted is said in a note of Xen's (PVH).
        if [ "$(head -c 4 "$out")" = $'\x7fELF' ] && LC_ALL=C grep -aq 'Xen' "$out"; then
            cat "$out"
            return
        fi
    done <<'END'
\xfd7zXZ\x00 xz
\x28\xb5\x2f\xfd zstd
END
    cat "$kernel"
}

# Copies the agent and just the libraries that the dynamic loader picks for it.
install_agent() {
    local files=$work/files tree=$1 loader agent library
    loader=$(find "$files" -name 'ld-linux-x86-64.so.2' | head -n 1)
    agent=$(find "$files" -name qemu-ga -type f | head -n 1)
    mkdir -p "$tree/lib64" "$tree/lib"
    cp -L "$loader" "$tree/lib64/"
    install -m 755 "$agent" "$tree/usr/sbin/qemu-ga"
    "$loader" --library-path "$files/lib/x86_64-linux-gnu:$files/usr/lib/x86_64-linux-gnu" --list "$agent" |
        sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' | while read -r library; do
        case $library in
            */ld-linux-*) ;;
            "$files"/*) cp -L "$library" "$tree/lib/" ;;
            *) deps_die "the agent needs $library, which none of the packages has" ;;
        esac
    done
}

build_root_tree() {
    local tree=$1 applet
    mkdir -p "$tree"/{bin,sbin,usr/bin,usr/sbin,etc,dev,proc,sys,run,tmp,mnt,root,var}
    cp "$(busybox_of)" "$tree/bin/busybox"
    "$tree/bin/busybox" --list-full | while read -r applet; do
        mkdir -p "$tree/$(dirname "$applet")"
        [ -e "$tree/$applet" ] || ln -s /bin/busybox "$tree/$applet"
    done
    ln -s /run "$tree/var/run"
    install_agent "$tree"
    install -m 644 "$here/rootfs/inittab" "$tree/etc/inittab"
    install -m 755 "$here/rootfs/rc" "$tree/etc/rc"
    install -m 755 "$here/rootfs/link-disks" "$tree/sbin/link-disks"
    install -m 755 "$here/rootfs/shutdown" "$tree/sbin/shutdown"
    say "compiling the writer"
    rustc --edition 2024 -O -C target-feature=+crt-static -C panic=abort -C strip=symbols \
        -o "$tree/usr/bin/writer" "$here/writer.rs"
}

# partitioned IMAGE SIZE_MIB: a sparse file with one GPT partition from 1 MiB to 1 MiB before the end.
partitioned() {
    truncate -s "$2M" "$1"
    printf 'label: gpt\nstart=1MiB, size=%dMiB, type=linux\n' $(($2 - 2)) | sfdisk --quiet "$1"
}

build_disks() {
    local root=$work/root.raw data=$work/data.raw part=$work/xfs.raw
    build_root_tree "$work/root"
    partitioned "$root" 128
    mke2fs -q -t ext4 -L fleece-root -E offset=1048576,root_owner=0:0 -d "$work/root" "$root" 126M
    # mkfs.xfs knows no offset, and refuses less than 300 MiB.
    partitioned "$data" 322
    truncate -s 320M "$part"
    mkfs.xfs -q -L fleece-data "$part"
    dd if="$part" of="$data" bs=1M seek=1 conv=notrunc,sparse status=none
    qemu-img convert -q -O qcow2 "$root" "$work/out/root.qcow2"
    qemu-img convert -q -O qcow2 "$data" "$work/out/data.qcow2"
}

build() {
    work=$(mktemp -d "${TMPDIR:-/tmp}/fleecefs-guest.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work"/{debs,kernel,files,out}
    download
    unpack
    build_initramfs
    build_disks
    # Two builders may run at once: whichever renames first has made it.
    mkdir -p "$(dirname "$target")"
    rm -rf "$target.$$"
    cp -r "$work/out" "$target.$$"
    mv -T "$target.$$" "$target" 2>/dev/null || rm -rf "$target.$$"
}

target=$(cache_dir)
if [ ! -e "$target/root.qcow2" ]; then
    deps_rust
    deps_build
    deps_guest
    deps_qemu
    say "building the guest in $target"
    build
    say "built in $SECONDS s"
fi
printf '%s\n' "$target"
