"""The one way to time something: side by side, in turns; bare times say more about the machine than about the code."""

import time
from statistics import median

import torch


def side_by_side(functions, rounds=15):
    """({name: milliseconds}, {name: ratio}) of functions {name: function} that take turns, after one to warm up.

    Medians over the rounds; a ratio is the median of a function's time over the first one's in the same round.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    times = {name: taken[1:] for name, taken in times.items()}
    first = next(iter(times.values()))
    return ({name: 1000 * median(taken) for name, taken in times.items()},
            {name: median([t / base for t, base in zip(taken, first)]) for name, taken in times.items()})
