#!/bin/bash
# Usage: contrib/old-qemu.sh FOLDER [COMMAND...]
# Unpacks the oldest QEMU that this machine's package lists have into FOLDER, beside the one that is
# installed, and runs COMMAND with it first on the PATH. (On Debian 12 with backports that is 7.2,
# the oldest that fleecefs serves.) Without COMMAND prints the folder for the PATH.
# Where the lists have nothing older it says so and runs nothing: exit code 4.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
folder=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=lib/deps.sh
. "$here/lib/deps.sh"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

packages=(qemu-system-x86 qemu-system-common qemu-system-data qemu-utils)

versions() { apt-cache madison "$1" | awk '{ print $3 }' | sort -uV; }

# The oldest that can really be downloaded: security lists name versions that have gone since.
download_oldest() {
    local version
    for version in $(versions "$1"); do
        dpkg --compare-versions "$version" lt "$(deps_version qemu-system-x86)" || return 1
        (cd "$folder/packages" && apt-get -qq download "$1=$version" >/dev/null 2>&1) && return 0
    done
    return 1
}

# Libraries and firmware come from the unpacked packages where those have them.
wrap() {
    local name=$1 extra=$2
    printf '#!/bin/sh\nexport QEMU_MODULE_DIR="%s"\nexec "%s"%s "$@"\n' \
        "$folder/root/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || echo "$(uname -m)-linux-gnu")/qemu" \
        "$folder/root/usr/bin/$name" "$extra" >"$folder/bin/$name"
    chmod 755 "$folder/bin/$name"
}

if [ ! -e "$folder/ready" ]; then
    command -v apt-get >/dev/null || { deps_say "skipped: an older QEMU needs apt-get"; exit 4; }
    deps_qemu
    [ -n "$(versions qemu-system-x86)" ] || deps_apt_update
    rm -rf "${folder:?}"/{packages,root,bin}
    mkdir -p "$folder/packages" "$folder/root" "$folder/bin"
    for package in "${packages[@]}"; do
        download_oldest "$package" ||
            { deps_say "skipped: the package lists have no $package older than the one installed"; exit 4; }
    done
    for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$folder/root"; done
    wrap qemu-system-x86_64 " -L \"$folder/root/usr/share/qemu\" -L /usr/share/seabios"
    for name in qemu-img qemu-io qemu-nbd qemu-storage-daemon; do wrap "$name" ""; done
    "$folder/bin/qemu-img" --version >/dev/null ||
        { deps_say "skipped: the older QEMU does not run here"; exit 4; }
    touch "$folder/ready"
fi

[ $# -gt 0 ] || { echo "$folder/bin"; exit 0; }
PATH="$folder/bin:$PATH" exec "$@"
