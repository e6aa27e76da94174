"""The frame of the survey's ledger: what a claim is, how its verdict is reached, how an entry is printed.

A claim is a function whose docstring is its entry; survey/cost.py and the files beside it hold them:

    @claim("E", minutes=2)
    def c16_prompts_are_touchy(bench):
        '''The survey's sentence, in our own words.

        Origin: where it really comes from.
        Measured: what we measure.
        Rule: when it holds, when it fails, when it is open.
        Changed: what had another rule or setting until its number was seen, and that number.
        Article: what the survey's article has wrong, where it has.
        Tests: tests/test_prompt.py::test_...
        '''
        records = bench.tuned("prompt", length=5)
        bench.note(f"The prompt scores {pm(scores(records))}.")
        return above(scores(records), 50)

Kinds: A counted, U exact on a tiny model, E experiment, D definition or history. A verdict is computed from
its numbers each time the ledger is printed: only runs and measurements are stored.
"""

import inspect
import math
import re
import textwrap
from dataclasses import dataclass, field

from lab.runs import interval, mean

HOLDS, FAILS, OPEN = "holds here", "does not hold here", "our sizes cannot decide"
COUNTS, DEFINES, WRONG = "holds by counting", "is a definition", "is wrong in the article"
QUOTED = "as the paper measured, not derivable"
UNRUN = "not run yet"
VERDICTS = (HOLDS, FAILS, OPEN, COUNTS, DEFINES, WRONG, QUOTED, UNRUN)
PARTS = ("Origin", "Measured", "Rule", "Changed", "Article", "Tests")
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
        return f"python eval.py claims {'--rerun ' if self.minutes else ''}{self.name}"


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
    """Enter a function into CLAIMS, under the number that its name begins with: c16_..., x1_..."""
    def enter(answer):
        sentence, rest = inspect.cleandoc(answer.__doc__).split("\n\n", 1)
        pieces = [" ".join(text.split()) for text in re.split(rf"^({'|'.join(PARTS)}): ", rest, flags=re.M)]
        name = answer.__name__.split("_")[0].upper()
        CLAIMS[name] = Claim(name, kind, minutes, answer, " ".join(sentence.split()),
                             dict(zip(pieces[1::2], pieces[2::2])))
        return answer
    return enter


def in_order():
    """All claims by their number, the survey's (C) before those of today (X)."""
    return sorted(CLAIMS.values(), key=lambda claim: (claim.name[0], int(claim.name[1:])))


# ---- verdicts ----

def above(values, bar):
    """Holds if the 95 % interval of the mean lies at or above `bar`, fails if below it, and else is open."""
    centre, half = mean(values), interval(values)
    return HOLDS if centre - half >= bar else FAILS if centre + half < bar else OPEN


def below(values, bar):
    """The same, with the interval at or below `bar`."""
    return above([-value for value in values], -bar)


def fewer(first, second, n):
    """Of n runs each, do `first` fail less often than `second`? By Fisher's exact test, one-sided, at 5 %.

    No single run may decide: the answer has to stand with one failure more among those that fail less often.
    """
    def chance(a, b):
        a = min(a + 1, n)
        return sum(math.comb(n, i) * math.comb(n, a + b - i) for i in range(a + 1)) / math.comb(2 * n, a + b)
    return HOLDS if chance(first, second) < 0.05 else FAILS if chance(second, first) < 0.05 else OPEN


def together(*verdicts):
    """Of several conditions: one that fails decides, then one that is open."""
    return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


def pm(values, digits=1):
    """The mean and half its 95 % interval, as text; a single value has none."""
    return f"{mean(values):.{digits}f}" + (f" ± {interval(values):.{digits}f}" if len(values) > 1 else "")


def minus(first, second):
    """Differences of scores, paired by seed: equal seeds mean equal training and test examples."""
    return [a["score"] - b["score"] for a, b in zip(first, second)]


def share(first, second):
    """Scores of the first in percent of the second's, paired by seed; NaN, which decides nothing, of zero."""
    return [100 * a["score"] / b["score"] if b["score"] else math.nan for a, b in zip(first, second)]


# ---- printing ----

def plain(entry, before=None):
    """An entry for the terminal, the rule before its numbers; `before` is the same entry from the shipped runs."""
    parts = entry.claim.parts
    rows = {"comes from": parts["Origin"], "measured": parts["Measured"], "rule": parts["Rule"],
            "numbers": " ".join(entry.notes),
            "shipped": before and f"{before.verdict.upper()} {' '.join(before.notes)}",
            "changed": parts.get("Changed"), "article": parts.get("Article"),
            "tests": parts.get("Tests"), "again": entry.claim.command}
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
             "C1 to C44 are the survey's, X1 to X4 what is asked today. Kinds: A counted, U exact on a tiny model, E "
             "experiment, D definition or history. ± is half a 95 % confidence interval over seeds.", "",
             "| verdict | claims | |", "|---|---|---|"]
    for verdict, number in counts.items():
        if number:
            names = [e.claim.name for e in entries if e.verdict == verdict]
            links = ", ".join(f"[{name}](#{name.lower()})" for name in names)
            lines.append(f"| {verdict} | {number} | {links} |")
    for entry in entries:
        parts = entry.claim.parts
        lines += ["", f"## {entry.claim.name}", "", f"> {entry.claim.sentence}", "",
                  f"- Comes from: {parts['Origin']}", f"- Measured: {parts['Measured']}", f"- Rule: {parts['Rule']}",
                  "", f"**{entry.verdict.capitalize()}.** {' '.join(entry.notes)}", ""]
        lines += [f"- Changed after a number was seen: {parts['Changed']}"] if "Changed" in parts else []
        lines += [f"- In the article: {parts['Article']}"] if "Article" in parts else []
        tests = [f"`{test.strip()}`" for test in parts["Tests"].split(",")] if "Tests" in parts else []
        lines += [f"- Exact: {', '.join(tests)}"] if tests else []
        lines += [f"- Kind {entry.claim.kind}; again: `{entry.claim.command}`"]
    return "\n".join(lines) + "\n"
