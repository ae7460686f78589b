#!/usr/bin/env python3
"""Measures `fleecefs restore` beside `qemu-img convert -W -m 8` over the same chain, to a raw file.

Both read the same files and write to the same file system, turn about, for some rounds; what counts is
the median over the rounds of theirs/ours. Both results are compared byte for byte once. With --xfs (needs
root), it also restores on a loop-mounted XFS, where ranges are cloned.
"""

import argparse
import json
import os
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
CLONE_RATIO = 5.0
CLONE_NEW_SPACE = 0.01


def linked(files):
    """The chain as one QEMU block device: `backing` set by hand, nothing on disk is touched."""
    node = None
    for path in files:
        node = {"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": node}
    return "json:" + json.dumps(node)


def timed(command):
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def ours(args, files, target):
    backups = os.path.dirname(os.path.dirname(files[0]))
    command = [args.fleecefs, "restore", backups, os.path.basename(files[-1]), target, "--force"]
    return timed(command)


def theirs(_args, files, target):
    # -t writeback: written out at the end, as ours is.
    command = ["qemu-img", "convert", "-W", "-m", "8", "-t", "writeback", "-O", "raw"]
    return timed([*command, linked(files), target])


def compare_times(args, files, folder):
    """Median seconds of both, and the median ratio."""
    results = []
    for _ in range(args.rounds):
        row = []
        for way, name in ((theirs, "theirs.raw"), (ours, "ours.raw")):
            target = os.path.join(folder, name)
            if os.path.exists(target):
                os.unlink(target)
            row.append(way(args, files, target))
        results.append(row)
    a, b = os.path.join(folder, "theirs.raw"), os.path.join(folder, "ours.raw")
    if subprocess.run(["cmp", a, b], check=False).returncode != 0:
        sys.exit("bench: the results differ")
    os.unlink(a)
    os.unlink(b)
    median = [statistics.median(column) for column in zip(*results)]
    return median[0], median[1], statistics.median(t / o for t, o in results)


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


def show(name, theirs_s, ours_s, ratio, promise):
    verdict = "ok" if ratio >= promise else "TOO SLOW"
    print(f"{name:<24}{theirs_s:>10.2f} s{ours_s:>10.2f} s{ratio:>8.2f}x  (promised {promise}x: {verdict})")
    return {"name": name, "theirs": theirs_s, "ours": ours_s, "ratio": ratio, "promised": promise}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleecefs", default="target/release/fleecefs")
    parser.add_argument("--dir", default="/dev/shm", help="where chains and results are put")
    parser.add_argument("--size-mib", type=int, default=4096)
    parser.add_argument("--clusters", type=int, default=200, help="64 KiB clusters in each INC")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 200])
    parser.add_argument("--xfs", action="store_true", help="also by cloning (needs root)")
    parser.add_argument("--xfs-dir", help="where the XFS image is put; by default --dir")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def main():
    args = arguments()
    args.fleecefs = os.path.abspath(args.fleecefs)
    rows = []
    work = tempfile.mkdtemp(prefix="bench-restore-", dir=args.dir)
    try:
        full = os.path.join(work, "full")
        chains.make_full(full, args.size_mib * MIB)
        print(f"{'restore to raw':<24}{'qemu-img':>12}{'fleecefs':>12}{'ratio':>9}")
        for depth in args.depths:
            folder = os.path.join(work, f"depth{depth}")
            files = chains.make_chain(folder, full, args.size_mib * MIB, depth, args.clusters)
            figures = compare_times(args, files, work)
            rows.append(show(f"depth {depth}", *figures, PROMISES.get(depth, 1.0)))
            shutil.rmtree(folder)
        os.unlink(full)
        if args.xfs:
            place = tempfile.mkdtemp(dir=args.xfs_dir) if args.xfs_dir else work
            figures, space = on_xfs(args, place)
            rows.append(show("clone on XFS, depth 10", *figures, CLONE_RATIO))
            verdict = "ok" if space <= CLONE_NEW_SPACE else "TOO MUCH"
            print(f"new space of the clone: {space:.2%} of the disk ({verdict})")
            rows.append({"name": "clone, new space", "part": space, "promised": CLONE_NEW_SPACE})
            if args.xfs_dir:
                shutil.rmtree(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if args.json:
        with open(args.json, "w") as out:
            json.dump(rows, out, indent=1)


if __name__ == "__main__":
    main()
