"""Plain PyTorch: patch a network, train it, and measure another choice on the training backward."""

import torch
from torch import nn

from nslightning import Jacobians, patch
from nslightning.probes.measured_backward import measured_backward

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 13 * 13, 10))
images, labels = torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,))

print(patch(model, Jacobians(relu=0.0, max_pool="minimal")))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    with measured_backward(model, {"stock": Jacobians()}) as measured:
        with torch.autocast("cpu", torch.bfloat16):  # in 8 bits, values that differ become equal: ties
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
    optimizer.step()
    print(f"relative divergence from stock PyTorch's gradient: {measured['stock'].relative:.3g}")
