"""C27 to C36: why so few parameters can be enough. The intrinsic dimension."""

import torch

from data.bases import SHAPES
from fastfood import Dense, Fastfood
from lab import d90
from lab.costs import projection
from lab.runs import mean, scores
from lab.timing import side_by_side
from methods.full import base_size
from survey.ledger import COUNTS, FAILS, HOLDS, OPEN, WRONG, above, claim, minus, pm, together
from survey.shared import SMALL, by_task, each, score
from survey.tiny import gradients, tiny, with_delta

FOUR = "sentiment", "rating", "cuisine", "claim"
HARDER = "rating", "cuisine"  # those that the frozen base does not know, and full fine-tuning learns
USUAL = {"base": SMALL, "task": "rating", "examples": 1000}
BEYOND = 2 * d90.GRID[-1]  # stands for a d90 that the grid does not reach


@claim("E", minutes=1.6)
def c27_few_examples_many_parameters(bench):
    """With hundreds to thousands of examples one can train 10^8 to 10^10 parameters, and they generalise
    well.

    Origin: the premise of Aghajanyan et al.
    Measured: full fine-tuning of gpt-s on `rating` with 50 examples and with the usual 200, pretrained
    and from random weights: test score. It holds if the pretrained one is at 90 % accuracy and ahead with
    200 examples. Our parameters are half a million, not 10^8; it is their number for each example that is
    alike.
    """
    def both(n, examples):
        pretrained = bench.trial("full", examples=examples)
        scratch = bench.trial("full", examples=examples, scratch=True)
        bench.note(f"{n} examples, {pretrained[0]['base_params'] // n:,} parameters for each: pretrained "
                   f"{score(pretrained)}, from scratch {score(scratch)}.")
        return pretrained, scratch
    pretrained, scratch = both(200, None)
    bench.extra(both, 50, 50)
    return together(above(scores(pretrained), 90), above(minus(pretrained, scratch), 0))


# ---- d90 ----

def dimension(bench, kind="raw", **choice):
    """d90 as eval.py d90 finds it, an upper bound on its grid; BEYOND where no d is enough.

    `kind` "above chance": the target is nine tenths of the way from the majority class to full, not of full.
    """
    return d90.measure(bench, **USUAL | choice)["brackets"][kind][1] or BEYOND


def dimensions(bench, kind):
    """{task: d90} of gpt-xs on four tasks, as far as they have been run."""
    return by_task(bench, lambda task: dimension(bench, kind, task=task), FOUR)


def text(d):
    return f"above {d90.GRID[-1]}" if d == BEYOND else str(d)


@claim("E", minutes=3)
def c28_low_intrinsic_dimension_explains_it(bench):
    """The explanation: pretrained models have a low intrinsic dimension.

    Origin: Aghajanyan et al. 2021.
    Measured: d90 of gpt-xs on `rating`, pretrained and from random weights, with the same target: 90 % of
    the pretrained full score. It holds if pretraining lowers d90.
    """
    pretrained, scratch = dimension(bench), dimension(bench, scratch=True)
    D = base_size(SHAPES["gpt-xs"])
    bench.note(f"Pretrained: {text(pretrained)}; random weights: {text(scratch)}; D = {D:,}.")
    return lower(pretrained, scratch)


def lower(first, second):
    """Holds if the first d90 is lower than the second, fails if higher, open if both lie in one bracket."""
    return HOLDS if first < second else FAILS if first > second else OPEN


@claim("D")
def c29_the_maximum_dimension(bench):
    """If a small subspace, projected up, gives a similar result, the largest dimension that does is the
    intrinsic one.

    Origin: Li et al. 2018, who say the smallest.
    Measured: the rank of a projection from d = D = 60 dimensions: with rank D every update can be reached,
    so the largest dimension that works is D for any model and any task.
    Article: it is the minimum, not the maximum.
    Tests: tests/test_intrinsic.py::test_as_many_parameters_as_weights_can_represent_any_update
    """
    D, project = 60, Fastfood(60, 60)
    rank = int(torch.linalg.matrix_rank(torch.stack([project(e) for e in torch.eye(D)])))
    bench.note(f"Rank {rank} of {D}.")
    return WRONG if rank == D else FAILS


@claim("E", minutes=7)
def c30_ninety_percent_by_task(bench):
    """Similar means 90 % of the original score; the intrinsic dimension therefore belongs to a task.

    Origin: Aghajanyan et al.
    Measured: d90 of gpt-xs on four tasks, for the target as they have it and for one that starts at the
    majority class (90 % of full can be less than always guessing). It holds if the tasks differ.
    """
    raw, corrected = dimensions(bench, "raw"), dimensions(bench, "above chance")
    bench.note(f"As they have it: {each(raw, text)}. Above chance: {each(corrected, text)}.")
    return HOLDS if len(set(corrected.values())) > 1 else OPEN


@claim("A+E", minutes=0.1)
def c31_dense_projections_are_too_large(bench):
    """A dense projection takes O(D d) time and memory, which is out of the question for 10^8 to 10^11
    parameters.

    Origin: exact.
    Measured: bytes and operations at d = 1,000 by formula; time of one product at the size of gpt-s, d =
    256, in turns with Fastfood.
    Tests: tests/test_fastfood.py::test_what_a_hundred_million_weights_cost
    """
    for D in (10**8, 10**11):
        (dense, work), (small, adds) = (projection(D, 1000)[kind] for kind in ("dense", "fastfood"))
        bench.note(f"D = {D:.0e}: dense 4 D d = {dense / 1e9:,.0f} GB and 2 D d = {work:.0e} operations; "
                   f"Fastfood 7 D = {small / 1e9:,.1f} GB and 2 D x 10 = {adds:.0e}.")

    D = base_size(SHAPES["gpt-s"])

    def measure():
        z, forms = torch.ones(256), {"dense": Dense(256, D), "fastfood": Fastfood(256, D)}
        return {"ms": side_by_side({kind: lambda form=form: form(z) for kind, form in forms.items()})[0]}
    ms = bench.kept("projections", measure)["ms"]
    bench.note(f"D = {D:,}, d = 256: dense {ms['dense']:.1f} ms, Fastfood {ms['fastfood']:.1f} ms.")
    return COUNTS


@claim("U+E", minutes=2.6)
def c32_fastfood_instead(bench):
    """The Fastfood transform is used instead.

    Origin: Le, Sarlos & Smola 2013; Li et al. 2018.
    Measured: column norms and largest cosine of a Fastfood projection: it holds if they are those of a
    random one, 1 within a hundredth and below 0.1. Beside it dense minus Fastfood in points on `rating`
    with gpt-xs.
    Article: reference [6] stands for both Fastfood and LoRA; Fastfood's own paper is missing from its
    list.
    Tests: tests/test_fastfood.py::test_columns_are_unit_and_nearly_orthogonal_in_all_three_forms
    """
    project = Fastfood(64, 20_000)
    P = torch.stack([project(e) for e in torch.eye(64)], dim=1)
    cosine = (P.T @ P).fill_diagonal_(0).abs().max()
    bench.note(f"64 columns of 20,000: norms {P.norm(dim=0).min():.3f} to {P.norm(dim=0).max():.3f}, largest "
               f"cosine {cosine:.3f}.")

    def dense():
        for d in (128, 512):
            apart = minus(d90.at(bench, d, projection="dense", **USUAL), d90.at(bench, d, **USUAL))
            bench.note(f"rating with gpt-xs, d = {d}: dense minus Fastfood {pm(apart)} points.")
    bench.extra(dense)
    return HOLDS if (P.norm(dim=0) - 1).abs().max() < 0.01 and cosine < 0.1 else FAILS


@claim("U+E", minutes=7)
def c33_hyper_parameters_per_layer(bench):
    """An extra hyper-parameter per layer is added, so that layers get different mappings (SAID).

    Origin: Aghajanyan et al., equation 4.
    Measured: in a tiny model with d = 9, what is trained, and the scales' gradient; SAID minus DID in
    points at equal d on `rating` with gpt-xs, and both d90.
    Article: the scales are trained like all else, no hyper-parameters; and they are taken out of d.
    Tests: tests/test_intrinsic.py::test_the_scales_come_out_of_the_budget,
    tests/test_intrinsic.py::test_the_first_step_gives_a_scale_no_gradient_and_the_second_does
    """
    model, ids = tiny()
    model = with_delta("intrinsic", model, dim=9, per_layer=True)
    torch.nn.init.normal_(model.z)
    grads, sizes = gradients(model, ids), {"z": model.z.numel(), "scales": model.scales.numel()}
    bench.note(f"Trained: z {sizes['z']} + scales {sizes['scales']} = {sum(sizes.values())}; the scales' "
               f"gradient is {grads['scales']:.1g}.")

    def compared():
        for d in (32, 128, 512):
            apart = minus(d90.at(bench, d, per_layer=True, **USUAL), d90.at(bench, d, **USUAL))
            bench.note(f"rating with gpt-xs, d = {d}: SAID minus DID {pm(apart)} points.")
        for task in HARDER:
            did, said = (dimension(bench, per_layer=per_layer, task=task) for per_layer in (False, True))
            bench.note(f"d90 of gpt-xs on {task}: DID {text(did)}, SAID {text(said)}.")
    bench.extra(compared)
    return WRONG if grads["scales"] > 0 and sum(sizes.values()) == 9 else HOLDS


@claim("E", minutes=7)
def c34_all_are_low(bench):
    """The intrinsic dimensions of pretrained models are all low.

    Origin: Aghajanyan et al., table 1: 207 to 9,295 for models of 110 to 355 million parameters.
    Measured: the d90 of C30 in percent of D. Low means 1 % or less.
    """
    D = base_size(SHAPES["gpt-xs"])
    found = dimensions(bench, "above chance")
    bench.note(f"Above chance, D = {D:,}: {each(found, text)}; a hundredth is {D // 100:,}.")
    return HOLDS if all(d <= 0.01 * D for d in found.values()) else FAILS


@claim("E", minutes=45)
def c35_larger_models_smaller_dimension(bench):
    """The larger a pretrained model, the smaller its intrinsic dimension.

    Origin: a tendency in Aghajanyan et al., figure 3.
    Measured: d90 of gpt-xs, gpt-s and gpt-m on `rating` and `cuisine`; it holds if the largest's is smaller
    than the smallest's on both.
    Article: the same paper's table 1 has an exception: BERT on MRPC with DID, 1,861 for base and 2,493
    for large.
    """
    verdicts = []
    for task in HARDER:
        found = {base: dimension(bench, base=base, task=task) for base in ("gpt-xs", "gpt-s", "gpt-m")}
        bench.note(f"{task}: {each(found, text)}.")
        verdicts.append(lower(found["gpt-m"], found["gpt-xs"]))
    return together(*verdicts)


@claim("E", minutes=7)
def c36_harder_tasks_larger_dimension(bench):
    """The harder a task, the larger its intrinsic dimension.

    Origin: Aghajanyan et al.: ANLI, the hardest of six, has the highest.
    Measured: four tasks in the order of full fine-tuning's error (1,000 examples, gpt-xs) and their d90
    above chance; Spearman's rank correlation. Four tasks decide only if all are in order (1) or the order
    is reversed (below 0). `claim`, the hardest, is hardly learned at all at this size: few dimensions are
    enough for the little that is.
    """
    full = {task: bench.trial("full", **USUAL | {"task": task}) for task in FOUR}
    error = {task: 100 - mean(scores(records)) for task, records in full.items()}
    found = {task: dimension(bench, "above chance", task=task) for task in FOUR}
    rho = spearman(list(error.values()), list(found.values()))
    bench.note(f"Error: {each(error, '{:.1f}'.format)}. d90: {each(found, text)}. Correlation {rho:.2f}.")
    return HOLDS if rho > 0.99 else FAILS if rho < 0 else OPEN


def spearman(x, y):
    """The correlation of ranks; equal values share their mean rank."""
    def ranks(values):
        return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]
    stacked = torch.tensor([ranks(x), ranks(y)])
    return torch.corrcoef(stacked)[0, 1].nan_to_num().item()
