#!/bin/bash
# Installs fleecefs for everybody: the program, the names by which mount(8) and fstab find it, man
# pages, completions and the systemd unit. Builds the release first where there is none.
#
#   contrib/install.sh                        # as root, or through sudo: into /usr/local and /sbin
#   PREFIX=/usr DESTDIR=/tmp/package contrib/install.sh     # for packagers
#   BINARY=path/to/fleecefs contrib/install.sh              # a program that is built already
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=lib/deps.sh
. contrib/lib/deps.sh

PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
BINARY=${BINARY:-${CARGO_TARGET_DIR:-target}/release/fleecefs}

# What goes into a package directory needs no root.
as_owner() {
    if [ -n "$DESTDIR" ]; then "$@"; else deps_as_root "$@"; fi
}

# put FILE TARGET [MODE]
put() { as_owner install -D -m "${3:-644}" "$1" "$DESTDIR$2"; }

if [ ! -x "$BINARY" ]; then
    deps_rust
    deps_build
    cargo build --release --quiet
fi
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
mkdir "$made/man"
"$BINARY" man "$made/man"
for shell in bash zsh fish; do "$BINARY" completions "$shell" >"$made/$shell"; done

put "$BINARY" "$PREFIX/bin/fleecefs" 755
# mount(8) looks for helpers in /sbin alone.
as_owner mkdir -p "$DESTDIR/sbin"
for name in mount.fleecefs mount.fuse.fleecefs; do
    as_owner ln -sfn "$PREFIX/bin/fleecefs" "$DESTDIR/sbin/$name"
done
for page in "$made"/man/*; do put "$page" "$PREFIX/share/man/man1/${page##*/}"; done
put "$made/bash" "$PREFIX/share/bash-completion/completions/fleecefs"
put "$made/zsh" "$PREFIX/share/zsh/site-functions/_fleecefs"
put "$made/fish" "$PREFIX/share/fish/vendor_completions.d/fleecefs.fish"
put contrib/systemd/fleecefs@.service "$PREFIX/lib/systemd/system/fleecefs@.service"
for file in README.md mnt-backups.mount mnt-backups.automount; do
    put "contrib/systemd/$file" "$PREFIX/share/doc/fleecefs/systemd/$file"
done
if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then deps_as_root systemctl daemon-reload; fi
printf 'installed %s\n' "$DESTDIR$PREFIX/bin/fleecefs"
