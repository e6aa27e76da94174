"""`eval.py score FILE ...`: rebuild base and delta from a saved file, score them, and show some answers.

Several files take turns on one base, which is loaded once: a switch is what the next delta takes. With --text, or
one text a line on standard input, the answer and its probability are printed for each, and nothing else:

    python eval.py score FILE --text "the soup was cold"
    cat lines.txt | python eval.py score FILE > answers.tsv

The probability is that of the label among all labels; of a written text, that of a word of it, typically.
"""

import copy
import os
import stat
import sys
import time
from dataclasses import fields
from os.path import isdir
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from data import tasks
from data.bases import SHAPES, load_base
from data.files import field, shown
from deltas import detach, fingerprint, load, merge, methods, own_parameters, read
from harness import results
from harness.settings import Parser, Settings
from model import Refused

LONGEST = 2000  # characters of a text that is shown


def settings_of(path, **now):
    """The Settings of the run that saved a delta file; now: `base` and `data`, folders that have moved, or None."""
    content = read(path)
    where, notes = folders(path, content), content["notes"]
    for name, given in now.items():
        if given is not None and given not in SHAPES and not isdir(given):
            raise Refused(f"--{name} {shown(given, 300)}: no such folder")
        where[name] = where[name] if given is None else given
        if where[name] is not None and where[name] not in SHAPES and not isdir(where[name]):
            was = shown(where[name], 300)
            raise Refused(f"{path}: its {name}, {was}, is not here; --{name} DIR says where it is now")
    mine = {f.name: notes[f.name] for f in fields(Settings) if f.name in notes and f.name not in ("delta", "device")}
    try:
        return Settings(methods()[content["method"]](**content["settings"]), **mine | where)
    except Refused as error:
        raise Refused(f"{path}: {error}") from None


def folders(path, content):
    """{"base", "data"} of a delta file: it has the names only, results.jsonl beside it the folders.

    What is elsewhere is the name in angle brackets, which is no folder's. An older file, of format 1, has the
    folders itself.
    """
    notes = content["notes"]
    found = {"base": field(notes, "base", str, path), "data": notes.get("data") and field(notes, "data", str, path)}
    for record in reversed(results.read(Path(path).parent)):
        where = record.get("where")
        if record.get("file") == Path(path).name and isinstance(where, dict) and isinstance(where.get("base"), str):
            return {"base": where["base"], "data": where.get("data") and str(where["data"])}
    known = content["format"] == 1
    return {name: value if value is None or known or value in SHAPES else f"<{value}>" for name, value in found.items()}


class Base:
    """A base in memory; where `several` deltas take turns on it, it is itself again between them.

    `ms` is the time of loading it, `bytes` its size.
    """

    def __init__(self, settings, several=False):
        begin, self.several = time.perf_counter(), several
        torch.manual_seed(settings.seed)  # so that a run from scratch starts from the same random weights again
        model, self.tokenizer = load_base(settings.base, settings.scratch)
        self.model, self.config = model.to(settings.device).eval(), model.config
        self.ms, self.bytes = 1000 * (time.perf_counter() - begin), sum(p.nbytes for p in model.parameters())
        self.mark = self.fingerprint() if several else None
        self.known = {self.mark}

    def fingerprint(self):
        return fingerprint(own_parameters(self.model), self.config)

    def task(self, path, settings):
        """The task that the delta in the file was trained on."""
        task = tasks.load_task(settings.task, self.tokenizer, self.config, settings.data, settings.examples,
                               settings.seed)
        same(path, task)
        return task

    def switch(self, path, settings):
        """The model with the delta of this file, in the precision of its run, and the milliseconds that it took."""
        begin = time.perf_counter()
        self.plain()
        self.model = load(path, self.model, restorable=self.several, known=self.known).eval()
        train.to_precision(self.model, settings.dtype)
        self.known.add(self.model.base_fingerprint)
        return self.model, 1000 * (time.perf_counter() - begin)

    def plain(self):
        """No delta any more."""
        if getattr(self.model, "delta", None) is not None:
            self.model = detach(self.model)


def rebuild(path):
    """(model, tokenizer, task) of a delta file, in the precision of its run."""
    settings = settings_of(path, base=None, data=None)
    base = Base(settings)
    task = base.task(path, settings)
    return base.switch(path, settings)[0], base.tokenizer, task


def one_base(paths, every):
    """Refuse files whose runs had not one base."""
    names = [shown(settings.base, 300) + " from random weights" * settings.scratch for settings in every]
    for path, name in zip(paths, names):
        if name != names[0]:
            raise Refused(f"{path}: its base is {name}, and that of {paths[0]} is {names[0]}; deltas take turns on one")


def same(path, task):
    """Refuse a task whose labels, or their words, are not those that the delta in the file was trained on."""
    notes = read(path)["notes"]
    for name, here, what in (("labels", task.labels, "labels"), ("label_words", task.words, "tokens of label words")):
        if name in notes and notes[name] != here:
            then, now = (shown(value) if value else "none" for value in (notes[name], here))
            raise Refused(f"{path}: trained on a task whose {what} are {then}; here they are {now}")


@torch.no_grad()
def apart(model, merged, task, pad):
    """The largest difference of two models' logits on 64 examples."""
    worst, device = 0.0, next(model.parameters()).device
    for _, *batch in tasks.batches(task.reported[:64], 32, pad):
        ids, keep, _ = (t.to(device) for t in batch)
        difference = (model(ids, keep) - merged(ids, keep)).abs()[keep]
        worst = max(worst, difference.max().item())
    return worst


def bleu(examples, predicted):
    """Corpus BLEU against all references of each example, by sacrebleu; over characters where words have no spaces."""
    try:
        import sacrebleu
    except ImportError:
        return "BLEU needs sacrebleu: pip install sacrebleu"
    most = max(len(e.answers) for e in examples)
    references = [[tasks.spaced(e.answers[i]) if i < len(e.answers) else None for e in examples] for i in range(most)]
    return f"BLEU {sacrebleu.corpus_bleu(list(map(tasks.spaced, predicted)), references).score:.1f}"


def bootstrap(task, examples, predicted, draws=2000):
    """(low, high): the middle 95 % of scores when as many examples are drawn from these, with replacement."""
    each = torch.tensor([tasks.score(task, [e], [p]) for e, p in zip(examples, predicted)])
    generator = torch.Generator().manual_seed(0)
    found = [each[torch.randint(len(each), each.shape, generator=generator)].mean() for _ in range(draws)]
    return torch.stack(found).quantile(torch.tensor([0.025, 0.975])).tolist()


def piped():
    """The lines that reach this command through a pipe or from a file; none from a terminal or from nowhere."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # closed
        return []
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return []
    print("texts      from standard input, one a line", file=sys.stderr)
    with open(0, "rb", closefd=False) as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig").removesuffix("\n").split("\n") if content else []
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Refused(f"standard input: not UTF-8 (line {line})") from None


def tell(path, settings, base, texts, merged):
    """Print for each text the answer of the delta in the file, and its probability, with a tab between."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise Refused(f"text {number} of {len(texts):,}: it is empty")
    task = base.task(path, settings)
    if not task.metric:
        raise Refused(f"{path}: a pretrained base, which answers nothing")
    model, begin = base.switch(path, settings)[0], time.perf_counter()
    model = merge(model) if merged else model
    for start in range(0, len(texts), 8192):
        examples = [task.ask(text) for text in texts[start:start + 8192]]
        with settings.precision():
            for answer, probability in answers(model, task, examples, base.tokenizer):
                print(f"{shown(answer, LONGEST)}\t{probability:.4f}")
    speed, cut = len(texts) / (time.perf_counter() - begin), task.encoder.cut - task.cut
    how = f"by {settings.delta} in {settings.dtype} on {settings.device}"
    print(f"answered   {len(texts):,}, {speed:,.0f} a second, {how}"
          + f"; {cut} were cut to what the model reads" * (cut > 0), file=sys.stderr)


@torch.no_grad()
def answers(model, task, examples, tokenizer):
    """[(answer, probability)] of examples that task.ask has made, in batches of similar length."""
    found, device = [None] * len(examples), next(model.parameters()).device
    if not task.labels:
        written = tasks.predictions(model, task, examples, tokenizer)
        examples = [task.ask(e.text, answer) for e, answer in zip(examples, written)]
    for group, *batch in tasks.batches(examples, 64, tokenizer.pad):
        ids, keep, targets = (t.to(device) for t in batch)
        logits, wanted = tasks.answer(model, task, ids, keep, targets)
        if task.labels:
            likely, best = logits.float().softmax(dim=-1).max(dim=-1)                  # (B,), (B,)
            said = [task.labels[i] for i in best.tolist()]
        else:
            nats = F.cross_entropy(logits.float(), wanted, reduction="none")           # (N,), text after text
            likely = torch.stack([(-one.mean()).exp() for one in nats.split((targets != -100).sum(dim=1).tolist())])
            said = [written[i] for i in group]
        for i, *one in zip(group, said, likely.tolist()):
            found[i] = tuple(one)
    return found


def show(examples, predicted, number):
    for example, answer in list(zip(examples, predicted))[:number]:
        mark, lines = "=" if answer in example.answers else "x", (example.text, example.answers[0], answer)
        text, wanted, answered = (shown(line, LONGEST) for line in lines)  # from outside: no control characters
        print(f"\n  text      {text}\n  wanted    {wanted}\n  answered  {answered}   {mark}")


def main(argv):
    parser = Parser("eval.py score", __doc__)
    parser.add_argument("file", metavar="FILE", nargs="+", help="a delta that train.py has saved; several on one base")
    parser.add_argument("--text", help="answer this text instead; or one text a line on standard input")
    parser.add_argument("--split", choices=("dev", "test"), help="[test, or dev where there is no test]")
    parser.add_argument("--base", help="the checkpoint's folder, if it has moved", metavar="DIR")
    parser.add_argument("--data", help="the folder of the data, if it has moved", metavar="DIR")
    parser.add_argument("--merge", action="store_true",
                        help="fold the delta into the weights first, and say how far the logits move")
    parser.add_argument("--show", type=int, default=4, help="how many examples to show [4]")
    args = parser.parse_args(argv)
    if args.show < 0:
        raise Refused(f"--show {args.show}: a number of examples, 0 or more")
    texts = [args.text] if args.text is not None else piped()
    if texts and (args.split or len(args.file) > 1):
        more = f"--split {args.split}" if args.split else args.file[1]
        raise Refused(f"{more}: texts are answered by one FILE alone")
    every = [settings_of(path, base=args.base, data=args.data) for path in args.file]
    one_base(args.file, every)
    base = Base(every[0], several=len(every) > 1)
    if texts:
        return tell(args.file[0], every[0], base, texts, args.merge)
    for path, settings in zip(args.file, every):
        score(path, settings, base, args)
    if base.several:
        base.plain()
        if base.fingerprint() != base.mark:
            raise AssertionError("the base has changed")
        print(f"\nbase       loaded once, in {base.ms:.1f} ms: {base.bytes:,} bytes, the same bit for bit after "
              f"{len(every)} deltas")


def score(path, settings, base, args):
    """Score the delta of one file on a Base, and print what there is to say of it."""
    task, size = base.task(path, settings), Path(path).stat().st_size
    if not task.metric:
        raise Refused(f"{path}: pretraining has no score; `python -m data.bases keep` probes what it learned")
    split = args.split or ("test" if task.test else "dev")
    examples = getattr(task, split)
    if not examples:
        raise Refused(f"--split {split}: this task has no such file")
    model, ms = base.switch(path, settings)
    print(f"file       {shown(path, LONGEST)}, {size:,} bytes\nmethod     {model.delta}, in {settings.dtype}")
    if base.several:
        print(f"switch     {ms:.1f} ms, {size:,} bytes; the base alone {base.ms:.1f} ms, {base.bytes:,} bytes")
    if args.merge:
        merged = merge(copy.deepcopy(model))
        with settings.precision():
            far = apart(model, merged, task, base.tokenizer.pad)
        print(f"merged     the logits of {type(merged).__name__} with plain weights are at most {far:.2g} away")
        model = merged
    with settings.precision():
        predicted = tasks.predictions(model, task, examples, base.tokenizer)
    print(f"score      {tasks.score(task, examples, predicted):.2f} % {task.metric} on {len(examples)} of {split}")
    if not task.labels:
        print(f"           {bleu(examples, predicted)}")
    low, high = bootstrap(task, examples, predicted)
    print(f"           {low:.1f} to {high:.1f} in 95 % of draws of as many examples from these (bootstrap)")
    show(examples, predicted, args.show)
