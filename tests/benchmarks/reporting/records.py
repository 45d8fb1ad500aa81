"""Benchmarks and records that look like real ones, with known differences between the methods."""

from __future__ import annotations

import random
from dataclasses import asdict

from torch import nn

from benchmarks.benchmark import Benchmark, Measure, Preset, Settings, Task
from benchmarks.results import Record

SETTINGS = Settings("generated", 4000, 500, 1000, epochs=8, batch_size=64, lr=1e-3)
RATES = (5e-4, 1e-3, 2e-3)
METHODS = (
    *("single_task", "unitary", "mean", "rlw", "uw", "dwa", "pcgrad", "mgda", "cagrad"),
    *("nash_mtl", "imtl_g", "famo", "upgrad", "fairgrad", "aligned_mtl"),
)
# Relative loss of quality against single-task training, in percent; and time of a step.
_WORSE = dict(
    zip(METHODS, (0, -1, 0.5, 1, 0.2, 0.4, 0, 4, -0.2, -0.6, -0.3, 0, -0.5, -0.4, 0.1), strict=True)
)
_STEPS = dict(
    zip(
        METHODS,
        (None, 1.0, 1.01, 1.02, 1.02, 1.01, 1.9, 2.1, 2.2, 2.3, 2.1, 1.1, 2.0, 2.2, 2.1),
        strict=True,
    )
)


def make_benchmark(name, tasks, measure="accuracy", higher=True, percent=True):
    """A benchmark of nothing but names."""
    measures = (Measure(measure, higher, percent, nn.Identity, 2 if percent else 3),)
    preset = Preset(SETTINGS, seeds=3, timing_rounds=1)
    return Benchmark(
        name=name,
        summary=f"{name} made up for tests",
        architecture="hps",
        revision=1,
        tasks=tuple(Task(task, nn.Identity, measures) for task in tasks),
        methods=METHODS[2:],
        presets=dict.fromkeys(("default", "quick", "full"), preset),
        load=lambda settings, root: None,
        build=lambda tasks: None,
    )


SEVEN = {
    benchmark.name: benchmark
    for benchmark in (
        make_benchmark("multimnist", ("top_left", "bottom_right")),
        make_benchmark("multifashion", ("top_left", "bottom_right")),
        make_benchmark("fashion_mnist", ("fashion", "digit")),
        make_benchmark("census", ("income", "never_married"), "auc", percent=False),
        make_benchmark(
            "molecules",
            ("melting_point", "boiling_point", "density", "refractive_index"),
            "mae",
            higher=False,
            percent=False,
        ),
        make_benchmark("sentiment", ("tweets", "amazon", "movies", "news"), "mae", False, False),
        make_benchmark("yeast", tuple(f"class_{n}" for n in range(1, 15)), "auc", percent=False),
    )
}


def record(benchmark, method, seed, test=None, validation=None, lr=1e-3, decay=0.0, **other):
    """One record; `test` and `validation` are values for all measures, or one a task."""
    settings = {**asdict(SETTINGS), "lr": lr, "weight_decay": decay}
    fields = {
        "benchmark": benchmark.name,
        "method": method,
        "architecture": benchmark.architecture,
        "seed": seed,
        "fingerprint": "now",
        "error": None,
        "test": metrics(benchmark, test),
        "validation": metrics(benchmark, test if validation is None else validation),
        "aggregator": method,
        "step_time": None,
        "train_seconds": 2.0,
        "settings": settings,
        "versions": {"gradbal": "0.1.0", "torch": "2.14.1", "python": "3.11.7"},
    }
    return Record(**{**fields, **other})


def metrics(benchmark, values):
    """By task and measure."""
    if values is None:
        return {}
    if isinstance(values, (int, float)):
        values = [values] * len(benchmark.tasks)
    return {
        task.name: {measure.name: value for measure in task.measures}
        for task, value in zip(benchmark.tasks, values, strict=True)
    }


def failed(benchmark, method, seed, error, **other):
    """One record of a run that raised."""
    return record(benchmark, method, seed, error=error, **other)


def many(benchmarks=SEVEN, methods=METHODS, seeds=3):
    """Records of all methods: three learning rates with seed 0, the middle one with the others."""
    return [
        made
        for benchmark in benchmarks.values()
        for method in methods
        for made in _of_method(benchmark, method, seeds)
    ]


def _of_method(benchmark, method, seeds):
    stream = random.Random(f"{benchmark.name} {method}")
    offset = stream.gauss(0, 0.4)
    trials = [(rate, 0.0, 0) for rate in RATES] + [(1e-3, 0.0, seed) for seed in range(1, seeds)]
    if method == "unitary":
        trials.append((1e-3, 1e-4, 0))
    for lr, decay, seed in trials:
        loss = _WORSE[method] + offset + 0.8 * (lr != 1e-3) + 0.3 * (decay > 0)
        levels = [loss + stream.gauss(0, 0.3) for _ in benchmark.tasks]
        if method == "mgda":
            levels = [level * (0.2 if place else 2) for place, level in enumerate(levels)]
        single = method == "single_task"
        yield record(
            benchmark,
            method,
            seed,
            _values(benchmark, levels),
            _values(benchmark, [level + stream.gauss(0, 0.1) for level in levels]),
            lr=lr,
            decay=decay,
            step_time=_STEPS[method],
            step_seconds=None if single else 0.004 * _STEPS[method],
            train_seconds=round(9 * (_STEPS[method] or 2) + stream.random(), 3),
            parameters=21_000 * (2 if single else 1),
            peak_bytes=None if single else int(3e6 * _STEPS[method]),
            curve=[] if single else _curve(benchmark, method, levels, stream),
        )


def _values(benchmark, levels):
    """Metrics that are `levels` percent worse than those of single-task training."""
    measure = benchmark.tasks[0].measures[0]
    base, sign = (0.9, -1) if measure.higher_is_better else (0.4, 1)
    return [base * (1 + sign * level / 100) for level in levels]


def _curve(benchmark, method, levels, stream):
    count = len(levels)
    first = [stream.uniform(0.5, 1.5) for _ in levels]
    points = []
    for epoch in range(1, SETTINGS.epochs + 1):
        left = 30 * 0.5**epoch
        values = _values(benchmark, [level + left + stream.gauss(0, 0.2) for level in levels])
        weights = [stream.uniform(0.5, 1.5) ** (2 if method == "mgda" else 1) for _ in levels]
        points.append(
            {
                "epoch": epoch,
                "seconds": round(1.1 * epoch * (_STEPS[method] or 1), 4),
                "losses": [0.3 * value + value * 0.6**epoch for value in first],
                "validation": metrics(benchmark, values),
                "weights": None
                if method == "pcgrad"
                else [weight / sum(weights) for weight in weights],
                "conflicts": stream.randint(0, count) / count,
                "cosine": stream.gauss(0.1, 0.1),
            }
        )
    return points
