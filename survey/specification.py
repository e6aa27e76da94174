"""C23 to C26: which of the base's own parameters to choose. A part, the last layers, the biases."""

import torch

from data import tasks
from data.bases import SHAPES, load_base
from deltas import load, methods
from lab.runs import mean
from lab.score import rebuild
from lab.sizes import size
from methods.full import base_size
from model import Slot
from survey.ledger import DEFINES, FAILS, above, claim, pm, share, together
from survey.shared import each, fields, on_real
from survey.tiny import gradients, tiny, with_delta


@claim("D")
def c23_train_a_part(bench):
    """One can freeze a part of the weights and train the rest; which part to train may itself be learned.

    Origin: background; learned masks (diff pruning, Fisher masks) are not in this code.
    Measured: what the parts that we do offer come to on gpt-s.
    """
    config = SHAPES["gpt-s"]
    D = base_size(config)
    parts = {"the last block": methods()["last_layer"](k=1), "all biases": methods()["bitfit"](),
             "query and first mlp biases": methods()["bitfit"](only="query_up")}
    sizes = {what: delta.formula(config) for what, delta in parts.items()}
    bench.note(f"Of {D:,} parameters: {each(sizes, lambda n: f'{n:,} ({100 * n / D:.2f} %)')}.")
    return DEFINES


@claim("E", minutes=0.1)
def c24_low_layers_are_general(bench):
    """Layers near the input hold what is general, layers near the output what is particular to a task.

    Origin: Houlsby et al. support it: on MNLI the adapters of the lowest five of twelve layers could go.
    Measured: adapters trained on `rating` with gpt-s (four blocks); those of one block are taken out
    again: points lost, the upper two blocks minus the lower two. Beside it how far full fine-tuning moves
    each block's weights, in percent of their norm.
    """
    losses = [without_each_block(bench, record) for record in bench.tuned("adapter")]
    moves = [moved(bench, record) for record in bench.tuned("full")]
    bench.note("Points lost without block 1 to 4: " + ", ".join(pm(values) for values in zip(*losses)) + ".")
    bench.note("Weights moved: " + ", ".join(f"{pm(values)} %" for values in zip(*moves)) + ".")
    apart = [mean(loss[2:]) - mean(loss[:2]) for loss in losses]
    bench.note(f"Upper minus lower: {pm(apart)} points.")
    return above(apart, 0)


def without_each_block(bench, record):
    """Test points lost when the adapters of one block are taken out, block by block."""
    def measure():
        model, tokenizer, task = rebuild(bench.out / record["file"])
        found = []
        for block in model.blocks:
            kept = block.after_attention, block.after_mlp
            block.after_attention, block.after_mlp = Slot(), Slot()
            found.append(record["score"] - tasks.dev_score(model, task, task.test, tokenizer.pad))
            block.after_attention, block.after_mlp = kept
        return {"lost": found}
    return bench.kept("adapters taken out", measure, file=record["file"])["lost"]


def moved(bench, record):
    """|theta - theta_0| / |theta_0| in percent, block by block, of a saved full fine-tuning."""
    def measure():
        old, new = (load_base(record["base"])[0] for _ in range(2))
        new = load(bench.out / record["file"], new)
        pairs = [[torch.cat([p.detach().flatten() for p in block.parameters()]) for block in blocks]
                 for blocks in zip(old.blocks, new.blocks)]
        return {"moved": [100 * ((after - before).norm() / before.norm()).item() for before, after in pairs]}
    return bench.kept("weights moved", measure, file=record["file"])["moved"]


@claim("E+A", minutes=0.5)
def c25_tune_the_last_layers(bench):
    """So tune only the last layer, or the last few.

    Origin: Lee, Tang & Lin 2019: the last quarter of the layers gives 90 % of the quality. On MNLI,
    Houlsby et al. reach 92 % with the top layer alone.
    Measured: on `rating` with gpt-s, the last block of four (that quarter) and the last two, in percent
    of full fine-tuning's score, learning rates tuned; it holds from 90 % on with one block.
    Tests: tests/test_last_layer.py::test_below_the_trained_block_no_graph_is_recorded
    """
    def top(k):
        found = share(bench.tuned("last_layer", k=k), bench.tuned("full"))
        bench.note(f"k = {k}: {pm(found)} % of full; (2n + 4n x {k}/4) / 6n = {(2 + k) / 6:.2f} of its work.")
        return found
    last = top(1)
    bench.extra(top, 2)
    return above(last, 90)


@claim("E+A+U", minutes=4.5)
def c26_biases_keep_95_percent(bench):
    """Training only the bias vectors keeps 95 % of the performance.

    Origin: the survey's summary of BitFit; Ben Zaken et al. report parity on small data and a loss on
    large.
    Measured: counts at BERT's size; the key bias's gradient in a tiny model (it is dead); BitFit in
    percent of full fine-tuning on the three tasks of C4, learning rates tuned. It holds if the average
    over tasks is at least 95.
    Article: "95 %" is the survey's wording, not a result of the paper.
    Tests: tests/test_bitfit.py::test_counts_of_the_bitfit_paper,
    tests/test_bitfit.py::test_the_keys_bias_is_dead
    """
    for name in ("bert-base-cased", "bert-large-cased"):
        config, number = size(name), methods()["bitfit"]().formula(size(name))
        bench.note(f"{name}: {config.n_layer} x 11 x {config.d_model} + 2 x {config.d_model} = {number:,} = "
                   f"{100 * number / base_size(config):.4f} %.")
    model, ids = tiny()
    grads = gradients(with_delta("bitfit", model), ids)
    dead, alive = (max(g for key, g in grads.items() if part in key) for part in ("key", "query"))
    bench.note(f"Largest gradient of a key bias {dead:.0e}, of a query bias {alive:.0e}.")
    ratios = {task: share(*found.values()) for task, found in fields(bench, "bitfit", "full").items()}
    bench.note(f"Percent of full: {each(ratios, pm)}.")

    def half():
        found = share(bench.trial("bitfit", only="query_up"), bench.tuned("full"))
        bench.note(f"With half of the biases (query_up), rating: {pm(found)} %.")
    bench.extra(half)
    average = [mean(one) for one in zip(*ratios.values())]
    bench.note(f"Average over tasks: {pm(average)} %.")
    verdict = together(above(average, 95), *on_real(bench, "C26", "bitfit"))
    return verdict if dead < 1e-12 < alive else FAILS
