"""The state of a long run, so that one that was stopped goes on, and ends bit for bit as the undisturbed one.

It is written at an evaluation once a run has trained for AFTER seconds, under the name of the delta file that
is to come, and removed when the run's line is in results.jsonl. The name holds the digest of the key: other
settings, another base, other data or other code never find it. Never under a debugger, where a step may be
half a reader's experiment.
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from data import files
from harness import boundary, processes
from model import Refused

AFTER = float(os.environ.get("DELTA_STATE_AFTER", 120))  # seconds; an environment variable, so that tests need not wait


class State:
    """What a training loop goes on from: its parameters, optimiser and schedule, and what it has seen so far."""

    def __init__(self, path, parameters, optimizer, schedule, say):
        self.path, self.say = path, say
        self.parameters, self.optimizer, self.schedule = parameters, optimizer, schedule

    def restore(self, fresh):
        """(steps done, curve, best, seconds spent): a run that was stopped is where its last evaluation was."""
        if (kept := processes.from_first(lambda: None if fresh else self.read())) is None:
            return 0, [], None, 0.0
        for name, p in self.parameters.items():
            p.data.copy_(kept["now"][name])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.schedule.load_state_dict(kept["schedule"])
        torch.set_rng_state(kept["random"])
        self.say(f"going on from step {kept['step']}, where this run was stopped (--fresh begins anew)")
        return kept["step"], [tuple(point) for point in kept["curve"]], kept["best"], kept["spent"]

    def read(self):
        """What the file holds, or None where there is none."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            return files.tensors(self.path)
        except Refused as error:
            raise Refused(f"{error}; delete it, and the run begins anew") from None

    def save(self, step, curve, best, spent):
        if self.path is None or spent < AFTER or sys.gettrace() is not None or not processes.first():
            return
        content = {"step": step, "curve": curve, "best": best, "spent": spent, "random": torch.get_rng_state(),
                   "now": {name: p.detach() for name, p in self.parameters.items()},
                   "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        files.save(self.path, content)
        boundary.kept["state"] = f"the same command goes on from step {step}"


def of(path):
    """Where the state of a run stands whose delta file will be `path`."""
    return Path(f"{path}.state")


@contextmanager
def ended_by(kind, path):
    """An exception of this kind ends a run for good: its state goes too."""
    try:
        yield
    except kind:
        path.unlink(missing_ok=True)
        raise
