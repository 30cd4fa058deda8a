"""A loop as timm's train.py has it: a model and an optimizer by name, autocast in bfloat16, a cosine schedule."""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from nslightning import Jacobians, patch
from nslightning.probes.measured_backward import measured_backward

torch.manual_seed(0)
model = timm.create_model("resnet18", num_classes=10)
report = patch(model, Jacobians(relu=0.0, max_pool="minimal"))  # after create_model, before torch.compile and DDP
print(report.summary())

optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9)
scheduler = CosineLRScheduler(optimizer, t_initial=2)
loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
images, labels = torch.randn(4, 3, 64, 64), torch.randint(0, 10, (4,))
for update in range(2):
    optimizer.zero_grad()
    with measured_backward(model, {"stock": Jacobians()}) as measured:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(model(images), labels)
        loss.backward()
    optimizer.step()
    scheduler.step_update(update)
    print(f"relative divergence from stock PyTorch's gradient: {measured['stock'].relative:.3g}")
