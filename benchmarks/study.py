"""What `run` is asked for, on the command line or in a file that a paper can cite."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import gradbal
from benchmarks.benchmark import HPS, SINGLE_TASK, UNITARY, Benchmark, Settings
from benchmarks.catalog import find
from benchmarks.errors import BadInput, MissingExtra
from benchmarks.known import check_known
from benchmarks.plan import Plan
from benchmarks.tuning import Tuning

__all__ = ["Study", "read_study"]

_WITH_ARCHITECTURES = ("mean", "upgrad")
"""The methods that architectures are compared with: a plain one, and one of the Gramian."""


@dataclass(frozen=True)
class Study:
    """One or several tables.

    Attributes:
        benchmarks: names, as `benchmarks.catalog.find` takes them.
        methods: names of gradbal's registry, "unitary" or "single_task"; empty for each
            benchmark's own selection.
        architectures: as `--architectures` takes them; empty for the benchmarks' own networks.
        seeds, epochs: None for the preset's.
        preset: "default", "quick" or "full".
        tuning: what is tried for each method; None for the presets' settings as they are.
        settings: by benchmark, what is set differently from the preset.
    """

    benchmarks: tuple[str, ...]
    methods: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    seeds: int | None = None
    epochs: int | None = None
    preset: str = "default"
    tuning: Tuning | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def plans(self) -> list[Plan]:
        """The tables, once everything that is asked for has been checked.

        Raises:
            BadInput: something that is asked for does not exist or cannot be done.
        """
        for option, value in (("--seeds", self.seeds), ("--epochs", self.epochs)):
            if value is not None and value < 1:
                raise BadInput(f"`{option}` must be at least 1, found {value}")
        if not self.benchmarks:
            raise BadInput("`NAME` must name one benchmark or several, found none; see `list`")
        stray = set(self.settings) - set(self.benchmarks)
        if stray:
            raise BadInput(
                f"`settings` must be of the benchmarks {', '.join(self.benchmarks)}, found "
                + ", ".join(sorted(stray))
            )
        return [self._plan(name) for name in dict.fromkeys(self.benchmarks)]

    def _plan(self, name: str) -> Plan:
        benchmark = find(name)
        named = _architectures(benchmark, self.architectures)
        methods = self.methods or (_WITH_ARCHITECTURES if named else benchmark.methods)
        for method in methods:
            _check_method(method, named)
        presets = {**benchmark.presets, **(benchmark.architecture_presets if named else {})}
        check_known("preset", self.preset, list(presets))
        preset = presets[self.preset]
        changes = dict(self.settings.get(name, {}))
        if self.epochs is not None:
            changes["epochs"] = self.epochs
        preset = replace(preset, settings=_changed(preset.settings, changes, name))
        seeds = preset.seeds if self.seeds is None else self.seeds
        return Plan(benchmark, preset, tuple(methods), seeds, named, self.tuning, name)


def read_study(path: Path) -> tuple[Study, dict[str, Any]]:
    """A study from a TOML file, and the entries "workers" and "out" if it has them.

    The entries are those of `Study`, with "tuning" as true for the usual trials, or a table of
    them; see README.

    Raises:
        BadInput: the file cannot be read, or has an entry that is not known or of another kind.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise MissingExtra("tomli", "--config") from error
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"`--config` must be a TOML file, found {path}: {error}") from error
    kinds: dict[str, Any] = {
        "benchmarks": list,
        "methods": list,
        "architectures": list,
        "seeds": int,
        "epochs": int,
        "preset": str,
        "tuning": (bool, dict),
        "settings": dict,
        "workers": int,
        "out": str,
    }
    for name, value in found.items():
        check_known(str(path), name, list(kinds))
        if not isinstance(value, kinds[name]) or (kinds[name] is int and isinstance(value, bool)):
            raise BadInput(f"`{name}` in {path} must be {_kind(kinds[name])}, found {value!r}")
        if kinds[name] is list:
            if not all(isinstance(item, str) for item in value):
                raise BadInput(f"`{name}` in {path} must be names, found {value!r}")
            found[name] = tuple(value)
    rest = {name: found.pop(name) for name in ("workers", "out") if name in found}
    found.setdefault("benchmarks", ())
    if "tuning" in found:
        found["tuning"] = _tuning(found["tuning"], path)
    return Study(**found), rest


def _check_method(method: str, named: Sequence[str]) -> None:
    check_known("--methods", method, [*gradbal.list_aggregators(), SINGLE_TASK, UNITARY])
    of_registry = method not in (SINGLE_TASK, UNITARY)
    if set(named) - {HPS} and of_registry and gradbal.create(method).needs_features:
        raise BadInput(
            f"`--methods` must not name {method} beside architectures other than {HPS}, found "
            f"{' '.join(named)}; it looks at a representation that all tasks share"
        )


def _architectures(benchmark: Benchmark, names: Sequence[str]) -> tuple[str, ...]:
    """The architectures that are asked for; "all" stands for every one."""
    if not names:
        return ()
    if not benchmark.architectures:
        raise BadInput(
            f"`--architectures` must not be given for {benchmark.name}, which has none, found "
            + " ".join(names)
        )
    for name in names:
        check_known("--architectures", name, [*benchmark.architectures, "all"])
    return tuple(benchmark.architectures if "all" in names else names)


def _changed(settings: Settings, changes: Mapping[str, Any], name: str) -> Settings:
    kinds = {each.name: each.type for each in fields(Settings)}
    for key, value in changes.items():
        check_known(f"settings.{name}", key, list(kinds))
        wanted: Any = {"int": int, "float": (int, float), "str": str}[str(kinds[key])]
        bad = isinstance(value, bool) or not isinstance(value, wanted)
        if bad or (kinds[key] == "int" and value < 1) or (key == "lr" and value <= 0):
            raise BadInput(f"`{key}` of {name} must be {_kind(wanted)} above 0, found {value!r}")
    return replace(settings, **changes)


def _tuning(found: bool | dict[str, Any], path: Path) -> Tuning | None:
    if isinstance(found, bool):
        return Tuning() if found else None
    for name, values in found.items():
        check_known(f"{path}: tuning", name, [each.name for each in fields(Tuning)])
        if not isinstance(values, list) or not all(type(x) in (int, float) for x in values):
            raise BadInput(f"`{name}` in {path} must be a list of numbers, found {values!r}")
    try:
        return Tuning(**{name: tuple(map(float, values)) for name, values in found.items()})
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error


def _kind(kind: Any) -> str:
    words = {list: "a list", int: "a whole number", str: "a text", dict: "a table"}
    return words.get(kind, "true, false or a table" if kind == (bool, dict) else "a number")
