#!/bin/bash
# Usage: contrib/nights.sh [FOLDER]
# Four nights of two VMs under a real systemd, in fast motion: the Debian package is installed, seven lines of configuration
# are written, and `systemctl start fleecefs-backup` makes backups at faked dates: retention at work, one night with a full
# disk, a timer, a verification, a mount by fstab. Prints what is seen; exit code 1 if anything is not as it should be.
#
# systemd is the first process of a container (systemd-nspawn) over this machine's root, which it sees below a throw-away
# layer; so nothing here is changed. Needs root and /dev/fuse; takes a minute or two once the program is built. FOLDER has
# the package [default: target/debian].
#
#   BINARY=path/to/fleecefs          a program that is built already
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1-} in -*) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;; esac
# shellcheck source=lib/deps.sh
. contrib/lib/deps.sh
[ "$(id -u)" = 0 ] || deps_die "this needs root"

# In a mount namespace of its own: whatever is mounted goes with this.
if [ -z "${FLEECEFS_NIGHTS:-}" ]; then
    deps_packages systemd systemd-container dbus
    deps_clock
    deps_fuse
    deps_qemu
    deps_bench
    FLEECEFS_NIGHTS=$(contrib/package.sh "${1:-target/debian}" | tail -n 1)
    export FLEECEFS_NIGHTS
    exec unshare --mount --propagation private "$PWD/contrib/nights.sh"
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/fleecefs-nights.XXXXXX")
trap 'umount --lazy "$work/layer/root" "$work/layer"; rm -rf --one-file-system "$work"' EXIT
# systemd needs control groups of version 2, also where this machine has others.
if [ ! -e /sys/fs/cgroup/cgroup.controllers ]; then mount -t cgroup2 none /sys/fs/cgroup; fi
mkdir "$work/layer"
mount -t tmpfs -o size=2G none "$work/layer"
mkdir "$work/layer"/{upper,work,root}
mount -t overlay -o "lowerdir=/,upperdir=$work/layer/upper,workdir=$work/layer/work" none "$work/layer/root"
root=$work/layer/root
# What is installed here in other ways is not seen.
rm -rf "$root"/usr/local/bin/fleecefs "$root"/usr/local/lib/systemd/system/fleecefs* "$root"/sbin/mount.f*fleecefs "$root/etc/fleecefs"
# (As containers have it, whose packages start nothing.)
rm -f "$root/usr/sbin/policy-rc.d"
cp "$FLEECEFS_NIGHTS" "$root/root/fleecefs.deb"
cp contrib/nights-inside.sh "$root/root/nights.sh"
cat >"$root/etc/systemd/system/nights.service" <<'UNIT'
[Unit]
After=dbus.service systemd-tmpfiles-setup.service
Wants=dbus.service systemd-tmpfiles-setup.service
[Service]
Type=oneshot
Environment=HOME=/root LC_ALL=C.UTF-8
StandardOutput=file:/root/said
StandardError=file:/root/said
ExecStart=/bin/bash /root/nights.sh
ExecStopPost=/bin/sh -c 'systemctl exit "$EXIT_STATUS"'
UNIT
: >"$root/root/said"
code=0
timeout 1200 systemd-nspawn --quiet --register=no --keep-unit --directory="$root" --private-network --bind=/dev/fuse \
    --capability=all --boot --console=pipe -- systemd.unit=nights.service systemd.show_status=0 >"$work/log" 2>&1 </dev/null &
container=$!
tail -n +1 --pid="$container" -s 0.2 -f "$root/root/said"
wait "$container" || code=$?
grep -qx 'nights: all is as it should be' "$root/root/said" && exit
tail -n 30 "$work/log" >&2
printf 'nights.sh: failed (%s)\n' "$code" >&2
exit 1
