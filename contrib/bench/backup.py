#!/usr/bin/env python3
"""Measures `fleecefs backup` beside upstream's qmpbackup: a FULL and an INC of one disk.

Both back up the same disk of the same QEMU to the same file system, in an order that is drawn anew in each round; what
counts is the median over the rounds of ours/theirs. The guest has no processor that runs (-S), so that
nothing but the copy is measured; its writes are made through QEMU's own monitor. Each of the three ways
has a target and a bitmap of its own.
"""

import json
import os
import random
import shlex
import socket
import statistics
import subprocess
import sys
import time

import chains

MIB = chains.MIB
# What the project promises: the most that ours may take, as a part of theirs.
PROMISES = {"without hash": 1.1, "with hash": 1.3}
DEVICE = "/machine/peripheral/vda/virtio-backend"


class Qemu:
    """A guest that does not run, with one qcow2 disk. Ended on exit."""

    def __init__(self, folder, disk):
        self.socket, second = os.path.join(folder, "qmp"), os.path.join(folder, "qmp2")
        command = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "64", "-nodefaults"]
        command += ["-display", "none", "-S", "-device", "virtio-blk-pci,drive=disk,id=vda"]
        command += ["-blockdev", f"qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename={disk}"]
        for path in (self.socket, second):
            command += ["-qmp", f"unix:{path},server=on,wait=off"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.monitor = socket.socket(socket.AF_UNIX)
        for _ in range(200):
            try:
                self.monitor.connect(second)
                break
            except OSError:
                time.sleep(0.05)
        self.lines = self.monitor.makefile("rw")
        self.lines.readline()
        self.execute("qmp_capabilities")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.execute("quit")
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()

    def execute(self, command, **arguments):
        self.lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.lines.flush()
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                sys.exit(f"bench: {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def write(self, offset, length, byte):
        line = f'qemu-io -d {DEVICE} "write -P {byte} {offset} {length}"'
        said = self.execute("human-monitor-command", **{"command-line": line})
        if "rror" in said or "failed" in said:
            sys.exit(f"bench: {line}: {said}")


def ways(args, qemu, work):
    """Name and command of each way, and its target."""
    state = ["--state-dir", os.path.join(work, "state"), "--qmp", qemu.socket, "--target"]
    target = {n: os.path.join(work, n.replace(" ", "-")) for n in ("theirs", *PROMISES)}
    ours = [args.fleecefs, "backup", *state]
    return {
        "theirs": [*shlex.split(args.qmpbackup), "--socket", qemu.socket, "backup", "--target", target["theirs"]],
        "without hash": [*ours, target["without hash"], "--no-hash"],
        "with hash": [*ours, target["with hash"]],
    }, target


def timed(command, level):
    # Nobody is to wait for what the one before has left to be written.
    os.sync()
    begin = time.monotonic()
    done = subprocess.run([*command, "--level", level], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"bench: {shlex.join(command)} --level {level}: {done.stdout}{done.stderr}")
    return time.monotonic() - begin


def measure(args, qemu, work):
    """Seconds by level and way, one figure a round."""
    commands, targets = ways(args, qemu, work)
    figures = {level: {name: [] for name in commands} for level in ("full", "inc")}
    rng = random.Random(1)
    for _ in range(args.rounds):
        for level in figures:
            if level == "inc":
                for _ in range(args.dirty_mib):
                    qemu.write(rng.randrange(args.size_mib) * MIB, MIB, 1 + rng.randrange(255))
            # Who comes first finds the cache as nobody else does: the order is drawn anew each time.
            for name in rng.sample(list(commands), len(commands)):
                figures[level][name].append(timed(commands[name], level))
                # Names of qmpbackup's images have seconds.
                time.sleep(1.1)
        for target in targets.values():
            for folder, _, files in os.walk(target):
                for file in files:
                    if file.startswith("FULL-"):
                        os.truncate(os.path.join(folder, file), 0)
    return figures


def show(level, figures):
    rows = []
    for name, promise in PROMISES.items():
        ratio = statistics.median(o / t for o, t in zip(figures[name], figures["theirs"]))
        theirs, ours = (statistics.median(figures[n]) for n in ("theirs", name))
        verdict = "ok" if ratio <= promise else "TOO SLOW"
        print(f"{level + ', ' + name:<20}{theirs:>10.2f} s{ours:>10.2f} s{ratio:>8.2f}x  (promised {promise}x: {verdict})")
        rows.append({"name": f"{level} {name}", "theirs": theirs, "ours": ours, "ratio": ratio, "promised": promise})
    return rows


def arguments():
    parser = chains.parser(__doc__, upstream=True)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--dirty-mib", type=int, default=256, help="written before each INC")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main():
    args = arguments()
    rows = []
    with chains.workplace(args, "backup") as work:
        disk = os.path.join(work, "disk.qcow2")
        chains.make_full(disk, args.size_mib * MIB)
        with Qemu(work, disk) as qemu:
            figures = measure(args, qemu, work)
        print(f"{'backup':<20}{'qmpbackup':>12}{'fleecefs':>12}{'ratio':>9}")
        for level, by_way in figures.items():
            rows += show(level, by_way)
    chains.write_json(args, rows)


if __name__ == "__main__":
    main()
