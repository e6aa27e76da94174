"""What a result rests on, as digests: the bytes of the base and of the data, and the code that ran.

    content("gpt-s", None, LoRA)    -> {"base": "3f0c...", "model.py": "91ab...", ..., "methods/lora.py": "07de..."}

Two results with equal settings and an equal content are the same result; names and paths prove nothing. Code
is compared without comments, docstrings and blank lines. A file is read once, unless it is written meanwhile.
"""

import ast
import hashlib
import inspect
import sys
from functools import lru_cache
from pathlib import Path

from data import bases, own

ROOT = Path(__file__).parents[1]
CODE = "model.py", "deltas.py", "fastfood.py", "train.py", "harness/settings.py"  # beside data/ and the technique
OF_A_CHECKPOINT = ".json", ".txt", ".safetensors"  # config, weights, tokenizer


def content(base, data, kind):
    """{what: digest} of all that decides a run: `base` a name or a folder, `data` a folder or None."""
    found = {"base": together(base_files(base))} | code(kind)
    return found if data is None else found | {"data": together(own.files(data))}


def base_files(base):
    """The files of a base: a shipped one's weights and token table, or a checkpoint's folder."""
    if base in bases.SHAPES:
        return [bases.WEIGHTS / f"{base}.pt", bases.WEIGHTS.parent / "bpe.txt"]
    folder = Path(base)
    return sorted(p for p in folder.iterdir() if p.suffix in OF_A_CHECKPOINT) if folder.is_dir() else []


def together(paths):
    """One digest of the names and bytes of all files in `paths` that are there."""
    return digest("".join(f"{p.name} {of_file(p)} " for p in paths if p.is_file()).encode())


def code(kind=None, measure=None):
    """{file: digest} of the core and data/, of a technique's file with what it imports, of a measurement's file."""
    files = [ROOT / name for name in CODE] + sorted((ROOT / "data").glob("*.py"))
    found = {path.relative_to(ROOT).as_posix(): of_file(path, of_code) for path in files}
    if kind is not None:
        for path in technique_files(Path(sys.modules[kind.__module__].__file__)):
            found[f"methods/{path.name}"] = of_file(path, of_code)
    if measure is not None:
        path = Path(inspect.getsourcefile(inspect.unwrap(measure)))
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
        found[name] = of_file(path, of_code)
    return found


def technique_files(path):
    """The file of a technique and those in methods/ that it imports, each once."""
    found, waiting = [], [path]
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            found.append(path)
            waiting += [ROOT / "methods" / f"{node.module.split('.')[1]}.py" for node in ast.walk(ast.parse(text(path)))
                        if isinstance(node, ast.ImportFrom) and node.module.startswith("methods.")]
    return found


def of_file(path, how=None):
    """The digest of a file's bytes, or of what `how(path)` makes of them."""
    stat = path.stat()
    return cached(path, stat.st_mtime_ns, stat.st_size, how)


@lru_cache(maxsize=None)
def cached(path, mtime, size, how):
    return digest(path.read_bytes() if how is None else how(path).encode())


def of_code(path):
    """The program in a file as text, without comments, docstrings and blank lines."""
    tree = ast.parse(text(path))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def text(path):
    return path.read_text(encoding="utf-8")


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]
