# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Ties in a real network, seen
#
# LeNet-5 on the packaged sample of Fashion-MNIST. Where does its first pooling tie?

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from nslightning import Jacobians, patch
from nslightning.data import FashionMNISTSample
from nslightning.models import create_backbone
from nslightning.probes import divergence, ties

torch.manual_seed(0)
data = FashionMNISTSample(batch_size=64, workers=0)
data.prepare_data()
data.setup("fit")
images, labels = next(iter(data.train_dataloader()))
network = create_backbone("paper/lenet5", num_classes=10, image_shape=(1, 28, 28))
with torch.no_grad():
    windows = F.unfold(F.relu(network.conv1(images[:4]))[:, :1], 2, stride=2)  # of the first channel
tied = ((windows == windows.amax(1, keepdim=True)).sum(1) > 1).reshape(4, 12, 12)
figure, axes = plt.subplots(1, 4, figsize=(8, 2.2))
for axis, image, here in zip(axes, images, tied, strict=False):
    axis.imshow(image[0], cmap="gray_r")
    axis.imshow(here.float().masked_fill(~here, torch.nan), cmap="autumn", alpha=0.5, extent=(1.5, 25.5, 25.5, 1.5))
    axis.set(xlim=(-0.5, 27.5), ylim=(27.5, -0.5), title=f"{here.float().mean():.0%}")
    axis.axis("off")

# %% [markdown]
# The windows that tie are mostly those of the constant background. How often does each site tie, over the batch?

# %%
patch(network, Jacobians())
for site, met in ties(network, images).items():
    print(f"{site:8} {met.fraction:7.2%}")

# %% [markdown]
# Do they matter? Tied entries of the background stand on the same pixels, so the gradient hardly moves in float32. In
# bfloat16 values that differ become equal.

# %%
choices = {"minimal": Jacobians(max_pool="minimal"), "beta = 10": Jacobians(max_pool=10.0)}
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    network.to(dtype)
    loss = F.cross_entropy(network(images.to(dtype)).float(), labels)
    measured = divergence(loss, network, choices)
    print(f"{dtype!s:15}", {name: f"{difference.relative:.2g}" for name, difference in measured.items()})
