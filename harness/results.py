"""results.jsonl: one line for every finished run, so that no table has to parse what was printed.

    method base task seed steps batch_size lr device dtype      what was run
    processes                                                   how many had a part of every batch each
    base_params delta_params head_params delta_percent          counts; delta_params are those that are stored
    trained_params stored_bytes                                 the delta while training; the file
    metric score dev_score frozen_score majority_score          in percent, on test (dev where there is no test)
    full_score relative                                         full fine-tuning of the same setting; score / full
    ms_per_step machine peak_mb memory_mb seconds curve         where it was timed; curve: [step, dev score]
    file settings content where                                 the saved delta; settings as given; digests of base,
                                                                data and code; the folders that settings only name

A line is written when a run ends, and once more when full fine-tuning of its setting is known: the newest counts.
A kept line is used as long as settings and content are the same: `once` is the one way to look it up.
"""

import json
import os
from functools import lru_cache
from pathlib import Path

from harness import boundary, identity, processes, state

said = set()  # what has changed is said once a command


def once(out, key, measure, say=print):
    """The kept record of `key`, or measure(), a dictionary, done now and appended. Both have settings and content.

    What a kept record rests on must be what it would rest on now: `content` in the key, or the core's code, and
    the file in which `measure` is written. If only the settings are the same, a line says what has changed.
    """
    wanted, content = find_by(key, measure)
    if record := processes.from_first(lambda: kept(out, wanted, content, say)):
        return record
    record = {"settings": wanted, "content": content} | measure()
    append(out, record)
    return record


def kept(out, wanted, content, say):
    """The newest record of these settings and this content, or None."""
    alike = [r for r in read(out) if r.get("settings") == wanted]
    for record in reversed(alike):
        if record.get("content") == content:
            return record
    if alike:
        changed = different(alike[-1].get("content") or {}, content)
        if (line := f"kept results are not used: {changed}") not in said:
            said.add(line)
            say(line)


def find_by(key, measure):
    """(settings, content) of a key as they come back from the file."""
    key = dict(key)
    content = key.pop("content", None) or identity.code()
    return json.loads(json.dumps([key, content | identity.code(measure=measure)]))


def different(old, new):
    """What has changed from one content to another, as a reader would say it."""
    if not old:
        return "they do not say which code they were made by"
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} changed since"


def read(out):
    """All records of `out`/results.jsonl, to be read only; a line that a kill has torn is passed over."""
    path = Path(out) / "results.jsonl"
    return lines(path, path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else []


@lru_cache(maxsize=1)  # a comparison looks into the file a hundred times
def lines(path, mtime, size):
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found += [record] if isinstance(record, dict) else []
    return found


def append(out, record):
    """Add one line to results.jsonl, whole and on the disk before this returns; others may append meanwhile.

    The state of the run that this line ends is removed. A record that cannot be written is printed.
    """
    if not processes.first():
        return
    path, line = Path(out) / "results.jsonl", json.dumps(record, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            os.write(file, ("\n" * bool(torn) + line + "\n").encode())  # in one piece, at what is the end by then
            os.fsync(file)
        finally:
            os.close(file)
    except OSError:
        print(line)
        raise
    if record.get("file"):
        state.of(Path(out) / record["file"]).unlink(missing_ok=True)
    boundary.kept["results"] = f"finished runs are in {path}, and the same command goes on from there"
