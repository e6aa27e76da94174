"""Discrete prompts: words put in front of a text, and the greedy search for them."""

import torch

from data.tasks import Example, Task
from lab.prompts import in_front, search
from tiny import BERT, GPT, stirred

QUESTION = Example([3, 1, 4], [-100, -100, 5], "", [""])


def test_words_stand_before_a_gpts_text_and_behind_berts_cls():
    assert in_front(QUESTION, [8, 9], GPT).ids == [8, 9, 3, 1, 4]
    assert in_front(QUESTION, [8, 9], BERT).ids == [3, 8, 9, 1, 4]
    assert in_front(QUESTION, [8, 9], GPT).targets == [-100, -100, -100, -100, 5]


def test_the_search_finds_the_one_word_that_helps():
    """Every word is tried for one place; the oracle is a plain loop over the vocabulary."""
    model = stirred(GPT)
    task = Task("tiny", [QUESTION], [], [], labels=["a", "b"], words=[5, 6])

    def loss(words):
        logits = model(torch.tensor([words + QUESTION.ids]))[0, -1, [5, 6]]
        return -logits.log_softmax(dim=0)[0].item()

    best = min(range(17), key=lambda word: loss([word]))
    expected = [best] if loss([best]) < loss([]) else []
    assert search(model, task, 0, length=1, candidates=400, seed=0) == expected != []
