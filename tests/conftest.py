"""What all tests share: the repository's root on the path, one thread, the marker `slow`, small dev and test sets."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
pytest_plugins = ["points"]  # --only TAG
torch.set_num_threads(1)  # our matrices are tiny: a second thread costs more than it brings


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes many seconds; run only by a -m that names it (-m slow)")


def pytest_collection_modifyitems(config, items):
    if "slow" in (config.getoption("markexpr") or ""):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)


@pytest.fixture
def few_examples(monkeypatch):
    """A dev set of ten and a test set of fourteen, for runs that need no more."""
    from data import tasks
    monkeypatch.setattr(tasks, "SIZES", {"dev": 10, "test": 14})
