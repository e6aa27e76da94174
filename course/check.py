"""That tasks, points and broken copies are what they claim to be: `python course/assign.py check`.

For each tag: the reference has full marks; emptied, every test of the tag fails with NotImplementedError, and of the
other tags just those go red that say that they need it; and every broken copy is noticed by a test of its tag, whose
name or message has the word of the bug's idea. And two parts that need no tag:

    questions    each question of the sheets has the answer that its command prints
    ranges       each sheet's experiment ends in the range that it states, over ten seeds; only if it is named
    bar          the leaderboard's bar lies two standard deviations above the majority class and the frozen base, and
                 LoRA of rank 1 is over it with ten seeds; only if it is named
"""

import json
import os
import re
import secrets
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

from course import grade, handout, leaderboard
from course import questions as sheets
from course.tasks import NEEDS, TASKS
from points import listed, marks, sentence

SEEDS = range(10)


def check(parts, jobs):
    """Print a line for all that is wrong, as it is found, then a line for each tag; 1 if anything is.

    `parts` are tags, and names in PARTS.
    """
    if unknown := set(parts) - {*NEEDS, *PARTS}:
        raise handout.Unfit(f"{min(unknown)}: choose from {', '.join([*NEEDS, *PARTS])}")
    tags = [tag for tag in parts if tag in NEEDS]
    begin, maxima, bugs = time.time(), listed(handout.ROOT / "tests"), handout.bugs()
    with copies(jobs) as (trees, pool):
        wrong = reference(trees, maxima) if tags else []
        if not wrong:
            wrong += said(pool.map(lambda tag: empty(trees, maxima, tag), filter(has_holes, tags)))
            wrong += said(pool.map(lambda bug: bug_of(trees, bug), [bug for bug in bugs if bug["tag"] in tags]))
            for name in (name for name in PARTS if name in parts):
                wrong += said(PARTS[name](trees, pool))
    if tags:
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


@contextmanager
def copies(jobs):
    """(a queue of fresh references, as many threads as there are of them)."""
    with tempfile.TemporaryDirectory(prefix="check-") as box, ThreadPoolExecutor(jobs) as pool:
        trees = Queue()
        Path(box).chmod(0o755)
        for i in range(jobs):
            trees.put(grade.reference(folder(Path(box, str(i)))))
        yield trees, pool


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


# ---- the sheets ----

EXPERIMENT = re.compile(r"^    python (.+)\n\n\*\*Expected: ([\d.]+) to ([\d.]+)\*\*", re.MULTILINE)


def printed(trees, command):
    """All that a sheet's command prints, run in a copy of the reference."""
    tree = trees.get()
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=tree, encoding="utf-8", stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    trees.put(tree)
    return done.stdout


def read(output, pattern):
    """The first group of a pattern in an output, or None."""
    found = re.search(pattern, output, re.MULTILINE)
    return found and found[1]


def questions(trees, pool):
    """What is wrong with the questions: lists of lines."""
    every, kept = sheets.questions(), sheets.kept()
    yield [f"question {number}: it stands in one of sheets and questions.json" for number in every.keys() ^ kept.keys()]
    commands = list(dict.fromkeys(question.command for question in every.values()))
    output = dict(zip(commands, pool.map(lambda command: printed(trees, command), commands)))
    for number in every.keys() & kept.keys():
        value = read(output[every[number].command], kept[number]["reads"])
        if value is None:
            yield [f"question {number}: no {kept[number]['reads']!r} in: {output[every[number].command][-500:]}"]
        elif (found := sheets.verdict(value, every[number].step, kept[number])) != "right":
            yield [f"question {number}: its command gives {value}, which is {found}"]


def ranges(trees, pool):
    """What is wrong with the ranges: lists of lines. Every line is printed as its ten seeds are done."""
    def of(experiment):
        command, low, high = experiment
        outputs = [printed(trees, f"{command} --seed {seed}") for seed in SEEDS]
        found = [float(read(output, r"^score +([\d.]+) %") or "nan") for output in outputs]
        print(f"{min(found):.1f} to {max(found):.1f}, expected {low} to {high}: {command}", flush=True)
        return [f"seed {seed}: {score:.1f} is not in {low} to {high}: {command}"
                for seed, score in zip(SEEDS, found) if not float(low) <= score <= float(high)]
    return pool.map(of, experiments())


def experiments():
    """[(command, lowest score, highest)] of all sheets, as texts."""
    return [found for path in sorted((sheets.HERE / "sheets").glob("*.md"))
            for found in EXPERIMENT.findall(path.read_text(encoding="utf-8"))]


ENTERS = f"train.py --method lora --rank 1 --base {leaderboard.BASE} --task {leaderboard.TASK} --no_baseline"
ROWS = "majority class", "frozen base", "lora"


def bar(trees, pool):
    """What is wrong with the leaderboard's bar: lists of lines. Each of ten seeds draws a test of its own."""
    outputs = pool.map(lambda seed: printed(trees, f"{ENTERS} --seed {seed}"), SEEDS)
    found = list(zip(*([float(read(output, rf"^{row} +([\d.]+)") or "nan") for row in ROWS] for output in outputs)))
    least = leaderboard.SHARE * leaderboard.FULL
    for name, scores in zip(ROWS, found):
        high = statistics.mean(scores) + 2 * statistics.stdev(scores)
        print(f"{name}: {min(scores):.1f} to {max(scores):.1f}, the bar is {least:.1f}", flush=True)
        if name != "lora" and not high < least:
            yield [f"the bar, {least:.1f}, is not two standard deviations above the {name}, {high:.1f}"]
    yield [f"the bar, {least:.1f}: seed {seed} of {ENTERS} has {score}"
           for seed, score in zip(SEEDS, found[-1]) if not score >= least]


PARTS = {"questions": questions, "ranges": ranges, "bar": bar}


def answered(numbers):
    """Keep the answers that these questions' commands give now in questions.json, each with a new salt."""
    every, kept = sheets.questions(), sheets.kept()
    with copies(1) as (trees, _):
        output = {command: printed(trees, command) for command in {every[number].command for number in numbers}}
    for number in numbers:
        value, salt = read(output[every[number].command], kept[number]["reads"]), secrets.token_hex(16)
        if value is None:
            raise handout.Unfit(f"{number}: no {kept[number]['reads']!r} in: {output[every[number].command][-500:]}")
        print(f"{number}  {value}  ({sheets.how(every[number].step)})")
        kept[number] |= {"salt": salt, "hash": sheets.digest(salt, sheets.rounded(value, every[number].step))}
    handout.write(sheets.HERE / "questions.json", json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
