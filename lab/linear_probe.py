"""A linear probe: logistic regression on the frozen base's last states.

    p(label | text) = softmax(W h + b)

    h (D,)    the state where the answer is asked for; where a Classifier answers, what it reads: BERT's pooler of it
    h (D,)    with `average`: the mean of the states of all the text's tokens

What the base knows already, read off with C (D + 1) parameters and without touching it. The strength of the L2
penalty is chosen on dev.
"""

import torch
import torch.nn.functional as F

import train
from data import tasks
from harness.settings import settings_of
from model import Classifier


def probe(runs, seed=0, average=False, **choice):
    """The record of a probe, kept or measured now; the same fields as a run's where they apply."""
    settings = settings_of("full", seed=seed, **choice)
    key = {name: value for name, value in settings.key.items() if name not in ("method", "lr", "steps", "epochs")}
    return runs.kept("linear probe", lambda: fitted(settings, average), average=average, **key)


def fitted(settings, average=False, depth=None):
    """{score, dev_score, delta_params} of the regression whose penalty is best on dev, on top of `depth` blocks."""
    torch.manual_seed(settings.seed)
    model, tokenizer, task = train.prepare(settings)
    model.blocks = model.blocks[:depth]
    (train_x, train_y), dev, test = (states(model, task, examples, tokenizer.pad, average)
                                     for examples in (task.train, task.dev, task.reported))
    centre, scale = train_x.mean(0), train_x.std(0, correction=min(1, len(train_x) - 1)) + 1e-6
    best = None
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1):
        layer = fit((train_x - centre) / scale, train_y, len(task.labels), penalty)
        right = accuracy(layer, *dev, centre, scale)
        if best is None or right > best[0]:
            best = right, layer
    return {"score": accuracy(best[1], *test, centre, scale), "dev_score": best[0],
            "delta_params": sum(p.numel() for p in best[1].parameters())}


@torch.no_grad()
def states(model, task, examples, pad, average=False):
    """(N, D) states where targets stand, or of the texts on average, and (N,) the number of the right label."""
    head, model.head = model.head, torch.nn.Identity()
    device, found = next(model.parameters()).device, []
    for _, ids, keep, targets in tasks.batches(examples, 64, pad):
        at = targets != -100
        wanted = targets[at]
        if task.words is not None:
            wanted = (wanted[:, None] == torch.tensor(task.words)).int().argmax(dim=1)
        ids, keep, at = (t.to(device) for t in (ids, keep, at))
        if average:
            x = model(ids, keep) * keep[:, :, None]                                    # (B, T, D), zero on pads
            x = x.sum(dim=1) / keep.sum(dim=1, keepdim=True)                           # (B, D)
        else:
            x = model(ids, keep, at=at)                                                # (B, D)
            x = model.pooler(x) if isinstance(head, Classifier) and model.pooler is not None else x
        found.append((x.cpu(), wanted))
    model.head = head
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def fit(x, y, classes, penalty):
    layer = torch.nn.Linear(x.shape[1], classes)
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + penalty * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer


@torch.no_grad()
def accuracy(layer, x, y, centre, scale):
    return 100 * (layer((x - centre) / scale).argmax(dim=1) == y).float().mean().item()
