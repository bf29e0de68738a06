"""Train a pre-activation ResNet on scikit-learn's digits in a plain PyTorch loop.

The network is the only thing that comes from fused_preact's side of the training: nothing in the loop is special.
"""

import torch
from torch.nn.functional import cross_entropy

from fused_preact import models
from fused_preact.train.data import Batches, digits

torch.manual_seed(0)
model = models.create("resnet20", num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
batches = Batches(digits(), batch_size=32, seed=0, padding=4, flip=False, device=torch.device("cpu"))

for iteration in range(200):
    if iteration in (100, 150):
        optimizer.param_groups[0]["lr"] /= 10
    images, labels = batches.at(iteration)
    loss = cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if iteration % 20 == 19:
        print(f"iteration {iteration + 1}: loss {loss.item():.4f}")

model.eval()
with torch.no_grad():
    correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in batches.held_out())
print(f"held-out accuracy {correct / len(batches.test):.2%}")
