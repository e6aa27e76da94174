"""`eval.py costs`: what every technique costs at real sizes, counted on the meta device, up to GPT-3 175B.

    parameters   count() of the real model with the real delta attached; the closed formula beside it
    storage      two or four bytes a stored number
    memory       weights + gradients + Adam's two moments while training:
                 frozen x b_frozen + trained x (b_weight + b_gradient + b_moments)
    FLOPs        2 a matrix entry and token forward, 4 backward: full 6 n, a delta 4 n, the last k of L
                 blocks 2 n + 4 n k / L, where n = L (4 d² + 2 d f)

A tensor on the meta device has a shape and no numbers, so 175 billion parameters take no memory. T5 is no
model of ours, it is counted by formula. Activations are in none of the memory figures: they depend on batch
and text, and a prompt, a prefix, LoRA or an adapter in the lowest block saves few of them.
GB is 10⁹ bytes throughout. `--check` compares with what the papers print (lab/papers.py).
"""

import argparse
import csv
import math
from dataclasses import fields

import torch
from torch.overrides import TorchFunctionMode

from deltas import attach, count, methods
from fastfood import next_pow2
from lab.trials import value
from model import Config, Transformer


def gpt(d, L, H, n_ctx=1024):
    return Config(vocab_size=50257, n_ctx=n_ctx, d_model=d, n_layer=L, n_head=H, d_ff=4 * d)


def bert(d, L, H, vocab_size, n_ctx=512, n_types=2):
    """The encoder as it is fine-tuned: with its pooler, without the head of its pretraining."""
    return Config(vocab_size=vocab_size, n_ctx=n_ctx, d_model=d, n_layer=L, n_head=H, d_ff=4 * d,
                  causal=False, norm_first=False, activation="gelu", eps=1e-12, n_types=n_types,
                  lm_head="none", pooler=True)


SIZES = {
    "gpt2": gpt(768, 12, 12),
    "gpt2-medium": gpt(1024, 24, 16),
    "gpt2-large": gpt(1280, 36, 20),
    "gpt2-xl": gpt(1600, 48, 25),
    "bert-base-cased": bert(768, 12, 12, 28996),
    "bert-base-uncased": bert(768, 12, 12, 30522),
    "bert-large-cased": bert(1024, 24, 16, 28996),
    "bert-large-uncased": bert(1024, 24, 16, 30522),
    "roberta-base": bert(768, 12, 12, 50265, n_ctx=514, n_types=1),
    "roberta-large": bert(1024, 24, 16, 50265, n_ctx=514, n_types=1),
    "gpt3-175b": gpt(12288, 96, 96, n_ctx=2048),
}

# T5 v1.1: width, width of the gated mlp, blocks in each of the two stacks, heads of 64.
T5 = {"small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16),
      "xl": (2048, 5120, 24, 32), "xxl": (4096, 10240, 24, 64)}

# A paper's setting where it is not the default, which is chosen for the little world.
PAPERS = {
    "last_layer": {"k": 2},        # Li & Liang: FT-top2
    "adapter": {"bottleneck": 64},  # Houlsby et al.: the fixed size of their table 1
    "prompt": {"length": 100},     # Lester et al.
    "prefix": {"length": 10, "hidden": 512},  # Li & Liang: table-to-text
    "lora": {"rank": 4},           # Hu et al.: GPT-2, and the 35 MB of GPT-3
    "intrinsic": {"dim": 20000},   # Aghajanyan et al.: their code's setting
}

# Bytes of: a frozen weight, a trained weight, its gradient, its two Adam moments.
RECIPES = {
    "fp32": (4, 4, 4, 8),
    "mixed": (2, 6, 2, 8),  # fp16, float32 master copy; train.py --dtype bfloat16 (2, 4, 4, 8) adds up alike
    "bf16": (2, 2, 2, 4),   # everything in 16 bits
}


# ---- counting: the real code on the meta device ----

def size(name):
    """The Config of a model in SIZES."""
    if name not in SIZES:
        raise ValueError(f"model {name!r}: choose from {', '.join(SIZES)}")
    return SIZES[name]


class ShapesOnly(TorchFunctionMode):
    """In here the calls that take most of the time on meta only give what has the right shape."""

    SAME = "normal_", "trunc_normal_", "kaiming_uniform_", "uniform_", "tanh"
    SHAPES = dict.fromkeys(SAME, lambda *x, tensor=None, **_: x[0] if x else tensor) | {
        "randn": torch.empty,
        "linear": lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], len(weight)),
        "embedding": lambda ids, table, *_, **__: table.new_empty(*ids.shape, table.shape[1]),
        "linalg_pinv": lambda x: x.mT,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        call = self.SHAPES.get(getattr(function, "__name__", ""), function)
        return call(*args, **kwargs or {})


def attached(config, delta):
    """A new model of this shape on the meta device with `delta` attached."""
    with torch.device("meta"), ShapesOnly():
        return attach(delta, Transformer(config))


def counted(name, delta, finish=False):
    """The Count of `delta` on the model `name`: what is trained, or with `finish` what is stored."""
    model = attached(size(name), delta)
    if finish:
        delta.finish(model)
    return count(model)


def t5_size(name):
    """Parameters of T5 v1.1, no biases, untied head, one table of relative positions a stack."""
    d, f, L, H = T5[name]
    inner = 64 * H
    encoder = L * (4 * d * inner + 3 * d * f + 2 * d)
    decoder = L * (8 * d * inner + 3 * d * f + 3 * d)
    return 2 * 32128 * d + encoder + decoder + 2 * (32 * H + d)


# ---- what a count means in bytes and FLOPs ----

def stored_bytes(numbers, bits=16):
    return numbers * bits // 8


def training_memory(held, trained, recipe="fp32"):
    """Bytes of {weights, gradients, optimizer} with Adam: `held` numbers in all, `trained` of them trained.

    Assumptions: RECIPES; nothing is sharded, offloaded or recomputed; no activations and no temporaries.
    In fp32 this is 16 D for full fine-tuning and 4 D + 12 T for a delta of T.
    """
    frozen, weight, gradient, moments = RECIPES[recipe]
    return {"weights": frozen * (held - trained) + weight * trained,
            "gradients": gradient * trained, "optimizer": moments * trained}


def flops_per_token(config, delta, text=512):
    """FLOPs a token of a text of `text` tokens: {forward, training}; forward merged where that is possible.

    Every matrix entry costs 2 forward, 2 for the gradient of its input, 2 for its own. A frozen one saves the
    last; below the lowest trained block the second too. Left out: biases, norms, embeddings and the head, the
    scores of attention among text tokens (4 T d a block forward) and what is done once a step.
    """
    L, d, f = config.n_layer, config.d_model, config.d_ff
    n = L * (4 * d * d + 2 * d * f)
    added = {"adapter": lambda: 4 * L * d * delta.bottleneck,    # two pairs of matrices a block
             "prefix": lambda: delta.formula(config),            # each row: one product with q, one with w
             "lora": lambda: delta.formula(config)}.get(delta.name, int)()
    longer = 1 + delta.length / text if delta.name == "prompt" else 1  # soft tokens pass through every layer
    training = {"full": 6 * n, "intrinsic": 6 * n,
                "last_layer": 2 * n + 4 * n * getattr(delta, "k", 0) // L}.get(delta.name, 4 * n + 6 * added)
    forward = 2 * n if delta.name == "lora" else 2 * (n + added)
    return {"forward": forward * longer, "training": training * longer}


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
    """All numbers of one technique at one size, as a flat dictionary."""
    config = size(name)
    model = attached(config, delta)
    now = count(model)
    held = sum(p.numel() for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    with ShapesOnly():
        delta.finish(model)
    kept = count(model).delta
    memory = {}
    for recipe, (frozen, *_) in RECIPES.items():
        # Intrinsic keeps a projection, and in every step makes theta and the gradient of all of it.
        working = 2 * now.base * frozen + buffers if delta.name == "intrinsic" else 0
        memory[f"memory_{recipe}"] = sum(training_memory(held, now.delta, recipe).values()) + working
    flops = flops_per_token(config, delta)
    return {"model": name, "method": delta.name, "settings": settings(delta), "base": now.base,
            "trained": now.delta, "percent": now.percent, "formula": delta.training_formula(config),
            "stored": kept, "stored_formula": delta.formula(config), "stored_fp16": stored_bytes(kept, 16),
            "stored_fp32": stored_bytes(kept, 32), **memory,
            "flops_forward": flops["forward"], "flops_training": flops["training"]}


def settings(delta):
    """The fields that are not the technique's default, as a reader would type them."""
    plain = type(delta)()
    return " ".join(f"{f.name}={getattr(delta, f.name)}" for f in fields(delta)
                    if getattr(delta, f.name) != getattr(plain, f.name))


def chosen(kind, changes):
    """The technique `kind` in its paper's setting, with `changes` {field: value} where it has such a field."""
    own = {f.name: changes[f.name] for f in fields(kind) if f.name in changes}
    return kind(**PAPERS.get(kind().name, {}) | own)


# ---- tables ----

def human(number, unit="B"):
    """349.2 GB, 37.7 MB, 12 B: three decimal places to a step, one digit behind the point."""
    for step in ("", "k", "M", "G", "T", "P"):
        if number < 1000 or step == "P":
            return f"{number:.0f} {unit}" if not step else f"{number:.1f} {step}{unit}"
        number /= 1000


def counts_table(name, rows):
    config, D = size(name), rows[0]["base"]
    lines = [f"{name}: {config.n_layer} blocks, width {config.d_model:,}; {D:,} parameters, "
             f"a copy {human(2 * D)} in 16 bits, {human(4 * D)} in 32", "",
             f"{'':<37}{'trained':>16}{'%':>11}{'formula':>9}{'stored':>17}{'fp16':>10}{'fp32':>10}"]
    for r in rows:
        agree = r["trained"] == r["formula"] and r["stored"] == r["stored_formula"]
        lines.append(f"{r['method']:<12}{r['settings']:<25}{r['trained']:>16,}{r['percent']:>11.5f}"
                     f"{'agrees' if agree else 'DIFFERS':>9}{r['stored']:>17,}"
                     f"{human(r['stored_fp16']):>10}{human(r['stored_fp32']):>10}")
    return lines


def costs_table(rows, cards):
    lines = [f"{'':<12}{'fp32':>10}{'mixed':>10}{'bf16':>10}{'forward':>13}{'training':>13}{'of 6 n':>8}"
             + "".join(f"{f'fits {card:g} GB':>17}" for card in cards)]
    for r in rows:
        full = flops_per_token(size(r["model"]), methods()["full"]())["training"]
        memory = "".join(f"{human(r[f'memory_{recipe}']):>10}" for recipe in RECIPES)
        flops = "".join(f"{human(r[f'flops_{pass_}'], 'F'):>13}" for pass_ in ("forward", "training"))
        lines.append(f"{r['method']:<12}{memory}{flops}{r['flops_training'] / full:>8.2f}"
                     + "".join(f"{fitting(r, card):>17}" for card in cards))
    return lines


def fitting(r, card):
    """The recipes whose weights, gradients and moments fit on a card."""
    names = [recipe for recipe in RECIPES if r[f"memory_{recipe}"] <= card * 10**9]
    return "all three" if len(names) == len(RECIPES) else ", ".join(names) or "none"


ASSUMPTIONS = """\
Columns of the second table: weights + gradients + Adam's two moments while training, without activations.
  fp32   4 bytes a frozen number; trained 4 + 4 + 8: full fine-tuning 16 D, a delta 4 D + 12 T
  mixed  2 a frozen one; trained 2 + 4 (master copy) + 2 + 8, the same sum as train.py --dtype bfloat16
  bf16   2 a frozen one; trained 2 + 2 + 4
  intrinsic also holds its projection (signs, permutation, Gaussians) and, in a step, theta and its gradient.
FLOPs a token: matrices of the blocks only, n entries; forward is 2 n once merged, full training 6 n; prompt
  for texts of 512 tokens. Trained is what the optimiser sees (prefix: with its MLP), stored what is kept."""


def t5_table():
    lengths = (1, 5, 20, 50, 100, 150)
    lines = ["T5 v1.1, prompt tuning, P d numbers, by formula", "",
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
        dense, fast = projection(methods()["full"]().formula(size(name)), d).values()
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
    parser = argparse.ArgumentParser(prog="eval.py costs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=[*SIZES, "all"], default=["all"], metavar="NAME",
                        help=f"{', '.join(SIZES)} [all]")
    parser.add_argument("--method", nargs="+", choices=methods(), default=list(methods()), metavar="NAME",
                        help=f"{', '.join(methods())} [all]")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE",
                        help="fields of the methods that have them, such as rank=8 [as in the papers]")
    parser.add_argument("--card", nargs="+", type=float, default=[24, 80], metavar="GB",
                        help="memory of the cards that it should fit on [24 80]")
    parser.add_argument("--csv", metavar="FILE", help="write all numbers as CSV too")
    parser.add_argument("--check", action="store_true", help="the papers' printed numbers next to ours")
    return parser


def changes(pairs):
    """["rank=8"] -> {"rank": 8}; every field must belong to some technique."""
    known, found = {f.name for kind in methods().values() for f in fields(kind)}, {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name not in known or not equals:
            raise ValueError(f"--set {pair}: write FIELD=VALUE, the field one of {', '.join(sorted(known))}")
        found[name] = value(name, text)
    return found


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main(argv):
    args = parser().parse_args(argv)
    if args.check:
        from lab import papers  # it counts with this module
        rows = papers.rows()
        print("\n".join(papers.table(rows)))
        if args.csv:
            write_csv(args.csv, papers.plain(rows))
        return
    names = list(SIZES) if "all" in args.model else args.model
    deltas = [chosen(methods()[method], changes(args.set)) for method in args.method]
    everything = []
    for name in names:
        rows = [row(name, delta) for delta in deltas]
        everything += rows
        print("\n".join([*counts_table(name, rows), "", *costs_table(rows, args.card), "", ""]), flush=True)
    print("\n".join([ASSUMPTIONS, "", "", *cards_table(args.card), "", "", *projection_table(names), "", "",
                     *t5_table()]))
    if args.csv:
        write_csv(args.csv, everything)
