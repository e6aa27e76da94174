"""The one way to time something: side by side, in turns; bare times say more about the machine than about the code."""

import os
import platform
import re
import time
from pathlib import Path
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


def machine():
    """Where a timing was taken, in one line: the processor, what speeds bfloat16 up on it, cores, threads, PyTorch."""
    info = Path("/proc/cpuinfo")
    told = info.read_text(encoding="utf-8") if info.exists() else ""
    name = re.search(r"model name\s*: (.*)", told)
    flags = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx2": "AVX2"}
    has = next((word for flag, word in flags.items() if re.search(rf"\b{flag}\b", told)), "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    processor = name[1] if name else platform.processor() or platform.machine()
    return ", ".join(filter(None, [
        gpu, processor, has or torch.backends.cpu.get_cpu_capability(), f"{os.cpu_count()} cores",
        f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"]))
