# shellcheck shell=bash
# Sourced by the scripts of contrib/: installs what a fresh Debian 12 or 13 lacks, quietly, and does
# nothing at all where everything is there. Needs bash with `set -euo pipefail`, and root or sudo.
#
#   deps_rust          a cargo new enough for Cargo.toml's rust-version, on PATH
#   deps_build         a C compiler (zstd's C code is compiled in)
#   deps_fuse          fuse3, bindfs and a usable /dev/fuse
#   deps_qemu          qemu-system-x86_64, qemu-img, qemu-io, qemu-storage-daemon of one version
#   deps_filesystems   what makes and checks file systems and partitions
#   deps_clock         faketime, with which tests let nights pass
#   deps_shells        zsh and fish, whose completions are tested
#   deps_systemd       systemd-analyze, which checks units
#   deps_cargo_deb     cargo-deb, by way of cargo
#   deps_ssh           sshd, which a test runs for itself
#   deps_nfs           an NFS server and a client, neither of which is the kernel's
#   deps_bench         fio, jq, python3
#   deps_prometheus    promtool, which checks metrics and alert rules
#   deps_b3sum         b3sum, by way of cargo
#   deps_guest         what contrib/guest/build.sh uses
#   deps_all           all of the above but what comes by way of cargo

DEPS_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
DEPS_APT_UPDATED=
# mkfs, losetup and friends are not on an ordinary user's PATH.
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

deps_say() { printf 'deps: %s\n' "$*" >&2; }

deps_die() {
    deps_say "$*"
    exit 3
}

# Runs a command as root: as it is, or through sudo.
deps_as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        deps_die "this needs root and there is no sudo: $*"
    fi
}

deps_apt() {
    local log
    log=$(mktemp)
    if ! deps_as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
        -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 "$@" </dev/null >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

# Refreshes the package lists once. Not fatal: one unreachable pocket must not stop an install that
# the other lists can serve.
deps_apt_update() {
    [ -z "$DEPS_APT_UPDATED" ] || return 0
    deps_apt update || deps_say "apt-get update failed in part; going on with the lists there are"
    DEPS_APT_UPDATED=1
}

deps_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# deps_packages NAME...: installs those that are missing.
deps_packages() {
    local name missing=()
    for name in "$@"; do
        deps_installed "$name" || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || deps_die "no apt-get; please install: ${missing[*]}"
    deps_say "installing ${missing[*]}"
    deps_apt_update
    deps_apt install --no-install-recommends "${missing[@]}" ||
        deps_die "apt-get could not install: ${missing[*]}"
}

deps_codename() {
    # shellcheck disable=SC1091
    (. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
}

# Makes the backports suite reachable by way of the mirror that this machine already uses: the
# main suite's sources are copied with the suite's name changed. Fails where that gives nothing.
deps_enable_backports() {
    local suite=$1-backports derived=/etc/apt/sources.list.d/fleecefs-backports.sources
    apt-cache policy | grep -q "n=$suite" && return 0
    deps_sources_of "$1" "$suite" >"${TMPDIR:-/tmp}/fleecefs-backports.$$"
    if [ -s "${TMPDIR:-/tmp}/fleecefs-backports.$$" ]; then
        deps_as_root install -m 644 "${TMPDIR:-/tmp}/fleecefs-backports.$$" "$derived"
    fi
    rm -f "${TMPDIR:-/tmp}/fleecefs-backports.$$"
    if deps_apt update && apt-cache policy | grep -q "n=$suite"; then
        return 0
    fi
    deps_as_root rm -f "$derived"
    return 1
}

# Prints deb822 stanzas for suite $2, derived from every source that has suite $1.
deps_sources_of() {
    local file
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -f "$file" ] || continue
        awk -v from="$1" -v to="$2" '
            function flush_stanza() { if (hit) printf "%s\n", text; text = ""; hit = 0 }
            /^[[:space:]]*$/ { flush_stanza(); next }
            /^#/ { next }
            tolower($1) == "suites:" {
                for (i = 2; i <= NF; i++) if ($i == from) hit = 1
                $0 = "Suites: " to
            }
            { text = text $0 "\n" }
            END { flush_stanza() }' "$file"
    done
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -f "$file" ] || continue
        # deb [options] URI suite component...
        sed -n -E "s/^deb[[:space:]]+(\[[^]]*\][[:space:]]+)?([^[:space:]]+)[[:space:]]+$1[[:space:]].*/Types: deb\nURIs: \2\nSuites: $2\nComponents: main\n/p" "$file"
    done
}

deps_version() { dpkg-query -W -f '${Version}' "$1" 2>/dev/null || true; }

# True if qemu-system and qemu-utils are there and of one version (mixing suites removes one of them).
deps_qemu_complete() {
    command -v qemu-system-x86_64 >/dev/null && command -v qemu-img >/dev/null &&
        command -v qemu-storage-daemon >/dev/null &&
        [ "$(deps_version qemu-utils)" = "$(deps_version qemu-system-x86)" ]
}

# The distribution's QEMU serves, and backports' is taken where it is to be had: it is newer, and
# an installed qemu-utils from there would be removed by the main suite's qemu-system-x86.
deps_qemu() {
    deps_qemu_complete && return 0
    command -v apt-get >/dev/null || deps_die "no apt-get; please install qemu-system-x86 and qemu-utils"
    local codename
    codename=$(deps_codename)
    deps_apt_update
    if [ "$codename" = bookworm ] && deps_enable_backports "$codename"; then
        deps_say "installing QEMU from $codename-backports"
        if deps_apt install --no-install-recommends -t "$codename-backports" qemu-system-x86 qemu-utils; then
            return 0
        fi
        deps_say "backports' QEMU cannot be installed; taking the distribution's own"
    fi
    deps_say "installing the distribution's QEMU"
    deps_apt install --no-install-recommends --allow-downgrades qemu-system-x86 qemu-utils ||
        deps_die "apt-get could not install qemu-system-x86 and qemu-utils"
    deps_qemu_complete || deps_die "qemu-system-x86 and qemu-utils are of different versions"
}

# deps_at_least HAVE WANT: version order.
deps_at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

deps_rust() {
    local want have package candidate
    want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$DEPS_ROOT/Cargo.toml")
    if ! command -v cargo >/dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then
        export PATH="$HOME/.cargo/bin:$PATH"
    fi
    # Debian 13's cargo will do. Debian 12's is too old, but it has a newer one for its browsers.
    for package in cargo cargo-web; do
        command -v cargo >/dev/null && break
        command -v apt-cache >/dev/null || break
        deps_apt_update
        candidate=$(apt-cache policy "$package" | sed -n 's/ *Candidate: \([0-9.]*\).*/\1/p')
        if [ -n "$candidate" ] && deps_at_least "$candidate" "$want"; then
            deps_packages "$package"
        fi
    done
    command -v cargo >/dev/null ||
        deps_die "no cargo found; fleecefs needs Rust $want or newer: install it with rustup, then run this again"
    have=$(cargo --version | cut -d ' ' -f 2)
    deps_at_least "$have" "$want" ||
        deps_die "cargo $have is too old; fleecefs needs Rust $want or newer (rustup update)"
}

deps_build() { command -v cc >/dev/null || deps_packages gcc libc6-dev; }

deps_fuse() {
    deps_packages fuse3 bindfs
    [ -e /dev/fuse ] || deps_as_root modprobe fuse 2>/dev/null || true
    [ -e /dev/fuse ] || deps_die "no /dev/fuse: load the kernel's fuse module, or give the container the device"
}

deps_filesystems() {
    deps_packages e2fsprogs xfsprogs btrfs-progs ntfs-3g wimtools dosfstools mtools exfatprogs exfat-fuse gdisk fdisk lvm2 \
        attr util-linux mount rsync unzip
}

deps_clock() { deps_packages faketime; }

deps_shells() { deps_packages zsh fish; }

# (No service manager: the program alone. Its units run in the guests of contrib/nights.sh.)
deps_systemd() { deps_packages systemd; }
deps_ssh() { deps_packages openssh-server openssh-client; }

deps_nfs() { deps_packages nfs-ganesha nfs-ganesha-vfs libnfs-utils; }

deps_bench() { deps_packages fio jq python3; }

# Of the package only promtool is used; its server is not to run here.
deps_prometheus() {
    command -v promtool >/dev/null && return 0
    deps_packages prometheus
    deps_as_root systemctl disable --now prometheus prometheus-node-exporter >/dev/null 2>&1 || true
}

# b3sum, which Debian 12 does not have: built by cargo, kept in the target folder.
deps_b3sum() {
    local tools=${CARGO_TARGET_DIR:-$DEPS_ROOT/target}/tools
    export PATH="$PATH:$tools/bin"
    command -v b3sum >/dev/null && return 0
    deps_rust
    deps_say "installing b3sum"
    cargo install --quiet --locked --root "$tools" b3sum || deps_die "cargo could not install b3sum"
}

# cargo-deb, which Debian 12 does not have: built by cargo, kept in the target folder. It runs once: without
# optimisation it is built in a third of the time.
deps_cargo_deb() {
    local tools=${CARGO_TARGET_DIR:-$DEPS_ROOT/target}/tools
    export PATH="$PATH:$tools/bin"
    command -v cargo-deb >/dev/null && return 0
    deps_rust
    deps_say "installing cargo-deb"
    cargo install --quiet --locked --debug --root "$tools" --no-default-features cargo-deb ||
        deps_die "cargo could not install cargo-deb"
}

deps_firmware() { deps_packages ovmf fdisk mtools; }

deps_guest() { deps_packages e2fsprogs fdisk xfsprogs cpio gzip xz-utils zstd kmod dpkg jq; }

deps_all() {
    deps_rust
    deps_build
    deps_fuse
    deps_filesystems
    deps_clock
    deps_shells
    deps_systemd
    deps_ssh
    deps_nfs
    deps_prometheus
    deps_bench
    deps_guest
    deps_firmware
    deps_qemu
}
