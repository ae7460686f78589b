#!/usr/bin/env python3
"""Measures what an INC costs, beside upstream's qmpbackup: of a disk of many extents, and on a long chain.

Before each round the same few MiB are written, then every way backs the disk up, in an order that is
drawn anew. What counts are ratios of medians: ten times the extents, a hundred times the chain, and
ours to theirs. The guest has no processor that runs (-S), as in backup.py. Making a chain of theirs takes a
second for each of its points, which is in its name.
"""

import os
import random
import shlex
import statistics
import subprocess
import time

import backup
import chains

MIB = chains.MIB
# Small clusters: many extents in little memory.
CLUSTER = 4096
# What the project promises.
PROMISES = {"ten times the extents": 1.2, "ours to theirs, most extents": 1.1, "the long chain": 1.2}


def make_disk(path, extents):
    """Every other cluster has data."""
    size = extents * 2 * CLUSTER
    chains.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}", path, size)
    lines = (f"write -q -P {1 + i % 255} {i * 2 * CLUSTER} {CLUSTER}\n" for i in range(extents))
    command = ["qemu-io", "-f", "qcow2", "-t", "unsafe", path]
    subprocess.run(command, input="".join(lines), text=True, check=True, stdout=subprocess.DEVNULL)
    return size


def commands(args, qemu, work):
    state = ["--state-dir", os.path.join(work, "state"), "--qmp", qemu.socket]
    ours = [args.fleecefs, "backup", *state, "--target", os.path.join(work, "ours")]
    theirs = shlex.split(args.qmpbackup)
    theirs += ["--socket", qemu.socket, "backup", "--target", os.path.join(work, "theirs")]
    return {"ours": ours, "theirs": theirs}


class Disk:
    """A disk and its backups."""

    def __init__(self, args, work, extents):
        self.args, self.work, self.rng = args, work, random.Random(extents)
        os.makedirs(work)
        disk = os.path.join(work, "disk.qcow2")
        self.size = make_disk(disk, extents)
        self.qemu = backup.Qemu(work, disk)
        self.ways = commands(args, self.qemu, work)
        for command in self.ways.values():
            backup.timed(command, "full")

    def write(self):
        for _ in range(self.args.dirty_mib):
            self.qemu.write(self.rng.randrange(self.size // MIB) * MIB, MIB, 1 + self.rng.randrange(255))

    def increment(self, way):
        return backup.timed(self.ways[way], "inc")

    def deepen(self, depth):
        """Makes chains of so many points, ours and theirs."""
        for _ in range(depth - 1):
            self.write()
            next_second()
            for way in self.ways:
                self.increment(way)


def next_second():
    """Waits until names of qmpbackup's images, which have seconds, are others."""
    time.sleep(1.02 - time.time() % 1)


def measure(args, work):
    """Medians in seconds, by what was measured."""
    figures = {}
    disks = {n: Disk(args, os.path.join(work, str(n)), n) for n in args.extents}
    long = None
    try:
        turns = [(f"{way}, {n} extents", disk, way) for n, disk in disks.items() for way in disk.ways]
        if args.depth > 1:
            # The shortest disk again, under a long chain.
            long = Disk(args, os.path.join(work, "long"), min(args.extents))
            long.deepen(args.depth)
            turns += [(f"{way}, depth {args.depth}", long, way) for way in long.ways]
        for _ in range(args.rounds):
            for disk in [*disks.values(), *([long] if long else [])]:
                disk.write()
            random.shuffle(turns)
            for name, disk, way in turns:
                figures.setdefault(name, []).append(disk.increment(way))
            next_second()
    finally:
        for disk in [*disks.values(), *([long] if long else [])]:
            disk.qemu.__exit__()
    return {name: statistics.median(all_) for name, all_ in figures.items()}


def show(args, figures):
    few, many = min(args.extents), max(args.extents)
    for name, seconds in sorted(figures.items()):
        print(f"{name:<32}{seconds:>8.3f} s")
    ratios = {
        "ten times the extents": figures[f"ours, {many} extents"] / figures[f"ours, {few} extents"],
        "ours to theirs, most extents": figures[f"ours, {many} extents"] / figures[f"theirs, {many} extents"],
    }
    if args.depth > 1:
        for way, name in {"ours": "the long chain", "theirs": "the long chain, theirs"}.items():
            ratios[name] = figures[f"{way}, depth {args.depth}"] / figures[f"{way}, {few} extents"]
    for name, ratio in ratios.items():
        promise = PROMISES.get(name)
        verdict = "ok" if promise and ratio <= promise else "TOO SLOW"
        print(f"{name:<32}{ratio:>8.2f}x" + (f"  (promised {promise}x: {verdict})" if promise else ""))
    return ratios


def arguments():
    parser = chains.parser(__doc__, upstream=True)
    parser.add_argument("--extents", type=int, nargs=2, default=[10_000, 100_000])
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--dirty-mib", type=int, default=4, help="written before each INC")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def main():
    args = arguments()
    with chains.workplace(args, "increments") as work:
        figures = measure(args, work)
        ratios = show(args, figures)
    chains.write_json(args, {"seconds": figures, "ratios": ratios})


if __name__ == "__main__":
    main()
