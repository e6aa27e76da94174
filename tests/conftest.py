"""What all tests share: the repository's root on the path, one thread, and the marker `slow`."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
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
