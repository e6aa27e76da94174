"""The sheets: their questions can be answered, their commands can be typed, and they give away no body.

What a command answers is recomputed by `python course/assign.py check questions`, the ranges by `check ranges`.
"""

import re
import shlex
from decimal import Decimal
from pathlib import Path

import pytest

from course import check, handout, questions
from course.tasks import TASKS
from harness.settings import arguments, settings_typed
from lab import costs
from points import listed

ROOT = Path(__file__).parents[1]
SHEETS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "course" / "sheets").glob("*.md"))}
COMMAND = re.compile(r"^    python (.+)$", re.MULTILINE)


def made(text, tmp_path):
    (tmp_path / "1-x.md").write_text(text, encoding="utf-8")
    return questions.questions(tmp_path)


# ---- a question ----

def test_a_question_is_read_off_its_sheet(tmp_path):
    found = made("# 1. X\n\n**1.1** How many\nare there? *Exact.*\n\n    python a.py --b 1\n\n**1.2** And of\nthem? "
                 "*To the\nnearest 0.5.*\n\n    python c.py\n\n**1.3** Which? *One word.*\n\n    python d.py\n\n"
                 "**1.4** It has no command. *Exact.*\n\nText.\n", tmp_path)
    assert found == {"1.1": questions.Question("How many are there?", Decimal(1), "a.py --b 1"),
                     "1.2": questions.Question("And of them?", Decimal("0.5"), "c.py"),
                     "1.3": questions.Question("Which?", None, "d.py")}


@pytest.mark.parametrize("answer, step, text", [
    ("12,288", 1, "12288"), ("12288.0", 1, "12288"), ("97.4", 5, "19"), ("97.5", 5, "20"), ("97.5 %", 5, "20"),
    ("2.8", "0.1", "28"), ("2.84999", "0.1", "28"), ("0", 5, "0"), (" Key ", None, "key")])
def test_an_answer_is_rounded_to_whole_steps(answer, step, text):
    assert questions.rounded(answer, step if step is None else Decimal(step)) == text


@pytest.mark.parametrize("answer", ["", "many", "1e99", "-3", "nan", "1 2", "9" * 40])
def test_what_is_no_number_is_told_apart_from_a_wrong_one(answer):
    with pytest.raises(ValueError, match="is no number"):
        questions.rounded(answer, Decimal(1))


def test_right_near_and_wrong():
    kept = {"salt": "00ff", "hash": questions.digest("00ff", "19")}  # 95, to the nearest 5
    for answer, said in (("95", "right"), ("96.9", "right"), ("93", "right"), ("98", "near"), ("92", "near"),
                         ("100", "near"), ("87", "wrong"), ("103", "wrong")):
        assert questions.verdict(answer, Decimal(5), kept) == said, answer
    word = {"salt": "00ff", "hash": questions.digest("00ff", "key")}
    assert questions.verdict("Key", None, word) == "right" and questions.verdict("query", None, word) == "wrong"


def test_what_a_student_is_told(capsys, monkeypatch):
    monkeypatch.setattr(questions, "questions", lambda: {"1.1": questions.Question("How many?", Decimal(5), "a.py")})
    monkeypatch.setattr(questions, "kept", lambda: {"1.1": {"salt": "01", "hash": questions.digest("01", "19")}})
    said = []
    for argv in (["1"], ["1.1", "95"], ["1.1", "100"], ["1.1", "12"]):
        assert questions.main(argv) is None
        said.append(capsys.readouterr().out.splitlines())
    assert said == [["1.1  How many? (to the nearest 5)"], ["Right.", "python a.py"],
                    ["Near: off by one step of 5, as may come from rounding. The command shows which."],
                    ["Wrong. Why did you expect that? Then run the command."]]
    assert questions.main(["1.2", "95"]) == "1.2: there are the questions 1.1"
    assert questions.main(["1.1", "all"]).startswith("'all' is no number")


# ---- check ----

def test_check_recomputes_every_answer_by_its_command(monkeypatch):
    """One command for the first two; the third has changed, the fourth prints something else."""
    every = {"1.1": (1, "a.py"), "1.2": (5, "a.py"), "1.3": (1, "b.py"), "1.4": (1, "c.py")}
    reads = dict.fromkeys(every, r"count +(\d+)") | {"1.2": r"^score +([\d.]+)"}
    answer, ran = {"1.1": "12", "1.2": "19", "1.3": "7", "1.4": "1"}, []
    monkeypatch.setattr(questions, "questions", lambda: {n: questions.Question("", Decimal(s), c) for n, (s, c) in
                                                         every.items()})
    monkeypatch.setattr(questions, "kept", lambda: {n: {
        "reads": reads[n], "salt": "02", "hash": questions.digest("02", answer[n])} for n in every})
    output = {"a.py": "count 12\nscore  96.0 %\n", "b.py": "count   9\n", "c.py": "NotImplementedError\n"}
    monkeypatch.setattr(check, "printed", lambda trees, command: ran.append(command) or output[command])

    class Pool:
        map = staticmethod(map)
    assert sorted(line for lines in check.questions(None, Pool) for line in lines) == [
        "question 1.3: its command gives 9, which is wrong",
        "question 1.4: no 'count +(\\\\d+)' in: NotImplementedError\n"]
    assert ran == ["a.py", "b.py", "c.py"], "each command once"


def test_check_runs_each_experiment_with_ten_seeds(monkeypatch, capsys):
    monkeypatch.setattr(check, "experiments", lambda: [("a.py", "80", "90")])
    monkeypatch.setattr(check, "printed", lambda trees, command: f"x\nscore      {82 + int(command[-1])}.00 % of\n")

    class Pool:
        map = staticmethod(map)
    assert list(check.ranges(None, Pool)) == [["seed 9: 91.0 is not in 80 to 90: a.py"]]
    assert capsys.readouterr().out == "82.0 to 91.0, expected 80 to 90: a.py\n"
    with pytest.raises(handout.Unfit, match="loar: choose from counts, .* questions, ranges"):
        check.check(["loar"], 1)


def test_check_proves_the_bar_with_ten_seeds(monkeypatch, capsys):
    """The bar is 87.3: the frozen base comes too near, by two standard deviations, and LoRA is under it twice."""
    monkeypatch.setattr(check, "printed", lambda trees, command: (
        f"majority class   25.0\nfrozen base   {77 + int(command[-1])}.0   0\nlora {86 + int(command[-1])}.0  1,536\n"))

    class Pool:
        map = staticmethod(map)
    found = [line for lines in check.bar(None, Pool) for line in lines]
    assert [line.split(" of ")[0] for line in found] == [
        "the bar, 87.3, is not two standard deviations above the frozen base, 87.6", "the bar, 87.3: seed 0",
        "the bar, 87.3: seed 1"]
    assert "frozen base: 77.0 to 86.0, the bar is 87.3\n" in capsys.readouterr().out


# ---- the sheets that are there ----

def test_there_are_eight_sheets_of_a_page_each():
    assert [int(name[0]) for name in SHEETS] == [1, 2, 3, 4, 5, 6, 7, 8]
    for name, text in SHEETS.items():
        assert len(text.splitlines()) <= 90, name
        parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert parts == ["Read", "Write", "Predict, then run", "Experiment", "A surprise"], name


def test_each_sheet_has_three_to_five_questions_whose_answers_are_kept_as_hashes():
    every, kept = questions.questions(), questions.kept()
    for name, text in SHEETS.items():
        mine = [number for number in every if number[0] == name[0]]
        assert 3 <= len(mine) <= 5 and mine == re.findall(r"^\*\*(\d\.\d)\*\*", text, re.MULTILINE), name
        assert check.EXPERIMENT.search(text), f"{name}: an experiment and its range"
    assert every.keys() == kept.keys() and len({one["salt"] for one in kept.values()}) == len(kept)
    for number, one in kept.items():
        assert set(one) == {"reads", "salt", "hash"} and re.compile(one["reads"]).groups == 1, number
        assert re.fullmatch("[0-9a-f]{64}", one["hash"]) and re.fullmatch("[0-9a-f]{32}", one["salt"]), number


def test_what_a_sheet_says_can_be_typed():
    """Every option of every command is known, every tag and file is there, the minutes are those of the tasks."""
    points = {tag for _, tag in listed(ROOT / "tests").values()}
    for name, text in SHEETS.items():
        for command in COMMAND.findall(text):
            script, *argv = shlex.split(command)
            if script == "train.py":
                assert settings_typed(arguments(argv)).base, command
            elif argv[0] == "costs":
                assert costs.asked(costs.parser().parse_args(argv[1:])), command
        for tag, minutes in re.findall(r"`pytest --only (\w+)`(?:, (\d+) minutes)?", text):
            wanted = sum(task.minutes for task in TASKS if task.tag == tag)
            assert tag in points and int(minutes or 0) == wanted, f"{name}: {tag}"
        for path in re.findall(r"`([\w/]+\.(?:py|md))`", text):
            assert (ROOT / path).is_file(), f"{name}: {path}"
    set_by = {tag for text in SHEETS.values() for tag in re.findall(r"`pytest --only (\w+)`", text)}
    assert set_by == points, "every tag of the course is set by a sheet"


def test_no_sheet_quotes_what_is_to_be_written():
    for task in TASKS:
        for line in handout.removed(task):
            told = line.split("#")[0].strip()
            if len(told) > 8:
                assert not [name for name, text in SHEETS.items() if told in text], f"{task.name}: {told}"


def test_a_handout_has_sheets_and_questions_and_no_answers():
    names = {name for name in handout.files() if name.startswith("course/")}
    assert names >= {"course/questions.json", "course/questions.py", *(f"course/sheets/{name}" for name in SHEETS)}
    assert not names & {f"course/{path.name}" for path in (ROOT / "course").glob("*.py")} - {"course/questions.py"}
    source = (ROOT / "course" / "questions.py").read_text(encoding="utf-8")
    assert not re.search(r"^(from|import) (course|points|torch)", source, re.MULTILINE), "it runs in a handout"
