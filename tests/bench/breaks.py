"""Which broken ideas does the suite notice? Every break of tests/breaks.json, one at a time.

    python tests/bench/breaks.py --tag lora
    python tests/bench/breaks.py --silent       with which of them does the loss fall all the same?

For each break: copy the checkout, replace one text, run pytest until the first failure. One line a break:
noticed or not, the idea, the first test that failed. The checkout itself is never touched; its suite must be
green before anything is broken. The test files nearest to the break run first, the slow ones last.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEXT = "laws", "model", "counts", "deltas", "generate", "tasks", "parity"  # after the break's own files
SLOW = "train", "compare", "costs", "command", "claims"                          # after all others
LIMIT = 600  # seconds; a suite that is not done by then has noticed


def copy(tree, to):
    """The files that git tracks or would track, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=tree, check=True,
                            capture_output=True).stdout.decode("utf-8")
    for name in filter(None, listed.split("\0")):
        if (tree / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / name, to / name)


def ordered(tree, entry):
    """All test files, nearest first."""
    names = {path.stem.removeprefix("test_"): f"tests/{path.name}" for path in tree.glob("tests/test_*.py")}
    first = list(dict.fromkeys((entry["tag"], Path(entry["file"]).stem, *NEXT)))
    last = [name for name in SLOW if name not in first]
    return [names[name] for name in (*first, *sorted(set(names) - {*first, *last}), *last) if name in names]


def broken(tree, entry, command):
    """`command`, run in a broken copy; or a text where the break cannot be applied, or at the limit."""
    with tempfile.TemporaryDirectory() as folder:
        copy(tree, Path(folder))
        if entry["file"]:
            path = Path(folder, entry["file"])
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            if text.count(entry["old"]) != 1:
                return f"{entry['file']} has {text.count(entry['old'])} times, not once: {entry['old']!r}"
            path.write_text(text.replace(entry["old"], entry["new"]), encoding="utf-8")
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"}
        try:
            return subprocess.run([sys.executable, *command], cwd=folder, env=env, timeout=LIMIT, capture_output=True,
                                  encoding="utf-8")
        except subprocess.TimeoutExpired:
            return f"not done after {LIMIT} s"


LOOP = """import sys, torch, train
from data import tasks
from deltas import attach, methods
from harness.settings import Settings
tasks.SIZES = {"dev": 30, "test": 10}
settings = Settings(methods()[sys.argv[1]](), base="gpt-xs", steps=60, device="cpu")
torch.manual_seed(0)
model, tokenizer, task = train.prepare(settings)
settings = settings.completed(task)
train.train(attach(settings.delta.for_task(task), model), task, tokenizer.pad, settings, print)
"""


def silent(tree, entry):
    """(does the loss fall all the same, the losses); the loop alone, without the checks that a run has around it."""
    method = {"fastfood": "intrinsic"}.get(entry["tag"], entry["tag"])
    method = method if (tree / "methods" / f"{method}.py").is_file() else "lora"
    done = broken(tree, entry, ["-c", LOOP, method])
    if isinstance(done, str):
        return None, done
    losses = [float(loss) for loss in re.findall(r"^step .* loss (\S+)", done.stdout, re.MULTILINE)]
    fell = done.returncode == 0 and sum(losses[-3:]) < sum(losses[:3])
    return fell, " ".join(map(str, losses)) if losses else done.stderr[-200:]


def run(tree, entry, tests):
    """(noticed, by which test); noticed is None where the break cannot be applied."""
    done = broken(tree, entry, ["-m", "pytest", "-xq", "-p", "no:cacheprovider", *(tests or ordered(tree, entry))])
    if isinstance(done, str):
        return (True if "not done" in done else None), done
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode != 0, failed[1] if failed else done.stdout[-300:] if done.returncode else ""


def main():
    entries = json.loads((ROOT / "tests" / "breaks.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to break, with its own tests")
    parser.add_argument("--tag", choices=sorted({entry["tag"] for entry in entries}), help="only these breaks")
    parser.add_argument("--jobs", type=int, default=1, help="copies tested at a time")
    parser.add_argument("--tests", nargs="+", help="test files instead of all")
    parser.add_argument("--silent", action="store_true", help="train in each copy instead of testing it")
    chosen = parser.parse_args()
    if not chosen.silent and (whole := run(chosen.tree, {"tag": "", "file": ""}, chosen.tests))[0]:
        sys.exit(f"the suite is red before anything is broken: {whole[1]}")

    def line(entry):
        noticed, test = silent(chosen.tree, entry) if chosen.silent else run(chosen.tree, entry, chosen.tests)
        word = {True: "silent", False: "loud"} if chosen.silent else {True: "noticed", False: "MISSED"}
        word = word.get(noticed, "ERROR")
        print(f"{word:8} {entry['tag']}: {entry['idea']}   [{test}]", flush=True)
        return noticed

    with ThreadPoolExecutor(chosen.jobs) as pool:
        found = list(pool.map(line, (entry for entry in entries if chosen.tag in (None, entry["tag"]))))
    yes, no = ("silent", "loud") if chosen.silent else ("noticed", "missed")
    print(f"{found.count(True)} of {len(found)} {yes}, {found.count(False)} {no}, {found.count(None)} not applied")
    sys.exit(None in found if chosen.silent else found.count(True) < len(found))


if __name__ == "__main__":
    main()
