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
    """Print a line for each tag and for all that is wrong; 1 if anything is."""
    begin, maxima = time.time(), listed(handout.ROOT / "tests")
    with tempfile.TemporaryDirectory(prefix="check-") as box, ThreadPoolExecutor(jobs) as pool:
        trees = Queue()
        for i in range(jobs):
            trees.put(grade.reference(folder(Path(box, str(i)))))
        wrong = reference(trees, maxima)
        emptied = pool.map(lambda tag: empty(trees, maxima, tag), [tag for tag in tags if has_holes(tag)])
        copies = pool.map(lambda bug: bug_of(trees, bug), [bug for bug in handout.bugs() if bug["tag"] in tags])
        wrong += [line for lines in emptied for line in lines]
        copies = list(copies)
    print(f"{'tag':11} {'points':>6} {'tests':>6} {'bugs':>5} {'noticed':>8} {'by word':>8} {'silent':>7}")
    for tag in tags:
        mine = [(noticed, named, bug) for noticed, named, bug, _ in copies if bug["tag"] == tag]
        worth = [n for n, t in maxima.values() if t == tag]
        print(f"{tag:11} {sum(worth):6} {len(worth):6} {len(mine):5} {sum(n for n, _, _ in mine):8} "
              f"{sum(w for _, w, _ in mine):8} {sum(bug.get('silent', False) for *_, bug in mine):7}")
        if len(mine) < 6:
            wrong.append(f"{tag}: {len(mine)} broken copies, not six")
    wrong += [f"{bug['tag']}: {bug['idea']}: {line}" for noticed, named, bug, line in copies if not (noticed and named)]
    print(*wrong, sep="\n")
    print(f"{len(copies)} broken copies; {len(wrong)} lines of what is wrong; {time.time() - begin:.0f} s")
    return int(bool(wrong))


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
    return [f"the reference: {test}: {wrong}" for test, (_, _, wrong) in found.items() if wrong]


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
             if maxima[test][1] == tag and not wrong.startswith("NotImplementedError")]
    red = {maxima[test][1]: test for test, (_, _, wrong) in found.items() if wrong and maxima[test][1] != tag}
    need = {other for other, needs in NEEDS.items() if tag in needs}
    lines += [f"{tag} emptied: {other} does not say that it needs it: {test}" for other, test in red.items()
              if other not in need]
    return lines + [f"{tag} emptied: {other} says that it needs it, and stays green" for other in need - set(red)]


def bug_of(trees, bug):
    """(is it noticed, is its word there, the bug, what the first red test says)."""
    tree, text = trees.get(), handout.broken(bug)
    handout.write(tree / bug["file"], text)
    outcomes, ended, _ = grade.tested(tree, [bug["tag"]], "-x")
    handout.write(tree / bug["file"], handout.read(handout.ROOT / bug["file"]))
    trees.put(tree)
    first = next(((case, wrong) for case, wrong in outcomes.items() if wrong), None)
    if first is None:
        return False, False, bug, f"NOT NOTICED ({ended})"
    line = f"{sentence(first[0])}: {first[1]}"
    return True, bug["word"].lower() in line.lower(), bug, f"no word {bug['word']!r} in [{line}]"
