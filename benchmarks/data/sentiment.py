"""Sentiment: 23,700 short texts of four kinds, each rated by twenty people.

The texts of *VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text*
(Hutto & Gilbert, ICWSM 2014, https://doi.org/10.1609/icwsm.v8i1.14550): tweets, sentences of Amazon
product reviews, of movie reviews, and of New York Times editorials, with mean ratings from -4 to 4.
They lie in the source distribution of vaderSentiment on PyPI (MIT), which is read as an archive.
"""

from __future__ import annotations

import html
import io
import math
import re
import unicodedata
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.fetch import Archive, Member, cache_dir, read_member
from benchmarks.data.packed import read_tar
from benchmarks.data.parsed import Arrays, parsed
from benchmarks.errors import BenchmarkError

__all__ = ["ARCHIVE", "BINS", "DOMAINS", "LENGTH", "Texts", "bag", "load_texts"]

ARCHIVE = Archive(
    registry="pypi",
    name="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_INNER = "hutto_ICWSM_2014/{}_GroundTruth.txt"
_LIMIT = 64 << 20

DOMAINS = {
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
"""The kinds of text, and what their files are called."""

BINS = 8192
LENGTH = 96
_CACHE_FORM = 1  # of the parsed file

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)*|[!?]+|[:;=][-o]?[()dp/\\|]|<3|[^\sa-z0-9.,\"'()\-]")


@dataclass(frozen=True)
class Texts:
    """Texts of all kinds, one kind after the other.

    Attributes:
        bins: `[N, 96]` int16, the hashes of a text's words and pairs of words below `BINS`, one
            entry an occurrence; the rest is `BINS`.
        rating: `[N]` float64, -4 … 4.
        domain: `[N]` int64, the place in `DOMAINS`.
        source: `[N]` int64, equal for sentences of one review or editorial, and for equal texts.
    """

    bins: NDArray[np.int16]
    rating: NDArray[np.float64]
    domain: NDArray[np.int64]
    source: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rating)


def load_texts(data_root: Path | None = None) -> Texts:
    """All texts, but for the few that another kind has too; parsed once.

    Raises:
        BenchmarkError: the archive cannot be fetched, or holds something else.
    """
    root = cache_dir(data_root)
    path = root / f"sentiment-{ARCHIVE.sha256[:12]}-{_CACHE_FORM}.npz"
    arrays = parsed(path, lambda: _arrays(root))
    return Texts(*(arrays[name] for name in ("bins", "rating", "domain", "source")))


def bag(text: str) -> list[int]:
    """The bins of a text's words, then of its pairs of neighbouring words, at most `LENGTH`."""
    plain = html.unescape(html.unescape(unicodedata.normalize("NFKC", text)))
    words = _WORD.findall(plain.replace("’", "'").replace("''", '"').lower())
    pairs = [f"{first} {second}" for first, second in pairwise(words)]
    return [zlib.crc32(term.encode()) % BINS for term in (*words, *pairs)][:LENGTH]


def _words(text: str) -> str:
    """Equal for texts that differ in case and punctuation alone, if they have words."""
    return " ".join(re.findall(r"\w+", text.lower())) or text


def _arrays(root: Path) -> Arrays:
    """What the archive holds, as it is kept."""
    inner = read_member(Member(ARCHIVE, _MEMBER, _LIMIT), root)
    paths = {domain: _INNER.format(name) for domain, name in DOMAINS.items()}
    files = read_tar(io.BytesIO(inner), dict.fromkeys(paths.values(), _LIMIT), _MEMBER)
    domain_of: dict[str, int] = {}
    rows = [
        (number, *row)
        for number, path in enumerate(paths.values())
        for row in _rows(path, files[path])
        if domain_of.setdefault(_words(row[2]), number) == number
    ]
    bins = np.full((len(rows), LENGTH), BINS, dtype=np.int16)
    for row, (*_, text) in zip(bins, rows, strict=True):
        found = bag(text)
        row[: len(found)] = found
    return {
        "bins": bins,
        "rating": np.array([rating for _, _, rating, _ in rows]),
        "domain": np.array([domain for domain, *_ in rows], dtype=np.int64),
        "source": _sources([(domain, source, text) for domain, source, _, text in rows]),
    }


def _rows(path: str, content: bytes) -> list[tuple[str, float, str]]:
    """The review, the rating and the text of each line."""
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} must be text in UTF-8, found: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        parts = line.rstrip("\r").split("\t")
        try:
            name, rating, text = parts[0], float(parts[1]), parts[2]
        except (IndexError, ValueError):
            rating = math.nan
        if not -4 <= rating <= 4 or len(parts) != 3:
            raise BenchmarkError(
                f"line {number} of {path} must hold a name, a rating in -4 … 4 and a text, found "
                f"{line[:80]!r}"
            )
        found.append((name.split("_")[0], rating, text))
    return found


def _sources(rows: list[tuple[int, str, str]]) -> NDArray[np.int64]:
    """Numbers `[N]`, equal for rows of one review, and for reviews with a text in common."""
    parent = list(range(len(rows)))

    def root_of(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[object, int] = {}
    for row, (domain, review, text) in enumerate(rows):
        for key in ((domain, review), _words(text)):
            parent[root_of(row)] = root_of(first.setdefault(key, row))
    return np.array([root_of(row) for row in range(len(rows))], dtype=np.int64)
