#!/bin/bash
# Usage: contrib/storage/attach.sh [FOLDER]
# Attaches points that need what this machine's kernel may not have: volume groups of LVM on one and two disks, beside a
# group of the host that has the same name and ids; LVM in LUKS; FAT, exFAT and NTFS; with udev at work; and what means
# harm: groups that name the host's volumes, file systems with bytes changed at random. They are attached in a guest:
# Debian's kernel over this machine's root, which it sees read-only below a throw-away layer. The kernel is unpacked from
# its package into FOLDER (that of lvm.sh if not given). Prints a table; exit code 1 if anything differs. It takes about
# twenty minutes, since the guest is emulated; FLEECEFS_GUEST_ACCEL names another accelerator of QEMU.
set -euo pipefail
case ${1:-} in -*) sed -n '2,8s/^# //p' "$0" >&2 && exit 2 ;; esac
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-${CARGO_TARGET_DIR:-$root/target}/lvm}
# shellcheck source=../lib/deps.sh
. "$root/contrib/lib/deps.sh"
# shellcheck disable=SC2034
inside=attach-inside.sh guest_disk=256M
# shellcheck source=guest.sh
. "$root/contrib/storage/guest.sh"
deps_packages udev cryptsetup-bin
guest_run attach
