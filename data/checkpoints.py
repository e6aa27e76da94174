"""Reads and writes Hugging Face folders (config.json, model.safetensors) of the GPT-2, BERT and RoBERTa families.

    config, state = read(folder)
    model = unfilled(config)                         # shapes alone
    model.load_state_dict(state, assign=True)        # strict: read() gives every tensor, in float32
    write(new, model, folder, labels)                # the same names and settings, the model's weights, its head

A checkpoint is larger than anything else in a run, so it is held once: the headers are checked first, then one tensor
after the other is read, and it becomes the parameter itself.

The three families are this project's one Transformer under other names; three things differ in substance:

    GPT-2     matrices are stored (in, out), and query, key, value lie side by side in one `c_attn`
    RoBERTa   positions are counted from pad_token_id + 1, so the first rows of its table are never used
    BERT      LayerNorm's weight and bias are called gamma and beta in old files

A setting that would change the computation and a tensor that has no place here are errors, each by name.
Left out without a word: buffers (masks, counts of positions), BERT's next-sentence head, and RoBERTa's
pooler, which that family's pretraining never trained. Left out with a warning: the heads of other tasks.
"""

import re
import shlex
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from data.files import empty, field, json_of, pointer, replace, save_json, shown, sound, there
from data.tokenizers import bpe_from, wordpiece_from
from model import Classifier, Config, Refused, Transformer

ACTIVATION = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

# A field of Config: what config.json calls it (and its other name, where it has two).
BERT = {
    "vocab_size": "vocab_size", "n_ctx": "max_position_embeddings", "d_model": "hidden_size",
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "d_ff": "intermediate_size",
    "n_types": "type_vocab_size", "eps": "layer_norm_eps", "activation": "hidden_act"}
GPT2 = {
    "vocab_size": "vocab_size", "n_ctx": "n_positions max_position_embeddings", "d_model": "n_embd hidden_size",
    "n_layer": "n_layer num_hidden_layers", "n_head": "n_head num_attention_heads", "d_ff": "n_inner",
    "eps": "layer_norm_epsilon", "activation": "activation_function"}
FIELDS = {"gpt2": GPT2, "bert": BERT, "roberta": BERT}
# What a family means where config.json leaves it out; a size must be there. GPT-2's d_ff is 4 d_model.
USUAL = {
    "gpt2": {"eps": 1e-5, "activation": "gelu_new", "d_ff": None},
    "bert": {"eps": 1e-12, "activation": "gelu", "n_types": 2}}
USUAL["roberta"] = USUAL["bert"]
KIND = {"eps": (float, 0, 1), "activation": (str, None, None)}  # type, least, most
SIZE = int, 1, 10**7                                            # of all others

# What a setting must be, where it stands in config.json at all.
MUST_BE = {
    "position_embedding_type": "absolute", "is_decoder": False, "is_encoder_decoder": False,
    "add_cross_attention": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "pruned_heads": {}}
# Settings of training, generation and bookkeeping: none of them changes what the model computes in float32.
NO_MATTER = re.compile(
    r"_.*|.*_token_ids?|.*drop.*|summary_.*|pooler_.*|output_.*|return_dict.*|initializer_.*|use_cache|prefix"
    r"|torchscript|gradient_checkpointing|transformers_version|architectures|(torch_)?dtype|id2label|label2id"
    r"|num_labels|problem_type|finetuning_task|task_specific_params|chunk_size_feed_forward|directionality"
    r"|language|tokenizer_class|n_ctx|n_special|predict_special_tokens|do_sample|(max|min)_length|temperature"
    r"|top_[kp]|typical_p|num_(beams|beam_groups|return_sequences)|(length|repetition|diversity)_penalty"
    r"|(encoder_)?no_repeat_ngram_size|bad_words_ids|early_stopping|remove_invalid_values|(begin_)?suppress_tokens"
    r"|exponential_decay_length_penalty|reorder_and_upcast_attn|max_seq_length|(base_model|name)_(prefix|or_path)"
    r"|sentence_transformers|sbert_ce_default_activation_function|adapters|transformers\.js_config|unsloth_version"
    r"|tf_legacy_loss|use_bfloat16|loss_type")

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
BUFFERS = re.compile(r"(.*\.)?(attn\.(bias|masked_bias)|position_ids|token_type_ids)")
OTHER_HEADS = re.compile(r"(classifier|score|qa_outputs|multiple_choice_head)\..*")
UNTRAINED = {"gpt2": (), "bert": ("cls.seq_relationship.",), "roberta": ("pooler.",)}
PREFIX = {"gpt2": "transformer.", "bert": "bert.", "roberta": "roberta."}
LM_HEAD = {"bert": "cls.predictions", "roberta": "lm_head"}


def read(folder):
    """folder -> (Config, state dict in float32 for Transformer(config)).

    The LM head comes along where the file has one (GPT-2's tied head is there by definition), else
    lm_head="none". Refuses settings and tensors that this project's model cannot honour, and what is missing.
    """
    known, state = layout(folder), {}
    for key, name in known.sources.items():
        if known.config.tied and key == "head.decoder.weight":
            state[key] = state["tokens.weight"]
        else:
            state[key] = known.tensors[name].read(known.part, key)
            sound({name: state[key]}, known.tensors[name].path)
    return known.config, state


@dataclass
class Layout:
    """What stands where in a folder: all is known to fit, and no value has been read."""

    family: str
    settings: dict               # config.json
    config: Config
    sources: dict                # {our tensor: the file's, without the family's prefix}
    tensors: dict                # {the file's name: Stored}
    unused: int                  # rows of RoBERTa's positions before the first one that is used

    def part(self, tensor, key):
        """Our tensor out of the file's."""
        if self.family == "gpt2" and ".c_" in self.sources[key]:
            return piece(tensor, key)
        return tensor[self.unused:] if key == "positions.weight" and tensor.dim() else tensor


def layout(folder):
    """The Layout of a folder, or Refused."""
    folder = Path(folder)
    settings = read_settings(folder)
    family = settings["model_type"]
    tensors = stored_tensors(folder, family)
    sizes = config_fields(folder, settings)
    blocks = {found[1] for name in tensors if (found := re.match(r"(?:h|encoder\.layer)\.(\d+)\.", name))}
    if sizes["n_layer"] != len(blocks):  # before so many blocks are built
        raise Refused(f"{folder}: config.json has {sizes['n_layer']:,} layers, the weights are those of {len(blocks)}; "
                      f"their tensors are {shown(', '.join(sorted(tensors)[:3]))} ...")
    try:
        config, names = (read_gpt2 if family == "gpt2" else read_bert)(settings, sizes, tensors)
    except Refused as error:
        raise Refused(f"{folder}: config.json: {error}") from None
    sources = {}
    for key in unfilled(config).state_dict():
        module, leaf = key.rsplit(".", 1)
        sources[key] = names.get(key) or f"{names[module]}.{leaf}"
    known = Layout(family, settings, config, sources, tensors, sizes["n_ctx"] - config.n_ctx)
    check_fit(folder, known)
    return known


def check_fit(folder, known):
    """Refuse tensors that are missing, left over or of another shape than our parameter, before any is read."""
    sources, tensors = known.sources, known.tensors
    faults = [f"{shown(name)} has no place in this model" for name in tensors if name not in sources.values()]
    for key, wanted in unfilled(known.config).state_dict().items():
        if (name := sources[key]) not in tensors:
            faults.append(f"{name} is missing")
            continue
        like, found = tensors[name].like, known.part(tensors[name].like, key)
        if found.shape != wanted.shape:
            which = f" (its part for {key})" if like.dim() != found.dim() or ".c_attn." in name else ""
            faults.append(f"{name} is {tuple(found.shape)}{which}, config.json says {tuple(wanted.shape)}")
    if faults:
        raise Refused(f"{folder}: {len(faults)} tensors do not fit: {'; '.join(dict.fromkeys(faults[:8]))}")


def piece(tensor, key):
    """Our parameter out of GPT-2's: stored as (in, out), and c_attn is query, key and value side by side."""
    tensor = tensor.t() if tensor.dim() == 2 else tensor                               # (out, in) or (out,)
    third = {"query": 0, "key": 1, "value": 2}.get(key.split(".")[-2])
    return tensor if third is None or not tensor.dim() else tensor.tensor_split(3)[third]


def unfilled(config):
    """Transformer(config) on the meta device: its shapes without values, which take memory and time."""
    with Undrawn(), torch.device("meta"):
        return Transformer(config)


class Undrawn(TorchFunctionMode):
    """Inside, normal_ does nothing: on the meta device PyTorch would import its compiler for it (67 MB, a second)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if function is torch.nn.init.normal_ else function(*args, **kwargs or {})


def tokenizer(folder):
    """The tokenizer that belongs to the checkpoint: WordPiece for BERT, byte pairs for GPT-2 and RoBERTa."""
    folder = Path(folder)
    settings = read_settings(folder)
    rows = field(settings, "vocab_size", int, folder / "config.json", least=1)
    family = settings["model_type"]
    tokens = wordpiece_from(folder) if family == "bert" else bpe_from(folder, wraps=family == "roberta")
    if tokens.vocab_size > rows:
        raise Refused(f"{folder}: the tokenizer has {tokens.vocab_size} tokens, the model only vocab_size={rows}")
    return tokens


def read_settings(folder):
    """config.json without its nulls, once every setting in it is known to be honoured or harmless."""
    path = folder / "config.json"
    if not path.exists():
        raise Refused(f"{folder}: no config.json, so not a checkpoint's folder")
    settings = {key: value for key, value in json_of(path).items() if value is not None}
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in PREFIX:
        raise Refused(f"{path}: model_type={shown(repr(family))}; this reader knows {', '.join(PREFIX)}")
    must_be = MUST_BE | {"embedding_size": settings.get("hidden_size")}
    known = {"model_type", "tie_word_embeddings", *" ".join(FIELDS[family].values()).split()}
    for key, value in settings.items():
        if key in must_be and value != must_be[key]:
            raise Refused(f"{path}: {key}={shown(repr(value))}; only {must_be[key]!r} is supported")
        if value in (False, {}, [], "") or key in must_be or key in known or NO_MATTER.fullmatch(key):
            continue
        raise Refused(f"{path}: {shown(key)}={shown(repr(value))}, which this reader does not know; if it does not "
                      "change what the model computes, delete that line")
    return settings


def config_fields(folder, settings):
    """{field of Config: value} of what config.json says, each of its type and in its range."""
    family, path, found = settings["model_type"], folder / "config.json", {}
    for name, keys in FIELDS[family].items():
        given = [key for key in keys.split() if key in settings]
        kind, least, most = KIND.get(name, SIZE)
        values = [field(settings, key, kind, path, least, most) for key in given]
        if len(set(values)) > 1:
            raise Refused(f"{path}: {given[0]}={values[0]} and {given[1]}={values[1]}: two names of one thing")
        if not values and name not in USUAL[family]:
            raise Refused(f"{path}: has no {keys.split()[0]!r}")
        found[name] = values[0] if values else USUAL[family][name]
    if found["activation"] not in ACTIVATION:
        raise Refused(f"{path}: {FIELDS[family]['activation']}={shown(repr(found['activation']))}; choose from "
                      f"{', '.join(ACTIVATION)}")
    found["tied"] = field(settings, "tie_word_embeddings", bool, path, default=True)
    return found | {"activation": ACTIVATION[found["activation"]]}


def weight_files(folder):
    """The file with the weights, or the several that the index names."""
    if (folder / "model.safetensors").exists():
        return [there(folder / "model.safetensors")]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise Refused(f"{folder}: no model.safetensors. {how_to_convert(folder)}")
    names = field(json_of(index), "weight_map", dict, index).values()
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise Refused(f"{index}: the file {shown(repr(name))}; a name without a folder is expected")
    return [there(folder / name) for name in sorted(set(names))]


def how_to_convert(folder):
    if not (bins := sorted(folder.glob("pytorch_model*.bin"))):
        return "The weights must be in that format"
    code = ('import sys, torch; from safetensors.torch import save_file; t = {}; '
            '[t.update(torch.load(f, map_location="cpu", weights_only=True)) for f in sys.argv[2:]]; '
            'save_file({k: v.clone().contiguous() for k, v in t.items()}, sys.argv[1], {"format": "pt"})')
    words = "python", "-c", code, str(folder / "model.safetensors"), *map(str, bins)
    return f"To convert pytorch_model.bin: {shlex.join(words)}"


@dataclass
class Stored:
    """A tensor in a file: its shape and dtype at once, its values when they are needed."""

    path: Path
    name: str                    # the file's name for it
    like: torch.Tensor           # on the meta device

    def floating(self):
        if self.like.dtype not in FLOATS:
            raise Refused(f"{self.path}: {shown(self.name)} is {self.like.dtype}; weights are float16, bfloat16, "
                          "float32 or float64 (quantised ones must be dequantised first)")
        return self

    def read(self, part=lambda tensor: tensor, *inputs):
        """part(tensor, *inputs) in float32, in memory of its own: what is written there never reaches the file.

        The file is mapped anew each time, since what has been read of a mapping is held until the mapping ends.
        """
        with opened(self.path) as file:
            tensor = part(file.get_tensor(self.name), *inputs)  # still the mapping, which the next line reads
        return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)


@contextmanager
def opened(path):
    """The safetensors file at `path`, mapped and not yet read; Refused if it is none."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise Refused("reading a checkpoint needs safetensors: pip install safetensors") from None
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise Refused(f"{path}: cut short, or not a safetensors file ({shown(str(error))})") from None


def held(path):
    """[Stored] of all tensors in a safetensors file."""
    if pointer(there(path)):
        raise Refused(f"{path}: a git-lfs pointer, not the file itself (git lfs pull fetches it)")
    with opened(path) as file:
        return [Stored(path, name, file.get_tensor(name).to("meta")) for name in file.keys()]


def stored_tensors(folder, family):
    """{name: Stored} of one file or of several, without the family's prefix and what is left out."""
    tensors, left_out = {}, []
    for path in weight_files(folder):
        for stored in held(path):
            name = stored.name.removeprefix(PREFIX[family])
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            if OTHER_HEADS.fullmatch(name):
                left_out.append(name)
            elif not BUFFERS.fullmatch(name) and not name.startswith(UNTRAINED[family]):
                if name in tensors:
                    raise Refused(f"{path}: {shown(name)} stands there twice, under two names or in two files")
                tensors[name] = stored.floating()
    if left_out:
        heads = shown(", ".join(left_out), 200)
        warnings.warn(f"{folder}: the head of another task is left out: {heads}", stacklevel=4)
    return tensors


def drop_copy(tensors, copy, original):
    """Tied tensors are sometimes stored twice; two that differ are not tied, whatever config.json says."""
    if {copy, original} <= tensors.keys() and not torch.equal(tensors.pop(copy).read(), tensors[original].read()):
        raise Refused(f"tie_word_embeddings=True, but {copy} and {original} differ")


def read_gpt2(settings, sizes, tensors):
    """Config and {our module or tensor: the file's}."""
    if sizes["tied"]:
        drop_copy(tensors, "lm_head.weight", "wte.weight")
    config = Config(**sizes | {"d_ff": sizes["d_ff"] or 4 * sizes["d_model"]},
                    lm_head="linear" if sizes["tied"] or "lm_head.weight" in tensors else "none")

    names = {"tokens": "wte", "positions": "wpe", "final_norm": "ln_f", "head.decoder": "lm_head"}
    names |= {"head.decoder.weight": "wte.weight"} if config.tied else {}
    parts = {
        "attention.query": "attn.c_attn", "attention.key": "attn.c_attn",
        "attention.value": "attn.c_attn", "attention.out": "attn.c_proj",
        "norm1": "ln_1", "norm2": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    return config, names | {f"blocks.{n}.{ours}": f"h.{n}.{theirs}"
                            for n in range(config.n_layer) for ours, theirs in parts.items()}


def read_bert(settings, sizes, tensors):
    """Config and {our module or tensor: the file's} for BERT and RoBERTa, whose positions now start at 0."""
    head = LM_HEAD[settings["model_type"]]
    words = "embeddings.word_embeddings"
    unused, has_head = 0, any(name.startswith(head) for name in tensors)
    if settings["model_type"] == "roberta":
        unused = field(settings, "pad_token_id", int, "", 0, sizes["n_ctx"] - 2, default=1) + 1
        if has_head and sizes["activation"] != "gelu":
            raise Refused(f"hidden_act={settings['hidden_act']!r}; "
                          "RoBERTa's LM head always has 'gelu', and a model here has one activation")
    if sizes["tied"]:
        drop_copy(tensors, f"{head}.decoder.weight", f"{words}.weight")
        drop_copy(tensors, f"{head}.bias", f"{head}.decoder.bias")
    if f"{head}.bias" in tensors:  # in older files it has only this name; where it has both, this one is idle
        bias = tensors.pop(f"{head}.bias")
        tensors.setdefault(f"{head}.decoder.bias", bias)
    config = Config(**sizes | {"n_ctx": sizes["n_ctx"] - unused}, causal=False, norm_first=False,
                    lm_head="mlm" if has_head else "none", pooler="pooler.dense.weight" in tensors)
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


# ---- writing ----

# A Classifier's modules, and what they are there. A BERT whose base has a pooler uses that one, and GPT-2 needs none.
CLASSIFIER = {
    "gpt2": {"head.out": "score"},
    "bert": {"head.out": "classifier", "head.new_pooler.dense": "bert.pooler.dense"},
    "roberta": {"head.out": "classifier.out_proj", "head.new_pooler.dense": "classifier.dense"}}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "vocab.txt")


def class_of(model, family):
    """The name of the class in transformers that has this model's head."""
    head = "Model" if model.config.lm_head == "none" else "LMHeadModel" if family == "gpt2" else "ForMaskedLM"
    head = "ForSequenceClassification" if isinstance(model.head, Classifier) else head
    return {"gpt2": "GPT2", "bert": "Bert", "roberta": "Roberta"}[family] + head


def head_tensors(model, family):
    """{their name: tensor} of a Classifier, {} without one. Refuses a bias for GPT-2's, which has none there."""
    state = model.state_dict() if isinstance(model.head, Classifier) else {}
    found = {f"{theirs}.{leaf}": state[f"{ours}.{leaf}"] for ours, theirs in CLASSIFIER[family].items()
             for leaf in ("weight", "bias") if f"{ours}.{leaf}" in state}
    if family == "gpt2" and found and found.pop("score.bias").any():
        raise Refused("its classifier has a bias, and GPT-2's in transformers, `score`, has none; without it the "
                      "answers would be others")
    return found


def head_settings(known, labels):
    """What config.json says about a classifier with these labels; {} without any."""
    found = {"num_labels": len(labels), "id2label": dict(enumerate(labels)),
             "label2id": {label: n for n, label in enumerate(labels)}} if labels else {}
    if found and known.family == "gpt2":  # there the last token of a text is found by its pads
        found["pad_token_id"] = known.settings.get("pad_token_id", known.settings.get("eos_token_id"))
    return found


def write(folder, model, base, labels=()):
    """Write a plain model of the folder `base` as a folder like it; `labels` are the names of its classes, if any.

    Tensors keep their precision. What `read` leaves out of the base's file is not in the new one.
    """
    folder, known, state = empty(folder), layout(base), model.state_dict()
    tensors, parts = head_tensors(model, known.family), {}
    for key, name in known.sources.items():
        if key in state and (name not in parts or ".c_attn." in name):  # a tied one is there already
            parts.setdefault(name, []).append(state[key])
    for name, pieces in parts.items():
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]                    # query, key, value
        if known.unused and name == known.sources["positions.weight"]:
            whole = torch.cat([known.tensors[name].read(lambda rows: rows[:known.unused]).to(whole), whole])
        full = name if name.startswith(("lm_head.", "cls.")) else PREFIX[known.family] + name
        tensors[full] = whole.t() if known.family == "gpt2" and ".c_" in name else whole  # GPT-2: (in, out)
    settings = json_of(Path(base) / "config.json") | head_settings(known, labels) | {
        "architectures": [class_of(model, known.family)], "dtype": str(whole.dtype).removeprefix("torch.")}
    store(folder / "model.safetensors", tensors)
    for path in (Path(base) / name for name in TOKENIZER):
        if path.exists():
            replace(folder / path.name, lambda part: shutil.copyfile(path, part))
    for key in ("_name_or_path", "torch_dtype", "problem_type"):  # of the base, or an older name of dtype
        settings.pop(key, None)
    save_json(folder / "config.json", settings)  # last: a folder without it is none


def store(path, tensors):
    """Write {name: tensor} as a safetensors file, whole or not at all."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise Refused("writing a checkpoint needs safetensors: pip install safetensors") from None
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace(path, lambda part: save_file(tensors, part, {"format": "pt"}))
