"""Text to token ids and back: one small interface, three ways in.

    BPE          byte pairs through tiktoken: the little world's own table, or a GPT-2 or RoBERTa checkpoint's
    WordPiece    a BERT checkpoint's, through the package `tokenizers`

    encode(text) -> ids                  nothing is added, and no piece of a text ever becomes a special token
    decode(ids) -> text
    wrap(ids)    -> [bos, *ids, eos]     [CLS] .. [SEP] (BERT), <s> .. </s> (RoBERTa), the ids alone (GPT)
    pad bos eos mask unk                 ids, None where the family has no such token
    vocab_size
    in_use                               the ids that texts are made of: no special token, none that never occurs

Byte-pair encoding starts from single bytes and joins the neighbours whose union has the lowest rank, over
and over (Sennrich et al. 2016; over bytes: GPT-2). RoBERTa has GPT-2's ranks and its own ids, so an id is
looked up once the ranks have done their work. What a checkpoint's files say is read in tokenizer_files.py.
"""

import base64
import re
from pathlib import Path

import tiktoken

from data import bpe, tokenizer_files
from data.files import shown
from model import Refused

# How GPT-2 cuts a text before any bytes are joined: a word keeps the space before it.
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Rows that BERT keeps free for tokens of one's own: random vectors, as no text holds them.
UNUSED = re.compile(r"\[unused\d+\]")


class Tokenizer:
    """What the tokenizers share: the ids in use, five special ones and `wrap`."""

    def __init__(self, vocab_size, in_use=None, pad=None, bos=None, eos=None, mask=None, unk=None, wraps=False):
        self.vocab_size, self.wraps = vocab_size, wraps
        self.in_use = list(range(vocab_size)) if in_use is None else in_use
        self.pad, self.bos, self.eos, self.mask, self.unk = pad, bos, eos, mask, unk

    def wrap(self, ids):
        return [self.bos, *ids, self.eos] if self.wraps else list(ids)


class BPE(Tokenizer):
    """A tiktoken.Encoding. ids[rank] is the id of the token with that rank, the rank itself if not given; `words`
    {word: id} were added later, and each is one token wherever it stands.
    """

    def __init__(self, encoding, ids=None, words=None, **special):
        self.encoding, self.words = encoding, words or {}
        self.ids = list(range(encoding.n_vocab)) if ids is None else ids
        self.ranks = {i: rank for rank, i in enumerate(self.ids)}
        super().__init__(max(self.ids) + 1, **special)
        longest_first = sorted(self.words, key=len, reverse=True)
        self.word = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if words else None

    def encode(self, text):
        found = []
        for part in self.word.split(text) if self.word else [text]:
            found += [self.words[part]] if part in self.words else self.pieces(part)
        return found

    def pieces(self, text):
        return [self.ids[rank] for rank in self.encoding.encode_ordinary(text)]

    def decode(self, ids):
        known = [self.ranks[i] for i in ids if i in self.ranks]  # a model may have more rows than there are tokens
        return self.encoding.decode(known)


class WordPiece(Tokenizer):
    """A `tokenizers.Tokenizer`, which does BERT's own cutting."""

    def __init__(self, pieces, vocab_size, **special):
        super().__init__(vocab_size, wraps=True, **special)
        self.pieces = pieces

    def encode(self, text):
        return self.pieces.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.pieces.decode(list(ids), skip_special_tokens=False)


def world(wraps=True):
    """The little world's. Its BERTs read a text between [CLS] and [SEP], its GPTs (wraps=False) as it is."""
    ranks, in_use = {}, []
    for line in bpe.FILE.read_text(encoding="ascii").splitlines():
        token, rank, n = line.split()
        ranks[base64.b64decode(token)] = int(rank)
        in_use += [int(rank)] if int(n) else []
    special = {token: rank for rank, token in enumerate(bpe.SPECIAL, start=len(ranks))}
    encoding = tiktoken.Encoding("world", pat_str=bpe.PATTERN, mergeable_ranks=ranks, special_tokens=special)
    pad, bos, eos, mask = (special[token] for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
    return BPE(encoding, in_use=in_use, pad=pad, bos=bos, eos=eos, mask=mask, wraps=wraps)


def byte_letters():
    """GPT-2's alphabet for vocab.json and merges.txt: {letter: byte}. A byte that prints is its own letter;
    the others, the space among them, get the letters from 256 on, in order.
    """
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + n): byte for n, byte in enumerate(others)}


def bpe_from(folder, wraps):
    """GPT-2's (wraps=False) or RoBERTa's tokenizer, from vocab.json and merges.txt or tokenizer.json."""
    said = tokenizer_files.read(folder, "roberta" if wraps else "gpt2")
    letters = byte_letters()
    tokens = list(dict.fromkeys([*letters, *map("".join, said.merges)]))  # in the order of their ranks
    if missing := [token for token in tokens if token not in said.vocab]:
        raise Refused(f"{folder}: the vocabulary lacks {len(missing)} tokens of the merges: {shown(repr(missing[:5]))}")
    if foreign := [token for token in tokens if not letters.keys() >= set(token)]:
        raise Refused(f"{folder}: the merges make {shown(repr(foreign[0]))}, which is not in GPT-2's letters for bytes")
    check_merges(folder, said.merges)
    special = sorted(said.vocab.keys() - set(tokens), key=said.vocab.get)
    encoding = tiktoken.Encoding(
        Path(folder).name, pat_str=GPT2_PATTERN,
        mergeable_ranks={bytes(letters[c] for c in token): rank for rank, token in enumerate(tokens)},
        special_tokens={token: rank for rank, token in enumerate(special, start=len(tokens))})
    words = {token: found["id"] for token, found in said.added.items() if not found["special"]}
    for token in words:
        if any(said.added[token][flag] for flag in ("single_word", "lstrip", "rstrip")):
            raise Refused(f"{folder}: the added word {shown(repr(token))} has single_word, lstrip or rstrip; supported "
                          "is a word that is found wherever it stands, without the spaces around it")
    ids = [said.vocab[token] for token in tokens + special]
    return BPE(encoding, ids, words, in_use=ids[:len(tokens)], wraps=wraps, **special_ids(said))


def check_merges(folder, merges):
    """tiktoken joins any neighbours whose union is a token, merges.txt only its pairs, each at its rank. Both give
    the same where every token comes out of its own first pair; in two tables put end to end it does not.
    """
    ranks, first = {}, {}
    for pair in merges:
        ranks.setdefault(pair, len(ranks))
        first.setdefault("".join(pair), pair)
    for token, pair in first.items():
        if len(token) > 2 and last_pair(token, ranks) != pair:
            raise Refused(f"{folder}: the merge {' '.join(pair)!r} makes {token!r}, which the merges before it "
                          "keep from being made; supported is a table that was trained whole, not two that were joined")


def last_pair(token, ranks):
    """The pair that is joined last when byte-pair encoding makes `token` out of its letters; None if it does not."""
    parts, never = list(token), len(ranks)
    while len(parts) > 1:
        rank, pair = min((ranks.get(pair, never), pair) for pair in zip(parts, parts[1:]))
        if rank == never:
            return None
        n = 0
        while n + 1 < len(parts):
            if (parts[n], parts[n + 1]) == pair:
                parts[n:n + 2] = ["".join(pair)]
            n += 1
    return pair


def special_ids(said):
    return {role: said.vocab.get(token) for role, token in said.special.items()}


def wordpiece_from(folder):
    """BERT's tokenizer, from tokenizer.json or from vocab.txt and tokenizer_config.json (do_lower_case)."""
    try:
        import tokenizers
    except ImportError:
        raise Refused("BERT's WordPiece needs the package tokenizers: pip install tokenizers") from None
    said = tokenizer_files.read(folder, "bert")
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(said.own, unk_token=said.special["unk"]))
    pieces.normalizer = tokenizers.normalizers.BertNormalizer(**said.normalizer)
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pieces.decoder = tokenizers.decoders.WordPiece()
    pieces.encode_special_tokens = True  # "[MASK]" in a text is five letters and two brackets
    for token, found in sorted(said.added.items(), key=lambda item: item[1]["id"]):
        flags = {name: value for name, value in found.items() if name != "id"}
        (pieces.add_special_tokens if found["special"] else pieces.add_tokens)([tokenizers.AddedToken(token, **flags)])
        if (n := pieces.token_to_id(token)) != found["id"]:  # it gives out the next free one
            raise Refused(f"{folder}: the added token {shown(repr(token))} has id {found['id']}; the next free id of "
                          f"this vocabulary is {n}")
    special = {*said.special.values(), *(token for token, found in said.added.items() if found["special"])}
    in_use = [n for token, n in said.vocab.items() if token not in special and not UNUSED.fullmatch(token)]
    return WordPiece(pieces, max(said.vocab.values()) + 1, in_use=in_use, **special_ids(said))
