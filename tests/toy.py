"""A module and data that train in milliseconds, for the engine tests and the processes they start."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from jahubert.train import ranks
from jahubert.train.engine import Loss
from jahubert.train.masking import generator
from jahubert.train.sampler import Sampler


@dataclass
class Batch:
    x_BD: torch.Tensor

    def to(self, device):
        return Batch(self.x_BD.to(device))


class Data:
    def __init__(self, per_step=2, rows=23, bad=None):
        length = 16000 + 400 * np.arange(rows)
        self.sampler = Sampler(np.arange(rows), length, micro_seconds=6.0, per_step=per_step, seed=3)
        self.bad = bad

    def name(self, row):
        return f"row {row}"

    def load(self, micro):
        x = np.stack([generator(row, micro.epoch).standard_normal(5) for row in micro.rows])
        if self.bad in micro.rows:
            x[:] = np.nan
        return Batch(torch.from_numpy(x.astype(np.float32)))


class Toy(nn.Module):
    seed = 5
    skips = False

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, 1))

    @property
    def blocks(self):
        return [self.net[0]]

    def forward(self, batch, step):
        target = batch.x_BD.pow(2).sum(1)
        loss = (self.net(batch.x_BD)[:, 0] - target).pow(2).sum()
        return Loss(loss, len(target), {"rows": len(target), "seconds": 1.0})

    def metrics(self, sums, count):
        return {"loss": sums["total"] / count}


class HeadFirst(Toy):
    """As in a fine-tuning, the first steps leave all but the last layer without a gradient."""

    skips = True
    head_only = 15

    def forward(self, batch, step):
        with torch.set_grad_enabled(torch.is_grad_enabled() and step >= self.head_only):
            hidden = self.net[:3](batch.x_BD)
        target = batch.x_BD.pow(2).sum(1)
        loss = (self.net[3](hidden)[:, 0] - target).pow(2).sum()
        return Loss(loss, len(target), {"rows": len(target), "seconds": 1.0})


def evaluate(module, data):
    """Summed squared answers, over all processes; they see different numbers of batches."""
    loss = 0.0
    for micro in data.sampler.epoch(0).share(ranks.rank(), ranks.world()):
        loss += float(module.net(data.load(micro).x_BD).square().sum())
    return {"loss": ranks.total({"loss": loss}, torch.device("cpu"))["loss"]}
