#!/usr/bin/env python3
"""Seeds for the fuzz targets, below corpus/: small images by qemu-img and qemu-io, and for the target
`folder` what fleecefs itself leaves in a folder. Needs FLEECEFS, the program, for its manifests."""
import json
import os
import pathlib
import subprocess
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
# As in run.sh.
MAX_LEN = 262144
# As in fuzz_targets/folder.rs.
NAMES = [
    ".fleecefs/removal.journal", ".fleecefs/fold.json", ".fleecefs/FULL-1-d.header",
    ".fleecefs/FULL-1-d.json", ".fleecefs/INC-2-d.json", ".fleecefs/consolidate-FULL-1-d",
    ".fleecefs/INC-2-d.partial.json", "FULL-1-d", "INC-2-d", "INC-3-d", "FULL-4-d", "d.full.data",
    "a.vma", "uuid",
]
OPTIONS = ["cluster_size=512", "cluster_size=4k", "cluster_size=4k,compat=0.10",
           "cluster_size=16k,extended_l2=on", "cluster_size=4k,compression_type=zstd"]


def image(path, options):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "256k"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 9k", "-c", "write -z 16k 8k",
                    "-c", "write -c -P 7 64k 16k", path], check=True, stdout=subprocess.DEVNULL)


# Without checksums, so that what is changed is read.
EXT = [["-t", "ext2"], ["-t", "ext4", "-O", "^metadata_csum,^has_journal"], ["-t", "ext2", "-O", "^dir_index", "-I", "128"],
       ["-t", "ext4", "-O", "^metadata_csum,^has_journal,inline_data,^64bit", "-I", "256"]]


def file_systems(tmp):
    tree = tmp / "tree"
    (tree / "dir" / "sub").mkdir(parents=True)
    (tree / "etc").mkdir()
    (tree / "etc" / "fstab").write_text("# nothing\n")
    (tree / "dir" / "file").write_bytes(b"x" * 9000)
    with open(tree / "dir" / "sparse", "wb") as f:
        f.seek(90000)
        f.write(b"y")
    (tree / "dir" / "short").symlink_to("file")
    (tree / "dir" / "long").symlink_to("a" * 100)
    os.link(tree / "dir" / "file", tree / "dir" / "sub" / "hard")
    for i, options in enumerate(EXT):
        path = tmp / f"ext{i}"
        subprocess.run(["mke2fs", "-q", "-F", "-b", "1024", "-N", "32", "-m", "0", *options, "-d", tree, path, "96"],
                       check=True)
        put_disk(f"ext{i}", path.read_bytes())
    xfs(tmp, tree)
    btrfs(tmp, tree)
    ntfs(tmp, tree)
    fat(tmp, tree)
    exfat(tmp)


# Version 4: without checksums. The log is on another device, so that all of the rest is at the begin.
XFS = [["-n", "ftype=0"], ["-n", "ftype=1"]]


def xfs(tmp, tree):
    lines = ["/nothing", "1 1", "d--755 0 0"]
    lines += [f"file ---644 0 0 {tree}/dir/file", "short l--777 0 0 file", "long l--777 0 0 " + "a" * 500]
    for folder, count in [("etc", 1), ("some", 20)]:
        lines += [f"{folder} d--755 0 0", *(f"name-{i} ---644 0 0 {tree}/etc/fstab" for i in range(count)), "$"]
    (tmp / "prototype").write_text("\n".join(lines + ["$", ""]))
    for i, options in enumerate(XFS):
        path, log = tmp / f"xfs{i}", tmp / f"xfs{i}.log"
        for file in path, log:
            with open(file, "wb") as f:
                f.truncate(16 << 20)
        subprocess.run(["mkfs.xfs", "-q", "-f", "--unsupported", "-m", "crc=0", "-b", "size=512", "-i", "size=256",
                        "-d", "agcount=1", "-l", f"logdev={log},size=4m", *options, "-p", tmp / "prototype", path],
                       check=True, stderr=subprocess.DEVNULL)
        put_disk(f"xfs{i}", path.read_bytes())


def btrfs(tmp, tree):
    for i, options in enumerate([[], ["--csum", "crc32c", "-O", "^no-holes"]]):
        path = blank(tmp / f"btrfs{i}", 16 << 20)
        subprocess.run(["mkfs.btrfs", "-q", "-M", "-m", "single", "-d", "single", "-n", "4096", *options,
                        "--rootdir", tree, path], check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        put_disk(f"btrfs{i}", path.read_bytes())


def ntfs(tmp, tree):
    path = blank(tmp / "ntfs", 2 << 20)
    subprocess.run(["mkntfs", "-q", "-Q", "-F", path], check=True, stderr=subprocess.DEVNULL)
    for name in ("dir/file", "dir/sparse", "etc/fstab"):
        subprocess.run(["ntfscp", "-q", path, tree / name, name.split("/")[1]], check=True)
    data = bytearray(path.read_bytes())
    # The table of upper case is large, and there is another one if it is damaged; the log is empty.
    upper = data.find(b"".join(i.to_bytes(2, "little") for i in range(64)))
    data[upper:upper + (128 << 10)] = bytes(128 << 10)
    for at in range(0, len(data), 512):
        if data[at:at + 512] == b"\xff" * 512:
            data[at:at + 512] = bytes(512)
    put_disk("ntfs", bytes(data))


def fat(tmp, tree):
    for width, size in [("12", 1 << 20), ("16", 3 << 20), ("32", 34 << 20)]:
        path = blank(tmp / f"fat{width}", size)
        subprocess.run(["mkfs.fat", "-F", width, "-s", "1", path], check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        subprocess.run(["mcopy", "-s", "-Q", "-i", path, tree / "dir" / "file", tree / "etc", "::/"], check=True)
        put_disk(f"fat{width}", path.read_bytes())
    # In a partition.
    entry = bytes([0, 0, 0, 0, 1, 0, 0, 0]) + (8).to_bytes(4, "little") + (2048).to_bytes(4, "little")
    table = bytes(446) + entry + bytes(48) + b"\x55\xaa"
    put_disk("mbr", table + bytes(7 * 512) + (tmp / "fat12").read_bytes())


def exfat(tmp):
    """Files and folders are put into the root by hand: no tool does that without a mount."""
    path = blank(tmp / "exfat", 4 << 20)
    subprocess.run(["mkfs.exfat", "-c", "512", path], check=True, stdout=subprocess.DEVNULL)
    data = bytearray(path.read_bytes())
    number = lambda at: int.from_bytes(data[at:at + 4], "little")
    table, heap, root = number(80) * 512, number(88) * 512, number(96)
    place = lambda cluster: heap + (cluster - 2) * 512
    free = root + 16

    def entry(name, folder, first, size):
        units = name.encode("utf-16-le")
        parts = [units[i:i + 30].ljust(30, b"\0") for i in range(0, len(units), 30)]
        out = bytes([0x85, 1 + len(parts), 0, 0, 0x10 if folder else 0x20]) + bytes(27)
        out += bytes([0xc0, 3, 0, len(name)]) + bytes(4) + size.to_bytes(8, "little") + bytes(4)
        out += first.to_bytes(4, "little") + size.to_bytes(8, "little")
        return out + b"".join(b"\xc1\0" + p for p in parts)

    sets = entry("folder", True, free, 512) + entry("a name that is longer", False, free + 1, 900)
    at = place(root) + 3 * 32
    data[at:at + len(sets)] = sets
    inside = entry("inside", False, free + 3, 100)
    data[place(free):place(free) + len(inside)] = inside
    data[table + 4 * root:table + 4 * root + 4] = b"\xff" * 4
    put_disk("exfat", bytes(data))


def blank(path, size):
    with open(path, "wb") as f:
        f.truncate(size)
    return path


def put_disk(name, image):
    """A disk as fuzz_targets/files.rs reads it: its sectors that are not zeros, as pieces."""
    sectors = [image[i:i + 512].ljust(512, b"\0") for i in range(0, len(image), 512)]
    out, at = len(sectors).to_bytes(4, "little"), 0
    while at < len(sectors):
        end = at
        while end < len(sectors) and end - at < 65535 and any(sectors[end]):
            end += 1
        if end > at:
            out += at.to_bytes(4, "little") + (end - at).to_bytes(2, "little") + b"".join(sectors[at:end])
        at = max(end, at + 1)
    assert len(out) <= MAX_LEN, f"{name}: {len(out)}"
    put("files", name, out)


def pieces(files):
    out = b""
    for name, data in files:
        data = data[:65535]
        out += bytes([NAMES.index(name)]) + len(data).to_bytes(2, "big") + data
    return out


def put(target, name, data):
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
    (CORPUS / target / name).write_bytes(data)


def main():
    with tempfile.TemporaryDirectory() as tmp:
        tmp = pathlib.Path(tmp)
        for i, options in enumerate(OPTIONS):
            image(tmp / "image", options)
            put("qcow2", f"image{i}", (tmp / "image").read_bytes())
        file_systems(tmp)
        disk = tmp / "d"
        disk.mkdir()
        for name in ("FULL-1-d", "INC-2-d"):
            image(disk / name, "cluster_size=512")
        subprocess.run([os.environ["FLEECEFS"], "-q", "verify", "--create", disk], check=True)
        full, inc = ((disk / n).read_bytes() for n in ("FULL-1-d", "INC-2-d"))
        manifests = [(disk / f".fleecefs/{n}.json").read_bytes() for n in ("FULL-1-d", "INC-2-d")]
        for i, m in enumerate(manifests):
            put("manifest", f"m{i}", m)
        manifest = json.loads(manifests[0])
        del manifest["checksum"]
        publish = {"temporary": "consolidate-FULL-1-d", "manifest": manifest}
        removal = {"publish": publish, "remove": ["INC-2-d"], "relink": ["INC-3-d"]}
        fold = {"full": "FULL-1-d", "interim": "FULL-4-d", "increments": ["INC-2-d"], "linked": [],
                "raw": False, "manifest": manifest, "old": None}
        both = [(".fleecefs/FULL-1-d.json", manifests[0]), (".fleecefs/INC-2-d.json", manifests[1]),
                ("FULL-1-d", full), ("INC-2-d", inc)]
        put("folder", "plain", pieces(both))
        put("folder", "removal", pieces(both + [(".fleecefs/removal.journal", json.dumps(removal).encode()),
                                                (".fleecefs/consolidate-FULL-1-d", full)]))
        put("folder", "fold", pieces(both + [(".fleecefs/fold.json", json.dumps(fold).encode()), ("FULL-4-d", full)]))
        put("folder", "header", pieces(both + [(".fleecefs/FULL-1-d.header", b"%064d" % 0 + full[:512])]))
    node = {"node-name": "d", "drv": "qcow2", "file": "/a/d.qcow2", "ro": False,
            "image": {"virtual-size": 65536, "cluster-size": 65536, "filename": "d", "format": "qcow2"},
            "dirty-bitmaps": [{"name": "b", "granularity": 65536, "count": 0, "recording": True,
                               "busy": False, "persistent": True}]}
    drive = {"device": "", "qdev": "vd0", "inserted": node}
    graph = {"nodes": [{"id": 1, "type": "block-driver", "name": "d"}], "edges": []}
    greeting = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}}}
    lines = [greeting, [drive], [node], graph]
    put("qmp", "one", "\n".join(json.dumps(v) for v in lines).encode())


main()
