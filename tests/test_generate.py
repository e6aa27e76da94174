"""Greedy decoding: where it reads, what it keeps, when it ends.

That the cache changes no word, whatever is attached, is a law: test_laws.py.
"""

import pytest
import torch
import torch.nn.functional as F

from deltas import trainable
from methods.prefix import Prefix
from methods.prompt import Prompt
from model import generate
from tiny import GPT, IDS, stirred


@pytest.mark.points(2, "generate")
def test_the_next_word_is_read_at_a_rows_last_token_and_decoding_ends_once_every_row_has_stopped():
    """A model whose next word is always the current one plus 1: 3 -> 4 5 6 7, 5 -> 6 7 (and on)."""
    def counts_on(ids, keep, at, cache):
        assert at is None or at.sum(dim=1).tolist() == [1, 1], "one place a row"
        return F.one_hot(ids[at] + 1, 17).float()

    def decoded(*ids, keep=None, **how):
        return generate(counts_on, torch.tensor(ids), keep, **how).tolist()

    pads = torch.tensor([[True, True, True], [True, False, False]])
    assert decoded([3], [5], steps=9, stop=7) == [[4, 5, 6, 7], [6, 7, 8, 9]], "until both have said 7"
    assert decoded([3], [5], steps=2, stop=7) == [[4, 5], [6, 7]], "no more than `steps`"
    assert decoded([3], [5], steps=3) == [[4, 5, 6], [6, 7, 8]], "no stop: all of them"
    assert decoded([8, 9, 3], [5, 0, 0], keep=pads, steps=1) == [[4], [6]], "behind the text, not behind its pads"


@pytest.mark.points(1, "generate")
def test_a_model_that_has_learnt_to_stop_stops():
    model = stirred(GPT)
    free, text = generate(model, IDS[:1], steps=7)[0].tolist(), IDS[:1]
    for _ in range(7):
        text = torch.cat([text, model(text)[:, -1:].argmax(dim=-1)], dim=1)
    assert free == text[0, 5:].tolist(), "with its cache it says what it says when it reads all again"
    stop = free[1]
    assert generate(model, IDS[:1], steps=7, stop=stop)[0].tolist() == free[:free.index(stop) + 1]


def test_what_the_cache_holds():
    """A prompt's keys and values are kept like words'; a prefix is put in front anew, it is known already."""
    for delta, soft in ((None, 0), (Prompt(length=3), 3), (Prefix(length=4), 0)):
        model, cache = stirred(GPT, delta), {}
        model(IDS[:1], cache=cache)
        model(IDS[:1, :1], torch.ones(1, 6, dtype=torch.bool), cache=cache)
        assert set(cache) == {block.attention for block in model.blocks}, f"{delta}: an entry for every attention"
        assert {k.shape for k, _ in cache.values()} == {(1, 3, soft + 5 + 1, 4)}, f"{delta}: soft words, text, new word"


def test_a_text_that_outgrows_the_context_says_so():
    with pytest.raises(ValueError, match="reads at most 16"):
        generate(stirred(GPT, Prefix(length=4)), IDS[:1], steps=20)


def test_decoding_leaves_no_gradient_behind_and_stops_none():
    model = stirred(GPT, Prefix(length=4))
    generate(model, IDS, steps=3)
    assert all(p.grad is None for p in model.parameters())
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in trainable(model).values()), "what was decoded is not kept"
