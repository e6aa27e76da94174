"""survey/runs.jsonl: what all verdicts are derived from, without training. A source, and not a cache of anything.

    {"seeds": 3, "real": {"base": "minilm", "data": "sst2"}}                     names, no paths
    {"row": 0, "content": {"base": "3f0c...", "train.py": "91ab...", ...}}       a fingerprint, see harness/identity.py
    {"usual": {"method": "lora", "rank": 8, ...}}                                a technique's defaults by then
    {"run": {"method": "lora", "rank": 1}, "row": 0, "score": 83.3, ...}         settings that are not the usual ones
    {"measured": "one block", "of": {"block": 3, ...}, "row": 3, "score": 94.7}  all settings

Of a run's results (harness/results.py has their names) those are here that a claim reads.
"""

import json
from pathlib import Path

from data import files
from data.bases import SHAPES
from deltas import methods
from harness import identity
from harness.settings import settings_of
from model import Refused
from survey.shared import Bench, NotRun
from train import Diverged

RUNS, LEDGER = (Path(__file__).parent / name for name in ("runs.jsonl", "LEDGER.md"))


def key(settings, **more):
    """What a record is found by, without where it was made, and without digests, which its row has."""
    return more | {name: value for name, value in settings.items() if name not in ("device", "content")}


def address(key):
    return json.dumps(key, sort_keys=True)


class Recorder(Bench):
    """A Bench that measures, as ever, and collects what it had: {address: (key, record)}."""

    def __init__(self, *given):
        super().__init__(*given)
        self.lines = {}

    def one(self, settings, choice):
        try:
            record = super().one(settings, choice)
        except Diverged as error:
            self.collect(key(settings.plain), {"diverged": str(error), "content": settings.key["content"]})
            raise
        return self.collect(key(settings.plain), record)

    def kept(self, name, measure, **settings):
        return self.collect(key(settings, measured=name), super().kept(name, measure, **settings))

    def collect(self, found_by, record):
        self.lines[address(found_by)] = found_by, record
        return record


class Shipped(Bench):
    """A Bench that only looks up, in lines {address: (key, record)}, and notes what was read."""

    def __init__(self, lines, seeds=3, real=None):
        super().__init__(seeds=seeds, real=real)
        self.lines, self.found = lines, {}

    def one(self, settings, choice):
        record = self.look_up(key(settings.plain), f"{settings.delta.name} on {Path(settings.base).name}, "
                                                   f"{settings.task}, seed {settings.seed}")
        if "diverged" in record:
            raise Diverged(record["diverged"])
        return record

    def kept(self, name, measure, **settings):
        return self.look_up(key(settings, measured=name), name)

    def look_up(self, found_by, what):
        if (place := address(found_by)) not in self.lines:
            raise NotRun(what)
        found_by, record = self.lines[place]
        return self.found.setdefault(place, Noted({**found_by, **record, "settings": found_by}))


class Noted(dict):
    """A record, and the names of those of its fields that were read."""

    def __init__(self, record):
        super().__init__(record)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


def load(path):
    """(lines, {"seeds", "real"}) of a file, empty if there is none. Refused for an odd line, with its number."""
    header, rows, usual, lines = {}, {}, {}, {}
    for number, text in enumerate(files.text(path).splitlines() if path.is_file() else (), 1):
        line = files.parsed(text, place := f"{path}, line {number}")
        for name in {"score", "dev_score"} & set(line):
            files.field(line, name, float, place, 0, 100)
        match line:
            case {"seeds": int(), "real": _}:
                header = line
                continue
            case {"usual": {"method": str(name)}}:
                usual[name] = line["usual"]
                continue
            case {"row": int(row), "content": dict(content)}:
                rows[row] = content
                continue
            case {"run": {"method": name}, "row": row} if name in usual and row in rows:
                found_by = usual[name] | line.pop("run")
            case {"measured": str(name), "of": dict(), "row": row} if row in rows:
                found_by = {"measured": line.pop("measured")} | line.pop("of")
            case _:
                raise Refused(f"{place}: not a line of such a file: {files.shown(text)}")
        if address(found_by) in lines:
            raise Refused(f"{place}: this stands there twice")
        lines[address(found_by)] = found_by, line | {"content": rows[line.pop("row")]}
    return lines, header


def write(bench, page):
    """Write both files anew: what was read from `bench`, a Shipped, and the page(Shipped) that is derived from that."""
    written = text(bench)
    files.replace(RUNS, lambda part: part.write_text(written, encoding="utf-8"))
    lines, header = load(RUNS)
    files.replace(LEDGER, lambda part: part.write_text(page(Shipped(lines, **header)), encoding="utf-8"))


def text(bench):
    """The file of what was read from `bench`: numbers with four decimal places, scores of curves with one."""
    rows, usual, body = [], {name: key(settings_of(name).plain) for name in methods()}, []
    for place, record in bench.found.items():
        found_by, content = bench.lines[place][0], record["content"]
        rows += [content] if content not in rows else []
        if "measured" in found_by:
            line = {"measured": found_by["measured"], "of": {k: v for k, v in found_by.items() if k != "measured"}}
        else:
            same = usual[found_by["method"]]
            line = {"run": {k: v for k, v in found_by.items() if k == "method" or k not in same or same[k] != v}}
        body.append(line | {"row": rows.index(content)} | {
            name: json.loads(json.dumps(record[name]), parse_float=lambda text: round(float(text), digits))
            for name in sorted(record.read - {"settings", "content", *found_by})
            for digits in [1 if name == "curve" else 4]})
    head = [{"seeds": len(bench.seeds), "real": bench.real}, *({"usual": one} for one in usual.values()),
            *({"row": number, "content": content} for number, content in enumerate(rows))]
    return "".join(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n" for line in head + body)


def of_other_code(lines):
    """How many lines were made by other code, or on other weights of a shipped base, than today's."""
    def now(name, base):
        if name == "base":
            return identity.together(identity.base_files(base))
        return identity.of_code(identity.ROOT / name) if (identity.ROOT / name).is_file() else None
    return sum(any(digest != now(name, found_by.get("base")) for name, digest in record["content"].items()
                   if name.endswith(".py") or name == "base" and found_by.get("base") in SHAPES)
               for found_by, record in lines.values())
