"""Packages that only some backbones need: looked for where they are used."""

import importlib
from typing import Any

__all__ = ["needed"]


def needed(module: str, extra: str, by: str) -> Any:
    """The module of an optional package.

    Raises:
        ModuleNotFoundError: it is not installed; the message has the line to type.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f'{by} needs {package}, found none; type: pip install "gradbal[{extra}]"',
            name=error.name,
        ) from error
