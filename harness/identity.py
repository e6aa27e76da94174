"""What a result rests on, as digests: the bytes of the base and of the data, and the code that ran.

    content("gpt-s", None, LoRA)    -> {"base": "3f0c...", "model.py": "91ab...", ..., "methods/lora.py": "07de..."}

Two results with equal settings and an equal content are the same result; names and paths prove nothing. Code
is compared without comments, docstrings and blank lines. A file is read once a command: data and weights again
if they are written meanwhile, code not, since what is edited while a command runs is not what runs.
"""

import ast
import hashlib
import inspect
import os
import sys
from functools import lru_cache
from pathlib import Path

from data import bases, own

ROOT = Path(__file__).parents[1]
CODE = ("model.py", "deltas.py", "fastfood.py", "train.py", "harness/settings.py",
        "harness/processes.py")  # beside data/ and the technique
OF_A_CHECKPOINT = ".json", ".txt", ".safetensors"  # config, weights, tokenizer


def content(base, data, kind):
    """{what: digest} of all that decides a run: `base` a name or a folder, `data` a folder or None."""
    found = {"base": together(base_files(base))} | code(kind)
    return found if data is None else found | {"data": together(own.files(data))}


def base_files(base):
    """The files of a base: a shipped one's weights and token table, or a checkpoint's folder."""
    if base in bases.SHAPES:
        return [bases.WEIGHTS / f"{base}.pt", bases.WEIGHTS.parent / "bpe.txt"]
    return sorted(p for p in Path(base).iterdir() if p.suffix in OF_A_CHECKPOINT) if os.path.isdir(base) else []


def together(paths):
    """One digest of the names and bytes of all files in `paths` that are there."""
    return digest("".join(f"{p.name} {of_file(p)} " for p in paths if p.is_file()).encode())


def code(kind=None, measure=None):
    """{file: digest} of the core and data/, of a technique's file with what it imports, of a measurement's file."""
    files = [ROOT / name for name in CODE] + sorted((ROOT / "data").glob("*.py"))
    found = {path.relative_to(ROOT).as_posix(): of_code(path) for path in files}
    if kind is not None:
        for path in technique_files(Path(sys.modules[kind.__module__].__file__)):
            found[f"methods/{path.name}"] = of_code(path)
    if measure is not None:
        path = Path(inspect.getsourcefile(inspect.unwrap(measure)))
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
        found[name] = of_code(path)
    return found


def technique_files(path):
    """The file of a technique and those in methods/ that it imports, each once."""
    found, waiting = [], [path]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            found.append(path)
            stat = path.stat()
            waiting += [ROOT / "methods" / f"{name.split('.')[1]}.py"
                        for name in imported(path, stat.st_mtime_ns, stat.st_size) if name.startswith("methods.")]
    return found


@lru_cache(maxsize=None)
def imported(path, mtime, size):
    """The dotted names of all that a program imports: methods.prompt.SoftPrompt, torch, ..."""
    found = []
    for node in ast.walk(ast.parse(text(path))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found += [start + each.name for each in node.names]
    return found


def of_file(path):
    """The digest of a file's bytes."""
    stat = path.stat()
    return of_bytes(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=None)
def of_bytes(path, mtime, size):
    return digest(path.read_bytes())


@lru_cache(maxsize=None)
def of_code(path):
    """The digest of the program in a file, without comments, docstrings and blank lines."""
    tree = ast.parse(text(path))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return digest(ast.dump(tree).encode())


def text(path):
    return path.read_text(encoding="utf-8")


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]
