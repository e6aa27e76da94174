"""The course's cards: what a student is told is right, and where a solution is kept, every law holds for it.

A solution is one file and one line, as a student's own technique is: `added` puts both in place, for a test.
"""

import importlib
import inspect
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import methods
import test_laws
from data.bases import SHAPES
from deltas import Delta, attach, trainable
from tiny import GPT, IDS, same, stir, stirred

COURSE = Path(__file__).parents[1] / "course"
CARDS = {path.stem: path.read_text(encoding="utf-8") for path in (COURSE / "cards").glob("*.md")}
SOLVED = sorted(path.stem for path in (COURSE / "solutions").glob("*.py"))


@contextmanager
def added(name, folder=COURSE / "solutions"):
    """The technique in folder/NAME.py, as if the file stood in methods/ and its line in methods/__init__.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
        module = importlib.import_module(f"methods.{name}")
        kind = next(k for k in vars(module).values() if inspect.isclass(k) and k.__module__ == module.__name__
                    and issubclass(k, Delta))
        patch.setattr(methods, kind.__name__, kind, raising=False)
        yield kind
    del sys.modules[f"methods.{name}"]
    delattr(methods, name)


@pytest.mark.parametrize("name", SOLVED)
def test_every_law_holds_for_a_solution_by_its_being_listed(name, tmp_path):
    laws = [(law, inspect.signature(law).parameters) for law in vars(test_laws).values() if inspect.isfunction(law)]
    laws = [(law, needs) for law, needs in laws if law.__name__.startswith("test_") and "name" in needs]
    assert len(laws) > 10
    with added(name):
        for law, needs in laws:
            law(name, **{"tmp_path": tmp_path} if "tmp_path" in needs else {})


def test_a_card_has_a_page_an_equation_a_count_and_what_to_test_first():
    assert set(CARDS) == {"ia3", "dora", "vera", "shared-lora", "side-network"} and set(SOLVED) < set(CARDS)
    for name, text in CARDS.items():
        assert len(text.splitlines()) <= 50, f"{name}: a page"
        for part in ("**Count**", "**Where it hooks in**", "**What to test first**", "**Where it goes wrong**", "    "):
            assert part in text, f"{name}: no {part}"


@pytest.mark.parametrize("name", CARDS)
def test_the_count_of_a_card_is_right(name):
    """`2 * (2 * 48 + 192)` = 576 on gpt-xs, whose numbers stand in place of the letters."""
    expression, count = re.search(r"gpt-xs[^`]*`([\d ()+*]+)` = ([\d,]+)", CARDS[name]).groups()
    assert eval(expression) == int(count.replace(",", "")), f"{name}: {expression}"
    if name in SOLVED:
        with added(name) as kind:
            assert kind().formula(SHAPES["gpt-xs"]) == int(count.replace(",", "")), f"{name}: by its formula"


# ---- the two that are solved, on paper ----

def test_ia3_scales_rows_of_keys_and_values_and_columns_behind_the_inner_state():
    """A scale of 2 on one key, on one value and on one inner state is a doubled row or column of their matrix."""
    with added("ia3") as IA3:
        model, plain = attach(IA3(), stirred(GPT)), stirred(GPT)
    with torch.no_grad():
        for block, twin in zip(model.blocks, plain.blocks):
            block.attention.key.l[5], block.attention.value.l[7], block.mlp.down.l[:, 9] = 2, 2, 2
            twin.attention.key.weight[5] *= 2
            twin.attention.value.weight[7] *= 2
            twin.mlp.down.weight[:, 9] *= 2
    same(model(IDS), plain(IDS), "keys, values and the inner state are scaled")


def test_vera_scales_one_random_pair_that_all_layers_share():
    """W_0 + diag(b) B diag(d) A with the diagonals written out, in a plain model."""
    with added("vera") as VeRA:
        model, plain = attach(VeRA(rank=5), stirred(GPT)).double(), stirred(GPT)
    stir(trainable(model).values())
    A, B = model.blocks[0].attention.query.A, model.blocks[0].attention.query.B
    assert A.shape == (5, 12) and B.shape == (12, 5)
    with torch.no_grad():
        for block, twin in zip(model.blocks, plain.blocks):
            for name in ("query", "value"):
                vectors = getattr(block.attention, name)
                update = torch.diag(vectors.b) @ B @ torch.diag(vectors.d) @ A
                getattr(twin.attention, name).weight += update
    same(model(IDS), plain(IDS), "the same A and B in every layer")
    assert len(trainable(model)) == 2 * 4, "a d and a b for each matrix, and nothing else"
