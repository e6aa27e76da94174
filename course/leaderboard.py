"""The smallest delta: who reaches 90 % of full fine-tuning with the fewest parameters?

    python train.py --method lora --rank 1                                       a student: any technique, any setting
    python course/assign.py leaderboard SUBMISSION --seed N --results results.json        a teacher: any N, kept secret

Handed in is one file that train.py has saved in out/, for its own base and task, gpt-s and rating. Counted is every
value of its tensors, the places that a mask keeps too. It is scored on the 600 test examples that seed N draws: a draw
that is known can be learned. Near the bar the draw decides, with a standard error of 1.4 points.

How it was trained is free. What is in no tensor is not counted: a projection's seed may be the best of a hundred. The
file can run nothing; `deltas.load` reads it, in a process with grade.py's limits.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from course import grade
from course.handout import ROOT

BASE, TASK = "gpt-s", "rating"
FULL = 97.0  # full fine-tuning's accuracy, the mean of three seeds and their draws: python eval.py compare
SHARE = 0.9


def enter(submission, seed, results):
    """Write Gradescope's results.json, with rows for the leaderboard if the delta enters; return one line about it."""
    begin, (found, why) = time.time(), handed_in(submission)
    if not why:
        found = measured_apart(found, seed)
        why = found.get("refused", "")
    if not why and found["score"] < SHARE * FULL:
        why = f"{found['score']:.1f} % is less than {SHARE * FULL:.1f} %, 90 % of full fine-tuning's {FULL} %"
    said = why or f"{found['parameters']:,} parameters, {found['score']:.1f} %"
    rows = [] if why else [{"name": "parameters", "value": found["parameters"], "order": "asc"},
                           {"name": "accuracy", "value": round(found["score"], 1)}]
    test = {"name": "reaches 90 % of full fine-tuning", "score": int(not why), "max_score": 1, "output": said,
            "status": "failed" if why else "passed"}
    grade.written(results, {"execution_time": round(time.time() - begin), "tests": [test], "leaderboard": rows})
    return said


def handed_in(submission):
    """(the one delta file, "") or (None, why there is none)."""
    paths = sorted(grade.top(submission).rglob("*.pt"))
    if len(paths) != 1 or paths[0].is_symlink() or not paths[0].is_file():
        return None, f"hand in one file that ends with .pt, and no link; here are {len(paths)}"
    if paths[0].stat().st_size > grade.LARGEST:
        return None, f"{paths[0].name} is larger than {grade.LARGEST:,} bytes"
    return paths[0].resolve(), ""


def measured_apart(path, seed):
    """What `measured` prints in a process of its own: {"parameters", "score"} or {"refused": why}."""
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as log:
        ended = grade.watched([sys.executable, "-m", "course.leaderboard", str(path), str(seed)], None, cwd=ROOT,
                              stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                              preexec_fn=lambda: grade.limit(None), env=grade.environment(scratch))
        log.seek(0)
        told = log.read().decode("utf-8", "replace")
    if "ready\n" not in told:
        raise grade.Fault(f"base and task could not be made: {ended}\n{told}")
    last, ended = told.splitlines()[-1], ended.removesuffix(" before this test was done")
    return json.loads(last) if last.startswith("{") else {"refused": f"{path.name}: {ended}: {last[:200]}"}


def measured(path, seed):
    """How many values a delta file has, and its score on a draw of the test; Refused if the file is not sound."""
    from data import bases, tasks  # here: the parent needs no torch
    from deltas import Refused, load, read
    model, tokenizer = bases.load_base(BASE)
    task = tasks.load_task(TASK, tokenizer, model.config, seed=seed)
    print("ready", flush=True)
    try:
        content = read(path)
        if content["classes"]:
            raise Refused("a Classifier: this task is answered by the LM head")
        predicted = tasks.predictions(load(path, model), task, task.test, tokenizer)
    except Refused as error:
        return {"refused": str(error).replace(str(path), Path(path).name)}
    return {"parameters": sum(t.numel() for t in content["tensors"].values()),
            "score": tasks.score(task, task.test, predicted)}


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], int(sys.argv[2])), allow_nan=False))
