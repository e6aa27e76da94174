"""Prompt tuning by hand: where the vectors go, what they start as, and what they turn out to be: a prefix."""

from types import SimpleNamespace

import pytest
import torch

from deltas import attach, merge, trainable
from lab.sizes import counted, t5_size
from methods.prefix import KeysValues
from methods.prompt import Prompt, SoftPrompt, starting_words
from model import Config, Transformer
from tiny import BERT, GPT, IDS, base_of, both, same, stirred


@pytest.mark.points(3, "prompt")
def test_a_prompt_by_hand():
    prompt = SoftPrompt(torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]]))
    first, second = prompt(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])).tolist()        # two texts, one token
    assert first == [[10, 20], [30, 40], [50, 60], [1, 2]], "the vectors in their order, then the text"
    assert second == [[10, 20], [30, 40], [50, 60], [3, 4]], "the same vectors before every text"
    half = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    assert prompt(half).dtype == torch.bfloat16, "the prompt takes the precision of the text"


@both
@pytest.mark.points(3, "prompt")
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
    same(model(IDS), model.head(model.final_norm(x)[:, 3:]), "soft words that a text sees, without positions, cut off")


def test_in_a_causal_model_a_prompt_is_a_prefix_that_is_computed():
    """What the soft words leave in each layer is keys and values, and the text sees nothing else of them."""
    model, cache = stirred(GPT, Prompt(length=3)), {}
    expected, plain = model(IDS, cache=cache), base_of(model)
    for block, source in zip(plain.blocks, model.blocks):
        k, v = cache[source.attention]                                                 # (B, H, P+T, D/H)
        rows = torch.stack([k[0, :, :3], v[0, :, :3]])                                 # (2, H, P, D/H)
        block.attention.prefix = KeysValues(rows.permute(2, 0, 1, 3).reshape(3, 24))
    same(plain(IDS), expected, "a prefix of the prompt's keys and values does the same")


@pytest.mark.points(1, "prompt")
def test_in_bert_the_prompt_reads_the_text_so_it_is_no_prefix():
    model, caches = stirred(BERT, Prompt(length=3)), [{}, {}]
    for cache, ids in zip(caches, (IDS[:1], IDS[1:])):
        model(ids, cache=cache)
    one, other = (cache[model.blocks[1].attention][0][:, :, :3] for cache in caches)
    assert (one - other).abs().max() > 1e-3, "another text, other keys of the soft words"


@pytest.mark.points(1, "prompt")
def test_the_prompt_moves_every_logit():
    model = stirred(GPT, Prompt(length=3))
    before = model(IDS)
    with torch.no_grad():
        model.prompt.vectors[1, 0] += 1    # one value: LayerNorm would not see the same 1 added to all
    assert ((model(IDS) - before).abs().amax(dim=-1) > 1e-6).all(), "every token sees every soft word"


@pytest.mark.points(1, "prompt")
def test_only_the_prompt_gets_a_gradient_and_all_of_it_does():
    model = stirred(BERT, Prompt(length=3))
    model(IDS).pow(2).sum().backward()
    assert (model.prompt.vectors.grad.abs() > 0).all(), "every value of every soft word"
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"prompt.vectors"}


@pytest.mark.points(1, "prompt")
def test_a_prompt_takes_no_place_from_the_text():
    assert stirred(GPT, Prompt(length=30))(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 17)


# ---- what it starts as ----

def start(**settings):
    """(the vectors that a new prompt starts as, the table of the base)."""
    torch.manual_seed(1)
    model = Transformer(GPT)
    torch.manual_seed(2)
    model = attach(Prompt(**settings), model)
    return model.prompt.vectors.detach(), model.tokens.weight.detach()


def test_a_start_from_the_vocabulary_is_rows_of_the_table():
    vectors, table = start(length=6, init="vocab")
    ids = [(table == vector).all(dim=1).nonzero().item() for vector in vectors]        # an error where no row fits
    assert len(set(ids)) == 6, "drawn, and no word twice: equal rows would get equal gradients, and remain equal"
    assert ids != [0, 1, 2, 3, 4, 5], "in no order of their own"


def test_only_words_that_texts_are_made_of_are_drawn():
    """The others' rows have never been trained."""
    model = Transformer(GPT)
    model.in_use = [4, 9, 11]
    seen = [starting_words("", 2, model).tolist() for _ in range(40)]
    assert {word for words in seen for word in words} == {4, 9, 11}
    assert sorted(starting_words("", 6, model).tolist()) == [4, 4, 9, 9, 11, 11], "all of them before one comes again"


def test_a_start_from_the_labels_is_their_rows_and_then_words_of_the_vocabulary():
    vectors, table = start(length=4, init="labels", words="12,7")
    assert torch.equal(vectors[:2], table[[12, 7]]), "the label words first, in their order"
    assert all((table == vector).all(dim=1).any() for vector in vectors[2:]), "then rows of the table"
    vectors, table = start(length=17, init="labels", words="12,7")
    assert len({*map(tuple, vectors.tolist())}) == 17, "the other 15, and no label word again"


def test_a_random_start_has_the_spread_of_the_table():
    """Vectors of another size would be no words at all to the frozen layers."""
    vectors, table = start(length=500, init="random")
    assert abs(vectors.std() / table.std() - 1) < 0.05, "the spread of the table"
    assert not any((table == vector).all(dim=1).any() for vector in vectors[:3]), "no rows of the table"


def test_the_seed_decides_the_start():
    for init in ("vocab", "random"):
        assert torch.equal(start(length=4, init=init)[0], start(length=4, init=init)[0]), init


def test_the_prompt_is_a_copy_and_the_table_stays_frozen():
    model = attach(Prompt(length=3, init="labels", words="12,7,3"), Transformer(GPT))
    assert set(trainable(model)) == {"prompt.vectors"}
    table = model.tokens.weight.clone()
    with torch.no_grad():
        model.prompt.vectors += 1
    assert torch.equal(model.tokens.weight, table), "training the prompt moves the table"


def test_the_label_words_are_the_tasks_unless_the_user_names_others():
    task, none = SimpleNamespace(words=[12, 7]), SimpleNamespace(words=[])
    assert Prompt(init="labels").for_task(task) == Prompt(init="labels", words="12,7"), "the task's label words"
    mine = Prompt(init="labels", words="3,1")
    assert mine.for_task(task) == mine, "the user's own words stay"
    assert Prompt(init="vocab").for_task(task) == Prompt(init="vocab"), "no labels are wanted"
    with pytest.raises(ValueError, match="init=labels needs a task with label words"):
        Prompt(init="labels").for_task(none)


# ---- merging, settings, counts ----

def test_a_prompt_cannot_be_merged():
    with pytest.raises(ValueError, match="cannot be merged: it is P more words to read"):
        merge(attach(Prompt(), Transformer(GPT)))


def test_settings_that_make_no_sense_are_refused():
    for settings, message in (({"length": 0}, "length=0"), ({"init": "zero"}, "init='zero'"),
                              ({"init": "labels"}, "token ids of the label words"),
                              ({"init": "labels", "words": "12,17"}, "0 to 16"),
                              ({"init": "labels", "words": "great"}, "token ids with commas between"),
                              ({"init": "labels", "words": "12,7", "length": 1}, "2 words, and length=1 has no place")):
        with pytest.raises(ValueError, match=message):
            attach(Prompt(**settings), Transformer(GPT))


def test_counts_of_the_prompt_paper():
    """P d, and its share of prompt and model together, as printed for the largest model."""
    xxl = Config(32128, 512, 4096, 1, 8, 4 * 4096)
    expected = {1: 4_096, 5: 20_480, 20: 81_920, 50: 204_800, 100: 409_600, 150: 614_400}
    assert {P: Prompt(length=P).formula(xxl) for P in expected} == expected, "P d"
    assert round(100 * 409_600 / (t5_size("xxl") + 409_600), 5) == 0.00368, "in %"
    assert counted("gpt2", Prompt(length=20)).delta == 20 * 768 == 15_360, "counted on a model of that size"
