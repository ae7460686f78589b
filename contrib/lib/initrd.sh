# shellcheck shell=bash
# Sourced: what the initramfs images of guests have in common.

# initrd_modules KERNEL VERSION TREE MODULE...: puts these modules of the kernel that is unpacked in KERNEL, and those
# that they need, into TREE/modules, uncompressed; and their order into TREE/modules.order.
initrd_modules() {
    local kernel=$1 version=$2 tree=$3 files file name
    shift 3
    files=$(modprobe -d "$kernel" -S "$version" --all --show-depends "$@" |
        sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++')
    while read -r file; do
        name=$(basename "$file")
        case $name in
            *.xz) xz -dc "$file" >"$tree/modules/${name%.xz}" ;;
            *.gz) gzip -dc "$file" >"$tree/modules/${name%.gz}" ;;
            *) cp "$file" "$tree/modules/$name" ;;
        esac
        printf '%s\n' "${name%.[xg]z}" >>"$tree/modules.order"
    done <<<"$files"
}

# initrd_pack TREE: prints the archive of a tree.
initrd_pack() {
    (cd "$1" && find . -print0 | cpio --null --quiet -o -H newc -R 0:0)
}
