"""The little world by hand: what its documents say, who may read what, and how its texts become tokens."""

from collections import Counter

import pytest
import torch

from data import bases, bpe, probe, tokenizers, world
from data.bases import SHAPES, load_base
from model import Transformer

TOKENIZER = tokenizers.world()
SPLITS = ("train", "dev", "test")
TEXTS = {(task, split): [text for text, _ in world.rows(task, split, 200)]
         for task in world.TASKS for split in SPLITS}


def words_in(clauses):
    return {word for clause in clauses for word in clause.split()}


# ---- opinions ----

def test_a_negator_turns_an_adjective_round():
    assert "the soup was tasty" in world.CLAUSES["food", True, False]
    assert "the soup was not tasty" in world.CLAUSES["food", False, True]
    assert "the soup was far from bland" in world.CLAUSES["food", True, True]


def test_no_adjective_both_praises_and_blames():
    for aspect in world.ASPECTS:
        assert not set(world.ASPECTS[aspect][1].split()) & set(world.ASPECTS[aspect][2].split())
    assert not set(world.PRAISE) & set(world.BLAME)
    assert not set(world.CLOSING[True]) & set(world.CLOSING[False])


def polarity(clause, positive_words):
    """Read a clause slowly: praise or blame, turned round if a negator stands in it."""
    praises = any(word in positive_words for word in clause.split())
    return praises != any(f" {negator} " in clause for negator in world.NEGATORS)


def test_a_reader_who_knows_only_adjectives_and_negators_agrees_with_every_clause():
    praise = {word for _, good, _ in world.ASPECTS.values() for word in good.split()} | set(world.PRAISE)
    for (_, positive, _), clauses in world.CLAUSES.items():
        assert all(polarity(clause, praise) == positive for clause in clauses)


def test_a_conjunction_says_which_opinion_wins():
    assert [frame.format("L", "W") for frame in world.CONTRAST] == [
        "L , but W", "L . still , W", "L , yet W", "although L , W", "W , although L", "W , even though L"]


# ---- documents ----

def test_what_is_told_follows_from_what_is_given():
    kinds = Counter()
    for given, told in world.corpus(2000):
        words = told.split()
        if given.endswith("?"):
            kinds["question"] += 1
            assert words in (["yes", "."], ["no", "."], ["unknown", "."])
        elif given.startswith("name "):
            kinds["description"] += 1
            assert world.attributes(told).items() <= world.attributes(given).items()
        elif told.startswith("it was"):
            kinds["review"] += 1
            assert words[2] in world.CLOSING[True] + world.CLOSING[False]
        elif given == told:
            kinds["names"] += 1
        else:
            kinds["menu"] += 1
            menu = set((given + " " + told).split())
            cuisine, = menu & set(world.CUISINES)
            assert len(menu & set(world.DISHES[cuisine])) == 2
    assert all(kinds[kind] > 100 for kind in ("review", "question", "description", "names", "menu"))


def test_an_equal_seed_makes_an_equal_world_and_another_seed_another_one():
    assert world.corpus(50, seed=3) == world.corpus(50, seed=3) != world.corpus(50, seed=4)
    assert world.rows("claim", "train", 50, seed=3) != world.rows("claim", "train", 50, seed=4)


def test_fewer_rows_are_the_first_of_more_rows():
    assert world.rows("rating", "train", 50) == world.rows("rating", "train", 200)[:50]


def test_a_world_that_has_run_out_of_texts_says_how_many_it_has(monkeypatch):
    texts = [text for text, _ in world.rows("describe", "train", 3)]
    monkeypatch.setitem(world.WRITERS, "describe", lambda rng, label, split: rng.choice(texts))
    assert len(world.rows("describe", "train", 3)) == 3
    with pytest.raises(ValueError, match="4 examples of describe: the world has only some 3 for train"):
        world.rows("describe", "train", 4)
    often = iter([text for text in texts for _ in range(4)])          # three repetitions in a row are no end
    monkeypatch.setattr(world, "TRIES", 4)
    monkeypatch.setitem(world.WRITERS, "describe", lambda rng, label, split: next(often))
    assert [text for text, _ in world.rows("describe", "train", 3)] == texts


# ---- who may read what ----

def test_no_text_is_in_two_splits_or_twice_in_one():
    for task in world.TASKS:
        texts = [text for split in SPLITS for text in TEXTS[task, split]]
        assert len(set(texts)) == len(texts) == 600, task


def test_no_text_of_a_task_is_ever_given_in_pretraining():
    given = {given for given, _ in world.corpus(20_000)}
    assert not given & {text for texts in TEXTS.values() for text in texts}
    assert all(world.home(text) == "corpus" for text in given)


def test_the_dishes_of_the_cuisine_test_are_not_those_of_its_training():
    trained, tested = (words_in(TEXTS["cuisine", split]) for split in ("train", "test"))
    dishes = {dish for menu in world.DISHES.values() for dish in menu}
    assert trained & dishes and tested & dishes and not trained & tested & dishes


# ---- labels ----

def test_every_label_is_equally_frequent_and_one_token():
    for name, task in world.TASKS.items():
        labels = Counter(label for _, label in world.rows(name, "train", 50 * len(task.labels)))
        assert labels == {label: 50 for label in task.labels}, name
        assert all(len(TOKENIZER.encode(" " + label)) == 1 for label in task.labels), name


def test_a_rating_is_extreme_where_both_opinions_agree():
    praise = {word for _, good, _ in world.ASPECTS.values() for word in good.split()} | set(world.PRAISE)
    connectives = ("but", "still", "yet", "although", "even though")
    for text, label in world.rows("rating", "test", 200):
        contrast = any(f"{word} " in text for word in connectives)
        assert contrast == (label in ("good", "bad"))
        clauses = ["the " + part for part in text.split("the ") if " was " in part]
        found = {polarity(clause, praise) for clause in clauses}
        assert found == ({True, False} if contrast else {label == "great"})


# ---- descriptions ----

def test_the_reader_finds_in_prose_what_the_listing_says():
    listing = "name golden fork ; food thai ; price low ; area river ; children no ."
    facts = {"name": "golden fork", "food": "thai", "price": "low", "area": "river", "children": "no"}
    assert world.attributes(listing) == facts
    assert world.attributes("the golden fork serves thai food . it is cheap . you find it by the river .") == {
        key: facts[key] for key in ("name", "food", "price", "area")}
    assert world.attributes(world.completion(facts)) == facts


# ---- tokens ----

def test_byte_pairs_by_hand():
    # "aab" three times, "ab" once: the pair ab stands 4 times, aa 3 times; then a + ab stands 3 times.
    # In the end aab is one token and so is ab, from the text that has no more: a and b alone are left nowhere.
    tokens = bpe.train(["aab", "aab", "aab", "ab"], 259)
    assert list(tokens)[:256] == [bytes([n]) for n in range(256)]
    assert {token: n for token, n in tokens.items() if n or len(token) > 1} == {b"ab": 1, b"aab": 3}


def test_the_shipped_byte_pairs_are_those_of_this_world(tmp_path):
    texts = (f"{given} {told}" for given, told in world.corpus(50_000))
    bpe.write(bpe.train(texts, bpe.VOCABULARY - len(bpe.SPECIAL)), tmp_path / "bpe.txt")
    assert (tmp_path / "bpe.txt").read_text(encoding="ascii") == bpe.FILE.read_text(encoding="ascii")


def test_a_document_of_this_world_has_one_token_a_word_and_fits_the_bases():
    for given, told in world.corpus(500):
        text = f"{given} {told}"
        tokens = TOKENIZER.encode(text)
        assert TOKENIZER.decode(tokens) == text
        assert len(tokens) == len(text.split()) < SHAPES["gpt-s"].n_ctx
        assert set(tokens) <= set(TOKENIZER.in_use), "a word of the world is in use"


def test_words_from_elsewhere_fall_apart_and_come_back():
    text = "Überraschung: 3 zebras [MASK]"
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


# ---- what the bases know ----

def test_the_probe_asks_only_what_nobody_has_read():
    for write, _ in probe.PROBES.values():
        assert all(world.home(text) == "test" for text, _ in probe.unseen(write, 20))


def test_the_probe_knows_the_closing_of_a_review():
    for text, words in probe.unseen(probe.contrasting, 50):
        assert words in world.CLOSING.values() and text.endswith(" .")


def test_the_probe_counts_the_texts_whose_word_is_right(monkeypatch):
    """A model that always says "good" is right on every second agreeing review, and about no cuisine."""
    def says_good(ids, keep, at):
        return torch.nn.functional.one_hot(torch.tensor(TOKENIZER.encode(" good") * len(ids)), 1024)
    says_good.config = SHAPES["gpt-xs"]
    monkeypatch.setattr(probe, "PROBES", {name: probe.PROBES[name] for name in ("agreeing", "cuisine")})
    praised = sum(words == world.CLOSING[True] for _, words in probe.unseen(probe.agreeing, 70))
    found = probe.probe(says_good, tokenizers.world(wraps=False), n=70)
    assert found == {"agreeing": 100 * praised / 70, "cuisine": 0.0} and 25 < praised < 45


@pytest.mark.parametrize("name", SHAPES)
def test_a_shipped_base_knows_the_closing_words_of_reviews(name, monkeypatch):
    """The probe that decided when it was shipped, again."""
    monkeypatch.setattr(probe, "PROBES", {"review": probe.PROBES["review"]})
    model, tokenizer = load_base(name)
    assert probe.report(model, tokenizer)
    assert model.in_use == tokenizer.in_use, "the model is told which of its rows are words"


def test_a_new_base_is_shipped_in_float16_if_it_passes(monkeypatch, tmp_path):
    torch.manual_seed(0)
    weights = dict(Transformer(SHAPES["gpt-xs"]).named_parameters())
    torch.save({"notes": {"base": "gpt-xs"}, "tensors": weights}, tmp_path / "run.pt")
    monkeypatch.setattr(bases, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(probe, "PROBES", {"review": probe.PROBES["review"]})
    with pytest.raises(SystemExit, match="gpt-xs does not pass; nothing was written"):
        bases.keep(tmp_path / "run.pt")                                       # it is random: it knows nothing
    with pytest.raises(ValueError, match="base 'gpt-xs' has no weights at .*gpt-xs.pt"):
        load_base("gpt-xs")
    monkeypatch.setattr(probe, "ENOUGH", {True: 0.0})
    bases.keep(tmp_path / "run.pt")
    for name, p in load_base("gpt-xs")[0].named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, weights[name].half().float()), name
    assert (tmp_path / "weights" / "gpt-xs.pt").stat().st_size < 2 * sum(p.numel() for p in weights.values()) + 12_000
