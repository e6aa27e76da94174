"""That tasks, points and broken copies are what they claim to be: `python course/assign.py check`.

For each tag: the reference has full marks; emptied, every test of the tag fails with NotImplementedError, and of the
other tags just those go red that say that they need it; and every broken copy is noticed by a test of its tag, whose
name or message has the word of the bug's idea.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from course import grade, handout
from course.tasks import NEEDS, TASKS
from points import listed, marks, sentence


def check(tags, jobs):
    """Print a line for all that is wrong, as it is found, then a line for each tag; 1 if anything is."""
    begin, maxima, bugs = time.time(), listed(handout.ROOT / "tests"), handout.bugs()
    with tempfile.TemporaryDirectory(prefix="check-") as box, ThreadPoolExecutor(jobs) as pool:
        trees = Queue()
        Path(box).chmod(0o755)
        for i in range(jobs):
            trees.put(grade.reference(folder(Path(box, str(i)))))
        wrong = reference(trees, maxima)
        if not wrong:
            wrong += said(pool.map(lambda tag: empty(trees, maxima, tag), filter(has_holes, tags)))
            wrong += said(pool.map(lambda bug: bug_of(trees, bug), [bug for bug in bugs if bug["tag"] in tags]))
    print(f"{'tag':11} {'points':>6} {'tests':>6} {'bugs':>6} {'silent':>6} {'missed':>6}")
    for tag in tags:
        worth, mine = [n for n, t in maxima.values() if t == tag], [bug for bug in bugs if bug["tag"] == tag]
        missed = sum(line.startswith(f"bug of {tag}: ") for line in wrong)
        silent = sum(bug["silent"] for bug in mine)
        print(f"{tag:11} {sum(worth):6} {len(worth):6} {len(mine):6} {silent:6} {missed:6}")
    print(f"{'all is well' if not wrong else f'{len(wrong)} lines of what is wrong'}; {time.time() - begin:.0f} s")
    return int(bool(wrong))


def said(found):
    """All lines of all that was found, each printed as soon as it is there."""
    lines = []
    for some in found:
        lines += some
        print(*some, sep="\n", end="\n" * bool(some), flush=True)
    return lines


def folder(path):
    path.mkdir()
    return path


def has_holes(tag):
    return any(task.tag == tag for task in TASKS)


def reference(trees, maxima):
    tree = trees.get()
    outcomes, ended, _ = grade.tested(tree, list(NEEDS))
    trees.put(tree)
    found = marks(maxima, outcomes, outcomes, ended)
    return said([[f"the reference: {test}: {wrong}" for test, (_, _, wrong) in found.items() if wrong]])


def empty(trees, maxima, tag):
    """What is wrong when the functions of a tag are emptied."""
    tree, tasks = trees.get(), handout.tasks_of([tag])
    handout.empty(tree, tasks)
    outcomes, ended, _ = grade.tested(tree, list(NEEDS))
    for task in tasks:
        (tree / task.file).write_bytes((handout.ROOT / task.file).read_bytes())
    trees.put(tree)
    found = marks(maxima, outcomes, outcomes, ended)
    lines = [f"{tag} emptied: {test}: {wrong or 'green'}" for test, (_, _, wrong) in found.items()
             if maxima[test][1] == tag and "NotImplementedError: " not in wrong]
    red = {maxima[test][1]: test for test, (_, _, wrong) in found.items() if wrong and maxima[test][1] != tag}
    need = {other for other, needs in NEEDS.items() if tag in needs}
    lines += [f"{tag} emptied: {other} does not say that it needs it: {test}: {found[test][2]}"
              for other, test in red.items() if other not in need]
    return lines + [f"{tag} emptied: {other} says that it needs it, and stays green" for other in need - set(red)]


def bug_of(trees, bug):
    """What is wrong with a broken copy: nobody notices it, or what the first red test says is not its idea."""
    tree, text = trees.get(), handout.broken(bug)
    handout.write(tree / bug["file"], text)
    outcomes, ended, _ = grade.tested(tree, [bug["tag"]], "-x")
    handout.write(tree / bug["file"], handout.read(handout.ROOT / bug["file"]))
    trees.put(tree)
    case, wrong = next(((case, wrong) for case, wrong in outcomes.items() if wrong), ("", ""))
    if wrong and bug["word"].lower() in f"{sentence(case)}: {wrong}".lower():
        return []
    why = f"no {bug['word']!r} in [{sentence(case)}: {wrong}]" if wrong else f"no test notices it ({ended})"
    return [f"bug of {bug['tag']}: {bug['idea']}: {why}"]
