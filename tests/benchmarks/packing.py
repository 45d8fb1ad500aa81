"""Makes archives, good and bad, from names and contents."""

import gzip
import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace

from benchmarks.data.fetch import cache_dir


def tarball(files, mode="w:gz"):
    """A tarball of regular files, by name or as pairs."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def ar(files):
    """An archive of the Unix `ar` of these pairs."""
    parts = [b"!<arch>\n"]
    for name, content in files:
        parts.append(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
        parts.append(content + b"\n" * (len(content) % 2))
    return b"".join(parts)


def deb(files, mode="w:xz"):
    """A Debian package of these files."""
    ending = {"w:xz": ".xz", "w:gz": ".gz", "w": ""}[mode]
    control = tarball({"./control": b"Package: some-data\n"}, mode)
    return ar(
        [
            ("debian-binary", b"2.0\n"),
            (f"control.tar{ending}", control),
            (f"data.tar{ending}", tarball(files, mode)),
        ]
    )


def wheel(files):
    """A zip archive of these files."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return stream.getvalue()


def put(monkeypatch, module, content, root):
    """Put an archive where the module's pinned one would be, as if it were that one."""
    archive = replace(module.ARCHIVE, sha256=hashlib.sha256(content).hexdigest())
    root.mkdir(exist_ok=True)
    (root / archive.file_name).write_bytes(content)
    monkeypatch.setattr(module, "ARCHIVE", archive)
    return root


def is_cached(archive):
    """Whether the pinned archive has been fetched; tests fetch nothing."""
    return (cache_dir() / archive.file_name).is_file()


def zeros(count):
    """So many zeros, packed by gzip."""
    return gzip.compress(bytes(count))
