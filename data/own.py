"""Your own data: a folder with a train file, a dev file and perhaps a test file, all of one kind.

    train.tsv, dev.tsv, test.tsv         a header line, then text, tab, label; labels of any kind
    train.jsonl, dev.jsonl, test.jsonl   one {"prompt": ..., "completion": ...} a line, for generation; a space
                                         comes between them where tasks.gap says so
    train.csv, dev.csv, test.csv         E2E's columns mr,ref; equal mr in dev and test are one prompt with
                                         several right completions. E2E's own file names do as well:
                                         trainset.csv, devset.csv, testset_w_refs.csv
    template.json                        optional, beside tsv files, for a base with an LM head:
                                         {"template": "{text} It was [MASK].", "words": {"0": "bad", "1": "good"}}

Without a template.json the labels are learned by a Classifier. A test file without answers, as GLUE has them, is
left aside, and dev is reported. A row that cannot be read is an error that names its file and line.
"""

import csv
import dataclasses
import re
from dataclasses import dataclass
from os.path import isdir, lexists
from pathlib import Path

from data.files import field, json_of, parsed, shown, text
from model import Refused

E2E = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
QUOTED = re.compile(r'"((?:[^"]|"")*)"')             # a cell as a spreadsheet writes it, quotes inside doubled
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


class Unlabelled(Refused):
    """A file has texts, and no answers to them."""


@dataclass
class OwnData:
    name: str
    splits: dict                                     # split -> [(text or prompt, [answers])]
    labels: list = dataclasses.field(default_factory=list)  # empty: completions are to be written
    words: list = dataclasses.field(default_factory=list)   # of a template.json, one for each label
    template: str = ""
    metric: str = "overlap"
    about: str = ""                                  # where it is from, and what was left aside


def read(folder):
    """Read a folder as OwnData. Raises Refused, with file and line, for what cannot be read."""
    folder, ending = Path(folder), kind(folder)
    if not isdir(folder):
        raise Refused(f"--data {folder}: no such folder")
    if ending is None:
        raise Refused(f"--data {folder}: holds none of train.tsv, train.jsonl, train.csv")
    others = (found(folder, split, other) for other in READERS if other != ending for split in E2E)
    if stray := next(filter(lexists, others), None):
        raise Refused(f"--data {folder}: {stray.name} beside train.{ending}; one kind of file is read")
    data = OwnData(folder.resolve().name, {}, metric="attributes" if ending == "csv" else "overlap",
                   about=f"from {folder}")
    for split in E2E:
        path, rows = found(folder, split, ending), []
        if split == "dev" and not lexists(path):
            raise Refused(f"{path}: missing; training is steered by a dev file")
        try:
            rows = READERS[ending](path, data) if lexists(path) else []
        except Unlabelled:
            if split != "test":
                raise
            data.about += f"; {path.name} has no answers: dev is reported"
        data.splits[split] = rows if split == "train" or data.labels else grouped(rows)
    if lexists(folder / "template.json"):
        read_template(folder / "template.json", data)
    return data


def kind(folder):
    """The ending of a folder's files, by its train file: tsv, jsonl, csv or None."""
    return next((ending for ending in READERS if lexists(found(folder, "train", ending))), None)


def files(folder):
    """The paths of all that `read` reads in this folder, whether they are there or not; [] without a train file."""
    ending = kind(folder)
    return [found(folder, split, ending) for split in E2E] + [Path(folder) / "template.json"] if ending else []


def found(folder, split, ending):
    """The file of a split; under E2E's name where only that is there."""
    plain, named = Path(folder) / f"{split}.{ending}", Path(folder) / E2E[split]
    return named if ending == "csv" and lexists(named) and not lexists(plain) else plain


def few(names):
    """Some names for a message, ten at most."""
    names = list(names)
    return ", ".join(shown(name, 20) for name in names[:10]) + f" and {len(names) - 10:,} more" * (len(names) > 10)


# ---- tsv: texts and labels ----

def read_tsv(path, data):
    """[(text, [label])]; the labels of the training file, which is read first, become `data.labels`."""
    (line, *header), *rows = table(path)
    texts, labels = {text for _, text, _ in rows}, {label for _, _, label in rows}
    training, known = not data.labels, set(data.labels) or labels
    if header[0].lower() in ("index", "id", "idx") or labels == {"-1"} and "-1" not in known:
        raise Unlabelled(f"{path}, line {line}: no labels in the columns {few(header)}")
    if training and len(labels) > max(2, len(texts)):
        raise Refused(f"{path}, line {line}: {len(labels):,} labels ({few(sorted(labels))}) for {len(texts):,} "
                      "different texts; are the columns swapped? A row is text, tab, label")
    if header[1] in known | labels or NUMBER.fullmatch(header[1]):
        raise Refused(f"{path}, line {line}: '{shown(header[1])}' is a label, but the first line must be a header, "
                      "such as text, tab, label")
    if training and len(labels) < 2:
        raise Refused(f"{path}: one label only, '{shown(rows[0][2])}'; there is nothing to tell apart")
    for line, _, label in rows:
        if label not in known:
            raise Refused(f"{path}, line {line}: label '{shown(label)}' is not in the train file, which has "
                          f"{few(data.labels)}")
    data.labels = sorted(known)
    return [(text, [label]) for _, text, label in rows]


def table(path):
    """[(line, text, label)] of a tsv, the header first. A lone quote is part of the text, as in GLUE's files."""
    rows, quoted = [], False
    for line, written in lines(path):
        cells = written.split("\t")
        quoted |= not rows and all(map(QUOTED.fullmatch, cells))      # where the header is, every cell is
        cells = [unquoted(cell, quoted).strip() for cell in cells]
        if not rows and len(cells) > 2:
            raise Refused(f"{path}, line {line}: {len(cells)} columns ({few(cells)}); only text, tab, label is read, "
                          "and no pairs of sentences")
        if len(cells) != 2 or not all(cells):
            raise Refused(f"{path}, line {line}: '{shown(written)}' is not text, one tab, label")
        rows.append((line, *cells))
    return rows[:1] + some(rows[1:], path)


def unquoted(cell, always):
    """The content of a quoted cell: `always`, or if there are doubled quotes in it."""
    inside = QUOTED.fullmatch(cell)
    return inside[1].replace('""', '"') if inside and (always or '""' in inside[1]) else cell


def lines(path):
    """(number, line) of all lines with something on them."""
    return ((n, line) for n, line in enumerate(text(path).split("\n"), start=1) if line.strip())


def some(rows, path):
    if not rows:
        raise Refused(f"{path}: no rows")
    return rows


def read_template(path, data):
    if not data.labels:
        raise Refused(f"{path}: a template is only read beside tsv files")
    content = json_of(path)
    data.template, words = field(content, "template", str, path), field(content, "words", dict, path)
    data.words = [word.strip() if isinstance(word := words.get(label), str) else "" for label in data.labels]
    if "" in data.words or len(words) > len(data.words):
        raise Refused(f"{path}: words needs one word for each of the labels {few(data.labels)}, and no other; it has "
                      f"{shown(words)}")
    if data.template.count("{text}") != 1 or data.template.count("[MASK]") != 1:
        raise Refused(f"{path}: the template '{shown(data.template)}' needs {{text}} once and [MASK] once")
    if data.template.index("{text}") > data.template.index("[MASK]"):
        raise Refused(f"{path}: the template '{shown(data.template)}' must have [MASK] behind {{text}}")


# ---- jsonl and csv: prompts and completions ----

def read_jsonl(path, data):
    """[(prompt, [completion])]"""
    try:
        rows = some([(f"{path}, line {n}", parsed(line, f"{path}, line {n}")) for n, line in lines(path)], path)
        if not any("completion" in row for _, row in rows):
            raise Unlabelled(f"{rows[0][0]}: no 'completion', here and in all lines")
        found = [(*(field(row, name, str, place) for name in ("prompt", "completion")), place) for place, row in rows]
        for prompt, completion, place in found:
            if not prompt.strip() or not completion.strip():
                raise Refused(f"{place}: prompt and completion must be texts that are not empty")
    except Refused as error:
        raise type(error)(f'{error}; a line is {{"prompt": ..., "completion": ...}}') from None
    return [(prompt, [completion]) for prompt, completion, _ in found]


def read_csv(path, data):
    """[(mr, [ref])]"""
    (place, header), *rows = some(records(path), path)
    if [name.lower() for name in header] == ["mr"]:
        raise Unlabelled(f"{place}: no column ref")
    if header.count("mr") != 1 or header.count("ref") != 1:
        raise Refused(f"{place}: the columns are {few(header)}, not mr,ref")
    mr, ref = header.index("mr"), header.index("ref")
    for place, cells in some(rows, path):
        if len(cells) != len(header):
            raise Refused(f"{place}: {len(cells)} cells, {few(cells)}; the header has {len(header)}")
        if not slots(cells[mr]) or not cells[ref].strip():
            raise Refused(f"{place}: {few(cells)} is not an mr with slots such as name[Aromi], and a ref")
    return [(cells[mr], [cells[ref]]) for _, cells in rows]


def records(path):
    """[(path and line, cells)] of a csv."""
    written, line, found = [each + "\n" for each in text(path).split("\n")], 1, []
    reader = csv.reader(written, strict=True)
    try:
        for cells in reader:
            if "".join(written[line - 1:reader.line_num]).count('"') % 2:
                raise csv.Error("an odd number of quotes")
            found += [(f"{path}, line {line}", cells)] if cells else []
            line = reader.line_num + 1
    except csv.Error as error:
        raise Refused(f"{path}, line {line}: {error}; is a quote not closed?") from None
    return found


def grouped(rows):
    """Rows of the same prompt become one with several answers."""
    found = {}
    for prompt, answers in rows:
        found.setdefault(prompt, []).extend(answers)
    return list(found.items())


READERS = {"tsv": read_tsv, "jsonl": read_jsonl, "csv": read_csv}


# ---- a reader program for E2E: which slots of the prompt does a text state? ----

def slots(mr):
    """`name[Aromi], food[Indian]` -> {"name": "Aromi", "food": "Indian"}"""
    return dict(re.findall(r"(\w+)\[([^\]]*)\]", mr))


def stated(text, mr):
    """The slots of `mr` whose value stands in `text`; for familyFriendly, that families are spoken of rightly."""
    low, found = text.lower(), {}
    for key, value in slots(mr).items():
        if key == "familyFriendly":
            spoken = re.search(r"\b(family|families|child|children|kids?)\b", low)
            denied = re.search(r"\b(not|no|non|isn't|aren't|adults?)\b", low)
            said = spoken and bool(denied) == (value == "no")
        else:
            said = re.search(rf"(?<!\w){re.escape(value.lower())}", low)  # open at its end: "high" is said by "highly"
        if said:
            found[key] = value
    return found
