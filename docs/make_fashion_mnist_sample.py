"""Draw the Fashion-MNIST sample that ships in ``nslightning/data/fashion_mnist_sample``.

Run it with the folder of the four original files (Debian's ``dataset-fashion-mnist`` installs them) and the
folder to write::

    python docs/make_fashion_mnist_sample.py /usr/share/datasets/fashion-mnist OUT

Images are ranked by the SHA-256 of a fixed seed, a separator and their pixels, and the first ones of every
class are taken in that order: no random number generator, so the draw is the same on every machine and
version.
"""

import argparse
import gzip
import hashlib
from pathlib import Path

import numpy as np

SEED = b"nslightning 0"
PER_CLASS = {"train": 600, "t10k": 100}


def main() -> None:
    """Read the originals, draw, and write the sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("originals", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    for part, per_class in PER_CLASS.items():
        image_file, label_file = f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"
        labels = np.frombuffer(gzip.decompress((args.originals / label_file).read_bytes())[8:], np.uint8)
        pixels = gzip.decompress((args.originals / image_file).read_bytes())[16:]
        images = np.frombuffer(pixels, np.uint8).reshape(len(labels), 28, 28)
        ranked = sorted(range(len(labels)), key=lambda i: hashlib.sha256(SEED + b":" + images[i].tobytes()).digest())
        room = dict.fromkeys(range(10), per_class)
        drawn = []
        for i in ranked:
            if room[int(labels[i])]:
                room[int(labels[i])] -= 1
                drawn.append(i)
        for name, rows in ((image_file, images[drawn]), (label_file, labels[drawn])):
            header = np.array([0x0800 + rows.ndim, *rows.shape], ">u4").tobytes()
            # mtime 0: the same bytes whenever it is run.
            (args.out / name).write_bytes(gzip.compress(header + rows.tobytes(), 9, mtime=0))


if __name__ == "__main__":
    main()
