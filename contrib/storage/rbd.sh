#!/bin/bash
# Usage: contrib/storage/rbd.sh [FOLDER]
# Backs up disks that are RBD images, on a real Ceph cluster that lives in a temporary folder as long
# as this runs: one monitor, one OSD that keeps its objects in memory, no authentication. Ceph and
# QEMU's RBD driver are unpacked from Debian's packages into FOLDER (below target/ if not given), and
# nothing of Ceph is installed. First what qemu-storage-daemon serves is backed up, changed and compared, then
# the disks of a guest. Prints a table; exit code 1 if anything differs, 4 if the packages are not to
# be had. It takes one to two minutes.
set -euo pipefail
case ${1:-} in -*) sed -n '2,9s/^# //p' "$0" >&2 && exit 2 ;; esac
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-${CARGO_TARGET_DIR:-$root/target}/ceph}
# shellcheck source=../lib/deps.sh
. "$root/contrib/lib/deps.sh"
# shellcheck source=sequence.sh
. "$root/contrib/storage/sequence.sh"

# With the version that fits the installed QEMU, everything that installing would bring.
missing_packages() {
    apt-get install -s --no-install-recommends ceph-mon ceph-osd ceph-common ceph-base \
        "qemu-block-extra=$(deps_version qemu-utils)" | sed -n 's/^Inst \([^ ]*\) \(\[[^]]*\] \)\?(\([^ ]*\) .*/\1=\3/p'
}

unpack() {
    local deb packages
    mapfile -t packages < <(missing_packages)
    [ ${#packages[@]} -gt 0 ] || return 1
    rm -rf "${folder:?}"/{debs,root}
    mkdir -p "$folder"/{debs,root}
    (cd "$folder/debs" && apt-get -qq -o APT::Sandbox::User=root download "${packages[@]}" >/dev/null) || return 1
    for deb in "$folder"/debs/*.deb; do dpkg-deb -x "$deb" "$folder/root"; done
    rm -rf "$folder/debs"
}

get_ceph() {
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    [ ! -e "$folder/ready" ] || return 0
    command -v apt-get >/dev/null || { deps_say "skipped: Ceph needs apt-get"; exit 4; }
    unpack || { deps_apt_update && unpack; } ||
        { deps_say "skipped: the package lists have no Ceph, or no qemu-block-extra as old as QEMU"; exit 4; }
    touch "$folder/ready"
}

use_ceph() {
    local triplet libraries
    triplet=$(uname -m)-linux-gnu
    libraries=$folder/root/usr/lib/$triplet
    export LD_LIBRARY_PATH=$libraries:$libraries/ceph:$folder/root/lib/$triplet
    export PYTHONPATH=$folder/root/usr/lib/python3/dist-packages QEMU_MODULE_DIR=$libraries/qemu
    export PATH=$folder/root/usr/bin:$PATH CEPH_CONF=$work/ceph/ceph.conf
    plugins=$libraries
}

# Debian's python, which the packages' modules are for.
ceph() { timeout 60 /usr/bin/python3 "$folder/root/usr/bin/ceph" --connect-timeout 30 "$@"; }

configure() {
    cat >"$CEPH_CONF" <<CONF
[global]
fsid = $1
mon_host = v1:127.0.0.1:$2
mon_initial_members = a
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_bind_msgr2 = false
keyring = $work/ceph/keyring
run_dir = $work/ceph
crash_dir = $work/ceph
admin_socket =
log_file = $work/ceph/\$name.log
mon_cluster_log_to_file = false
pid_file =
mon_data = $work/ceph/mon
osd_data = $work/ceph/osd
plugin_dir = $plugins/ceph
erasure_code_dir = $plugins/ceph/erasure-code
osd_class_dir = $plugins/rados-classes
osd_objectstore = memstore
osd_class_update_on_start = false
memstore_device_bytes = 1073741824
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
CONF
}

start_ceph() {
    local id fsid uuid port
    mkdir -p "$work"/ceph/{mon,osd}
    : >"$work/ceph/keyring"
    port=$(/usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    fsid=$(cat /proc/sys/kernel/random/uuid) uuid=$(cat /proc/sys/kernel/random/uuid)
    configure "$fsid" "$port"
    monmaptool --create --fsid "$fsid" --addv a "[v1:127.0.0.1:$port]" "$work/ceph/monmap" >/dev/null
    ceph-mon --mkfs -i a --monmap "$work/ceph/monmap" --keyring "$work/ceph/keyring"
    ceph-mon -f -i a </dev/null >"$work/ceph/mon.out" 2>&1 &
    monitor=$!
    id=$(ceph osd new "$uuid")
    ceph-osd -i "$id" --mkfs --osd-uuid "$uuid" >"$work/ceph/mkfs.out" 2>&1
    ceph-osd -f -i "$id" </dev/null >"$work/ceph/osd.out" 2>&1 &
    osd=$!
    ceph osd pool create disks >"$work/ceph/pool.out" 2>&1
    timeout 60 rbd pool init disks
}

end() {
    [ -n "$1" ] || return 0
    kill "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}

clean_up() {
    local status=$?
    set +e
    [ "$status" = 0 ] || tail -n 3 "$work"/ceph/*.out >&2
    sequence_clean_up
    [ ! -e "$work/guest/pid" ] || "$root/contrib/guest/run.sh" stop "$work/guest"
    end "$osd"
    end "$monitor"
    rm -rf "$work"
    exit "$status"
}

disk_options() { printf 'driver=rbd,pool=disks,image=%s,conf=%s' "$image" "$CEPH_CONF"; }
disk_resize() { rbd resize --no-progress --allow-shrink --size "$1M" "disks/$image" 2>/dev/null; }
# `rbd export` does not overwrite.
disk_contents() { rm -f "$1" && rbd export --no-progress "disks/$image" "$1"; }

# The guest writes all the time to three RBD images: one by a node of the rbd driver itself, one below
# a raw node, one of -drive, whose nodes QEMU names anew at each start.
start_guest() {
    local conf=$CEPH_CONF writers='' name
    for name in direct wrapped drive; do writers+="fleece.run=churn,/dev/disk/$name,7 "; done
    "$root/contrib/guest/run.sh" start "$work/guest" --append "$writers" -- \
        -blockdev "driver=rbd,node-name=n1,pool=disks,image=direct,conf=$conf,discard=unmap" \
        -device virtio-blk-pci,drive=n1,id=d1,serial=direct \
        -blockdev "driver=rbd,node-name=n2-rbd,pool=disks,image=wrapped,conf=$conf,discard=unmap" \
        -blockdev driver=raw,node-name=n2,file=n2-rbd,discard=unmap \
        -device virtio-blk-pci,drive=n2,id=d2,serial=wrapped \
        "$@" -drive "file=rbd:disks/drive:conf=$conf,format=raw,if=none,id=drive3,discard=unmap" \
        -device virtio-blk-pci,drive=drive3,id=d3,serial=drive
    "$root/contrib/guest/run.sh" wait "$work/guest" 180
}

# guest_backup STEP LEVEL WANT: held at its moment, while the guest writes on; each point is its
# frozen view.
guest_backup() {
    local hold=$work/hold tries=0 name view got=''
    rm -rf "$hold"
    mkdir "$hold"
    FLEECEFS_HOLD=$hold "$fleecefs" backup --qmp "$work/guest/qmp.sock" --target "$work/backups" \
        --state-dir "$work/state" --exclude root --level "$2" >"$work/said" 2>&1 &
    holder=$!
    until [ -e "$hold/ready" ]; do
        if [ $((tries += 1)) -gt 600 ] || ! kill -0 "$holder" 2>/dev/null; then
            cat "$work/said" >&2
            exit 1
        fi
        sleep 0.1
    done
    while read -r name view; do
        qemu-img convert -f raw -O raw "$view" "$work/view-$name"
    done < <(/usr/bin/python3 -c 'import json, sys
for v in json.load(open(sys.argv[1])):
    print(v["disk"], "nbd+unix:///%s?socket=%s" % (v["export"], v["address"].removeprefix("unix:")))' "$hold/ready")
    touch "$hold/go"
    if wait "$holder"; then got=$(compare_disks); else got=failed && cat "$work/said" >&2; fi
    holder=''
    row "$1" "direct $3, drive $3, wrapped $3" "$got"
}

# Each disk's newest point, in the folder that has its image's name, against its view.
compare_disks() {
    local name point outcome all=()
    "$fleecefs" mount "$work/backups" "$work/mnt"
    for name in direct drive wrapped; do
        point=$(find "$work/backups/$name" -maxdepth 1 -type f -printf '%f\n' 2>/dev/null | sort -t- -k2n | tail -n 1)
        outcome=${point%%-*}
        cmp -s "$work/mnt/$name/$point.raw" "$work/view-$name" || outcome+=' DIFFERS'
        all+=("$name $outcome")
    done
    "$fleecefs" umount "$work/mnt"
    printf '%s, %s, %s' "${all[@]}"
}

guest() {
    local name
    rm -rf "${work:?}"/{backups,state}
    mkdir -p "$work"/{backups,state,mnt}
    printf '%s\n' "--- a guest that writes to three RBD images"
    for name in direct wrapped drive; do rbd create --size 16M "disks/$name"; done
    start_guest
    guest_backup "full" full FULL
    guest_backup "inc" inc INC
    guest_backup "diff" diff DIFF
    guest_backup "inc" inc INC
    "$root/contrib/guest/run.sh" stop "$work/guest"
    # One more disk before them gives the unnamed nodes other names.
    qemu-img create -q -f qcow2 "$work/other.qcow2" 1M
    start_guest -drive "file=$work/other.qcow2,format=qcow2,if=none,id=other,read-only=on" \
        -device virtio-blk-pci,drive=other
    guest_backup "auto after a restart with other node names" auto FULL
    says "  it says why" "taking a FULL: bitmap .* is not on the disk"
    guest_backup "auto" auto INC
    "$root/contrib/guest/run.sh" stop "$work/guest"
}

deps_rust
deps_build
deps_fuse
deps_qemu
get_ceph
(cd "$root" && cargo build --quiet --features failpoint)
fleecefs=$(realpath "${CARGO_TARGET_DIR:-$root/target}")/debug/fleecefs
work=$(mktemp -d "${TMPDIR:-/tmp}/fleecefs-rbd.XXXXXX")
monitor='' osd='' plugins='' image=vm-disk size=64 grown=80
trap clean_up EXIT
# Built before Ceph's libraries are in the way of the tools that build it.
"$root/contrib/guest/build.sh" >/dev/null
use_ceph
start_ceph
rbd create --size "${size}M" "disks/$image"
sequence "an RBD image below qemu-storage-daemon"
guest
[ "$bad" = 0 ] || exit 1
