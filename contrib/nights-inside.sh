#!/bin/bash
# The part of nights.sh that runs in its container, as root, with systemd as the first process.
set -euo pipefail
cd /root
bad=0

# row WHAT WANTED GOT
row() {
    local word=ok
    if [ "$2" != "$3" ]; then word=WRONG bad=$((bad + 1)); fi
    printf '%-5s  %-66s %s\n' "$word" "$1" "$3"
    [ "$word" = ok ] || printf '       wanted: %s\n' "$2"
}
say() { printf '\n--- %s\n' "$*"; }
show() {
    printf '$ %s\n' "$*"
    "$@" 2>&1 | sed 's/^/  /' || true
}

# qmp VM COMMAND [ARGUMENTS]: one command to a QEMU. (It has a second socket for this: the first is for backups.)
qmp() {
    python3 - "/run/$1/qmp.sock" "$2" "${3:-{\}}" <<'PYTHON'
import json, socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
lines = peer.makefile("rw")
lines.readline()
for command, arguments in (("qmp_capabilities", {}), (sys.argv[2], json.loads(sys.argv[3]))):
    lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    lines.flush()
    answer = {}
    while "return" not in answer and "error" not in answer:
        answer = json.loads(lines.readline())
if "error" in answer or "rror" in str(answer["return"]):
    sys.exit(str(answer))
PYTHON
}

# guest VM: a VM without an operating system; what it writes is said by QMP.
guest() {
    mkdir -p "/run/$1" /srv/images
    qemu-img create -q -f qcow2 "/srv/images/$1.qcow2" 64M
    systemd-run --quiet --unit="guest-$1" qemu-system-x86_64 -machine q35 -accel tcg -m 32 -nodefaults -display none -no-user-config \
        -uuid "$(cat /proc/sys/kernel/random/uuid)" -name "$1" \
        -qmp "unix:/run/$1/backup.sock,server=on,wait=off" -qmp "unix:/run/$1/qmp.sock,server=on,wait=off" \
        -blockdev "driver=qcow2,node-name=disk,file.driver=file,file.filename=/srv/images/$1.qcow2" \
        -device virtio-blk-pci,drive=disk,id=sda
    until [ -S "/run/$1/qmp.sock" ] && qmp "$1" query-status 2>/dev/null; do
        systemctl --quiet is-active "guest-$1" || { systemctl status --no-pager --full "guest-$1"; journalctl --sync; journalctl --no-pager -n 30; return 1; }
        sleep 0.1
    done
}

# writes VM PATTERN: the guest writes 1 MiB of it in a place of its own.
writes() {
    local io="write -P $2 $(($2 * 2))M 1M"
    qmp "$1" human-monitor-command "{\"command-line\": \"qemu-io -d /machine/peripheral/sda/virtio-backend \\\"$io\\\"\"}"
}

# The night of that date: the timer's service, to which it is that date.
night() {
    mkdir -p /run/systemd/system/fleecefs-backup.service.d
    printf '[Service]\nEnvironment=LD_PRELOAD=%s NO_FAKE_STAT=1 FAKETIME_DONT_FAKE_MONOTONIC=1 "FAKETIME=@%s"\n' \
        "$faketime" "$1 01:00:00" >/run/systemd/system/fleecefs-backup.service.d/night.conf
    systemctl daemon-reload
    say "the night of $1"
    code=0
    systemctl start fleecefs-backup || code=$(systemctl show --property=ExecMainStatus --value fleecefs-backup)
    journalctl --quiet --output=cat "_SYSTEMD_INVOCATION_ID=$(systemctl show --property=InvocationID --value fleecefs-backup)" | sed 's/^/  /'
}

points() { fleecefs list --json "/backups/$1" | jq '[.disks[].points[]] | length'; }
newest() { fleecefs list --json "/backups/$1" | jq -r '.disks[0].points[-1] | .level'; }

# is_its_disk VM: whether the newest point in the mount is what the guest's disk is now.
is_its_disk() {
    qemu-img convert --force-share -O raw "/srv/images/$1.qcow2" /root/now.raw
    cmp -s /root/now.raw "/mnt/points/$1"/*/latest.raw && echo same || echo differs
}

faketime=$(find /usr/lib -name libfaketime.so.1 | head -n 1)
say "the package is installed"
dpkg --install fleecefs.deb >/dev/null
show fleecefs --version
row "nothing is enabled" 0 "$(find /etc/systemd/system -name '*fleecefs*' | wc -l)"
row "no VM is configured, and that is told" 3 "$(fleecefs backup --all >/dev/null 2>&1; echo $?)"

say "two guests, and seven lines"
guest web
guest db
mkdir -p /backups /mnt/points
mount -t tmpfs -o size=96M,mode=755 backups /backups
cat >/etc/fleecefs/fleecefs.toml <<'CONF'
[defaults]
target = "/backups/{vm}"
keep_daily = 2
[vms.web]
qmp = "/run/web/backup.sock"
[vms.db]
qmp = "/run/db/backup.sock"
CONF
sed 's/^/  /' /etc/fleecefs/fleecefs.toml
show fleecefs config check
row "fleecefs config check" 0 "$(fleecefs config check >/dev/null 2>&1; echo $?)"

for vm in web db; do writes $vm 1; done
night 2026-03-01
row "exit code" 0 "$code"
row "points of web and db" "1 1" "$(points web) $(points db)"
row "the newest is a" full "$(newest web)"

for vm in web db; do writes $vm 2; done
night 2026-03-02
row "exit code" 0 "$code"
row "points of web and db" "2 2" "$(points web) $(points db)"
row "the newest is an" inc "$(newest web)"

say "a full disk"
for vm in web db; do writes $vm 3; done
dd if=/dev/zero of=/backups/filler bs=1M status=none 2>/dev/null || true
night 2026-03-03
row "exit code: no space left" 7 "$code"
row "the unit failed" failed "$(systemctl is-failed fleecefs-backup || true)"
row "points of web and db are as they were" "2 2" "$(points web) $(points db)"
row "both guests run" "active active" "$(systemctl is-active guest-web guest-db | tr '\n' ' ' | sed 's/ $//')"
rm /backups/filler

for vm in web db; do writes $vm 4; done
night 2026-03-04
row "exit code" 0 "$code"
row "two days are kept: points of web and db" "2 2" "$(points web) $(points db)"
show fleecefs list /backups/web

say "a part of all backups is verified (today: files that are from later than now are not remembered)"
systemctl start fleecefs-verify && code=0 || code=$(systemctl show --property=ExecMainStatus --value fleecefs-verify)
row "exit code" 0 "$code"
row "points that were verified" 1 "$(fleecefs list --json /backups | jq '[.disks[].points[] | select(.verified != null)] | length')"

say "a mount by fstab"
printf '%s\n' '/backups /mnt/points fuse.fleecefs noauto,x-systemd.automount,x-systemd.requires-mounts-for=/backups,allow_other,mode=0440,gid=backup 0 0' >>/etc/fstab
systemctl daemon-reload
# (A container has no automounts: the mount unit that systemd makes of the line is started as the automount would.)
systemctl start mnt-points.mount
show ls /mnt/points
show findmnt --noheadings --types fuse.fleecefs,fuse --output TARGET,SOURCE,FSTYPE
for vm in web db; do row "the newest point of $vm and its disk" same "$(is_its_disk $vm)"; done
show ls -lL /mnt/points/web/*/
mkdir -p /mnt/web
systemctl start fleecefs@web
row "fleecefs@web mounts" active "$(systemctl is-active fleecefs@web)"
row "and is the same" same "$(cmp -s /mnt/web/*/latest.raw /mnt/points/web/*/latest.raw && echo same || echo differs)"
systemctl stop fleecefs@web mnt-points.mount

say "every night from now on"
show systemctl enable --now fleecefs-backup.timer fleecefs-verify.timer
row "the timer waits" "active 1:00" "$(systemctl is-active fleecefs-backup.timer) $(systemctl show fleecefs-backup.timer --property=TimersCalendar --value | grep -q '01:00:00' && echo 1:00)"

if fleecefs health --help >/dev/null 2>&1; then
    say "health"
    show fleecefs health /backups/web /backups/db
fi

say "the package goes"
systemctl stop guest-web guest-db
printf '' >/etc/fstab
dpkg --purge fleecefs >/dev/null
row "units, links and state are gone" 0 "$(find /etc/systemd /usr/lib/systemd /var/lib/fleecefs* -name '*fleecefs*' 2>/dev/null | wc -l)"
row "backups stay" 2 "$(find /backups -name 'FULL-*.qcow2' | wc -l)"
[ "$bad" = 0 ] && printf '\nnights: all is as it should be\n'
