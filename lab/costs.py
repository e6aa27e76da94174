"""`eval.py costs`: what every technique costs at real sizes, up to GPT-3 175B.

    parameters   count() of the real model with the real delta attached; the closed formula beside it
    storage      two or four bytes a stored parameter, four for the place of a single weight (mask)
    memory       weights + gradients + Adam's two moments while training:
                 frozen x b_frozen + trained x (b_weight + b_gradient + b_moments)
    FLOPs        2 a matrix entry and token forward, 4 backward: full 6 n, a delta 4 n, the last k of L
                 blocks 2 n + 4 n k / L, where n = L (4 d² + 2 d f); each technique says its own

Not in memory: activations. They depend on batch and text, and a prompt, a prefix, LoRA or an adapter in the
lowest block saves few of them. Not in FLOPs: biases, norms, embeddings, the head, the scores of attention
among text tokens (4 T d a block forward) and what is done once a step.
GB is 10⁹ bytes throughout. `--check` compares with what the papers print (lab/papers.py).
"""

import csv
import io
import math
from dataclasses import fields

from data import files
from deltas import count, kept, matrix_entries, methods
from fastfood import next_pow2
from harness import checks
from harness.settings import Parser, distinct, value
from lab import papers
from lab.sizes import SIZES, T5, attached, base, size, t5_size
from methods.full import base_size
from model import Refused, Transformer

TEXT = 512  # tokens, for the FLOPs: a prompt is read with every text

# Bytes of: a frozen weight, a trained weight, its gradient, its two Adam moments.
RECIPES = {
    "fp32": (4, 4, 4, 8),
    "mixed": (2, 6, 2, 8),  # fp16, float32 master copy; train.py --dtype bfloat16 (2, 4, 4, 8) adds up alike
    "bf16": (2, 2, 2, 4),   # everything in 16 bits
}


# ---- what a count means in bytes and FLOPs ----

def stored_bytes(parameters, bits=16):
    return parameters * bits // 8


def training_memory(held, trained, recipe="fp32"):
    """Bytes of {weights, gradients, optimizer} with Adam: `held` parameters in all, `trained` of them trained.

    Nothing is sharded, offloaded or recomputed; no activations and no temporaries.
    """
    frozen, weight, gradient, moments = RECIPES[recipe]
    return {"weights": frozen * (held - trained) + weight * trained,
            "gradients": gradient * trained, "optimizer": moments * trained}


def projection(D, d):
    """What P (D, d) costs, dense and as stacked Fastfood: {kind: (bytes, operations of one product)}.

    Dense: float32, a multiplication and an addition an entry. Fastfood: signs in one byte, Gaussians in four,
    a permutation in one, two or four, and two Hadamard transforms of D log2 n additions, n = next_pow2(d).
    """
    n = next_pow2(d)
    index = 1 if n <= 2**8 else 2 if n <= 2**15 else 4
    return {"dense": (4 * D * d, 2 * D * d), "fastfood": ((5 + index) * D, 2 * D * int(math.log2(n)))}


def largest(card, recipe, full):
    """The most parameters that fit on a card of `card` GB, without activations; a delta is taken as free."""
    frozen, *trained = RECIPES[recipe]
    return card * 10**9 / (sum(trained) if full else frozen)


# ---- one row: one technique on one model ----

def row(name, delta):
    """All that is printed of one technique at one size, as a flat dictionary."""
    config = size(name)
    checks.sensible(delta, base(config))
    model = attached(config, delta)
    now = count(model)
    held = sum(p.numel() for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())  # a projection, or places
    # A wrapper around the whole model makes theta and the gradient of all of it, in every step. They take what two
    # moments take: in `mixed` theta_0 is in 16 bits, but what is added to it, and so the sum, is in 32.
    rebuilt = 0 if isinstance(model, Transformer) else now.base
    memory = {f"memory_{recipe}": sum(training_memory(held, now.delta, recipe).values()) + rebuilt * moments + buffers
              for recipe, (*_, moments) in RECIPES.items()}
    delta.finish(model)
    stored, places = count(model).delta, sum(t.nbytes for t in kept(model).values())
    forward, training = delta.flops(config, TEXT)
    return {"model": name, "method": delta.name, "settings": settings(delta), "base": now.base,
            "trained": now.delta, "percent": now.percent, "formula": delta.training_formula(config),
            "stored": stored, "stored_formula": delta.formula(config), "stored_fp16": stored_bytes(stored, 16) + places,
            "stored_fp32": stored_bytes(stored, 32) + places, **memory,
            "flops_forward": forward, "flops_training": training}


def settings(delta):
    """The fields that are not the technique's default, as a reader would type them."""
    return " ".join(f"{f.name}={getattr(delta, f.name)}" for f in fields(delta)
                    if getattr(delta, f.name) != f.default)


def in_paper(kind, changes):
    """The technique `kind` in its paper's setting, with `changes` {field: value} where it has such a field."""
    return kind(**kind.paper | {f.name: changes[f.name] for f in fields(kind) if f.name in changes})


# ---- tables ----

def human(number, unit="B"):
    """349.2 GB, 37.7 MB, 12 B: three decimal places to a step, one digit behind the point."""
    for step in ("", "k", "M", "G", "T", "P"):
        if number < 1000 or step == "P":
            return f"{number:.0f} {unit}" if not step else f"{number:.1f} {step}{unit}"
        number /= 1000


def counts_table(name, rows):
    config, D = size(name), rows[0]["base"]
    title = (f"{name}: {config.n_layer} blocks, width {config.d_model:,}; {D:,} parameters, "
             f"a copy {human(2 * D)} in 16 bits, {human(4 * D)} in 32")
    lines = [title, "",
             f"{'':<37}{'trained':>16}{'%':>11}{'formula':>9}{'stored':>17}{'fp16':>10}{'fp32':>10}"]
    for r in rows:
        agree = r["trained"] == r["formula"] and r["stored"] == r["stored_formula"]
        lines.append(f"{r['method']:<12}{r['settings']:<25}{r['trained']:>16,}{r['percent']:>11.5f}"
                     f"{'agrees' if agree else 'DIFFERS':>9}{r['stored']:>17,}"
                     f"{human(r['stored_fp16']):>10}{human(r['stored_fp32']):>10}")
    return lines


def costs_table(name, rows, cards):
    lines = [f"{'':<12}{'fp32':>10}{'mixed':>10}{'bf16':>10}{'forward':>13}{'training':>13}{'of 6 n':>8}"
             + "".join(f"{f'fits {card:g} GB':>17}" for card in cards)]
    for r in rows:
        memory = "".join(f"{human(r[f'memory_{recipe}']):>10}" for recipe in RECIPES)
        flops = "".join(f"{human(r[f'flops_{pass_}'], 'F'):>13}" for pass_ in ("forward", "training"))
        share = r["flops_training"] / (6 * matrix_entries(size(name)))
        lines.append(f"{r['method']:<12}{memory}{flops}{share:>8.2f}"
                     + "".join(f"{fitting(r, card):>17}" for card in cards))
    return lines


def fitting(r, card):
    """The recipes whose weights, gradients and moments fit on a card."""
    names = [recipe for recipe in RECIPES if r[f"memory_{recipe}"] <= card * 10**9]
    return "all three" if len(names) == len(RECIPES) else ", ".join(names) or "none"


ASSUMPTIONS = f"""\
Columns of the second table: weights + gradients + Adam's two moments while training, without activations.
  fp32   4 bytes a frozen parameter; trained 4 + 4 + 8: full fine-tuning 16 D, a delta 4 D + 12 T
  mixed  2 a frozen one; trained 2 + 4 (master copy) + 2 + 8, the same sum as train.py --dtype bfloat16
  bf16   2 a frozen one; trained 2 + 2 + 4
  intrinsic also holds its projection (signs, permutation, Gaussians), mask its places; and both, in a step,
  theta and its gradient.
FLOPs a token: matrices of the blocks only, n entries; forward is 2 n once merged, full training 6 n; prompt
  for texts of {TEXT} tokens. Trained is what the optimiser sees (prefix: with its MLP), stored what is kept."""


def t5_table():
    lengths = (1, 5, 20, 50, 100, 150)
    lines = ["T5 v1.1, prompt tuning, P d parameters, by formula", "",
             f"{'':<8}{'parameters':>16}" + "".join(f"{f'P={P}':>10}" for P in lengths) + f"{'% at 100':>12}"]
    for name, (d, *_) in T5.items():
        D = t5_size(name)
        lines.append(f"{name:<8}{D:>16,}" + "".join(f"{P * d:>10,}" for P in lengths)
                     + f"{10000 * d / (D + 100 * d):>12.5f}")
    return lines


def projection_table(names, d=1000):
    lines = [f"Intrinsic's projection at d = {d:,}, one product P z: dense O(D d), Fastfood O(D log d)", "",
             f"{'':<20}{'dense':>14}{'FLOPs':>14}{'Fastfood':>14}{'additions':>14}"]
    for name in names:
        dense, fast = projection(base_size(size(name)), d).values()
        lines.append(f"{name:<20}{human(dense[0]):>14}{human(dense[1], 'F'):>14}{human(fast[0]):>14}"
                     f"{human(fast[1], ''):>14}")
    return lines


def cards_table(cards):
    kinds = [(full, recipe) for full in (True, False) for recipe in ("fp32", "bf16")]
    titles = (f"{'full' if full else 'a delta'}, {recipe}" for full, recipe in kinds)
    lines = ["The largest model that a card can train, in parameters, before any activation", "",
             f"{'':<10}" + "".join(title.rjust(17) for title in titles)]
    for card in cards:
        lines.append(f"{card:>6g} GB " + "".join(f"{human(largest(card, recipe, full), ''):>17}"
                                                 for full, recipe in kinds))
    return lines


# ---- the command line ----

def parser():
    parser = Parser("eval.py costs", __doc__)
    parser.add_argument("--model", nargs="+", choices=[*SIZES, "all"], metavar="NAME",
                        help=f"{', '.join(SIZES)} [all]")
    parser.add_argument("--method", nargs="+", choices=methods(), metavar="NAME",
                        help=f"{', '.join(methods())} [all]")
    parser.add_argument("--set", nargs="+", metavar="FIELD=VALUE",
                        help="fields of the methods that have them, such as rank=8 [as in the papers]")
    parser.add_argument("--card", nargs="+", type=float, metavar="GB",
                        help="memory of the cards that it should fit on [24 80]")
    parser.add_argument("--csv", metavar="FILE", help="write all numbers as CSV too")
    parser.add_argument("--check", action="store_true", help="the papers' printed numbers next to ours")
    return parser


def changes(pairs, names):
    """["rank=8"] -> {"rank": 8}; every field must belong to one of the techniques `names`."""
    known, found = {f.name for method in names for f in fields(methods()[method])}, {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name not in known or not equals:
            raise Refused(f"--set {files.shown(pair)}: " + (
                f"write FIELD=VALUE, the field one of {', '.join(sorted(known))}" if known else
                f"{', '.join(names)} has no fields"))
        if name in found:
            raise Refused(f"--set {pair}: {name} is set already")
        found[name] = value(name, text)
    return found


def main(argv):
    args = parser().parse_args(argv)
    if args.csv:
        checks.writable_file("--csv", args.csv)
    if args.check:
        if void := [name for name in ("model", "method", "set", "card") if getattr(args, name) is not None]:
            raise Refused(f"--check and --{void[0]}: the papers' numbers have settings of their own; name one of them")
        found = papers.rows()
        print("\n".join(papers.table(found)))
        rows = papers.plain(found)
    else:
        rows = printed(*asked(args))
    if args.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        files.replace(args.csv, lambda part: part.write_text(text.getvalue(), encoding="utf-8", newline=""))


def asked(args):
    """(names of models, techniques, GB of cards) of a command line."""
    names = distinct("--model", args.model or ["all"])
    kinds, cards = distinct("--method", args.method or list(methods())), distinct("--card", args.card or [24.0, 80.0])
    if unfit := [card for card in cards if not 0 < card < math.inf]:
        raise Refused(f"--card {unfit[0]:g}: the memory of a card is a number of GB above 0")
    changed = changes(args.set or [], kinds)
    return list(SIZES) if "all" in names else names, [in_paper(methods()[kind], changed) for kind in kinds], cards


def printed(names, deltas, cards):
    """Print all tables; the rows."""
    rows = []
    for name in names:
        new = [row(name, delta) for delta in deltas]
        print("\n".join([*counts_table(name, new), "", *costs_table(name, new, cards), "", ""]), flush=True)
        rows += new
    print("\n".join([ASSUMPTIONS, "", "", *cards_table(cards), "", "", *projection_table(names), "", "",
                     *t5_table()]))
    return rows
