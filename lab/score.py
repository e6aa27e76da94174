"""`eval.py score FILE`: rebuild base and delta from a saved file, score them, and show some answers."""

import argparse
import copy
from pathlib import Path

import torch

from data import tasks
from data.bases import load_base
from deltas import load, merge, read
from harness import results


def rebuild(path, base=None):
    """(model, tokenizer, task) of a delta file; `base` where the checkpoint has moved to another folder."""
    notes = read(path)["notes"]
    where = folders(path, notes)
    torch.manual_seed(notes["seed"])  # so that a run from scratch starts from the same random weights again
    model, tokenizer = load_base(base or where["base"], notes["scratch"])
    task = tasks.load_task(notes["task"], tokenizer, model.config, where["data"], notes["examples"], notes["seed"])
    return load(path, model).eval(), tokenizer, task


def folders(path, notes):
    """Where base and data of a delta file are: the file has names only, results.jsonl beside it the folders."""
    for record in reversed(results.read(Path(path).parent)):
        if record.get("file") == Path(path).name and "where" in record:
            return record["where"]
    return {"base": notes["base"], "data": notes["data"]}


@torch.no_grad()
def apart(model, merged, task, pad):
    """The largest difference of two models' logits on 64 examples."""
    worst = 0.0
    for _, ids, keep, _ in tasks.batches(task.reported[:64], 32, pad):
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


def show(examples, predicted, number):
    for example, answer in list(zip(examples, predicted))[:number]:
        mark = "=" if answer in example.answers else "x"
        print(f"\n  text      {example.text}\n  wanted    {example.answers[0]}\n  answered  {answer}   {mark}")


def main(argv):
    parser = argparse.ArgumentParser(prog="eval.py score", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="a delta that train.py has saved")
    parser.add_argument("--split", choices=("dev", "test"), help="[test, or dev where there is no test]")
    parser.add_argument("--base", help="the checkpoint's folder, if it has moved")
    parser.add_argument("--merge", action="store_true",
                        help="fold the delta into the weights first, and say how far the logits move")
    parser.add_argument("--show", type=int, default=4, help="how many examples to show [4]")
    args = parser.parse_args(argv)
    model, tokenizer, task = rebuild(args.file, args.base)
    if not task.metric:
        raise ValueError(f"{args.file}: pretraining has no score; `python -m data.bases keep` probes what it learned")
    split = args.split or ("test" if task.test else "dev")
    examples = getattr(task, split)
    if not examples:
        raise ValueError(f"--split {split}: this task has no such file")
    print(f"file       {args.file}, {Path(args.file).stat().st_size:,} bytes\nmethod     {model.delta}")
    if args.merge:
        merged = merge(copy.deepcopy(model))
        print(f"merged     the logits of {type(merged).__name__} with plain weights are at most "
              f"{apart(model, merged, task, tokenizer.pad):.2g} away")
        model = merged
    predicted = tasks.predictions(model, task, examples, tokenizer)
    print(f"score      {tasks.score(task, examples, predicted):.2f} % {task.metric} on {len(examples)} of {split}")
    if not task.labels:
        print(f"           {bleu(examples, predicted)}")
    show(examples, predicted, args.show)
