import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.data import clients
from benchmarks.data.fetch import Archive, Member, cache_dir, fetch, read_member
from benchmarks.errors import BenchmarkError
from tests.benchmarks.packing import deb

CONTENT = b"\x00\x01data"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tarball(tmp_path):
    """A package with one good file, one link to it, and one file that aims outside."""
    path = tmp_path / "made" / "digits.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name in ("package/data/file", "../../escaped"):
            info = tarfile.TarInfo(name)
            info.size = len(CONTENT)
            tar.addfile(info, io.BytesIO(CONTENT))
        link = tarfile.TarInfo("package/link")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/hostname"
        tar.addfile(link)
    return path


@pytest.fixture
def npm(tmp_path, monkeypatch, tarball):
    """A stand-in for npm that copies the tarball; returns the file with one line a call."""
    log = tmp_path / "calls"
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\ncp "{tarball}" .\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return log


@pytest.fixture
def archive(tarball):
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    return Archive("npm", "digits", "1.0.0", digest)


def test_downloads_once_and_reuses_the_file(tmp_path, npm, archive):
    root = tmp_path / "cache"
    member = Member(archive, "package/data/file")
    assert read_member(member, root) == CONTENT
    assert read_member(member, root) == CONTENT
    assert npm.read_text().splitlines() == ["pack digits@1.0.0 --ignore-scripts --silent"]
    assert [path.name for path in root.iterdir()] == ["digits-1.0.0.tgz"]


def test_wrong_download_is_removed(tmp_path, npm, archive, tarball):
    root = tmp_path / "cache"
    wrong = Archive("npm", "digits", "1.0.0", "0" * 64)
    with pytest.raises(BenchmarkError) as caught:
        fetch(wrong, root)
    for part in ("0" * 64, archive.sha256, "removed"):
        assert part in str(caught.value)
    assert list(root.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_fetched_anew(tmp_path, npm, archive, tarball):
    root = tmp_path / "cache"
    path = fetch(archive, root)
    path.write_bytes(b"damaged")
    assert read_member(Member(archive, "package/data/file"), root) == CONTENT
    assert path.read_bytes() == tarball.read_bytes()
    assert len(npm.read_text().splitlines()) == 2


def test_a_cut_file_in_the_cache_is_not_read_when_the_registry_is_away(tmp_path, npm, archive):
    root = tmp_path / "cache"
    path = fetch(archive, root)
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "bin" / "npm").write_text("#!/bin/sh\necho 'getaddrinfo ENOTFOUND' >&2\nexit 1\n")
    message = "npm said: getaddrinfo ENOTFOUND .any other way of putting the file digits-1.0.0.tgz"
    with pytest.raises(BenchmarkError, match=message):
        read_member(Member(archive, "package/data/file"), root)


def test_an_interrupted_download_leaves_nothing_that_looks_finished(tmp_path, npm, archive):
    root = tmp_path / "cache"
    script = tmp_path / "bin" / "npm"
    good = script.read_text()
    # The client is killed by its parent in the middle, and so leaves its folder.
    script.write_text('#!/bin/sh\nprintf half > digits-1.0.0.tgz\nkill -9 "$PPID"\n')
    code = (
        "from pathlib import Path; from benchmarks.data.fetch import Archive, fetch;"
        f"fetch(Archive('npm', 'digits', '1.0.0', {archive.sha256!r}), Path({str(root)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = root.iterdir()
    assert left.name.startswith(".download-")
    script.write_text(good)
    assert read_member(Member(archive, "package/data/file"), root) == CONTENT
    assert left.exists()  # It may be another process's that still goes on.
    os.utime(left, (0, 0))
    (root / "digits-1.0.0.tgz").unlink()
    fetch(archive, root)
    assert [path.name for path in root.iterdir()] == ["digits-1.0.0.tgz"]


def test_several_processes_at_once(tmp_path, npm, archive, tarball):
    root = tmp_path / "cache"
    code = (
        "from pathlib import Path; from benchmarks.data.fetch import Archive, Member, read_member;"
        f"archive = Archive('npm', 'digits', '1.0.0', {archive.sha256!r});"
        f"found = read_member(Member(archive, 'package/data/file'), Path({str(root)!r}));"
        f"assert found == {CONTENT}"
    )
    script = tmp_path / "bin" / "npm"
    script.write_text(f'#!/bin/sh\nsleep 0.3\ncp "{tarball}" .\n')
    several = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(3)]
    assert [process.wait(60) for process in several] == [0, 0, 0]
    assert [path.name for path in root.iterdir()] == ["digits-1.0.0.tgz"]


def test_nothing_is_written_outside_the_cache(tmp_path, npm, archive):
    root = tmp_path / "deep" / "er" / "cache"
    before = set(tmp_path.rglob("*"))
    assert read_member(Member(archive, "../../escaped"), root) == CONTENT  # read, not extracted
    made = {path.name for path in set(tmp_path.rglob("*")) - before}
    assert made == {"deep", "er", "cache", "digits-1.0.0.tgz", "calls"}


@pytest.mark.parametrize("path", ["package/link", "package/data", "package/none"])
def test_only_regular_members(tmp_path, npm, archive, path):
    with pytest.raises(BenchmarkError, match=rf"must hold the file '{path}'"):
        read_member(Member(archive, path), tmp_path / "cache")


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../digits"},
        {"name": "/etc/digits"},
        {"name": "--prefix=x"},
        {"version": "../1"},
        {"version": "--x"},
        {"registry": "ftp"},
        {"sha256": "12"},
        {"wheel": "py3-none-any"},
    ],
)
def test_an_archive_cannot_name_a_path_or_an_option(wrong):
    fields = {"registry": "npm", "name": "digits", "version": "1.0.0", "sha256": "0" * 64}
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        Archive(**{**fields, **wrong})


@pytest.mark.parametrize("wheel", ["../py3-none-any", "py3-none", "--x-y-z", "py3-none-any.whl"])
def test_tags_of_a_wheel(wheel):
    with pytest.raises(ValueError, match="`wheel` must be the tags"):
        Archive("pypi", "digits", "1.0.0", "0" * 64, wheel)


def test_scoped_name_is_one_file_name():
    assert Archive("npm", "@a/b", "1.0", "0" * 64).file_name == "a-b-1.0.tgz"


def test_without_npm(tmp_path, monkeypatch, archive):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchmarkError, match="needs npm on the PATH"):
        fetch(archive, tmp_path / "cache")


@pytest.fixture
def sdist(tmp_path):
    """A source distribution whose setup.py must not be run, and where pip finds it."""
    made = tmp_path / "index"
    made.mkdir()
    path = made / "some-data-1.0.0.tar.gz"
    ran = tmp_path / "ran"
    files = {
        "setup.py": f"open({str(ran)!r}, 'w').close(); raise SystemExit('must not run')",
        "PKG-INFO": "Metadata-Version: 1.0\nName: some-data\nVersion: 1.0.0\n",
        "rows.csv": "1,2\n",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"some-data-1.0.0/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def _offline(monkeypatch, folder):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_a_source_distribution_is_fetched_and_not_run(tmp_path, monkeypatch, sdist):
    _offline(monkeypatch, sdist.parent)
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    archive = Archive("pypi", "some-data", "1.0.0", digest)
    root = tmp_path / "cache"
    assert read_member(Member(archive, "some-data-1.0.0/rows.csv"), root) == b"1,2\n"
    assert not (tmp_path / "ran").exists()
    assert [path.name for path in root.iterdir()] == ["some-data-1.0.0.tar.gz"]


def test_a_source_distribution_that_is_not_there(tmp_path, monkeypatch, sdist):
    _offline(monkeypatch, sdist.parent)
    archive = Archive("pypi", "none-such", "1.0.0", "0" * 64)
    with pytest.raises(BenchmarkError, match=r"registry within reach\? pip said: .*none-such"):
        fetch(archive, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def _wheel(folder, tags):
    path = folder / f"some_data-1.0.0-{tags}.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("some_data/rows.csv", "1,2\n")
        info = "some_data-1.0.0.dist-info"
        metadata = "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0.0\n"
        file.writestr(f"{info}/METADATA", metadata + "Requires-Python: >=9\n")
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {tags}\n")
        file.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.parametrize("tags", ["py3-none-any", "cp399-cp399-manylinux_2_99_s390x"])
def test_a_wheel_is_fetched_whether_it_fits_the_machine_or_not(tmp_path, monkeypatch, sdist, tags):
    _offline(monkeypatch, sdist.parent)
    path = _wheel(sdist.parent, tags)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    archive = Archive("pypi", "some-data", "1.0.0", digest, tags)
    root = tmp_path / "cache"
    assert read_member(Member(archive, "some_data/rows.csv"), root) == b"1,2\n"
    assert [path.name for path in root.iterdir()] == [f"some-data-1.0.0-{tags}.whl"]


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """A stand-in for apt-get that writes a package with one file; returns its log of calls."""
    package = deb({"./usr/share/data/rows.csv": b"1,2\n"})
    (tmp_path / "package").write_bytes(package)
    log = tmp_path / "calls"
    script = tmp_path / "bin" / "apt-get"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\necho "$@" >> "{log}"\ncp "{tmp_path / "package"}" some-data_1.0~2-3_all.deb\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return log


def _debian(tmp_path):
    digest = hashlib.sha256((tmp_path / "package").read_bytes()).hexdigest()
    return Archive("debian", "some-data", "1.0~2-3", digest)


def test_a_package_of_debian(tmp_path, apt):
    root = tmp_path / "cache"
    for _ in range(2):
        content = read_member(Member(_debian(tmp_path), "./usr/share/data/rows.csv"), root)
        assert content == b"1,2\n"
    (call,) = apt.read_text().splitlines()
    assert call.startswith("download some-data=1.0~2-3 ")
    assert [path.name for path in root.iterdir()] == ["some-data-1.0~2-3.deb"]


def test_apt_without_lists(tmp_path, apt):
    (tmp_path / "bin" / "apt-get").write_text(
        '#!/bin/sh\necho "E: Unable to locate package some-data" >&2\nexit 100\n'
    )
    with pytest.raises(BenchmarkError) as caught:
        fetch(_debian(tmp_path), tmp_path / "cache")
    for part in ("apt-get said: E: Unable to locate package some-data", "`sudo apt-get update`"):
        assert part in str(caught.value)


def test_without_apt(tmp_path, apt, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchmarkError, match=r"needs apt-get on the PATH.*some-data-1.0~2-3.deb"):
        fetch(_debian(tmp_path), tmp_path / "cache")


def test_without_pip(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [])
    archive = Archive("pypi", "some-data", "1.0.0", "0" * 64)
    with pytest.raises(BenchmarkError, match="needs pip, found none"):
        fetch(archive, tmp_path / "cache")


def test_failing_npm(tmp_path, npm, archive):
    script = tmp_path / "bin" / "npm"
    script.write_text("#!/bin/sh\necho 'no such   version' >&2\nexit 1\n")
    with pytest.raises(BenchmarkError, match=r"exit code 1 .* npm said: no such version"):
        fetch(archive, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_hanging_npm(tmp_path, npm, archive, monkeypatch):
    (tmp_path / "bin" / "npm").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(clients, "_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(BenchmarkError, match="must end within"):
        fetch(archive, tmp_path / "cache")


def test_unwritable_cache(tmp_path, npm, archive):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match="--data-root"):
        fetch(archive, tmp_path / "file" / "cache")


def test_cache_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("GRADBAL_DATA", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(cache_dir()) == "/somewhere/.cache/gradbal"
    monkeypatch.setenv("GRADBAL_DATA", "/elsewhere")
    assert str(cache_dir()) == "/elsewhere"
    assert cache_dir(tmp_path) == tmp_path
