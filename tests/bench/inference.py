"""What a delta costs at inference: time of a forward pass, as a ratio to the plain base.

    python tests/bench/inference.py                     gpt-s, 32 tokens, batches of 1 and of 16
    python tests/bench/inference.py --d_model 768 --n_layer 12 --tokens 128 --rounds 15

Counted, a token of the base costs 24 d² operations a block (2 a weight, f = 4 d), and

    adapter           8 d m more: a share of m / (3 d), but four small layers more in a row, which wait
    prompt            P tokens more in every layer: about (P + T) / T times the base
    prefix            P keys more in every attention: 4 d P a token and block, no layer more
    LoRA, unmerged    4 d r a matrix more; merged: the base's own graph, so 1

Every round times the base and all others in turn; a row is the median over rounds of the ratio to the same
round's base. Bare times are not printed: they say more about the machine and its other work.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from deltas import attach, merge
from methods.adapter import Adapter
from methods.lora import LoRA
from methods.prefix import Prefix
from methods.prompt import Prompt
from model import Config, Transformer

DELTAS = {"base": None, "base, again (the noise)": None,
          "adapter, m = 8": Adapter(bottleneck=8), "adapter, m = 64": Adapter(bottleneck=64),
          **{f"prompt, P = {P}": Prompt(length=P) for P in (8, 32, 100)},
          **{f"prefix, P = {P}": Prefix(length=P) for P in (8, 32, 100)},
          "lora, r = 8, unmerged": LoRA(rank=8), "lora, r = 8, merged": LoRA(rank=8)}


def build(base):
    """{name: model}, each on a copy of `base`, as it would be used: the prefix's MLP dropped."""
    models = {}
    for name, delta in DELTAS.items():
        model = copy.deepcopy(base)
        if delta is not None:
            model = attach(delta, model)
            delta.finish(model)
        models[name] = merge(model) if name.endswith(" merged") else model
    return models


@torch.no_grad()
def ratios(models, ids, rounds):
    """{name: median over rounds of time / the same round's time of the base}."""
    times = {name: [] for name in models}
    for i in range(rounds + 2):                # the first two warm up
        for name, model in models.items():
            start = time.perf_counter()
            model(ids)
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t / b for t, b in zip(times[name], times["base"])) for name in models}


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    for flag, default in (("d_model", 96), ("n_layer", 4), ("n_head", 4), ("tokens", 32), ("rounds", 100)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = build(Transformer(Config(1024, max(96, args.tokens), args.d_model, args.n_layer, args.n_head,
                                      4 * args.d_model)))
    batches = (1, 16)
    columns = [ratios(models, torch.randint(1024, (batch, args.tokens)), args.rounds) for batch in batches]
    print(f"L = {args.n_layer}, d = {args.d_model}, {args.tokens} tokens, 1 CPU thread, {args.rounds} rounds")
    print(f"{'time of a forward pass / base':32}" + "".join(f"{f'batch {batch}':>10}" for batch in batches))
    for name in models:
        print(f"{name:32}" + "".join(f"{column[name]:10.2f}" for column in columns))


if __name__ == "__main__":
    main()
