"""Predict, then run: what the sheets ask, and whether you are right.

    python course/questions.py 4                 the questions of sheet 4
    python course/questions.py 4.1 12,288        is that the answer to question 4.1?

First write down what you expect and why, then ask here, and run the question's command last: it shows the value.
questions.json holds no answer but its scrypt hash, of the value rounded as the sheet says. That hinders and does not
hide: whoever tries all values finds the right one, and has learned less than the command would have told.

A question stands in its sheet like this, with nothing else between text and command (one of three ways of rounding):

    **4.1** How many parameters ...? *Exact.* | *To the nearest 5.* | *One word.*

        python train.py ...
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

HERE = Path(__file__).resolve().parent

QUESTION = re.compile(r"^\*\*(\d\.\d)\*\* ((?:.+\n)*?.+?)\s\*(?:(Exact)|To\s+the\s+nearest\s+([\d.]+)|One\s+word)\.\*"
                      r"\n\n    python (.+)$", re.MULTILINE)
NUMBER = re.compile(r"(\d[\d,]{0,20}(?:\.\d{1,10})?) ?%?")


@dataclass(frozen=True)
class Question:
    text: str
    step: Decimal | None  # what numbers are rounded to; None: the answer is a word
    command: str          # what is typed after python


def questions(folder=HERE / "sheets"):
    """{"4.1": Question} of all sheets, in their order."""
    return {number: Question(" ".join(text.split()), Decimal(step or 1) if exact or step else None, command)
            for path in sorted(folder.glob("*.md"))
            for number, text, exact, step, command in QUESTION.findall(path.read_text(encoding="utf-8"))}


def rounded(answer, step, steps=0):
    """The text that is hashed: of a number how many steps it is, and `steps` more; ValueError if it is none."""
    if step is None:
        return answer.strip().lower()
    if not (found := NUMBER.fullmatch(answer.strip())):
        raise ValueError(f"{answer[:30]!r} is no number: digits, with a point if need be")
    whole = (Decimal(found[1].replace(",", "")) / step).to_integral_value(ROUND_HALF_UP)
    return str(int(whole) + steps)


def digest(salt, text):
    return hashlib.scrypt(text.encode("utf-8"), salt=bytes.fromhex(salt), n=2**14, r=8, p=1, dklen=32).hex()


def verdict(answer, step, kept):
    """"right", "near" (a step to one side) or "wrong"; `kept` is the question's entry in questions.json."""
    for steps, said in ((0, "right"), (1, "near"), (-1, "near"))[:1 if step is None else 3]:
        if digest(kept["salt"], rounded(answer, step, steps)) == kept["hash"]:
            return said
    return "wrong"


def kept():
    return json.loads((HERE / "questions.json").read_text(encoding="utf-8"))


def main(argv):
    every = questions()
    if len(argv) not in (1, 2) or argv[0].startswith("-"):
        return print(__doc__)
    if len(argv) == 1:
        asked = [number for number in every if argv[0] in (number, number[0])]
        for number in asked:
            print(f"{number}  {every[number].text} ({how(every[number].step)})")
        return None if asked else f"{argv[0]}: there are the questions {', '.join(every)}"
    number, answer = argv
    if number not in every:
        return f"{number}: there are the questions {', '.join(every)}"
    try:
        said = verdict(answer, step := every[number].step, kept()[number])
    except ValueError as error:
        return str(error)
    print({"right": "Right.", "wrong": "Wrong. Why did you expect that? Then run the command.",
           "near": f"Near: off by one step of {step}, as may come from rounding. The command shows which."}[said])
    if said == "right":
        print(f"python {every[number].command}")


def how(step):
    return "one word" if step is None else "a whole number" if step == 1 else f"to the nearest {step}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
