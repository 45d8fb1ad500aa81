"""Reading members out of archives by name, in memory, without trusting the archive.

Nothing is extracted to disk, so that no name in an archive can lead anywhere; links are not
followed; and neither what a member says of its size nor what it unpacks to may pass a limit.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, cast

from benchmarks.errors import BenchmarkError

__all__ = ["gunzip", "read_deb", "read_tar", "read_zip"]

_WHOLE = 1 << 30
"""Bytes that a compressed stream may unpack to in all, most of which is passed over."""

_UNREADABLE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    OSError,
    NotImplementedError,
)

Limits = Mapping[str, int]
"""By the full path of a member, the most bytes that it may have."""


def read_tar(archive: IO[bytes], limits: Limits, name: str) -> dict[str, bytes]:
    """The content of regular files of a tarball, plain or compressed by gzip or xz, by path.

    Args:
        archive: the tarball, at its beginning.
        limits: what is read.
        name: what the archive is called in messages.

    Raises:
        BenchmarkError: a member is missing, there twice, no regular file or larger than its limit;
            or the archive is damaged, or unpacks to more than a gibibyte.
    """
    found: dict[str, bytes] = {}
    # As a stream: a member is passed once, and none is unpacked twice to be found.
    with (
        _readable(name),
        tarfile.open(fileobj=_Limited(_unpacked(archive), name), mode="r|") as tar,
    ):
        for info in tar:
            if info.name not in limits:
                continue
            if info.name in found:
                raise BenchmarkError(f"{name} must hold one file {info.name!r}, found two")
            stream = tar.extractfile(info) if info.isreg() and not info.issparse() else None
            if stream is None:
                raise _missing(name, info.name)
            found[info.name] = _read(stream, info.size, limits[info.name], name, info.name)
    return _all(found, limits, name)


def read_zip(archive: IO[bytes], limits: Limits, name: str) -> dict[str, bytes]:
    """The content of regular files of a zip archive, wheels among them; see `read_tar`."""
    found: dict[str, bytes] = {}
    with _readable(name), zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if info.filename not in limits:
                continue
            if info.filename in found:
                raise BenchmarkError(f"{name} must hold one file {info.filename!r}, found two")
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the writer's system has none
            if info.is_dir() or kind not in (0, stat.S_IFREG) or info.flag_bits & 1:
                raise _missing(name, info.filename)
            limit = limits[info.filename]
            with file.open(info) as stream:
                found[info.filename] = _read(stream, info.file_size, limit, name, info.filename)
    return _all(found, limits, name)


def read_deb(archive: IO[bytes], limits: Limits, name: str) -> dict[str, bytes]:
    """The content of regular files of a Debian package, by paths from `./` on; see `read_tar`.

    Such a package is an `ar` archive, and the files are in the tarball `data.tar.*` within.
    """
    with _readable(name):
        if archive.read(8) != b"!<arch>\n":
            raise BenchmarkError(f"{name} must be a Debian package, found something else")
        while header := archive.read(60):
            label = header[:16].decode("ascii", "replace").rstrip(" /")
            size = header[48:58].decode("ascii", "replace").strip()
            if len(header) < 60 or header[58:] != b"`\n" or not size.isdecimal():
                raise BenchmarkError(f"{name} must be an ar archive, found a damaged header")
            if label in ("data.tar", "data.tar.gz", "data.tar.xz"):
                return read_tar(archive, limits, name)
            if label.startswith("data.tar"):
                raise BenchmarkError(f"{name} must be packed by gzip or xz, found {label}")
            archive.seek(int(size) + int(size) % 2, io.SEEK_CUR)
    raise BenchmarkError(f"{name} must hold a data.tar, found none")


def gunzip(content: bytes, limit: int, name: str) -> bytes:
    """What gzip has packed, at most `limit` bytes.

    Raises:
        BenchmarkError: it is damaged, or more.
    """
    with _readable(name), gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
        return _read(stream, 0, limit, name, name)


def _unpacked(archive: IO[bytes]) -> IO[bytes]:
    """The bytes of a tarball, by whichever means it is compressed."""
    start = archive.read(6)
    archive.seek(-len(start), io.SEEK_CUR)
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=archive))
    if start == b"\xfd7zXZ\x00":
        return cast(IO[bytes], lzma.LZMAFile(archive))
    return archive


class _Limited(io.RawIOBase):
    """A stream that must end within `_WHOLE` bytes, and is not read on after its end."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.stream = stream
        self.name = name
        self.left = _WHOLE
        self.ended = False

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes or fewer."""
        content = self.stream.read(size)
        if not content:
            if self.ended:  # tarfile would go on for as long as a header says.
                raise EOFError("it ends too soon")
            self.ended = True
        self.left -= len(content)
        if self.left < 0:
            raise BenchmarkError(f"{self.name} must unpack to at most {_WHOLE:,} bytes, found more")
        return content


def _read(
    stream: IO[bytes] | gzip.GzipFile, declared: int, limit: int, name: str, path: str
) -> bytes:
    """All of a member, if it neither says that it is larger than `limit` nor is."""
    content = b"" if declared > limit else stream.read(limit + 1)
    if declared > limit or len(content) > limit:
        found = f"{declared:,}" if declared > limit else "more"
        raise BenchmarkError(f"{path!r} of {name} must have at most {limit:,} bytes, found {found}")
    if len(content) < declared:
        raise EOFError(f"{path!r} ends after {len(content):,} of {declared:,} bytes")
    return content


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Says which archive it is that cannot be read."""
    try:
        yield
    except _UNREADABLE as error:
        raise BenchmarkError(f"{name} must be a whole archive, found: {error}") from error


def _missing(name: str, path: str) -> BenchmarkError:
    return BenchmarkError(f"{name} must hold the file {path!r}, found none")


def _all(found: dict[str, bytes], limits: Limits, name: str) -> dict[str, bytes]:
    for path in limits:
        if path not in found:
            raise _missing(name, path)
    return found
