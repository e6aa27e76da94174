"""survey/runs.jsonl: what all verdicts are derived from, without training. A source, and not a cache of anything.

    {"seeds": 3, "real": {"base": "minilm", "data": "sst2"}}                     names, no paths
    {"row": 0, "content": {"base": "3f0c...", "train.py": "91ab...", ...}}       a fingerprint, see harness/identity.py
    {"usual": {"method": "lora", "rank": 8, ...}}                                a technique's defaults by then
    {"run": {"method": "lora", "rank": 1}, "row": 0, "score": 83.3, ...}         settings that are not the usual ones
    {"measured": "weights moved", "of": {"run": {...}}, "row": 3, "moved": [4.1, ...]}

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
UNSAID = "device", "content"  # it does not matter where a run was made, and digests stand in its row


class Recorder(Bench):
    """A Bench that measures, as ever, and collects what it had: {address: (key, record)}."""

    def __init__(self, *given):
        super().__init__(*given)
        self.lines = {}

    def one(self, settings, choice):
        try:
            record = super().one(settings, choice)
        except Diverged as error:
            self.collect({"run": settings.plain}, {"diverged": str(error), "content": settings.key["content"]})
            raise
        return self.collect({"run": settings.plain}, record)

    def kept(self, name, measure, **settings):
        return self.collect({"measured": name, "of": settings}, super().kept(name, measure, **settings))

    def collect(self, key, record):
        self.lines[address(key)] = key, record
        return record


class Shipped(Bench):
    """A Bench that only looks up, in lines {address: (key, record)}, and notes what was read."""

    def __init__(self, lines, seeds=3, real=None):
        super().__init__(seeds=seeds, real=real)
        self.lines, self.found = lines, {}

    def one(self, settings, choice):
        record = self.look_up({"run": settings.plain}, f"{settings.delta.name} on {Path(settings.base).name}, "
                                                       f"{settings.task}, seed {settings.seed}")
        if "diverged" in record:
            raise Diverged(record["diverged"])
        return record

    def kept(self, name, measure, **settings):
        return self.look_up({"measured": name, "of": settings}, name)

    def look_up(self, key, what):
        if (place := address(key)) not in self.lines:
            raise NotRun(what)
        key, record = self.lines[place]
        run = key.get("run", {})
        return self.found.setdefault(place, Noted({**run, **record, "settings": run}))


class Noted(dict):
    """A record, and the names of those of its fields that were read."""

    def __init__(self, record):
        super().__init__(record)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


def said(key, usual):
    """A key without what is left unsaid, and without settings that are the `usual` {method: defaults}."""
    if not isinstance(key, dict):
        return key
    same = usual.get(key.get("method"), {})
    return {name: said(one, usual) for name, one in key.items()
            if name not in UNSAID and (name == "method" or name not in same or same[name] != one)}


def whole(key, usual):
    """The key that `said` has shortened."""
    return usual.get(key.get("method"), {}) | {name: whole(one, usual) for name, one in key.items()} if isinstance(
        key, dict) else key


def address(key):
    return json.dumps(said(key, {}), sort_keys=True)


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
            case {"usual": {"method": str(name)}}:
                usual[name] = line["usual"]
            case {"row": int(row), "content": dict(content)}:
                rows[row] = content
            case {"run": {"method": str()}, "row": row} | {"measured": str(), "of": dict(), "row": row} if row in rows:
                key = whole({name: line.pop(name) for name in ("run", "measured", "of") if name in line}, usual)
                if address(key) in lines:
                    raise Refused(f"{place}: this stands there twice")
                lines[address(key)] = key, line | {"content": rows[row]}
            case _:
                raise Refused(f"{place}: not a line of such a file: {files.shown(text)}")
    return lines, header


def write(bench, page):
    """Write both files anew: what was read from `bench`, a Shipped, and the page(Shipped) that is derived from that."""
    written = text(bench)
    files.replace(RUNS, lambda part: part.write_text(written, encoding="utf-8"))
    lines, header = load(RUNS)
    files.replace(LEDGER, lambda part: part.write_text(page(Shipped(lines, **header)), encoding="utf-8"))


def text(bench):
    """The file of what was read from `bench`: numbers with four decimal places, scores of curves with one."""
    rows, usual, body = [], {name: said(settings_of(name).plain, {}) for name in methods()}, []
    for place, record in bench.found.items():
        key, content = bench.lines[place][0], record["content"]
        rows += [content] if content not in rows else []
        body.append(said(key, usual) | {"row": rows.index(content)} | {
            name: json.loads(json.dumps(record[name]), parse_float=lambda text: round(float(text), digits))
            for name in sorted(record.read - {"settings", "content", *key.get("run", {})})
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
    return sum(any(digest != now(name, base) for name, digest in record["content"].items()
                   if name.endswith(".py") or name == "base" and base in SHAPES)
               for key, record in lines.values() for base in [key.get("run", {}).get("base")])
