"""What papers claim of the methods, and whether it holds on the benchmarks of this report.

Two methods are compared over the benchmarks by Wilcoxon's signed-rank test of their Δm at 5 %, one
with all others by Nemenyi's critical difference, both as in Demšar, *Statistical Comparisons of
Classifiers over Multiple Data Sets*, JMLR 7, 2006. Where a test cannot decide, neither does the
report: "undecided" is then the verdict, with the numbers beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from benchmarks.benchmark import SINGLE_TASK, UNITARY
from benchmarks.reporting.published import (
    DELTA_M,
    SOURCES,
    STEP_TIMES,
    STEP_TIMES_SOURCE,
    Source,
    order_of,
    quote,
)
from benchmarks.reporting.stats import signed_rank_p
from benchmarks.reporting.summary import PLAIN, Line, Overall, Summary

__all__ = ["Finding", "Verdict", "findings"]

Verdict = Literal["holds", "does not hold", "undecided"]

_LEVEL = 0.05

_FEWEST = 3
"""Benchmarks that a claim about all of them needs."""

_CHEAP = 1.25
"""A step of at most this many times the plain one's still counts as "as cheap"."""


@dataclass(frozen=True)
class Finding:
    """A published claim, and what the numbers here say of it.

    Attributes:
        claim: in one sentence.
        sources: who claims it.
        published: their numbers, on their data; "" where there are none to quote.
        verdict: on the data here.
        evidence: our numbers.
    """

    claim: str
    sources: tuple[Source, ...]
    published: str
    verdict: Verdict
    evidence: str


# Better, worse (None for plain averaging), the claim and who makes it.
_PAIRS: tuple[tuple[str, str | None, str, tuple[str, ...]], ...] = (
    ("pcgrad", None, "PCGrad beats linear scalarisation", ("pcgrad", "nash_mtl")),
    ("cagrad", None, "CAGrad beats linear scalarisation", ("cagrad", "nash_mtl")),
    ("imtl_g", None, "IMTL-G beats linear scalarisation", ("imtl_g", "nash_mtl")),
    ("nash_mtl", None, "Nash-MTL beats linear scalarisation", ("nash_mtl",)),
    ("uw", None, "Uncertainty weighting beats linear scalarisation", ("uw", "nash_mtl")),
    ("famo", None, "FAMO beats linear scalarisation", ("famo",)),
    ("aligned_mtl", None, "Aligned-MTL beats linear scalarisation", ("aligned_mtl",)),
    ("fairgrad", None, "FairGrad beats linear scalarisation", ("fairgrad",)),
    ("db_mtl", None, "DB-MTL beats linear scalarisation", ("db_mtl",)),
    ("upgrad", None, "UPGrad beats the mean gradient", ("upgrad",)),
    ("upgrad", "mgda", "UPGrad beats MGDA", ("upgrad",)),
    ("nash_mtl", "cagrad", "Nash-MTL beats CAGrad", ("nash_mtl",)),
    ("nash_mtl", "mgda", "Nash-MTL beats MGDA", ("nash_mtl",)),
    ("fairgrad", "nash_mtl", "FairGrad beats Nash-MTL", ("fairgrad",)),
)


def findings(summaries: Sequence[Summary], overall: Overall) -> list[Finding]:
    """All claims that can be looked at with what has been run."""
    found = [_no_method_beats_unitary(summaries, overall), _random_is_comparable(overall)]
    for better, worse, claim, sources in _PAIRS:
        found.append(
            _pair(summaries, better, worse or _plain(overall), claim, tuple(map(_source, sources)))
        )
    found += [_mgda_is_worst(overall), _mgda_is_uneven(summaries), _sharing_helps(summaries)]
    found += [_famo_is_cheap(summaries), _gradients_cost(summaries)]
    found += [_order_is_kept(overall, name) for name in ("NYUv2", "Cityscapes", "QM9", "CelebA")]
    return [finding for finding in found if finding is not None]


def _source(name: str) -> Source:
    return SOURCES[name]


def _plain(overall: Overall) -> str:
    return next((name for name in PLAIN if name in overall.methods), PLAIN[0])


def _no_method_beats_unitary(summaries: Sequence[Summary], overall: Overall) -> Finding | None:
    mine = overall.rank(UNITARY)
    if mine is None:
        return None
    ranks = dict(zip(overall.methods, overall.mean_ranks, strict=True))
    rivals = [m for m in ranks if m not in (UNITARY, SINGLE_TASK)]
    if not rivals:
        return None
    ahead = sorted((m for m in rivals if ranks[m] < mine), key=lambda m: ranks[m])
    significant = [m for m in ahead if overall.difference and mine - ranks[m] >= overall.difference]
    pairs = {m: _differences(summaries, m, UNITARY) for m in rivals}
    always = [m for m, found in pairs.items() if found and max(found) < 0]
    count = len(overall.benchmarks)
    verdict: Verdict = "holds"
    if significant:
        verdict = "does not hold"
    elif always or count < _FEWEST:
        verdict = "undecided"
    evidence = (
        f"Unitary scalarisation has mean rank {mine:.2f} of {len(ranks)} methods on {count} "
        f"benchmark{'s' * (count != 1)}; {_list(ahead, ranks)} "
        f"{'is' if len(ahead) == 1 else 'are'} ahead of it. "
    )
    if overall.difference is not None:
        evidence += (
            f"Significantly better (critical difference {overall.difference:.2f}): "
            f"{', '.join(significant) or 'none'}. "
        )
    evidence += f"Lower Δm on every benchmark: {', '.join(always) or 'none'}."
    return Finding(
        "No method beats tuned unitary scalarisation",
        (SOURCES["kurin"], SOURCES["xin"]),
        "",
        verdict,
        evidence,
    )


def _random_is_comparable(overall: Overall) -> Finding | None:
    mine = overall.rank("rlw")
    if mine is None or overall.difference is None:
        return None
    ranks = dict(zip(overall.methods, overall.mean_ranks, strict=True))
    rivals = [m for m in ranks if m not in ("rlw", SINGLE_TASK)]
    if not rivals:
        return None
    best = min(rivals, key=lambda m: ranks[m])
    better = [m for m in rivals if mine - ranks[m] >= overall.difference]
    middle = statistics.median(ranks[m] for m in rivals)
    verdict: Verdict = "undecided"
    if better:
        verdict = "does not hold"
    elif mine <= middle:
        verdict = "holds"
    return Finding(
        "Random loss weighting does as well as other methods",
        (SOURCES["rlw"],),
        quote("rlw", "mean"),
        verdict,
        f"RLW has mean rank {mine:.2f}, the others' median is {middle:.2f} and the best, {best}, "
        f"has {ranks[best]:.2f}; significantly better than RLW (critical difference "
        f"{overall.difference:.2f}): {', '.join(better) or 'none'}.",
    )


def _pair(
    summaries: Sequence[Summary],
    better: str,
    worse: str,
    claim: str,
    sources: tuple[Source, ...],
) -> Finding | None:
    found = _differences(summaries, better, worse)
    if not found:
        return None
    p = signed_rank_p(found)
    lower = sum(difference < 0 for difference in found)
    middle = statistics.median(found)
    verdict: Verdict = "undecided"
    if p < _LEVEL:
        # The test has a side where most of the ranks are.
        verdict = "holds" if middle < 0 else "does not hold"
    few = "; no test of fewer than 6 can decide" if len(found) < 6 else ""
    return Finding(
        claim,
        sources,
        quote(better, "mean" if worse in PLAIN else worse),
        verdict,
        f"{better} has the lower Δm on {lower} of {len(found)}; median difference to {worse} "
        f"{middle:+.2f} points, Wilcoxon p = {p:.3f}{few}.",
    )


def _mgda_is_worst(overall: Overall) -> Finding | None:
    if overall.rank("mgda") is None or len(overall.methods) < 3:
        return None
    others = [m for m in overall.methods if m != SINGLE_TASK]
    columns = [overall.methods.index(m) for m in others]
    worst = [others[int(row[columns].argmax())] for row in overall.ranks]
    count = worst.count("mgda")
    verdict: Verdict = "undecided"
    if len(worst) >= _FEWEST and count == 0:
        verdict = "does not hold"
    elif len(worst) >= _FEWEST and 2 * count > len(worst):
        verdict = "holds"
    on = [name for name, m in zip(overall.benchmarks, worst, strict=True) if m == "mgda"]
    published = {name: _worst(name) for name in ("NYUv2", "Cityscapes", "QM9", "CelebA")}
    theirs = ", ".join(
        f"{name} {DELTA_M['mgda'][name]:g} ({'the worst' if w == 'mgda' else f'worst is {w}'})"
        for name, w in published.items()
    )
    rank = overall.rank("mgda")
    return Finding(
        "MGDA has the worst Δm, as on Cityscapes and CelebA",
        (SOURCES["nash_mtl"], SOURCES["famo"]),
        f"MGDA's Δm among the methods of our list: {theirs}",
        verdict,
        f"MGDA is the worst on {count} of {len(worst)}{': ' if on else ''}{', '.join(on)}; mean "
        f"rank {rank:.2f} of {len(overall.methods)}.",
    )


def _worst(name: str) -> str:
    order = order_of(name)
    return max(order, key=lambda method: order[method])


def _mgda_is_uneven(summaries: Sequence[Summary]) -> Finding | None:
    spreads = []
    for summary in summaries:
        plain = next((found for m in PLAIN if (found := summary.line(m)) is not None), None)
        mgda = summary.line("mgda")
        if mgda is not None and plain is not None and len(mgda.changes) > 1:
            spreads.append((_spread(mgda), _spread(plain)))
    if not spreads:
        return None
    differences = [of_mgda - of_plain for of_mgda, of_plain in spreads]
    p = signed_rank_p(differences)
    larger = sum(difference > 0 for difference in differences)
    verdict: Verdict = "undecided"
    if p < _LEVEL:
        verdict = "holds" if statistics.median(differences) > 0 else "does not hold"
    middles = [statistics.median(column) for column in zip(*spreads, strict=True)]
    return Finding(
        "MGDA serves the tasks with small gradients at the cost of the others",
        (SOURCES["imtl_g"],),
        "",
        verdict,
        "Seen by its result, the distance between the best and the worst task's change against "
        f"single-task training: larger than with plain averaging on {larger} of {len(spreads)}, "
        f"median {middles[0]:.2f} against {middles[1]:.2f} points, Wilcoxon p = {p:.3f}.",
    )


def _spread(line: Line) -> float:
    return max(line.changes.values()) - min(line.changes.values())


def _sharing_helps(summaries: Sequence[Summary]) -> Finding | None:
    best = []
    for summary in summaries:
        name = next((m for m in (UNITARY, *PLAIN) if summary.line(m) is not None), None)
        line = summary.line(name) if name else None
        if line is not None and line.row.delta_m is not None:
            best.append((summary.benchmark.name, line.row.delta_m.mean, line.interval))
    if not best:
        return None
    below = [name for name, _, interval in best if interval is not None and interval.high < 0]
    above = [name for name, _, interval in best if interval is not None and interval.low > 0]
    p = signed_rank_p([mean for _, mean, _ in best])
    verdict: Verdict = "undecided"
    if p < _LEVEL:
        verdict = "holds" if statistics.median(m for _, m, _ in best) < 0 else "does not hold"
    return Finding(
        "One shared network, trained on the plain sum, is better than a network a task",
        (SOURCES["caruana"],),
        "",
        verdict,
        f"Interval of Δm entirely below single-task on {len(below)} of {len(best)}"
        f"{_names(below)}, entirely above on {len(above)}{_names(above)}; Wilcoxon p = {p:.3f}.",
    )


def _names(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _famo_is_cheap(summaries: Sequence[Summary]) -> Finding | None:
    times = _step_times(summaries, "famo")
    if not times:
        return None
    middle = statistics.median(times)
    within = sum(time <= _CHEAP for time in times)
    verdict: Verdict = "undecided"
    if within == len(times):
        verdict = "holds"
    elif within == 0 or middle > _CHEAP:
        verdict = "does not hold"
    return Finding(
        "FAMO costs as much as linear scalarisation",
        (SOURCES["famo"],),
        _published_times("famo"),
        verdict,
        f"A step takes {middle:.2f} × of the plain sum's (median; {min(times):.2f} to "
        f"{max(times):.2f}), at most {_CHEAP:g} × on {within} of {len(times)}.",
    )


def _gradients_cost(summaries: Sequence[Summary]) -> Finding | None:
    names = ("mgda", "pcgrad", "cagrad", "nash_mtl", "imtl_g")
    medians = {m: statistics.median(t) for m in names if (t := _step_times(summaries, m))}
    if not medians:
        return None
    dear = [m for m, time in medians.items() if time > 2]
    verdict: Verdict = "undecided"
    if len(dear) == len(medians):
        verdict = "holds"
    elif not dear:
        verdict = "does not hold"
    ours = ", ".join(f"{m} {time:.2f}" for m, time in medians.items())
    return Finding(
        "Methods that need every task's gradient take at least twice the time of the plain sum",
        (SOURCES["kurin"], SOURCES["famo"]),
        "; ".join(f"{m}: {_published_times(m)}" for m in medians if m in STEP_TIMES),
        verdict,
        f"Median over the benchmarks, a step over the plain sum's: {ours}.",
    )


def _published_times(method: str) -> str:
    times = ", ".join(
        f"{name} {time:g} ×"
        for name, time in zip(
            ("Cityscapes", "NYUv2", "QM9", "CelebA"), STEP_TIMES[method], strict=True
        )
    )
    return f"{times} ({STEP_TIMES_SOURCE})" if method == "famo" else times


def _step_times(summaries: Sequence[Summary], method: str) -> list[float]:
    lines = [line for s in summaries if (line := s.line(method)) is not None]
    return [line.row.step_time for line in lines if line.row.step_time is not None]


def _order_is_kept(overall: Overall, name: str) -> Finding | None:
    published = order_of(name)
    common = [m for m in overall.methods if m in published]
    if len(common) < 5 or len(overall.benchmarks) < 2:
        return None
    ours = [overall.rank(m) for m in common]
    tau, p = stats.kendalltau(ours, [published[m] for m in common])
    verdict: Verdict = "undecided"
    if p < _LEVEL:
        verdict = "holds" if tau > 0 else "does not hold"
    order = sorted(common, key=lambda m: published[m])
    return Finding(
        f"The order of the methods on {name} carries over",
        (SOURCES["nash_mtl"], SOURCES["famo"]),
        "from the best: " + ", ".join(f"{m} {published[m]:g}" for m in order),
        verdict,
        f"Kendall's τ between the published Δm and our mean ranks of {len(common)} methods: "
        f"{tau:.2f}, p = {p:.3f}. From our best: "
        + ", ".join(sorted(common, key=lambda m: overall.rank(m) or 0))
        + ".",
    )


def _differences(summaries: Sequence[Summary], first: str, second: str) -> list[float]:
    """By benchmark with both, what the first's Δm is above the second's."""
    found = []
    for summary in summaries:
        a, b = summary.line(first), summary.line(second)
        if a is None or b is None or a.row.delta_m is None or b.row.delta_m is None:
            continue
        found.append(a.row.delta_m.mean - b.row.delta_m.mean)
    return found


def _list(methods: Sequence[str], ranks: dict[str, float]) -> str:
    if not methods:
        return "none"
    return ", ".join(f"{m} ({ranks[m]:.2f})" for m in methods)
