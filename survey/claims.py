"""`eval.py claims`: the survey, sentence by sentence, each with a number beside it.

    python eval.py claims                  the ledger as it stands; what has not been run says so
    python eval.py claims C16 C21          run what these two need, and show them
    python eval.py claims --run quick      all that fits into ten minutes on two cores, cheapest first
    python eval.py claims --run all        everything
    python eval.py claims --markdown survey/LEDGER.md

Runs are kept in results.jsonl and shared: between claims, with `eval.py compare`, with `eval.py d90`. C4, C26
and C37 are measured on a real checkpoint too, once --real-base and --real-data name one and its task.
"""

import math
import shlex
import time

from data import files
from harness import checks
from harness.settings import Parser, distinct, positive
from model import Refused
from survey import adapters, cost, intrinsic, lora, soft, specification  # noqa: F401  (they enter their claims)
from survey.ledger import CLAIMS, UNRUN, VERDICTS, Entry, in_order, markdown, plain
from survey.shared import MISSING, Bench

QUICK = 10  # minutes


def entry(claim, bench):
    """The Entry of a claim. What it noted before a run was missing stays; what is missing comes last."""
    bench.notes = []
    try:
        verdict = claim.answer(bench)
    except MISSING as missing:
        verdict = UNRUN
        bench.note(f"Not run: {missing}.")
    notes = sorted(dict.fromkeys(bench.notes), key=lambda note: note.startswith("Not run: "))
    return Entry(claim, verdict, notes)


def cheapest(minutes):
    """The names of the claims that fit into `minutes` together, cheapest first."""
    fitting, spent = [], 0.0
    for claim in sorted(in_order(), key=lambda claim: claim.minutes):
        if spent + claim.minutes <= minutes:
            fitting.append(claim.name)
            spent += claim.minutes
    return fitting


def ledger(bench, names=(), until=math.inf):
    """All entries; those in `names` are shown one after the other, what they lack is run until that time."""
    bench.until = until
    for name in names:
        bench.say(plain(entry(CLAIMS[name], bench)) + "\n")
    bench.until = 0.0
    return [entry(claim, bench) for claim in in_order()]


def summary(entries):
    counts = {verdict: sum(e.verdict == verdict for e in entries) for verdict in VERDICTS}
    lines = [f"{number:>4}  {verdict}" for verdict, number in counts.items() if number]
    if missing := [e.claim for e in entries if e.missing]:
        names, minutes = " ".join(c.name for c in missing), sum(c.minutes for c in missing)
        lines.append(f"\nNot run, or not all of it: {names}\n"
                     f"{minutes:.0f} minutes of a core: python eval.py claims --run all")
    return "\n".join(lines)


def main(argv):
    parser = Parser("eval.py claims", __doc__)
    parser.add_argument("names", nargs="*", metavar="C16", help="run and show these claims")
    parser.add_argument("--run", choices=("quick", "all"), help="run what fits in ten minutes, or everything")
    parser.add_argument("--seeds", type=positive, default=3, help="how many seeds [3]")
    parser.add_argument("--out", default="out", help="folder of results.jsonl [out]")
    parser.add_argument("--markdown", metavar="FILE", help="write the ledger to this file")
    parser.add_argument("--real-base", metavar="DIR", help="a checkpoint for C4, C26 and C37, say MiniLM")
    parser.add_argument("--real-data", metavar="DIR", help="its task, say SST-2, in train.tsv and dev.tsv")
    args = parser.parse_args(argv)
    names = [name.upper() for name in args.names]
    if unknown := [name for name in names if name not in CLAIMS]:
        raise Refused(f"{files.shown(unknown[0])}: the claims are C1 to C{len(CLAIMS)}")
    if distinct("claims", names) and args.run:
        raise Refused(f"{' '.join(names)} and --run {args.run}: name one of them")
    if bool(args.real_base) != bool(args.real_data):
        raise Refused("--real-base and --real-data go together")
    names = {None: names, "all": [claim.name for claim in in_order()], "quick": cheapest(QUICK)}[args.run]
    checks.writable(args.out, 0)
    if args.markdown:
        checks.writable_file("--markdown", args.markdown)
    bench = Bench(args.out, args.seeds, args.real_base and (args.real_base, args.real_data))
    begin = time.time()
    entries = ledger(bench, names, begin + 60 * QUICK if args.run == "quick" else math.inf)
    if not names:
        print("\n\n".join(plain(e) for e in entries) + "\n")
    print(summary(entries))
    if names:
        print(f"\n{time.time() - begin:.0f} s")
    if args.markdown:
        page = markdown(entries, how(args, entries))
        files.replace(args.markdown, lambda part: part.write_text(page, encoding="utf-8"))
        print(f"wrote {args.markdown}")


def how(args, entries):
    short = sum(entry.missing for entry in entries)
    written = files.shown(shlex.quote(args.markdown), 300)
    return (f"Written by `python eval.py claims --markdown {written}` from the runs of `claims`, "
            f"`compare`, `d90` and `lowdata` on a CPU, {args.seeds} seeds unless it says one. "
            + (f"{short} entries lack some or all of their runs, and say so." if short else "All are run."))
