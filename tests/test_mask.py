"""Worked examples for the mask: a few single weights of a model, chosen by a score, trained and nothing else."""

import copy

import pytest
import torch
import torch.nn.functional as F

import deltas
from data import tasks
from data.tasks import Example, Task
from deltas import attach, count, kept, load, merge, own_parameters, save, trainable
from harness import report
from lab.sizes import attached
from methods.mask import Mask, fisher
from tiny import BERT, GPT, IDS, both, same, stirred

# The second has a gradient that partly undoes the first one's.
TASK = Task("words", [Example([3, 1, 4], [-100, -100, 2], "", ["x"]), Example([3, 1, 4], [-100, -100, 3], "", ["x"]),
                      Example([9, 2], [-100, 1], "", ["x"])], dev=[], test=[])


def base(config=GPT, classes=0):
    return stirred(config, classes=classes)


def flat(model):
    return torch.cat([p.detach().flatten() for p in own_parameters(model).values()])


def masked(config=GPT, classes=0, **fields):
    """A base in float64 with a mask whose z is no longer zero: 0.1, 0.2, ..."""
    model = attach(Mask(**fields).for_task(TASK), base(config, classes)).double()
    with torch.no_grad():
        model.z += 0.1 * torch.arange(1, len(model.z) + 1)
    return model


# ---- theta_0 + S z ----

@both
def test_z_is_added_to_the_weights_at_its_places_and_a_tied_one_moves_in_both(config):
    """Counted through by hand: all tensors end to end, the tied embedding once."""
    model, plain = masked(config, k=90, by="random"), base(config)
    with torch.no_grad():
        for z, place in zip(model.z, model.project.places.tolist(), strict=True):
            for p in plain.parameters():                           # a tied one stands here once
                if place < p.numel():
                    p.view(-1)[place] += z
                    break
                place -= p.numel()
    tied = plain.tokens.weight
    assert tied is plain.head.decoder.weight and (tied != base(config).tokens.weight).any(), "some places are in it"
    same(model(IDS), plain(IDS), "theta_0 + S z")
    same(flat(merge(model)), flat(plain), "merged, it is in the weights")


def test_only_k_weights_move_and_the_gradient_of_z_is_theirs():
    model, plain = masked(k=9, by="magnitude"), base()
    places = model.project.places.long()
    moved = torch.nn.utils.parameters_to_vector(model.theta().values()) - flat(plain)
    assert moved.nonzero().flatten().tolist() == places.tolist(), "all others stand where they stood"
    plain = merge(copy.deepcopy(model)).requires_grad_(True)
    for one in (model, plain):
        one(IDS).square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in plain.parameters()])
    same(model.z.grad, gradient[places], "the gradient of those weights")


# ---- which k ----

@pytest.mark.parametrize("words, classes", [(None, 0), ([1, 2, 3], 0), (None, 4)],
                         ids=["all words", "label words", "a Classifier"])
@pytest.mark.points(3, "mask")
def test_fisher_of_three_examples_by_hand(words, classes):
    """Of the base's own weights: a Classifier, which trains anyway, has none in theta."""
    task = Task("words", TASK.train, [], [], words=words)
    expected = torch.zeros(2788, dtype=torch.float64)
    for example in task.train:
        plain = base(classes=classes)
        logits, wanted = plain(torch.tensor([example.ids]))[0, -1].float(), example.targets[-1]
        if words:
            logits, wanted = logits[words], words.index(wanted)
        F.cross_entropy(logits, torch.tensor(wanted)).backward()
        expected += torch.cat([p.grad.flatten() for p in own_parameters(plain).values()]) ** 2 / 3
    same(fisher(base(classes=classes), task), expected, "the mean of the squares, not the square of the mean")


@pytest.mark.points(1, "mask")
def test_what_the_loss_does_not_reach_has_zeros_at_its_place():
    """A BERT with an MLM head answers without its pooler."""
    model, place = base(BERT), 0
    found = fisher(model, TASK)
    assert len(found) == sum(p.numel() for p in own_parameters(model).values()), "no place is left out"
    for name, p in own_parameters(model).items():
        here, place = found[place:place + p.numel()], place + p.numel()
        assert here.any() == (not name.startswith("pooler")), f"{name}: zero where the loss does not reach"


@pytest.mark.points(2, "mask")
def test_fisher_takes_128_examples_from_all_of_them(monkeypatch):
    seen, loss = [], tasks.loss
    monkeypatch.setattr(tasks, "loss", lambda model, task, batch: seen.append(batch[0].tolist()) or loss(
        model, task, batch))
    examples = [Example([i % 17, i // 17 % 17], [-100, 1], "", ["x"]) for i in range(200)]
    fisher(base(), Task("many", examples, [], []))
    assert {len(batch) for batch in seen} == {1} and len({str(batch) for batch in seen}) == len(seen) == 128
    assert any([e.ids] in seen for e in examples[128:]), "drawn: a file may be sorted by label"


@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.points(2, "mask")
def test_the_k_largest_scores_are_chosen_in_order_and_the_head_is_none_of_theta(classes):
    plain = base(BERT, classes)
    scores = {"magnitude": flat(plain).abs(), "fisher": fisher(plain, TASK)}
    for by, score in scores.items():
        model = attach(Mask(k=12, by=by).for_task(TASK), base(BERT, classes))
        expected = sorted(sorted(range(len(score)), key=lambda i: -score[i])[:12])
        places = model.project.places
        assert places.tolist() == expected and places.dtype == torch.int32, by
        assert all(p.grad is None for p in model.parameters()), f"{by}: choosing leaves no gradient behind"
        assert set(trainable(model)) == {"z", *(f"model.head.{name}" for name, _ in plain.head.named_parameters()
                                                 if classes)}, f"{by}: nor anything that trains"
    assert scores["fisher"].topk(12).indices.tolist() != scores["magnitude"].topk(12).indices.tolist()


def test_random_places_are_drawn_with_the_runs_seed():
    def drawn(seed):
        plain = base()
        torch.manual_seed(seed)
        return attach(Mask(k=40, by="random"), plain).project.places.tolist()
    D = len(flat(base()))
    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1) == sorted(set(drawn(1))) and 0 < min(drawn(1)) < D / 4 and D * 3 / 4 < max(drawn(1)) < D


def test_a_gradient_can_be_switched_off_around_it():
    with torch.no_grad():
        attach(Mask(k=4).for_task(TASK), base())


def test_what_it_was_told_is_no_setting():
    told = Mask(k=4).for_task(TASK)
    assert told == Mask(k=4) and deltas.asdict(told) == {"k": 4, "by": "fisher"}, "and in no file"
    assert Mask(k=4).task is None


def test_explain_shows_what_trains_and_what_is_kept(capsys):
    report.explain(attach(Mask(k=7, by="random"), base()))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["z", "(7,)", "TRAINED"] in lines and ["project.places", "(7,)", "kept,", "not", "trained"] in lines


# ---- a file: k values and k places ----

@pytest.mark.points(1, "mask")
def test_the_file_holds_8_k_bytes(tmp_path):
    model = masked(k=1000).float()
    assert count(model).delta == model.delta.formula(GPT) == 1000, "counted is what trains"
    size = save(tmp_path / "x.pt", model)
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    assert {name: (t.shape, t.dtype) for name, t in content["tensors"].items()} == {
        "z": ((1000,), torch.float32), "project.places": ((1000,), torch.int32)}
    assert 8000 < size < 8000 + 3000


@pytest.mark.parametrize("by", ["fisher", "magnitude", "random"])
@pytest.mark.points(1, "mask")
def test_a_loaded_mask_has_the_places_of_the_file(by, tmp_path):
    """No task is told, and the seed is another one."""
    model, plain = masked(k=20, by=by).float(), base().float()
    save(tmp_path / "x.pt", model)
    torch.manual_seed(99)
    again = load(tmp_path / "x.pt", plain)
    assert torch.equal(again.project.places, model.project.places) and torch.equal(again(IDS), model(IDS))


@pytest.mark.points(1, "mask")
def test_places_that_cannot_be_are_refused_and_the_base_stays_as_it_was(tmp_path):
    D, path = len(flat(base())), tmp_path / "x.pt"
    save(path, masked(k=3).float())
    content = deltas.read(path)
    whole, plain = content["tensors"], base().float()
    before = copy.deepcopy(plain.state_dict())
    wrong = rf"x.pt: project.places are not places from 0 to {D - 1}, each once and in order"
    for places, why in (([5, 5, 9], wrong), ([9, 5, 12], wrong), ([-1, 5, 9], wrong), ([5, 9, D], wrong),
                        ([5, 9], r"project.places is \(2,\), not \(3,\)"), (None, "misses project.places"),
                        ([5.0, 6.5, 9.0], "project.places is torch.float32, not torch.int32|holds 6 values")):
        content["tensors"] = {"z": whole["z"]}
        if places is not None:
            kind = torch.float32 if isinstance(places[0], float) else torch.int32
            content["tensors"]["project.places"] = torch.tensor(places, dtype=kind)
        torch.save(content | {"digest": deltas.digest(content)}, path)
        with pytest.raises(ValueError, match=why):
            load(path, plain)
        assert plain.delta is None and all(torch.equal(t, before[name]) for name, t in plain.state_dict().items())
    content["tensors"] = whole | {"project.places": torch.tensor([0, 5, D - 1], dtype=torch.int32)}
    torch.save(content | {"digest": deltas.digest(content)}, path)
    assert kept(load(path, plain))["project.places"].tolist() == [0, 5, D - 1], "the first and the last weight"


def test_a_file_with_another_place_is_damaged(tmp_path):
    save(tmp_path / "x.pt", masked(k=3).float())
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    content["tensors"]["project.places"][2] += 1
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="damaged"):
        deltas.read(tmp_path / "x.pt")


# ---- where there is no task, no value, no room ----

def test_without_a_task_fisher_cannot_choose_and_says_so():
    model = attach(Mask(k=3), base())
    with pytest.raises(ValueError, match=r"by='fisher' needs a task .*: attach\(delta.for_task\(task\), model\)"):
        model(IDS)
    attach(Mask(k=3, by="magnitude"), base())(IDS)


def test_on_the_meta_device_there_are_k_places_and_none_is_chosen():
    model = attached(GPT, Mask(k=7).for_task(TASK))
    assert count(model).delta == 7 and kept(model)["project.places"].shape == (7,) and model.z.is_meta


def test_more_places_than_weights_are_an_error_that_says_how_many_there_can_be():
    D = len(flat(base()))
    with pytest.raises(ValueError, match=f"k={D + 1}: this model has {D} weights; choose 1 to {D}"):
        attach(Mask(k=D + 1, by="random"), base())
    every = attach(Mask(k=D, by="random"), base())
    assert every.project.places.tolist() == list(range(D)), "k = D is full fine-tuning"
    with pytest.raises(ValueError, match="by='luck': choose fisher, magnitude or random"):
        Mask(by="luck")
