"""Folders as they come from elsewhere: old, half there, edited by hand, or made to be read wrongly.

What is harmless is read, and gives transformers' logits and ids; the rest is refused in a line that names the file
and what is wrong in it.
"""

import json
import os
import re
import struct

import pytest
import torch

extras = "pip install -r requirements-extra.txt"
pytest.importorskip("safetensors", reason=extras)
pytest.importorskip("tokenizers", reason=extras)
transformers = pytest.importorskip("transformers", reason=extras)

from safetensors.torch import load_file, save_file

from data import bases, checkpoints
from data.bases import load_base
from data.tokenizers import bpe_from, byte_letters, wordpiece_from
from model import Refused
from test_checkpoints import HEADS, build, close, configure, ours, text

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] rem ##des ##ivir works good".split()
LETTERS = list(byte_letters())


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def without(folder, *keys):
    path = folder / "config.json"
    write(path, {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key not in keys})


def refused(message, call, *inputs):
    with pytest.raises(Refused, match=message) as caught:
        call(*inputs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


def words(folder, more=(), **settings):
    """A BERT's tokenizer: vocab.txt and tokenizer_config.json."""
    write(folder / "vocab.txt", "\n".join([*WORDS, *more]) + "\n")
    write(folder / "tokenizer_config.json", settings)
    return folder


def byte_pairs(folder, merges=(), more=("<|endoftext|>",), **settings):
    """A GPT-2's tokenizer: vocab.json, merges.txt and tokenizer_config.json."""
    tokens = [*LETTERS, *map("".join, merges), *more]
    write(folder / "vocab.json", {token: n for n, token in enumerate(tokens)})
    write(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    write(folder / "tokenizer_config.json", settings)
    return folder


# ---- config.json ----

def test_what_a_family_leaves_out_has_its_usual_value(tmp_path):
    (ids, keep), cases = text("bert"), {
        "bert": ("layer_norm_eps", "hidden_act", "type_vocab_size", "tie_word_embeddings"),
        "gpt2": ("layer_norm_epsilon", "activation_function", "n_inner")}
    for family, keys in cases.items():
        usual = {"layer_norm_eps": 1e-12} if family == "bert" else {"layer_norm_epsilon": 1e-5, "n_inner": None}
        theirs = build(family, HEADS, **usual)
        theirs.save_pretrained(tmp_path)
        without(tmp_path, *keys)
        model = ours(tmp_path).double()
        expected = (1e-12, "gelu") if family == "bert" else (1e-5, "gelu_tanh")
        assert (model.config.eps, model.config.activation) == expected
        close(model(ids, keep)[keep], theirs.double()(ids, attention_mask=keep).logits[keep])


def test_gpt2_may_call_its_sizes_as_bert_does(tmp_path):
    build("gpt2", HEADS).save_pretrained(tmp_path)
    config = checkpoints.read(tmp_path)[0]
    without(tmp_path, "n_embd", "n_layer", "n_head", "n_positions")
    configure(tmp_path, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=11)
    assert checkpoints.read(tmp_path)[0] == config
    configure(tmp_path, n_head=2)
    refused("n_head=2 and num_attention_heads=3", checkpoints.read, tmp_path)


def test_notes_of_other_libraries_change_nothing(tmp_path):
    build("gpt2", HEADS).save_pretrained(tmp_path)
    config, state = checkpoints.read(tmp_path)
    configure(tmp_path, sentence_transformers={"activation_fn": "torch.nn.Identity"}, adapters={"adapters": {}},
              sbert_ce_default_activation_function="torch.nn.Identity", max_seq_length=128, base_model_prefix="x",
              unsloth_version="2024.8", bad_words_ids=[[1]], early_stopping=True, eos_token_ids=2,
              reorder_and_upcast_attn=True, **{"transformers.js_config": {"dtype": "q8"}})
    again = checkpoints.read(tmp_path)
    assert again[0] == config and all(torch.equal(again[1][name], state[name]) for name in state)


def test_a_number_of_another_type_or_range_is_named(tmp_path):
    build("bert", HEADS).save_pretrained(tmp_path)
    good = (tmp_path / "config.json").read_text(encoding="utf-8")
    for key, value in (
            ("num_hidden_layers", "two"), ("num_hidden_layers", 10**9), ("num_hidden_layers", 1),
            ("num_hidden_layers", 0), ("num_attention_heads", 0), ("num_attention_heads", -3), ("hidden_size", 12.0),
            ("hidden_size", True), ("vocab_size", 10**30), ("layer_norm_eps", float("nan")), ("layer_norm_eps", -1),
            ("layer_norm_eps", 10**400), ("hidden_act", ["gelu"]), ("hidden_act", "silu"), ("model_type", ["bert"]),
            ("tie_word_embeddings", "yes"), ("max_position_embeddings", 12), ("num_attention_heads", 5)):
        write(tmp_path / "config.json", good)
        configure(tmp_path, **{key: value})
        name = {"num_attention_heads": "num_attention_heads|n_head", "num_hidden_layers": "num_hidden_layers|layers",
                "vocab_size": "vocab_size", "max_position_embeddings": "position_embeddings"}.get(key, key)
        assert "config.json" in refused(name, checkpoints.read, tmp_path)
    for broken, why in (("null", "an object is expected"), ("[" * 100_000, "nested too deeply"),
                        (good[:90], "not JSON"), ('{"model_type": "b\xe9rt"}'.encode("latin-1"), "not UTF-8")):
        (tmp_path / "config.json").write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        refused(f"config.json: .*{why}", checkpoints.read, tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    words(tmp_path, do_lower_case=True)
    build("bert", HEADS).save_pretrained(tmp_path)
    config, ids = checkpoints.read(tmp_path)[0], wordpiece_from(tmp_path).encode("remdesivir works")
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        path = tmp_path / name
        path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert checkpoints.read(tmp_path)[0] == config
    tokenizer = wordpiece_from(tmp_path)
    assert tokenizer.encode("remdesivir works") == ids and tokenizer.pad == 0


# ---- weights ----

def test_pointers_halves_and_what_is_no_file_are_told(tmp_path):
    build("gpt2", HEADS).save_pretrained(tmp_path)
    byte_pairs(tmp_path)
    path = tmp_path / "model.safetensors"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
    whole = path.read_bytes()
    for half in (b"", whole[:5], whole[:200], whole[:-1], whole + b"0", b"\xff" * 100):
        path.write_bytes(half)
        refused("model.safetensors: cut short, or not a safetensors file", checkpoints.read, tmp_path)
    write(path, pointer)
    refused("model.safetensors: a git-lfs pointer", checkpoints.read, tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "part").mkdir(exist_ok=True)
        configure(tmp_path, vocab_size=257)
        config = (tmp_path / "config.json").read_text(encoding="utf-8")
        write(tmp_path / name, pointer)
        refused(f"{name}: a git-lfs pointer", checkpoints.tokenizer, tmp_path)
        (tmp_path / name).unlink()
        write(tmp_path / "config.json", config)
    path.unlink()
    os.mkfifo(path)
    refused("model.safetensors: not a regular file", checkpoints.read, tmp_path)
    path.unlink()
    path.mkdir()
    refused("model.safetensors: not a regular file", checkpoints.read, tmp_path)


def test_weights_that_no_training_leaves_are_refused_by_name(tmp_path):
    build("gpt2", HEADS).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    good, name = load_file(path), "transformer.h.1.mlp.c_fc.bias"
    for value, why in ((float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity")):
        save_file(good | {name: torch.full_like(good[name], value)}, path)
        refused(rf"model.safetensors: h.1.mlp.c_fc.bias holds {why}", checkpoints.read, tmp_path)
    for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        save_file(good | {name: good[name].to(dtype)}, path)
        refused(rf"h.1.mlp.c_fc.bias is {dtype}", checkpoints.read, tmp_path)
    for shape in ((), (20, 1), (1, 20, 1), (21,), (0,)):
        save_file(good | {name: torch.zeros(shape)}, path)
        refused(r"h.1.mlp.c_fc.bias is .*config.json says \(20,\)", checkpoints.read, tmp_path)
    joined = "transformer.h.0.attn.c_attn.weight"
    for shape in ((12, 37), (12, 24), (36,), (12, 36, 1), ()):
        save_file(good | {joined: torch.zeros(shape)}, path)
        refused(r"h.0.attn.c_attn.weight", checkpoints.read, tmp_path)
    save_file(good | {"wte.weight": torch.zeros(17, 12)}, path)
    refused("wte.weight stands there twice", checkpoints.read, tmp_path)
    save_file(good | {name: (good[name].double() + 1e300)}, path)
    refused("holds NaN or infinity", checkpoints.read, tmp_path)


def test_a_header_that_promises_much_is_not_believed(tmp_path):
    build("gpt2", HEADS).save_pretrained(tmp_path)
    for tensor in ({"dtype": "F32", "shape": [10**12, 12], "data_offsets": [0, 48]},
                   {"dtype": "F33", "shape": [12], "data_offsets": [0, 48]}, {"dtype": "F32"}, 7):
        header = json.dumps({"wte.weight": tensor}).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(48))
        refused("model.safetensors: cut short, or not", checkpoints.read, tmp_path)


def test_an_index_names_files_of_its_own_folder(tmp_path):
    folder = tmp_path / "model"
    build("gpt2", HEADS).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "blob")
    index = folder / "model.safetensors.index.json"
    for name in ("../blob", str(tmp_path / "blob"), "", "..", 3, "gone.safetensors"):
        write(index, {"weight_map": {"wte.weight": name}})
        refused("index.json: the file|no such file|not a regular file", checkpoints.read, folder)
    (folder / "all.safetensors").symlink_to("../blob")  # a link is followed: Hugging Face's cache is made of them
    write(index, {"weight_map": {"wte.weight": "all.safetensors"}})
    assert torch.equal(checkpoints.read(folder)[1]["tokens.weight"], tensors["transformer.wte.weight"])
    save_file({"wte.weight": tensors["transformer.wte.weight"]}, folder / "more.safetensors")
    write(index, {"weight_map": {"a": "all.safetensors", "b": "more.safetensors"}})
    refused("wte.weight stands there twice", checkpoints.read, folder)
    for odd in ({}, {"weight_map": []}, {"weight_map": None}):
        write(index, odd)
        refused("index.json.*weight_map", checkpoints.read, folder)


def test_shipped_weights_are_those_that_were_kept(tmp_path, monkeypatch):
    for name in ("gpt-xs.pt", "SHA256"):
        (tmp_path / name).write_bytes((bases.WEIGHTS / name).read_bytes())
    monkeypatch.setattr(bases, "WEIGHTS", tmp_path)
    load_base("gpt-xs")
    path = tmp_path / "gpt-xs.pt"
    whole = path.read_bytes()
    for changed in (whole[:-1000] + bytes([whole[-1000] ^ 64]) + whole[-999:], whole[:5000], b"", whole + b"0"):
        path.write_bytes(changed)
        refused("gpt-xs.pt: SHA-256 .* is not the one in .*SHA256", load_base, "gpt-xs")
    path.write_bytes(whole)
    (tmp_path / "SHA256").unlink()
    refused("not the one in .*SHA256, none", load_base, "gpt-xs")
    write(path, "version https://git-lfs.github.com/spec/v1\n")
    refused("gpt-xs.pt: a git-lfs pointer", load_base, "gpt-xs")

    tensors = torch.load(bases.Path(bases.__file__).parent / "weights" / "gpt-xs.pt", weights_only=True)
    tensors["blocks.0.mlp.up.bias"][3] = float("nan")
    torch.save(tensors, path)
    write(tmp_path / "SHA256", f"{bases.digest(path)}  gpt-xs.pt\n")
    refused("gpt-xs.pt: blocks.0.mlp.up.bias holds NaN", load_base, "gpt-xs")


# ---- tokenizers ----

def test_an_added_word_has_its_own_id_in_every_file_that_adds_it(tmp_path):
    build("bert", HEADS).save_pretrained(tmp_path)
    plain = words(tmp_path, do_lower_case=True)
    assert wordpiece_from(plain).encode("Remdesivir works") == [5, 6, 7, 8]
    write(tmp_path / "added_tokens.json", {"remdesivir": 10})
    assert wordpiece_from(tmp_path).encode("Remdesivir works") == [10, 8]
    write(tmp_path / "added_tokens.json", {"remdesivir": 12})  # the library would give it 10
    refused("'remdesivir' has id 12; the next free id of this vocabulary is 10", wordpiece_from, tmp_path)
    (tmp_path / "added_tokens.json").unlink()

    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["remdesivir", "Two Words", transformers.AddedToken("<b>", lstrip=True, single_word=True)])
    theirs.add_special_tokens({"additional_special_tokens": ["<user>"]})
    theirs.save_pretrained(tmp_path / "new")
    tokenizer = wordpiece_from(tmp_path / "new")
    for told in ("REMDESIVIR works", "two words  <b> works", "good<b>good remdesivirs", "xTwo Wordsx"):
        assert tokenizer.wrap(tokenizer.encode(told)) == theirs(told)["input_ids"], told
    assert 13 not in tokenizer.encode("<user> works"), "a special token is never read from a text"


def test_gpt2_splits_a_text_at_its_added_words(tmp_path):
    byte_pairs(tmp_path, [("Ġ", "g")], eos_token="<|endoftext|>")
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["rem", "remdesivir", "a b"])
    theirs.add_special_tokens({"additional_special_tokens": ["<user>"]})
    theirs.save_pretrained(tmp_path / "new")
    tokenizer = bpe_from(tmp_path / "new", wraps=False)
    for told in ("is remdesivir good", "remdesivirem", " a b  a bg", "rem", "", "aremdes a  b"):
        assert tokenizer.encode(told) == theirs(told)["input_ids"], told
        assert tokenizer.decode(tokenizer.encode(told)) == told
    assert tokenizer.decode(tokenizer.encode("<user>rem")) == "<user>rem" and len(tokenizer.encode("<user>")) == 6


def test_tables_that_were_joined_are_refused(tmp_path):
    byte_pairs(tmp_path, [("b", "c"), ("a", "b"), ("ab", "c")])
    refused("the merge 'ab c' makes 'abc'", bpe_from, tmp_path, False)
    byte_pairs(tmp_path, [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")])  # two ways, the first is always taken
    write(tmp_path / "vocab.json", {token: n for n, token in enumerate([*LETTERS, "ab", "abc", "bc"])})
    assert len(bpe_from(tmp_path, wraps=False).encode("abc")) == 1
    for line in ("ab", "a b c", " b", "a  b"):
        write(tmp_path / "merges.txt", f"#version: 0.2\na b\n{line}\n")
        refused(f"merges.txt: merge 2 is '?{line}'?, not two tokens", bpe_from, tmp_path, False)


def test_the_end_token_is_the_one_that_the_files_name(tmp_path):
    more = ["<s>", "</s>", "ordinary"]
    assert bpe_from(byte_pairs(tmp_path, more=more, eos_token="</s>"), False).eos == 257
    write(tmp_path / "tokenizer_config.json", {})
    assert bpe_from(tmp_path, wraps=False).eos is None
    write(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<s>", "lstrip": False}})
    assert bpe_from(tmp_path, wraps=False).eos == 256
    write(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    refused("special_tokens_map.json: eos_token is '<s>', in tokenizer_config.json '</s>'", bpe_from, tmp_path, False)
    (tmp_path / "special_tokens_map.json").unlink()
    write(tmp_path / "tokenizer_config.json", {"eos_token": "<end>"})
    refused("no eos_token <end>", bpe_from, tmp_path, False)
    write(tmp_path / "tokenizer_config.json", {})
    for n, eos in ((257, 257), (5, None), (999, None), ("</s>", None), ([257], None)):  # 5 is a letter of any word
        write(tmp_path / "config.json", {"eos_token_id": n})
        assert bpe_from(tmp_path, wraps=False).eos == eos


def test_a_tokenizers_settings_are_honoured_or_refused_by_name(tmp_path):
    fine = {"do_lower_case": False, "strip_accents": None, "model_max_length": 10**30, "never_split": [],
            "do_basic_tokenize": True, "tokenizer_class": "BertTokenizerFast", "padding_side": "left", "backend": "x"}
    assert wordpiece_from(words(tmp_path, **fine)).encode("Works works") == [1, 8]
    for key, value in (("never_split", ["works"]), ("do_basic_tokenize", False),
                       ("tokenizer_class", "BertJapaneseTokenizer"), ("subword_tokenizer_type", "character"),
                       ("auto_map", {"AutoTokenizer": ["x.y", None]}),
                       ("tokenizer_class", 7), ("tokenizer_class", "PreTrainedTokenizerFast")):
        words(tmp_path, **{key: value})
        refused(re.escape(f"tokenizer_config.json: {key}={value!r}"), wordpiece_from, tmp_path)
    for key, value in (("do_lower_case", "yes"), ("strip_accents", 1), ("cls_token", 7), ("added_tokens_decoder", []),
                       ("added_tokens_decoder", {"x": {"content": "y"}}), ("added_tokens_decoder", {"9": 3}),
                       ("added_tokens_decoder", {"9": {"content": "good", "lstrip": "no"}}),
                       ("additional_special_tokens", "x"), ("cls_token", "<s>"), ("unk_token", "?")):
        words(tmp_path, **{key: value})
        refused("tokenizer_config.json|no (cls|unk)_token", wordpiece_from, tmp_path)
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space"):
        byte_pairs(tmp_path, **{key: True})
        refused(f"{key}='?True", bpe_from, tmp_path, False)


def test_a_model_that_fills_in_masks_needs_a_mask_token(tmp_path):
    build("bert", HEADS).save_pretrained(tmp_path)
    words(tmp_path)
    load_base(tmp_path)
    write(tmp_path / "vocab.txt", "\n".join(WORDS).replace("[MASK]", "mask"))
    refused("its tokenizer has no mask token", load_base, tmp_path)


def test_two_files_that_say_different_things_are_refused(tmp_path):
    theirs = transformers.BertTokenizer.from_pretrained(words(tmp_path, do_lower_case=False))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    assert wordpiece_from(tmp_path).encode("Works works") == [1, 8]
    for settings in ({"do_lower_case": True}, {}, {"do_lower_case": False, "strip_accents": True}):
        write(tmp_path / "tokenizer_config.json", settings)
        refused("tokenizer.json has (lowercase|strip_accents)=.*tokenizer_config.json", wordpiece_from, tmp_path)
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})  # tokenizer.json decides
    assert wordpiece_from(tmp_path).encode("Works works") == [1, 8]
    for change in ({"post_processor": None}, {"post_processor": {"type": "BertProcessing", "cls": ["[CLS]", 3]}},
                   {"model": good["model"] | {"max_input_chars_per_word": 5}}, {"model": []}, {"model": {}},
                   {"pre_tokenizer": {"type": "Whitespace"}}, {"normalizer": None}, {"added_tokens": {}},
                   {"normalizer": good["normalizer"] | {"lowercase": "no"}},
                   {"added_tokens": [{"id": 8, "content": "good"}]}, {"added_tokens": [7]},
                   {"model": good["model"] | {"vocab": good["model"]["vocab"] | {"good": 8}}},
                   {"model": good["model"] | {"vocab": list(good["model"]["vocab"])}}):
        write(path, good | change)
        refused("tokenizer.json|vocabulary", wordpiece_from, tmp_path)


def test_two_tokens_never_share_an_id(tmp_path):
    byte_pairs(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    for change, why in (
            ({"A": vocab["B"]}, "'A' and 'B' share id"), ({"A": -1}, "'A' has id -1"), ({"A": "1"}, "'A' has id '1'"),
            ({"A": True}, "'A' has id True"), ({"A": 10**40}, "'A' has id 1000"),
            ({"\ud800": 300}, "half a character")):
        write(tmp_path / "vocab.json", vocab | change)
        refused(f"vocab.json: .*{why}", bpe_from, tmp_path, False)
    write(words(tmp_path) / "vocab.txt", "\n".join([*WORDS, "good"]))
    refused("vocab.txt, line 11: 'good' stands on line 10 already", wordpiece_from, tmp_path)
