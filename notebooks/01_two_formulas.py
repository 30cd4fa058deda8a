# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Two formulas, one function
#
# `relu(x) - relu(-x)` is the identity. Its derivative is 1 everywhere. What does automatic differentiation say?

# %%
import matplotlib.pyplot as plt
import torch

from nslightning import Jacobians, patch, using


class Identity(torch.nn.Module):
    """The identity, written with two ReLUs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return torch.relu(x) - torch.relu(-x)


model = Identity()
patch(model, Jacobians())
x = torch.linspace(-1, 1, 9, requires_grad=True)
y = model(x).sum()
for alpha in (0.0, 0.5, 1.0):
    with using(model, Jacobians(relu=alpha)):  # one forward serves all three
        (slope,) = torch.autograd.grad(y, x, retain_graph=True)
    plt.plot(x.detach(), slope, "o-", label=f"ReLU'(0) = {alpha}")
plt.xlabel("x")
plt.ylabel("derivative by autodiff")
plt.legend()
plt.gcf().set_size_inches(5, 2.5)

# %% [markdown]
# At 0 it says 0, 1 or 2, as the library picks ReLU'(0) = 0, 1/2 or 1. Everywhere else all picks agree.
#
# ## The same with a maximum
#
# A pooling window whose maximum is reached twice: *native* gives the gradient to the first, *minimal* to both halves.

# %%
pool = torch.nn.MaxPool2d(2)
patch(pool, Jacobians())
window = torch.tensor([[[[0.3, 0.7], [0.7, 0.1]]]], requires_grad=True)
out = pool(window).sum()
for choice in ("native", "minimal", 10.0):
    with using(pool, Jacobians(max_pool=choice)):
        (gradient,) = torch.autograd.grad(out, window, retain_graph=True)
    print(f"{choice!s:8}", gradient.flatten().tolist())
