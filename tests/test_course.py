"""The course: holes that leave the rest alone, points that are not what was collected, grades that nobody can write.

Grading is tried on a repository of two files, without torch: the graded function doubles a number.
"""

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from course import assign, grade, handout
from course.tasks import LONGEST, NEEDS, TASKS, Task
from points import listed, marks

ROOT = Path(__file__).parents[1]

WORK = '''"""What is graded."""


def double(x):
    """Twice."""
    # a comment
    y = x + x
    return y


def other(x):
    return double(x) + 1
'''
TESTS = '''import pytest

from work import double


@pytest.mark.points(2, "work")
def test_two_and_two_are_four():
    assert double(2) == 4, "twice two"


@pytest.mark.points(3, "work")
@pytest.mark.parametrize("x", [0, 1, 7])
def test_any_number(x):
    assert double(x) == 2 * x, f"twice {x}"


@pytest.mark.points(1, "more")
def test_three():
    assert double(3) == 6


def test_without_points():
    assert False
'''


CALLED = "from work import double\ndef test_it(): assert double(3) == 6\n"


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A repository of its own as the reference: work.py and its tests."""
    root = tmp_path / "stub"
    (root / "tests").mkdir(parents=True)
    (root / "work.py").write_text(WORK, encoding="utf-8")
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\ntestpaths = ['tests']\n", encoding="utf-8")
    (root / "tests" / "conftest.py").write_text('pytest_plugins = ["points"]\n', encoding="utf-8")
    (root / "tests" / "test_work.py").write_text(TESTS, encoding="utf-8")
    (root / "tests" / "points.py").write_bytes((ROOT / "tests" / "points.py").read_bytes())
    monkeypatch.setattr(handout, "ROOT", root)
    monkeypatch.setattr(handout, "TASKS", (Task("work", "work.py", "double", 1, "add it to itself", "x -> 2 x"),))
    return root


def graded(tmp_path, **files):
    """results.json for a submission of these files; __ in a name is a folder."""
    for name, text in files.items():
        path = tmp_path / "submission" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    grade.grade(tmp_path / "submission", ["work"], tmp_path / "results.json")
    return json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))


def scores(results):
    return [(t["name"], t["score"], t["max_score"], t["output"]) for t in results["tests"]]


# ---- holes ----

def test_every_task_is_a_function_with_a_body_of_twelve_lines_at_most():
    assert 15 <= len(TASKS) <= 20 and {task.tag for task in TASKS} <= set(NEEDS)
    for task in TASKS:
        assert 1 <= len(handout.removed(task)) and all(len(line) <= 120 for line in task.text.splitlines()), task.name
    points = listed(ROOT / "tests")
    assert {tag for _, tag in points.values()} == set(NEEDS), "every tag of the course has points, and no other"


def test_a_function_that_is_renamed_or_too_long_is_an_error(stub):
    task = handout.TASKS[0]
    for text, message in ((WORK.replace("def double", "def twice"), "work.py: there is no function double"),
                          (WORK.replace("    y = x + x\n", "    y = x + x\n" * LONGEST), "more than 12 lines"),
                          (WORK.replace('    # a comment\n    y = x + x\n    return y\n', ""), "double has no body")):
        (stub / "work.py").write_text(text, encoding="utf-8")
        with pytest.raises(handout.Unfit, match=message):
            handout.removed(task)


def test_a_hole_leaves_all_other_text_as_it_was():
    assert handout.hole(WORK, "double", "add it to itself", "x -> 2 x") == WORK.replace(
        '    """Twice."""\n    # a comment\n    y = x + x\n    return y\n',
        '    """Twice.\n\n    x -> 2 x\n    """\n    raise NotImplementedError("add it to itself")\n')
    assert handout.hole(WORK, "other", "hint") == WORK.replace(
        "    return double(x) + 1", '    raise NotImplementedError("hint")')


def test_a_handout_has_no_body_that_was_taken_out(tmp_path):
    """All tags at once; a line that stands elsewhere in the repository too is nobody's secret."""
    tags = list(dict.fromkeys(task.tag for task in TASKS))
    handout.make(tags, tmp_path / "out")
    made = [path for path in tmp_path.glob("out/**/*") if path.is_file()]
    names = {path.relative_to(tmp_path / "out").as_posix() for path in made}
    assert not [name for name in names if name.startswith((".", "tests/bench/", "tests/breaks"))]
    course = {name.split("/")[1] for name in names if name.startswith("course/")}
    assert {"walks", "cards"} <= course <= {"walks", "cards", "sheets", "questions.py", "questions.json"}
    assert not [name for name in names if name.endswith((".pyc", "/__pycache__"))]
    assert {"AGENTS.md", "TASKS.md", "VERSION", "train.py", "data/weights/gpt-xs.pt", "tests/points.json"} <= names
    whole = {path: path.read_bytes() for path in made}
    for solution in (ROOT / "course" / "solutions").glob("*.py"):
        told = solution.read_text("utf-8").split("from torch import nn\n", 1)[1]
        for line in {line.strip().encode() for line in told.splitlines() if "self." in line}:
            known = any(line in (ROOT / name).read_bytes() for name in ("methods/lora.py", "methods/prefix.py"))
            assert known or not [path for path, text in whole.items() if line in text], f"{solution.name}: {line}"
    reference = {name: (ROOT / name).read_bytes() for name in handout.files()}
    for task in TASKS:
        for line in handout.removed(task):
            told = line.split("#")[0].strip().encode()
            if sum(text.count(told) for text in reference.values()) == 1 and len(told) > 8:
                assert not [path for path, text in whole.items() if told in text], f"{task.name}: {told}"
        assert f"NotImplementedError({json.dumps(task.hint)})" in (tmp_path / "out" / task.file).read_text("utf-8")
    assert listed(tmp_path / "out" / "tests") == listed(ROOT / "tests"), "the list that was fixed"
    assert (tmp_path / "out" / "VERSION").read_text("utf-8").strip() == handout.version()
    with pytest.raises(handout.Unfit, match="something is in there"):
        handout.make(["lora"], tmp_path / "out")


# ---- points ----

def test_points_are_what_was_listed_and_not_what_was_collected():
    maxima = {"test_a.py::test_x": (3, "a"), "test_a.py::test_y": (2, "a"), "test_b.py::test_z": (1, "a")}
    cases = ["test_a.py::test_x[0]", "test_a.py::test_x[1]", "test_a.py::test_y"]
    green = dict.fromkeys(cases, "")
    assert marks(maxima, cases, green) == {"test_a.py::test_x": (3, 3, ""), "test_a.py::test_y": (2, 2, ""),
                                           "test_b.py::test_z": (0, 1, "it was not run")}
    assert marks(maxima, cases, green | {"test_b.py": "no such name"})["test_b.py::test_z"] == (0, 1, "no such name")
    one = marks(maxima, cases, green | {cases[1]: "wrong"})
    assert one["test_a.py::test_x"] == (0, 3, "[1] wrong"), "one case of two"
    del green[cases[0]]
    assert marks(maxima, cases, green, "killed")["test_a.py::test_x"] == (0, 3, "[0] killed"), "a case is missing"


def test_the_last_lines_are_the_ideas_and_the_sum(stub):
    (stub / "work.py").write_text(WORK.replace("x + x", "x * x"), encoding="utf-8")
    (stub / "tests" / "test_zero.py").write_text('''import pytest
@pytest.fixture
def broken():
    raise RuntimeError("a fixture")
@pytest.mark.points(4, "work")
def test_with_a_fixture(broken):
    pass
@pytest.mark.points(5, "work")
def test_skipped():
    pytest.skip("not today")
''', encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--only", "work",
                           "--junitxml", "junit.xml"], cwd=stub, capture_output=True, text=True)
    assert done.stdout.splitlines()[-4:] == [
        "0 / 3  any number: [1] twice 1", "0 / 4  with a fixture: RuntimeError: a fixture",
        "0 / 5  skipped: Skipped: not today", "points: 2 / 14"]
    assert done.returncode == 1 and (stub / "junit.xml").is_file()


def test_the_terms_plan_has_the_points_of_the_list():
    points = listed(ROOT / "tests").values()
    text = (ROOT / "course" / "README.md").read_text("utf-8")
    plan = re.findall(r"^\| \d \| [^|]+ \| ([a-z_ ]+) \| (\d+) \|", text, re.MULTILINE)
    assert {tag for tags, _ in plan for tag in tags.split()} == {task.tag for task in TASKS}
    for tags, worth in plan:
        found = sum(n for n, tag in points if tag in tags.split())
        assert int(worth) == found, f"course/README.md: {tags} have {found} points"


# ---- grading ----

def test_a_submission_has_the_points_of_what_is_right(stub, tmp_path):
    """x * x is right for 2 and for 0, and not for 1: one case of three."""
    assert scores(graded(tmp_path, work=WORK.replace("x + x", "x * x"))) == [
        ("two and two are four", 2, 2, ""), ("any number", 0, 3, "[1] twice 1")]


def test_what_was_not_handed_in_is_empty(stub, tmp_path):
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "work.py").symlink_to(stub / "work.py")
    results = graded(tmp_path, conftest="import os; os._exit(0)")
    assert results["output"] == "work.py is a link: that is not read"
    assert [t["score"] for t in results["tests"]] == [0, 0]
    assert results["tests"][0]["output"] == "NotImplementedError: add it to itself"


def test_the_graders_own_fault_writes_no_score(stub, tmp_path):
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "VERSION").write_text("123456789abc\n", encoding="utf-8")
    with pytest.raises(grade.Fault, match="the handout has version '123456789abc', this grader"):
        graded(tmp_path, work=WORK)
    (tmp_path / "submission" / "VERSION").unlink()
    (stub / "work.py").write_text(WORK.replace("x + x", "x"), encoding="utf-8")
    with pytest.raises(grade.Fault, match="the reference is red: .*twice two"):
        graded(tmp_path, work=WORK)
    with pytest.raises(SystemExit) as stopped:
        assign.main(["grade", str(tmp_path / "nothing"), "--tags", "work", "--results", str(tmp_path / "results.json")])
    assert isinstance(stopped.value.code, str), "a text is printed, and the status is 1"
    assert not (tmp_path / "results.json").exists()


HOSTILE = {  # name: (what stands before the reference's text, what is said of a test that has no points; or None)
    "exit at import": ("import os\nos._exit(0)\n", "the process ended with status 0"),
    "exit by exception": ("raise SystemExit(0)\n", "the process ended with status"),
    "a child that outlives its parent": (
        "import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(20)\n", None),
    "a deep recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef deep(): return deep() + 1\ndeep()\n", ""),
    "four gigabytes": ("kept = bytearray(4 << 30)\n", "MemoryError"),
    "an endless print": ("while True:\n    print('x' * 1000)\n", ""),
    "a loop without an end": ("while True:\n    pass\n", "all tests together were not done after 4 s"),
    "a forged results.json": (
        "import os, pathlib\nfor place in ('results.json', '../results.json', '../../results.json'):\n"
        "    try: pathlib.Path(place).write_text('{\"score\": 1000}')\n    except OSError: pass\n", None),
    "a patched pytest": (
        "import _pytest.reports as r\nfound = r.TestReport.from_item_and_call\n"
        "def green(item, call):\n    call.excinfo = None\n    return found(item, call)\n"
        "r.TestReport.from_item_and_call = green\ndef double(x): return 0\n'''", "a test that must fail"),
    "forged outcomes": (
        "import os\nfor fd in range(3, 20):\n    for case in 'two_and_two_are_four', 'any_number[0]':\n"
        "        try: os.write(fd, ('[\"\", \"test_work.py::test_' + case + '\", \"\"]\\n').encode())\n"
        "        except OSError: pass\nos._exit(0)\n", "the process ended with status 0"),
    "a file of a syntax error": ("def double(x:\n", "SyntaxError"),
    "bytes that are no text": ("\x00\x00", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_submission_never_has_more_than_the_maximum(name, stub, tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "SECONDS", 4)
    code, said = HOSTILE[name]
    before = children()
    work = code + WORK.replace('"""', "") + code[-3:] if code.endswith("'''") else code + WORK
    results = graded(tmp_path, work=work, conftest="import os; os._exit(0)")
    assert [t["max_score"] for t in results["tests"]] == [2, 3], "the maxima are the list's"
    if said is None:
        assert [t["score"] for t in results["tests"]] == [2, 3], "what is right beside it has its points"
    else:
        assert sum(t["score"] for t in results["tests"]) < 5 and said in results["tests"][-1]["output"], results
    if os.geteuid() == 0:
        assert not children() - before, "nothing that it has started is left"


def children():
    """The living processes of users that a grader may have taken."""
    return {pid for user in {path.stat().st_uid for path in Path("/proc").glob("[0-9]*")} if user >= 20000
            for pid in grade.processes(user)}


def test_limits_hold_before_anything_hostile_runs(tmp_path):
    """In a child with the grader's limits: memory beyond them is refused, and a large file."""
    program = """if True:
        import sys
        def file(): return open("f", "wb", 0).write(b"x" * (64 << 20))
        for name, use in (("memory", lambda: bytearray(4 << 30)), ("file", file)):
            try:
                found = use()
                print(name, "too much" if name == "memory" or found > (16 << 20) else "refused")
            except (MemoryError, OSError):
                print(name, "refused")
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          preexec_fn=lambda: grade.limit(None))
    assert done.stdout.split("\n")[:2] == ["memory refused", "file refused"], done.stderr
    begin = time.time()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    grade.kill(child.pid, None)
    assert child.wait() == -9 and time.time() - begin < 10, "the whole group is killed"


def test_the_grader_has_room_for_pytorchs_cuda_build(tmp_path):
    """Its import alone takes 740 MB of data: with 512 MB every reference would be red."""
    made = tmp_path / "torch"
    (made / "lib").mkdir(parents=True)
    (made / "__init__.py").touch()
    for build, expected in (("cpu", 512), ("cuda", 1536)):
        (made / "lib" / f"libtorch_{build}.so").touch()
        told = subprocess.run([sys.executable, "-c", "from course import grade; print(grade.MEMORY >> 20)"], check=True,
                              cwd=handout.ROOT, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{handout.ROOT / 'tests'}"})
        assert int(told.stdout) == expected, build


# ---- Gradescope ----

def test_the_zip_is_laid_out_as_gradescope_runs_it(stub, tmp_path):
    handout.zipped(["work"], tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for name in ("run_autograder", "setup.sh"):
            assert archive.getinfo(name).external_attr >> 16 == 0o100755, f"{name} may be executed, in the root"
        assert {"work.py", "tests/points.py", "tests/test_work.py"} <= set(archive.namelist())
        assert b"--tags work --results ../results/results.json" in archive.read("run_autograder")
        assert b"torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" in archive.read("setup.sh")
    handout.zipped([], tmp_path / "b.zip", seed=5)
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        assert b"leaderboard ../submission --seed 5 --results ../results/results.json" in archive.read("run_autograder")


# ---- broken copies ----

def test_broken_copies_are_many_fit_the_code_and_are_spread_over_the_tags():
    bugs = handout.bugs()
    for bug in bugs:
        assert handout.broken(bug), "the text that it breaks is there once"
    number = {tag: sum(bug["tag"] == tag for bug in bugs) for tag in NEEDS}
    assert sum(number.values()) == len(bugs) >= 120 and min(number.values()) >= 6, number
    assert sum(bug["silent"] for bug in bugs) >= len(bugs) / 2, "half of them do not stop the loss from falling"


def test_a_bug_that_no_longer_fits_is_an_error(stub):
    with pytest.raises(handout.Unfit, match="work.py has 0 times, not once: 'x - x'"):
        handout.broken({"file": "work.py", "old": "x - x", "new": ""})


@pytest.fixture
def hunt(stub, tmp_path, monkeypatch):
    """A bug hunt with three bugs in two functions."""
    bugs = [{"tag": "lora", "file": "work.py", "old": old, "new": new, "word": "w"} for old, new in
            (("x + x", "x * x"), ("return y", "return x"), ("double(x) + 1", "double(x)"))]
    monkeypatch.setattr(handout, "bugs", lambda: bugs)
    (stub / "course").mkdir()
    (stub / "course" / "hunt.py").write_bytes((ROOT / "course" / "hunt.py").read_bytes())
    handout.make_hunt(["lora"], tmp_path / "hunt", 3, seed=1)
    return tmp_path / "hunt"


def test_a_hunt_hides_the_functions_that_its_bugs_are_in(hunt):
    text = (hunt / "work.py").read_text("utf-8")
    assert text.count("raise NotImplementedError") == 2 and "x + x" not in text
    assert not (hunt / "tests" / "test_work.py").exists(), "the tests are the student's to write"
    assert (hunt / "tests" / "test_mine.py").is_file() and (hunt / "hunt.txt").is_file()


@pytest.mark.slow
def test_a_hunt_says_how_many_are_caught_and_whether_the_right_one_passes(hunt):
    mine = hunt / "tests" / "test_mine.py"

    def hunted(code):
        mine.write_text(code, encoding="utf-8")
        done = subprocess.run([sys.executable, "hunt.py"], cwd=hunt, capture_output=True, text=True)
        return (done.stdout + done.stderr).strip().splitlines()[-1]
    assert hunted(CALLED) == "The right one passes. Caught: 2 of 3."
    assert hunted("def test_it(): assert False\n").startswith("The right one fails")
