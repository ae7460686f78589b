#!/bin/bash
# Usage: contrib/package.sh [--check] [FOLDER]
# Makes the Debian package (amd64) into FOLDER, or target/debian: the program, mount helpers, man pages, completions,
# systemd units, /etc/fleecefs, papers. Builds the release where there is none, and installs cargo-deb by cargo if it is
# missing. One that is built on Debian 12 is for 12 and 13. The last line is the package's path.
#
#   --check                          also runs lintian, and fails if that finds an error
#   BINARY=path/to/fleecefs          a program that is built already
#   DEB_VERSION=0.2.0~rc1-1          the package's version [default: Cargo.toml's, -1]
#   DEBFULLNAME, DEBEMAIL            who makes it, as Debian's tools have it [default: the newest commit's author]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=lib/deps.sh
. contrib/lib/deps.sh

check=
if [ "${1-}" = --check ]; then check=yes && shift; fi
case ${1-} in -*) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;; esac
folder=${1:-target/debian}
program=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
version=${DEB_VERSION:-$program-1}

deps_rust
deps_build
deps_packages dpkg-dev binutils xz-utils
deps_cargo_deb

# Cargo.toml names what is here, whatever CARGO_TARGET_DIR says.
made=target/package
rm -rf "$made"
mkdir -p "$made" "$folder"
DESTDIR=$PWD/$made/root PREFIX=/usr contrib/install.sh >/dev/null
# (cargo-deb strips only what it has built itself.)
strip --strip-unneeded "$made/root/usr/bin/fleecefs"

# Of the newest commit, so that the same source gives the same package.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
name=${DEBFULLNAME:-$(git log -1 --format=%an 2>/dev/null || echo "The fleecefs authors")}
mail=${DEBEMAIL:-$(git log -1 --format=%ae 2>/dev/null || echo "root@$(hostname --fqdn)")}
{
    printf 'fleecefs (%s) unstable; urgency=medium\n\n' "$version"
    printf '  * Version %s: see changelog.gz beside this file.\n\n' "$program"
    printf ' -- %s <%s>  %s\n' "$name" "$mail" "$(date --utc --rfc-email --date="@$SOURCE_DATE_EPOCH")"
} >"$made/changelog"

deb=$folder/fleecefs_${version}_amd64.deb
cargo deb --quiet --no-build --no-strip --maintainer "$name <$mail>" --deb-version "$version" --output "$deb" >/dev/null
if [ -n "$check" ]; then
    deps_packages lintian
    lintian --allow-root --fail-on error "$deb"
fi
printf '%s\n' "$deb"
