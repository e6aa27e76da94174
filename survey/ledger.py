"""The frame of the survey's ledger: what a claim is, how its verdict is reached, how an entry is printed.

A claim is a function whose docstring is its entry; survey/cost.py and the files beside it hold them:

    @claim("E", minutes=2)
    def c16_prompts_are_touchy(bench):
        '''The survey's sentence, in our own words.

        Origin: where it really comes from.
        Measured: what we measure.
        Article: what the survey's article has wrong, where it has.
        Tests: tests/test_prompt.py::test_...
        '''
        records = bench.tuned("prompt", length=5)
        bench.note(f"The prompt scores {pm(scores(records))}.")
        return above(scores(records), 50)

Kinds: A counted, U exact on a tiny model, E experiment, D definition or history. A verdict is computed from
its numbers each time the ledger is printed: only finished runs and measurements are stored.
"""

import inspect
import math
import re
import textwrap
from dataclasses import dataclass, field

from lab.runs import interval, mean

HOLDS, FAILS, OPEN = "holds here", "does not hold here", "our sizes cannot decide"
COUNTS, DEFINES, WRONG = "holds by counting", "is a definition", "is wrong in the article"
UNRUN = "not run yet"
VERDICTS = (HOLDS, FAILS, OPEN, COUNTS, DEFINES, WRONG, UNRUN)
PARTS = ("Origin", "Measured", "Article", "Tests")
CLAIMS = {}  # "C16": Claim, in the order in which their files were imported


@dataclass
class Claim:
    name: str
    kind: str
    minutes: float         # of one core, for what has to be trained or timed; 0 if nothing has
    answer: object         # the function: Bench -> verdict
    sentence: str
    parts: dict            # {"Origin": text, ...}, of PARTS

    @property
    def command(self):
        return f"python eval.py claims {self.name}"


@dataclass
class Entry:
    claim: Claim
    verdict: str = UNRUN
    notes: list = field(default_factory=list)  # the numbers, sentence by sentence

    @property
    def missing(self):
        """Has something not been run, even if the verdict does not depend on it?"""
        return any(note.startswith("Not run: ") for note in self.notes)


def claim(kind, minutes=0.0):
    """Enter a function into CLAIMS, under the C-number that its name begins with."""
    def enter(answer):
        sentence, rest = inspect.cleandoc(answer.__doc__).split("\n\n", 1)
        pieces = [" ".join(text.split()) for text in re.split(rf"^({'|'.join(PARTS)}): ", rest, flags=re.M)]
        name = answer.__name__.split("_")[0].upper()
        CLAIMS[name] = Claim(name, kind, minutes, answer, " ".join(sentence.split()),
                             dict(zip(pieces[1::2], pieces[2::2])))
        return answer
    return enter


def in_order():
    """All claims, by their number."""
    return sorted(CLAIMS.values(), key=lambda claim: int(claim.name[1:]))


# ---- verdicts ----

def above(values, bar):
    """Holds if the 95 % interval of the mean lies at or above `bar`, fails if below it, and else is open."""
    centre, half = mean(values), interval(values)
    return HOLDS if centre - half >= bar else FAILS if centre + half < bar else OPEN


def below(values, bar):
    """The same, with the interval at or below `bar`."""
    return above([-value for value in values], -bar)


def together(*verdicts):
    """Of several conditions: one that fails decides, then one that is open."""
    return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


def most(verdicts):
    """What more than half of them say, or open."""
    return next((v for v in (HOLDS, FAILS) if 2 * list(verdicts).count(v) > len(verdicts)), OPEN)


def pm(values, digits=1):
    """The mean and half its 95 % interval, as text; a single value has none."""
    return f"{mean(values):.{digits}f}" + (f" ± {interval(values):.{digits}f}" if len(values) > 1 else "")


def minus(first, second):
    """Differences of scores, paired by seed: equal seeds mean equal training examples."""
    return [a["score"] - b["score"] for a, b in zip(first, second)]


def share(first, second):
    """Scores of the first in percent of the second's, paired by seed; NaN, which decides nothing, of zero."""
    return [100 * a["score"] / b["score"] if b["score"] else math.nan for a, b in zip(first, second)]


# ---- printing ----

def plain(entry):
    """An entry for the terminal."""
    rows = {"comes from": entry.claim.parts["Origin"], "measured": entry.claim.parts["Measured"],
            "numbers": " ".join(entry.notes), "article": entry.claim.parts.get("Article"),
            "tests": entry.claim.parts.get("Tests"), "again": entry.claim.command}
    lines = [f"{entry.claim.name} ({entry.claim.kind})  {entry.verdict.upper()}",
             *textwrap.wrap(f'"{entry.claim.sentence}"', 106, initial_indent="   ", subsequent_indent="   ")]
    for name, text in rows.items():
        if text:
            lines += textwrap.wrap(text, 108, initial_indent=f"   {name:<12}", subsequent_indent=" " * 15,
                                   break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def markdown(entries, how):
    """The whole ledger as Markdown; `how` says with what it was measured."""
    counts = {verdict: sum(e.verdict == verdict for e in entries) for verdict in VERDICTS}
    lines = ["# The survey, claim by claim", "", how, "",
             "Kinds: A counted, U exact on a tiny model, E experiment, D definition or history. ± is half a "
             "95 % confidence interval over seeds.", "", "| verdict | claims | |", "|---|---|---|"]
    for verdict, number in counts.items():
        if number:
            names = [e.claim.name for e in entries if e.verdict == verdict]
            links = ", ".join(f"[{name}](#{name.lower()})" for name in names)
            lines.append(f"| {verdict} | {number} | {links} |")
    for entry in entries:
        parts = entry.claim.parts
        lines += ["", f"## {entry.claim.name}", "", f"> {entry.claim.sentence}", "",
                  f"**{entry.verdict.capitalize()}.** {' '.join(entry.notes)}", "",
                  f"- Comes from: {parts['Origin']}", f"- Measured: {parts['Measured']}"]
        lines += [f"- In the article: {parts['Article']}"] if "Article" in parts else []
        tests = [f"`{test.strip()}`" for test in parts["Tests"].split(",")] if "Tests" in parts else []
        lines += [f"- Exact: {', '.join(tests)}"] if tests else []
        lines += [f"- Kind {entry.claim.kind}; again: `{entry.claim.command}`"]
    return "\n".join(lines) + "\n"
