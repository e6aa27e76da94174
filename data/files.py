"""One reader for each kind of file that comes from outside, and one way to write; each message names the path.

    text(path)                         UTF-8, with a byte-order mark or without
    json_of(path, dict)                the same as JSON, of the type that is expected
    field(content, name, kind, path)   one entry of it, with its type and its range
    tensors(path)                      what torch.save has written: tensors, numbers and strings, nothing else
    sound(tensors, path)               floating, finite, dense
    replace(path, write)               whole or not at all, beside others who write the same name
    save(path, content)                so, by torch.save; save_json(path, content) as JSON
    empty(folder)                      a folder to write into, where nothing is yet
"""

import io
import json
import math
import os
import pickle
import re
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import torch

from model import Refused

TYPES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list",
         dict: "an object"}


def there(path):
    """The path, if a regular file (or a link to one) is there."""
    if not Path(path).is_file():
        raise Refused(f"{path}: {'not a regular file' if Path(path).exists() else 'no such file'}")
    return Path(path)


def text(path):
    """The text of a file, without its byte-order mark."""
    if pointer(there(path)):
        raise Refused(f"{path}: a git-lfs pointer, not the file itself (git lfs pull fetches it)")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise Refused(f"{path}: not UTF-8 ({error.reason} at byte {error.start}, line {line})") from None


def pointer(path):
    """Does git-lfs's note stand in the place of the file?"""
    with open(path, "rb") as file:
        return file.read(24).startswith(b"version https://git-lfs")


def json_of(path, kind=dict):
    """The content of a JSON file, which must be of type `kind`."""
    return parsed(text(path), path, kind)


def parsed(written, place, kind=dict):
    """A text as JSON of type `kind`; `place` (a path, or path and line) is named in what is wrong with it."""
    try:
        content = json.loads(written, object_pairs_hook=once)
        if re.search(r"\\u[dD][89a-fA-F]", written):
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refused(f"{place}: holds {error.object[error.start]!r}, which is half a character") from None
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        where = f"line {error.lineno}, " * ("\n" in written.strip()) if hasattr(error, "lineno") else ""
        why = (f"{error.msg} ({where}column {error.colno})" if hasattr(error, "lineno") else
               "nested too deeply" if isinstance(error, RecursionError) else str(error))
        raise Refused(f"{place}: not JSON: {why}") from None
    if not isinstance(content, kind):
        raise Refused(f"{place}: {TYPES[kind]} is expected here, not {shown(content)}")
    return content


def once(pairs):
    """The object with these entries; no name may stand there twice, since one of the two would be lost."""
    if len(found := dict(pairs)) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"'{shown(twice)}' stands twice in one object")
    return found


def field(content, name, kind, path, least=None, most=None, default=...):
    """content[name] of type `kind`, a number between `least` and `most`; `default` where it is missing."""
    if name not in content and default is not ...:
        return default
    if name not in content:
        raise Refused(f"{path}: has no {name!r}")
    value = content[name]
    right = type(value) is kind or kind is float and type(value) is int
    if not right or type(value) is float and not math.isfinite(value):
        raise Refused(f"{path}: {name} is {shown(value)}, not {TYPES[kind]}")
    if least is not None and value < least or most is not None and value > most:
        raise Refused(f"{path}: {name} is {shown(value)}; it must be {span(least, most)}")
    return value


def span(least, most):
    return f"{least} to {most}" if most is not None and least is not None else f"{least} or more"


def shown(value, longest=60):
    """A value or a text from outside as it can be printed: on one line, no control characters, not too long."""
    written = value if isinstance(value, str) else repr(value)
    written = "".join(c if c.isprintable() else repr(c)[1:-1] for c in written)
    return written if len(written) <= longest else written[:longest - 3] + "..."


def tensors(path):
    """What torch.save wrote to `path`, on the CPU. Nothing in it can run, and it is no larger than the file."""
    there(path)
    try:
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                raise Refused(f"{path}: holds packed entries, which torch.save never writes")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, TypeError,
            AttributeError, IndexError, AssertionError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        if isinstance(error, Refused):
            raise
        why = "a git-lfs pointer" if pointer(path) else "not written by torch.save, or cut short"
        raise Refused(f"{path}: {why}") from None


def sound(found, path, places=False):
    """Check that {name: tensor} holds floating, finite, dense tensors, or `places` (int32), and return it."""
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise Refused(f"{path}: {shown(name)} is not a named tensor")
        right = tensor.is_floating_point() or places and tensor.dtype == torch.int32
        if tensor.layout != torch.strided or not right:
            raise Refused(f"{path}: {shown(name)} is {tensor.dtype}, {tensor.layout}; floating and dense is expected")
        if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):  # NaN is both; no copy is made
            raise Refused(f"{path}: {shown(name)} holds NaN or infinity")
    return found


def replace(path, write):
    """Call write(temporary path), then give the file its name: an interruption leaves the old file or the new one.

    The temporary name is new each time (NAME.RANDOM.part), so that two who write at once never share it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    number, part = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    os.close(number)
    try:
        write(Path(part))
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def save(path, content):
    """torch.save, whole or not at all. Through memory: given a path, torch writes its name into the file, and answers a
    full disk with an exception of its own.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace(path, lambda part: part.write_bytes(buffer.getbuffer()))


def save_json(path, content):
    written = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace(path, lambda part: part.write_text(written, encoding="utf-8"))


def empty(folder):
    """The path of a folder that is new or empty, so that nothing is overwritten."""
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise Refused(f"{folder}: is there already; name a new or an empty folder")
    return Path(folder)
