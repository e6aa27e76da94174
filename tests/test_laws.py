"""The laws: what is true of every technique, whatever it does. A new one is tested by being listed in methods().

One test a law. It tries the law on all BASES and with all FIELDS of the technique, so that what is broken is
one red line a law; its message says with which fields, on which base and at which tensor.
"""

import copy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import deltas
import train
from data.tasks import Example, Task
from deltas import Delta, attach, count, detach, fingerprint, kept, load, merge, methods, read, save, trainable
from model import Classifier, Config, Transformer, generate
from tiny import IDS, same, stir

BERT = dict(causal=False, norm_first=False, activation="gelu", eps=1e-12, lm_head="mlm")
BASES = {  # name: its shape, and the classes of its Classifier (0: the LM head answers)
    "gpt": (Config(17, 16, 12, 2, 3, 20), 0),
    "gpt-classes": (Config(17, 16, 12, 2, 3, 20, tied=False), 4),
    "bert": (Config(17, 16, 12, 2, 3, 20, n_types=2, **BERT), 0),
    "bert-classes": (Config(17, 16, 12, 2, 3, 20, n_types=2, pooler=True, **BERT), 4),
    "bert-new-pooler": (Config(17, 16, 12, 2, 3, 20, **BERT), 4),
}
FIELDS = {  # small and awkward where the defaults are not; a technique that is not named here runs as it is
    "last_layer": [{"k": 1}, {"k": 2}],
    "bitfit": [{}, {"only": "query_up"}],
    "adapter": [{"bottleneck": 5}, {"bottleneck": 5, "norms": False}],
    "prompt": [{"length": 3}],
    "prefix": [{"length": 3}, {"length": 3, "mlp": True, "hidden": 5}],
    "lora": [{"rank": 2, "alpha": 6.0}, {"rank": 3, "targets": "query,key,value,out,up,down"}],
    "intrinsic": [{"dim": 31}, {"dim": 31, "per_layer": True}, {"dim": 7, "projection": "dense"}],
    "mask": [{"k": 31}, {"k": 40, "by": "magnitude"}, {"k": 50, "by": "random"}],
}
TASK = Task("words", [Example([3, 1, 4], [-100, -100, 2], "", ["x"]), Example([9, 2], [-100, 3], "", ["x"])], [], [])
law = pytest.mark.parametrize("name", methods())


@dataclass
class Case:
    """A technique on a base. A failure begins with it."""

    base: str
    delta: Delta

    def __str__(self):
        return f"{self.delta} on {self.base}"

    def plain(self, seed=0):
        """The base in float32, no value of it 0 or 1; the same one at every call."""
        config, classes = BASES[self.base]
        torch.manual_seed(seed)
        model = Transformer(config)
        if classes:
            model.classify(classes)
        stir(model.parameters())
        return model

    def fresh(self, **how):
        """Base and delta, as training finds them."""
        model = self.plain()
        torch.manual_seed(2)
        return attach(self.delta.for_task(TASK), model, **how)

    def trained(self):
        """Base and delta in float64, as if long training had moved every value of the delta; finished."""
        model = self.fresh().double()
        stir(trainable(model).values())
        model.delta.finish(model)
        return model


def cases(name, bases=BASES):
    return [Case(base, methods()[name](**fields)) for base in bases for fields in FIELDS.get(name, [{}])]


def transformer(model):
    """The Transformer in a model; a technique may have wrapped it."""
    return next(module for module in model.modules() if isinstance(module, Transformer))


def frozen(model):
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


def train_two_steps(model):
    """An evaluation, then two steps of AdamW with weight decay; {name: largest gradient of the second}."""
    with torch.no_grad():
        model(IDS)
    classes = model.head.out.out_features if isinstance(model.head, Classifier) else 17
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(IDS).flatten(0, 1), (IDS * 3 + 1).flatten() % classes).backward()
        optimizer.step()
    return {name: 0 if p.grad is None else p.grad.abs().max().item() for name, p in trainable(model).items()}


# ---- what a technique says of itself ----

@law
def test_every_technique_has_a_family_and_learning_rates_of_its_own(name):
    kind = methods()[name]
    assert kind.family in ("addition", "reparameterisation", "specification", "baseline"), f"{name}: its family"
    assert 0 < kind.lr_real < 1 and 0 < kind.lr < 1, f"{name}: a learning rate for each kind of base"
    assert not kind.rates or kind.lr in kind.rates, f"{name}: the default is in the grid of learning rates"
    assert kind(**kind.paper), f"{name}: the paper's setting has its fields"
    assert sys.modules[kind.__module__].__doc__, f"{name}: --help prints its file's docstring"


def test_every_technique_has_a_file_and_a_test():
    root = Path(train.__file__).parent
    files = {path.stem for path in (root / "methods").glob("*.py")} - {"__init__"}
    assert files == set(methods()), "methods/__init__.py imports every file of methods/"
    for name in methods():
        assert (root / "tests" / f"test_{name}.py").is_file(), f"tests/test_{name}.py: the worked example"


# ---- the start ----

@law
def test_a_new_delta_changes_nothing_bit_for_bit(name):
    for case in cases(name):
        with torch.no_grad():
            before, after = case.plain()(IDS), case.fresh()(IDS)
        apart = (after - before).abs().max()
        if case.delta.identity:
            assert torch.equal(before, after), f"{case}: a new delta moves the logits by {apart:.2g}"
        else:
            assert apart > 0, f"{case}: soft tokens are seen at once, but the logits stay"


@law
def test_after_two_steps_every_delta_tensor_has_moved_and_nothing_else(name):
    """Two steps, since LoRA's A, an adapter's down and SAID's scales get no gradient in the first; after an
    evaluation, since a cache filled under no_grad would cut the delta off; with weight decay, since that
    moves what has a zero gradient. The exception: softmax does not see the key's bias (a prefix makes it).
    """
    for case in cases(name):
        model = case.fresh().double()
        still, before = frozen(model), {name: p.detach().clone() for name, p in trainable(model).items()}
        mark = fingerprint(still)
        gradients = train_two_steps(model)
        assert fingerprint(still) == mark, f"{case}: a frozen tensor has moved"
        assert all(p.grad is None for p in still.values()), f"{case}: a frozen tensor has a gradient"
        dead = {id(getattr(block.attention.key, "bias", None)) for block in transformer(model).blocks}
        for tensor, p in trainable(model).items():
            if id(p) in dead:
                assert gradients[tensor] < 1e-12, f"{case}: {tensor}: softmax does not see the key's bias"
            else:
                assert gradients[tensor] > 1e-9, f"{case}: {tensor} is dead, it has no gradient after two steps"
                assert not torch.equal(p, before[tensor]), f"{case}: {tensor} has not moved in two steps"


@law
def test_what_requires_a_gradient_is_float32_and_the_classifier_is_in_it(name):
    for case in cases(name):
        model = case.fresh()
        for tensor, p in trainable(model).items():
            assert p.dtype == torch.float32 and p.is_leaf, f"{case}: {tensor}: an optimiser takes float32 leaves"
        if isinstance(model.head, Classifier):
            assert all(p.requires_grad for p in model.head.parameters()), f"{case}: the Classifier trains too"


@law
def test_the_counts_agree_with_the_closed_formulas(name):
    for case in cases(name):
        plain, model = case.plain(), case.fresh()
        head = sum(p.numel() for p in plain.head.parameters()) if BASES[case.base][1] else 0
        base = sum(p.numel() for p in plain.parameters()) - head
        for when, formula in (("in training", model.delta.training_formula), ("stored", model.delta.formula)):
            counted, expected = count(model), formula(model.config)
            assert counted.delta == expected, f"{case}: {when} {counted.delta}, by the formula {expected}"
            assert (counted.base, counted.head) == (base, head), f"{case}: base and head are counted apart"
            model.delta.finish(model)


@law
def test_finishing_changes_no_answer_and_can_be_done_twice(name):
    for case in cases(name):
        model = case.fresh().double()
        stir(trainable(model).values())
        expected = model(IDS)
        for time in ("once", "twice"):
            model.delta.finish(model)
            same(model(IDS), expected, f"{case}: finished {time}")


# ---- masks, positions, caches, copies ----

@law
def test_pads_change_nothing(name):
    """A text of five tokens and one of three, side by side: each gets the logits it gets alone."""
    for case in cases(name):
        model = case.trained()
        short, pads = IDS[1:, :3], torch.tensor([[8, 8]])  # any token may stand where nothing is read
        alone = model(IDS[:1]), model(short)
        for where, second, here in (("right", torch.cat([short, pads], 1), slice(0, 3)),
                                    ("left", torch.cat([pads, short], 1), slice(2, 5))):
            ids, keep = torch.cat([IDS[:1], second]), torch.zeros(2, 5, dtype=torch.bool)
            keep[0] = keep[1, here] = True
            logits = model(ids, keep)
            same(logits[:1], alone[0], f"{case}: a text beside one with pads on the {where}")
            same(logits[1:, here], alone[1], f"{case}: a text with pads on the {where}")
            same(model(ids, keep, at=keep), logits[keep], f"{case}: logits where `at` wants them")


@law
def test_the_last_token_moves_no_earlier_logits_in_a_gpt_and_all_in_a_bert(name):
    for case in cases(name):
        model, other = case.trained(), IDS.clone()
        other[:, -1] = 8
        moved = (model(IDS) - model(other)).abs().amax(dim=-1) > 1e-9                  # (B, T)
        assert moved[:, -1].all(), f"{case}: a token moves its own logits"
        if case.base.startswith("gpt"):
            assert not moved[:, :-1].any(), f"{case}: an earlier token sees a later one"
        else:
            assert moved.all(), f"{case}: a token does not see a later one"


@law
def test_the_cache_changes_no_logit_and_no_word(name):
    """A text in three pieces; and greedy words for texts of 5, 3 and 1 tokens, against reading all again for each."""
    words = set()
    for case in cases(name, ["gpt"]):
        model, cache = case.trained(), {}
        with torch.no_grad():
            transformer(model).positions.weight.mul_(8)                                # so that it says different words
        text = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
        pieces = [model(text[:, start:end], torch.ones(2, end, dtype=torch.bool), cache=cache)
                  for start, end in ((0, 3), (3, 4), (4, 6))]
        same(torch.cat(pieces, dim=1), model(text), f"{case}: logits with a cache")
        ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [8, 0, 0, 0, 0]])
        new = generate(model, ids, torch.arange(5) < torch.tensor([[5], [3], [1]]), steps=7)
        for row, length in enumerate((5, 3, 1)):
            text = ids[row:row + 1, :length]
            for _ in range(7):
                text = torch.cat([text, model(text)[:, -1:].argmax(dim=-1)], dim=1)
            assert new[row].tolist() == text[0, length:].tolist(), f"{case}: words after {length} tokens"
        words |= set(new.flatten().tolist())
    assert len(words) > 2, f"{name}: one word for ever shows nothing"


@law
def test_a_deep_copy_is_a_real_copy(name):
    for case in cases(name):
        model = case.trained()
        before, twin = model(IDS), copy.deepcopy(model)
        assert torch.equal(twin(IDS), before), f"{case}: the copy answers as the original"
        assert list(trainable(twin)) == list(trainable(model)), f"{case}: the copy shares what the original shares"
        stir(twin.parameters())
        assert torch.equal(model(IDS), before), f"{case}: training the copy moves the original"
        assert not torch.equal(twin(IDS), before), f"{case}: training the copy does not move it"


@law
def test_the_frozen_part_can_be_stored_in_bfloat16(name):
    """As train.py does it: frozen tensors and arithmetic in bfloat16 (but for the norms), the delta in float32."""
    for case in cases(name):
        model = case.fresh()
        exact = model(IDS)
        train.to_precision(model, "bfloat16")
        still = frozen(model)
        mark = fingerprint(still)
        assert all(p.dtype == torch.bfloat16 for p in still.values() if p.ndim > 1), f"{case}: half the bytes"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model(IDS) - exact).norm() < 0.05 * exact.norm(), f"{case}: nearly the same logits"
            train_two_steps(model)
        for tensor, p in trainable(model).items():
            assert p.dtype == torch.float32, f"{case}: {tensor}: the delta stays in float32"
        assert fingerprint(still) == mark, f"{case}: a frozen tensor has moved"


# ---- files ----

@law
def test_a_saved_delta_comes_back_with_its_settings_and_its_head(name, tmp_path):
    for case in cases(name):
        model = case.trained().float()
        size = save(tmp_path / "delta.pt", model, score=12.5)
        tensors = trainable(model) | kept(model)
        values = sum(t.nbytes for t in tensors.values())
        assert size == (tmp_path / "delta.pt").stat().st_size, f"{case}: the size that `save` returns"
        assert values < size < values + 350 * len(tensors) + 3000, f"{case}: the delta and no more"
        again = load(tmp_path / "delta.pt", case.plain())
        assert torch.equal(again(IDS), model(IDS)), f"{case}: a loaded delta answers as the saved one"
        assert fingerprint(kept(again)) == fingerprint(kept(model)), f"{case}: what is kept comes back"
        assert again.delta == case.delta and count(again) == count(model), f"{case}: fields and counts come back"
        assert read(tmp_path / "delta.pt")["notes"] == {"score": 12.5}, f"{case}: notes come back"


def test_a_new_process_loads_what_this_one_saved(tmp_path):
    """One process for all techniques, on one base or another; it builds these anew and finds the same logits."""
    every = mixed()
    for i, case in enumerate(every):
        model = case.trained().float()
        save(tmp_path / f"{i}.pt", model)
        torch.save(model(IDS).detach(), tmp_path / f"{i}-logits.pt")
    program = f"""if True:
        import sys
        sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
        import torch
        torch.set_num_threads(1)
        from test_laws import IDS, load, mixed
        for i, case in enumerate(mixed()):
            model = load(f"{{sys.argv[1]}}/{{i}}.pt", case.plain())
            if not torch.equal(model(IDS), torch.load(f"{{sys.argv[1]}}/{{i}}-logits.pt")):
                print("differs:", case)
        print("loaded", i + 1)
    """
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"loaded {len(every)}\n", 0), done.stdout + done.stderr


def mixed():
    """Every technique with all its FIELDS, on the bases in turn."""
    return [cases(name, [list(BASES)[(n + i) % len(BASES)]])[i]
            for n, name in enumerate(methods()) for i in range(len(FIELDS.get(name, [{}])))]


@law
def test_a_file_that_does_not_fit_is_an_error_that_says_why(name, tmp_path):
    case, path = cases(name, ["bert-classes"])[-1], tmp_path / "delta.pt"
    save(path, case.trained().float())
    whole, content = path.read_bytes(), read(path)
    tensor, values = next(iter(content["tensors"].items()))
    others = (methods()[other]() for other in methods() if other != name)
    other = next(delta.name for delta in others if vars(delta).keys() != content["settings"].keys())

    def refused(because, base=None, **change):
        changed = content | change
        torch.save(changed | {"digest": deltas.digest(changed)}, path)
        with pytest.raises(ValueError, match=because):
            load(path, base or case.plain())

    rest = {key: value for key, value in content["tensors"].items() if key != tensor}
    refused("another base", base=case.plain(seed=5))
    refused("holds .* values", tensors=rest)
    refused(f"misses {tensor}", tensors=rest | {"stranger": values})
    refused("has a surplus of stranger", tensors=content["tensors"] | {"stranger": torch.zeros(0)})
    refused(f"{tensor} is .*, not ", tensors=content["tensors"] | {tensor: values[..., None]})
    refused("made by the method 'magic'|made by the method magic", method="magic")
    refused("are not those of", settings=content["settings"] | {"volume": 11})
    refused(f"are not those of {other}", method=other)
    refused("not a delta file of format 1 or 2", format=3)
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short"):
            load(path, case.plain())


# ---- taken off again ----

@law
def test_detached_the_base_is_bit_for_bit_what_it_was_and_takes_another_delta(name):
    """After two steps of training, finished, in another precision; the same for a copy of the model."""
    for case in cases(name):
        plain, model = case.plain(), case.fresh(restorable=True)
        for twin in (copy.deepcopy(model), model):
            train_two_steps(twin)
            stir(trainable(twin).values())
            twin.delta.finish(twin)
            train.to_precision(twin, "bfloat16")
            base = detach(twin)
            assert str(base) == str(plain) and base.config == plain.config, f"{case}: its modules are those of the base"
            assert all(p.requires_grad and p.grad is None for p in base.parameters()), f"{case}: flags are back"
            for tensor, p in plain.named_parameters():
                assert torch.equal(base.get_parameter(tensor), p), f"{case}: {tensor} is not what it was"
        torch.manual_seed(2)
        again = attach(case.delta.for_task(TASK), base)
        assert torch.equal(again(IDS), case.fresh()(IDS)), f"{case}: a second delta finds the base as the first did"


# ---- merging ----

@law
def test_merged_weights_compute_the_same_in_a_plain_model(name):
    """What is added may be no change of any weight: then the technique says why. All else can be merged."""
    for case in cases(name):
        model = case.trained()
        expected, plain = model(IDS), case.plain().double()
        try:
            merged = merge(copy.deepcopy(model))
        except ValueError as error:
            assert "cannot be merged: " in str(error), f"{case}: {error}"
            assert case.delta.family == "addition", f"{case}: weights have changed, or were chosen, so: {error}"
            continue
        same(merged(IDS), expected, f"{case}: merged")                                 # float64 stays float64
        assert str(merged) == str(plain), f"{case}: nothing is left of the delta"
        assert list(merged.state_dict()) == list(plain.state_dict()), f"{case}: the base's own names"
        assert not trainable(merged), f"{case}: merged, all is frozen"
        with pytest.raises(ValueError, match="nothing to merge"):
            merge(merged)
        same(merged(IDS), expected, f"{case}: a second merge is refused and changes nothing")
        assert merge(model.bfloat16()).tokens.weight.dtype == torch.float32, f"{case}: 16 bits are not merged in"
