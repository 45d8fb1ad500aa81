"""The README: its table of methods and its code, and the command that prints the table."""

import re
from pathlib import Path

import pytest

from gradbal.__main__ import main, methods_table, with_table

README = Path(__file__).parent.parent / "README.md"


def test_the_table_of_methods_is_the_one_that_is_printed(capsys):
    assert with_table(README.read_text()) == README.read_text()
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == methods_table()


def test_writing_the_table_into_a_file(tmp_path):
    file = tmp_path / "a.md"
    file.write_text(
        "x\n<!-- methods: printed by python -m gradbal -->\nanother table\n<!-- end of methods -->"
    )
    assert main(["--write", str(file)]) == 0
    assert "another table" not in file.read_text()
    assert "| `mgda` |" in file.read_text()
    file.write_text("no markers")
    with pytest.raises(ValueError, match="must have the lines"):
        main(["--write", str(file)])


def test_other_arguments_are_refused(capsys):
    assert main(["--help-me"]) == 2
    assert "found --help-me" in capsys.readouterr().err


def test_the_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
