#!/bin/bash
# Usage: contrib/package-test.sh [SUITE...]
# Tests the Debian package (contrib/package.sh makes it) on fresh systems of Debian 12 and 13 (bookworm and trixie, or
# those that are named), each in a folder of its own: it installs, mounts from fstab, goes over what version 0.1.0's
# install.sh has left, keeps changed configuration on upgrades, is removed and purged without a rest, and installs again.
# Prints each step, and exits with 1 if one failed. Needs root, /dev/fuse and room for 1 GiB in TMPDIR. The fresh systems
# are kept in target/package-test.
#
#   BINARY=path/to/fleecefs          a program that is built already
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1-} in -*) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;; esac
# shellcheck source=lib/deps.sh
. contrib/lib/deps.sh
[ "$(id -u)" = 0 ] || deps_die "this needs root"

suites=("$@")
[ ${#suites[@]} -gt 0 ] || suites=(bookworm trixie)
kept=$PWD/target/package-test
mkdir -p "$kept"
deps_packages mmdebstrap
deps_fuse

# In a mount namespace of its own, so that nothing of the folders' mounts is left however this ends.
if [ -z "${FLEECEFS_PACKAGE_TEST:-}" ]; then
    export FLEECEFS_PACKAGE_TEST=1
    exec unshare --mount --propagation private "$PWD/contrib/package-test.sh" "${suites[@]}"
fi

bad=0
work=$(mktemp -d "${TMPDIR:-/tmp}/fleecefs-package.XXXXXX")
clean_up() {
    local status=$? at
    # The deepest first.
    awk -v below="$work/" 'index($2, below) == 1 { print $2 }' /proc/mounts | sort -r |
        while read -r at; do umount --lazy "$at" || true; done
    rm -rf --one-file-system "$work"
    exit "$status"
}
trap clean_up EXIT

# The mirror that this machine uses for its own suite has the others as well.
mirror() { apt-get indextargets --format "\$(RELEASE) \$(REPO_URI)" 'Created-By: Packages' | sed -n "s/^$(deps_codename) //p" | head -n 1; }

# fresh SUITE: a system with what the package depends on, unpacked in $root.
fresh() {
    local tar=$kept/$1.tar
    if [ ! -e "$tar" ]; then
        mmdebstrap --quiet --variant=minbase --include=fuse3,man-db,mount "$1" "$tar.new" "$(mirror)"
        mv "$tar.new" "$tar"
    fi
    root=$work/$1
    mkdir "$root"
    tar -C "$root" -xf "$tar" --exclude='./dev/*'
    mount --bind /dev "$root/dev"
    mount -t proc proc "$root/proc"
    # Nothing is started in here.
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod 755 "$root/usr/sbin/policy-rc.d"
}

inside() { chroot "$root" env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"; }

# step WHAT COMMAND...: prints whether it succeeded, and what it said if not.
step() {
    local what=$1
    shift
    # (Not as a condition: there a command that fails would not end its function.)
    "$@" >"$work/said" 2>&1 &
    if wait $!; then
        printf '%-9s ok      %s\n' "$suite" "$what"
    else
        printf '%-9s FAILED  %s\n' "$suite" "$what"
        sed 's/^/          /' "$work/said"
        bad=$((bad + 1))
    fi
}

# All names of the system, but for logs, caches, and what dpkg keeps for itself.
names() {
    (cd "$root" && find . -xdev \( -path ./proc -o -path ./dev -o -path ./run -o -path ./var/log -o -path ./var/cache -o -path ./var/lib/dpkg \
        -o -path ./var/lib/apt -o -path ./tmp -o -path ./backups -o -path ./mnt \) -prune -o -print | LC_ALL=C sort)
}

installs() {
    cp "$1" "$root/tmp/fleecefs.deb"
    inside dpkg --install /tmp/fleecefs.deb
}

has_all() {
    inside fleecefs --version
    # What a package of its suite is checked by: files, links and their sums.
    inside dpkg --verify fleecefs
    inside man --where fleecefs-backup
    test "$(inside readlink -f /sbin/mount.fuse.fleecefs)" = /usr/bin/fleecefs
    test -s "$root/usr/share/bash-completion/completions/fleecefs"
    test -s "$root/usr/share/zsh/vendor-completions/_fleecefs"
    test -s "$root/usr/share/fish/vendor_completions.d/fleecefs.fish"
    test -s "$root/usr/lib/systemd/system/fleecefs-backup.timer"
    # Nothing is enabled.
    test -z "$(find "$root/etc/systemd" -name '*fleecefs*' 2>/dev/null)"
}

mounts_from_fstab() {
    mkdir -p "$root/backups/vm1/sda" "$root/mnt/points"
    dd if=/dev/urandom of="$root/backups/vm1/sda/FULL-1700000000-sda.raw" bs=1M count=4 status=none
    printf '%s\n' '/backups /mnt/points fuse.fleecefs noauto,allow_other,mode=0440,gid=backup 0 0' >"$root/etc/fstab"
    inside mount /mnt/points
    cmp "$root/backups/vm1/sda/FULL-1700000000-sda.raw" "$root/mnt/points/vm1/sda/latest.raw"
    # The group that Debian has for this may read it.
    test "$(stat -L -c %a:%g "$root/mnt/points/vm1/sda/latest.raw")" = 440:34
    inside umount /mnt/points
    rm "$root/etc/fstab"
    touch "$root/etc/fstab"
}

changes_configuration() { printf '%s\n' 'parallel = 2' >>"$root/etc/fleecefs/fleecefs.toml"; }
has_kept_configuration() {
    grep -qx 'parallel = 2' "$root/etc/fleecefs/fleecefs.toml"
    ! compgen -G "$root/etc/fleecefs/*.dpkg-*"
}

# As 0.1.0's install.sh has installed: the same but for the list and the units, which came later.
installs_0_1_0() {
    DESTDIR=$root BINARY=$root.program contrib/install.sh
    rm "$root/usr/local/share/doc/fleecefs"/{installed,fleecefs.toml} "$root"/usr/local/lib/systemd/system/fleecefs-*
}
is_warned_of_it() {
    installs "$1" 2>"$work/warned"
    cat "$work/warned"
    grep -q 'install.sh --uninstall' "$work/warned"
}
is_rid_of_it() {
    DESTDIR=$root contrib/install.sh --uninstall
    test -z "$(find "$root/usr/local" -name '*fleecefs*')"
    has_all
}

removes() { inside dpkg --remove fleecefs; }
has_only_configuration() {
    test -e "$root/etc/fleecefs/fleecefs.toml"
    ! test -e "$root/usr/bin/fleecefs"
}
# What the program and 'systemctl enable' leave behind.
leaves_traces() {
    mkdir -p "$root/etc/systemd/system/timers.target.wants" "$root/var/lib/fleecefs.as-1000"
    inside fleecefs verify --rolling 30d /backups || test $? = 19
    ln -s /usr/lib/systemd/system/fleecefs-backup.timer "$root/etc/systemd/system/timers.target.wants/"
    test -d "$root/var/lib/fleecefs/verified"
}
purges() { inside dpkg --purge fleecefs; }
is_as_before() {
    rmdir "$root/etc/systemd/system/timers.target.wants" 2>/dev/null || true
    names >"$work/after"
    diff "$work/before" "$work/after"
    # The group is Debian's.
    grep -q '^backup:' "$root/etc/group"
}

try() {
    suite=$1
    fresh "$suite"
    cp "$program" "$root.program"
    mkdir -p "$root/etc/systemd/system"
    names >"$work/before"
    step "it installs" installs "$older"
    step "program, helpers, man pages, completions and units are there, and nothing is enabled" has_all
    step "an fstab line mounts, for the group backup to read" mounts_from_fstab
    step "the configuration is changed" changes_configuration
    step "a newer one is installed over it" installs "$newer"
    step "the changed configuration is as it was" has_kept_configuration
    step "it is removed" removes
    step "only its configuration is left" has_only_configuration
    step "it is installed again" installs "$newer"
    step "the changed configuration is as it was" has_kept_configuration
    step "it is used, and its timer enabled" leaves_traces
    step "it is purged" purges
    step "nothing is left of it" is_as_before
    step "version 0.1.0 is installed by its install.sh" installs_0_1_0
    step "the package is installed beside it, and says what to do" is_warned_of_it "$newer"
    step "install.sh --uninstall removes 0.1.0 and nothing of the package" is_rid_of_it
    step "an fstab line mounts" mounts_from_fstab
    step "it is purged" purges
    umount "$root/proc" "$root/dev"
}

program=${BINARY:-${CARGO_TARGET_DIR:-target}/release/fleecefs}
export BINARY=$program
# Two that differ in nothing but their version.
older=$(DEB_VERSION=0.0.1-1 contrib/package.sh "$work" | tail -n 1)
newer=$(contrib/package.sh "$work" | tail -n 1)
printf '%s, %s\n' "${newer##*/}" "$(dpkg-deb -f "$newer" Depends)"
for suite in "${suites[@]}"; do try "$suite"; done
[ "$bad" = 0 ] || printf '%d steps failed\n' "$bad"
[ "$bad" = 0 ]
