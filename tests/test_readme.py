"""The README: what it prints of the registry, its code, and the command that prints it."""

import re
from pathlib import Path

import pytest

import gradbal.nn
from gradbal import info, list_aggregators
from gradbal.__main__ import differences, filled, main, methods_table

README = Path(__file__).parent.parent / "README.md"


BLOCKS = """x
<!-- methods: printed by python -m gradbal -->
outdated
<!-- end of methods -->
y
<!-- differences: printed by python -m gradbal --differences -->
outdated
<!-- end of differences -->
z"""


def test_the_readme_has_what_is_printed(capsys):
    assert filled(README.read_text()) == README.read_text()
    for arguments, text in (([], methods_table()), (["--differences"], differences())):
        assert main(arguments) == 0
        assert capsys.readouterr().out.strip() == text
        assert text in README.read_text()


def test_every_note_is_a_bullet_of_whole_sentences():
    lines = differences().splitlines()
    with_notes = [name for name in list_aggregators() if info(name).note]
    assert [line.split("**")[1].strip("`") for line in lines] == with_notes
    for line in lines:
        assert line == " ".join(line.split())
        assert line.endswith(".")


def test_writing_into_a_file(tmp_path):
    file = tmp_path / "a.md"
    file.write_text(BLOCKS)
    assert main(["--write", str(file)]) == 0
    text = file.read_text()
    assert "outdated" not in text
    assert text.index("| `mgda` |") < text.index("\ny\n") < text.index("- **`mgda`**: ")
    assert text.startswith("x\n")
    assert text.endswith("-->\nz")
    for broken in ("no markers", BLOCKS.partition("y")[0]):
        file.write_text(broken)
        with pytest.raises(ValueError, match="must have the lines"):
            main(["--write", str(file)])
        assert file.read_text() == broken


def test_other_arguments_are_refused(capsys):
    assert main(["--help-me"]) == 2
    assert "found --help-me" in capsys.readouterr().err


def test_the_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_every_architecture_is_in_the_table():
    table = README.read_text().partition("\n| `gradbal.nn` |")[2].partition("\n\n")[0]
    found = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    public = {name: getattr(gradbal.nn, name) for name in gradbal.nn.__all__}
    classes = {name for name, value in public.items() if isinstance(value, type)}
    assert sorted([*found, "MultiTaskModel"]) == sorted(classes)
    assert all(issubclass(public[name], gradbal.nn.MultiTaskModel) for name in found)
