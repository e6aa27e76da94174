"""results.jsonl: one line for every finished run, so that no table has to parse what was printed.

    method base task seed steps batch_size lr device dtype      what was run
    base_params delta_params head_params delta_percent          counts; delta_params are those that are stored
    trained_params stored_bytes                                 the delta while training; the file
    metric score dev_score frozen_score majority_score          in percent, on test (dev where there is no test)
    full_score relative                                         full fine-tuning of the same setting; score / full
    ms_per_step peak_mb memory_mb seconds curve                 curve: [step, dev score] on the way
    file settings                                               the saved delta; everything that decides the result
"""

import json
import os
from functools import lru_cache
from pathlib import Path

parse = lru_cache(maxsize=None)(json.loads)  # a comparison looks into the file a hundred times


def read(out):
    """All records of `out`/results.jsonl, to be read only; a line that a kill has torn is passed over."""
    path, found = Path(out) / "results.jsonl", []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(parse(line))
            except json.JSONDecodeError:
                continue
    return found


def append(out, record):
    """Add one line to results.jsonl, whole and on the disk before this returns."""
    path = Path(out) / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def find(out, key):
    """The newest record with these settings (None for `steps` stands for any number), or None."""
    wanted = {name: value for name, value in key.items() if not (name == "steps" and value is None)}
    for record in reversed(read(out)):
        same = record["settings"].keys() == key.keys()
        if same and all(record["settings"][name] == value for name, value in wanted.items()):
            return record
    return None
