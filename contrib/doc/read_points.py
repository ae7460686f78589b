#!/usr/bin/env python3
"""Lists the points below a backup directory and checks manifests and images, as contrib/doc/format.md says.
A line for each: disk's folder, image, level, time, parent ('-': none), and 'ok' or what is wrong."""
import json, os, re, shutil, subprocess, sys
try:
    from blake3 import blake3
except ImportError:
    blake3 = None
NAME = re.compile(r"(FULL|INC|DIFF|COPY)-(\d+)-(.+)", re.S)
IGNORED = re.compile(r"\..*|.*\.partial|.*\.config|uuid|.*\.fleece\.[A-Za-z0-9]*|vm-\d+-fleece-\d+(\..*)?", re.S)

def b3(*parts):                                        # of bytes and open files, one after the other
    process = None if blake3 else subprocess.Popen("b3sum", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    hasher = blake3() if blake3 else None
    write = hasher.update if hasher else process.stdin.write
    for part in parts:
        for chunk in [part] if isinstance(part, bytes) else iter(lambda: part.read(1 << 20), b""):
            write(chunk)
    return hasher.hexdigest() if hasher else process.communicate()[0][:64].decode()

def manifest_of(folder, image):                        # the manifest, and what is wrong with it
    try:
        text = open(os.path.join(folder, ".fleecefs", image + ".json"), "rb").read(4 << 20)
        m, at = json.loads(text), text.rfind(b'"checksum": "') + 13
        if m["format_version"] != 1:
            return None, f"manifest of version {m['format_version']}"
        zeroed = text[:at] + b"0" * 64 + text[at + 64:]
        if hashes and at > 12 and b3(zeroed) != text[at:at + 64].decode():
            return None, "manifest damaged"
        return (m, "ok") if m["image"] == image else (None, "manifest of another image")
    except FileNotFoundError:
        return None, "no manifest"
    except (ValueError, KeyError, TypeError):
        return None, "not a manifest"

def check(path, m):                                    # what is wrong with an image
    with open(path, "rb") as f:
        size, ends = os.fstat(f.fileno()).st_size, f.read(128 << 10)
        if size != m["file_size"]:
            return "image has another length"
        if not hashes:
            return "ok"
        f.seek(max(0, size - (128 << 10)))
        if m.get("fingerprint") and b3(size.to_bytes(8, "big"), ends, f)[:32] != m["fingerprint"]:
            return "image has other ends"
        f.seek(0)
        return "ok" if not m.get("blake3") else "ok" if b3(f) == m["blake3"] else "image damaged"

def points(folder):
    found = []
    for image in sorted(os.listdir(folder)):
        path, named = os.path.join(folder, image), NAME.fullmatch(image)
        if IGNORED.fullmatch(image) or os.path.islink(path) or not os.path.isfile(path):
            continue
        m, said = manifest_of(folder, image)
        if not named and not m:
            continue                                   # another program's, or no image at all
        level, time = (named[1].lower(), int(named[2])) if named else (m["level"], m["time"])
        if m and m.get("state_of"):
            merged = NAME.fullmatch(m["state_of"])
            time = max(time, int(merged[2]) if merged else m["time"])
        said = check(path, m) if m else said
        found.append([time, image, level, m and m.get("parent"), named[3] if named else image, said, m])
    for p in found:                                    # without a manifest: the newest base before it
        if not p[6] and p[2] in ("inc", "diff"):
            levels = ("full", "inc") if p[2] == "inc" else ("full",)
            bases = [q[:2] for q in found if q[4] == p[4] and q[0] < p[0] and q[2] in levels]
            p[3] = max(bases)[1] if bases else "?"
    return sorted(found, key=lambda p: p[:2])

hashes = blake3 or shutil.which("b3sum")
if not hashes:
    print("hashes are not checked: there is neither b3sum nor the Python package blake3", file=sys.stderr)
bad = False
for folder, inside, _ in os.walk(sys.argv[1]):
    inside[:] = sorted(d for d in inside if d != ".fleecefs")
    for time, image, level, parent, _, said, _ in points(folder):
        bad |= said not in ("ok", "no manifest")
        print(os.path.relpath(folder, sys.argv[1]), image, level, time, parent or "-", said, sep="\t")
sys.exit(bad)
