"""`eval.py prompts` and `lowdata`: words put in front of a text, the search for them, and few examples by seed."""

import pytest
import torch

import pretend
from data.tasks import Example, Task, only
from harness.settings import settings_of
from lab import lowdata, prompts
from lab.prompts import gradient, in_front, mean_loss, search
from model import Refused
from tiny import BERT, GPT, both, stirred


def question(*ids, label=5):
    """A text whose label word, 5 or 6, is the next one."""
    return Example(list(ids), only(label, len(ids) - 1, len(ids)), "", [{5: "a", 6: "b"}[label]])


QUESTIONS = [question(3, 1, 4), question(1, 5, 9, 2, label=6), question(6, 5)]
TASK = Task("tiny", QUESTIONS, [], [], labels=["a", "b"], words=[5, 6])


def nats(model, words):
    """The slow loop: the mean over the questions, each read alone behind `words`."""
    found, start = [], 0 if model.config.causal else 1
    for example in QUESTIONS:
        ids = example.ids[:start] + words + example.ids[start:]
        logits = model(torch.tensor([ids]))[0, -1, [5, 6]]
        found.append(-logits.log_softmax(dim=0)[["a", "b"].index(example.answers[0])].item())
    return sum(found) / len(found)


# ---- words in front ----

def test_words_stand_before_a_gpts_text_and_behind_berts_cls():
    made = question(3, 1, 4)
    assert in_front(made, [8, 9], GPT).ids == [8, 9, 3, 1, 4]
    assert in_front(made, [8, 9], BERT).ids == [3, 8, 9, 1, 4]
    assert in_front(made, [8, 9], GPT).targets == [-100, -100, -100, -100, 5]
    assert in_front(Example([3, 1], [7, -100], "", []), [8], BERT).targets == [7, -100, -100], "[CLS] keeps its class"


def test_the_loss_is_a_mean_over_examples_and_not_over_batches():
    """65 examples in batches of 64 and 1."""
    model = stirred(GPT)
    examples = [question(1, 5, 9, 2, label=6)] + 64 * [question(6, 5)]
    losses = [mean_loss(model, TASK, [e], [8], 0) for e in examples[:2]]
    assert mean_loss(model, TASK, examples, [8], 0) == pytest.approx((losses[0] + 64 * losses[1]) / 65, abs=1e-6)
    assert mean_loss(model, TASK, QUESTIONS, [8, 2], 0) == pytest.approx(nats(model, [8, 2]), abs=1e-6)


# ---- the search ----

def test_each_place_takes_the_best_word_and_the_best_length_is_what_remains():
    """With 400 candidates all of the 17 words are tried; the oracle tries them one after another.

    Here two words are worse than one, three are the best, and a fourth does harm again.
    """
    model = stirred(GPT)
    words, found = [], {(): nats(model, [])}
    for _ in range(4):
        words = words + [min(range(17), key=lambda word: nats(model, words + [word]))]
        found[tuple(words)] = nats(model, words)
    assert list(found.values()) == pytest.approx([1.47, 0.73, 1.33, 0.47, 1.06], abs=0.005)
    assert search(model, TASK, 0, length=4, candidates=400, seed=0) == words[:3]


@both
@torch.no_grad()
def test_the_gradient_is_the_slope_of_the_loss_at_the_embedding_of_the_last_word(config):
    """Word 16 stands in no text and is no label: moving its row of the table moves the loss at that place alone.

    To single precision, in which every loss is.
    """
    model, h, slopes = stirred(config), 1e-5, []
    tokens = model.tokens
    for i in range(config.d_model):
        tokens.weight[16, i] += h
        higher = nats(model, [8, 16])
        tokens.weight[16, i] -= 2 * h
        slopes.append((higher - nats(model, [8, 16])) / (2 * h))
        tokens.weight[16, i] += h
    with torch.enable_grad():
        found = gradient(model, TASK, QUESTIONS, [8, 16], 0)
    assert found.tolist() == pytest.approx(slopes, abs=1e-6) and max(map(abs, slopes)) > 0.01
    assert model.tokens is tokens, "the model is as it was"


def test_the_words_with_the_lowest_estimates_are_tried(monkeypatch):
    """The estimate of a word is E g, to a constant; the seed draws where the gradient is taken."""
    model, tried = stirred(GPT), []
    monkeypatch.setattr(prompts, "mean_loss", lambda model, task, examples, words, pad: tried.append(words) or 0.0)
    search(model, TASK, 0, length=1, candidates=3, seed=4)
    start = torch.randperm(17, generator=torch.Generator().manual_seed(4))[0].item()
    slope = gradient(model, TASK, QUESTIONS, [start], 0)
    estimates = [sum(e * g for e, g in zip(model.tokens.weight[word].tolist(), slope.tolist())) for word in range(17)]
    assert tried == [[]] + [[word] for word in sorted(range(17), key=estimates.__getitem__)[:3]]


def test_no_word_at_all_is_found_where_every_word_does_harm(monkeypatch):
    monkeypatch.setattr(prompts, "mean_loss", lambda model, task, examples, words, pad: 1.0 + len(words))
    assert search(stirred(GPT), TASK, 0, length=3, candidates=2, seed=0) == []


# ---- the three stages ----

def test_the_three_stages_have_the_same_number_of_words_and_the_same_test(monkeypatch, tmp_path, few_examples, capsys):
    """The words found stand in front of test too; here they are given, and the oracle scores them one by one."""
    ran = pretend.training(monkeypatch, lambda s: (0.0, 70.0 + s.seed))
    found = []
    monkeypatch.setattr(prompts, "search", lambda model, task, pad, length, candidates, seed, *_: found.append(
        (length, candidates, seed)) or [300 + seed] * length)
    line = "--base gpt-xs --task sentiment --examples 4 --length 3 --candidates 2 --seeds 2 --device cpu --out"
    for _ in range(2):
        prompts.main([*line.split(), str(tmp_path)])
        assert found == [(3, 2, 0), (3, 2, 1)], "each is searched once"
    assert [(s.delta.length, s.seed, s.examples) for s in ran] == [(3, 0, 4), (3, 1, 4)]

    made = settings_of("full", base="gpt-xs", task="sentiment", examples=4, device="cpu")
    model, tokenizer, task = prompts.train.prepare(made)
    task, right = prompts.behind(made, model, tokenizer, 3), []
    for seed in range(2):
        logits = [model(torch.tensor([[300 + seed] * 3 + e.ids]))[0, -1, task.words] for e in task.test]
        answers = [task.labels[one.argmax()] for one in logits]
        right.append(100 * sum(a == e.answers[0] for a, e in zip(answers, task.test)) / len(task.test))
    shown = capsys.readouterr().out.splitlines()
    mean, spread = sum(right) / 2, abs(right[0] - right[1]) / 2**0.5
    assert shown[-5:] == [f"manual {40:14.1f}", f"discrete      {mean:7.1f}{spread:7.1f}",
                          f"continuous    {70.5:7.1f}{0.5**0.5:7.1f}",
                          *(f"   seed {seed} found: {tokenizer.decode([300 + seed] * 3)!r}" for seed in range(2))]

    for words, new in (("--candidates 5", (3, 5, 0)), ("--length 2", (2, 2, 0)), ("--task claim", (3, 2, 0))):
        option, value = words.split()
        other = dict(zip(line.split()[::2], [*line.split()[1::2], str(tmp_path)])) | {"--seeds": "1", option: value}
        prompts.main([word for pair in other.items() for word in pair])
        assert found.pop() == new and len(found) == 2, "another search"


# ---- few examples ----

def test_few_examples_are_compared_seed_by_seed():
    """The seeds differ by 20 points, the two methods by 2 in every seed: paired, the interval is zero."""
    prefix, full = [pretend.record(0, 52), pretend.record(0, 72)], [pretend.record(0, 50), pretend.record(0, 70)]
    assert lowdata.difference(prefix, full) == (2.0, 0.0)


def test_lowdata_writes_descriptions_at_the_best_rate_of_every_size(monkeypatch, tmp_path, capsys):
    """Prefix: the higher the rate, the better on dev; on test it is 3 points ahead of full, seed 1 two of seed 0."""
    def score(s):
        prefix = s.delta.name == "prefix"
        return (100 * s.lr if prefix else 50.0), (40.0 + s.examples + 2 * s.seed + 3 * prefix)
    ran = pretend.training(monkeypatch, score, metric="attributes")
    lowdata.main(f"--sizes 5,7 --seeds 2 --base gpt-xs --out {tmp_path}".split())
    assert {(s.task, s.steps) for s in ran} == {("describe", 300)} and {s.examples for s in ran} == {5, 7}
    best = max(lowdata.methods()["prefix"].rates)
    assert [s.lr for s in ran if s.delta.name == "prefix" and s.seed == 1] == [best, best]
    found = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in found[-5:-1]] == [
        "examples 5 7", "prefix 49.0 ± 1.4 51.0 ± 1.4", "minus full, 95 % +3.0 +3.0", "full 46.0 ± 1.4 48.0 ± 1.4"]


def test_an_arm_is_a_technique_with_values_of_its_fields(monkeypatch, tmp_path):
    """A rate that is given is not looked for; 9,700 examples are two epochs of 304 steps of 32."""
    ran = pretend.training(monkeypatch, lambda s: (50.0, 60.0))
    monkeypatch.setattr(lowdata.linear_probe, "probe", lambda *given, **choice: pretend.record(50))
    arms = ["bitfit lr=0.5", "lora lr=0.25 rank=2", "lora targets=query,up rank=3"]
    lowdata.main(["--arms", *arms, *f"--sizes 6,9700 --seeds 1 --task rating --out {tmp_path}".split()])
    rates = lowdata.methods()["lora"].rates
    assert [(s.delta.name, getattr(s.delta, "rank", None), s.lr, s.examples, s.steps) for s in ran] == [
        (*one, n, steps) for n, steps in ((6, 300), (9700, 608))
        for one in (("bitfit", None, 0.5), ("lora", 2, 0.25), *(("lora", 3, lr) for lr in rates))]


def test_the_whole_of_a_training_set_is_there_once(monkeypatch, tmp_path, capsys):
    """Above the arms stand two probes of the frozen base; the number in a text of these does not tell its label."""
    for split in ("train", "dev"):
        rows = "".join(f"word {i}\t{'ab'[i % 2]}\n" for i in range(8))
        (tmp_path / f"{split}.tsv").write_text(f"text\tlabel\n{rows}", encoding="utf-8")
    ran = pretend.training(monkeypatch, lambda s: (50.0, 60.0))
    lowdata.main(["--arms", "full lr=1e-3", *f"--sizes 4,8 --data {tmp_path} --out {tmp_path / 'out'}".split()])
    assert [(s.examples, s.seed) for s in ran] == [(4, 0), (4, 1), (4, 2), (8, 0)]
    rows = [line.rsplit("  ", 1)[0].split("  ")[0] for line in capsys.readouterr().out.splitlines()[-5:-1]]
    assert rows == ["examples", "linear probe", "probe of the mean", "full lr=1e-3"]


def test_what_lowdata_cannot_do_is_named_before_anything_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(lowdata, "table", None)
    for line, why in (("--arms prefix magic", "--arms magic: choose from full"),
                      ("--arms prefix=3", "--arms prefix=3: choose from full"),
                      ("--sizes 20,0", "'0' is not a whole number"), ("--sizes 20,", "'' is not a whole number"),
                      ("--sizes 20,20", "--sizes 20,20: 20 is there twice"),
                      ("--base bert-xs", "writing text, which a BERT cannot: choose a GPT base"),
                      ("--base nope", "base 'nope': choose from"), ("--task corpsu", "task 'corpsu': choose from")):
        with pytest.raises(Refused, match=why):
            lowdata.main([*line.split(), "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


# ---- texts as long as the model reads ----

@pytest.fixture
def long_texts(tmp_path):
    """Eight texts of hundreds of words about soup, good or bad, with label words for both."""
    folder = tmp_path / "soups"
    folder.mkdir()
    rows = [f"{f'the soup was {word} ' * 60}\t{label}" for word, label in (("good", "pos"), ("bad", "neg"))] * 4
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    (folder / "template.json").write_text(
        '{"template": "{text} it was [MASK] .", "words": {"pos": "good", "neg": "bad"}}', encoding="utf-8")
    return folder


def test_texts_as_long_as_the_model_reads_lose_as_many_tokens_as_stand_in_front(
        long_texts, tmp_path, monkeypatch, capsys):
    pretend.training(monkeypatch, lambda s: (80.0, 80.0))
    line = f"--base gpt-xs --data {long_texts} --candidates 2 --seeds 1 --out {tmp_path / 'out'} --length"
    prompts.main([*line.split(), "2"])
    printed = capsys.readouterr().out
    assert "16 texts are cut, so that 2 words in front fit" in printed and "\ndiscrete " in printed
    with pytest.raises(Refused, match="--length 49: this model reads 96 tokens in all; choose at most 48"):
        prompts.main([*line.split(), "49"])

    settings = settings_of("full", base="gpt-xs", data=str(long_texts))
    model, tokenizer, task = prompts.train.prepare(settings)
    shorter = prompts.behind(settings, model, tokenizer, 2)
    for whole, cut in zip(task.train, shorter.train):
        assert len(in_front(cut, [8, 9], model.config).ids) == len(whole.ids) == 96
        end = tokenizer.encode(" it was")
        assert cut.ids[-2:] == whole.ids[-2:] == end and cut.ids[1:-2] == whole.ids[1:-4], "the text's end is cut"


@pytest.mark.parametrize("base", ["gpt-xs", "bert-xs"])
def test_words_and_text_are_the_tokens_of_their_joined_string(base):
    """`caring` and `the soup` are `caring the soup`: behind a word the text begins with a space."""
    made = settings_of("full", base=base, task="claim", examples=4, device="cpu")
    model, tokenizer, alone = prompts.train.prepare(made)
    task, words = prompts.behind(made, model, tokenizer, 3), tokenizer.encode(" caring")
    for one, other in zip(task.train, alone.train):
        joined = in_front(one, words, model.config)
        begin, end = (0, None) if model.config.causal else (1, joined.ids.index(tokenizer.mask))
        assert joined.ids[begin:end] == tokenizer.encode(f" caring {one.text}")
        assert one.targets[-3:] == other.targets[-3:] and one.text == other.text


def test_only_tokens_that_their_string_is_read_as_are_candidates(monkeypatch):
    """Two pieces that are one word together are read as that word, half a character as none."""
    _, tokenizer, _ = prompts.train.prepare(settings_of("full", base="gpt-xs", task="claim", examples=4, device="cpu"))
    reads = prompts.Behind(tokenizer).reads
    soup, good = tokenizer.encode(" soup"), tokenizer.encode(" good")
    assert len(soup) == len(good) == 1 and reads(soup) and reads(soup + good)
    assert not reads([200]) and tokenizer.decode([200]) == "\ufffd"
    pieces = tokenizer.encode(tokenizer.decode(good)[:2]), tokenizer.encode(tokenizer.decode(good)[2:])
    assert tokenizer.decode(sum(pieces, [])) == " good" and not reads(sum(pieces, []))
    monkeypatch.setattr(prompts, "mean_loss", lambda model, task, examples, words, pad: -len(words))
    given = {"length": 4, "candidates": 400, "seed": 0}
    assert search(stirred(GPT), TASK, 0, **given, reads=lambda words: words[-1] == 7) == [7] * 4
    assert search(stirred(GPT), TASK, 0, **given, reads=lambda words: False) == []
    model = stirred(GPT)
    model.in_use = [3, 8]
    assert sorted({*search(model, TASK, 0, **given)}) == [3, 8], "tokens that texts are made of, and no others"


def test_only_what_the_lm_head_answers_can_be_prompted(long_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts.train, "run", None)
    (long_texts / "template.json").unlink()
    with pytest.raises(Refused, match="soups: a new Classifier answers here, .* a template.json"):
        prompts.main(["--base", "gpt-xs", "--data", str(long_texts), "--out", str(tmp_path / "out")])
    with pytest.raises(Refused, match="--task corpus: pretraining has no score"):
        prompts.main(["--base", "gpt-xs", "--task", "corpus", "--examples", "9", "--out", str(tmp_path / "out")])
