# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by the proofs beside it: backs up a raw disk that qemu-storage-daemon serves, changes it in
# every way, and after each backup compares the mounted point with what the disk holds, as its
# storage tells it without QEMU. Needs bash with `set -euo pipefail`.
#
# The caller sets `fleecefs` (the program), `work` (a folder of its own), `size` (of the disk, in
# MiB, a multiple of 8), `grown` (what it has later), and defines
#   disk_options        prints the --blockdev options of the node that opens the disk
#   disk_contents FILE  copies what the disk holds to FILE
#   disk_resize MIB     gives the disk this size
# and calls `sequence NAME`. It sets bad=1 if anything differs.

bad=0 daemon='' holder='' truths=0

# row STEP WANT GOT: a line of the table.
row() {
    local outcome=ok
    [ "$2" = "$3" ] || { outcome="WRONG, expected $2" bad=1; }
    printf '%-52s %-38s %s\n' "$1" "$3" "$outcome"
}

sequence_end_daemon() {
    [ -n "$daemon" ] || return 0
    kill "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
    daemon=''
}

# To be called by the caller's trap.
sequence_clean_up() {
    if mountpoint -q "$work/mnt"; then "$fleecefs" umount "$work/mnt" || umount -l "$work/mnt"; fi
    [ -z "$holder" ] || { kill "$holder" && wait "$holder"; } 2>/dev/null || true
    sequence_end_daemon
}

start_daemon() {
    local tries=0
    rm -f "$work"/{qmp,qmp2,nbd}.sock
    qemu-storage-daemon \
        --chardev "socket,id=c,path=$work/qmp.sock,server=on,wait=off" --monitor chardev=c \
        --chardev "socket,id=c2,path=$work/qmp2.sock,server=on,wait=off" --monitor chardev=c2 \
        --nbd-server "addr.type=unix,addr.path=$work/nbd.sock" \
        --blockdev "$(disk_options),node-name=disk-file,discard=unmap" \
        --blockdev "driver=raw,node-name=disk,file=disk-file,discard=unmap" \
        --blockdev "driver=raw,node-name=disk-top,file=disk,discard=unmap" \
        --export "type=nbd,id=e,node-name=disk-top,name=disk,writable=on" \
        </dev/null >"$work/daemon.log" 2>&1 &
    daemon=$!
    until [ -S "$work/nbd.sock" ]; do
        if [ $((tries += 1)) -gt 300 ] || ! kill -0 "$daemon" 2>/dev/null; then
            echo "qemu-storage-daemon does not come up: $(cat "$work/daemon.log")" >&2
            exit 1
        fi
        sleep 0.1
    done
}

# qmp COMMAND ARGUMENTS: one command on the daemon's second monitor.
qmp() {
    /usr/bin/python3 -IS - "$work/qmp2.sock" "$1" "$2" <<'PYTHON'
import json, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
f = s.makefile("rw")
f.readline()
for command, arguments in (("qmp_capabilities", "{}"), sys.argv[2:4]):
    f.write(json.dumps({"execute": command, "arguments": json.loads(arguments)}) + "\n")
    f.flush()
    answer = json.loads(f.readline())
    while "event" in answer:
        answer = json.loads(f.readline())
if "error" in answer:
    sys.exit(answer["error"]["desc"])
print(json.dumps(answer["return"]))
PYTHON
}

# write COMMAND...: qemu-io's, into the running disk.
write() {
    local commands=() command
    for command in "$@"; do commands+=(-c "$command"); done
    qemu-io -d unmap -f raw "${commands[@]}" "nbd+unix:///disk?socket=$work/nbd.sock" >"$work/io.log" 2>&1 || {
        cat "$work/io.log" >&2
        exit 1
    }
}

# backup LEVEL [TARGET]: says what fleecefs said in $work/said.
backup() {
    "$fleecefs" backup --qmp "$work/qmp.sock" --target "$work/${2:-backups}" --state-dir "$work/state" \
        --level "$1" --nbd "unix:$work/nbd.sock" >"$work/said" 2>&1
}

# The file name of the newest point.
newest() {
    find "$work/backups" -type f -not -path '*/.fleecefs/*' \
        \( -name 'FULL-*' -o -name 'INC-*' -o -name 'DIFF-*' \) -printf '%f\n' | sort -t- -k2n | tail -n 1
}

mounted() { printf '%s\n' "$work/mnt/"*"/$1.raw"; }

# compare POINT FILE: prints "LEVEL, equal" or what differs.
compare() {
    local point outcome=equal
    "$fleecefs" mount "$work/backups" "$work/mnt"
    point=$(mounted "$1")
    cmp "$point" "$2" >"$work/cmp.log" 2>&1 || outcome="differs: $(tail -n 1 "$work/cmp.log")"
    "$fleecefs" umount "$work/mnt"
    echo "${1%%-*}, $outcome"
}

# keep POINT FILE: what a point must be, for the last comparison of all.
keep() {
    truths=$((truths + 1))
    printf '%s %s\n' "$1" "$(md5sum <"$2")" >>"$work/truths"
}

# good STEP LEVEL WANT: a backup while nobody writes; the point is what the disk holds.
good() {
    local got point
    if backup "$2"; then
        disk_contents "$work/truth"
        point=$(newest)
        got=$(compare "$point" "$work/truth")
        keep "$point" "$work/truth"
    else
        got=failed
        cat "$work/said" >&2
    fi
    row "$1" "$3" "$got"
}

# says STEP TEXT: whether the last backup said it.
says() {
    if grep -q -- "$2" "$work/said"; then row "$1" said said; else row "$1" said 'not said'; cat "$work/said" >&2; fi
}

# busy STEP LEVEL WANT: a backup that is held at its moment while everything is overwritten; the
# point is the frozen view, which is what the disk held.
busy() {
    local got point tries=0 hold=$work/hold
    rm -rf "$hold"
    mkdir "$hold"
    disk_contents "$work/truth"
    FLEECEFS_HOLD=$hold "$fleecefs" backup --qmp "$work/qmp.sock" --target "$work/backups" \
        --state-dir "$work/state" --level "$2" --nbd "unix:$work/nbd.sock" >"$work/said" 2>&1 &
    holder=$!
    until [ -e "$hold/ready" ]; do
        if [ $((tries += 1)) -gt 600 ] || ! kill -0 "$holder" 2>/dev/null; then
            cat "$work/said" >&2
            exit 1
        fi
        sleep 0.1
    done
    write "write -P 0xaa 0 $((size / 2))M" "discard $((size / 2))M 2M" "write -z $((size / 2 + 2))M 2M" "write -P 0xbb $((size - 1))M 1M"
    touch "$hold/go"
    if wait "$holder"; then
        point=$(newest)
        got=$(compare "$point" "$work/truth")
        keep "$point" "$work/truth"
    else
        got=failed
        cat "$work/said" >&2
    fi
    holder=''
    row "$1" "$3" "$got"
}

# fails STEP LEVEL TEXT: a backup that must not be made, and says why.
fails() {
    if backup "$2"; then row "$1" refused 'not refused'; return 0; fi
    if grep -q -- "$3" "$work/said"; then row "$1" refused refused; else row "$1" refused 'failed otherwise'; cat "$work/said" >&2; fi
}

# Every point once more, when all have been made.
all_again() {
    local point sum _ same=0
    "$fleecefs" mount "$work/backups" "$work/mnt"
    while read -r point sum _; do
        if [ "$(md5sum <"$(mounted "$point")")" = "$sum  -" ]; then same=$((same + 1)); fi
    done <"$work/truths"
    "$fleecefs" umount "$work/mnt"
    row "all points once more" "$truths of $truths equal" "$same of $truths equal"
    if "$fleecefs" verify "$work/backups" >"$work/said" 2>&1; then row verify good good; else row verify good bad; cat "$work/said" >&2; fi
}

# resize MIB: gives the disk another size, in its storage and in QEMU. An exported node cannot be
# resized (that below a guest's device can): the export goes for that moment.
resize() {
    qmp block-export-del '{"id": "e"}' >/dev/null
    until [ "$(qmp query-block-exports '{}')" = '[]' ]; do sleep 0.1; done
    disk_resize "$1"
    qmp block_resize "{\"node-name\": \"disk-top\", \"size\": $(($1 << 20))}" >/dev/null
    qmp block-export-add '{"type": "nbd", "id": "e", "node-name": "disk-top", "name": "disk", "writable": true}' >/dev/null
}

# Smaller and as it was, then larger. A volume has its old bytes again, while QEMU has forgotten what
# of them had changed (of the bytes 7 below, which no point has seen).
resizes() {
    write "write -P 7 $((size / 2))M 1M"
    resize $((size / 4))
    resize "$size"
    good "inc of the disk shrunk and grown again" inc "INC, equal"
    says "  it says so" "was shrunk and grown again since"
    resize $((size / 4))
    resize "$grown"
    write "write -P 9 $((size - 1))M 2M" "write -P 10 $((grown - 1))M 1M"
    good "inc of the disk shrunk and grown larger" inc "INC, equal"
    says "  what it has grown by is copied whole" "has grown by"
}

# sequence NAME: all of it, over one disk.
sequence() {
    rm -rf "${work:?}"/{backups,state,truths}
    mkdir -p "$work"/{backups,state,mnt}
    truths=0
    printf '%s\n' "--- $1"
    start_daemon
    write "write -P 1 0 $((size * 5 / 8))M"
    good "full" full "FULL, equal"
    write "write -P 2 1M 3M" "write -P 3 $((size - 1))M 1M" "write -P 4 $((size / 2))M 123k"
    good "inc after writes" inc "INC, equal"
    write "write -z 2M 1M" "write -z $((size / 2))M 64k" "discard 3M 2M" "discard $((size / 2 + 1))M 4k"
    good "inc after zeroes and discards" inc "INC, equal"
    write "write -P 5 2M 64k" "write -P 6 0 512" "write -z $((size - 1))M 512k"
    good "diff since the full" diff "DIFF, equal"
    busy "inc while the whole disk is overwritten" inc "INC, equal"
    good "inc after that" inc "INC, equal"
    good "auto with nothing changed" auto "INC, equal"
    resizes
    write "write -P 11 $((grown - 2))M 1M" "discard 0 1M"
    good "inc after that" inc "INC, equal"
    good "diff of the grown disk since the full" diff "DIFF, equal"
    sequence_end_daemon
    start_daemon
    write "write -P 12 4M 1M"
    fails "inc after a restart" inc "is not on the disk"
    good "auto after a restart" auto "FULL, equal"
    says "  it says why" "taking a FULL: bitmap .* is not on the disk"
    write "write -P 13 5M 1M" "write -z 6M 1M"
    good "inc after the restart" auto "INC, equal"
    good "diff after the restart" diff "DIFF, equal"
    sequence_end_daemon
    all_again
}
