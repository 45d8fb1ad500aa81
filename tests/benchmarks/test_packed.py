import io
import stat
import struct
import tarfile
import zipfile

import pytest

from benchmarks.data import packed
from benchmarks.errors import BenchmarkError
from tests.benchmarks.packing import ar, deb, tarball, zeros

FILES = {"a/rows": b"1,2\n", "b": b"odd", "../../up": b"out", "/etc/x": b"root"}


def _zip(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return stream.getvalue()


PACKERS = {
    "tar": (packed.read_tar, lambda files: tarball(files, "w")),
    "tar.gz": (packed.read_tar, tarball),
    "tar.xz": (packed.read_tar, lambda files: tarball(files, "w:xz")),
    "zip": (packed.read_zip, _zip),
    "deb": (packed.read_deb, deb),
    "deb of gzip": (packed.read_deb, lambda files: deb(files, "w:gz")),
    "deb of tar": (packed.read_deb, lambda files: deb(files, "w")),
}


@pytest.fixture(params=PACKERS)
def packer(request):
    """A function that reads an archive, and one that makes it."""
    return PACKERS[request.param]


def _read(packer, content, paths, limit=100):
    read, _ = packer
    return read(io.BytesIO(content), dict.fromkeys(paths, limit), "the archive")


def test_members_are_read_by_name_whatever_the_name(packer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _read(packer, packer[1](FILES), FILES) == FILES
    assert _read(packer, packer[1](FILES), ["b"]) == {"b": b"odd"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["rows", "a", "./b", "up", ""])
def test_names_are_exact(packer, path):
    with pytest.raises(
        BenchmarkError, match=f"the archive must hold the file '{path}', found none"
    ):
        _read(packer, packer[1](FILES), ["b", path])


def test_at_the_limit_and_above_it(packer):
    content = packer[1]({"a": bytes(100), "b": bytes(101)})
    assert _read(packer, content, ["a"]) == {"a": bytes(100)}
    with pytest.raises(BenchmarkError, match="'b' of the archive must have at most 100 bytes"):
        _read(packer, content, ["a", "b"])


def test_of_a_cut_archive_no_part_of_a_member_is_read(packer):
    whole = bytes(range(256)) * 8
    content = packer[1]({"a": whole})
    refused = 0
    for length in range(0, len(content) - 1, 97):
        try:
            # A tarball's padding after its last member may be missing.
            assert _read(packer, content[:length], ["a"], limit=10_000) == {"a": whole}
        except BenchmarkError:
            refused += 1
    assert refused >= 2


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_no_link_of_a_tarball_is_followed(kind):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        info = tarfile.TarInfo("a")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = kind, "a"
        tar.addfile(link)
    with pytest.raises(BenchmarkError, match="must hold the file 'link', found none"):
        _read((packed.read_tar, None), stream.getvalue(), ["link"])


def test_no_link_of_a_zip_is_followed():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        link = zipfile.ZipInfo("link")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/hostname")
    with pytest.raises(BenchmarkError, match="must hold the file 'link', found none"):
        _read((packed.read_zip, None), stream.getvalue(), ["link"])


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_two_members_of_one_name(mode):
    content = tarball([("a", b"first"), ("a", b"second")], mode)
    with pytest.raises(BenchmarkError, match="must hold one file 'a', found two"):
        _read((packed.read_tar, None), content, ["a"])


@pytest.mark.filterwarnings("ignore:Duplicate name")  # as a bad archive has
def test_two_members_of_one_name_in_a_zip():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a", "first")
        file.writestr("a", "second")
    with pytest.raises(BenchmarkError, match="must hold one file 'a', found two"):
        _read((packed.read_zip, None), stream.getvalue(), ["a"])


def test_a_zip_that_says_less_than_it_unpacks_to():
    content = _zip({"a": bytes(100_000)})
    size = struct.pack("<I", 100_000)
    assert content.count(size) == 2  # beside the member, and in the directory
    with pytest.raises(BenchmarkError, match="the archive must be a whole archive"):
        _read((packed.read_zip, None), content.replace(size, struct.pack("<I", 50)), ["a"])


def test_a_tarball_that_says_more_than_it_holds():
    info = tarfile.TarInfo("a")
    info.size = 1 << 50
    content = info.tobuf() + bytes(1024)
    with pytest.raises(BenchmarkError, match="at most 100 bytes, found 1,125,899,906,842,624"):
        _read((packed.read_tar, None), content, ["a"])
    with pytest.raises(BenchmarkError, match="the archive must be a whole archive"):
        _read((packed.read_tar, None), content, ["b"])


@pytest.mark.parametrize("name", ["tar.gz", "tar.xz", "deb"])
def test_what_is_passed_over_is_limited_too(name, monkeypatch):
    monkeypatch.setattr(packed, "_WHOLE", 1_000_000)
    content = PACKERS[name][1]({"bomb": bytes(2_000_000), "a": b"abc"})
    assert len(content) < 10_000
    with pytest.raises(BenchmarkError, match="the archive must unpack to at most 1,000,000 bytes"):
        _read(PACKERS[name], content, ["a"])


def test_gunzip():
    assert packed.gunzip(zeros(1000), 1000, "rows") == bytes(1000)
    with pytest.raises(BenchmarkError, match="'rows' of rows must have at most 999 bytes, found m"):
        packed.gunzip(zeros(1000), 999, "rows")
    for damaged in (zeros(1000)[:-1], b"text", b""):
        with pytest.raises(BenchmarkError, match="rows must be a whole archive"):
            packed.gunzip(damaged or zeros(9)[:5], 1000, "rows")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 and so on", "must be a Debian package, found something else"),
        (ar([("debian-binary", b"2.0\n")]), "must hold a data.tar, found none"),
        (ar([("data.tar.zst", b"...")]), "packed by gzip or xz, found data.tar.zst"),
        (ar([("data.tar.xz", b"")]).replace(b"`", b"'"), "found a damaged header"),
    ],
)
def test_what_is_no_package_of_debian(content, message):
    with pytest.raises(BenchmarkError, match=message):
        packed.read_deb(io.BytesIO(content), {"a": 100}, "the archive")
