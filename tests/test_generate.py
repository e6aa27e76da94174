"""Greedy decoding with a cache gives the words that decoding by whole texts gives, whatever is attached."""

import pytest
import torch

from deltas import attach, trainable
from methods.adapter import Adapter
from methods.bitfit import BitFit
from methods.lora import LoRA
from methods.prefix import Prefix
from methods.prompt import Prompt
from model import Config, Transformer, generate

GPT = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=2, n_head=3, d_ff=20)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [8, 0, 0, 0, 0]])
KEEP = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
DELTAS = {"base": None, "bitfit": BitFit(), "adapter": Adapter(), "lora": LoRA(), "prompt": Prompt(length=3),
          "prefix": Prefix(length=4), "flat prefix": Prefix(length=4, mlp=False)}


def stirred(delta=None):
    """A model in float64 whose every number has been moved, so that it says different words."""
    torch.manual_seed(3)
    model = Transformer(GPT)
    model = (model if delta is None else attach(delta, model)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.8 * torch.randn_like(p)
    return model


def by_whole_texts(model, ids, steps):
    """The slow way: read everything again for each new word."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, -steps:].tolist()


@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)
def test_the_cache_changes_no_word(delta):
    model = stirred(delta)
    new = generate(model, IDS, KEEP, steps=7).tolist()
    for row, ids, keep in zip(new, IDS, KEEP):
        assert row == by_whole_texts(model, ids[keep][None], 7)
    assert len({word for row in new for word in row}) > 2            # not one word for ever


@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)
def test_the_logits_of_each_step_agree_too(delta):
    """Words are a coarse measure: here every number of every position, with no rounding to hide behind."""
    model, cache = stirred(delta), {}
    text = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    whole = model(text)
    pieces = [model(text[:, start:end], torch.ones(2, end, dtype=torch.bool), cache=cache)
              for start, end in ((0, 3), (3, 4), (4, 6))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-8)


@pytest.mark.parametrize("delta, soft", [(None, 0), (Prompt(length=3), 3), (Prefix(length=4), 0)],
                         ids=["base", "prompt", "prefix"])
def test_what_the_cache_holds(delta, soft):
    """A prompt's keys and values are kept like words'; a prefix is put in front anew, it is known already."""
    model, cache = stirred(delta), {}
    model(IDS[:1], cache=cache)
    model(IDS[:1, :1], torch.ones(1, 6, dtype=torch.bool), cache=cache)
    assert {k.shape for k, _ in cache.values()} == {(1, 3, soft + 5 + 1, 4)}
    assert set(cache) == {block.attention for block in model.blocks}


def test_decoding_ends_when_every_row_has_stopped():
    model = stirred()
    free = generate(model, IDS[:1], steps=7)[0].tolist()
    stop = free[1]
    assert generate(model, IDS[:1], steps=7, stop=stop)[0].tolist() == free[:free.index(stop) + 1]
    assert generate(model, IDS, KEEP, steps=4, stop=99).shape == (3, 4)                # no row ever says it


def test_a_rows_neighbours_do_not_change_it():
    for delta in (Prompt(length=3), Prefix(length=4)):
        model = stirred(delta)
        alone = generate(model, IDS[1:2, :3], steps=7)
        assert torch.equal(generate(model, IDS, KEEP, steps=7)[1:2], alone)


def test_a_text_that_outgrows_the_context_says_so():
    with pytest.raises(ValueError, match="reads at most 16"):
        generate(stirred(Prefix(length=4)), IDS[:1], steps=20)


def test_decoding_leaves_no_gradient_behind():
    model = stirred(Prefix(length=4))
    generate(model, IDS, KEEP, steps=3)
    assert all(p.grad is None for p in model.parameters())
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())


@pytest.mark.parametrize("delta", [Adapter(init_std=0.01), Prompt(length=3), Prefix(length=4)],
                         ids=["adapter", "prompt", "prefix"])
def test_a_float32_delta_in_a_bfloat16_model(delta):
    """What is frozen may be stored in half the bytes; the delta and its gradients stay in float32."""
    model = attach(delta, Transformer(GPT))
    for p in model.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(IDS, KEEP)
        assert generate(model, IDS, KEEP, steps=3).shape == (3, 3)
    logits.float().pow(2).sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainable(model).values())
    twin = model.float()(IDS, KEEP)
    assert (logits - twin).norm() < 0.05 * twin.norm()
