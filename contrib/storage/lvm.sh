#!/bin/bash
# Usage: contrib/storage/lvm.sh [FOLDER]
# Backs up disks that are logical volumes: a plain one and a thin one. They live in a guest, so that
# this machine's own volumes and kernel do not matter. The guest is Debian's kernel over this
# machine's root, which it sees read-only below a throw-away layer, and so it runs the same lvm2,
# QEMU and fleecefs. The kernel is unpacked from its package into FOLDER (below target/ if not given);
# lvm2 is installed if it is missing. Prints a table; exit code 1 if anything differs. It takes four to
# six minutes, since the guest is emulated; FLEECEFS_GUEST_ACCEL names another accelerator of QEMU.
set -euo pipefail
case ${1:-} in -*) sed -n '2,9s/^# //p' "$0" >&2 && exit 2 ;; esac
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-${CARGO_TARGET_DIR:-$root/target}/lvm}
# shellcheck source=../lib/deps.sh
. "$root/contrib/lib/deps.sh"

# shellcheck disable=SC2034
inside=lvm-inside.sh guest_disk=768M
# shellcheck source=guest.sh
. "$root/contrib/storage/guest.sh"
guest_run lvm
