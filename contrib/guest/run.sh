#!/bin/bash
# Starts and ends the tiny guest that build.sh makes.
#
#   run.sh start DIR [--root FILE] [--disk FILE[,bus=BUS][,format=FMT][,name=NAME][,snapshot=on]]... [--append WORDS]
#                    [--mem MIB] [--accel kvm|tcg] [-- QEMU OPTIONS]
#   run.sh wait DIR [SECONDS]     until the guest's user space is up
#   run.sh exec DIR COMMAND...    runs a command in the guest through its agent, prints its output
#   run.sh stop DIR               ends QEMU, by its process id
#
# BUS is virtio-blk (the default), virtio-blk-iothread, virtio-scsi, ahci or nvme. A disk's serial, and so its
# name below /dev/disk in the guest, and its node name are NAME, or disk1, disk2... in turn; name=
# with nothing after it gives a node without a name. FILE is written to, as a guest does, unless
# snapshot=on. FILE may be a block device.
# DIR gets qmp.sock, qmp2.sock (each serves one client), agent.sock, serial.log, qemu.log and pid.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

die() {
    printf 'guest: %s\n' "$*" >&2
    exit 1
}

# A processor that can open /dev/kvm need not be able to boot a kernel in it: try, and remember.
accelerator() {
    local cache=$1 log
    if [ ! -e "$cache/accel" ]; then
        printf 'tcg\n' >"$cache/accel.$$"
        if [ -w /dev/kvm ]; then
            log=$(timeout 8 qemu-system-x86_64 -accel kvm -m 256 -nodefaults -no-user-config -display none -no-reboot \
                -serial stdio -kernel "$cache/vmlinuz" -initrd "$cache/initrd" \
                -append 'console=ttyS0 panic=-1 fleece.probe' </dev/null 2>&1 || true)
            case $log in
                *'guest: kernel is up'*) printf 'kvm\n' >"$cache/accel.$$" ;;
            esac
        fi
        mv "$cache/accel.$$" "$cache/accel"
    fi
    cat "$cache/accel"
}

# disk_options NUMBER SPEC: appends QEMU's options for one disk to `options`.
disk_options() {
    local number=$1 spec=$2 file bus=virtio-blk format=qcow2 name=disk$1 snapshot=off field node
    file=${spec%%,*}
    IFS=, read -r -a fields <<<"$spec"
    for field in "${fields[@]:1}"; do
        case $field in
            bus=*) bus=${field#bus=} ;;
            format=*) format=${field#format=} ;;
            name=*) name=${field#name=} ;;
            snapshot=*) snapshot=${field#snapshot=} ;;
            *) die "what is $field?" ;;
        esac
    done
    local protocol=file
    [ ! -b "$file" ] || protocol=host_device
    local drive="file=$file,format=$format,if=none,id=drive$number,discard=unmap"
    local device="id=dev$number,serial=${name:-disk$number}"
    # A throw-away overlay is something that only -drive makes.
    if [ -n "$name" ] && [ "$snapshot" = off ]; then
        options+=(-blockdev "driver=$protocol,filename=$file,node-name=$name-file,discard=unmap"
            -blockdev "driver=$format,file=$name-file,node-name=$name,discard=unmap")
        node=$name
    else
        options+=(-drive "$drive,snapshot=$snapshot")
        node=drive$number
    fi
    case $bus in
        virtio-blk) options+=(-device "virtio-blk-pci,drive=$node,$device") ;;
        virtio-blk-iothread)
            options+=(-object "iothread,id=io$number"
                -device "virtio-blk-pci,drive=$node,iothread=io$number,$device")
            ;;
        virtio-scsi)
            [[ " ${options[*]} " == *" virtio-scsi-pci,id=scsi "* ]] || options+=(-device "virtio-scsi-pci,id=scsi")
            options+=(-device "scsi-hd,bus=scsi.0,drive=$node,$device")
            ;;
        ahci)
            [[ " ${options[*]} " == *" ich9-ahci,id=sata "* ]] || options+=(-device "ich9-ahci,id=sata")
            options+=(-device "ide-hd,bus=sata.$((sata++)),drive=$node,$device")
            ;;
        nvme) options+=(-device "nvme,drive=$node,$device") ;;
        *) die "unknown bus $bus" ;;
    esac
}

start() {
    local dir=$1 cache root='' append='' mem=256 accel='' options=() sata=0 number=0 root_number
    shift
    cache=$("$here/build.sh")
    mkdir -p "$dir"
    while [ $# -gt 0 ]; do
        case $1 in
            --root) root=$2 && shift 2 ;;
            --disk) number=$((number + 1)) && disk_options "$number" "$2" && shift 2 ;;
            --append) append=$2 && shift 2 ;;
            --mem) mem=$2 && shift 2 ;;
            --accel) accel=$2 && shift 2 ;;
            --) shift && options+=("$@") && break ;;
            *) die "what is $1?" ;;
        esac
    done
    if [ -z "$root" ] && [ "$number" = 0 ]; then
        root=$dir/root.qcow2
        cp --sparse=always "$cache/root.qcow2" "$root"
    fi
    if [ -n "$root" ]; then
        root_number=$((number + 1))
        disk_options "$root_number" "$root,name=root"
    fi
    [ -n "$accel" ] || accel=${FLEECEFS_GUEST_ACCEL:-$(accelerator "$cache")}
    rm -f "$dir"/{qmp,qmp2,agent}.sock "$dir/serial.log"
    # no_timer_check: on a busy machine an emulated timer is late, and the kernel would give up.
    qemu-system-x86_64 -accel "$accel" -machine q35 -m "$mem" -smp 1 \
        -nodefaults -no-user-config -display none \
        -kernel "$cache/vmlinuz" -initrd "$cache/initrd" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check $append" -no-reboot \
        -serial "file:$dir/serial.log" \
        -qmp "unix:$dir/qmp.sock,server=on,wait=off" -qmp "unix:$dir/qmp2.sock,server=on,wait=off" \
        -device virtio-serial-pci -chardev "socket,id=agent,path=$dir/agent.sock,server=on,wait=off" \
        -device virtserialport,chardev=agent,name=org.qemu.guest_agent.0 \
        "${options[@]}" </dev/null >"$dir/qemu.log" 2>&1 &
    printf '%s\n' $! >"$dir/pid"
    local tries=0
    until [ -S "$dir/qmp.sock" ]; do
        if ! alive "$dir" || [ $((tries += 1)) -gt 200 ]; then
            die "QEMU did not start: $(cat "$dir/qemu.log")"
        fi
        sleep 0.05
    done
}

alive() { kill -0 "$(cat "$1/pid")" 2>/dev/null; }

wait_ready() {
    local dir=$1 end=$((SECONDS + ${2:-120}))
    until grep -q 'guest: ready' "$dir/serial.log" 2>/dev/null; do
        alive "$dir" || die "QEMU has ended: $(cat "$dir/qemu.log") $(tail -n 5 "$dir/serial.log")"
        [ "$SECONDS" -lt "$end" ] || die "the guest did not come up: $(tail -n 5 "$dir/serial.log")"
        sleep 0.1
    done
}

stop() {
    local pid tries=0
    [ -e "$1/pid" ] || return 0
    pid=$(cat "$1/pid")
    kill "$pid" 2>/dev/null || true
    while kill -0 "$pid" 2>/dev/null; do
        [ $((tries += 1)) -lt 100 ] || kill -9 "$pid" 2>/dev/null || true
        sleep 0.1
    done
    rm -f "$1/pid"
}

verb=${1:-}
[ $# -ge 2 ] || die "usage: run.sh start|wait|exec|stop DIR ..."
shift
case $verb in
    start) start "$@" ;;
    wait) wait_ready "$@" ;;
    exec) exec python3 "$here/agent.py" "$1/agent.sock" "${@:2}" ;;
    stop) stop "$1" ;;
    *) die "unknown verb $verb" ;;
esac
