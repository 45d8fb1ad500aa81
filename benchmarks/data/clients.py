"""The registries' own clients, which fetch archives: npm, pip and apt-get.

No script of a package is ever run.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.errors import BenchmarkError

__all__ = ["apt_download", "npm_pack", "pip_download"]

_TIMEOUT_SECONDS = 900


def npm_pack(name: str, version: str, wheel: str, folder: Path) -> Path:
    """Let npm write a package's tarball into the empty `folder`."""
    spec = f"{name}@{version}"
    npm = shutil.which("npm")
    if npm is None:
        raise BenchmarkError(
            f"downloading {spec} needs npm on the PATH, found none; install Node.js, or run "
            "without --full"
        )
    command = [npm, "pack", spec, "--ignore-scripts", "--silent"]
    return _download(f"npm pack {spec}", command, dict(os.environ), folder)


def apt_download(name: str, version: str, wheel: str, folder: Path) -> Path:
    """Let apt-get write a package of the system's Debian into the empty `folder`.

    This needs neither root nor the package installed, only lists that know the version.
    """
    spec = f"{name}={version}"
    apt = shutil.which("apt-get")
    if apt is None:
        raise BenchmarkError(
            f"downloading {spec} needs apt-get on the PATH, which Debian has, found none"
        )
    command = [apt, "download", spec, "--quiet", "-o", "Acquire::Retries=2"]
    try:
        return _download(f"apt-get download {spec}", command, _english(), folder)
    except BenchmarkError as error:
        raise BenchmarkError(
            f"{error}; if apt-get does not know the package, its lists may be empty or old: "
            "`sudo apt-get update` fetches them, which needs root, the download does not"
        ) from error


def _english() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def pip_download(name: str, version: str, wheel: str, folder: Path) -> Path:
    """Let pip write a package into the empty `folder`: a source distribution, or a wheel.

    Args:
        name, version: of the package.
        wheel: the tags at the end of the wheel's name, whether they fit this machine or not;
            empty for a source distribution.
        folder: see above.
    """
    spec = f"{name}=={version}"
    # Looking for the module itself would wake setuptools' own import hooks.
    if not any(importlib.metadata.distributions(name="pip")):
        raise BenchmarkError(
            f"downloading {spec} needs pip, found none for {sys.executable}; python -m ensurepip"
        )
    target = folder / "archive"
    target.mkdir()
    options = ["--no-deps", "--retries", "2", "--disable-pip-version-check", "--no-input"]
    options += ["--progress-bar", "off"]
    environment = dict(os.environ)
    if wheel:
        options += _wheel_options(wheel)
    else:
        options += ["--no-binary", name, "--no-build-isolation"]
        path = [str(_backend(name, version, folder)), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        environment["PIP_USE_PEP517"] = "1"
    command = [sys.executable, "-m", "pip", "download", spec, *options]
    return _download(f"pip download {spec}", command, environment, target)


def _wheel_options(tags: str) -> list[str]:
    """What makes pip take the wheel with these tags, such as "py3-none-any"."""
    python, abi, platform = tags.split("-")
    options = ["--only-binary", ":all:", "--ignore-requires-python"]
    if platform != "any":
        options += ["--implementation", python[:2], "--python-version", python[2:]]
        options += ["--abi", abi, "--platform", platform]
    return options


def _backend(name: str, version: str, folder: Path) -> Path:
    """A stand-in for setuptools, in the folder that is returned.

    Before it keeps a source distribution pip asks its build backend for the name and version, which
    for packages without `pyproject.toml` is setuptools and runs their `setup.py`. A backend of that
    name that knows the answer stands in for it.
    """
    package = folder / "backend" / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    stem = name.replace("-", "_")
    (package / "build_meta.py").write_text(_BACKEND.format(name=name, version=version, stem=stem))
    return package.parent


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
    endings = (".tgz", ".tar.gz", ".whl", ".deb")
    archives = [path for path in folder.iterdir() if path.name.endswith(endings)]
    if done.returncode != 0 or len(archives) != 1:
        said = " ".join((done.stderr or done.stdout).split())[-400:] or "nothing"
        client = what.split()[0]
        raise BenchmarkError(
            f"`{what}` must write one archive, found exit code {done.returncode} and "
            f"{len(archives)} archives; is the registry within reach? {client} said: {said}"
        )
    return archives[0]
