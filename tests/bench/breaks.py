"""Which broken ideas does the suite notice? Every break of tests/breaks.json, one at a time.

    python tests/bench/breaks.py --tag lora

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


def run(tree, entry, tests):
    """(noticed, by which test); noticed is None where the break cannot be applied."""
    with tempfile.TemporaryDirectory() as folder:
        copy(tree, Path(folder))
        if entry["file"]:
            path = Path(folder, entry["file"])
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            if text.count(entry["old"]) != 1:
                return None, f"{entry['file']} has {text.count(entry['old'])} times, not once: {entry['old']!r}"
            path.write_text(text.replace(entry["old"], entry["new"]), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *(tests or ordered(tree, entry))]
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"}
        try:
            done = subprocess.run(command, cwd=folder, env=env, timeout=LIMIT, capture_output=True, encoding="utf-8")
        except subprocess.TimeoutExpired:
            return True, f"not done after {LIMIT} s"
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode != 0, failed[1] if failed else done.stdout[-300:] if done.returncode else ""


def main():
    entries = json.loads((ROOT / "tests" / "breaks.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to break, with its own tests")
    parser.add_argument("--tag", choices=sorted({entry["tag"] for entry in entries}), help="only these breaks")
    parser.add_argument("--jobs", type=int, default=1, help="copies tested at a time")
    parser.add_argument("--tests", nargs="+", help="test files instead of all")
    chosen = parser.parse_args()
    if (whole := run(chosen.tree, {"tag": "", "file": ""}, chosen.tests))[0]:
        sys.exit(f"the suite is red before anything is broken: {whole[1]}")

    def line(entry):
        noticed, test = run(chosen.tree, entry, chosen.tests)
        word = {True: "noticed", False: "MISSED", None: "ERROR"}[noticed]
        print(f"{word:8} {entry['tag']}: {entry['idea']}   [{test}]", flush=True)
        return noticed

    with ThreadPoolExecutor(chosen.jobs) as pool:
        found = list(pool.map(line, (entry for entry in entries if chosen.tag in (None, entry["tag"]))))
    print(f"{found.count(True)} of {len(found)} noticed, {found.count(False)} missed, {found.count(None)} not applied")
    sys.exit(found.count(True) < len(found))


if __name__ == "__main__":
    main()
