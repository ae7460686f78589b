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
        put("files", f"ext{i}", path.read_bytes())
    xfs(tmp, tree)


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
        put("files", f"xfs{i}", path.read_bytes()[:64 << 10])


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
