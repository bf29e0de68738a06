"""Training losses of ResNet-110 on digits, as a process of its own, so that its number of threads is its own too.

python curves.py BACKEND THREADS STEPS DTYPE FACTOR prints the loss of each step as JSON. FACTOR multiplies the
gradient of every batch norm's weight: 1 for the true gradient.
"""

import json
import sys

import torch
from torch.nn.functional import cross_entropy

from fused_preact import models
from fused_preact.train.data import Batches, digits


def losses(backend: str, threads: int, steps: int, dtype: torch.dtype, factor: float) -> list[float]:
    """SGD at the paper's rate on batches of 8, everything from seed 0."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = models.create("resnet110", backend=backend).to(dtype=dtype, memory_format=torch.channels_last)
    for module in model.modules():
        if factor != 1 and isinstance(module, torch.nn.BatchNorm2d):
            module.weight.register_hook(lambda gradient: gradient * factor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    batches = Batches(digits(), batch_size=8, seed=0, padding=4, flip=False, device=torch.device("cpu"))
    curve = []
    for iteration in range(steps):
        images, labels = batches.at(iteration)
        loss = cross_entropy(model(images.to(dtype)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


if __name__ == "__main__":
    name, count, steps, dtype, factor = sys.argv[1:]
    print(json.dumps(losses(name, int(count), int(steps), getattr(torch, dtype), float(factor))))
