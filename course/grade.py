"""Grading: the graded files of a submission, over a fresh reference, in a process that cannot write the results.

What is counted comes from the list of points and from a run of the reference just before: a submission earns the
points of a test if all the cases that are green there are green here. A crash, a hang, a SyntaxError or a missing file
is 0 of n with the reason. What is the grader's own fault (no torch, a full disk, a red reference) is a Fault: no score
is written, and an older one stays.

The child has limits on time, memory, processes and the size of files; all that it has started is killed before the
parent writes. When the parent is root, as on Gradescope, the child is a user of its own, who may write where all may,
and to one folder that is thrown away. Only files of the tasks are taken from a submission: no conftest.py, no test.

What remains possible, since tests and tested code share a process:

- Code that is imported can change pytest, torch or the tests in memory. A test that must fail runs beside the others,
  so an outcome that is changed for all is noticed, and counts 0; one that is changed for chosen tests is not.
- It can write outcomes into the file that pytest's own go to, if it finds in memory the token that they begin with.
- It can compute what the tests expect and nothing else: the tests are in the handout.
- It can fetch the reference, which is public, where the machine has a network.
- It can fill the disk; then there is no score.
- Without root, or where Python is in root's own home, it is the same user as the grader: a child that leaves its
  process group outlives the grading and can write wherever the grader can, at any later time. So a teacher grades as
  root in a container, or reads first.

Points can be stolen, in short, by whoever reads this file. What is graded by hand is whether the code is understood.
"""

import importlib.util
import itertools
import json
import os
import pwd
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from course import handout
from points import listed, marks, sentence

SECONDS = 200       # for all tests of a run; one test has points.SECONDS
TORCH = importlib.util.find_spec("torch")
CUDA = TORCH is not None and (Path(TORCH.origin).parent / "lib" / "libtorch_cuda.so").exists()
MEMORY = 1536 << 20 if CUDA else 512 << 20  # of data, in bytes; `import torch` takes 740 MB of it, or 180
OUTPUT = 16 << 20   # the largest file that can be written, in bytes: what is printed goes to one
PROCESSES = 64      # and threads, where the child is a user of its own
LARGEST = 1 << 20   # a handed-in file, in bytes
USERS = itertools.count(20000 + os.getpid() % 30000)

CANARY = '''import pytest


@pytest.mark.points(1, "canary")
def test_canary():
    assert False, "this test must fail"
'''


class Fault(Exception):
    """The grader's own: there is no score."""


def grade(submission, tags, results):
    """Write Gradescope's results.json for a submission, and return one line about it."""
    begin, tasks, version = time.time(), handout.tasks_of(tags), handout.version()
    every = listed(handout.ROOT / "tests")
    maxima = {test: points for tag in tags for test, points in every.items() if points[1] == tag}
    root = top(submission)
    if (root / "VERSION").is_file() and (made := (root / "VERSION").read_text(errors="replace").strip()) != version:
        raise Fault(f"the handout has version {made[:40]!r}, this grader {version}")
    with tempfile.TemporaryDirectory(prefix="grade-") as box:
        tree = reference(Path(box))
        outcomes, ended, log = tested(tree, [*tags, "canary"])
        red = {test: wrong for test, (_, _, wrong) in marks(maxima, outcomes, outcomes, ended).items() if wrong}
        if red:
            raise Fault(f"the reference is red: {red}\n{log}")
        cases, notes = list(outcomes), lay(root, tasks, tree)
        outcomes, ended, log = tested(tree, [*tags, "canary"])
    if outcomes.get("test_canary.py::test_canary") == "":
        outcomes, ended = {}, "a test that must fail was said to be green: pytest is not what it was"
    found = marks(maxima, cases, outcomes, ended)
    if any(ended in wrong for _, _, wrong in found.values()):
        notes += [ended, log]
    tests = [{"name": sentence(test), "number": str(i), "score": points, "max_score": most, "output": wrong,
              "status": "failed" if wrong else "passed", "tags": [maxima[test][1]]}
             for i, (test, (points, most, wrong)) in enumerate(found.items(), 1)]
    written(results, {"execution_time": round(time.time() - begin), "output": "\n".join(notes), "tests": tests})
    return f"points: {sum(t['score'] for t in tests)} / {sum(t['max_score'] for t in tests)}"


def written(path, content):
    """The whole file or none of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


# ---- what is handed in ----

def reference(box):
    """A fresh copy of the reference, readable for all."""
    os.umask(0o022)
    box.chmod(0o755)
    tree = box / "reference"
    handout.copy(tree)
    points = listed(tree / "tests") | {"test_canary.py::test_canary": (1, "canary")}
    handout.write(tree / "tests" / "points.json", json.dumps(points))
    handout.write(tree / "tests" / "test_canary.py", CANARY)
    return tree


def top(submission):
    """The folder that holds what was handed in: a folder that stands alone in another is opened."""
    if not submission.is_dir():
        raise Fault(f"{submission} is no folder")
    while True:
        inside = [path for path in submission.iterdir() if not path.name.startswith((".", "__MACOSX"))]
        if len(inside) != 1 or not inside[0].is_dir() or inside[0].is_symlink():
            return submission
        submission = inside[0]


def lay(root, tasks, tree):
    """Lay the files of the tasks over the reference; what is not there is laid as the handout had it. Returns notes."""
    notes = []
    for file in dict.fromkeys(task.file for task in tasks):
        places = [root / file, root / Path(file).name]
        path = next((place for place in places if place.exists()), places[0])
        if not path.is_file():
            wrong = "was not handed in"
        elif path.resolve() != root.resolve() / path.relative_to(root):
            wrong = "is a link: that is not read"
        elif path.stat().st_size > LARGEST:
            wrong = "is too large: that is not read"
        else:
            (tree / file).write_bytes(path.read_bytes())
            continue
        notes.append(f"{file} {wrong}")
        handout.empty(tree, [task for task in tasks if task.file == file])
    return notes


# ---- a process of its own ----

def tested(tree, tags, *options):
    """({case: "" or what is wrong}, what is wrong with a case that is not among them, the end of what was printed)."""
    user = spare_user()
    with (tempfile.TemporaryDirectory(prefix="scratch-") as scratch, tempfile.TemporaryFile() as told,
          tempfile.TemporaryFile() as log):
        if user is not None:
            os.chown(scratch, user, user)
        token = secrets.token_hex()
        os.write(told.fileno(), token.encode())
        ended = watched(command(told.fileno(), tags, options), user, cwd=tree, stdin=subprocess.DEVNULL, stdout=log,
                        stderr=log, pass_fds=[told.fileno()], start_new_session=True, preexec_fn=lambda: limit(user),
                        env=environment(scratch))
        return outcomes_in(told, token), ended, tail(log)


def command(told, tags, options):
    return [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "--only", ",".join(tags),
            "--tell", str(told), *options]


def environment(scratch):
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",  # all is graded on the CPU
            "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def limit(user):
    """Called in the child, before pytest."""
    for what, most in ((resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_FSIZE, OUTPUT), (resource.RLIMIT_CORE, 0),
                       (resource.RLIMIT_CPU, SECONDS), *([(resource.RLIMIT_NPROC, PROCESSES)] if user else [])):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def watched(argv, user, **how):
    """Run until the end or the limit, kill all that is left, and say how it ended."""
    who = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    child = subprocess.Popen(argv, **who, **how)
    try:
        status = child.wait(SECONDS)
        if status < 0:
            return f"the process was killed by {signal.Signals(-status).name} before this test was done"
        return f"the process ended with status {status} before this test was done"
    except subprocess.TimeoutExpired:
        return f"all tests together were not done after {SECONDS} s"
    finally:
        kill(child.pid, user)
        child.wait()


def kill(group, user):
    """The process group, and all processes of a user of the child's own: a group can be left, a user cannot."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
    patience = time.time() + 10
    while user is not None and (left := processes(user)):
        for how in (signal.SIGSTOP, signal.SIGKILL):  # what is stopped starts no other
            for pid in left:
                try:
                    os.kill(pid, how)
                except ProcessLookupError:
                    pass
        if time.time() > patience:
            raise Fault(f"processes of the submission are still there: {left}")
        time.sleep(0.01)


def processes(user):
    """The living processes of a user, by number."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.stat().st_uid == user and (path / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def spare_user():
    """The number of a user whom nobody is; None where there can be none: no root, or a Python that is root's alone."""
    for user in USERS if os.geteuid() == 0 else ():
        try:
            pwd.getpwuid(user)
        except KeyError:
            if not processes(user):
                try:
                    subprocess.run([sys.executable, "-c", ""], user=user, group=user, extra_groups=[], cwd="/")
                    return user
                except PermissionError:
                    return None
    return None


def outcomes_in(told, token):
    """What the plugin told, which knows the token; a case that was told twice is as wrong as it ever was."""
    told.seek(0)
    found = {}
    for line in told.read().decode("utf-8", "replace").splitlines():
        try:
            known, case, wrong = json.loads(line)
            if known == token:
                found[case] = found.get(case) or wrong
        except (ValueError, TypeError, RecursionError):
            pass
    return found


def tail(log):
    log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
    return "".join(c for c in log.read().decode("utf-8", "replace") if c.isprintable() or c == "\n")
