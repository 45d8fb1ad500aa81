import pytest

from benchmarks.reporting.claims import findings
from benchmarks.reporting.differences import set_findings
from benchmarks.reporting.selection import select
from benchmarks.reporting.summary import compare, summarise
from tests.benchmarks.reporting.records import make_benchmark, record


def _made(levels, benchmarks=7, seeds=2, **other):
    """Summaries in which every method has this Δm on every benchmark, up to the seeds' noise."""
    summaries = []
    for number in range(benchmarks):
        benchmark = make_benchmark(f"set_{number}", ("a", "b"))
        records = []
        for method, level in {"single_task": (0.0, 0.0), **levels}.items():
            pair = level if isinstance(level, tuple) else (level, level)
            # Differences that grow with the benchmark's number have no ties.
            values = [0.5 * (1 - each * (1 + number / 10) / 100) for each in pair]
            for seed in range(seeds):
                noisy = [value + 1e-5 * (seed - (seeds - 1) / 2) for value in values]
                records.append(record(benchmark, method, seed, noisy, **other))
        (selection,), _ = select(records, {benchmark.name: benchmark})
        summaries.append(summarise(selection))
    return summaries


def _verdicts(summaries):
    return {f.claim: f for f in findings(summaries, compare(summaries))}


@pytest.mark.parametrize(
    ("cagrad", "verdict"), [(-1.0, "holds"), (3.0, "does not hold"), (1.0, "undecided")]
)
def test_a_pair_is_decided_by_the_sign_on_all_benchmarks(cagrad, verdict):
    found = _verdicts(_made({"mean": 1.0, "cagrad": cagrad}))["CAGrad beats linear scalarisation"]
    assert found.verdict == verdict
    assert "NYUv2 0.2 against 5.59" in found.published
    assert found.sources[0].link == "https://arxiv.org/abs/2110.14048"


def test_five_benchmarks_do_not_suffice():
    found = _verdicts(_made({"mean": 1.0, "cagrad": -1.0}, benchmarks=5))
    finding = found["CAGrad beats linear scalarisation"]
    assert finding.verdict == "undecided"
    assert "cagrad has the lower Δm on 5 of 5" in finding.evidence
    assert "fewer than 6" in finding.evidence


def test_methods_that_were_not_run_make_no_claims():
    claims = _verdicts(_made({"mean": 1.0}))
    assert not [claim for claim in claims if "Nash" in claim or "MGDA" in claim or "FAMO" in claim]


UNITARY = "No method beats tuned unitary scalarisation"


def test_nothing_beats_unitary():
    found = _verdicts(_made({"unitary": -1.0, "mean": 1.0, "mgda": 2.0}))[UNITARY]
    assert found.verdict == "holds"
    assert "none are ahead of it" in found.evidence


def test_one_that_is_always_better_leaves_it_open():
    found = _verdicts(_made({"unitary": -1.0, "mean": 1.0, "cagrad": -2.0}))[UNITARY]
    assert found.verdict == "undecided"
    assert "cagrad (1.00) is ahead of it" in found.evidence
    assert "Lower Δm on every benchmark: cagrad." in found.evidence


def test_one_that_is_significantly_better_refutes_it():
    levels = {f"m{number}": float(number) for number in range(1, 9)}
    found = _verdicts(_made({"unitary": 9.0, **levels}, benchmarks=12))[UNITARY]
    assert found.verdict == "does not hold"
    assert "m1" in found.evidence


def test_mgda_the_worst_and_uneven():
    found = _verdicts(_made({"mean": (1.0, 1.2), "mgda": (9.0, -1.0), "uw": 0.5}))
    assert found["MGDA has the worst Δm, as on Cityscapes and CelebA"].verdict == "holds"
    claim = "MGDA serves the tasks with small gradients at the cost of the others"
    assert found[claim].verdict == "holds"
    assert "7 of 7" in found[claim].evidence


def test_mgda_never_the_worst():
    found = _verdicts(_made({"mean": 1.0, "mgda": 0.5, "uw": 2.0}))
    finding = found["MGDA has the worst Δm, as on Cityscapes and CelebA"]
    assert finding.verdict == "does not hold"
    assert "0 of 7" in finding.evidence


@pytest.mark.parametrize(("time", "verdict"), [(1.1, "holds"), (1.6, "does not hold")])
def test_the_cost_of_famo(time, verdict):
    found = _verdicts(_made({"mean": 1.0, "famo": 1.0}, step_time=time))
    finding = found["FAMO costs as much as linear scalarisation"]
    assert finding.verdict == verdict
    assert f"{time:.2f} ×" in finding.evidence
    assert "NYUv2 1.19 ×" in finding.published


def test_the_published_order():
    # NYUv2's: Nash-MTL, IMTL-G, CAGrad, MGDA, UW, LS, RLW.
    order = ("nash_mtl", "imtl_g", "cagrad", "mgda", "uw", "mean", "rlw")
    levels = {method: float(place) for place, method in enumerate(order, start=1)}
    claim = "The order of the methods on NYUv2 carries over"
    found = _verdicts(_made(levels))[claim]
    assert found.verdict == "holds"
    assert "7 methods: 1.00" in found.evidence
    assert found.published.startswith("from the best: nash_mtl -4.04, imtl_g -0.76")
    levels = {method: -level for method, level in levels.items()}
    assert _verdicts(_made(levels))[claim].verdict == "does not hold"


def test_random_weighting():
    claim = "Random loss weighting does as well as other methods"
    levels = {f"m{number}": float(number) for number in range(1, 9)}
    found = _verdicts(_made({**levels, "rlw": 9.0}, benchmarks=12))
    assert found[claim].verdict == "does not hold"
    found = _verdicts(_made({**levels, "rlw": 3.5}, benchmarks=12))
    assert found[claim].verdict == "holds"


def test_who_differs_on_one_benchmark():
    (summary,) = _made({"mean": 1.0, "mgda": 5.0, "cagrad": -1.0}, benchmarks=1, seeds=3)
    found = set_findings(summary)
    assert found.better_than_single == ("cagrad",)
    assert found.worse_than_single == ("mean", "mgda")
    assert (found.plain, found.better_than_plain) == ("mean", ("cagrad",))
    assert found.worse_than_plain == ("mgda",)
    assert found.chance == pytest.approx(0.05)


def test_one_seed_tells_no_differences():
    (summary,) = _made({"mean": 1.0, "mgda": 5.0}, benchmarks=1, seeds=1)
    found = set_findings(summary)
    assert (found.better_than_single, found.worse_than_plain, found.chance) == ((), None, None)
