"""What a checkpoint's folder says about its tokenizer, once all of it is known to be honoured or harmless.

    said = read(folder, "gpt2")          a Said: vocabulary, merges, added words, special tokens, normalizer

    tokenizer.json            all in one, or else vocab.json and merges.txt (byte pairs), vocab.txt (WordPiece)
    tokenizer_config.json     the class, its settings, special and added tokens
    special_tokens_map.json, added_tokens.json     the same, as older versions wrote it
    config.json               the class and the end token where no other file names them

Two files that say different things are an error, and so is a setting that is not in one of the tables.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from data.files import field, json_of, shown, text
from model import Refused

# The class whose ids are known here, and those that are what tokenizer.json makes of them ("Fast" or not).
CLASS = {"gpt2": "GPT2Tokenizer", "roberta": "RobertaTokenizer", "bert": "BertTokenizer"}
GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")

# What a setting of tokenizer_config.json must be, where it stands there at all.
MUST_BE = {
    "add_prefix_space": False, "add_bos_token": False, "add_eos_token": False, "do_basic_tokenize": True,
    "never_split": [], "clean_text": True, "wordpieces_prefix": "##"}
READ = {"tokenizer_class", "do_lower_case", "strip_accents", "tokenize_chinese_chars", "added_tokens_decoder"}
# Special tokens (ROLES and LISTS below read them), lengths, sides, decoding and bookkeeping change no text's ids.
NO_MATTER = re.compile(
    r"_.*|\w+_token(_id)?|\w+_special_tokens|name_or_path|(model_)?max_len(gth)?|special_tokens_map_file|use_fast"
    r"|clean_up_tokenization_spaces|backend|is_local|local_files_only|processor_class|((full_)?tokenizer|vocab|merges)_file"
    r"|(truncation|padding)(_side|_strategy)?|stride|pad_to_multiple_of|pad_token_type_id|model_input_names|chat_template"
    r"|legacy|split_special_tokens|init_inputs|errors|trim_offsets|return_\w+|from_slow|(tokenizer|model)_type|vocab_size"
    r"|language|revision|transformers_version|sp_model_kwargs|dtype")

# What tokenizer.json must hold. Byte pairs have a letter for every byte, so what is done with unknown ones
# (unk_token, fuse_unk, byte_fallback) is never done.
WHOLE = {
    "bert": {
        "model.type": ("WordPiece", None), "model.continuing_subword_prefix": ("##", None),
        "model.max_input_chars_per_word": (100, None), "normalizer.type": ("BertNormalizer",),
        "normalizer.clean_text": (True, None), "pre_tokenizer.type": ("BertPreTokenizer",)},
    "gpt2": {
        "model.type": ("BPE", None), "model.dropout": (None, 0), "model.ignore_merges": (False, None),
        "model.continuing_subword_prefix": ("", None), "model.end_of_word_suffix": ("", None),
        "normalizer": (None,), "pre_tokenizer.type": ("ByteLevel",), "pre_tokenizer.add_prefix_space": (False,),
        "pre_tokenizer.use_regex": (True, None)}}
WHOLE["roberta"] = WHOLE["gpt2"]
NORMALIZER = {  # in tokenizer_config.json: its name in tokenizer.json, what it is where neither says so
    "do_lower_case": ("lowercase", True), "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True)}

# What we call a special token: the files' name for it, and the family's own where no file names one.
ROLES = {
    "gpt2": {"bos": ("bos_token", "<|endoftext|>"), "eos": ("eos_token", "<|endoftext|>"),
             "pad": ("pad_token", "<pad>"), "mask": ("mask_token", "<mask>")},
    "roberta": {"bos": ("cls_token", "<s>"), "eos": ("sep_token", "</s>"),
                "pad": ("pad_token", "<pad>"), "mask": ("mask_token", "<mask>")},
    "bert": {"bos": ("cls_token", "[CLS]"), "eos": ("sep_token", "[SEP]"), "unk": ("unk_token", "[UNK]"),
             "pad": ("pad_token", "[PAD]"), "mask": ("mask_token", "[MASK]")}}
NEEDED = {"gpt2": (), "roberta": ("bos", "eos"), "bert": ("bos", "eos", "unk")}
LISTS = "additional_special_tokens", "extra_special_tokens"
FLAGS = "single_word", "lstrip", "rstrip", "normalized"


@dataclass
class Said:
    own: dict                    # {token: id}, the vocabulary as it was before tokens were added to it
    vocab: dict                  # all of them; no id twice
    merges: list                 # byte pairs: [(left, right), ...] in their order
    special: dict                # role -> token, or None
    added: dict                  # {token: {"id", "special", *FLAGS}}
    normalizer: dict             # BertNormalizer's settings


def read(folder, family):
    """All that the folder says about the tokenizer of its `family` ("gpt2", "roberta" or "bert"), as a Said."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    settings, config = optional(folder / "tokenizer_config.json"), optional(folder / "config.json")
    whole = json_of(path) if os.path.lexists(path) else None
    generic = check_settings(folder, family, settings, config, whole)
    if whole is not None:
        for key, allowed in WHOLE[family].items():
            if (value := at(whole, key)) not in allowed:
                raise Refused(f"{path}: {key}={shown(repr(value))}; only {allowed[0]!r} is supported")
        vocab = checked(at(whole, "model.vocab"), path)
        merges = [] if family == "bert" else pairs(at(whole, "model.merges"), path)
    else:
        vocab, merges = (plain_words if family == "bert" else plain_pairs)(folder)
    named, own = names(folder, settings), dict(vocab)
    added = added_tokens(folder, settings, whole, named)
    for token, found in added.items():
        if vocab.setdefault(token, found["id"]) != found["id"]:
            raise Refused(f"{folder}: the added token {shown(repr(token))} has id {found['id']} and in the "
                          f"vocabulary {vocab[token]}")
    checked(vocab, folder)
    special = {role: role_token(folder, family, role, named, vocab) for role in ROLES[family]}
    if family == "gpt2" and special["eos"] is None:
        special["eos"] = end_token(config, vocab, merges)
    if whole is not None:
        check_wrap(path, family, at(whole, "post_processor"), vocab, special, generic)
    return Said(own, vocab, merges, special, added, normalizer(folder, settings, whole, generic))


def optional(path):
    """A JSON object, {} where there is no such file (a link that leads nowhere is a file that is missing)."""
    return json_of(path) if os.path.lexists(path) else {}


def at(content, key):
    """content["a"]["b"] for "a.b"; None where anything on the way is missing."""
    for name in key.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def check_settings(folder, family, settings, config, whole):
    """Is the class a generic one? Refuses every class and setting that would give other ids."""
    path = folder / "tokenizer_config.json"
    where = path if settings.get("tokenizer_class") else folder / "config.json"
    name = (settings.get("tokenizer_class") or config.get("tokenizer_class") or CLASS[family])
    known = (CLASS[family], *GENERIC) if whole is not None else (CLASS[family],)
    if not isinstance(name, str) or name.removesuffix("Fast") not in known:
        raise Refused(f"{where}: tokenizer_class={shown(repr(name))}; this reader knows {', '.join(known)}")
    for key, value in settings.items():
        if key in MUST_BE and value is not None and value != MUST_BE[key]:
            raise Refused(f"{path}: {key}={shown(repr(value))}; only {MUST_BE[key]!r} is supported")
        if value in (None, False, {}, [], "") or key in MUST_BE or key in READ or NO_MATTER.fullmatch(key):
            continue
        raise Refused(f"{path}: {shown(key)}={shown(repr(value))}, which this reader does not know; if it does not "
                      "change the ids of a text, delete that line")
    return name.removesuffix("Fast") in GENERIC


def normalizer(folder, settings, whole, generic):
    """BertNormalizer's settings. The class goes by tokenizer_config.json; tokenizer.json must not contradict it."""
    path, found = folder / "tokenizer_config.json", {}
    for key, (name, usual) in NORMALIZER.items():
        given = None if settings.get(key) is None else field(settings, key, bool, path)
        there = at(whole, f"normalizer.{name}")
        if there is not None:
            field(whole["normalizer"], name, bool, folder / "tokenizer.json")
        found[name] = there if generic and given is None else usual if given is None else given
        if at(whole, "normalizer") and there != found[name]:
            raise Refused(f"{folder}: tokenizer.json has {name}={there}, tokenizer_config.json {key}={found[name]}"
                          f"{' (where it says nothing)' if given is None else ''}; write in both what is right")
    return found


# ---- vocabulary and merges ----

def checked(vocab, path):
    """The vocabulary, if it is {token: id} and no two tokens share an id."""
    if not isinstance(vocab, dict):
        raise Refused(f"{path}: the vocabulary is {shown(repr(vocab))}, not an object of tokens and ids")
    for token, n in vocab.items():
        if type(n) is not int or not 0 <= n < 2**31:
            raise Refused(f"{path}: the token {shown(repr(token))} has id {shown(repr(n))}, not a whole number from 0")
    owner = {n: token for token, n in vocab.items()}
    for token, n in vocab.items() if len(owner) < len(vocab) else ():
        if owner[n] != token:
            raise Refused(f"{path}: the tokens {shown(repr(token))} and {shown(repr(owner[n]))} share id {n}")
    try:
        "".join(vocab).encode()
    except UnicodeEncodeError as error:
        raise Refused(f"{path}: a token holds {error.object[error.start]!r}, which is half a character") from None
    return vocab


def pairs(merges, path):
    """[(left, right), ...] from pairs or, as in older files and in merges.txt, from "left right"."""
    if not isinstance(merges, list):
        raise Refused(f"{path}: merges is {shown(repr(merges))}, not a list of pairs")
    found = [tuple(m.split(" ") if isinstance(m, str) else m if isinstance(m, list) else ()) for m in merges]
    for n, pair in enumerate(found, start=1):
        if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise Refused(f"{path}: merge {n} is {shown(repr(merges[n - 1]))}, not two tokens")
    return found


def plain_pairs(folder):
    """Vocabulary and merges from vocab.json and merges.txt."""
    for name in ("vocab.json", "merges.txt"):
        if not os.path.lexists(folder / name):
            raise Refused(f"{folder}: no {name}; GPT-2's and RoBERTa's tokenizer is vocab.json and merges.txt, or "
                          "tokenizer.json")
    lines = text(folder / "merges.txt").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    return checked(json_of(folder / "vocab.json"), folder / "vocab.json"), pairs(merges, folder / "merges.txt")


def plain_words(folder):
    """Vocabulary (and no merges) from vocab.txt, a token a line."""
    if not os.path.lexists(folder / "vocab.txt"):
        raise Refused(f"{folder}: no tokenizer.json and no vocab.txt; one of them is BERT's tokenizer")
    vocab = {}
    for n, token in enumerate(text(folder / "vocab.txt").removesuffix("\n").split("\n")):
        if token in vocab:
            raise Refused(f"{folder / 'vocab.txt'}, line {n + 1}: {shown(repr(token))} stands on line "
                          f"{vocab[token] + 1} already")
        vocab[token] = n
    return vocab, []


# ---- special and added tokens ----

def content(token, place):
    """A token's text, which files write as it is or as {"content": ...}."""
    found = token.get("content") if isinstance(token, dict) else token
    if not isinstance(found, str) or not found:
        raise Refused(f"{place} is {shown(repr(token))}, not a token")
    return found


def names(folder, settings):
    """{key: token} of all that is called special, {key: [tokens]} for the lists of more of them."""
    found = {}
    for file, given in (("tokenizer_config.json", settings),
                        ("special_tokens_map.json", optional(folder / "special_tokens_map.json"))):
        for key, value in given.items():
            place = f"{folder / file}: {shown(key)}"
            if value is None or value == [] or not (key in LISTS or re.fullmatch(r"[a-z]+_token", key)):
                continue
            if key in LISTS:
                value = list(value.values()) if isinstance(value, dict) else value
                if not isinstance(value, list):
                    raise Refused(f"{place} is {shown(repr(value))}, not a list of tokens")
                found.setdefault(key, []).extend(content(token, place) for token in value)
            elif found.setdefault(key, content(value, place)) != content(value, place):
                raise Refused(f"{place} is {shown(repr(content(value, place)))}, in tokenizer_config.json "
                              f"{shown(repr(found[key]))}")
    return found


def added_tokens(folder, settings, whole, named):
    """{token: {"id", "special", *FLAGS}} of all files that add tokens; `special` ones are never read from a text."""
    special = {token for value in named.values() for token in (value if isinstance(value, list) else [value])}
    lists = []
    path = folder / "tokenizer.json"
    for token in field(whole or {}, "added_tokens", list, path, default=[]):
        lists.append((path, at(token, "id"), token))
    path = folder / "tokenizer_config.json"
    for n, token in field(settings, "added_tokens_decoder", dict, path, default={}).items():
        lists.append((path, int(n) if n.isdecimal() else n, token))
    path = folder / "added_tokens.json"
    for token, n in optional(path).items():
        lists.append((path, n, token))

    found = {}
    for path, n, token in lists:
        name = content(token, f"{path}: the added token with id {shown(repr(n))}")
        if type(n) is not int or not 0 <= n < 2**31:
            raise Refused(f"{path}: the added token {shown(repr(name))} has id {shown(repr(n))}, not a whole number")
        given = token if isinstance(token, dict) else {}
        is_special = field(given, "special", bool, path, default=False) or name in special
        flags = {flag: field(given, flag, bool, path, default=flag == "normalized" and not is_special)
                 for flag in FLAGS}
        new = {"id": n, "special": is_special} | flags
        old = found.setdefault(name, new)
        if old["id"] != n or given and not old["special"] and not is_special and old != new:
            raise Refused(f"{path}: the added token {shown(repr(name))} is {new}, elsewhere {old}")
    return found


def role_token(folder, family, role, named, vocab):
    """The token that has this role: the one that the files name, or the family's own; None where there is none."""
    key, usual = ROLES[family][role]
    token = named.get(key, usual)
    if token not in vocab and (role in NEEDED[family] or key in named and role in ("eos", "mask")):
        raise Refused(f"{folder}: the vocabulary has no {key} {shown(token)}: not a {family} tokenizer")
    return token if token in vocab else None


def end_token(config, vocab, merges):
    """The token that config.json's eos_token_id names, unless it is a piece of words (an id of another table)."""
    found = [token for token, n in vocab.items() if n == config.get("eos_token_id") and len(token) > 1]
    return found[0] if found and found[0] not in set(map("".join, merges)) else None


def check_wrap(path, family, post, vocab, special, generic):
    """tokenizer.json's post-processor must put around a text what `wrap` puts there."""
    wanted = [], []
    if family != "gpt2":
        wanted = [vocab[special["bos"]]], [vocab[special["eos"]]]
    try:
        found = wanted if post is None and not generic else around(post or {"type": None})
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, StopIteration):
        found = None
    if found != wanted:
        raise Refused(f"{path}: post_processor={shown(repr(post))}; supported is one that puts the ids {wanted[0]} "
                      f"before a text and {wanted[1]} behind it")


def around(post):
    """The ids that a post-processor puts (before, behind) a single text."""
    if post["type"] in (None, "ByteLevel"):
        return [], []
    if post["type"] in ("BertProcessing", "RobertaProcessing"):
        return [post["cls"][1]], [post["sep"][1]]
    if post["type"] == "TemplateProcessing":
        pieces = [next(iter(piece.items())) for piece in post["single"]]
        place = [kind for kind, _ in pieces].index("Sequence")
        ids = [post["special_tokens"][piece["id"]]["ids"] if kind == "SpecialToken" else [] for kind, piece in pieces]
        return sum(ids[:place], []), sum(ids[place + 1:], [])
    if post["type"] == "Sequence":
        inside = [around(each) for each in post["processors"]]
        return sum((before for before, _ in reversed(inside)), []), sum((behind for _, behind in inside), [])
    raise ValueError(post["type"])
