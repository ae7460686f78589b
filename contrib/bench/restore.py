#!/usr/bin/env python3
"""Measures `fleecefs restore` beside `qemu-img convert -W -m 8` over the same chain, to a raw file, and
`fleecefs verify` beside `b3sum` over the same files.

Both read the same files and write to the same file system, turn about, for some rounds; what counts is
the median over the rounds of theirs/ours. Both results are compared byte for byte once. With --xfs (needs
root), it also restores on a loop-mounted XFS, where ranges are cloned. Beside the time on the clock stands
the processor time of both (user and system), which other work on the machine hardly moves.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import chains

MIB = chains.MIB
# What the project promises: depth, least ratio theirs/ours.
PROMISES = {10: 1.2, 200: 3.0}
VERIFY_RATIO = 0.8
QUICK_SECONDS = 2.0
YEAR = 365
CLONE_RATIO = 5.0
CLONE_NEW_SPACE = 0.01


def linked(files):
    """The chain as one QEMU block device: `backing` set by hand, nothing on disk is touched."""
    node = None
    for path in files:
        node = {"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": node}
    return "json:" + json.dumps(node)


def processor_time():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def timed(command):
    """Seconds on the clock, and seconds of processor time."""
    begin, used_before = time.monotonic(), processor_time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin, processor_time() - used_before


def summary(results):
    """Medians of rows of (theirs, ours), each (clock, processor): clock, processor, ratio of each."""
    figures = {}
    for index, kind in enumerate(("clock", "processor")):
        pairs = [(a[index], b[index]) for a, b in results]
        figures[kind] = {
            "theirs": statistics.median(a for a, _ in pairs),
            "ours": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(a / max(b, 1e-6) for a, b in pairs),
        }
    return figures


def ours(args, files, target):
    backups = os.path.dirname(os.path.dirname(files[0]))
    command = [args.fleecefs, "restore", backups, os.path.basename(files[-1]), target, "--force"]
    return timed(command)


def theirs(_args, files, target):
    # -t writeback: flushed to the disk at the end, as ours is; without it nothing is.
    command = ["qemu-img", "convert", "-W", "-m", "8", "-t", "writeback", "-O", "raw"]
    return timed([*command, linked(files), target])


def compare_times(args, files, folder):
    """Median seconds of both, and the median ratios. Nothing is left of the run before when the next
    begins, and who goes first changes: on a virtual machine, memory and blocks that were in use just
    now cost less than those that were not."""
    targets = {way: os.path.join(folder, way.__name__ + ".raw") for way in (theirs, ours)}
    # Not timed. A fast wrong answer is worth nothing.
    for way, target in targets.items():
        way(args, files, target)
    if subprocess.run(["cmp", *targets.values()], check=False).returncode != 0:
        sys.exit("bench: the results differ")
    for target in targets.values():
        os.unlink(target)
    rows = []
    for number in range(args.rounds):
        times = {}
        for way, target in list(targets.items())[:: 1 if number % 2 == 0 else -1]:
            times[way] = way(args, files, target)
            os.unlink(target)
            subprocess.run(["sync", "-f", folder], check=True)
        rows.append((times[theirs], times[ours]))
    return summary(rows)


def used(folder):
    fs = os.statvfs(folder)
    return (fs.f_blocks - fs.f_bfree) * fs.f_frsize


def on_xfs(args, work):
    """Times a clone and a copy by QEMU on one XFS: ratio and new space as a part of the data."""
    image, mount = os.path.join(work, "xfs.img"), os.path.join(work, "xfs")
    with open(image, "wb") as file:
        file.truncate(4 * args.size_mib * MIB + 1024 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    os.mkdir(mount)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        full = os.path.join(mount, "full")
        chains.make_full(full, args.size_mib * MIB)
        files = chains.make_chain(os.path.join(mount, "b"), full, args.size_mib * MIB, 10, args.clusters)
        subprocess.run(["sync", "-f", mount], check=True)
        before = used(mount)
        target = os.path.join(mount, "cloned.raw")
        ours(args, files, target)
        subprocess.run(["sync", "-f", mount], check=True)
        space = (used(mount) - before) / (args.size_mib * MIB)
        os.unlink(target)
        return compare_times(args, files, mount), space
    finally:
        subprocess.run(["umount", mount], check=True)
        os.unlink(image)


def show(name, figures, promise):
    clock, cpu = figures["clock"], figures["processor"]
    verdict = "ok" if clock["ratio"] >= promise else "TOO SLOW"
    print(
        f"{name:<24}{clock['theirs']:>9.2f} s{clock['ours']:>9.2f} s{clock['ratio']:>7.2f}x"
        f"{cpu['theirs']:>9.2f} s{cpu['ours']:>9.2f} s{cpu['ratio']:>7.2f}x  (promised {promise}x: {verdict})",
        flush=True,
    )
    return {"name": name, **figures, "promised": promise}


def heading(what, theirs):
    print(f"{what:<24}{theirs:>11}{'fleecefs':>11}{'ratio':>8}{'processor:':>11}{'fleecefs':>11}{'ratio':>8}")


# --- verify -----------------------------------------------------------------------------------------


def full_verify(args, files):
    """`verify` of a chain with hashes beside b3sum of the same files."""
    backups = os.path.dirname(os.path.dirname(files[0]))
    subprocess.run([args.fleecefs, "-q", "verify", "--create", backups], check=True, stdout=subprocess.DEVNULL)
    return summary([
        (timed(["b3sum", *files]), timed([args.fleecefs, "-q", "verify", backups])) for _ in range(args.rounds)
    ])  # fmt: skip


def quick_verify(args, work):
    """Median seconds of `verify --quick` over one disk of 365 points."""
    backups = os.path.join(work, "year")
    chains.make_many(backups, 1, YEAR, 1024 * MIB, 64)
    verify = [args.fleecefs, "-q", "verify", backups]
    subprocess.run([*verify, "--create"], check=True, stdout=subprocess.DEVNULL)
    rows = [timed([*verify, "--quick"]) for _ in range(args.rounds)]
    shutil.rmtree(backups)
    clock, cpu = (statistics.median(column) for column in zip(*rows))
    verdict = "ok" if clock <= QUICK_SECONDS else "TOO SLOW"
    print(f"verify --quick of {YEAR} points: {clock:.2f} s, processor {cpu:.2f} s (promised {QUICK_SECONDS} s: {verdict})")
    return {"name": f"quick, {YEAR} points", "ours": clock, "processor": cpu, "promised": QUICK_SECONDS}


def arguments():
    parser = chains.parser(__doc__)
    parser.add_argument("--size-mib", type=int, default=4096)
    parser.add_argument("--clusters", type=int, default=200, help="64 KiB clusters in each INC")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 200])
    parser.add_argument("--xfs", action="store_true", help="also by cloning (needs root)")
    parser.add_argument("--xfs-dir", help="where the XFS image is put; by default --dir")
    parser.add_argument("--no-verify", action="store_true", help="restore only")
    return parser.parse_args()


def main():
    args = arguments()
    rows = []
    with chains.workplace(args, "restore") as work:
        full = os.path.join(work, "full")
        chains.make_full(full, args.size_mib * MIB)
        heading("restore to raw", "qemu-img")
        verified = None
        for depth in args.depths:
            folder = os.path.join(work, f"depth{depth}")
            files = chains.make_chain(folder, full, args.size_mib * MIB, depth, args.clusters)
            rows.append(show(f"depth {depth}", compare_times(args, files, work), PROMISES.get(depth, 1.0)))
            if not args.no_verify and verified is None:
                verified = full_verify(args, files)
            shutil.rmtree(folder)
        os.unlink(full)
        if args.xfs:
            place = tempfile.mkdtemp(dir=args.xfs_dir) if args.xfs_dir else work
            figures, space = on_xfs(args, place)
            rows.append(show("clone on XFS, depth 10", figures, CLONE_RATIO))
            verdict = "ok" if space <= CLONE_NEW_SPACE else "TOO MUCH"
            print(f"new space of the clone: {space:.2%} of the disk ({verdict})")
            rows.append({"name": "clone, new space", "part": space, "promised": CLONE_NEW_SPACE})
            if args.xfs_dir:
                shutil.rmtree(place)
        if verified:
            heading("verify", "b3sum")
            rows.append(show("full", verified, VERIFY_RATIO))
            rows.append(quick_verify(args, work))
    chains.write_json(args, rows)


if __name__ == "__main__":
    main()
