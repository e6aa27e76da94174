"""One training step of a real checkpoint, here and by transformers + PEFT: milliseconds, the floor, memory.

    python tests/bench/step.py --base FOLDER --data FOLDER                     a BERT and labels, or a GPT-2 and texts
    python tests/bench/step.py --base FOLDER --data FOLDER --techniques lora --json
    python tests/bench/step.py --base FOLDER --data FOLDER --memory            each side in a process of its own

Both sides take train.py's step (fused AdamW, gradient norm clipped at 1, a schedule, no dropout) on the same batches,
in turns; first they take each batch once untimed, and their first losses must agree. Theirs is taken at its best: of
its two ways to attention, SDPA and eager, the faster counts (the smaller with --memory). LoRA is PEFT's, r = 8,
alpha = 16, on query and value (GPT-2: c_attn, one matrix). In bfloat16 both compute under autocast, with what is
trained and the norms in float32; theirs is loaded in bfloat16, unless all of it is trained: that is no slower than
from float32 weights, and smaller. Both have train.py's environment (harness/boundary.py), which helps theirs as well.

The floor is the time that the matrix products of a step need at the peak, a product of 1024 x 1024 matrices that is
timed in the same turns; `share` is floor / time. Counted are the whole model's: forward, the gradients of inputs,
those of trained matrices. Here the last block computes one state a text where no more is asked for: less than that.

Memory is VmHWM after 20 steps, one of them on the longest texts, above VmRSS after the imports: torch, train.py and
what it imports later, or transformers and PEFT too; and PyTorch's compiler, which the first optimizer imports.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from harness import boundary

if __name__ == "__main__":
    boundary.begin()  # before torch is imported

import json
import logging
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import cycle
from statistics import median

import torch
import torch.nn.functional as F

from data import tasks
from data.bases import load_base
from data.tasks import Task
from deltas import attach, trainable
from harness import report
from harness.settings import Parser, distinct, positive, settings_of
from lab.timing import side_by_side
from model import Refused
from train import prepare, to_precision

SIDES = "ours", "sdpa", "eager"


def ours(settings, task):
    """(loss of a batch, what is trained), as in train.py."""
    model, _ = load_base(settings.base)
    if task.classes:
        model.classify(task.classes)
        start(model.head)
    model = attach(settings.delta.for_task(task), model.to(settings.device).eval())
    to_precision(model, settings.dtype)
    return lambda batch: tasks.loss(model, task, batch), list(trainable(model).values())


def theirs(settings, task, attention):
    """The same by transformers and PEFT."""
    transformers, peft = packages(settings.base)
    how, method = {"attn_implementation": attention}, settings.delta.name
    how["dtype"] = torch.float32 if method == "full" else getattr(torch, settings.dtype)
    if task.classes:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            settings.base, num_labels=task.classes, **how)
        start(model.classifier)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(settings.base, **how)
    if method == "lora":
        places = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"} if task.classes else {
            "target_modules": ["c_attn"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, **places))
    for name, p in model.named_parameters() if method == "bitfit" else ():
        p.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
    for module in model.to(settings.device).eval().modules():
        for p in module.parameters(recurse=False):
            if p.requires_grad or isinstance(module, torch.nn.LayerNorm):
                p.data = p.data.float()

    def loss(batch):
        ids, keep, targets = batch
        at = targets != -100
        logits = model(input_ids=ids, attention_mask=keep.long()).logits
        return F.cross_entropy((logits if task.classes else logits[at]).float(), targets[at])
    return loss, [p for p in model.parameters() if p.requires_grad]


def packages(folder):
    """transformers and peft, and of transformers the very model, which it imports late."""
    try:
        import peft
        import transformers
    except ImportError as error:
        raise Refused(f"{error.name} is not installed: pip install transformers peft") from None
    logging.disable(logging.WARNING)  # that the classifier is new
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    family = transformers.AutoConfig.from_pretrained(folder).model_type
    import_module(f"transformers.models.{family}.modeling_{family}")
    return transformers, peft


def start(head):
    """The same values on both sides, so that the losses can be compared."""
    generator = torch.Generator().manual_seed(0)
    for linear in (m for m in head.modules() if isinstance(m, torch.nn.Linear)):
        torch.nn.init.normal_(linear.weight, std=0.05, generator=generator)
        torch.nn.init.zeros_(linear.bias)


def stepper(settings, task, side, batches):
    """A function that takes train.py's step on the next of the batches, and returns its loss."""
    loss_of, parameters = ours(settings, task) if side == "ours" else theirs(settings, task, side)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    stream = cycle(batches)

    def step():
        batch = [t.to(settings.device) for t in next(stream)]
        with settings.precision():
            loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        return loss.item()
    return step


def flops(delta, config, batch):
    """Of a step's matrix products: the blocks (delta.flops), attention's scores, an LM head where it is read."""
    ids, _, targets = batch
    scores = 12 * config.n_layer * ids.shape[1] * config.d_model  # of a token: q kᵀ and softmax(...) v, there and back
    head = (6 if delta.name == "full" else 4) * config.vocab_size * config.d_model * config.causal
    return ids.numel() * (delta.flops(config, ids.shape[1])[1] + scores) + head * (targets != -100).sum().item()


def dot():
    print(".", end="", file=sys.stderr, flush=True)


def timed(settings, task, config, batches):
    """{side: ms}, with the floor in ms and the peak in GFLOP/s."""
    square = torch.randn(1024, 1024, device=settings.device).to(getattr(torch, settings.dtype))
    steps = {side: stepper(settings, task, side, batches) for side in SIDES}
    first = [[step() for _ in batches][0] for step in steps.values()]
    if max(first) > 1.02 * min(first):
        raise AssertionError(f"{SIDES} compute different things: their first losses are {first}")
    ms, _ = side_by_side(steps | {"peak": lambda: square @ square, ".": dot}, len(batches))
    peak = 2 * 1024**3 / ms["peak"]  # FLOP in a millisecond
    return ms | {"peak": peak / 1e6, "floor": median(flops(settings.delta, config, b) for b in batches) / peak}


def held(settings, task, side, batches):
    """MB at this process's peak above its imports: the model is loaded, and takes a step on each batch."""
    if side != "ours":
        packages(settings.base)
    for name in ("data.checkpoints", "methods", "safetensors.torch", "tokenizers"):
        import_module(name)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    before, step = status("VmRSS"), stepper(settings, task, side, batches)
    for _ in batches:
        step()
    return status("VmHWM") - before


def status(name):
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def in_processes(settings, task, batches):
    """{side: MB}, each side in a new process."""
    found = {}
    for side in SIDES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found[side] = process.submit(held, settings, task, side, batches).result()
        dot()
    return found


def main():
    parser = Parser("step.py", __doc__)
    parser.add_argument("--base", metavar="FOLDER", required=True, help="a checkpoint")
    parser.add_argument("--data", metavar="FOLDER", required=True, help="as for train.py")
    parser.add_argument("--techniques", default="lora,bitfit,full", help="with commas between [lora,bitfit,full]")
    parser.add_argument("--batch_size", type=positive, default=32, help="examples in a step [32]")
    parser.add_argument("--steps", type=positive, default=12, help="timed steps of each side [12]")
    parser.add_argument("--memory", action="store_true", help="MB instead of ms")
    parser.add_argument("--json", action="store_true", help="a line for each measurement instead of the table")
    args = parser.parse_args()
    packages(args.base)
    model, tokenizer, task = prepare(settings_of("lora", base=args.base, data=args.data))
    config, plain = model.config, Task(task.name, [], [], [], labels=task.labels)
    if task.words or bool(task.classes) == config.causal:
        raise Refused(f"--data {args.data}: labels without a template.json for a BERT, texts for a GPT-2")
    generator, longest = torch.Generator().manual_seed(0), sorted(task.train, key=lambda e: -len(e.ids))
    batches = [batch for _, *batch in tasks.batches(task.train, args.batch_size, tokenizer.pad, generator)]
    batches = [tasks.collate(longest[:args.batch_size], tokenizer.pad), *batches][not args.memory:]
    unit, columns = ("MB", SIDES) if args.memory else ("ms", (*SIDES, "floor", "peak"))
    if not args.json:
        print(f"{report.machine()}\nbatches of {args.batch_size}; ratio: the better of theirs over ours\n"
              f"{unit:<20}" + "".join(f"{name:>8}" for name in (*columns, "ratio", *["share"] * (unit == "ms"))))
    for name in distinct("--techniques", args.techniques.split(","), ("lora", "bitfit", "full")):
        for dtype in "float32", "bfloat16":
            settings = settings_of(name, base=args.base, dtype=dtype)
            if args.memory:
                found = in_processes(settings, plain, batches[:20])
            else:
                found = timed(settings, plain, config, batches[:args.steps])
            better = min(found["sdpa"], found["eager"])
            print(file=sys.stderr)
            if args.json:
                for side, value in ("ours", found["ours"]), ("theirs", better):
                    line = {"technique": name, "side": side, "dtype": dtype, unit.lower(): round(value, 1)}
                    print(json.dumps(line), flush=True)
                continue
            share = "" if args.memory else f"{found['floor'] / found['ours']:>8.0%}"
            print(f"{name:<10}{dtype:<10}" + "".join(f"{found[column]:>8.0f}" for column in columns)
                  + f"{better / found['ours']:>8.2f}{share}", flush=True)


if __name__ == "__main__":
    boundary.run(main)
