"""The course's desk: handouts, grading, Gradescope. Standard library only; tests and grading need torch and pytest.

    python course/assign.py list                                  a line a tag
    python course/assign.py make lora adapter -o handout          a repository with those functions emptied
    python course/assign.py make lora prefix --bugs 6 --seed 1 -o hunt      one to write tests in: six bugs to catch
    python course/assign.py grade SUBMISSION --tags lora,adapter --results results.json
    python course/assign.py leaderboard SUBMISSION --seed 5 --results results.json      the smallest delta; any seed
    python course/assign.py zip --tags lora,adapter -o autograder.zip       for Gradescope; or zip --leaderboard 5
    python course/assign.py check                                 what proves tasks, points, broken copies, questions
    python course/assign.py check ranges bar                      the sheets' experiments, the leaderboard: ten seeds
    python course/assign.py answers 4.1 4.2                       run questions' commands, keep the answers' hashes

The repository is the reference; a handout is built from it. It carries its version, a digest of the files that it was
made from, and submissions are graded by the repository that has the same one.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from course import check, grade, handout, leaderboard
from course.handout import ROOT, Unfit
from course.tasks import NEEDS, TASKS
from points import listed


def show():
    points, rows = listed(ROOT / "tests"), []
    for tag in NEEDS:
        tasks, mine = [task for task in TASKS if task.tag == tag], [n for n, t in points.values() if t == tag]
        for task in tasks:
            handout.removed(task)
        where = "; ".join(f"{file}: " + ", ".join(task.name for task in tasks if task.file == file)
                          for file in dict.fromkeys(task.file for task in tasks)) or "broken copies only"
        rows.append((tag, where, sum(mine), len(mine), sum(task.minutes for task in tasks) or "",
                     sum(bug["tag"] == tag for bug in handout.bugs())))
    for row in [("tag", "functions", "points", "tests", "minutes", "bugs"), *rows]:
        print("{:11} {:68} {:>6} {:>6} {:>8} {:>5}".format(*row))


def tag_list(text):
    return list(dict.fromkeys(text.split(",")))


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="a line a tag")
    one = commands.add_parser("make", help="a handout")
    one.add_argument("tags", nargs="+", metavar="TAG")
    one.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    one.add_argument("--bugs", type=int, metavar="N", help="a bug hunt with N broken copies instead")
    one.add_argument("--seed", type=int, default=0, help="draws the bugs")
    one = commands.add_parser("grade", help="grade a submission: a folder, its files flat or in their folders")
    one.add_argument("submission", type=Path)
    one.add_argument("--tags", type=tag_list, required=True)
    one.add_argument("--results", type=Path, required=True, help="Gradescope's results.json")
    one = commands.add_parser("leaderboard", help="count and score a saved delta: a folder with one file")
    one.add_argument("submission", type=Path)
    one.add_argument("--seed", type=int, required=True, help="draws the test; students do not know it")
    one.add_argument("--results", type=Path, required=True, help="Gradescope's results.json")
    one = commands.add_parser("zip", help="Gradescope's autograder")
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument("--tags", type=tag_list, default=[])
    what.add_argument("--leaderboard", type=int, metavar="SEED", help="for the smallest delta instead")
    one.add_argument("-o", "--out", type=Path, default=Path("autograder.zip"))
    one = commands.add_parser("check", help="that tasks, points, broken copies and questions are what they claim to be")
    one.add_argument("parts", nargs="*", default=[*NEEDS, "questions"], metavar="PART",
                     help="tags, questions, ranges, bar [tags and questions]")
    one.add_argument("--jobs", type=int, default=2, help="copies tested at a time")
    one = commands.add_parser("answers", help="when a question is new or its answer has changed: keep its hash")
    one.add_argument("numbers", nargs="+", metavar="NUMBER")
    given = parser.parse_args(given)
    try:
        return run(given)
    except (Unfit, grade.Fault, OSError) as error:
        sys.exit(f"{given.command}: {error}")  # status 1, and nothing has been written


def run(given):
    if given.command == "list":
        show()
    elif given.command == "make" and given.bugs:
        handout.make_hunt(given.tags, given.out, given.bugs, given.seed)
    elif given.command == "make":
        handout.make(given.tags, given.out)
    elif given.command == "grade":
        print(grade.grade(given.submission, given.tags, given.results))
    elif given.command == "leaderboard":
        print(leaderboard.enter(given.submission, given.seed, given.results))
    elif given.command == "zip":
        handout.zipped(given.tags, given.out, given.leaderboard)
    elif given.command == "answers":
        check.answered(given.numbers)
    else:
        return check.check(given.parts, given.jobs)


if __name__ == "__main__":
    sys.exit(main())
