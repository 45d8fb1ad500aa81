"""SVG pictures that can stand in one HTML page: made here, or left in the folder by others."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["INK", "UnreadablePicture", "draw", "embed", "read", "style"]

INK = "#010203"
"""The colour that is drawn with where the page's own text colour is meant, light or dark."""

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_HREFS = ("href", f"{{{_XLINK}}}href")
_STYLE: dict[Any, Any] = {
    # A dollar in a name is no formula.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "gradbal",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
}


class UnreadablePicture(ValueError):
    """A file is no SVG picture."""


def style() -> AbstractContextManager[None]:
    """The settings that pictures of a report are drawn with, as a context."""
    return matplotlib.rc_context(_STYLE)


def draw(figure: Figure, name: str, title: str) -> str:
    """The figure as SVG for the page; call it within `style()`.

    Args:
        figure: what is drawn.
        name: a word that no other picture of the page has.
        title: what the picture shows, for those who cannot see it.
    """
    stream = io.BytesIO()
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=none)
    return embed(stream.getvalue(), name, title)


def read(path: Path, name: str, title: str) -> str:
    """An SVG file for the page.

    Raises:
        UnreadablePicture: it is none.
    """
    return embed(path.read_bytes(), name, title)


def embed(picture: bytes, name: str, title: str) -> str:
    """Make a picture fit to stand in a page beside others.

    Its ids get `name` in front; scripts, styles, comments and references to other files go; the
    fonts' list becomes the page's, and `INK` its text colour.
    """
    try:
        root = ET.fromstring(picture)
    except ET.ParseError as error:
        raise UnreadablePicture(f"not an SVG picture: {error}") from error
    if root.tag != f"{{{_SVG}}}svg":
        raise UnreadablePicture(f"not an SVG picture, its first element is {root.tag}")
    _clean(root)
    used = _used(root)
    for element in root.iter():
        _rename(element, name, used)
    if "viewBox" not in root.attrib and {"width", "height"} <= root.attrib.keys():
        sizes = (_number(root.attrib[side]) for side in ("width", "height"))
        root.set("viewBox", "0 0 {} {}".format(*sizes))
    for side in ("width", "height", "version"):
        root.attrib.pop(side, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    label = ET.Element(f"{{{_SVG}}}title", {"id": f"{name}-title"})
    label.text = title
    label.tail = "\n"
    root.insert(0, label)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.tostring(root, encoding="unicode").replace(INK, "currentColor")


def _clean(element: ET.Element) -> None:
    """Take out what a picture in a page must not have, recursively."""
    for child in list(element):
        kind = child.tag.rpartition("}")[2] if isinstance(child.tag, str) else ""
        if kind in ("", "metadata", "script", "style", "title", "foreignObject"):
            element.remove(child)
        else:
            _clean(child)
    for key in list(element.attrib):
        value = element.attrib[key].strip()
        outside = key in _HREFS and not value.startswith(("#", "data:image/"))
        if outside or key.lower().startswith("on") or "url(" in value.replace("url(#", ""):
            del element.attrib[key]


def _used(root: ET.Element) -> set[str]:
    """The ids that something in the picture refers to."""
    found = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            found.update(re.findall(r"url\(#([^)]+)\)", value))
            if key in _HREFS and value.startswith("#"):
                found.add(value[1:])
    return found


def _rename(element: ET.Element, name: str, used: set[str]) -> None:
    for key, value in list(element.attrib.items()):
        if key == "id":
            if value in used:
                element.set(key, f"{name}-{value}")
            else:
                del element.attrib[key]
        elif key in _HREFS and value.startswith("#"):
            element.set(key, f"#{name}-{value[1:]}")
        elif key == "style":
            fonts = re.sub(r"font-family:[^;]*;?\s*", "", value)
            # The short form names the fonts after the size.
            fonts = re.sub(r"font:([^;]*?)([\d.]+px)[^;]*", r"font-size: \2", fonts)
            element.set(key, fonts.replace("url(#", f"url(#{name}-"))
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{name}-"))


def _number(length: str) -> str:
    return re.sub(r"[^\d.]", "", length)
