#!/bin/bash
# Usage: contrib/test.sh [--fast | --list | ARGUMENTS OF CARGO TEST]
# Installs what the tests need and is missing, then runs them. The last line is the sum over all
# tests: "N passed, N failed" and, where there are any, ", N skipped". With CI set, a test whose tool is
# missing fails instead of skipping.
#
#   (nothing)   all tests; those of backups once more with the oldest QEMU that is to be had
#   --fast      the unit tests, and of each promise the tests named in FAST below (shown by --list): under three
#               minutes once built
#   --list      prints what is run how
#   other       handed to cargo test
#
# Each module of tests/it and tests/slow (a file there) runs in a process of its own, one more side by side than there
# are processors (FLEECEFS_TEST_JOBS says another number). What a process said is printed when it has ended; a line
# "TIMED module wall user sys" (seconds) follows it.
set -euo pipefail
cd "$(dirname "$0")/.."

# Of each promise the quickest: a module, a test of it, or a binary with its unit tests.
FAST=(
    fleecefs
    layering
    packages
    semantics
    chain
    chain_links
    archives
    formats
    generations
    salvage
    mount::every_point_reads_as_qemu_merges_it
    mount_process::an_idle_mount_goes_away_and_a_busy_one_stays
    open_mount
    identity
    access_lists
    hostile
    hostile_owner
    terminal
    backup_disk
    backup_layout
    backup_qemu::qcow2_with_64k_clusters
    watermark::each_bitmap_has_a_watermark_that_survives_a_restart
    beside::a_job_on_one_disk_leaves_the_other_its_point
    migration::qemu_refuses_a_migration_while_a_backup_runs
    offline::the_chain_goes_on_while_the_vm_is_off_and_when_it_runs_again
    crash::what_changes_something_has_a_step_before_it_and_one_after
    recover::what_qemu_refuses_for_one_disk_does_not_keep_the_other
    restore::raw_files_streams_and_qcow2_files_equal_qemus_answer
    verify::every_damage_is_found
    prune::a_real_run_executes_the_plan_that_a_dry_run_prints
    verbs::commit_keeps_what_is_later_and_the_size
    link_disk::two_names_become_one_disk
)
# They take longest, and begin first, so that nothing long is left at the end.
LONG=(crash_guest crash release exchanged any_order backup_guest beside odd_disks backup_qemu fleecefs watermark
    guards hardware boot matrix)
# What they measure is wrong while others are at work.
ALONE=(read_cost)
# They sync all the time, and what they show is not about the file system (others ask for one on which changes
# are seen, or which QEMU locks): their files lie in memory, where there
# is enough of it. (The same tests with the old QEMU have theirs on disk.)
MEMORY=(crash crash_guest any_order backup_guest hardware backup_qemu early_hash between snapshot_load hostile_qemu
    hostile_backup)
# Once more with the oldest QEMU: it has its own ways of going wrong.
OLD_QEMU=(backup_qemu beside between early_hash migration odd_disks several_paths snapshot_load watermark)

case ${1-} in
    --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit ;;
    --list)
        printf 'fast: %s\n' "${FAST[@]}"
        printf 'alone: %s\n' "${ALONE[@]}"
        printf 'in memory: %s\n' "${MEMORY[@]}"
        printf 'with the old QEMU, too: %s\n' "${OLD_QEMU[@]}"
        exit
        ;;
esac

# shellcheck source=lib/deps.sh
. contrib/lib/deps.sh
deps_all

work=$(mktemp -d)
memory=
running=()
cleanup() {
    # Only what was started here; tests end what they have started themselves.
    local one
    for one in "${running[@]}"; do kill -- "-$one" 2>/dev/null || true; done
    rm -rf "$work" ${memory:+"$memory"}
}
trap cleanup EXIT
log=$work/log
: >"$log"

is_in() {
    local wanted=$1 one
    shift
    for one; do [ "$one" != "$wanted" ] || return 0; done
    return 1
}

# Adds up what the binaries said. Arguments: how many of them ended badly without saying which test did.
sum() {
    awk -v failed="$1" '
        # test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s
        /^test result: / {
            for (i = 2; i <= NF; i++) {
                if ($i == "passed;") passed += $(i - 1)
                if ($i == "failed;") failed += $(i - 1)
                if ($i == "ignored;") skipped += $(i - 1)
            }
        }
        # What returned early is not what passed. (Each says it once, on a line of its own.)
        /^skipped: / { passed--; skipped++ }
        END {
            printf "%d passed, %d failed", passed, failed
            if (skipped > 0) printf ", %d skipped", skipped
            printf "\n"
            exit failed > 0
        }' "$log"
}

if [ $# -gt 0 ] && [ "$1" != --fast ]; then
    status=0
    # --show-output: a skipped test says so on its standard output, which is not shown otherwise.
    cargo test --no-fail-fast "$@" -- --show-output </dev/null 2>&1 | tee "$log" || status=$?
    # Code that does not compile, or a test that took its whole binary down.
    bad=0
    [ "$status" = 0 ] || grep -q '^test result: FAILED' "$log" || bad=1
    sum "$bad"
    exit
fi

# Builds all, and keeps "name executable" of each test binary.
if ! cargo test --no-run --message-format=json-render-diagnostics </dev/null >"$work/built"; then
    sum 1
    exit
fi
sed -n 's/^{"reason":"compiler-artifact".*"target":{[^}]*"name":"\([^"]*\)".*"profile":{[^}]*"test":true}.*"executable":"\([^"]*\)".*/\1 \2/p' \
    "$work/built" >"$work/binaries"

room=$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1 || true)
if [ "${room:-0}" -gt $((4 << 20)) ]; then
    memory=$(mktemp -d /dev/shm/fleecefs-test.XXXXXX)
    # Some tests work as another user, too.
    chmod 711 "$memory"
fi

# Keeps "job executable" of each process that is to run: a module, or a binary that has no modules. What tests a
# module has is in a file of its name.
mkdir "$work/modules"
while read -r name exe; do
    case $name in
        it | slow)
            "$exe" --list --format terse | sed -n 's/: test$//p' >"$work/tests"
            awk -v to="$work/modules/" -v exe="$exe" '{
                module = $0
                sub(/::.*/, "", module)
                print > (to module)
                if (!seen[module]++) print module, exe
            }' "$work/tests"
            ;;
        *) printf '%s %s\n' "$name" "$exe" ;;
    esac
done <"$work/binaries" >"$work/jobs"

# run NAME: runs a module, one of its tests (MODULE::TEST), or a binary, as cargo would.
run() {
    local job=${1%%::*} one exe tests=()
    if [ "$job" != "$1" ]; then
        tests=(--exact "$1")
    elif [ -e "$work/modules/$job" ]; then
        mapfile -t tests <"$work/modules/$job"
        # By whole names: a filter by `mount::` is one by `open_mount::`, too.
        tests=(--exact "${tests[@]}")
    fi
    while read -r one exe; do
        [ "$one" = "$job" ] || continue
        # --show-output: a skipped test says so on its standard output, which is not shown otherwise.
        CARGO_MANIFEST_DIR=$PWD "$exe" --show-output "${tests[@]}" || return
    done <"$work/jobs"
}

# is_known NAME: whether there is such a module, test or binary.
is_known() {
    case $1 in
        *::*) grep -qxF -- "$1" "$work/modules/${1%%::*}" 2>/dev/null ;;
        *) grep -q "^$1 " "$work/jobs" ;;
    esac
}

# start KIND NAME: begins one beside what runs. KIND is new or old, for the QEMU.
declare -A title
start() {
    local kind=$1 name=$2 to=$work/$1-$2
    # In a process group of its own, so that it can be ended with all that it has started.
    set -m
    (
        set +m
        if [ "$kind" = old ]; then
            PATH=$old_qemu:$PATH
        elif [ -n "$memory" ] && is_in "$name" "${MEMORY[@]}"; then
            export TMPDIR=$memory
        fi
        TIMEFORMAT="TIMED $name %R %U %S"
        [ "$kind" = new ] || TIMEFORMAT="TIMED $name-old-qemu %R %U %S"
        time run "$name"
    ) </dev/null >"$to" 2>&1 &
    set +m
    running+=($!)
    title[$!]=$to
}

# Waits until one has ended, and shows what it said.
bad=0
end_one() {
    local pid status=0 left=() one to
    wait -n -p pid "${running[@]}" || status=$?
    to=${title[$pid]}
    printf '\n--- %s\n' "${to##*/}"
    tee -a "$log" <"$to"
    if [ "$status" != 0 ] && ! grep -q '^test result: FAILED' "$to"; then
        printf 'error: %s ended with %s\n' "${to##*/}" "$status"
        bad=$((bad + 1))
    fi
    for one in "${running[@]}"; do [ "$one" = "$pid" ] || left+=("$one"); done
    running=("${left[@]}")
}

# One more than there are processors: many wait for a guest, for storage, for a timeout.
jobs=${FLEECEFS_TEST_JOBS:-$(($(nproc) + 1))}
# together KIND NAME
together() {
    while [ ${#running[@]} -ge "$jobs" ]; do end_one; done
    start "$@"
}

end_all() { while [ ${#running[@]} -gt 0 ]; do end_one; done; }

for name in "${FAST[@]}" "${LONG[@]}" "${ALONE[@]}" "${MEMORY[@]}" "${OLD_QEMU[@]}"; do
    is_known "$name" || { printf 'test.sh names %s, which is not there\n' "$name" && bad=$((bad + 1)); }
done
if [ "${1-}" = --fast ]; then
    for name in "${FAST[@]}"; do together new "$name"; done
    end_all
    sum "$bad"
    exit
fi

mapfile -t all < <(cut -d' ' -f1 "$work/jobs" | sort -u)
code=0
old_qemu=$(contrib/old-qemu.sh "${CARGO_TARGET_DIR:-target}/old-qemu") || code=$?
# 4: there is nothing older.
[ "$code" = 0 ] || [ "$code" = 4 ] || bad=$((bad + 1))
for name in "${LONG[@]}"; do together new "$name"; done
if [ "$code" = 0 ]; then
    for name in "${OLD_QEMU[@]}"; do together old "$name"; done
fi
for name in "${all[@]}"; do
    is_in "$name" "${LONG[@]}" "${ALONE[@]}" || together new "$name"
done
end_all
for name in "${ALONE[@]}"; do
    together new "$name"
    end_all
done
printf '\n--- doc\n'
code=0
cargo test --quiet --doc </dev/null >"$work/doc" 2>&1 || code=$?
tee -a "$log" <"$work/doc"
[ "$code" = 0 ] || grep -q '^test result: FAILED' "$work/doc" || bad=$((bad + 1))
sum "$bad"
