"""What must be true of every technique, whatever it does: a new one is tested by being listed in METHODS.

Every entry of `methods()` is run with its paper's variants (VARIANTS), on GPT and BERT, answering through the
LM head and through a Classifier. The bases have awkward sizes and no number in them is left at 0 or 1.
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import deltas
import train
from deltas import attach, count, fingerprint, load, merge, methods, read, save, trainable
from model import Classifier, Config, Transformer

BERT = dict(causal=False, norm_first=False, activation="gelu", eps=1e-12, lm_head="mlm")
BASES = {  # name: its shape, and the classes of its Classifier (0: the LM head answers)
    "gpt": (Config(17, 16, 12, 2, 3, 20), 0),
    "gpt-classes": (Config(17, 16, 12, 2, 3, 20, tied=False), 4),
    "bert": (Config(17, 16, 12, 2, 3, 20, n_types=2, **BERT), 0),
    "bert-classes": (Config(17, 16, 12, 2, 3, 20, n_types=2, pooler=True, **BERT), 4),
    "bert-new-pooler": (Config(17, 16, 12, 2, 3, 20, **BERT), 4),
}
VARIANTS = {  # small where the defaults are larger than these bases; a technique not named here runs as it is
    "full": [{}],
    "last_layer": [{"k": 1}, {"k": 2}],
    "bitfit": [{}, {"only": "query_up"}],
    "adapter": [{"bottleneck": 5}, {"bottleneck": 5, "norms": False}],
    "prompt": [{"length": 3}],
    "prefix": [{"length": 3}, {"length": 3, "mlp": False}],
    "lora": [{"rank": 2, "alpha": 6.0}, {"rank": 3, "targets": "query,key,value,out,up,down"}],
    "intrinsic": [{"dim": 31}, {"dim": 31, "per_layer": True}, {"dim": 7, "projection": "dense"}],
}
CASES = [(base, name, settings) for base in BASES for name in methods() for settings in VARIANTS.get(name, [{}])]
MIXED = [(list(BASES)[n % len(BASES)], *case[1:]) for n, case in enumerate(c for c in CASES if c[0] == "gpt")]
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def label(case):
    base, name, settings = case
    return "-".join([base, name, *(f"{k}={v}" for k, v in settings.items())])


every = pytest.mark.parametrize("case", CASES, ids=label)
every_function = pytest.mark.parametrize("case", [c for c in CASES if c[0] != "bert-new-pooler"], ids=label)
every_technique = pytest.mark.parametrize("case", [c for c in CASES if c[0] == "bert-classes"], ids=label)


def stir(parameters, size=0.3, seed=1):
    """Move every number: what is zero, or equal by its initialisation, hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p += size * torch.randn(p.shape, generator=generator).to(p.dtype)


def new_base(case, seed=0):
    """The plain base of a case, in float32."""
    config, classes = BASES[case[0]]
    torch.manual_seed(seed)
    model = Transformer(config)
    if classes:
        model.classify(classes)
    stir(model.parameters())
    return model


def new_delta(case):
    return methods()[case[1]](**case[2])


def fresh(case):
    """Base and delta, as training finds them."""
    model = new_base(case)
    torch.manual_seed(2)
    return attach(new_delta(case), model)


def trained(case):
    """Base and delta in float64, as if long training had moved every number of the delta; finished."""
    model = fresh(case).double()
    stir(trainable(model).values())
    model.delta.finish(model)
    return model


def settled(case, made={}):
    """The same for tests that only read it: each is made once."""
    if label(case) not in made:
        made[label(case)] = trained(case)
    return made[label(case)]


def key_biases(model):
    inner = next(m for m in model.modules() if isinstance(m, Transformer))
    owners = (getattr(block.attention.key, "linear", block.attention.key) for block in inner.blocks)
    return {id(key.bias) for key in owners}


def targets_of(model, ids):
    return (ids * 3 + 1) % (model.head.out.out_features if isinstance(model.head, Classifier) else 17)


def train_two_steps(model, ids=IDS):
    """An evaluation, then two steps of AdamW with weight decay; {name: largest gradient}."""
    with torch.no_grad():
        model(ids)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(ids).flatten(0, 1), targets_of(model, ids).flatten()).backward()
        optimizer.step()
    return {name: p.grad.abs().max().item() for name, p in trainable(model).items()}


# ---- the start ----

@every
def test_a_new_delta_changes_nothing_bit_for_bit(case):
    model = new_base(case)
    with torch.no_grad():
        before = model(IDS)
    torch.manual_seed(2)
    with torch.no_grad():
        after = attach(new_delta(case), model)(IDS)
    if new_delta(case).identity:
        assert torch.equal(before, after)
    else:  # soft tokens are seen at once
        assert not torch.equal(before, after)


@every
def test_after_two_steps_every_delta_tensor_has_moved_and_nothing_else(case):
    """Two steps, since LoRA's A, an adapter's down and SAID's scales get no gradient in the first; after an
    evaluation, since a cache filled under no_grad would cut the delta off; with weight decay, since that
    moves what has a zero gradient. The exception: softmax does not see the key's bias (a prefix makes it).
    """
    model = fresh(case).double()
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before, mark = {name: p.detach().clone() for name, p in trainable(model).items()}, fingerprint(frozen)
    gradients = train_two_steps(model)
    assert fingerprint(frozen) == mark
    assert all(p.grad is None for p in frozen.values())
    dead = key_biases(model)
    for name, p in trainable(model).items():
        if id(p) in dead:
            assert gradients[name] < 1e-12
        else:
            assert gradients[name] > 1e-9, name
            assert not torch.equal(p, before[name]), name


@every
def test_what_requires_a_gradient_is_float32_and_is_all_that_training_finds(case):
    model = fresh(case)
    mine = trainable(model)
    assert mine and all(p.dtype == torch.float32 and p.is_leaf for p in mine.values())
    assert {id(p) for p in mine.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    if isinstance(model.head, Classifier):
        assert {id(p) for p in model.head.parameters()} <= {id(p) for p in mine.values()}


@every
def test_the_counts_agree_with_the_closed_formulas(case):
    plain = new_base(case)
    head = sum(p.numel() for p in plain.head.parameters()) if BASES[case[0]][1] else 0
    base = sum(p.numel() for p in plain.parameters()) - head
    model = fresh(case)
    counted = count(model)
    assert (counted.base, counted.head) == (base, head)
    assert counted.delta == model.delta.training_formula(model.config)
    model.delta.finish(model)
    stored = count(model)
    assert (stored.base, stored.head) == (base, head)
    assert stored.delta == model.delta.formula(model.config)
    assert stored.percent == 100 * stored.delta / base


@every_function
def test_finishing_changes_no_answer_and_can_be_done_twice(case):
    model = fresh(case).double()
    stir(trainable(model).values())
    expected = model(IDS)
    for _ in range(2):
        model.delta.finish(model)
        torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-8)


@every_technique
def test_a_second_delta_on_the_same_model_is_an_error(case):
    model = fresh(case)
    with pytest.raises(ValueError, match="carries a delta already"):
        attach(new_delta(case), model)


# ---- masks and copies ----

@every_function
def test_pads_change_nothing(case):
    """A text of five tokens and one of three, side by side: each gets the logits it gets alone."""
    model = settled(case)
    short, pads = IDS[1:, :3], torch.tensor([[8, 8]])  # any token may stand where nothing is read
    alone = model(IDS[:1]), model(short)
    for second, here in ((torch.cat([short, pads], 1), slice(0, 3)), (torch.cat([pads, short], 1), slice(2, 5))):
        ids, keep = torch.cat([IDS[:1], second]), torch.zeros(2, 5, dtype=torch.bool)
        keep[0] = keep[1, here] = True
        logits = model(ids, keep)
        torch.testing.assert_close(logits[:1], alone[0], rtol=0, atol=1e-8)
        torch.testing.assert_close(logits[1:, here], alone[1], rtol=0, atol=1e-8)
        torch.testing.assert_close(model(ids, keep, at=keep), logits[keep], rtol=0, atol=1e-8)


@every_function
def test_the_last_token_moves_no_earlier_logits_in_a_gpt_and_all_in_a_bert(case):
    model = settled(case)
    other = IDS.clone()
    other[:, -1] = 8
    moved = (model(IDS) - model(other)).abs().amax(dim=-1) > 1e-9                      # (B, T)
    earlier = moved[:, :-1]
    assert moved[:, -1].all()
    assert not earlier.any() if case[0].startswith("gpt") else earlier.all()


@every_function
def test_a_deep_copy_is_a_real_copy(case):
    model = settled(case)
    before, twin = model(IDS), copy.deepcopy(model)
    assert torch.equal(twin(IDS), before)
    assert list(trainable(twin)) == list(trainable(model)) and count(twin) == count(model)
    stir(twin.parameters())
    assert torch.equal(model(IDS), before)
    assert not torch.equal(twin(IDS), before)


@every_function
def test_the_frozen_part_can_be_stored_in_bfloat16(case):
    """As train.py does it: frozen tensors and arithmetic in bfloat16 (but for the norms), the delta in float32."""
    model = fresh(case)
    mark = train.to_precision(model, "bfloat16")
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.dtype == torch.bfloat16 for p in frozen if p.ndim > 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train_two_steps(model)
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    assert fingerprint({name: p for name, p in model.named_parameters() if not p.requires_grad}) == mark


# ---- files ----

@every
def test_a_saved_delta_comes_back_with_its_settings_and_its_head(case, tmp_path):
    model = trained(case).float()
    size = save(tmp_path / "delta.pt", model, score=12.5)
    assert size == (tmp_path / "delta.pt").stat().st_size
    numbers = sum(p.numel() for p in trainable(model).values())
    assert 4 * numbers < size < 4 * numbers + 350 * len(trainable(model)) + 3000       # and no more than that
    again = load(tmp_path / "delta.pt", new_base(case))
    assert torch.equal(again(IDS), model(IDS))
    assert again.delta == model.delta and count(again) == count(model)
    assert read(tmp_path / "delta.pt")["notes"] == {"score": 12.5}


def test_a_new_process_loads_what_this_one_saved(tmp_path):
    """One process for all techniques, on one base or another; it builds these anew and finds the same logits."""
    for i, case in enumerate(MIXED):
        model = trained(case).float()
        save(tmp_path / f"{i}.pt", model)
        torch.save(model(IDS).detach(), tmp_path / f"{i}-logits.pt")
    program = f"""if True:
        import sys
        sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
        import torch
        torch.set_num_threads(1)
        from test_invariants import IDS, MIXED, label, load, new_base
        for i, case in enumerate(MIXED):
            model = load(f"{{sys.argv[1]}}/{{i}}.pt", new_base(case))
            if not torch.equal(model(IDS), torch.load(f"{{sys.argv[1]}}/{{i}}-logits.pt")):
                print("differs:", label(case))
        print(len(MIXED), "loaded")
    """
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"{len(MIXED)} loaded\n", 0), done.stderr


@every_technique
def test_a_file_that_does_not_fit_is_an_error_that_says_why(case, tmp_path):
    path, model = tmp_path / "delta.pt", trained(case).float()
    save(path, model)
    content = read(path)
    name, tensor = next(iter(content["tensors"].items()))
    longer = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
    other = next(kind for kind in methods() if kind != case[1] and methods()[kind]() != methods()[case[1]]())
    without = {key: value for key, value in content["tensors"].items() if key != name}

    def refused(because, base=None, **change):
        torch.save(content | change, path)
        with pytest.raises(ValueError, match=because):
            load(path, base or new_base(case))

    refused("another base", base=new_base(case, seed=5))
    refused(f"misses {name}", tensors=without)
    refused("has a surplus of stranger", tensors=content["tensors"] | {"stranger": tensor})
    refused(f"{name} is .*, not ", tensors=content["tensors"] | {name: longer})
    refused("made by the method 'magic'", method="magic")
    refused("are not those of", settings=content["settings"] | {"volume": 11})
    refused("are not those of|misses|another", method=other)
    refused("format", format=2)
    save(path, model)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short"):
            load(path, new_base(case))


# ---- merging ----

def mergeable(case):
    return case[1] not in ("adapter", "prompt", "prefix")


@every_function
def test_merged_weights_compute_the_same_in_a_plain_model(case):
    if not mergeable(case):
        with pytest.raises(ValueError, match="cannot be merged: "):
            merge(fresh(case))
        return
    model = trained(case)
    expected, plain = model(IDS), new_base(case).double()
    merged = merge(copy.deepcopy(model))                                               # float64 stays float64
    torch.testing.assert_close(merged(IDS), expected, rtol=0, atol=1e-8)
    assert str(merged) == str(plain)                                                   # nothing is left of it
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert merge(model.bfloat16()).tokens.weight.dtype == torch.float32                # 16 bits do not stay


@every_function
def test_a_delta_is_merged_only_once(case):
    if not mergeable(case):
        return
    merged = merge(trained(case))
    assert not trainable(merged)
    before = merged(IDS)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(merged)
    assert torch.equal(merged(IDS), before)


def test_a_plain_model_has_nothing_to_merge():
    model = new_base(CASES[0]).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(model)


def test_every_technique_belongs_to_a_family_and_has_a_file_a_test_and_learning_rates_of_its_own():
    root = Path(deltas.__file__).parent
    for name, kind in methods().items():
        assert kind().name == name
        assert kind.family in ("addition", "reparameterisation", "specification", "baseline")
        assert 0 < kind.lr_real <= kind.lr < 1
        assert (root / "methods" / f"{name}.py").is_file()
        assert (root / "tests" / f"test_{name}.py").is_file()
