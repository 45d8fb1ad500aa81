"""Versions of what the numbers depend on."""

from importlib.metadata import version
from platform import python_version

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Of gradbal, torch and Python."""
    return {"gradbal": version("gradbal"), "torch": version("torch"), "python": python_version()}
