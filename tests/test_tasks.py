"""Tasks by hand: where the target stands, what is cut, how batches, loss and scores come about."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from data import tasks, tokenizers, world
from data.bases import SHAPES
from data.own import OwnData
from data.tasks import Encoder, Example, Task, batches, collate, load_task, only
from model import Config, Refused
from tiny import stirred

WORLD = tokenizers.world()                             # [CLS] text [SEP]
PLAIN = tokenizers.world(wraps=False)                  # a GPT reads the text as it is
GPT, BERT = SHAPES["gpt-xs"], SHAPES["bert-xs"]
PAD, CLS, SEP, MASK = WORLD.pad, WORLD.bos, WORLD.eos, WORLD.mask
TEXT = "the soup was fine ."
SOUP = WORLD.encode(TEXT)
N = -100


def ids(text):
    return WORLD.encode(text)


def example(n, target=3, label="good"):
    """A text of n tokens with one target at its end."""
    return Example(list(range(1, n + 1)), only(target, n - 1, n), f"text {n}", [label])


# ---- encoding ----

def test_for_a_gpt_the_label_is_the_word_after_the_text():
    made = Encoder(PLAIN, GPT).cloze(TEXT, ["good"], "{text} it was", 7)
    assert made.ids == SOUP + ids(" it was")
    assert made.targets == [N] * (len(SOUP) + 1) + [7]
    assert (made.text, made.answers) == (TEXT, ["good"])


def test_a_gpt_ignores_what_a_template_has_behind_the_mask():
    encoder = Encoder(PLAIN, GPT)
    assert encoder.cloze(TEXT, [], "{text} it was [MASK] .", 7).ids == SOUP + ids(" it was")
    assert encoder.cloze(TEXT, [], "review : {text} it was [MASK]", 7).ids[:2] == ids("review :")[:2]


def test_for_a_bert_the_label_is_hidden_by_the_mask():
    made = Encoder(WORLD, BERT).cloze(TEXT, ["good"], "{text} it was [MASK] .", 7)
    assert made.ids == [CLS] + SOUP + ids(" it was") + [MASK] + ids(" .") + [SEP]
    assert made.targets == [N] * (1 + len(SOUP) + 2) + [7] + [N] * 2
    assert made.ids[made.targets.index(7)] == MASK


def test_a_class_is_read_at_cls_or_at_the_last_token():
    bert, gpt = Encoder(WORLD, BERT).classified(TEXT, ["x"], 2), Encoder(PLAIN, GPT).classified(TEXT, ["x"], 2)
    assert bert.ids == [CLS] + SOUP + [SEP] and bert.targets == [2] + [N] * (len(SOUP) + 1)
    assert gpt.ids == SOUP and gpt.targets == [N] * (len(SOUP) - 1) + [2]


def test_a_completion_is_predicted_word_by_word_up_to_the_end_of_text():
    made = Encoder(PLAIN, GPT).completed("name golden fork", ["the golden fork", "that one"])
    prompt, completion = ids("name golden fork"), ids(" the golden fork") + [SEP]
    assert made.ids == prompt + completion[:-1]
    assert made.targets == [N] * (len(prompt) - 1) + completion
    assert tasks.prompt(made) == (prompt, made.targets[:len(prompt)])
    assert made.answers == ["the golden fork", "that one"]


def test_a_long_text_loses_its_end_and_never_the_question():
    small = Config(1024, 10, 12, 1, 3, 20)
    encoder = Encoder(PLAIN, small)
    made = encoder.cloze("the soup was fine . " * 5, [], "{text} it was", 7)
    assert made.ids == ids("the soup was fine . " * 5)[:8] + ids(" it was") and len(made.ids) == 10
    assert encoder.cut == 1
    encoder.cloze("the soup", [], "{text} it was", 7)
    assert encoder.cut == 1
    bert = Encoder(WORLD, Config(1024, 10, 12, 1, 3, 20, causal=False))
    made = bert.cloze("the soup was fine . " * 5, [], "{text} it was [MASK] .", 7)
    assert len(made.ids) == 10 and made.ids[0] == CLS and made.ids[-2:] == ids(" .") + [SEP]
    assert made.ids[made.targets.index(7)] == MASK


def test_a_template_that_leaves_no_room_for_the_text_is_refused():
    read = len(ids("we went :") + ids(" it"))
    for tokenizer, causal, beside in ((PLAIN, True, read), (WORLD, False, read + 3)):      # [CLS], [MASK], [SEP]
        encoder = Encoder(tokenizer, Config(1024, 4, 12, 1, 3, 20, causal), "mine/template.json")
        with pytest.raises(Refused, match=f"mine/template.json: {beside} tokens beside the text leave no room for it: "
                                          "this model reads 4"):
            encoder.cloze("the soup", [], "we went : {text} it [MASK]", 7)


def test_a_long_completion_is_cut_only_where_nothing_would_be_left_of_its_prompt():
    """Ten tokens: 5 of a prompt and 8 with the end leave 2 of the prompt; 12 leave 5 of the prompt and 5 of itself."""
    prompt, told = "we went to the fork", "the soup was fine . it was"
    made = {}
    for more in ("", " the soup was fine"):
        encoder = Encoder(PLAIN, Config(1024, 10, 12, 1, 3, 20))
        e = made[more] = encoder.completed(prompt, [told + more])
        assert len(e.ids) == 9 and encoder.cut == 1 and e.answers == [told + more]
    assert made[""].ids == ids(prompt)[:2] + ids(" " + told) and made[""].targets[-1] == SEP
    cut = made[" the soup was fine"]
    assert cut.ids == ids(prompt) + ids(" " + told)[:4] and cut.targets == [N] * 4 + ids(" " + told)[:5]
    encoder = Encoder(PLAIN, Config(1024, 10, 12, 1, 3, 20))
    assert encoder.completed("we", [told + told]).ids == ids("we " + told + told)[:9] and encoder.cut == 1
    encoder.completed("we", [told])
    assert encoder.cut == 1, "eight of eight fit"


def test_a_label_word_must_be_one_token():
    assert [Encoder(PLAIN, GPT).word("good")] == ids(" good")
    with pytest.raises(ValueError, match="label word 'xylophone' is .* tokens here"):
        Encoder(PLAIN, GPT).word("xylophone")


# ---- the little world's tasks ----

def test_a_task_is_answered_by_one_of_its_label_words():
    for name, spec in world.TASKS.items():
        for tokenizer, config in ((PLAIN, GPT), (WORLD, BERT)) if spec.labels else ():
            task = load_task(name, tokenizer, config, examples=8)
            assert (len(task.train), len(task.dev), len(task.test)) == (8, 300, 600)
            assert tokenizer.decode(task.words).split() == task.labels == list(spec.labels)
            assert (task.classes, task.cut, task.metric, task.about) == (0, 0, "accuracy", spec.about)
            for e in task.train + task.dev:
                assert [t for t in e.targets if t != N] == ids(" " + e.answers[0])
                assert len(e.ids) == len(e.targets) <= 96
            texts = [e.text for split in (task.train, task.dev, task.test) for e in split]
            assert len(set(texts)) == 908, f"{name}: no text is there twice"
            assert abs(task.majority - 100 / len(task.labels)) < 1


def test_the_seed_draws_the_training_examples_and_the_test_but_not_dev():
    one, same, other = (load_task("rating", PLAIN, GPT, examples=8, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one.train != other.train and one.test != other.test and one.dev == other.dev
    assert len(load_task("rating", PLAIN, GPT).train) == world.TASKS["rating"].examples


def test_describing_is_writing_and_a_bert_cannot():
    task = load_task("describe", PLAIN, GPT, examples=4)
    assert task.metric == "attributes" and task.stop == SEP and task.labels == [] and task.majority == 0
    assert task.train[0].targets[-1] == SEP
    with pytest.raises(ValueError, match="'describe' is writing text, which a BERT cannot"):
        load_task("describe", WORLD, BERT, examples=4)
    with pytest.raises(ValueError, match="task 'reading': choose from sentiment"):
        load_task("reading", PLAIN, GPT)


def test_pretraining_completes_documents_or_finds_hidden_words():
    task = load_task("corpus", PLAIN, GPT, examples=6)
    assert (len(task.train), len(task.dev), len(task.test), task.metric) == (6, 300, 0, "")
    for e in task.train:
        asked = [t for t in e.targets if t != N]
        assert asked[-1] == SEP and (e.ids + [SEP])[-len(asked):] == asked             # the next word, at each place
    task = load_task("corpus", WORLD, BERT, examples=6)
    for e in task.train:
        assert len(e.ids) == len(e.targets) and e.ids[0] == CLS and e.ids[-1] == SEP
        assert [i for i, t in enumerate(e.targets) if t != N] == [i for i, t in enumerate(e.ids) if t == MASK] != []
    assert load_task("corpus", WORLD, BERT, examples=6) == task
    assert not {e.text for e in task.train} & {e.text for e in task.dev}
    assert load_task("corpus", WORLD, BERT, examples=6, seed=1).train != task.train


def test_two_thirds_of_the_second_part_are_hidden_and_never_nothing():
    encoder = Encoder(WORLD, BERT)
    told = [encoder.hidden("did we like it ?", "yes", random.Random(seed)).ids for seed in range(50)]
    assert told == [[CLS] + ids("did we like it ?") + [MASK, SEP]] * 50, "a single word is hidden every time"
    made = encoder.hidden("the soup", "was " * 3000, random.Random(0))
    assert made.ids.count(MASK) / 3000 == pytest.approx(2 / 3, abs=0.03)


# ---- tasks from files ----

def own_data(**change):
    splits = {"train": [(f"the soup {i}", ["bad" if i % 3 else "good"]) for i in range(9)],
              "dev": [("a soup", ["good"])], "test": []}
    return OwnData("mine", splits, labels=["bad", "good"], **change)


def test_own_labels_are_learned_by_a_classifier_unless_words_are_given():
    task = tasks.own_task(own_data(), Encoder(PLAIN, GPT), None, 0)
    assert task.classes == 2 and task.words is None and len(task.train) == 9
    assert [e.targets[-1] for e in task.train[:3]] == [1, 0, 0]                        # "good" is labels[1]
    assert task.majority == 0                                                          # all dev rows are the rarer
    words = {"words": ["bad", "fine"], "template": "{text} it was [MASK]"}
    task = tasks.own_task(own_data(**words), Encoder(PLAIN, GPT), None, 0)
    assert task.classes == 0 and task.words == ids(" bad") + ids(" fine")
    assert task.train[0].targets[-1:] == ids(" fine")
    headless = Encoder(PLAIN, Config(1024, 96, 12, 1, 3, 20, lm_head="none"))
    assert tasks.own_task(own_data(**words), headless, None, 0).classes == 2


def test_a_task_counts_the_texts_that_were_cut():
    small = Config(1024, 8, 12, 1, 3, 20)
    long = {"train": [("the soup", ["a"]), ("the soup " * 5, ["b"])], "dev": [("soup " * 9, ["a"])], "test": []}
    for labels in (["a", "b"], []):                                                    # classified, or written
        assert tasks.own_task(OwnData("mine", long, labels=labels), Encoder(PLAIN, small), None, 0).cut == 2


def test_some_of_ones_own_examples_are_drawn_by_the_seed():
    draw = lambda seed: [e.text for e in tasks.own_task(own_data(), Encoder(PLAIN, GPT), 4, seed).train]
    assert len(set(draw(0))) == 4 and draw(0) == draw(0) != draw(1)
    assert len(tasks.own_task(own_data(), Encoder(PLAIN, GPT), 9, 0).train) == 9


# ---- batches ----

@pytest.mark.points(3, "tasks")
def test_a_batch_is_padded_on_the_right():
    batch = collate([example(3), example(1)], pad=9)
    assert [t.tolist() for t in batch] == [[[1, 2, 3], [1, 9, 9]], [[True] * 3, [True, False, False]],
                                           [[N, N, 3], [3, N, N]]]
    assert collate([example(2), example(1)], pad=None)[0].tolist() == [[1, 2], [1, 0]]
    assert collate([example(3), example(2)], pad=2)[1].tolist() == [[True] * 3, [True, True, False]], (
        "a pad is told by the text's length: the pad's token may stand in a text")


@pytest.mark.points(1, "tasks")
def test_every_example_is_in_one_batch_with_others_of_its_length():
    examples = [example(1 + i % 7) for i in range(100)]
    for generator in (None, torch.Generator().manual_seed(0)):
        groups = [group for group, *_ in batches(examples, 8, 0, generator)]
        assert sorted(i for group in groups for i in group) == list(range(100))
        assert sorted(map(len, groups)) == [4] + [8] * 12
    pads = sum((~keep).sum().item() for _, _, keep, _ in batches(examples, 8, 0, torch.Generator().manual_seed(0)))
    assert pads < 50                                   # of about 400; without sorting it would be about 250


@pytest.mark.points(1, "tasks")
def test_the_order_of_batches_is_drawn():
    examples = [example(1 + i % 7) for i in range(100)]
    order = lambda seed: [group for group, *_ in batches(examples, 8, 0, torch.Generator().manual_seed(seed))]
    assert order(0) == order(0) != order(1)
    lengths = lambda groups: [len(examples[i].ids) for group in groups for i in group]
    assert lengths(order(0)) != sorted(lengths(order(0))), "short texts do not always come first"
    unshuffled = [group for group, *_ in batches(examples, 8, 0)]
    assert lengths(unshuffled) == sorted(lengths(unshuffled))


# ---- loss and scores ----

class Says(torch.nn.Module):
    """A model whose logits over five words are the same for every text but for the text's length."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.config = torch.nn.Parameter(torch.tensor(logits)), GPT

    def forward(self, ids, keep, at):
        return self.logits[keep.sum(dim=1)][at.nonzero()[:, 0]]                        # row n: a text of n tokens


class Counts(torch.nn.Module):
    """A model that goes on counting: after token n comes n + 1. It is its own tokenizer, and reads `n_ctx` tokens."""

    pad = 0

    def __init__(self, n_ctx):
        super().__init__()
        self.one, self.config = torch.nn.Parameter(torch.eye(50)), Config(50, n_ctx, 12, 1, 3, 20)

    def forward(self, ids, keep, at, cache):
        assert keep.shape[1] <= self.config.n_ctx
        return self.one[ids[at] + 1]

    def decode(self, ids):
        return "".join(f" {n}" for n in ids)  # a word has its space before it


@pytest.mark.points(3, "tasks")
def test_only_the_label_words_compete():
    """Logits 0 1 2 3 9, label words 3 and 1, wanted 3: the loss is log(1 + e^(1 - 3)), whatever word 4 has."""
    task = Task("t", [], [], [], labels=["good", "bad"], words=[3, 1])
    model = Says([[0.0, 1, 2, 3, 9]] * 3)
    batch = collate([example(2, target=3)], 0)
    assert math.isclose(tasks.loss(model, task, batch).item(), math.log(1 + math.exp(-2)), rel_tol=1e-6)
    batch = collate([example(2, target=1)], 0)
    assert math.isclose(tasks.loss(model, task, batch).item(), math.log(1 + math.exp(2)), rel_tol=1e-6)
    both = collate([example(2, target=3), example(2, target=1)], 0)
    assert math.isclose(tasks.loss(model, task, both).item(), math.log(1 + math.exp(2)) - 1, rel_tol=1e-6), "a mean"
    free = Task("t", [], [], [])
    logits = torch.tensor([[0.0, 1, 2, 3, 9]])
    assert torch.isclose(tasks.loss(model, free, batch), F.cross_entropy(logits, torch.tensor([1])))
    first = collate([example(2, target=0)], 0)
    assert torch.isclose(tasks.loss(model, free, first), F.cross_entropy(logits, torch.tensor([0]))), "0 is a target"


@pytest.mark.points(1, "tasks")
def test_only_windows_of_sixteen_batches_are_sorted_by_length():
    """64 texts in batches of 2: a batch holds neighbours of one half of the drawn order, never of both."""
    texts = [example(1 + i % 7) for i in range(64)]
    drawn = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    halves = set(drawn[:32]), set(drawn[32:])
    found = [group for group, *_ in batches(texts, 2, 0, torch.Generator().manual_seed(0))]
    assert all(set(group) <= halves[0] or set(group) <= halves[1] for group in found), "a window is sixteen batches"


@pytest.mark.points(1, "tasks")
def test_the_dev_score_is_over_examples_and_not_over_batches():
    """Three short texts answered right, one long one wrong, in batches of three and one: 75, not 50."""
    model = Says([[0.0, 0, 0, 0, 0], [0.0, 5, 0, 0, 0], [0.0, 0, 0, 5, 0]])
    rows = [example(1, 1), example(1, 1), example(1, 1), example(2, 1)]
    assert tasks.dev_score(model, Task("t", [], [], [], labels=["a", "b"], words=[1, 3]), rows, 0, batch_size=3) == 75


@pytest.mark.points(1, "tasks")
def test_the_probability_of_a_word_is_a_mean_over_words_and_not_over_examples():
    """A text of one word and one of two, in a batch each: the three words count alike, in nats."""
    model = Says([[0.0, 0, 0, 0, 0], [0.0, 5, 0, 0, 0], [0.0, 0, 0, 5, 0]])
    rows = [example(1, 1), Example([1, 2], [3, 1], "", [])]
    right = 5 - math.log(4 + math.exp(5))  # nats of the word that has the logit 5, and of another
    wrong = right - 5
    found = tasks.dev_score(model, Task("t", [], [], [], metric=""), rows, 0, batch_size=1)
    assert math.isclose(found, 100 * math.exp((right + right + wrong) / 3), rel_tol=1e-6)


@pytest.mark.points(2, "tasks")
def test_a_class_is_read_off_the_state_at_its_place_whatever_is_padded():
    """A GPT's at the last token of the text, a BERT's at [CLS]; the oracle reads each text alone and by hand."""
    for tokenizer, config in ((PLAIN, Config(1024, 16, 12, 2, 3, 20)), (WORLD, Config(1024, 16, 12, 2, 3, 20, False))):
        model, encoder = stirred(config), Encoder(tokenizer, config)
        model.classify(3)
        rows = [encoder.classified(text, ["x"], 2) for text in ("the soup", TEXT + " " + TEXT, "we")]
        logits, wanted = tasks.answer(model, Task("t", [], [], [], labels=list("abx")), *collate(rows, pad=7))
        head, model.head = model.head, torch.nn.Identity()
        for row, found in zip(rows, logits):
            state = model(torch.tensor([row.ids]))[0, -1 if config.causal else 0]
            pooled = state if config.causal else torch.tanh(head.new_pooler.dense(state))
            torch.testing.assert_close(found, head.out.weight @ pooled + head.out.bias, rtol=0, atol=1e-8)
        assert wanted.tolist() == [2, 2, 2]


@pytest.mark.points(1, "tasks")
def test_predictions_come_back_in_the_order_of_the_examples():
    model = Says([[0.0] * 5, [0.0, 5, 0, 0, 0], [0.0, 0, 0, 5, 0]])
    task = Task("t", [], [], [], labels=["good", "bad"], words=[3, 1])
    rows = [example(2), example(1), example(2), example(1)]
    found = tasks.predictions(model, task, rows, PLAIN, batch_size=3)
    assert found == ["good", "bad", "good", "bad"], "label words have the order of their labels"


@pytest.mark.points(1, "tasks")
def test_a_written_answer_may_be_twice_as_long_as_the_longest_reference():
    """Behind `1 2` Counts writes 3 4 5 ...: references of one and of three tokens allow six, the model's end fewer."""
    rows = [Example([1, 2], [N, 9], "", [""]), Example([1, 2, 30, 31], [N, 30, 31, 9], "", [""])]

    def written(n_ctx, stop, rows=rows):
        model = Counts(n_ctx)
        return tasks.predictions(model, Task("t", [], [], [], metric="overlap", stop=stop), rows, tokenizer=model)
    assert written(16, stop=40) == ["3 4 5 6 7 8"] * 2
    assert written(16, stop=40, rows=rows[:1]) == ["3 4"]
    assert written(6, stop=40) == ["3 4 5 6"] * 2, "as far as the model reads"
    assert written(2, stop=40) == ["3"] * 2, "one word, even where the prompt fills it"
    assert written(16, stop=6) == ["3 4 5"] * 2, "up to the end-of-text token"
    assert tasks.upto([4, 6, 5, 6], 6) == [4] and tasks.upto([4, 5], 6) == [4, 5]


def test_the_majority_is_training_s_and_its_score_the_test_s():
    train = [example(1, label=label) for label in ("a", "a", "b")]
    test = [example(1, label=label) for label in ("a", "b", "b", "b")]
    assert Task("t", train, train, test, labels=["a", "b"]).majority == 25
    assert Task("t", train, test[:2], [], labels=["a", "b"]).majority == 50


def test_f1_by_hand():
    assert tasks.f1("abcd", "bcx") == 2 * 2 / (4 + 3)
    assert tasks.f1("ab", "ab") == 1 and tasks.f1("ab", "cd") == 0 and tasks.f1("", "") == 0
    assert tasks.f1("a", "aaaa") == 2 * 1 / (1 + 4) and tasks.f1("aab", "aab") == 1


def test_scores_by_hand():
    rows = [example(1, label="good"), example(1, label="bad")]
    assert tasks.score(Task("t", [], [], []), rows, ["good", "good"]) == 50
    rows = [Example([], [], "p", ["the red fox", "A red Dog"])]
    assert tasks.score(Task("t", [], [], [], metric="overlap"), rows, ["a red dog"]) == 100
    assert tasks.score(Task("t", [], [], [], metric="overlap"), rows, ["red"]) == 50
    listing = "name golden fork ; food thai ; price low ; area river ; children yes ."
    right = world.completion(world.attributes(listing))
    rows = [Example([], [], listing, [right])]
    task = Task("t", [], [], [], metric="attributes")
    assert tasks.score(task, rows, [right]) == 100
    assert tasks.score(task, rows, ["the golden fork serves greek food"]) == pytest.approx(100 * 2 * 1 / (5 + 2))
    e2e = [Example([], [], "name[Aromi], food[Indian]", ["x"])]
    assert tasks.score(task, e2e, ["Aromi is a place ."]) == pytest.approx(100 * 2 * 1 / (2 + 1))
