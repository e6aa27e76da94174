"""Mask: train k single weights, wherever in the model they stand, and keep their places.

    theta = theta_0 + S z        theta_0 (D,) frozen; z (k,) trained; S (D, k): column j is 1 at place p_j, else 0

    theta_0   o o o o o o o o o o o o o o o         all tensors end to end, a tied one once
    S z       . . 1 . . . . 2 3 . . . . 4 .         k = 4: z_1 at place 2, z_2 at 7, z_3 at 8, z_4 at 13

Which k? Those with the largest score:

    fisher       F_i = 1/N Σ_n (∂ loss(x_n) / ∂ theta_i)²        over N = 128 single training examples
    magnitude    |theta_0,i|
    random       drawn with the run's seed

Family: specification. Nothing is added: weights are chosen, one by one.
Count: k. Their places (int32, in order) are kept and not trained, so a file has 8 k bytes.
Each gradient is squared before the mean is taken: two that cancel in a batch count all the same.
S is to the wrapper of intrinsic.py what P is there, a selection for a random projection. So a step makes theta and
the gradient of all D weights, as full fine-tuning does; small is what is optimised, stored and sent.
Rate: on bert-s / cuisine 1e-2 is 5.3 points short of 3e-2; it is best on seven other pairs (lab/rates.txt).
Left out: the mean over the labels that the model would give itself (here, as in the paper's code, the right one);
diff pruning (Guo et al. 2021), which learns the mask while all D weights train.
Reference: Sung, Nair & Raffel 2021, "Training Neural Networks with Fixed Sparse Masks" (FISH mask).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from torch.func import functional_call

from data import tasks
from deltas import Delta, Refused, matrix_entries, own_parameters, setting
from methods.intrinsic import Subspace

EXAMPLES = 128  # for Fisher; the paper takes 1,024, and finds that few are enough


class Selection(nn.Module):
    """z (k,) -> S z (D,): z at its places (k,), zero everywhere else."""

    def __init__(self, places, D):
        super().__init__()
        self.d, self.D = len(places), D
        self.register_buffer("places", places)

    def forward(self, z):
        if self.places[0] < 0:
            raise Refused("by='fisher' needs a task to choose by: attach(delta.for_task(task), model)")
        return z.new_zeros(self.D).scatter(0, self.places.long(), z)                   # (D,)


# ---- a score for each weight, (D,) ----

@torch.enable_grad()
def fisher(model, task):
    """The mean of the squared gradient of the loss over single training examples, drawn by the run's seed."""
    theta = {name: p.detach().requires_grad_() for name, p in own_parameters(model).items()}
    at_theta, total = lambda *inputs, **more: functional_call(model, theta, inputs, more), 0
    drawn = torch.randperm(len(task.train), device="cpu")[:EXAMPLES].tolist()  # a file may be sorted by label
    for i in drawn:
        batch = [t.to(model.tokens.weight.device) for t in tasks.collate([task.train[i]], pad=0)]
        gradients = torch.autograd.grad(tasks.loss(at_theta, task, batch), list(theta.values()), materialize_grads=True)
        total = total + torch.cat([g.flatten() for g in gradients]) ** 2
    return total / len(drawn)


def magnitude(model, task):
    return torch.cat([p.detach().flatten() for p in own_parameters(model).values()]).abs()


def random(model, task):
    return torch.rand(len(magnitude(model, task)), device="cpu")  # there, a seed draws the same for every device


SCORES = {"fisher": fisher, "magnitude": magnitude, "random": random}


@dataclass
class Mask(Delta):
    family: ClassVar[str] = "specification"
    lr: ClassVar[float] = 1e-2       # where gradients are largest, steps are small: random places take 3e-2 to 3e-1
    lr_real: ClassVar[float] = 1e-2  # MiniLM: at most 1.4 points short on SST-2 and seven kinds of food; 3e-2: 6.2
    rates: ClassVar[tuple] = 1e-2, 3e-2, 1e-1
    paper: ClassVar[dict] = {"k": 1_675_000}  # 0.5 % of BERT-large
    task: ClassVar[object] = None  # no setting: for_task tells it, and a file has the places instead
    k: int = setting(4096, "how many weights train", least=1)
    by: str = setting("fisher", "the k largest by fisher, by magnitude, or random ones", among=tuple(SCORES))

    def for_task(self, task):
        """The same mask, which knows now by what task to choose."""
        told = replace(self)
        told.task = task
        return told

    def attach(self, model):
        D, device = sum(p.numel() for p in own_parameters(model).values()), model.tokens.weight.device
        if self.k > D:
            raise Refused(f"k={self.k}: this model has {D} weights; choose 1 to {D}")
        places = torch.full((self.k,), -1, dtype=torch.int32, device=device)  # none yet: a file may bring them
        if device.type != "meta" and (self.by != "fisher" or self.task is not None):
            places.copy_(SCORES[self.by](model, self.task).topk(self.k).indices.sort().values)
        return Subspace(model, Selection(places, D))

    def formula(self, config):
        return self.k

    def flops(self, config, text):
        return 2 * matrix_entries(config), 6 * matrix_entries(config)

    def merge(self, model):
        return model.merged()
