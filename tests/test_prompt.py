"""Prompt tuning by hand: where the vectors go, what they start as, and what they turn out to be: a prefix."""

import pytest
import torch

from deltas import attach, count, merge, trainable
from methods.prefix import KeysValues
from methods.prompt import Prompt, SoftPrompt
from model import Config, Transformer, generate
from tiny import BERT, GPT, IDS, stirred

both = pytest.mark.parametrize("config", [GPT, BERT], ids=["gpt", "bert"])


def test_a_prompt_by_hand():
    prompt = SoftPrompt(torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]]))
    text = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])                                  # two texts, one token
    assert prompt(text).tolist() == [[[10, 20], [30, 40], [50, 60], [1, 2]],
                                     [[10, 20], [30, 40], [50, 60], [3, 4]]]


@both
def test_a_prompt_is_words_before_the_text_without_a_position(config):
    """The oracle puts the vectors there by hand, runs the blocks with a mask made by loops, cuts them off."""
    model = stirred(config, Prompt(length=3))
    x = model.tokens.weight[IDS] + model.positions.weight[:5]                          # the text keeps 0 to 4
    x = x + model.types.weight[0] if config.n_types else x
    x = model.embedding_norm(torch.cat([model.prompt.vectors.expand(2, 3, 12), x], dim=1))
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    for i in range(8):
        for j in range(8):
            mask[:, :, i, j] = j <= i or not config.causal
    for block in model.blocks:
        x = block(x, mask)
    expected = model.head(model.final_norm(x)[:, 3:])
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-8)


def test_in_a_causal_model_a_prompt_is_a_prefix_that_is_computed():
    """What the soft words leave in each layer is keys and values, and the text sees nothing else of them."""
    model = stirred(GPT, Prompt(length=3))
    cache = {}
    expected = model(IDS, cache=cache)
    plain = stirred(GPT)
    plain.load_state_dict(model.state_dict(), strict=False)
    for block, source in zip(plain.blocks, model.blocks):
        k, v = cache[source.attention]                                                 # (B, H, P+T, D/H)
        rows = torch.stack([k[0, :, :3], v[0, :, :3]])                                 # (2, H, P, D/H)
        block.attention.prefix = KeysValues(rows.permute(2, 0, 1, 3).reshape(3, 24))
    torch.testing.assert_close(plain(IDS), expected, rtol=0, atol=1e-8)


def test_in_bert_the_prompt_reads_the_text_so_it_is_no_prefix():
    model, caches = stirred(BERT, Prompt(length=3)), [{}, {}]
    for cache, ids in zip(caches, (IDS[:1], IDS[1:])):
        model(ids, cache=cache)
    keys = [cache[model.blocks[1].attention][0][:, :, :3] for cache in caches]
    assert not torch.allclose(*keys)


@both
def test_pads_change_nothing(config):
    model = stirred(config, Prompt(length=3))
    padded = torch.cat([IDS, torch.full((2, 2), 7)], dim=1)
    keep = torch.tensor([[True] * 5 + [False] * 2] * 2)
    torch.testing.assert_close(model(padded, keep)[:, :5], model(IDS), rtol=0, atol=1e-8)


def test_the_last_word_moves_no_earlier_logit_and_the_prompt_moves_all():
    model = stirred(GPT, Prompt(length=3))
    before = model(IDS)
    other = IDS.clone()
    other[:, -1] = 8
    assert torch.equal(model(other)[:, :-1], before[:, :-1])
    with torch.no_grad():
        model.prompt.vectors[1, 0] += 1    # one number: LayerNorm would not see the same 1 added to all
    assert ((model(IDS) - before).abs().amax(dim=-1) > 1e-6).all()


def test_decoding_with_a_cache_equals_decoding_by_whole_texts():
    model = stirred(GPT, Prompt(length=3))
    ids, keep = IDS.clone(), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    new = generate(model, ids, keep, steps=6)
    for row, length in ((0, 5), (1, 3)):
        text = ids[row:row + 1, :length]
        for step in range(6):
            word = model(text)[:, -1:].argmax(dim=-1)
            assert word.item() == new[row, step]
            text = torch.cat([text, word], dim=1)


def test_a_prompt_takes_no_place_from_the_text():
    assert stirred(GPT, Prompt(length=30))(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 17)


# ---- what it starts as ----

def start(**settings):
    torch.manual_seed(1)
    model = Transformer(GPT)
    torch.manual_seed(2)
    model = attach(Prompt(**settings), model)
    return model.prompt.vectors.detach(), model.tokens.weight.detach()


def test_a_start_from_the_vocabulary_is_rows_of_the_table():
    vectors, table = start(length=6, init="vocab")
    ids = [(table == vector).all(dim=1).nonzero().item() for vector in vectors]
    assert len(set(ids)) > 1


def test_a_start_from_the_labels_is_their_rows_and_then_words_of_the_vocabulary():
    vectors, table = start(length=4, init="labels", words="12,7")
    assert torch.equal(vectors[:2], table[[12, 7]])
    assert all((table == vector).all(dim=1).any() for vector in vectors[2:])
    assert torch.equal(start(length=1, init="labels", words="12,7")[0], table[[12]])   # as many as fit


def test_a_random_start_has_the_spread_of_the_table():
    """Numbers of another size would be no words at all to the frozen layers."""
    vectors, table = start(length=500, init="random")
    assert abs(vectors.std() / table.std() - 1) < 0.05
    assert not any((table == vector).all(dim=1).any() for vector in vectors[:3])


def test_the_seed_decides_the_start():
    for init in ("vocab", "random"):
        assert torch.equal(start(length=4, init=init)[0], start(length=4, init=init)[0])


def test_the_prompt_is_a_copy_and_the_table_stays_frozen():
    model = attach(Prompt(length=3, init="labels", words="12,7,3"), Transformer(GPT))
    assert set(trainable(model)) == {"prompt.vectors"}
    table = model.tokens.weight.clone()
    with torch.no_grad():
        model.prompt.vectors += 1
    assert torch.equal(model.tokens.weight, table)


def test_only_the_prompt_gets_a_gradient_and_all_of_it_does():
    model = stirred(BERT, Prompt(length=3))
    model(IDS).pow(2).sum().backward()
    assert (model.prompt.vectors.grad.abs() > 0).all()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"prompt.vectors"}


def test_a_prompt_cannot_be_merged():
    with pytest.raises(ValueError, match="words to read"):
        merge(attach(Prompt(), Transformer(GPT)))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="length=0"):
        Prompt(length=0)
    with pytest.raises(ValueError, match="init='zero'"):
        Prompt(init="zero")
    with pytest.raises(ValueError, match="token ids of the label words"):
        attach(Prompt(init="labels"), Transformer(GPT))
    with pytest.raises(ValueError, match="0 to 16"):
        attach(Prompt(init="labels", words="12,17"), Transformer(GPT))


# ---- counts: table 4 of Lester et al., T5 v1.1 ----

T5 = {"small": (512, 76_961_152), "base": (768, 247_577_856), "large": (1024, 783_150_080),
      "xl": (2048, 2_849_757_184), "xxl": (4096, 11_135_332_352)}


def t5_count(size, length):
    d, _ = T5[size]
    return Prompt(length=length).formula(Config(32128, 512, d, 1, 8, 4 * d))


def test_counts_of_the_prompt_paper():
    """P d, and its share of prompt and model together, as printed for the largest model."""
    expected = {1: 4_096, 5: 20_480, 20: 81_920, 50: 204_800, 100: 409_600, 150: 614_400}
    assert {P: t5_count("xxl", P) for P in expected} == expected
    n = t5_count("xxl", 100)
    assert round(100 * n / (T5["xxl"][1] + n), 5) == 0.00368
    assert [t5_count(size, 20) for size in ("base", "large", "xl")] == [15_360, 20_480, 40_960]


def test_two_printed_numbers_are_slips():
    """Small, P = 20: printed 10,420. Large, P = 100: printed 0.01907 %. P d gives neither."""
    assert t5_count("small", 20) == 10_240
    n = t5_count("large", 100)
    assert round(100 * n / (T5["large"][1] + n), 5) == 0.01307


def test_counts_of_gpt3_in_the_lora_paper():
    """PreEmbed, in millions; 72, 136, 264, 520 words fit the print, 32 + 8 do not: it is 32 words' worth."""
    gpt3 = Config(50257, 2048, 12288, 96, 96, 4 * 12288)
    counts = {P: Prompt(length=P).formula(gpt3) for P in (72, 136, 264, 520, 40, 32)}
    assert counts == {72: 884_736, 136: 1_671_168, 264: 3_244_032, 520: 6_389_760, 40: 491_520, 32: 393_216}
    assert [round(counts[P] / 1e6, 1) for P in (72, 136, 264, 520)] == [0.9, 1.7, 3.2, 6.4]
    assert [round(counts[P] / 1e6, 1) for P in (40, 32)] == [0.5, 0.4]                 # printed: 0.4


def test_the_count_of_gpt2_on_the_meta_device():
    with torch.device("meta"):
        model = Transformer(Config(50257, 1024, 768, 12, 12, 3072))
    assert count(attach(Prompt(length=20), model)).delta == 15_360
