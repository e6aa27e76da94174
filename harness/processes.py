"""Several processes on one run: `torchrun --nproc_per_node=2 train.py ...`, with torch.distributed as it is.

    all alike      the whole model, the same batches in the same order; at the start the first one's delta
    of a batch     process r of n takes the rows r, r + n, r + 2 n, ...; of dev and test the examples likewise
    what travels   after the backward pass the gradient of the delta, and of nothing that is frozen:

        gradient = sum over r of  share_r gradient_r        share_r: r's part of the targets in the batch

One all_reduce of a flat buffer, in the open, and no DistributedDataParallel: that one wraps the model, means over
processes where a loss is a mean over targets, and has to be told if a batch leaves a parameter out. A sum of gradients
does not ask what a technique has put into the model or around it.

Without torchrun each function does nothing: a batch is whole, a sum is its one summand.
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist

from deltas import kept, trainable
from model import Refused


def begin(device):
    """Join the processes that torchrun has started, by NCCL on GPUs, else by gloo; only the first one prints."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return
    if device == "cuda":
        if (place := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
            raise Refused(f"--nproc_per_node: {torch.cuda.device_count()} at most, as many as GPUs; or --device cpu")
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    if not first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def number():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if number() > 1 else 0


def first():
    """Is this the process that prints and writes?"""
    return rank() == 0


def start(model, say):
    """All go on from the delta of the first process; Refused where the base is not the first one's."""
    if number() == 1:
        return
    if model.base_fingerprint != from_first(lambda: model.base_fingerprint):
        raise Refused(f"process {rank()}: its base is not the one that the first process has")
    for tensor in (trainable(model) | kept(model)).values():
        dist.broadcast(tensor.data, 0)
    size = sum(p.nbytes for p in trainable(model).values())
    say(f"processes  {number()}, each with its part of every batch; {size / 1e6:.2f} MB of gradients travel a step")


def part(batch):
    """This process's rows of a batch (ids, keep, targets), and their share of its targets.

    A process for which there is no row takes the first one, and counts it as nothing.
    """
    if number() == 1:
        return batch, 1.0
    idle = rank() >= len(batch[0])
    rows = [t[:1] if idle else t[rank()::number()] for t in batch]
    here, everywhere = ((targets != -100).sum().item() for targets in (rows[-1], batch[-1]))
    return rows, 0.0 if idle else here / everywhere


@torch.no_grad()
def add_up(loss, share, parameters):
    """Give each parameter the gradient of the whole batch, and return the loss of it, both made of all the parts.

    What no process used has no gradient afterwards either.
    """
    if number() == 1:
        return loss
    parameters = list(parameters)
    used = loss.new_tensor([p.grad is not None for p in parameters])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = share * torch.cat([t.flatten() for t in (loss, used, *gradients)])
    dist.all_reduce(flat)
    loss, used, *gradients = flat.split([1, len(used), *(p.numel() for p in parameters)])
    for p, count, gradient in zip(parameters, used.tolist(), gradients):
        p.grad = gradient.view_as(p) if count > 0 else None
    return loss


# ---- what is shared out and collected ----

def mine(examples):
    """This process's part of a list."""
    return examples[rank()::number()]


def total(counts):
    """A list of numbers, added up over all processes."""
    if number() == 1:
        return counts
    summed = torch.tensor(counts, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(summed)
    return summed.tolist()


def shared_out(answer, examples):
    """answer(examples), a list of one entry each, for which every process answers its part."""
    if number() == 1:
        return answer(examples)
    parts, found = [None] * number(), [None] * len(examples)
    dist.all_gather_object(parts, answer(mine(examples)))
    for r, answers in enumerate(parts):
        found[r::number()] = answers
    return found


def from_first(look):
    """What look() returns in the first process, where alone it is called: a file need not be everywhere."""
    found = [look() if first() else None]
    if number() > 1:
        dist.broadcast_object_list(found)
    return found[0]
