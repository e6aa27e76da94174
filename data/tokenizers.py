"""Text to token ids and back: one small interface, three ways in.

    BPE          byte pairs through tiktoken: the little world's own table, or a GPT-2 or RoBERTa checkpoint's
    WordPiece    a BERT checkpoint's, through the package `tokenizers`

    encode(text) -> ids                  nothing is added, and no piece of a text ever becomes a special token
    decode(ids) -> text
    wrap(ids)    -> [bos, *ids, eos]     [CLS] .. [SEP] (BERT), <s> .. </s> (RoBERTa), the ids alone (GPT)
    pad bos eos mask                     ids, None where the family has no such token
    vocab_size

Byte-pair encoding starts from single bytes and joins the neighbours whose union has the lowest rank, over
and over (Sennrich et al. 2016; over bytes: GPT-2). RoBERTa has GPT-2's ranks and its own ids, so an id is
looked up once the ranks have done their work.
"""

import base64
import json
from pathlib import Path

import tiktoken

from data import bpe

# How GPT-2 cuts a text before any bytes are joined: a word keeps the space before it.
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PLAIN_BPE = ("GPT2Tokenizer", "RobertaTokenizer")
PLAIN_WORDPIECE = ("BertTokenizer",)


class Tokenizer:
    """What the tokenizers share: four special ids and `wrap`."""

    def __init__(self, vocab_size, pad=None, bos=None, eos=None, mask=None, wraps=False):
        self.vocab_size, self.wraps = vocab_size, wraps
        self.pad, self.bos, self.eos, self.mask = pad, bos, eos, mask

    def wrap(self, ids):
        return [self.bos, *ids, self.eos] if self.wraps else list(ids)


class BPE(Tokenizer):
    """A tiktoken.Encoding; ids[rank] is the id of the token with that rank, the rank itself if not given."""

    def __init__(self, encoding, ids=None, **special):
        super().__init__(encoding.n_vocab, **special)
        self.encoding = encoding
        self.ids = list(range(encoding.n_vocab)) if ids is None else ids
        self.ranks = {i: rank for rank, i in enumerate(self.ids)}

    def encode(self, text):
        return [self.ids[rank] for rank in self.encoding.encode_ordinary(text)]

    def decode(self, ids):
        known = [self.ranks[i] for i in ids if i in self.ranks]  # a model may have more rows than there are tokens
        return self.encoding.decode(known)


class WordPiece(Tokenizer):
    """A `tokenizers.Tokenizer` with BERT's special tokens."""

    def __init__(self, pieces):
        pad, bos, eos, mask = map(pieces.token_to_id, ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
        if bos is None or eos is None:
            raise ValueError("this WordPiece vocabulary has no [CLS] or no [SEP]: not a BERT tokenizer")
        super().__init__(pieces.get_vocab_size(), pad, bos, eos, mask, wraps=True)
        pieces.no_padding()
        pieces.no_truncation()
        pieces.encode_special_tokens = True  # "[MASK]" in a text is five letters and two brackets
        self.pieces = pieces

    def encode(self, text):
        return self.pieces.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.pieces.decode(list(ids), skip_special_tokens=False)


def world(wraps=True):
    """The little world's. Its BERTs read a text between [CLS] and [SEP], its GPTs (wraps=False) as it is."""
    ranks = {}
    for line in bpe.FILE.read_text(encoding="ascii").splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    special = {token: rank for rank, token in enumerate(bpe.SPECIAL, start=len(ranks))}
    encoding = tiktoken.Encoding("world", pat_str=bpe.PATTERN, mergeable_ranks=ranks, special_tokens=special)
    pad, bos, eos, mask = (special[token] for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
    return BPE(encoding, pad=pad, bos=bos, eos=eos, mask=mask, wraps=wraps)


def byte_letters():
    """GPT-2's alphabet for vocab.json and merges.txt: {letter: byte}. A byte that prints is its own letter;
    the others, the space among them, get the letters from 256 on, in order.
    """
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + n): byte for n, byte in enumerate(others)}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_settings(folder, plain):
    """tokenizer_config.json and tokenizer.json, {} where absent.

    Without the second the first must name one of the `plain` classes, "Fast" or not: those are known here.
    """
    settings, whole = read_json(folder / "tokenizer_config.json"), read_json(folder / "tokenizer.json")
    name = settings.get("tokenizer_class") or plain[0]
    if not whole and name.removesuffix("Fast") not in plain:
        raise ValueError(f"{folder}: tokenizer_class={name!r}; this reader knows {', '.join(plain)}")
    return settings, whole


def bpe_from(folder, wraps):
    """GPT-2's (wraps=False) or RoBERTa's tokenizer, from vocab.json and merges.txt or tokenizer.json."""
    folder = Path(folder)
    vocab, merges = read_merges(folder)
    letters = byte_letters()
    tokens = list(dict.fromkeys([*letters, *map("".join, merges)]))  # in the order of their ranks
    if missing := [token for token in tokens if token not in vocab]:
        raise ValueError(f"{folder}: vocab.json lacks {len(missing)} tokens of merges.txt: {missing[:5]}")
    special = sorted(vocab.keys() - set(tokens), key=vocab.get)
    encoding = tiktoken.Encoding(
        folder.name, pat_str=GPT2_PATTERN,
        mergeable_ranks={bytes(letters[c] for c in token): rank for rank, token in enumerate(tokens)},
        special_tokens={token: rank for rank, token in enumerate(special, start=len(tokens))})
    bos, eos = ("<s>", "</s>") if wraps else ("<|endoftext|>", "<|endoftext|>")
    if wraps and not {bos, eos} <= vocab.keys():
        raise ValueError(f"{folder}: vocab.json has no <s> or no </s>: not a RoBERTa tokenizer")
    return BPE(encoding, [vocab[token] for token in tokens + special], wraps=wraps, pad=vocab.get("<pad>"),
               bos=vocab.get(bos), eos=vocab.get(eos), mask=vocab.get("<mask>"))


def read_merges(folder):
    """vocab {token: id} and merges [(left, right), ...], both in GPT-2's letters for bytes."""
    settings, whole = read_settings(folder, PLAIN_BPE)
    if settings.get("add_prefix_space"):
        raise ValueError(f"{folder}: add_prefix_space={settings['add_prefix_space']}; supported is false")
    if whole:
        check_byte_level(folder, whole)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return read_json(folder / "vocab.json"), merges
    if whole:
        merges = whole["model"]["merges"]  # pairs; in older files one string
        return whole["model"]["vocab"], [m.split(" ") if isinstance(m, str) else m for m in merges]
    raise FileNotFoundError(f"{folder}: no tokenizer; GPT-2's and RoBERTa's is vocab.json and merges.txt")


def check_byte_level(folder, whole):
    """tokenizer.json can hold any tokenizer; this reader knows GPT-2's way of cutting a text."""
    cut = whole.get("pre_tokenizer") or {}
    found = {
        "model": whole["model"].get("type", "BPE"), "normalizer": whole.get("normalizer"),
        "pre_tokenizer": cut.get("type"), "add_prefix_space": cut.get("add_prefix_space"),
        "use_regex": cut.get("use_regex", True)}
    wanted = {
        "model": "BPE", "normalizer": None, "pre_tokenizer": "ByteLevel", "add_prefix_space": False,
        "use_regex": True}
    if wrong := {key: value for key, value in found.items() if value != wanted[key]}:
        raise ValueError(f"{folder}: tokenizer.json has {wrong}; supported is {wanted}")


def wordpiece_from(folder):
    """BERT's tokenizer from tokenizer.json, or from vocab.txt and tokenizer_config.json (do_lower_case)."""
    try:
        import tokenizers
    except ImportError:
        raise ImportError("BERT's WordPiece needs the package tokenizers: pip install tokenizers") from None
    folder = Path(folder)
    settings, whole = read_settings(folder, PLAIN_WORDPIECE)
    if whole:
        if whole["model"].get("type", "WordPiece") != "WordPiece":
            raise ValueError(f"{folder}: tokenizer.json has model {whole['model']['type']!r}, not WordPiece")
        return WordPiece(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
    if not (folder / "vocab.txt").exists():
        raise FileNotFoundError(f"{folder}: a BERT tokenizer is tokenizer.json or vocab.txt")
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocab = {token: n for n, token in enumerate(lines)}
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    pieces.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True), strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pieces.decoder = tokenizers.decoders.WordPiece()
    return WordPiece(pieces)
