# shellcheck shell=bash
# Sourced by proofs that need a kernel with a device mapper: a guest with Debian's kernel over this machine's root, which
# it sees read-only below a throw-away layer, so that it runs the same programs. The kernel is unpacked from its package
# into $folder. Needs deps.sh, and $root; $inside names the script of contrib/storage that runs in the guest, as
# `SCRIPT FLEECEFS MODULES`, $guest_disk the size of the disk that it has.
# shellcheck disable=SC2154

# shellcheck source=../lib/initrd.sh
. "$root/contrib/lib/initrd.sh"

# What the guest needs before it sees this machine's root; the rest it loads from there.
modules=(virtio_pci virtio_blk 9pnet_virtio 9p overlay)

kernel_package() { apt-cache depends linux-image-amd64 | sed -n 's/ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1; }

unpack() {
    local deb
    rm -rf "${folder:?}"/{debs,kernel}
    mkdir -p "$folder"/{debs,kernel}
    (cd "$folder/debs" && apt-get -qq -o APT::Sandbox::User=root download "$(kernel_package)" busybox-static >/dev/null) || return 1
    for deb in "$folder"/debs/*.deb; do dpkg-deb -x "$deb" "$folder/kernel"; done
    # Debian 13 keeps everything below usr.
    [ -e "$folder/kernel/lib" ] || ln -s usr/lib "$folder/kernel/lib"
    rm -rf "$folder/debs"
}

# (Not the cloud kernel: it has no 9p.)
get_kernel() {
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    [ ! -e "$folder/ready" ] || return 0
    unpack || { deps_apt_update && unpack; } || deps_die "apt-get download failed"
    depmod -b "$folder/kernel" "$(version)"
    touch "$folder/ready"
}

version() { basename "$folder"/kernel/lib/modules/*; }

# The first program of the guest: makes a root out of this machine's, and runs the proof in it.
write_init() {
    cat <<'INIT'
#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t devtmpfs dev /dev
while read -r name; do $bb insmod "/modules/$name"; done </modules.order
. /job
$bb mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 root /lower
$bb mount -t tmpfs up /up
$bb mkdir -p /up/upper /up/work
$bb mount -t overlay -o lowerdir=/lower,upperdir=/up/upper,workdir=/up/work root /newroot
for place in dev proc sys run tmp; do $bb mkdir -p "/newroot/$place"; done
$bb mount --move /dev /newroot/dev
$bb mount -t proc proc /newroot/proc
$bb mount -t sysfs sys /newroot/sys
$bb mount -t tmpfs run /newroot/run
$bb cat >/newroot/tmp/first <<'FIRST'
/bin/bash "$1" "$2" "$3" </dev/null 2>&1
echo "fleece: exit $?"
sync
echo o >/proc/sysrq-trigger
while :; do /bin/sleep 60; done
FIRST
cd /newroot
# Its root is a root, and no chroot: udevadm does nothing in one.
exec $bb env -i PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
    $bb switch_root -c /dev/console /newroot /bin/bash /tmp/first "$script" "$program" "$modules"
INIT
}

build_initramfs() {
    local tree=$work/initramfs
    mkdir -p "$tree"/{bin,dev,proc,modules,lower,up,newroot}
    cp "$(find "$folder/kernel" -path '*/bin/busybox' -type f | head -n 1)" "$tree/bin/busybox"
    write_init >"$tree/init"
    chmod 755 "$tree/init"
    printf 'script=%q\nprogram=%q\nmodules=%q\n' "$root/contrib/storage/$inside" "$fleecefs" "$folder/kernel" >"$tree/job"
    initrd_modules "$folder/kernel" "$(version)" "$tree" "${modules[@]}"
    initrd_pack "$tree" | gzip -1 >"$work/initrd"
}

boot() {
    truncate -s "$guest_disk" "$work/disk"
    : >"$work/serial.log"
    timeout 1800 qemu-system-x86_64 -accel "${FLEECEFS_GUEST_ACCEL:-tcg}" -machine q35 -m 1536 -smp 2 \
        -cpu max,arch-capabilities=off -nodefaults -no-user-config -display none -no-reboot \
        -kernel "$folder/kernel/boot/vmlinuz-$(version)" -initrd "$work/initrd" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check" \
        -serial "file:$work/serial.log" \
        -virtfs local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap \
        -drive "file=$work/disk,format=raw,if=none,id=d,cache=unsafe,discard=unmap" \
        -device virtio-blk-pci,drive=d </dev/null >"$work/qemu.log" 2>&1 &
    guest=$!
    tail -n +1 --pid="$guest" -s 0.2 -f "$work/serial.log" | tr -d '\r' | sed -n -u '/^fleece: exit/!{/reboot: Power down/!p}'
    wait "$guest" || { cat "$work/qemu.log" >&2; return 1; }
    guest=''
}

clean_up() {
    local status=$?
    set +e
    [ -z "$guest" ] || { kill "$guest" && wait "$guest"; } 2>/dev/null
    rm -rf "$work"
    exit "$status"
}

# guest_run NAME: builds, boots, and fails unless the script succeeds.
guest_run() {
    deps_rust
    deps_build
    deps_fuse
    deps_filesystems
    deps_guest
    deps_qemu
    get_kernel
    (cd "$root" && cargo build --quiet --features failpoint)
    fleecefs=$(realpath "${CARGO_TARGET_DIR:-$root/target}")/debug/fleecefs
    work=$(mktemp -d "${TMPDIR:-/tmp}/fleecefs-$1.XXXXXX")
    guest=''
    trap clean_up EXIT
    build_initramfs
    boot
    tr -d '\r' <"$work/serial.log" | grep -qx 'fleece: exit 0'
}
