#!/usr/bin/env python3
"""Measures how the processor time of commands grows with their input: each over a directory of N points and
over one of ten times as many, in several layouts, and SEEK_DATA and SEEK_HOLE over disks of the largest L1
table and of a tenth of it.

A ratio of 10 is linear. Processor time (user and system) is what counts, since other work on the machine
hardly moves it; a program's start is taken off. Ratios over 20 are marked and make the exit code 1.
"""

import argparse
import functools
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time

FIRST_POINT = 1700000000
# Ten times the input may take so many times as long: sorting and caches have their share.
MOST = 20.0
# Less than this says nothing.
LEAST_SECONDS = 0.05
# What is written at once, or left out.
BLOCK = 4096


@functools.cache
def empty_qcow2():
    """64 KiB clusters: header, L1 table, refcount table and block; a disk of 1 MiB without data."""
    image = bytearray(4 * 65536)
    struct.pack_into(">4sIQIIQIIQQIIQQQQII", image, 0, b"QFI\xfb", 3, 0, 0, 16, 1 << 20, 0, 1, 65536, 131072,
                     1, 0, 0, 0, 0, 0, 4, 104)
    struct.pack_into(">Q", image, 131072, 196608)
    for cluster in range(4):
        struct.pack_into(">H", image, 196608 + 2 * cluster, 1)
    return bytes(image)


def write(path, data):
    """What is zero becomes a hole."""
    with open(path, "wb") as file:
        for at in range(0, len(data), BLOCK):
            block = data[at:at + BLOCK]
            if any(block):
                file.seek(at)
                file.write(block)
        file.truncate(len(data))


def disks(directory, count):
    for i in range(count):
        write(f"{directory}/FULL-{FIRST_POINT + i}-d{i}.qcow2", empty_qcow2())


def points(directory, count):
    for i in range(count):
        write(f"{directory}/{'INC' if i else 'FULL'}-{FIRST_POINT + 60 * i}-sda.qcow2", empty_qcow2())


def fulls(directory, count):
    for i in range(count):
        level = "INC" if i % 2 else "FULL"
        write(f"{directory}/{level}-{FIRST_POINT + 60 * i}-sda.qcow2", empty_qcow2())


def unfinished(directory, count):
    points(directory, count // 2)
    for i in range(count // 2):
        write(f"{directory}/INC-{FIRST_POINT + 60 * i + 30}-sda.qcow2.partial", b"")


def broken(directory, count):
    """No FULL: nothing can be restored."""
    points(directory, count)
    os.unlink(f"{directory}/FULL-{FIRST_POINT}-sda.qcow2")


def lost(directory, count):
    """Manifests for all, and every other image gone."""
    for name in sorted(os.listdir(directory))[::2]:
        if name.endswith(".qcow2"):
            os.unlink(f"{directory}/{name}")


LAYOUTS = {"disks": disks, "points": points, "fulls": fulls, "unfinished": unfinished, "broken": broken}
COMMANDS = {
    "list": ["list", "DIR"],
    "prune": ["prune", "--dry-run", "--keep-last", "3", "DIR"],
    "prune --consolidate": ["prune", "--dry-run", "--consolidate", "--keep-last", "3", "DIR"],
    "verify --quick": ["verify", "--quick", "DIR"],
    "verify": ["verify", "DIR"],
}
# Where there is one disk with a whole chain.
CHAIN_COMMANDS = {
    "restore": ["restore", "--dry-run", "DIR", "latest", "TARGET"],
    "consolidate": ["consolidate", "--dry-run", "DIR", "sda.qcow2", "--until", "MIDDLE"],
}


class Bench:
    def __init__(self, program, folder, count):
        self.program, self.folder, self.count = program, folder, count
        self.bad = False
        self.start = self.processor_time(["--version"])[0]

    def processor_time(self, arguments):
        """Seconds, and the exit code."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([self.program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return used, done.returncode

    def line(self, what, few, many, note=""):
        if many < LEAST_SECONDS:
            ratio, verdict = "-", ""
        else:
            value = many / max(few, 0.001)
            ratio = f"{value:.1f}"
            verdict = "  GROWS FASTER" if value > MOST and many > 20 * LEAST_SECONDS else ""
        self.bad |= bool(verdict)
        print(f"{what:<40} {few:>8.3f} s {many:>8.3f} s  x{ratio}{note}{verdict}", flush=True)

    def directory(self, layout, count, manifests):
        path = f"{self.folder}/{layout}-{count}"
        os.mkdir(path)
        LAYOUTS[layout](path, count)
        if manifests:
            self.processor_time(["verify", "--create", path])
        # What was just written is in memory, but still on its way to the disk.
        os.sync()
        self.processor_time(["list", path])
        return path

    def commands(self, title, few, many, commands):
        for name, arguments in commands.items():
            middle = f"INC-{FIRST_POINT + 60 * (self.count // 2)}-sda.qcow2"
            words = {"TARGET": f"{self.folder}/target.raw", "MIDDLE": middle}
            run = lambda d: self.processor_time([words.get(a, d if a == "DIR" else a) for a in arguments])
            (a, _), (b, code) = run(few), run(many)
            self.line(f"{title}: {name}", max(a - self.start, 0), max(b - self.start, 0), f"  (exit {code})")

    def layout(self, layout, manifests=False, gone=False):
        both = [self.directory(layout, n, manifests) for n in (self.count, 10 * self.count)]
        if gone:
            for path in both:
                lost(path, 0)
        title = layout + (" with manifests" if manifests else "") + (", half lost" if gone else "")
        self.commands(title, *both, COMMANDS)
        if layout == "points" and not gone:
            self.commands(title, *both, CHAIN_COMMANDS)
            self.line(f"{title}: one new file in a mount", *map(self.refresh, both))
        for path in both:
            shutil.rmtree(path)

    def refresh(self, directory):
        """Processor time of a mount from the appearance of a file to that of its point."""
        mountpoint = f"{self.folder}/mount"
        os.makedirs(mountpoint, exist_ok=True)
        mount = self.mount(directory, mountpoint)
        status = f"{mountpoint}/.fleecefs/status.json"
        try:
            wait_for(lambda: os.path.exists(status))
            before = seconds_used(mount.pid)
            write(f"{directory}/FULL-{FIRST_POINT - 60}-new.qcow2", empty_qcow2())
            new = f"{mountpoint}/new.qcow2/FULL-{FIRST_POINT - 60}-new.qcow2.raw"
            wait_for(lambda: os.path.exists(new))
            return seconds_used(mount.pid) - before
        finally:
            subprocess.run([self.program, "umount", mountpoint], check=False)
            mount.wait()

    def mount(self, directory, mountpoint):
        command = [self.program, "mount", "--foreground", directory, mountpoint]
        # A chain of more than 65,535 layers has much to say.
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def search(self):
        """A disk of 512-byte clusters whose L1 entries all lead to one L2 table, and one above it with none."""
        spans = 4 << 20
        for name, entry, whence in (("data", None, os.SEEK_HOLE), ("zeros", 1, os.SEEK_DATA)):
            used = []
            for count in (spans // 10, spans):
                directory = f"{self.folder}/search"
                os.mkdir(directory)
                write(f"{directory}/FULL-{FIRST_POINT}-sda", one_table(count, entry, True))
                write(f"{directory}/INC-{FIRST_POINT + 1}-sda", one_table(count, entry, False))
                used.append(self.seek(directory, whence))
                shutil.rmtree(directory)
            self.line(f"search over {name}, then nothing else", *used)

    def seek(self, directory, whence):
        mountpoint = f"{self.folder}/mount"
        os.makedirs(mountpoint, exist_ok=True)
        mount = self.mount(directory, mountpoint)
        path = f"{mountpoint}/sda/latest.raw"
        try:
            wait_for(lambda: os.path.exists(path))
            file = os.open(path, os.O_RDONLY)
            before = seconds_used(mount.pid)
            try:
                os.lseek(file, 0, whence)
            except OSError:
                # No data at all.
                pass
            used = seconds_used(mount.pid) - before
            os.close(file)
            return used
        finally:
            subprocess.run([self.program, "umount", mountpoint], check=False)
            mount.wait()


def one_table(spans, entry, full):
    size, tables = spans * 64 * 512, (512 + spans * 8 + 511) // 512 * 512
    header = bytearray(512)
    struct.pack_into(">4sIQIIQIIQQIIQQQQII", header, 0, b"QFI\xfb", 3, 0, 0, 9, size, 0, spans, 512, 0, 0, 0, 0,
                     0, 0, 0, 4, 104)
    l1 = struct.pack(">Q", tables if full else 0) * spans
    data = tables + 512
    l2 = struct.pack(">64Q", *[entry or data + 512 * i for i in range(64)])
    return bytes(header) + l1 + bytes(tables - 512 - len(l1)) + l2 + bytes([1]) * (64 * 512)


def seconds_used(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(done):
    end = time.monotonic() + 600
    while not done():
        if time.monotonic() > end:
            sys.exit("waited for ten minutes in vain")
        time.sleep(0.05)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleecefs", required=True)
    parser.add_argument("--count", type=int, default=7000, help="points of the smaller directory")
    parser.add_argument("--only", choices=LAYOUTS, action="append", help="this layout, without manifests")
    parser.add_argument("--folder", help="where to make the directories")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bench = Bench(os.path.abspath(arguments.fleecefs), folder, arguments.count)
        print(f"{'':<40} {arguments.count:>8} N {10 * arguments.count:>8} N")
        bench.search()
        for layout in arguments.only or LAYOUTS:
            bench.layout(layout)
        for layout in () if arguments.only else ("disks", "points"):
            bench.layout(layout, manifests=True)
            bench.layout(layout, manifests=True, gone=True)
    sys.exit(1 if bench.bad else 0)


if __name__ == "__main__":
    main()
