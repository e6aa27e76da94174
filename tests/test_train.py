"""A run and its one loop: thirty steps by hand, the self-checks, the record, one run of each technique."""

import copy
import gc
import itertools
import json
import math
import re
import time
import weakref

import pytest
import torch
import torch.nn.functional as F

import train
from data import tasks
from data.bases import SHAPES
from data.tasks import Example, Task
from deltas import attach, fingerprint, methods, read, trainable
from harness import checks, report, results
from harness.settings import Settings
from lab.score import rebuild
from methods.bitfit import BitFit
from methods.full import Full
from methods.intrinsic import Intrinsic
from methods.lora import LoRA
from methods.mask import Mask
from methods.prefix import Prefix
from model import Transformer
from tiny import GPT, same, stirred

SMALL = {"base": "gpt-xs", "scratch": True, "examples": 12, "batch_size": 4, "steps": 4, "device": "cpu"}
pytestmark = pytest.mark.usefixtures("few_examples")


def settings(name, **change):
    """A technique at its defaults, but the prefix with its MLP: nothing else trains more than it stores."""
    return Settings(methods()[name](**{"mlp": True} if name == "prefix" else {}), **SMALL | change)


# ---- the loop ----

def test_the_optimizer_holds_the_delta_and_nothing_else(monkeypatch, tmp_path):
    held, models, loss = [], [], tasks.loss

    class Noted(torch.optim.AdamW):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **options)
            held.append([id(p) for group in self.param_groups for p in group["params"]])
    monkeypatch.setattr(torch.optim, "AdamW", Noted)
    monkeypatch.setattr(tasks, "loss", lambda model, *rest: models.append(model) or loss(model, *rest))
    for name in ("lora", "intrinsic"):                 # beside the base's weights, and around the model
        train.run(settings(name, steps=1), tmp_path, report.quiet)
        assert held[-1] == [id(p) for p in trainable(models[-1]).values()], name


def words(shift):
    """Eight texts of three words; the word wanted behind each is `shift` further on."""
    return [Example([i, i + 1, i + 2], [-100, -100, (i + 2 + shift) % 17], "", ["x"]) for i in range(8)]


TASK = Task("words", train=words(1), dev=words(1)[:4] + words(3)[:3], test=words(5)[:2], metric="")


class Traced(torch.optim.AdamW):
    """AdamW that notes the gradients, the rate and the parameters of every step."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.trace = []

    def step(self, *_):
        group, head = self.param_groups
        assert head["params"] == [], "no classifier here"
        gradients = [p.grad.clone() for p in group["params"]]
        super().step()
        self.trace.append((gradients, group["lr"], [p.detach().clone() for p in group["params"]]))


def logits(model, examples):
    """(N, V) behind the last word of each text, and what is wanted there."""
    ids = torch.tensor([e.ids for e in examples])
    return model(ids)[:, -1].float(), torch.tensor([e.targets[-1] for e in examples])


def probability(model, examples):
    """The typical probability of the right word, in percent."""
    with torch.no_grad():
        return 100 * math.exp(-F.cross_entropy(*logits(model, examples)).item())


def by_hand(model, lr, seed):
    """The loop for 30 steps of 3 of TASK's examples, without an optimizer, a schedule or a stream.

    For each step: (batch, gradients, norm before clipping, rate, parameters, scores on dev, train and test).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    generator, waiting = torch.Generator().manual_seed(seed), []
    for step in range(1, 31):
        if not waiting:                                # an epoch: 8 texts in 3 batches, in an order of their own
            drawn = torch.randperm(8, generator=generator).tolist()
            waiting = [[drawn[:3], drawn[3:6], drawn[6:]][i] for i in torch.randperm(3, generator=generator)]
        batch = [TASK.train[i] for i in waiting.pop(0)]
        gradients = torch.autograd.grad(F.cross_entropy(*logits(model, batch)), parameters)
        norm = sum((g ** 2).sum() for g in gradients).sqrt().item()
        clip = min(1.0, 1 / (norm + 1e-6))
        rate = lr * min(step / 2, (31 - step) / 28)    # 6 % of 30 are 2 steps of warm-up; the other 28 go down
        with torch.no_grad():
            for p, g, mean, square in zip(parameters, gradients, m, v):
                mean += 0.1 * (clip * g - mean)
                square += 0.001 * ((clip * g) ** 2 - square)
                p -= rate * (mean / (1 - 0.9 ** step)) / ((square / (1 - 0.999 ** step)).sqrt() + 1e-8)
        scores = [probability(model, split) for split in (TASK.dev, TASK.train, TASK.test)]
        yield [e.ids for e in batch], gradients, norm, rate, [p.detach().clone() for p in parameters], scores


@pytest.mark.points(4, "train")
def test_the_loop_by_hand(monkeypatch):
    """Thirty steps, exactly: batch, gradient, clipping, learning rate, Adam, dev, and what remains at the end."""
    model = stirred(GPT, LoRA(rank=2, alpha=4.0))
    expected = list(by_hand(copy.deepcopy(model), lr=0.2, seed=3))
    frozen = {name: p.clone() for name, p in checks.frozen(model).items()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)                    # whoever came before has left this
    batches, optimizers, loss = [], [], tasks.loss
    monkeypatch.setattr(tasks, "loss", lambda model, task, batch: batches.append(batch) or loss(model, task, batch))
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **options: optimizers.append(
        Traced(*args, **options)) or optimizers[0])
    clock = itertools.count(step=0.25)                 # seconds; it is read before and after each step
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    curve, ms = train.train(model, TASK, 0, settings("lora", steps=30, batch_size=3, lr=0.2, seed=3), report.quiet)

    (optimizer,) = optimizers
    names = list(trainable(model))
    for step, (batch, mine, trace) in enumerate(zip(batches, expected, optimizer.trace, strict=True), 1):
        ids, gradients, norm, rate, parameters, _ = mine
        assert batch[0].tolist() == ids, f"step {step}: the batch, every text once an epoch"
        clipped = sum((g ** 2).sum() for g in trace[0]).sqrt()
        for name, found, right in zip(names, trace[0], gradients, strict=True):
            same(found / clipped, right / norm, f"step {step}, {name}: the gradient of this batch alone, clipped")
        assert clipped.item() == pytest.approx(min(1, norm), abs=1e-5), f"step {step}: the norm of all is clipped at 1"
        assert trace[1] == pytest.approx(rate, abs=1e-12), f"step {step}: the rate, 2 steps up and 28 down"
        for name, found, right in zip(names, trace[2], parameters, strict=True):
            same(found, right, f"step {step}, {name}: Adam, without weight decay")

    scores = {step: expected[step - 1][5] for step in range(2, 31, 2)}                 # 15 evaluations
    assert [step for step, _ in curve] == list(scores), "dev is scored at fifteen steps, the last among them"
    assert [s for _, s in curve] == pytest.approx([dev for dev, _, _ in scores.values()], abs=1e-3), "it is dev"
    best_on_dev, *others = (max(scores, key=lambda step: scores[step][split]) for split in range(3))
    assert best_on_dev == 24 and others == [30, 8], "else the next line would prove nothing"
    for name, p in trainable(model).items():
        same(p.detach(), dict(zip(names, expected[23][4]))[name], f"{name}: what did best on dev remains")
    assert all(torch.equal(p, frozen[name]) for name, p in checks.frozen(model).items()), "the base is not trained"
    norms = [norm for _, _, norm, *_ in expected]
    assert min(norms) < 1 < max(norms), "some gradients are clipped and some are not"
    assert ms == 250, "milliseconds of a step"


def toy(monkeypatch, steps, scores):
    """(curve, dev's copies of the delta, the delta at the end) of a run whose dev scores are given."""
    model, seen = stirred(GPT, LoRA(rank=2)), []

    def dev_score(model, *_):
        seen.append({name: p.detach().clone() for name, p in trainable(model).items()})
        return scores[len(seen) - 1]
    monkeypatch.setattr(tasks, "dev_score", dev_score)
    curve, _ = train.train(model, TASK, 0, settings("lora", steps=steps), report.quiet)
    return curve, seen, trainable(model)


@pytest.mark.points(1, "train")
def test_of_equal_dev_scores_the_first_counts(monkeypatch):
    curve, seen, left = toy(monkeypatch, 5, [1, 7, 3, 7, 2])
    assert curve == [(1, 1), (2, 7), (3, 3), (4, 7), (5, 2)]
    assert all(torch.equal(p, seen[1][name]) and not torch.equal(p, seen[3][name]) for name, p in left.items())


@pytest.mark.points(1, "train")
def test_a_single_step_has_the_whole_learning_rate(monkeypatch):
    """Adam's first step is lr for every value with a gradient."""
    before = stirred(GPT, LoRA(rank=2))
    curve, _, left = toy(monkeypatch, 1, [5])
    moved = (left["blocks.1.attention.value.B"] - trainable(before)["blocks.1.attention.value.B"]).abs()
    assert curve == [(1, 5)] and moved.max().item() == pytest.approx(LoRA.lr, rel=1e-3)


@pytest.mark.points(1, "train")
def test_a_new_classifier_has_a_rate_of_its_own():
    """One step of two labels; Adam's first step is the rate itself: 0.01 for LoRA's B, 0.25 for the classifier."""
    model = stirred(GPT, LoRA(rank=2), classes=2)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    said = [Example([3, i], [-100, i % 2], "", [str(i % 2)]) for i in (1, 4)]
    task = Task("two", said, said, [], labels=["0", "1"])
    train.train(model, task, 0, settings("lora", steps=1, lr=0.01, head_lr=0.25), report.quiet)
    moved = {name: (p - before[name]).abs().max().item() for name, p in trainable(model).items()}
    assert moved["head.out.bias"] == pytest.approx(0.25, rel=1e-3)
    assert moved["blocks.0.attention.value.B"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.points(1, "train")
def test_a_step_that_is_not_finite_ends_the_run_with_the_next_logits(monkeypatch):
    loss, losses = tasks.loss, iter([1.0, 1.0, math.nan, 1.0])
    monkeypatch.setattr(tasks, "loss", lambda *args: loss(*args) * next(losses))
    with pytest.raises(train.Diverged, match=r"NaN or infinite at step 4: lower --lr \(it is 0.01\)"):
        toy(monkeypatch, 5, [1] * 5)


# ---- the self-check ----

def test_the_check_of_step_0_stops_a_delta_that_changes_the_model():
    said, base = [], Transformer(GPT)
    check = checks.Check(base, TASK, 0, said.append)
    model = attach(LoRA(), base)
    check.start(model)
    assert said == ["check      step 0: the frozen base's logits are identical bit for bit"]
    with torch.no_grad():
        trainable(model)["blocks.1.attention.value.B"] += 1e-3
    with pytest.raises(AssertionError, match=r"a new lora moves the logits by up to \d.*; it must not"):
        check.start(model)

    base = Transformer(GPT)
    check = checks.Check(base, TASK, 0, said.append)
    check.start(attach(methods()["prompt"](), base))
    assert re.search(r"moved by up to \d\S*: soft tokens are seen at once", said[-1])


def test_the_check_at_the_end_stops_a_frozen_tensor_that_moved_and_explains_what_has_not(tmp_path):
    said, base = [], Transformer(GPT)
    check = checks.Check(base, TASK, 0, said.append)
    model = attach(BitFit(), base)
    check.before_training(model, tmp_path)
    delta = trainable(model)
    still = dict.fromkeys(("final_norm.bias", "blocks.0.mlp.up.bias", "blocks.1.mlp.up.bias"))
    delta["blocks.0.mlp.up.bias"].grad = torch.zeros(20)
    delta["blocks.1.mlp.up.bias"].grad = torch.ones(20)
    with torch.no_grad():
        for name, p in delta.items():
            p += name not in still
    check.end(model)
    frozen = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in delta.values())
    assert said[0] == f"check      frozen: {frozen:,} parameters are bit-identical"
    assert said[1].splitlines() == [
        f"check      delta: {len(delta) - 3} of {len(delta)} tensors have moved",
        "           blocks.0.mlp.up.bias has not: its gradient is zero",
        "           blocks.1.mlp.up.bias has not: no step on the way did better on dev than where it started",
        "           final_norm.bias has not: it is not on the way from the text to this task's logits"]
    assert "2 of them are key biases" in said[2]
    with torch.no_grad():
        model.positions.weight[3, 4] += 1e-6
    with pytest.raises(AssertionError, match="a frozen tensor has changed"):
        check.end(model)


def test_a_run_is_stopped_by_each_of_its_checks_and_saves_nothing(monkeypatch, tmp_path):
    loop, attached = train.train, LoRA.attach

    def careless(model, *rest):
        found = loop(model, *rest)
        model.tokens.weight.data[3, 4] += 1e-6
        return found

    def eager(self, model):
        model = attached(self, model)
        model.blocks[1].attention.value.B.data += 1e-3
        return model

    for owner, name, broken, method, why in (
            (LoRA, "attach", eager, "lora", "a new lora moves the logits"),
            (train, "train", careless, "lora", "a frozen tensor has changed"),
            (BitFit, "formula", lambda *_: 7, "bitfit", r"\d+ parameters require a gradient, but the formula gives 7"),
            (Prefix, "finish", lambda *_: None, "prefix", r"\d+ parameters are left, but the formula gives 1536")):
        with monkeypatch.context() as patch, pytest.raises(AssertionError, match=why):
            patch.setattr(owner, name, broken)
            train.run(settings(method), tmp_path, report.quiet)
        assert not list(tmp_path.iterdir()), why


# ---- a run ----

def test_a_prompt_starts_from_the_tasks_label_words_unless_its_own_are_given(monkeypatch, tmp_path):
    started, loop = [], train.train
    monkeypatch.setattr(train, "train", lambda model, task, *rest: started.append(
        (model.prompt.vectors.detach().clone(), model.tokens.weight, task.words)) or loop(model, task, *rest))
    for words in ("", "5,6,7,8"):
        made = Settings(methods()["prompt"](init="labels", words=words, length=4), **SMALL)
        record = train.run(made, tmp_path, report.quiet)
        vectors, table, labels = started.pop()
        assert torch.equal(vectors, table[[5, 6, 7, 8] if words else labels]), words
        assert record["settings"]["words"] == words, "what was given"


def test_a_run_leaves_its_settings_as_they_were(tmp_path):
    given, same_again = (settings("bitfit", steps=None, epochs=0.5) for _ in range(2))
    record = train.run(given, tmp_path, report.quiet)
    assert given == same_again and record["steps"] == 2, "half of 12 examples, 4 in a step"
    assert (record["settings"]["steps"], record["settings"]["epochs"]) == (None, 0.5)
    assert record["settings"] | {"content": record["content"]} == given.key and record["file"] == given.file


def test_memory_is_counted_by_kind():
    rows = [Example([1, 2, 3], [-100, -100, 3], "", ["x"])] * 4
    task, MB, found = Task("t", rows, rows, [], metric=""), 2 ** 20, {}
    for name in ("full", "last_layer", "bitfit"):
        model = attach(methods()[name](), Transformer(GPT))
        found[name] = checks.memory_of_a_step(model, task, 0, settings(name))
        trained, weights = (4 * sum(p.numel() for p in ps) for ps in (trainable(model).values(), model.parameters()))
        parts = [found[name][part] for part in ("weights", "gradients", "optimizer", "activations")]
        assert parts[:3] == pytest.approx([weights / MB, trained / MB, 2 * trained / MB]), name
        assert found[name]["peak"] == pytest.approx(sum(parts)) and parts[3] > 0, name
        assert all(p.grad is None for p in model.parameters()), "counted, not trained"
    kept = {name: parts["activations"] for name, parts in found.items()}
    assert kept["last_layer"] < kept["bitfit"] <= kept["full"]
    half = checks.memory_of_a_step(model, task, 0, settings("bitfit", batch_size=2))["activations"]
    assert kept["bitfit"] == pytest.approx(2 * half, rel=0.02), "activations belong to texts, weights are none"


def test_what_was_counted_is_freed_with_the_model():
    """A long comparison holds one model at a time: no graph is left that keeps the last one's weights."""
    rows = [Example([1, 2, 3], [-100, -100, 3], "", ["x"])] * 4
    model = attach(methods()["full"](), Transformer(GPT))
    checks.memory_of_a_step(model, Task("t", rows, rows, [], metric=""), 0, settings("full"))
    weight = weakref.ref(model.tokens.weight)
    del model
    gc.collect()
    assert weight() is None, "freed"


def test_in_a_wrapper_projection_theta_and_the_gradient_of_theta_are_counted():
    """The model has D = 2788 weights, 1920 of them in the matrices of its two blocks."""
    rows = [Example([1, 2, 3], [-100, -100, 3], "", ["x"])] * 4
    task, found = Task("t", rows, rows, [], metric=""), []
    for delta in (Full(), Intrinsic(dim=16), Mask(k=16, by="random")):
        parts = checks.memory_of_a_step(attach(delta, Transformer(GPT)), task, 0, settings("full"))
        found.append({part: round(size * 2 ** 20) for part, size in parts.items()})
    full, intrinsic, mask = found
    assert (full["weights"], full["gradients"], full["optimizer"]) == (4 * 2788, 4 * 2788, 8 * 2788)
    assert intrinsic["weights"] == 4 * (2788 + 16) + 175 * 16 * 6, "175 blocks of 16 signs, places and Gaussians"
    assert mask["weights"] == 4 * (2788 + 16) + 16 * 4, "and 16 places"
    for one in (intrinsic, mask):
        assert (one["gradients"], one["optimizer"]) == (4 * (2788 + 16), 8 * 16), "theta's gradient and z's"
        assert one["activations"] > full["activations"] + 4 * 1920, "theta itself is kept for the backward pass"


def test_a_share_of_nothing_is_none():
    for score, full, share in ((30.0, 60.0, 0.5), (5.0, 0.0, None)):
        assert report.share({"score": score}, {"score": full}) == {"full_score": full, "relative": share}


# ---- one run of each technique ----

@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """{method: (record, what was said, folder)} of one short run of each."""
    patch, found = pytest.MonkeyPatch(), {}
    patch.setattr(tasks, "SIZES", {"dev": 10, "test": 14})
    for name in methods():
        said, out = [], tmp_path_factory.mktemp(name)
        found[name] = train.run(settings(name), out, said.append), "\n".join(said), out
    patch.undo()
    return found


def test_a_record_has_just_the_documented_fields(ran):
    listed = [word for line in results.__doc__.splitlines()[2:] if re.match(r"    \w", line)
              for word in line.strip().split("   ")[0].split()]
    for name, (record, _, out) in ran.items():
        assert sorted(record) == sorted(listed), name
        assert json.loads(json.dumps(record)).keys() == record.keys()
        assert (record["method"], record["base"], record["task"], record["steps"]) == (name, "gpt-xs", "rating", 4)
        assert record["lr"] == settings(name).delta.lr and record["settings"] == settings(name).plain
        assert record["stored_bytes"] == (out / record["file"]).stat().st_size
        assert record["peak_mb"] == record["memory_mb"]["peak"] and record["ms_per_step"] > 0
        done = record["score"] if name == "full" else None
        assert (record["full_score"], record["relative"]) == (done, None if done is None else 1.0), name


def test_a_run_counts_what_is_trained_and_what_is_stored(ran):
    for name, (record, said, _) in ran.items():
        kind, shape = settings(name).delta, SHAPES["gpt-xs"]
        stored, trained = kind.formula(shape), kind.training_formula(shape)
        assert (record["delta_params"], record["trained_params"], record["head_params"]) == (stored, trained, 0), name
        assert record["base_params"] == ran["full"][0]["delta_params"]
        assert record["delta_percent"] == 100 * stored / record["base_params"]
        assert f"formula {trained:,}: agrees" in said and f"method     {kind}, 4 steps of 4 at lr" in said
        assert (f"of the delta {stored:,} " in said) == (stored != trained) == (name == "prefix")


def test_a_run_scores_the_frozen_base_the_majority_and_what_it_saves(ran):
    """Example by example: the label word behind the text with the largest logit."""
    for name, (record, _, out) in ran.items():
        torch.manual_seed(0)
        frozen, _, task = train.prepare(settings(name))
        model, _, _ = rebuild(out / record["file"])
        answers = [e.answers[0] for e in task.train]
        most = max(task.labels, key=answers.count)
        right = {"frozen": 0, "delta": 0, "most": sum(e.answers[0] == most for e in task.test)}
        for side, each in (("frozen", frozen), ("delta", model)):
            for e in task.test:
                row = each(torch.tensor([e.ids], device=next(each.parameters()).device))[0, -1][task.words]
                right[side] += task.labels[row.argmax()] == e.answers[0]
        assert record["frozen_score"] == 100 * right["frozen"] / 14, name
        assert record["score"] == 100 * right["delta"] / 14 == read(out / record["file"])["notes"]["score"], name
        assert record["majority_score"] == 100 * right["most"] / 14
        assert record["dev_score"] == max(score for _, score in record["curve"])
        assert tasks.dev_score(model, task, task.dev, 0) == record["dev_score"], f"{name}: the best on dev is saved"


def test_equal_settings_give_equal_numbers_and_another_seed_others(ran, tmp_path):
    def numbers(record):
        return {k: v for k, v in record.items() if k not in ("seconds", "ms_per_step")}

    def tensors(record, out):
        return fingerprint(read(out / record["file"])["tensors"])

    for name in ("lora", "prefix"):
        first, _, out = ran[name]
        torch.manual_seed(99)                          # whatever happened before
        again, other = (train.run(settings(name, seed=seed), tmp_path, report.quiet) for seed in (0, 1))
        assert numbers(again) == numbers(first) and tensors(again, tmp_path) == tensors(first, out), name
        assert tensors(other, tmp_path) != tensors(again, tmp_path), name


def test_other_precisions_bases_and_tasks_run_too(tmp_path):
    for name, change, metric in (
            ("bitfit", {"dtype": "bfloat16"}, "accuracy"),
            ("lora", {"dtype": "bfloat16", "base": "bert-xs"}, "accuracy"),
            ("adapter", {"base": "bert-xs"}, "accuracy"),
            ("bitfit", {"task": "describe", "steps": 1}, "attributes"),
            ("full", {"task": "corpus", "steps": 2}, "probability")):
        record = train.run(settings(name, **change), tmp_path, report.quiet)
        assert record["metric"] == metric, (name, change)


def test_what_is_frozen_is_stored_in_bfloat16_and_what_trains_in_float32():
    model = attach(LoRA(), Transformer(GPT))
    weights = {id(p): name for name, p in model.named_parameters()}
    train.to_precision(model, "bfloat16")
    norms = {id(p) for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
    for p in model.parameters():
        kept = p.requires_grad or id(p) in norms
        assert p.dtype == (torch.float32 if kept else torch.bfloat16), weights[id(p)]


def test_ones_own_labels_train_a_classifier_beside_the_delta(tmp_path):
    for split in ("train", "dev"):
        rows = [f"{split} {i} {'soup' if i % 2 else 'fish'}\t{i % 2}" for i in range(8)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    for name, base in (("full", "bert-xs"), ("bitfit", "bert-xs"), ("lora", "gpt-xs")):
        record = train.run(settings(name, data=str(tmp_path), examples=8, base=base), tmp_path / "out", report.quiet)
        width = SHAPES[base].d_model
        assert record["task"] == tmp_path.name
        assert record["head_params"] == 2 * width + 2 + (width ** 2 + width if base == "bert-xs" else 0)
        results.append(tmp_path / "out", record)       # it says where the data is
        model, tokenizer, task = rebuild(tmp_path / "out" / record["file"])
        assert tasks.score(task, task.dev, tasks.predictions(model, task, task.dev, tokenizer)) == record["score"]
