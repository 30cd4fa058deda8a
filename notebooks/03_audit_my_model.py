# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Audit my own model
#
# A small residual network whose last batch norm of each block starts at 0, as timm's do.

# %%
import torch
from torch import nn

from nslightning.probes.audit import audit
from nslightning.report.audit_text import table


class Block(nn.Module):
    """Two convolutions beside the identity; the second one's batch norm starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block."""
        return self.act(x + self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))


torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3),
    nn.ReLU(),
    nn.MaxPool2d(2),
    Block(8),
    Block(8),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(8, 5),
)
batches = [(torch.randn(8, 3, 32, 32), None)]
audited = audit(model, batches, dtypes=["bf16", "32"])
print(table(audited))

# %% [markdown]
# `3.act` and `4.act` tie in float32, too: where a ReLU made the block's input 0, the branch adds exactly 0. There the
# choice matters. With the batch norms' weights at 1, no tie matters in float32:

# %%
for block in (model[3], model[4]):
    nn.init.ones_(block.norm2.weight)
print(f"{audit(model, batches, dtypes=['32']).largest:.3g}")
