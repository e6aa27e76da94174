"""Your own data: a folder with a train file, a dev file and perhaps a test file.

    train.tsv, dev.tsv, test.tsv         a header line, then text, tab, label; labels of any kind
    train.jsonl, dev.jsonl, test.jsonl   one {"prompt": ..., "completion": ...} a line, for generation
    train.csv, dev.csv, test.csv         E2E's columns mr,ref; equal mr in dev and test are one prompt with
                                         several right completions. E2E's own file names do as well:
                                         trainset.csv, devset.csv, testset_w_refs.csv
    template.json                        optional, beside tsv files, for a base with an LM head:
                                         {"template": "{text} It was [MASK].", "words": {"0": "bad", "1": "good"}}

Without a template.json the labels are learned by a Classifier. A row that cannot be read is an error that names
its file and line.
"""

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path


E2E = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}


@dataclass
class OwnData:
    name: str
    splits: dict                                   # split -> [(text or prompt, [answers])]
    labels: list = field(default_factory=list)     # empty: completions are to be written
    words: list = field(default_factory=list)      # of a template.json, one for each label
    template: str = ""
    metric: str = "overlap"


def read(folder):
    """Read a folder as OwnData. Raises ValueError, with file and line, for what cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    ending = kind(folder)
    if ending is None:
        raise ValueError(f"--data {folder}: holds none of train.tsv, train.jsonl, train.csv")
    reader = {"tsv": read_tsv, "jsonl": read_jsonl, "csv": read_csv}[ending]
    files = {split: found(folder, split, ending) for split in E2E}
    if not files["dev"].is_file():
        raise ValueError(f"{files['dev']}: missing; training is steered by a dev file")
    splits = {split: rows_of(path, reader) if path.is_file() else [] for split, path in files.items()}
    data = OwnData(folder.resolve().name, splits, metric="attributes" if ending == "csv" else "overlap")
    if ending == "tsv":
        data.labels = sorted({answers[0] for _, answers in splits["train"]})
        check_labels(data, files)
        read_template(data, folder / "template.json")
    else:
        data.splits = {split: rows if split == "train" else grouped(rows) for split, rows in splits.items()}
    return data


def kind(folder):
    """The ending of a folder's files, by its train file: tsv, jsonl, csv or None."""
    return next((e for e in ("tsv", "jsonl", "csv") if found(Path(folder), "train", e).is_file()), None)


def files(folder):
    """The paths of all that `read` reads in this folder, whether they are there or not; [] without a train file."""
    folder, ending = Path(folder), kind(folder)
    return [found(folder, split, ending) for split in E2E] + [folder / "template.json"] if ending else []


def found(folder, split, ending):
    """The file of a split; under E2E's name where only that is there."""
    plain, named = folder / f"{split}.{ending}", folder / E2E[split]
    return named if ending == "csv" and named.is_file() and not plain.is_file() else plain


def rows_of(path, reader):
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def read_tsv(path):
    rows = []
    for number, line in lines(path):
        cells = line.split("\t")
        if len(cells) != 2 or not cells[0].strip() or not cells[1].strip():
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is not text, one tab, label")
        if number > 1:  # the first line is the header
            rows.append((cells[0], [cells[1].strip()]))
    return rows


def read_jsonl(path):
    rows = []
    for number, line in lines(path):
        try:
            row = json.loads(line)
            rows.append((row["prompt"], [row["completion"]]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number}: not {{"prompt": ..., "completion": ...}}') from error
        if not all(isinstance(row[key], str) and row[key].strip() for key in ("prompt", "completion")):
            raise ValueError(f"{path}, line {number}: prompt and completion must be texts that are not empty")
    return rows


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or not {"mr", "ref"} <= set(reader.fieldnames):
            raise ValueError(f"{path}, line 1: the columns are {reader.fieldnames}, not mr,ref")
        rows = []
        for row in reader:
            if not row["mr"] or not row["ref"]:
                raise ValueError(f"{path}, line {reader.line_num}: mr or ref is empty")
            rows.append((row["mr"], [row["ref"]]))
    return rows


def lines(path):
    """(number, line) of all lines with something on them."""
    with open(path, encoding="utf-8") as file:
        yield from ((n, line.rstrip("\n")) for n, line in enumerate(file, start=1) if line.strip())


def grouped(rows):
    """Rows of the same prompt become one with several answers."""
    found = {}
    for prompt, answers in rows:
        found.setdefault(prompt, []).extend(answers)
    return list(found.items())


def check_labels(data, files):
    if len(data.labels) < 2:
        raise ValueError(f"{files['train']}: one label only, {data.labels[0]!r}; there is nothing to tell apart")
    for path in (files[split] for split in ("dev", "test") if data.splits[split]):
        for number, line in lines(path):
            label = line.split("\t")[1].strip()
            if number > 1 and label not in data.labels:
                raise ValueError(f"{path}, line {number}: label {label!r} is not in the train file, which has "
                                 f"{', '.join(data.labels)}")


def read_template(data, path):
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        data.template, data.words = content["template"], [content["words"][label] for label in data.labels]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: needs a template, and under words one word for each of the labels "
                         f"{', '.join(data.labels)}") from error
    if data.template.count("{text}") != 1 or data.template.count("[MASK]") != 1:
        raise ValueError(f"{path}: the template {data.template!r} needs {{text}} once and [MASK] once")
    if data.template.index("{text}") > data.template.index("[MASK]"):
        raise ValueError(f"{path}: the template {data.template!r} must have [MASK] behind {{text}}")


# ---- a reader program for E2E: which slots of the prompt does a text state? ----

def slots(mr):
    """`name[Aromi], food[Indian]` -> {"name": "Aromi", "food": "Indian"}"""
    return dict(re.findall(r"(\w+)\[([^\]]*)\]", mr))


def stated(text, mr):
    """The slots of `mr` whose value stands in `text`; for familyFriendly, that families are spoken of rightly."""
    low, found = text.lower(), {}
    for key, value in slots(mr).items():
        if key == "familyFriendly":
            spoken = re.search(r"famil|child|kid", low)
            denied = re.search(r"\b(not|no|non|isn't|aren't|adult)", low)
            said = spoken and bool(denied) == (value == "no")
        else:
            said = value.lower() in low
        if said:
            found[key] = value
    return found
