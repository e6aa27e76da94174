"""How a command ends: refused, stopped, unread, or with a bug that shows its place."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import boundary
from model import Refused

ROOT = Path(__file__).parents[1]
SHORT = "--method bitfit --base gpt-xs --examples 12 --steps 3 --no_baseline --device cpu".split()


def test_what_ends_a_command_becomes_a_line_and_a_status(monkeypatch):
    monkeypatch.setattr(boundary, "kept", {"results": "finished runs are in out/results.jsonl"})
    full = OSError(errno.ENOSPC, "No space left on device", "out/a.pt")
    for error, line, status in (
            (Refused("rank=0: choose 1 or more"), "rank=0: choose 1 or more", 2),
            (full, "out/a.pt: No space left on device", 1),
            (KeyboardInterrupt(), "\ninterrupted; finished runs are in out/results.jsonl", 130),
            (boundary.Terminated(), "\ninterrupted; finished runs are in out/results.jsonl", 143),
            (BrokenPipeError(errno.EPIPE, "Broken pipe"), "", 141),
            (MemoryError(), "not enough memory: choose a smaller base, --batch_size, or shorter texts", 1),
            (ModuleNotFoundError("No module named 'torch'", name="torch"),
             "torch is not installed: pip install -r requirements.txt", 1),
            (RuntimeError("[pair.cc:537] Connection reset by peer. This is caused by a remote worker hanging"),
             "another process of this run has ended; finished runs are in out/results.jsonl", 1),
            (ValueError("a student's own"), None, 1), (AssertionError("a frozen tensor has changed"), None, 1)):
        assert boundary.ending(error) == (line, status), error


def test_a_bug_passes_the_boundary_and_a_refusal_does_not(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def raising(error):
        def main():
            raise error
        return main
    with pytest.raises(ValueError, match="a student's own"):
        boundary.run(raising(ValueError("a student's own")))
    with pytest.raises(SystemExit) as done:
        boundary.run(raising(Refused("k=9: this model has 2 blocks")))
    assert done.value.code == 2 and capsys.readouterr().err == "train.py: k=9: this model has 2 blocks\n"


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """{story: (status, stdout, stderr)} of commands that run side by side."""
    folder, started = tmp_path_factory.mktemp("ends"), {}
    broken = folder / "broken"
    broken.mkdir()
    for name in ("model.py", "deltas.py", "fastfood.py", "data", "harness"):
        (broken / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "train.py", broken)             # a script's folder is that of the file behind a link
    (broken / "methods").mkdir()
    for path in (ROOT / "methods").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == "bitfit.py":
            text = text.replace("module.bias.requires_grad_(True)", "int('a slip')")
        (broken / "methods" / path.name).write_text(text, encoding="utf-8")

    def heard():  # Ctrl-C, which whoever started pytest in the background may have turned off
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def start(story, *argv, cwd=ROOT, **more):
        started[story] = subprocess.Popen([sys.executable, *argv], cwd=cwd, stdout=subprocess.PIPE, text=True,
                                          stderr=subprocess.PIPE, env=os.environ | more, encoding="utf-8",
                                          preexec_fn=heard)
    start("refused", "train.py", "--method", "last_layer", "--k", "9", *SHORT[2:], "--out", str(folder / "a"))
    start("typed wrongly", "train.py", "--method", "magic")
    start("a student's slip", str(broken / "train.py"), *SHORT, "--out", str(folder / "b"), cwd=broken)
    start("not UTF-8", "train.py", "--method", "prefix", "--help", PYTHONIOENCODING="ascii")
    start("unread", "train.py", *SHORT, "--out", str(folder / "c"))
    started["unread"].stdout.close()
    start("Ctrl-C while torch loads", "train.py", *SHORT, "--out", str(folder / "d"))
    start("terminated", "train.py", *SHORT[:6], "--steps", "100000", *SHORT[8:], "--out", str(folder / "e"))
    maps, until = Path(f"/proc/{started['Ctrl-C while torch loads'].pid}/maps"), time.time() + 20
    while "torch" not in (maps.read_text(encoding="utf-8") if maps.exists() else "torch") and time.time() < until:
        time.sleep(0.01)
    started["Ctrl-C while torch loads"].send_signal(signal.SIGINT)
    next(line for line in started["terminated"].stdout if line.startswith("count"))
    started["terminated"].send_signal(signal.SIGTERM)
    found = {}
    for story, process in started.items():
        out = "" if process.stdout.closed else process.stdout.read()
        error = process.stderr.read()
        found[story] = process.wait(), out, error
    return found


@pytest.mark.parametrize("story, status, line", [
    ("refused", 2, "train.py: k=9: this model has 2 blocks, choose 1 to that many\n"),
    ("typed wrongly", 2, "train.py: argument --method: invalid choice: 'magic'"),
    ("unread", 141, ""), ("Ctrl-C while torch loads", 130, "\ninterrupted\n"), ("terminated", 143, "\ninterrupted"),
])
def test_a_command_ends_in_one_line(ended, story, status, line):
    code, _, error = ended[story]
    assert code == status and error.startswith(line) and len(error.strip().splitlines()) == bool(line), error


def test_a_slip_in_a_technique_shows_its_place(ended):
    code, _, error = ended["a student's slip"]
    assert code == 1 and "Traceback" in error and "bitfit.py" in error and "int('a slip')" in error


def test_output_that_a_terminal_cannot_take_degrades(ended):
    code, out, error = ended["not UTF-8"]
    assert code == 0 and not error and r"K]\u1d40" in out


def test_a_users_own_environment_stays_and_the_rest_is_set_before_torch_is_imported():
    """torch reads these variables once, while it is imported."""
    program = ("import os, sys; from harness import boundary; boundary.begin(); assert 'torch' not in sys.modules; "
               "print([os.environ[name] for name in boundary.ENVIRONMENT])")
    bare = {name: value for name, value in os.environ.items() if name not in boundary.ENVIRONMENT}
    for given, expected in (({}, "['1000', '64', '64']"), ({"GOMP_SPINCOUNT": "7"}, "['7', '64', '64']")):
        found = subprocess.run([sys.executable, "-c", program], env=bare | given, cwd=ROOT, text=True,
                               capture_output=True, check=True)
        assert found.stdout.strip() == expected, f"with {given}"
