"""Hugging Face Accelerate: patch before ``prepare``, measure around ``accelerator.backward``."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nslightning import Jacobians, patch
from nslightning.probes.measured_backward import measured_backward

torch.manual_seed(0)
images, labels = torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 13 * 13, 10))
patch(network, Jacobians.preset("jax"))  # before prepare, which wraps the network

accelerator = Accelerator(cpu=True, mixed_precision="bf16")
model, optimizer, batches = accelerator.prepare(
    network, torch.optim.SGD(network.parameters(), lr=0.1), DataLoader(TensorDataset(images, labels), batch_size=32)
)
for x, y in batches:
    optimizer.zero_grad()
    with measured_backward(network, {"minimal": Jacobians(max_pool="minimal")}) as measured:
        accelerator.backward(nn.functional.cross_entropy(model(x), y))
    optimizer.step()
    accelerator.print(f"relative divergence of the minimal choice: {measured['minimal'].relative:.3g}")
