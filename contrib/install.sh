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
# (/var/lib/fleecefs) are left as they are, and so is what anybody else has put where this would install: a link to
# another fleecefs stays, and where a file is in the way nothing is installed.
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

# put FILE TARGET [MODE]: is to be installed.
put() {
    note file "$2"
    sources+=("$1")
    targets+=("$2")
    modes+=("${3:-644}")
}

# Whether a package has this path, under its own name or with what is below / below /usr.
is_of_dpkg() {
    local at data=$DESTDIR/var/lib/dpkg
    [ -d "$data" ] && command -v dpkg-query >/dev/null || return 1
    for at in "$1" "/usr$1" "${1#/usr}"; do
        if dpkg-query --admindir="$data" -S "$at" >/dev/null 2>&1; then return 0; fi
    done
    return 1
}

# Whether version 0.1.0 is installed here: what only it has put besides the program is there, and is no package's.
is_0_1_0() {
    local path
    for path in "$doc/systemd/README.md" "$PREFIX/lib/systemd/system/fleecefs@.service"; do
        [ -f "$DESTDIR$path" ] || return 1
    done
    for path in "$PREFIX/bin/fleecefs" "$doc/systemd/README.md"; do
        if is_of_dpkg "$path"; then return 1; fi
    done
}

# What an earlier one has put: what it says, or what 0.1.0 has put, which wrote no list.
earlier() {
    if [ -e "$DESTDIR$list" ]; then
        cat "$DESTDIR$list"
    elif is_0_1_0; then
        list_of_0_1_0
    fi
}

is_earlier() { grep -qxF "$1 $2" "$made/earlier"; }

# free_for LINK: whether there is room for the link: nothing is there, or one of ours. A link that leads to another
# fleecefs is left alone: that is one which mounts.
free_for() {
    local at=$DESTDIR$1 leads
    if [ ! -L "$at" ]; then
        if [ -e "$at" ]; then taken+=("$1"); fi
        [ ! -e "$at" ]
        return
    fi
    leads=$(readlink "$at")
    if is_of_dpkg "$1"; then
        printf '%s is of a package, and is left as it is\n' "$1" >&2
        return 1
    fi
    case $leads in
        "$PREFIX/bin/fleecefs") return 0 ;;
        /*) leads=$DESTDIR$leads ;;
        *) leads=${at%/*}/$leads ;;
    esac
    if [ "${leads##*/}" = fleecefs ] && [ -e "$leads" ]; then
        printf '%s leads to %s, and is left as it is\n' "$1" "$(readlink "$at")" >&2
        return 1
    fi
    # One that leads to a fleecefs that is gone.
    if [ "${leads##*/}" != fleecefs ]; then
        taken+=("$1")
        return 1
    fi
}

# Nothing that somebody else has put is overwritten.
refuse_taken() {
    local path
    for path in "${targets[@]}" "$list"; do
        if [ ! -e "$DESTDIR$path" ] && [ ! -L "$DESTDIR$path" ]; then continue; fi
        if ! is_earlier file "$path" || is_of_dpkg "$path"; then taken+=("$path"); fi
    done
    [ ${#taken[@]} -gt 0 ] || return 0
    printf '%s is there, and this script has not put it there\n' "${taken[@]/#/$DESTDIR}" >&2
    printf 'nothing is installed: move it away, or name another place by PREFIX=\n' >&2
    exit 1
}

# What is to be installed, with links.
plan() {
    local name page shell file
    mkdir "$made/man"
    "$BINARY" man "$made/man"
    for shell in bash zsh fish; do "$BINARY" completions "$shell" >"$made/$shell"; done

    put "$BINARY" "$PREFIX/bin/fleecefs" 755
    # mount(8) looks for helpers in /sbin alone.
    for name in "${helpers[@]}"; do
        if free_for "/sbin/$name"; then
            links+=("/sbin/$name")
            note link "/sbin/$name"
        fi
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
}

install_all() {
    local i path
    sources=() targets=() modes=() links=() taken=()
    if [ ! -x "$BINARY" ]; then
        deps_rust
        deps_build
        cargo build --release --quiet
    fi
    earlier >"$made/earlier"
    plan
    refuse_taken
    for path in /sbin "${targets[@]%/*}" "$doc"; do folder "$path"; done
    # What an earlier one has made, and this one has found, is still ours. Written first: one that is interrupted can be
    # repeated, and undone.
    note file "$list"
    sort -u "$made/list" "$made/earlier" >"$made/sorted"
    as_owner install -m 644 "$made/sorted" "$DESTDIR$list"
    for i in "${!targets[@]}"; do
        as_owner install -m "${modes[i]}" "${sources[i]}" "$DESTDIR${targets[i]}"
    done
    for path in "${links[@]}"; do as_owner ln -sfn "$PREFIX/bin/fleecefs" "$DESTDIR$path"; done
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

# remove WHAT PATH. A link is ours as long as it leads to what was installed, a file as long as it is no package's: one
# may have put its own there.
remove() {
    local at=$DESTDIR$2
    case $1 in
        file) if [ -e "$at" ] && ! is_of_dpkg "$2"; then as_owner rm -f "$at"; fi ;;
        link) if [ "$(readlink "$at")" = "$PREFIX/bin/fleecefs" ] && ! is_of_dpkg "$2"; then as_owner rm -f "$at"; fi ;;
        folder) if [ -d "$at" ]; then as_owner rmdir --ignore-fail-on-non-empty "$at"; fi ;;
    esac
}

# What 'systemctl enable' has made of units that are gone now.
disable_units() {
    local link
    [ -d "$DESTDIR/etc/systemd/system" ] || return 0
    find "$DESTDIR/etc/systemd/system" -type l -lname "$PREFIX/lib/systemd/system/fleecefs*" -print0 |
        while IFS= read -r -d '' link; do
            # (A template's link is called by its instance, and leads to the template.)
            if [ ! -e "$DESTDIR$(readlink "$link")" ]; then as_owner rm -f "$link"; fi
        done
}

uninstall() {
    local what path
    earlier >"$made/list"
    if [ ! -s "$made/list" ]; then
        printf 'this script has installed nothing in %s\n' "$DESTDIR$PREFIX" >&2
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
    # The list is the last to go: whatever interrupts this can be repeated.
    while read -r what path; do
        [ "$what" = folder ] || [ "$path" = "$list" ] || remove "$what" "$path"
    done <"$made/ours"
    disable_units
    remove file "$list"
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
