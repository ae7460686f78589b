#!/bin/bash
# Usage: contrib/qmprestore.sh QMPRESTORE [PYTHON]
# Backs up a disk that changes (FULL and three INCs), and then restores every point twice: with
# upstream's `qmprestore merge` on a copy of the directory, and through our mount; the two must be
# equal. Then runs upstream's other verbs and ours on copies, and compares what each leaves.
# QMPRESTORE is a checkout's `qmprestore` (it is in no package registry), PYTHON one that has what
# its requirements.txt names. Prints a table; exit code 1 if anything differs.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,7s/^# //p' "$0" >&2; exit 2; }
qmprestore=$(realpath "$1") python=${2:-python3}
cd "$(dirname "$0")/.."
# shellcheck source=lib/deps.sh
. contrib/lib/deps.sh
deps_rust
deps_build
deps_fuse
deps_qemu
cargo build --quiet
fleecefs=${CARGO_TARGET_DIR:-target}/debug/fleecefs
work=$(mktemp -d "${TMPDIR:-/tmp}/fleecefs-qmprestore.XXXXXX")
daemon='' bad=0

clean_up() {
    local status=$?
    set +e
    mountpoint -q "$work/mnt" && "$fleecefs" umount "$work/mnt"
    [ -z "$daemon" ] || { kill "$daemon"; wait "$daemon"; } 2>/dev/null
    rm -rf "$work"
    exit "$status"
}
trap clean_up EXIT

start_daemon() {
    qemu-img create -q -f qcow2 "$work/a.img" 64M
    qemu-storage-daemon \
        --chardev "socket,id=c,path=$work/qmp.sock,server=on,wait=off" --monitor chardev=c \
        --nbd-server "addr.type=unix,addr.path=$work/nbd.sock" \
        --blockdev "driver=file,node-name=a-file,filename=$work/a.img,discard=unmap" \
        --blockdev "driver=qcow2,node-name=a,file=a-file,discard=unmap" \
        --blockdev "driver=raw,node-name=a-top,file=a,discard=unmap" \
        --export "type=nbd,id=e,node-name=a-top,name=a,writable=on" &
    daemon=$!
    local tries=0
    until [ -S "$work/nbd.sock" ]; do
        [ $((tries += 1)) -lt 200 ] || { echo "qemu-storage-daemon does not come up" >&2; exit 3; }
        sleep 0.1
    done
}

# write COMMAND...: qemu-io's, into the running disk.
write() {
    local commands=() command
    for command in "$@"; do commands+=(-c "$command"); done
    qemu-io -f raw "${commands[@]}" "nbd+unix:///a?socket=$work/nbd.sock" >/dev/null
}

backup() {
    "$fleecefs" backup --qmp "$work/qmp.sock" --target "$work/backups" --state-dir "$work/state" \
        --level "$1" --nbd "unix:$work/nbd.sock" --quiet >/dev/null
}

make_backups() {
    write "write -P 1 0 40M"
    backup full
    write "write -P 2 1M 3M" "write -z 8M 1M" "discard 10M 2M" "write -P 3 63M 1M"
    backup inc
    write "write -P 4 2M 64k" "write -P 5 50M 123k" "write -z 63M 64k"
    backup inc
    write "write -P 6 0 512" "discard 0 1M"
    backup inc
    kill "$daemon"
    wait "$daemon" || true
    daemon=''
}

# copy: a fresh copy of the backups, with their times (by which qmprestore sorts); prints the disk's folder.
copy() {
    rm -rf "$work/copy"
    cp -a "$work/backups" "$work/copy"
    dirname "$(find "$work/copy" -name 'FULL-*' -type f -not -path '*/.fleecefs/*')"
}

say() { printf '%-46s %s\n' "$1" "$2"; }

# same WHAT FORMAT FILE POINT: compares an image with a mounted point.
same() {
    if qemu-img compare -q -f "$2" -F raw "$3" "$4"; then say "$1" same; else say "$1" DIFFERS; bad=1; fi
}

upstream() { "$python" "$qmprestore" "$@" >"$work/upstream.log" 2>&1 || { say "qmprestore $*" FAILED; tail -n 5 "$work/upstream.log"; bad=1; return 1; }; }

compare_merges() {
    local point name folder
    for point in "${points[@]}"; do
        name=$(basename "$point" .raw)
        folder=$(copy)
        upstream merge --dir "$folder" --until "$name" --targetfile "$work/merged" || continue
        same "qmprestore merge --until ${name%%-*}-${name#*-}" qcow2 "$work/merged" "$point"
        rm -f "$work/merged"
    done
}

# newest FOLDER: the newest image in it, by the time in its name.
newest() {
    find "$1" -maxdepth 1 -type f \( -name 'FULL-*' -o -name 'INC-*' \) | sort -t- -k2n | tail -n 1
}

# merged FOLDER POINT: what `qmprestore merge` makes of a folder.
merged() {
    local outcome=right
    rm -f "$work/merged"
    if ! "$python" "$qmprestore" merge --dir "$1" --targetfile "$work/merged" >"$work/upstream.log" 2>&1; then
        outcome=refused
    elif ! qemu-img compare -q -f qcow2 -F raw "$work/merged" "$2"; then
        outcome='wrong bytes'
    fi
    rm -f "$work/merged"
    echo "$outcome"
}

# compare_verb THEIRS OURS [OPTION]: the newest point after a verb, theirs and ours, read by qemu-img
# alone; and whether qmprestore still works on what each leaves. It has to on what ours do.
compare_verb() {
    local point=${points[-1]} folder theirs ours
    folder=$(copy)
    upstream "$1" --dir "$folder" || return 0
    same "qmprestore $1" qcow2 "$(newest "$folder")" "$point"
    theirs=$(merged "$folder" "$point")
    say "qmprestore $1, then qmprestore merge" "$theirs"
    folder=$(copy)
    if ! "$fleecefs" "$2" ${3:+"$3"} "$folder" >"$work/ours.log" 2>&1; then
        say "fleecefs $2" FAILED
        tail -n 5 "$work/ours.log"
        bad=1
        return 0
    fi
    same "fleecefs $2" qcow2 "$(newest "$folder")" "$point"
    ours=$(merged "$folder" "$point")
    say "fleecefs $2${3:+ $3}, then qmprestore merge" "$ours"
    [ "$ours" = right ] || bad=1
}

mkdir -p "$work/backups" "$work/state" "$work/mnt"
start_daemon
make_backups
"$fleecefs" mount "$work/backups" "$work/mnt"
mapfile -t points < <(find "$work/mnt" -name '*-*.raw' -type f -not -path '*/by-time/*' | sort)
[ "${#points[@]}" = 4 ] || { echo "made 4 points, ${#points[@]} are mounted" >&2; exit 1; }
compare_merges
compare_verb rebase rebase --absolute
compare_verb commit commit ""
compare_verb snapshotrebase snapshot-rebase ""
[ "$bad" = 0 ]
