"""How good are your tests? They run on copies with one bug each, and on the right one.

    python hunt.py

Write tests/test_mine.py. A bug is caught when one of your tests fails on its copy, as long as all of them pass on the
right one. The copies are in hunt.txt, packed, and exist as files only while your tests run on them: compare what the
code does with what it should do, not one copy with another.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECONDS = 120  # for all tests on one copy


def passes(tree, files):
    """(do all tests pass, what pytest printed)."""
    for name, text in files.items():
        (tree / name).write_bytes(text.encode("utf-8"))
    command = [sys.executable, "-m", "pytest", "-xq", "--tb=short", "-p", "no:cacheprovider", "tests/test_mine.py"]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
           "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=env, timeout=SECONDS, capture_output=True, encoding="utf-8")
    except subprocess.TimeoutExpired:
        return False, f"not done after {SECONDS} s"
    return done.returncode == 0, done.stdout


def main():
    packed = json.loads(zlib.decompress(base64.b64decode((HERE / "hunt.txt").read_text(encoding="ascii"))))
    with tempfile.TemporaryDirectory() as box:
        tree = Path(box, "tree")
        shutil.copytree(HERE, tree, ignore=shutil.ignore_patterns("__pycache__", ".git", "out", "hunt.txt"))
        right, said = passes(tree, packed["copies"][packed["right"]])
        if not right:
            print(said)
            sys.exit("The right one fails: a test of yours asks for what is not so, or there is none yet.")
        bugs = [files for i, files in enumerate(packed["copies"]) if i != packed["right"]]
        caught = sum(not passes(tree, files)[0] for files in bugs)
    print(f"The right one passes. Caught: {caught} of {len(bugs)}.")


if __name__ == "__main__":
    main()
