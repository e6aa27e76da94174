"""The same weights in another library's model give the same outputs and the same gradients, in float64.

transformers: a prompt is `inputs_embeds`, a prefix is `past_key_values`, both with explicit positions, for
the text counts from 0 here with and without them. adapters: "double_seq_bn". peft: LoRA, prompt and prefix.
"""

import pytest
import torch

from data import checkpoints
from deltas import attach, merge, trainable
from methods.adapter import Adapter
from methods.bitfit import BitFit
from methods.lora import LoRA
from methods.prefix import Prefix
from methods.prompt import Prompt
from model import Transformer
from tiny import same, stir

INSTALL = "pip install -r requirements-extra.txt"
transformers = pytest.importorskip("transformers", reason=INSTALL)
pytest.importorskip("safetensors", reason=INSTALL)

P = 3
families = pytest.mark.parametrize("family", ["gpt2", "bert"])
IDS = torch.tensor([[5, 16, 3, 3, 8], [4, 9, 11, 0, 0]])
KEEP = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
PLACE = torch.arange(5).expand(2, 5)
torch.manual_seed(7)
SEEN = torch.randn(2, 5, 17).double() * KEEP[..., None]   # random weights for every output but pads


def pair(family, folder):
    """(their model, ours), float64, every value moved so that no zero can hide a mistake."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=17, n_positions=11, n_embd=12, n_layer=2, n_head=3,
                                         n_inner=20, layer_norm_epsilon=0.01, bos_token_id=2, eos_token_id=2)
        theirs = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(vocab_size=17, hidden_size=12, num_hidden_layers=2,
                                         num_attention_heads=3, intermediate_size=20,
                                         max_position_embeddings=11, layer_norm_eps=0.01)
        theirs = transformers.BertForMaskedLM(config)
    stir(theirs.parameters())
    theirs.save_pretrained(folder)
    config, state = checkpoints.read(folder)
    ours = Transformer(config)
    ours.load_state_dict(state)
    return theirs.eval().double(), ours.double()


def trained(delta, model):
    """The model with a delta that has moved away from where it started."""
    model = attach(delta, model).double()
    stir(trainable(model).values())
    return model


def compare(theirs, ours, tensors):
    """Equal logits and, for the pairs of parameters `tensors`, equal gradients that are not zero."""
    same(ours * KEEP[..., None], theirs * KEEP[..., None], "logits")
    (theirs * SEEN).sum().backward()
    (ours * SEEN).sum().backward()
    for i, (their, our) in enumerate(tensors):
        assert our.grad.abs().max() > 1e-6, f"pair {i}, {tuple(our.shape)}: without a gradient nothing is compared"
        same(our.grad, their.grad, f"gradients of pair {i}, {tuple(our.shape)}")


@families
def test_the_base_models_agree(family, tmp_path):
    theirs, ours = pair(family, tmp_path)
    compare(theirs(IDS, attention_mask=KEEP.long()).logits, ours(IDS, KEEP),
            [(theirs.get_input_embeddings().weight, ours.tokens.weight)])


@families
def test_a_prompt_is_their_inputs_embeds(family, tmp_path):
    """They add position 0 (and BERT a type) to what we leave as it is: subtracted beforehand."""
    theirs, ours = pair(family, tmp_path)
    ours = trained(Prompt(length=P), ours)
    prompt = ours.prompt.vectors.detach().clone().requires_grad_(True)
    if family == "gpt2":
        added = theirs.transformer.wpe.weight[0]
    else:
        tables = theirs.bert.embeddings
        added = tables.position_embeddings.weight[0] + tables.token_type_embeddings.weight[0]
    words = theirs.get_input_embeddings()(IDS)
    logits = theirs(inputs_embeds=torch.cat([(prompt - added).expand(2, P, 12), words], dim=1),
                    attention_mask=torch.cat([torch.ones(2, P), KEEP], dim=1).long(),
                    position_ids=torch.cat([torch.zeros(2, P), PLACE], dim=1).long()).logits
    compare(logits[:, P:], ours(IDS, KEEP), [(prompt, ours.prompt.vectors)])


@families
def test_a_prefix_is_their_past_key_values(family, tmp_path):
    theirs, ours = pair(family, tmp_path)
    ours = trained(Prefix(length=P, mlp=False), ours)
    tables = [block.attention.prefix.table for block in ours.blocks]
    rows = [table.detach().clone().requires_grad_(True) for table in tables]
    past = transformers.DynamicCache()
    for layer, table in enumerate(rows):
        k, v = (half.view(P, 3, 4).transpose(0, 1).expand(2, 3, P, 4) for half in table.chunk(2, dim=1))
        past.update(k, v, layer)
    inputs = dict(input_ids=IDS, position_ids=PLACE, past_key_values=past,
                  attention_mask=torch.cat([torch.ones(2, P), KEEP], dim=1).long())
    if family == "gpt2":
        logits = theirs(**inputs).logits
    else:  # BERT's masked language model takes no past, its body does
        logits = theirs.cls(theirs.bert(**inputs).last_hidden_state)
    compare(logits, ours(IDS, KEEP), list(zip(rows, tables)))


@families
def test_an_adapter_is_double_seq_bn_of_adapters(family, tmp_path):
    adapters = pytest.importorskip("adapters", reason="pip install adapters")
    theirs, ours = pair(family, tmp_path)
    adapters.init(theirs)
    config = adapters.DoubleSeqBnConfig(non_linearity="gelu", reduction_factor=3, dropout=0.0)
    theirs.add_adapter("a", config=config)
    theirs.train_adapter("a")
    theirs.eval().double()
    ours = trained(Adapter(bottleneck=4, norms=False), ours)
    tensors = []
    layers = theirs.transformer.h if family == "gpt2" else theirs.bert.encoder.layer
    for block, layer in zip(ours.blocks, layers):
        sides = (layer.attention_adapters, layer.output_adapters) if family == "gpt2" else (
            layer.attention.output, layer.output)
        for slot, side in zip((block.after_attention, block.after_mlp), sides):
            adapter = side.adapters["a"]
            for linear, their in ((slot.down, adapter.adapter_down[0]), (slot.up, adapter.adapter_up)):
                their.load_state_dict(linear.state_dict())
                tensors += [(their.weight, linear.weight), (their.bias, linear.bias)]
    assert len(tensors) == 2 * 2 * 4
    compare(theirs(IDS, attention_mask=KEEP.long()).logits, ours(IDS, KEEP), tensors)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_lora_is_pefts_on_bert(merged, tmp_path):
    peft = pytest.importorskip("peft", reason=INSTALL)
    theirs, ours = pair("bert", tmp_path)
    ours = trained(LoRA(rank=2, alpha=5.0, targets="query,value"), ours)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["query", "value"])
    theirs = peft.get_peft_model(theirs, config).eval().double()
    tensors = []
    for block, layer in zip(ours.blocks, theirs.base_model.model.bert.encoder.layer):
        for name in ("query", "value"):
            our, their = getattr(block.attention, name), getattr(layer.attention.self, name)
            tensors += [(their.lora_A["default"].weight, our.A), (their.lora_B["default"].weight, our.B)]
    for their, our in tensors:
        their.data.copy_(our.detach())
    if not merged:
        compare(theirs(IDS, attention_mask=KEEP.long()).logits, ours(IDS, KEEP), tensors)
        return
    expected = theirs.merge_and_unload()(IDS, attention_mask=KEEP.long()).logits
    same(merge(ours)(IDS, KEEP)[KEEP], expected[KEEP], "both merged")


def test_pefts_lora_on_gpt2_is_ours_with_one_a_for_query_key_and_value(tmp_path):
    """GPT-2's three matrices are fused there, so one A serves all; its gradient is the sum of our three."""
    peft = pytest.importorskip("peft", reason=INSTALL)
    theirs, ours = pair("gpt2", tmp_path)
    ours = trained(LoRA(rank=2, alpha=5.0, targets="query,key,value"), ours)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["c_attn"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(theirs, config).eval().double()
    parts = []
    for block, layer in zip(ours.blocks, theirs.base_model.model.transformer.h):
        a = block.attention
        linears = (a.query, a.key, a.value)
        A, B = layer.attn.c_attn.lora_A["default"].weight, layer.attn.c_attn.lora_B["default"].weight
        for linear in linears:
            linear.A.data.copy_(a.query.A.detach())
        A.data.copy_(a.query.A.detach())
        B.data.copy_(torch.cat([linear.B.detach() for linear in linears]))
        parts.append((A, B, linears))
    compare(theirs(IDS, attention_mask=KEEP.long()).logits, ours(IDS, KEEP), [])
    for A, B, linears in parts:
        same(sum(linear.A.grad for linear in linears), A.grad, "one A for three: the sum of gradients")
        same(torch.cat([linear.B.grad for linear in linears]), B.grad, "B, a third each")


def test_bitfit_is_every_bias_that_peft_trains_with_bias_all(tmp_path):
    """Beside a LoRA that is still zero; each of their biases has its counterpart and the same gradient."""
    peft = pytest.importorskip("peft", reason=INSTALL)
    theirs, ours = pair("bert", tmp_path)
    ours = trained(BitFit(), ours)
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="all")
    theirs = peft.get_peft_model(theirs, config).eval().double()
    biases = [p for name, p in theirs.named_parameters() if p.requires_grad and "lora_" not in name]
    assert sum(p.numel() for p in biases) == sum(p.numel() for p in trainable(ours).values())
    body, head = theirs.base_model.model.bert, theirs.base_model.model.cls.predictions
    tensors = [(body.embeddings.LayerNorm.bias, ours.embedding_norm.bias),
               (head.transform.dense.bias, ours.head.dense.bias),
               (head.transform.LayerNorm.bias, ours.head.norm.bias), (head.bias, ours.head.decoder.bias)]
    for layer, block in zip(body.encoder.layer, ours.blocks):
        attention = layer.attention
        tensors += [(attention.self.query.bias, block.attention.query.bias),
                    (attention.self.value.bias, block.attention.value.bias),
                    (attention.output.dense.bias, block.attention.out.bias),
                    (attention.output.LayerNorm.bias, block.norm1.bias),
                    (layer.intermediate.dense.bias, block.mlp.up.bias),
                    (layer.output.dense.bias, block.mlp.down.bias),
                    (layer.output.LayerNorm.bias, block.norm2.bias)]
        attention.self.key.bias.data.copy_(block.attention.key.bias.detach())          # dead, so not compared
    for their, our in tensors:
        their.data.copy_(our.detach())
    assert len(tensors) + 2 == len(biases)
    compare(theirs(IDS, attention_mask=KEEP.long()).logits, ours(IDS, KEEP), tensors)


def shifted(theirs, ours):
    """peft's prompt and prefix take the positions 0 to P - 1: let these be zero and the text's begin at P."""
    table = theirs.transformer.wpe.weight.data
    table[:P] = 0
    ours.positions.weight.data[:-P] = table[P:]


def test_prompt_tuning_is_pefts_on_gpt2(tmp_path):
    peft = pytest.importorskip("peft", reason=INSTALL)
    theirs, ours = pair("gpt2", tmp_path)
    shifted(theirs, ours)
    ours = trained(Prompt(length=P), ours)
    theirs = peft.get_peft_model(theirs, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    prompt = theirs.eval().double().prompt_encoder["default"].embedding.weight
    prompt.data.copy_(ours.prompt.vectors.detach())
    logits = theirs(input_ids=IDS, attention_mask=KEEP.long()).logits
    compare(logits[:, P:], ours(IDS, KEEP), [(prompt, ours.prompt.vectors)])


@pytest.mark.parametrize("mlp", [True, False], ids=["mlp", "flat"])
def test_prefix_tuning_is_pefts_on_gpt2(mlp, tmp_path):
    """With the MLP, ours is theirs cut into layers: matrix rows, and so gradients, 2 d at a time."""
    peft = pytest.importorskip("peft", reason=INSTALL)
    theirs, ours = pair("gpt2", tmp_path)
    shifted(theirs, ours)
    ours = trained(Prefix(length=P, mlp=mlp, hidden=7), ours)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=mlp,
                                     encoder_hidden_size=7)
    theirs = peft.get_peft_model(theirs, config).eval().double()
    encoder, slots = theirs.prompt_encoder["default"], [block.attention.prefix for block in ours.blocks]
    if mlp:
        trunk, (first, _, last) = slots[0].trunk, encoder.transform
        shared = [(encoder.embedding.weight, trunk.words), (first.weight, trunk.dense.weight),
                  (first.bias, trunk.dense.bias)]
        cut = [(last.weight, [s.out.weight for s in slots], 0), (last.bias, [s.out.bias for s in slots], 0)]
    else:
        shared, cut = [], [(encoder.embedding.weight, [s.table for s in slots], 1)]
    for their, our in shared:
        their.data.copy_(our.detach())
    for their, parts, dim in cut:
        their.data.copy_(torch.cat(parts, dim=dim).detach())
    compare(theirs(input_ids=IDS, attention_mask=KEEP.long()).logits, ours(IDS, KEEP), shared)
    for their, parts, dim in cut:
        same(torch.cat([p.grad for p in parts], dim=dim), their.grad, "gradients, cut into layers")
