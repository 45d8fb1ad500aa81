"""The three formats of a report, and what is in them."""

import json
import re
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from benchmarks import cli
from benchmarks.catalog import BENCHMARKS
from benchmarks.errors import BadInput
from benchmarks.reporting import latex, markdown
from benchmarks.reporting.build import build, read
from benchmarks.reporting.html import html
from benchmarks.reporting.write import write_report
from tests.benchmarks.reporting.records import (
    SEVEN,
    failed,
    make_benchmark,
    many,
    record,
)

FOUR = {name: SEVEN[name] for name in ("census", "molecules")}
METHODS = ("single_task", "unitary", "mean", "mgda", "pcgrad")
NASTY = "ValueError: <script>alert(1)</script> & 50 % of a_b | c$d #1 {x} ~ ^ \\"


class Page(HTMLParser):
    """What the tests ask of a page; void elements aside, every one has to be closed."""

    void = frozenset({"meta", "link", "br", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids = [], Counter(), []
        self.references, self.links, self.text = [], [], []
        self.pictures, self.titles = 0, 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] += 1
        if tag not in self.void:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name in ("src", "href", "xlink:href", "data", "poster", "srcset", "action"):
            if name in attributes:
                found = self.links if tag == "a" else self.references
                found.append(attributes[name])
        self.references += re.findall(r"url\(([^)]*)\)", " ".join(map(str, attributes.values())))
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-labelledby"]
            self.pictures += 1
            self.references.append("#" + attributes["aria-labelledby"])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def document():
    """Two benchmarks with five methods, a failure and a method that is not finished."""
    records = many(FOUR, METHODS)
    records.append(failed(FOUR["census"], "a<b>_&", 0, NASTY))
    records.append(record(FOUR["census"], "upgrad", 0, 0.9, lr=5e-4))
    return build(records, FOUR)


@pytest.fixture(scope="module")
def page(document):
    return html(document)


def test_the_page_needs_nothing_else(page):
    found = Page(page)
    assert found.references
    assert all(target.startswith(("#", "data:,")) for target in found.references)
    # Links to papers are followed by readers alone.
    assert all(link.startswith(("#", "https://")) for link in found.links)
    assert not re.search(r"@import|<iframe|<img|<object|<embed|fetch\(|XMLHttpRequest", page)
    assert found.tags["script"] == 1


def test_ids_are_unique_and_targets_exist(page):
    found = Page(page)
    assert [name for name, count in Counter(found.ids).items() if count > 1] == []
    targets = [t[1:] for t in (*found.references, *found.links) if t.startswith("#")]
    assert set(targets) <= set(found.ids)


def test_every_picture_says_what_it_is(page):
    found = Page(page)
    names = re.findall(r'<svg [^>]*aria-labelledby="([^"]+)"', page)
    assert len(names) == found.pictures == len(set(names)) > 10
    for name in names:
        assert re.search(rf'<title id="{name}">[^<]{{5,}}</title>', page)


def test_all_that_was_asked_for_is_there(page):
    text = " ".join(Page(page).text)
    for words in (
        "Critical-difference diagram",
        "Δm with intervals",
        "One task against the other",
        "Mean against worst task",
        "Change per task",
        "Δm against the time of a step",
        "Validation curves",
        "Training curves",
        "Weights over time",
        "Conflicts over time",
        "What papers claim, and what holds here",
        "No method beats tuned unitary scalarisation",
        "Friedman's test",
        "runs, 1 of them failed",
        "gradbal 0.1.0, torch 2.14.1",
        "rough with 3 seeds",
        "* not finished: upgrad (1 of 3 trials, 1 of 3 seeds), a<b>_& (1 of 3 trials, 1 of 3",
    ):
        assert words in text


def test_names_and_errors_are_escaped(page):
    assert NASTY in " ".join(Page(page).text)
    assert "<script>alert" not in page
    assert "a&lt;b&gt;_&amp;" in page
    assert "a<b>" not in page


def test_the_same_numbers_in_every_format(document, page):
    tables = [table for part in (document.overall, *document.parts) for table in part.tables]
    assert len(tables) == 7
    in_markdown, in_latex = markdown.markdown(document), latex.latex(document)
    for table in tables:
        for row in table.rows:
            for cell in row:
                assert markdown.escape(cell.text) in in_markdown
                assert latex.escape(cell.text) in in_latex
    text = " ".join(Page(page).text)
    assert all(cell.text in text for t in tables for row in t.rows for cell in row)


def test_markdown_tables_are_tables(document):
    text = markdown.markdown(document)
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(blocks) == 8
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert r"\<script\>alert(1)\</script\> \& 50 % of a\_b \| c$d" in text
    assert re.search(r"\*\*-?\d", text)


def test_latex_escapes_everything_that_is_special():
    assert latex.escape(r"a_b & 5 % #1 {x} $y ~ ^ \ <z>") == (
        r"a\_b \& 5 \% \#1 \{x\} \$y \textasciitilde{} \textasciicircum{} \textbackslash{} "
        r"\textless{}z\textgreater{}"
    )
    assert latex.escape("kg/m³") == r"kg/m$^3$"
    assert latex.escape("-1.5 ± 0.2") == r"$-$1.5 $\pm$ 0.2"
    assert latex.escape("[-1, -0.5], 1e-05, a-b") == "[$-$1, $-$0.5], 1e-05, a-b"


def test_latex_is_balanced_and_without_letters_it_does_not_know(document):
    text = latex.latex(document)
    begun = re.findall(r"\\begin\{([^}]*)\}", text)
    assert begun == [name for pair in zip(begun[::2], begun[1::2], strict=True) for name in pair]
    assert Counter(begun) == Counter(re.findall(r"\\end\{([^}]*)\}", text))
    assert begun.count("tabular") == text.count(r"\toprule") == text.count(r"\bottomrule") == 7
    assert text.isascii()
    for body in re.findall(r"\\toprule\n(.*?)\\bottomrule", text, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    labels = re.findall(r"\\label\{([^}]*)\}", text)
    assert len(labels) == len(set(labels))


def test_one_method_with_one_seed():
    two = make_benchmark("two", ("a", "b"))
    found = build([record(two, "mean", 0, 0.5)], {"two": two})
    Page(html(found))
    (part,) = found.parts
    assert part.facts[-1].name == "No baseline"
    assert "mean" in markdown.markdown(found)
    assert latex.latex(found).isascii()


def test_nothing_but_failures():
    two = make_benchmark("two", ("a", "b"))
    found = build([failed(two, m, 0, NASTY) for m in ("single_task", "mean")], {"two": two})
    text = " ".join(Page(html(found)).text)
    assert text.count(NASTY) == 2
    assert "2 of them failed" in text


def test_one_task():
    one = make_benchmark("one", ("a",))
    found = build([record(one, m, 0, 0.5) for m in ("single_task", "mean")], {"one": one})
    assert [p.title for p in found.parts[0].pictures] == ["Δm with intervals"]


def test_a_name_that_looks_like_a_formula():
    two = make_benchmark("two", ("a", "b"))
    names = ("single_task", "$x_1$", "mean")
    found = build([record(two, m, 0, 0.5, step_time=1.0) for m in names], {"two": two})
    assert "$x_1$</text>" in html(found)


def _write(folder, records):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(asdict(each)) for each in records]
    (folder / "results.jsonl").write_text("\n".join(lines) + '\n{"cut": ')


def test_files_and_what_was_left_aside(tmp_path):
    two = make_benchmark("two", ("a", "b"))
    _write(tmp_path, [record(m, "mean", 0, 0.5) for m in (two, make_benchmark("gone", ("a",)))])
    out = tmp_path / "new" / "out"
    written = write_report(tmp_path, out, ("html", "markdown", "latex"), {"two": two})
    assert [path.name for path in written] == ["report.html", "report.md", "tables.tex"]
    assert sorted(out.iterdir()) == sorted(written)
    text = (out / "report.md").read_text()
    assert "benchmarks that this version does not know: gone (1 runs)" in text
    assert "1 unreadable lines" in text


@pytest.mark.parametrize("folder", ["", "missing"])
def test_an_empty_folder_is_bad_input(folder, tmp_path):
    with pytest.raises(BadInput, match=r"`DIR` must have a results\.jsonl with runs"):
        read(tmp_path / folder, {})
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, monkeypatch):
    two = make_benchmark("two", ("a", "b"))
    monkeypatch.setitem(BENCHMARKS, "two", two)
    _write(tmp_path, [record(two, m, 0, 0.5) for m in ("single_task", "mean")])
    result = _invoke(tmp_path, "--format", "markdown")
    assert (result.exit_code, result.output) == (0, f"Written: {tmp_path / 'report.md'}\n")
    assert not (tmp_path / "report.html").exists()
    assert _invoke(tmp_path, "--out", tmp_path / "out").exit_code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("report.html", "report.md", "tables.tex")
    }
    result = _invoke(tmp_path, "--out", tmp_path / "results.jsonl")
    assert result.exit_code == 2
    assert result.output.startswith("Error: `--out` must be a folder that can be written to")
    result = _invoke(tmp_path / "out")
    assert result.exit_code == 2
    assert result.output.startswith("Error: `DIR` must have a results.jsonl")


def test_a_benchmark_of_ones_own(tmp_path):
    _write(tmp_path, [record(SEVEN["census"], "mean", 0, 0.5)])
    name = "tests.benchmarks.reporting.own:OWN"
    result = _invoke(tmp_path, "--format", "markdown", "--benchmark", name)
    assert result.exit_code == 0, result.output
    assert "census made up for tests" in (tmp_path / "report.md").read_text()


def _invoke(folder, *args):
    words = [str(word) for word in ("report", folder, *args)]
    return CliRunner().invoke(cli.app, words, prog_name="benchmarks")
