import pytest

from benchmarks.reporting.left import left_by_others
from benchmarks.reporting.svg import UnreadablePicture, embed

PICTURE = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
  width="90pt" height="60pt" onload="alert(1)">
 <metadata><a href="http://purl.org/x"/></metadata>
 <style>* { color: red }</style><script>alert(2)</script>
 <defs><path id="mark" d="M 0 0"/><clipPath id="clip"><rect/></clipPath></defs>
 <g id="unused"><use xlink:href="#mark" style="fill: #010203; clip-path: url(#clip)"/></g>
 <g clip-path="url(#clip)"><text style="font: 9px 'DejaVu', serif; fill: red">x &lt; y</text></g>
 <image href="http://example.com/x.png"/><rect style="fill: url(http://example.com/y)"/>
</svg>
"""


def test_pictures_are_made_fit_for_a_page():
    found = embed(PICTURE.encode(), "toy", "A & B")
    assert found.startswith("<svg ")
    for gone in ("<?xml", "DOCTYPE", "alert", "purl", "example.com", "<style", "unused", "serif"):
        assert gone not in found
    assert 'viewBox="0 0 90 60"' in found
    assert 'width="' not in found
    assert 'xlink:href="#toy-mark"' in found
    assert 'id="toy-mark"' in found
    assert found.count("url(#toy-clip)") == 2
    assert "fill: currentColor" in found
    assert "font-size: 9px; fill: red" in found
    assert '<title id="toy-title">A &amp; B</title>' in found
    assert "x &lt; y" in found


@pytest.mark.parametrize("text", ["", "no picture", "<html></html>", "<svg>"])
def test_what_is_no_picture(text):
    with pytest.raises(UnreadablePicture, match="not an SVG picture"):
        embed(text.encode(), "name", "title")


def test_what_others_left(tmp_path):
    assert left_by_others(tmp_path) == []
    (tmp_path / "trajectories.svg").write_text(PICTURE)
    (tmp_path / "toy.csv").write_text("method,end_x\nmgda,1.23456789\nfamo,\ncut")
    (tmp_path / "losses.svg").write_text(PICTURE)
    (tmp_path / "pareto.svg").write_text("half of a picture")
    toy, pareto = left_by_others(tmp_path)
    assert [picture.plain for picture in toy.pictures] == [True, True]
    assert 'id="toy-losses-mark"' in toy.pictures[1].svg
    assert [[cell.text for cell in row] for row in toy.tables[0].rows] == [
        ["mgda", "1.2346"],
        ["famo", ""],
        ["cut", ""],
    ]
    assert toy.tables[0].header == ("method", "end x")
    assert toy.tables[0].rows[0][1].value == 1.23456789
    assert pareto.facts[0].text.startswith("pareto.svg: not an SVG picture")
