"""Draws docs/figures/ties_in_images.png: where LeNet-5's first pooling layer ties, on four images of the sample."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from nslightning.data import FashionMNISTSample
from nslightning.models import create_backbone

FILE = Path(__file__).parent / "figures" / "ties_in_images.png"


def main() -> None:
    """Draw the figure."""
    torch.manual_seed(0)
    data = FashionMNISTSample(batch_size=64, workers=0)
    data.prepare_data()
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    chosen = [int((labels == label).nonzero()[0]) for label in (9, 0, 7, 3)]
    network = create_backbone("paper/lenet5", 10, (1, 28, 28))
    with torch.no_grad():
        pooled = F.relu(network.conv1(images[chosen]))
        windows = F.unfold(pooled[:, :1], 2, stride=2)  # of the first channel
    tied = (windows == windows.amax(1, keepdim=True)).sum(1) > 1
    side = int(tied.shape[1] ** 0.5)
    shares = tied.float().mean(1)
    # A window covers two places of the convolution, whose centres lie two pixels inside the image.
    extent = (1.5, 1.5 + 2 * side, 1.5 + 2 * side, 1.5)
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
    for axis, image, here, share in zip(axes, images[chosen], tied.reshape(-1, side, side), shares, strict=True):
        axis.imshow(image[0], cmap="gray_r")
        axis.imshow(
            here.float().masked_fill(~here, float("nan")), cmap="autumn", alpha=0.5, vmin=0, vmax=2, extent=extent
        )
        axis.set(xlim=(-0.5, 27.5), ylim=(27.5, -0.5))
        axis.set_title(f"{share:.0%} of the windows tie", fontsize=9)
        axis.axis("off")
    figure.savefig(FILE, dpi=130)
    print(FILE)


if __name__ == "__main__":
    main()
