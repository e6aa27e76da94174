"""Reads a Hugging Face folder (config.json and model.safetensors) of the GPT-2, BERT or RoBERTa family.

    config, state = read(folder)
    model = Transformer(config)
    model.load_state_dict(state)                 # strict: read() gives every tensor, in float32

The three families are this project's one Transformer under other names; three things differ in substance:

    GPT-2     matrices are stored (in, out), and query, key, value lie side by side in one `c_attn`
    RoBERTa   positions are counted from pad_token_id + 1, so the first rows of its table are never used
    BERT      LayerNorm's weight and bias are called gamma and beta in old files

A setting that would change the computation and a tensor that has no place here are errors, each by name.
Left out without a word: buffers (masks, counts of positions), BERT's next-sentence head, and RoBERTa's
pooler, which that family's pretraining never trained. Left out with a warning: the heads of other tasks.
"""

import json
import re
import warnings
from pathlib import Path

import torch

from data.tokenizers import bpe_from, wordpiece_from
from model import Config, Transformer

ACTIVATION = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

# What a setting must be, where it stands in config.json at all.
MUST_BE = {
    "position_embedding_type": "absolute", "is_decoder": False, "is_encoder_decoder": False,
    "add_cross_attention": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False, "pruned_heads": {}}
READ = {
    "model_type", "vocab_size", "tie_word_embeddings",
    "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon",
    "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "hidden_act", "layer_norm_eps", "type_vocab_size"}
# Settings of training, generation and bookkeeping: none of them changes what the model computes.
NO_MATTER = re.compile(
    r"_.*|.*_token_id|.*drop.*|summary_.*|pooler_.*|output_.*|return_dict.*|initializer_.*|use_cache|prefix"
    r"|torchscript|gradient_checkpointing|transformers_version|architectures|(torch_)?dtype|id2label|label2id"
    r"|num_labels|problem_type|finetuning_task|task_specific_params|chunk_size_feed_forward|directionality"
    r"|language|tokenizer_class|n_ctx|n_special|predict_special_tokens|do_sample|(max|min)_length|temperature"
    r"|top_[kp]|typical_p|num_(beams|beam_groups|return_sequences)|(length|repetition|diversity)_penalty"
    r"|(encoder_)?no_repeat_ngram_size")

BUFFERS = re.compile(r"(.*\.)?(attn\.(bias|masked_bias)|position_ids|token_type_ids)")
OTHER_HEADS = re.compile(r"(classifier|score|qa_outputs|multiple_choice_head)\..*")
UNTRAINED = {"gpt2": (), "bert": ("cls.seq_relationship.",), "roberta": ("pooler.",)}
PREFIX = {"gpt2": "transformer.", "bert": "bert.", "roberta": "roberta."}
LM_HEAD = {"bert": "cls.predictions", "roberta": "lm_head"}


def read(folder):
    """folder -> (Config, state dict in float32 for Transformer(config)).

    The LM head comes along where the file has one (GPT-2's tied head is there by definition), else
    lm_head="none". Raises ValueError for settings or tensors that this project's model cannot honour,
    FileNotFoundError for a missing file, ImportError where safetensors is not installed.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    tensors = load_tensors(folder, settings["model_type"])
    try:
        config, names = (read_gpt2 if settings["model_type"] == "gpt2" else read_bert)(settings, tensors)
    except KeyError as error:
        raise ValueError(f"{folder}: config.json has no {error}") from None
    with torch.device("meta"):
        wanted = {key: tensor.shape for key, tensor in Transformer(config).state_dict().items()}
    sources = {}
    for key in wanted:
        module, leaf = key.rsplit(".", 1)
        sources[key] = names.get(key) or f"{names[module]}.{leaf}"

    faults = [f"{name} has no place in this model" for name in tensors if name not in sources.values()]
    for key, name in sources.items():
        if name not in tensors:
            faults.append(f"{name} is missing")
        elif tensors[name].shape != wanted[key]:
            faults.append(f"{name} is {tuple(tensors[name].shape)}, config.json says {tuple(wanted[key])}")
    if faults:
        raise ValueError(f"{folder}: {len(faults)} tensors do not fit: {'; '.join(faults[:8])}")
    return config, {key: tensors[name].to(torch.float32) for key, name in sources.items()}


def tokenizer(folder):
    """The tokenizer that belongs to the checkpoint: WordPiece for BERT, byte pairs for GPT-2 and RoBERTa."""
    settings = read_settings(Path(folder))
    family = settings["model_type"]
    tokens = wordpiece_from(folder) if family == "bert" else bpe_from(folder, wraps=family == "roberta")
    if tokens.vocab_size > settings["vocab_size"]:
        raise ValueError(f"{folder}: the tokenizer has {tokens.vocab_size} tokens, the model only "
                         f"vocab_size={settings['vocab_size']}")
    return tokens


def read_settings(folder):
    """config.json without its nulls, once every setting in it is known to be honoured or harmless."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so not a checkpoint's folder")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if value is not None}
    if settings.get("model_type") not in PREFIX:
        raise ValueError(f"{folder}: config.json has model_type={settings.get('model_type')!r}; "
                         f"this reader knows {', '.join(PREFIX)}")
    must_be = MUST_BE | {"embedding_size": settings.get("hidden_size")}
    for key, value in settings.items():
        if key in must_be and value != must_be[key]:
            raise ValueError(f"{folder}: config.json has {key}={value!r}; only {must_be[key]!r} is supported")
        if value in (False, {}, [], "") or key in must_be or key in READ or NO_MATTER.fullmatch(key):
            continue
        raise ValueError(f"{folder}: config.json has {key}={value!r}, which this reader does not know; "
                         "if it does not change what the model computes, delete that line")
    return settings


def load_tensors(folder, family):
    """{name: tensor} of one file or of several, without the family's prefix and what is left out."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("reading a checkpoint needs safetensors: pip install safetensors") from None
    files = ["model.safetensors"]
    if (index := folder / "model.safetensors.index.json").exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif not (folder / files[0]).exists():
        kind = "AutoModelForCausalLM" if family == "gpt2" else "AutoModelForMaskedLM"
        raise FileNotFoundError(
            f"{folder}: no model.safetensors. To convert pytorch_model.bin: "
            f"python -c \"from transformers import {kind} as M; "
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\"")
    tensors, left_out = {}, []
    for name, tensor in (item for file in files for item in load_file(folder / file).items()):
        name = name.removeprefix(PREFIX[family])
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if OTHER_HEADS.fullmatch(name):
            left_out.append(name)
        elif not BUFFERS.fullmatch(name) and not name.startswith(UNTRAINED[family]):
            tensors[name] = tensor
    if left_out:
        warnings.warn(f"{folder}: the head of another task is left out: {', '.join(left_out)}", stacklevel=3)
    return tensors


def activation(settings, key):
    if settings[key] not in ACTIVATION:
        raise ValueError(f"config.json has {key}={settings[key]!r}; choose from {', '.join(ACTIVATION)}")
    return ACTIVATION[settings[key]]


def drop_copy(tensors, copy, original):
    """Tied tensors are sometimes stored twice; two that differ are not tied, whatever config.json says."""
    if {copy, original} <= tensors.keys() and not torch.equal(tensors.pop(copy), tensors[original]):
        raise ValueError(f"config.json has tie_word_embeddings=True, but {copy} and {original} differ")


def read_gpt2(settings, tensors):
    """Config and {our module or tensor: the file's}; c_attn is taken apart and matrices become (out, in)."""
    tied = settings.get("tie_word_embeddings", True)
    if tied:
        drop_copy(tensors, "lm_head.weight", "wte.weight")
    for name in [name for name in tensors if re.fullmatch(r"h\.\d+\.(attn|mlp)\.c_\w+\.(weight|bias)", name)]:
        tensor = tensors.pop(name).t()                                                 # (out, in) or (out,)
        if ".c_attn." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3)):         # (D, D) or (D,)
                tensors[name.replace("c_attn", f"c_attn.{part}")] = rows.contiguous()
        else:
            tensors[name] = tensor.contiguous()
    config = Config(
        vocab_size=settings["vocab_size"], n_ctx=settings["n_positions"], d_model=settings["n_embd"],
        n_layer=settings["n_layer"], n_head=settings["n_head"],
        d_ff=settings.get("n_inner", 4 * settings["n_embd"]), eps=settings["layer_norm_epsilon"],
        activation=activation(settings, "activation_function"), tied=tied,
        lm_head="linear" if tied or "lm_head.weight" in tensors else "none")

    names = {"tokens": "wte", "positions": "wpe", "final_norm": "ln_f", "head.decoder": "lm_head"}
    names |= {"head.decoder.weight": "wte.weight"} if tied else {}
    parts = {
        "attention.query": "attn.c_attn.query", "attention.key": "attn.c_attn.key",
        "attention.value": "attn.c_attn.value", "attention.out": "attn.c_proj",
        "norm1": "ln_1", "norm2": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    return config, names | {f"blocks.{n}.{ours}": f"h.{n}.{theirs}"
                            for n in range(config.n_layer) for ours, theirs in parts.items()}


def read_bert(settings, tensors):
    """Config and {our module or tensor: the file's} for BERT and RoBERTa, whose positions now start at 0."""
    tied, head = settings.get("tie_word_embeddings", True), LM_HEAD[settings["model_type"]]
    words, places = "embeddings.word_embeddings", "embeddings.position_embeddings"
    unused, has_head = 0, any(name.startswith(head) for name in tensors)
    if settings["model_type"] == "roberta":
        unused = settings.get("pad_token_id", 1) + 1
        if places + ".weight" in tensors:
            tensors[places + ".weight"] = tensors[places + ".weight"][unused:]
        if has_head and settings["hidden_act"] != "gelu":
            raise ValueError(f"config.json has hidden_act={settings['hidden_act']!r}; "
                             "RoBERTa's LM head always has 'gelu', and a model here has one activation")
    if tied:
        drop_copy(tensors, f"{head}.decoder.weight", f"{words}.weight")
        drop_copy(tensors, f"{head}.bias", f"{head}.decoder.bias")
    if f"{head}.bias" in tensors:  # in older files it has only this name; where it has both, this one is idle
        bias = tensors.pop(f"{head}.bias")
        tensors.setdefault(f"{head}.decoder.bias", bias)
    config = Config(
        vocab_size=settings["vocab_size"], n_ctx=settings["max_position_embeddings"] - unused,
        d_model=settings["hidden_size"], n_layer=settings["num_hidden_layers"],
        n_head=settings["num_attention_heads"], d_ff=settings["intermediate_size"],
        causal=False, norm_first=False, activation=activation(settings, "hidden_act"),
        eps=settings["layer_norm_eps"], n_types=settings["type_vocab_size"],
        lm_head="mlm" if has_head else "none", tied=tied, pooler="pooler.dense.weight" in tensors)
    return config, bert_names(config, head)


def bert_names(config, head):
    new = head == LM_HEAD["roberta"]
    names = {
        "tokens": "embeddings.word_embeddings", "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings", "embedding_norm": "embeddings.LayerNorm",
        "pooler.dense": "pooler.dense", "head.decoder": f"{head}.decoder",
        "head.dense": f"{head}.dense" if new else f"{head}.transform.dense",
        "head.norm": f"{head}.layer_norm" if new else f"{head}.transform.LayerNorm"}
    names |= {"head.decoder.weight": "embeddings.word_embeddings.weight"} if config.tied else {}
    parts = {
        "attention.query": "attention.self.query", "attention.key": "attention.self.key",
        "attention.value": "attention.self.value", "attention.out": "attention.output.dense",
        "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
        "mlp.up": "intermediate.dense", "mlp.down": "output.dense"}
    return names | {f"blocks.{n}.{ours}": f"encoder.layer.{n}.{theirs}"
                    for n in range(config.n_layer) for ours, theirs in parts.items()}
