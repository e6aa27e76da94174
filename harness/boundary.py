"""How a command ends: in one line, unless it is a bug. Imported before torch, so that this holds while torch loads.

    0      done                     2      refused: what was given, where it stands, what would be right
    1      the system: a file that cannot be written, a full disk, no memory; or a bug, which shows its traceback
    130    Ctrl-C                   143    SIGTERM: what is kept, and how to go on
    141    nobody reads the output any more
"""

import errno
import os
import re
import signal
import sys
import time
import warnings

BEGIN = time.time()  # before torch is imported, so that the last line says how long a user has waited
# For PyTorch on a CPU; what a user has set already stays.
ENVIRONMENT = {
    # Two OpenMP threads of a small model wait for each other by spinning. On a busy machine one of them is not even
    # running meanwhile, and a step takes many times as long; GNU's runtime then gives up after so many turns.
    "GOMP_SPINCOUNT": "1000",
    # Every shape of a bfloat16 product leaves a program behind, and batches have many shapes: with the usual 1,024
    # programs a run of MiniLM holds half a gigabyte of them, with 64 a few megabytes, and is as fast.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
kept = {}  # {what: a sentence}: what an interruption does not lose, said by those who keep it


class Terminated(BaseException):
    """SIGTERM, raised like Ctrl-C's KeyboardInterrupt."""


def terminated(number, frame):
    raise Terminated


def at_once(number, frame):
    """While modules are imported there is nothing to keep, and an exception inside torch's import can go anywhere."""
    say("\ninterrupted", 128 + number)
    os._exit(128 + number)


def run(main):
    """Call main() as a program: what ends it becomes one line and a status; a bug passes, to show its place."""
    if signal.getsignal(signal.SIGINT) is at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminated)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # here, where a closed pipe is still an exception
    except Exception as error:
        line, status = ending(error)
        if line is None:
            raise
        say(line, status)
        (os._exit if status == 141 else sys.exit)(status)  # the interpreter would complain about the pipe again
    except (KeyboardInterrupt, Terminated) as error:
        line, status = ending(error)
        say(line, status)
        sys.exit(status)


def ending(error):
    """(line or None for a bug, status) of an exception that ends a command."""
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        return "\ninterrupted" + "".join(f"; {text}" for text in kept.values()), 130 if isinstance(
            error, KeyboardInterrupt) else 143
    if isinstance(error, OSError):
        if error.errno == errno.EPIPE:
            return "", 141
        name = "" if error.filename is None else f"{error.filename}: "
        return f"{name}{error.strerror or error}", 1
    if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "numpy", "tiktoken"):
        return f"{error.name} is not installed: pip install -r requirements.txt", 1
    if isinstance(error, MemoryError) or "allocat" in str(error) and type(error).__name__ in (
            "RuntimeError", "OutOfMemoryError"):  # PyTorch's own word for it, on a CPU and on a GPU
        return "not enough memory: choose a smaller base, --batch_size, or shorter texts", 1
    if re.search("remote (worker|process)", str(error)):  # gloo's word, and NCCL's
        return "another process of this run has ended" + "".join(f"; {text}" for text in kept.values()), 1
    refused = getattr(sys.modules.get("model"), "Refused", ())
    return (str(error), 2) if isinstance(error, refused) else (None, 1)


def say(line, status):
    """Print the line that ends a command, where anybody reads it."""
    try:
        if line:
            print(f"{os.path.basename(sys.argv[0])}: {line}" if status < 100 else line, file=sys.stderr, flush=True)
    except OSError:
        pass


def hook(kind, error, trace):
    """The same for what happens while modules are imported."""
    line, status = ending(error)
    if line is None:
        return sys.__excepthook__(kind, error, trace)
    say(line, status)
    os._exit(status)


def begin():
    """Before anything else is imported: the environment, signals, output that any terminal takes."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    sys.excepthook = hook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not a debugger's
        signal.signal(signal.SIGINT, at_once)
    signal.signal(signal.SIGTERM, at_once)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        getattr(sys, name).reconfigure(errors="backslashreplace", line_buffering=True)
