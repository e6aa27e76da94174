"""`eval.py claims`: the survey, sentence by sentence, each with a number beside it.

    python eval.py claims                        all verdicts, derived from survey/runs.jsonl; nothing is trained
    python eval.py claims C16                    this one
    python eval.py claims --rerun C16 X1         measure again what these two need, and show both verdicts
    python eval.py claims --rerun all --write    measure everything, and write survey/runs.jsonl and LEDGER.md anew

What is measured again is kept in results.jsonl and shared: between claims, with `eval.py compare`, with `eval.py d90`.
C4, C26 and C37 are measured on a real checkpoint too, if --real-base and --real-data name one and its task.
"""

from pathlib import Path

from data import files
from harness import checks
from harness.settings import Parser, distinct, positive
from lab.runs import check
from model import Refused
from survey import adapters, cost, intrinsic, lora, shipped, soft, specification, today  # noqa: F401  (they enter claims)
from survey.ledger import CLAIMS, UNRUN, VERDICTS, Entry, in_order, markdown, plain
from survey.shared import MISSING, REAL, on_checkpoint


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


def ledger(bench):
    """All entries."""
    return [entry(claim, bench) for claim in in_order()]


def summary(entries, lines):
    counts = {verdict: sum(e.verdict == verdict for e in entries) for verdict in VERDICTS}
    told = [f"{number:>4}  {verdict}" for verdict, number in counts.items() if number]
    told.append(f"\n{shipped.of_other_code(lines):,} of the {len(lines):,} runs and measurements that this was derived "
                "from are of other code than today's.")
    if missing := [e.claim for e in entries if e.missing]:
        names, minutes = " ".join(c.name for c in missing), sum(c.minutes for c in missing)
        told.append(f"Not run, or not all of it: {names}\n{minutes:.0f} minutes of a core at most, since claims share "
                    f"runs: python eval.py claims --rerun {'all' if len(missing) > 9 else names} --write")
    return "\n".join(told)


def again(args, names, lines, header):
    """Measure again what the claims `names` need, and show them: (lines, header) with what was found."""
    seeds, folders = args.seeds or header.get("seeds", 3), None
    if args.write and header and args.rerun != ["all"] and seeds != header["seeds"]:
        raise Refused(f"--seeds {seeds}: what stays in {shipped.RUNS.name} has {header['seeds']}")
    if args.real_base:
        folders = {"base": str(Path(args.real_base).resolve()), "data": str(Path(args.real_data).resolve())}
    checks.writable(args.out, 0)
    bench = shipped.Recorder(args.out, seeds, folders)
    if folders:
        check(bench, [one for name in (*REAL, "full")
                      for one in bench.plan(name, (0,), **on_checkpoint(name, folders))])
    for name in names:
        found, before = (entry(CLAIMS[name], one) for one in (bench, shipped.Shipped(lines, **header)))
        print(plain(found, before) + "\n")
    names = folders and {kind: Path(folder).name for kind, folder in folders.items()}
    return lines | bench.lines, {"seeds": seeds, "real": names or header.get("real")}


def main(argv):
    parser = Parser("eval.py claims", __doc__)
    parser.add_argument("names", nargs="*", metavar="C16", help="show these claims [all]")
    parser.add_argument("--rerun", nargs="+", metavar="C16", help="measure again what these claims need, or all")
    parser.add_argument("--write", action="store_true", help="write survey/runs.jsonl and survey/LEDGER.md anew")
    parser.add_argument("--seeds", type=positive, help="how many seeds to run [as many as survey/runs.jsonl has]")
    parser.add_argument("--out", default="out", help="folder of results.jsonl [out]")
    parser.add_argument("--real-base", metavar="DIR", help="a checkpoint for C4, C26 and C37, say MiniLM")
    parser.add_argument("--real-data", metavar="DIR", help="its task, say SST-2, in train.tsv and dev.tsv")
    args = parser.parse_args(argv)
    names = [] if args.rerun == ["all"] else distinct("claims", [name.upper() for name in args.rerun or args.names])
    if unknown := [name for name in names if name not in CLAIMS]:
        raise Refused(f"{files.shown(unknown[0])}: the claims are {in_order()[0].name} to {in_order()[-1].name}")
    if args.rerun and args.names:
        raise Refused(f"{' '.join(args.names)} and --rerun {' '.join(args.rerun)}: name one of them")
    if bool(args.real_base) != bool(args.real_data):
        raise Refused("--real-base and --real-data go together")
    if not args.rerun and (args.seeds or args.real_base):
        raise Refused("--seeds and --real-base say what is run: they go with --rerun")
    lines, header = shipped.load(shipped.RUNS)
    if args.rerun:
        lines, header = again(args, names or [claim.name for claim in in_order()], lines, header)
    book = shipped.Shipped(lines, **header)
    if names and not args.rerun and not args.write:
        return print("\n\n".join(plain(entry(CLAIMS[name], book)) for name in names))
    entries = ledger(book)
    if not args.rerun:
        print("\n\n".join(map(plain, entries)) + "\n")
    print(summary(entries, lines))
    if args.write:
        shipped.write(book, lambda now: markdown(ledger(now), HOW.format(seeds=len(now.seeds))))
        print(f"wrote {shipped.RUNS} and {shipped.LEDGER}")


HOW = ("Derived by `python eval.py claims` from survey/runs.jsonl, which has every run and measurement that a verdict "
       "rests on; measured on a CPU, {seeds} seeds unless it says one.")
