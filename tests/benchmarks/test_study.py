from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import cli
from benchmarks.benchmark import Benchmark
from benchmarks.catalog import BENCHMARKS, find
from benchmarks.errors import BadInput
from benchmarks.results import Trial
from benchmarks.study import Study, read_study
from benchmarks.tuning import Tuning

WHOLE = """
benchmarks = ["tiny", "multimnist"]
methods = ["sum", "unitary"]
seeds = 4
preset = "quick"
workers = 3
out = "somewhere"

[tuning]
lr_factors = [0.5, 1, 2]
weight_decays = [0, 0.1]

[settings.tiny]
epochs = 7
lr = 0.5
"""


def _write(tmp_path, text):
    path = tmp_path / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _invoke(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], prog_name="benchmarks")


def test_a_whole_file(tmp_path, tiny):
    study, rest = read_study(_write(tmp_path, WHOLE))
    assert rest == {"workers": 3, "out": "somewhere"}
    assert study.tuning == Tuning((0.5, 1.0, 2.0), (0.0, 0.1))
    first, second = study.plans()
    assert first.benchmark is tiny
    assert (first.settings.epochs, first.settings.lr, first.seeds) == (7, 0.5, 4)
    assert first.tuning.grid(first.settings)[0] == Trial(0.25, 0.0, 0.0)
    assert second.settings == BENCHMARKS["multimnist"].presets["quick"].settings
    assert first.methods == second.methods == ("sum", "unitary")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("benchmarks = [", "`--config` must be a TOML file, found"),
        ("sedes = 3", "'sedes'; did you mean seeds"),
        ('seeds = "3"', "`seeds` in .* must be a whole number, found '3'"),
        ("seeds = true", "`seeds` in .* must be a whole number, found True"),
        ("methods = [1]", r"`methods` in .* must be names, found \[1\]"),
        ("tuning = 3", "`tuning` in .* must be true, false or a table, found 3"),
        ("[tuning]\nlr = [1]", "found 'lr'"),
        ("[tuning]\nlr_factors = 1", "`lr_factors` in .* must be a list of numbers, found 1"),
        ("[tuning]\ndropouts = [1.0]", r"`dropouts` must be .* in \[0, 1\), found 1.0"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, message):
    with pytest.raises(BadInput, match=message):
        read_study(_write(tmp_path, text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": ()}, "`NAME` must name one benchmark or several, found none"),
        ({"benchmarks": ("multimnits",)}, "did you mean multimnist"),
        ({"methods": ("upgrda",)}, "did you mean upgrad"),
        ({"seeds": 0}, "`--seeds` must be at least 1, found 0"),
        ({"settings": {"census": {}}}, "`settings` must be of the benchmarks tiny, found census"),
        ({"settings": {"tiny": {"epoch": 1}}}, "'epoch'; did you mean epochs"),
        ({"settings": {"tiny": {"epochs": 0}}}, "`epochs` of tiny must be a whole number above 0"),
        ({"settings": {"tiny": {"lr": "x"}}}, "`lr` of tiny must be a number above 0, found 'x'"),
        ({"preset": "fast"}, "`preset` must name"),
    ],
)
def test_a_study_that_cannot_be(tiny, changes, message):
    with pytest.raises(BadInput, match=message):
        Study(**{"benchmarks": ("tiny",), **changes}).plans()


def test_the_command_line_has_precedence(tmp_path, tiny):
    path = _write(tmp_path, WHOLE)
    out = tmp_path / "out"
    words = ["run", "tiny", "--config", path, "--seeds", 1, "--methods", "mgda", "--out", out]
    result = _invoke(*words, "--workers", 0)
    assert result.exit_code == 0, result.output
    assert "mgda" in result.output
    assert "sum, seed" not in result.output
    assert (out / "config.toml").read_text(encoding="utf-8") == WHOLE


def test_a_dry_run_says_what_there_is_to_do_and_does_nothing(tmp_path, tiny):
    words = ["run", "tiny", "--methods", "sum", "--tune", "--out", tmp_path / "out"]
    result = _invoke(*words, "--dry-run")
    assert result.exit_code == 0
    # Three rates of three rows, three pairs more of unitary scalarisation, and a second seed.
    assert "15 of 15 runs to be made" in result.output
    assert not (tmp_path / "out").exists()
    assert _invoke(*words, "--workers", 0).exit_code == 0
    assert "0 of 15 runs to be made" in _invoke(*words, "--dry-run").output


def test_a_benchmark_of_ones_own():
    assert find("tests.benchmarks.conftest:TINY").name == "tiny"
    for name, said in (
        ("tests.none:TINY", "No module named"),
        ("tests.benchmarks.conftest:NONE", "no attribute 'NONE'"),
        ("tests.benchmarks.conftest:KIT", "must be a benchmarks.benchmark.Benchmark"),
    ):
        with pytest.raises(BadInput, match=said):
            find(name)
    assert isinstance(find("census"), Benchmark)


def test_several_tables_in_one_folder(tmp_path, tiny):
    other = "tests.benchmarks.test_workers:OWN"
    words = ["run", "tiny", other, "--methods", "sum", "--seeds", 1, "--workers", 0]
    result = _invoke(*words, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "results.jsonl",
        *(f"{name}_{file}" for name in ("tiny", "own") for file in ("summary.csv", "accuracy.png")),
    }
    assert "run 4 of 4: own, sum, seed 0" in result.output


@pytest.mark.parametrize("path", sorted(Path("benchmarks/studies").glob("*.toml")), ids=str)
def test_the_studies_that_come_with_it_can_be_run(path):
    study, rest = read_study(path)
    plans = study.plans()
    assert len(plans) == len(study.benchmarks)
    assert not rest
    total = sum(plan.size for plan in plans)
    assert f"{total} runs" in path.read_text(encoding="utf-8").replace(",", "")
