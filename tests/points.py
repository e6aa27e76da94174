"""Points for tests: `pytest --only lora` runs the tests of a tag, says which ideas are wrong, and counts.

    @pytest.mark.points(3, "lora")     above a test: three points of the tag lora, all or nothing

Names and maxima are read off the text of the test files, or off points.json, the list that was fixed when a handout
was made; never off what was collected. So a test that is skipped, whose fixture fails or whose file cannot be
imported has 0 of its points, and a test with many cases has them once, if all are green.

Nothing but the standard library is imported here: course/ reads the same list without pytest.
"""

import ast
import json
import os
import signal
from pathlib import Path

# Of the processor, however busy it is, for a graded test: a loop without an end is one red test, not an endless run.
SECONDS = 20


def listed(folder):
    """{"test_lora.py::test_lora_by_hand": (points, tag)} of all test files in `folder`, in the order of their text."""
    if (fixed := Path(folder, "points.json")).is_file():
        return {test: tuple(points) for test, points in json.loads(fixed.read_text(encoding="utf-8")).items()}
    found = {}
    for path in sorted(Path(folder).glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body if "mark.points(" in text else ():
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and getattr(mark.func, "attr", "") == "points":
                    found[f"{path.name}::{node.name}"] = tuple(ast.literal_eval(value) for value in mark.args)
    return found


def marks(maxima, cases, outcomes, otherwise="it was not run"):
    """{test: (points, of how many, "" or what is wrong)}.

    `outcomes` has a text for each case that ended, "" if it is green, and one for each file that could not be
    imported; `otherwise` is what is wrong with a case that never ended.
    """
    found = {}
    for test, (most, _) in maxima.items():
        mine = [case for case in cases if case.split("[")[0] == test] or [test]
        nothing = outcomes.get(test.split("::")[0], otherwise)
        red = ((case, outcomes.get(case, nothing)) for case in mine)
        wrong = next((f"{case[len(test):]} {text}".strip() for case, text in red if text), "")
        found[test] = 0 if wrong else most, most, wrong
    return found


def sentence(test):
    """The name of a test as words."""
    return test.split("::")[-1].removeprefix("test_").replace("_", " ")


# ---- the plugin ----

def pytest_addoption(parser):
    group = parser.getgroup("points")
    group.addoption("--only", metavar="TAG,TAG", help="run the tests that have points of these tags, and count")
    group.addoption("--tell", type=int, metavar="FD", help="write outcomes there, behind the token that it holds")


def pytest_configure(config):
    config.addinivalue_line("markers", "points(n, tag): worth n points of a tag, all or nothing; see --only")
    if config.getoption("only"):
        import pytest
        tags, every = set(config.getoption("only").split(",")), listed(Path(__file__).parent)
        if unknown := tags - {tag for _, tag in every.values()}:
            raise pytest.UsageError(f"--only {min(unknown)}: choose from {tags_of(every)}")
        config.option.continue_on_collection_errors = True
        maxima = {test: points for test, points in every.items() if points[1] in tags}
        config.pluginmanager.register(Points(config, maxima), "points of tags")


def tags_of(every):
    return ", ".join(dict.fromkeys(tag for _, tag in every.values()))


class Points:
    def __init__(self, config, maxima):
        self.config, self.maxima, self.cases, self.outcomes = config, maxima, [], {}
        self.running = ""            # what is wrong with the case that is running
        self.token = token_in(config.getoption("tell"))
        if hasattr(signal, "SIGPROF"):
            signal.signal(signal.SIGPROF, late)

    def pytest_ignore_collect(self, collection_path):
        mine = {test.split("::")[0] for test in self.maxima}
        return True if collection_path.is_file() and collection_path.name not in mine else None

    def pytest_collectreport(self, report):
        if report.failed and report.nodeid.endswith(".py"):
            self.ended(short(report.nodeid), idea(report))

    def pytest_itemcollected(self, item):
        if short(item.nodeid).split("[")[0] in self.maxima:
            self.cases.append(short(item.nodeid))

    def pytest_collection_modifyitems(self, items, config):
        other = [item for item in items if short(item.nodeid) not in self.cases]
        items[:] = [item for item in items if short(item.nodeid) in self.cases]
        config.hook.pytest_deselected(items=other)

    def pytest_runtest_setup(self, item):
        if hasattr(signal, "SIGPROF"):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)

    def pytest_runtest_teardown(self, item):
        if hasattr(signal, "SIGPROF"):
            signal.setitimer(signal.ITIMER_PROF, 0)

    def pytest_runtest_logreport(self, report):
        if report.when == "setup":
            self.running = ""
        if report.outcome != "passed":
            self.running = self.running or idea(report)
        if report.when == "teardown":
            self.ended(short(report.nodeid), self.running)

    def ended(self, case, wrong):
        self.outcomes[case] = wrong
        if self.config.getoption("tell") is not None:
            os.write(self.config.getoption("tell"), (json.dumps([self.token, case, wrong]) + "\n").encode())

    def pytest_unconfigure(self, config):
        """The last lines of all: a line for each red test, then the sum."""
        found = marks(self.maxima, self.cases, self.outcomes)
        write = config.pluginmanager.get_plugin("terminalreporter").write_line
        for test, (points, most, wrong) in found.items():
            if wrong:
                write(f"{points} / {most}  {sentence(test)}: {wrong}")
        write(f"points: {sum(p for p, _, _ in found.values())} / {sum(most for _, most, _ in found.values())}")


def short(nodeid):
    """A test's id without the folders of its file."""
    file, *rest = nodeid.split("::")
    return "::".join([file.split("/")[-1], *rest])


def idea(report):
    """What is wrong, in a line: what an assertion says, the hint of a hole, an error; why a test was skipped."""
    if report.outcome == "skipped":
        return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "skipped")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = [line.strip() for line in (crash.message if crash else str(report.longrepr)).splitlines() if line.strip()]
    line = (lines or [""])[0 if crash else -1].removeprefix("E ").strip().removeprefix("AssertionError: ")
    return line[:300] or "it failed"


def token_in(fd):
    """What the file holds; from here on it holds nothing."""
    if fd is None:
        return ""
    os.lseek(fd, 0, os.SEEK_SET)
    token = os.read(fd, 1000).decode()
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    return token


def late(*_):
    raise TimeoutError(f"not done after {SECONDS} s of the processor")
