#!/bin/bash
# Installs fleecefs for everybody: the program, the names by which mount(8) and fstab find it, man
# pages, completions and the systemd units. Builds the release first where there is none.
#
#   contrib/install.sh                        # as root, or through sudo: into /usr/local and /sbin
#   contrib/install.sh --uninstall            # removes what that has installed, and nothing else
#   PREFIX=/usr DESTDIR=/tmp/package contrib/install.sh     # for packagers
#   BINARY=path/to/fleecefs contrib/install.sh              # a program that is built already
#
# What was installed is written down in PREFIX/share/doc/fleecefs/installed. Configuration (/etc/fleecefs) and state
# (/var/lib/fleecefs) are left as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=lib/deps.sh
. contrib/lib/deps.sh

PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
BINARY=${BINARY:-${CARGO_TARGET_DIR:-target}/release/fleecefs}
doc=$PREFIX/share/doc/fleecefs
list=$doc/installed
helpers=(mount.fleecefs mount.fuse.fleecefs)

# What goes into a package directory needs no root.
as_owner() {
    if [ -n "$DESTDIR" ]; then "$@"; else deps_as_root "$@"; fi
}

tell_systemd() {
    if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then deps_as_root systemctl daemon-reload; fi
}

# note WHAT PATH: a line for --uninstall: "file", "link" or "folder", and the path.
note() { printf '%s %s\n' "$1" "$2" >>"$made/list"; }

# folder PATH: makes a folder, and writes down which ones were not there.
folder() {
    local at=$1 missing=()
    while [ "$at" != / ] && [ ! -d "$DESTDIR$at" ]; do
        missing+=("$at")
        at=$(dirname "$at")
    done
    for at in "${missing[@]}"; do note folder "$at"; done
    as_owner mkdir -p "$DESTDIR$1"
}

# put FILE TARGET [MODE]
put() {
    folder "$(dirname "$2")"
    as_owner install -m "${3:-644}" "$1" "$DESTDIR$2"
    note file "$2"
}

install_all() {
    local name page shell file
    if [ ! -x "$BINARY" ]; then
        deps_rust
        deps_build
        cargo build --release --quiet
    fi
    mkdir "$made/man"
    "$BINARY" man "$made/man"
    for shell in bash zsh fish; do "$BINARY" completions "$shell" >"$made/$shell"; done

    put "$BINARY" "$PREFIX/bin/fleecefs" 755
    # mount(8) looks for helpers in /sbin alone.
    folder /sbin
    for name in "${helpers[@]}"; do
        as_owner ln -sfn "$PREFIX/bin/fleecefs" "$DESTDIR/sbin/$name"
        note link "/sbin/$name"
    done
    for page in "$made"/man/*; do put "$page" "$PREFIX/share/man/man1/${page##*/}"; done
    put "$made/bash" "$PREFIX/share/bash-completion/completions/fleecefs"
    put "$made/zsh" "$PREFIX/share/zsh/site-functions/_fleecefs"
    put "$made/fish" "$PREFIX/share/fish/vendor_completions.d/fleecefs.fish"
    for file in contrib/systemd/fleecefs*; do put "$file" "$PREFIX/lib/systemd/system/${file##*/}"; done
    for file in README.md mnt-backups.mount mnt-backups.automount; do
        put "contrib/systemd/$file" "$doc/systemd/$file"
    done
    put contrib/deb/fleecefs.toml "$doc/fleecefs.toml"
    folder "$doc"
    note file "$list"
    # What an earlier one has made, and this one has found, is still ours.
    if [ -e "$DESTDIR$list" ]; then cat "$DESTDIR$list" >>"$made/list"; fi
    sort -u "$made/list" >"$made/sorted"
    as_owner install -m 644 "$made/sorted" "$DESTDIR$list"
    tell_systemd
    printf 'installed %s\n' "$DESTDIR$PREFIX/bin/fleecefs"
}

# What version 0.1.0 has installed, which wrote no list.
list_of_0_1_0() {
    local path
    for path in bin/fleecefs share/bash-completion/completions/fleecefs share/zsh/site-functions/_fleecefs \
        share/fish/vendor_completions.d/fleecefs.fish lib/systemd/system/fleecefs@.service \
        share/doc/fleecefs/systemd/{README.md,mnt-backups.mount,mnt-backups.automount}; do
        printf 'file %s\n' "$PREFIX/$path"
    done
    for path in "$DESTDIR$PREFIX"/share/man/man1/fleecefs{,-*}.1; do printf 'file %s\n' "${path#"$DESTDIR"}"; done
    for path in "${helpers[@]}"; do printf 'link %s\n' "/sbin/$path"; done
    printf 'folder %s\n' "$doc/systemd" "$doc"
}

# remove WHAT PATH. A link is ours as long as it leads to what was installed: a package may have put its own there.
remove() {
    local at=$DESTDIR$2
    case $1 in
        file) as_owner rm -f "$at" ;;
        link) if [ "$(readlink "$at")" = "$PREFIX/bin/fleecefs" ]; then as_owner rm -f "$at"; fi ;;
        folder) if [ -d "$at" ]; then as_owner rmdir --ignore-fail-on-non-empty "$at"; fi ;;
    esac
}

uninstall() {
    local what path
    if [ -e "$DESTDIR$list" ]; then
        cp "$DESTDIR$list" "$made/list"
    elif [ -e "$DESTDIR$PREFIX/bin/fleecefs" ]; then
        list_of_0_1_0 >"$made/list"
    else
        printf 'nothing is installed in %s\n' "$DESTDIR$PREFIX" >&2
        exit 3
    fi
    # By their names in the list only below the prefix, and the two helpers.
    while read -r what path; do
        case $path in
            */../* | */..) continue ;;
            "$PREFIX"/* | /sbin | /sbin/mount.fleecefs | /sbin/mount.fuse.fleecefs) ;;
            *) continue ;;
        esac
        printf '%s %s\n' "$what" "$path"
    done <"$made/list" >"$made/ours"
    # What 'systemctl enable' has made of units that go now.
    if [ -d "$DESTDIR/etc/systemd/system" ]; then
        as_owner find "$DESTDIR/etc/systemd/system" -type l -lname "$PREFIX/lib/systemd/system/fleecefs*" -delete
    fi
    while read -r what path; do
        [ "$what" = folder ] || remove "$what" "$path"
    done <"$made/ours"
    # The deepest first.
    sed -n 's/^folder //p' "$made/ours" | LC_ALL=C sort -r | while read -r path; do remove folder "$path"; done
    tell_systemd
    printf 'removed %s\n' "$DESTDIR$PREFIX/bin/fleecefs"
}

made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
case ${1:-} in
    '') install_all ;;
    --uninstall) uninstall ;;
    *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
