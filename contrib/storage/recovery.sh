#!/bin/bash
# Usage: contrib/storage/recovery.sh [FOLDER]
# Walks through what contrib/doc/recovery.md says of doing by hand what `attach` does: a point's file system with and
# without its journal, a volume group beside one of the host's that has the same name, and LUKS. The commands are taken
# from the page. They run in a guest: Debian's kernel over this machine's root, which it sees read-only below a throw-away
# layer. The kernel is unpacked from its package into FOLDER (that of lvm.sh if not given). Prints a table; exit code 1 if
# anything differs. It takes some five minutes, since the guest is emulated; FLEECEFS_GUEST_ACCEL names another accelerator.
set -euo pipefail
case ${1:-} in -*) sed -n '2,8s/^# //p' "$0" >&2 && exit 2 ;; esac
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-${CARGO_TARGET_DIR:-$root/target}/lvm}
# shellcheck source=../lib/deps.sh
. "$root/contrib/lib/deps.sh"
# shellcheck disable=SC2034
inside=recovery-inside.sh guest_disk=256M
# shellcheck source=guest.sh
. "$root/contrib/storage/guest.sh"
deps_packages udev cryptsetup-bin
guest_run recovery
