"""The notebook runs and shows what is stored; what exercises name exists, and their numbers are true."""
import copy
import csv
import functools
import importlib
import re
import shlex
import time

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import ROOT
from test_documents import parser_of

NOTEBOOK = ROOT / "lecture.ipynb"
EXERCISES = (ROOT / "results" / "EXERCISES.md").read_text()
PARTS = re.split(r"^\*\*(?=\d+\. )", EXERCISES, flags=re.MULTILINE)      # what all begin with; the twelve


def code_cells(notebook):
    """The cells of code of an nbformat notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def assert_shown(notebook):
    """Each cell shows as many pictures as it has calls to do so outside of functions: ten in all, or more."""
    draws = [len(re.findall(r"^(?:show|plt\.show)\(", cell.source, re.M)) for cell in code_cells(notebook)]
    shown = [sum("image/png" in output.get("data", {}) for output in cell.outputs)
             for cell in code_cells(notebook)]
    assert shown == draws and sum(draws) >= 10


@pytest.fixture(scope="module")
def committed():
    """The notebook as it is stored."""
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_stored_with_its_pictures(committed):
    assert NOTEBOOK.stat().st_size < 2e6
    assert_shown(committed)
    for cell in code_cells(committed):
        assert not [output for output in cell.outputs if output.output_type == "error"]
        assert len(cell.source.splitlines()) <= 22 and max(map(len, cell.source.splitlines())) <= 110


@pytest.mark.slow
def test_the_notebook_runs_and_draws_what_is_stored(committed):
    again = copy.deepcopy(committed)
    for cell in code_cells(again):
        cell.outputs = []
    start = time.time()
    NotebookClient(again, timeout=180, resources={"metadata": {"path": str(ROOT)}}).execute()    # or raises
    assert time.time() - start < 180
    assert_shown(again)


def test_twelve_exercises_begin_at_functions_that_exist():
    assert [int(part.split(".")[0]) for part in PARTS[1:]] == list(range(1, 13))
    for part in PARTS[1:]:
        begins = re.findall(r"`([\w.]+)`\s+in\s+`([\w/]+)\.py`", part.split("<details>")[0])
        assert begins, part
        for name, module in begins:
            functools.reduce(getattr, name.split("."), importlib.import_module(module.replace("/", ".")))


def test_each_row_from_equation_to_line_names_what_exists(committed):
    table = EXERCISES.split("## From the equation")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")][2:]
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    chapters = {number for cell in committed.cells if cell.cell_type == "markdown"
                for number in re.findall(r"^## (\d+)\. ", cell.source, re.MULTILINE)}
    assert len(rows) == 13 and len(chapters) >= 10
    for idea, function, test, exercise, chapter in rows:
        name, module = re.fullmatch(r"`([\w.]+)` in (\w+)\.py", function).groups()
        functools.reduce(getattr, name.split("."), importlib.import_module(module))
        assert f"\ndef {test.strip('`')}(" in tests, idea
        assert 1 <= int(exercise) < len(PARTS) and chapter in chapters, idea


def test_commands_of_exercises_parse():
    for block in re.findall(r"```bash\n(.*?)```", EXERCISES, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            python, script, *flags = shlex.split(line.replace("-m ", ""), comments=True)
            assert python == "python"
            parser_of(script).get_args(flags)


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in PARTS if "# prints" in part], ids=lambda part: part[:12])
def test_snippets_print_what_their_last_line_says(part, monkeypatch, capsys):
    import tokenizer
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tokenizer, "QUANTIZERS", dict(tokenizer.QUANTIZERS))
    prelude = re.search(r"```python\n(.*?)```", PARTS[0], re.DOTALL)[1]
    snippet = re.search(r"```python\n(.*?)# prints (.*?)\n```", part, re.DOTALL)
    exec(prelude + snippet[1], {"__name__": "exercise"})
    printed, said = [[float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
                     for text in (capsys.readouterr().out, snippet[2])]
    assert printed == pytest.approx(said, rel=0.02)


def test_measured_numbers_of_exercises_stand_in_the_csv():
    rows = list(csv.DictReader((ROOT / "results" / "exercises.csv").read_text().splitlines()))
    assert {row["exercise"] for row in rows} == {"3", "4", "9"}
    for row in rows:
        assert row["value"] in re.findall(r"\d+(?:\.\d+)?", PARTS[int(row["exercise"])]), row
