"""What the README shows runs as it stands."""

import json
import re
from pathlib import Path

from deltas import read

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_lines_of_python_train_save_and_load_a_delta(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, = re.findall(r"```python\n(.*?)```", README, re.S)
    found = {}
    exec(compile(code, "README.md", "exec"), found)
    assert capsys.readouterr().out.startswith("Count(base=110400, delta=1536, head=0) ")  # 4 L d r = 4 x 2 x 48 x 4
    assert found["model"].delta.rank == 4 and read(tmp_path / "out" / "mine.pt")["method"] == "lora"


def test_the_breaks_are_as_many_as_it_says():
    breaks = json.loads((ROOT / "tests" / "breaks.json").read_text(encoding="utf-8"))
    assert f"lists {len(breaks)} such breaks" in " ".join(README.split())


def test_the_rooms_and_files_it_names_are_there():
    named = set(re.findall(r"\]\(([\w./-]+)\)", README))
    assert named and all((ROOT / name).exists() for name in named), [n for n in named if not (ROOT / n).exists()]
