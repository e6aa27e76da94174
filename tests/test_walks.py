"""The walks of the course: pdb really stops where a page says, and prints what it shows.

A page's session is typed into Python's own debugger while train.main() runs. What stands below a command must be
printed, to the letter; below other commands nothing stands: there pdb names lines, which move.
"""

import bdb
import io
import pdb
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import train
from data import tasks
from deltas import methods

WALKS = Path(__file__).parents[1] / "course" / "walks"


def read(name):
    """(the words behind train.py, [(command, what is printed below it)]) of a page."""
    text = (WALKS / f"{name}.md").read_text(encoding="utf-8")
    words = re.search(r"^python -m pdb train\.py (.*)$", text, re.M)[1].split()
    blocks = re.findall(r"^```\n(\(Pdb\) .*?)^```$", text, re.M | re.S)
    steps = [step.split("\n", 1) for block in blocks for step in block.split("(Pdb) ")[1:]]
    return words, [(command, shown.strip()) for command, shown in steps]


def walk(words, commands, out, monkeypatch):
    """What pdb prints below each command."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--out", str(out)])
    said = io.StringIO()
    bdb.Breakpoint.clearBreakpoints()  # they are numbered from 1 on, in a process
    debugger = pdb.Pdb(stdin=io.StringIO("\n".join([*commands, "q", ""])), stdout=said, nosigint=True, readrc=False)
    with suppress(bdb.BdbQuit):
        debugger.runcall(train.main)
    return [told.strip() for told in said.getvalue().split("(Pdb) ")[1:-1]]


@pytest.mark.parametrize("name", methods())
def test_the_debugger_prints_what_the_page_shows(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "SIZES", {"dev": 10, "test": 16})  # the first 16 of the 600, which a run checks
    words, steps = read(name)
    assert words[:2] == ["--method", name]
    told = walk(words, [command for command, _ in steps], tmp_path, monkeypatch)
    assert len(told) == len(steps)
    for (command, shown), printed in zip(steps, told):
        if command.startswith("p "):
            assert shown and printed == shown, f"{command}: the debugger prints {printed}"
        else:
            assert not shown and "***" not in printed, f"{command}: {printed}"


def test_every_technique_has_a_page_of_one_screen():
    assert {path.stem for path in WALKS.glob("*.md")} == set(methods())
    for path in WALKS.glob("*.md"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 50, f"{path.name}: a page is a screen"
