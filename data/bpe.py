"""Byte-pair encoding: how the little world's text becomes tokens.

A text is cut into words, each with the space before it (`PATTERN`), and a word into bytes. Training repeats

    merge the pair of neighbours that is most frequent in the corpus into a new token

until every word is one token or the vocabulary is full. Encoding repeats the merges in the same order. The
world is small, so every one of its words ends as one token; a word from elsewhere falls apart into pieces,
down to bytes.

The result is `bpe.txt`, one token a line: its bytes in base64 and its rank (which is its id), as in tiktoken's
format, and how often it stands in the corpus. Three in four never do: single bytes, and pieces that were only on
the way to a word. The special tokens take the ids that follow. `python -m data.bpe` makes the file again.
"""

import base64
import re
from collections import Counter
from pathlib import Path

FILE = Path(__file__).with_name("bpe.txt")
PATTERN = r" ?[a-z]+| ?[0-9]+| ?[^\sa-z0-9]+|\s+"
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 1024                                  # special tokens included


def train(texts, size):
    """{token: how often it stands in `texts`}, by rank: the `size` tokens (bytes) that byte-pair encoding finds;
    fewer if it runs dry.
    """
    counts = Counter(word.encode() for text in texts for word in re.findall(PATTERN, text))
    words = {word: [bytes([byte]) for byte in word] for word in counts}
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < size:
        pairs = Counter()
        for word, parts in words.items():
            for first, second in zip(parts, parts[1:]):
                pairs[first + second] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(best)
        words = {word: merge(parts, best) for word, parts in words.items()}
    left = Counter()
    for word, parts in words.items():
        for part in parts:
            left[part] += counts[word]
    return {token: left[token] for token in tokens}


def merge(parts, token):
    """[b"a", b"b", b"a"] with the token b"ab" -> [b"ab", b"a"]."""
    merged = []
    for part in parts:
        if merged and merged[-1] + part == token:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def write(tokens, file=FILE):
    lines = [f"{base64.b64encode(token).decode()} {rank} {n}" for rank, (token, n) in enumerate(tokens.items())]
    file.write_text("\n".join(lines) + "\n", encoding="ascii")


if __name__ == "__main__":
    from data.world import corpus

    tokens = train((f"{given} {told}" for given, told in corpus(50_000)), VOCABULARY - len(SPECIAL))
    write(tokens)
    print(f"{len(tokens)} tokens, {sum(map(bool, tokens.values()))} in use, and {len(SPECIAL)} special -> {FILE}")
