"""Images per second of main.py's loaders against decoding only, with the same worker processes.

    python benchmarks/loader.py --data-path DIR [--num_workers N] [--repeats R]

DIR holds train/CLASS/*.jpg and val/CLASS/*.jpg; without it, photographs that come with scikit-learn are written as
500 x 375 JPEG files, about ImageNet's size, to a temporary folder. Five pipelines, each a DataLoader: the files decoded
to RGB pixels, as torchvision's loader does, and nothing else; decoded, cropped and resized; the whole training transform
(DeiT's default augmentation); what is left of it to the loader processes by --augment-on device; the whole evaluation
transform. Beside them what the device does with --augment-on device, on one thread of this CPU: it takes this time from no
loader process where the device is a GPU, whose own time is not measured here. Prints a table and
appends it to benchmarks/results/loader.csv.
"""
import argparse
import csv
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from copy import copy
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datasets import build_loaders
from vision_kan.common.process import Process
from vision_kan.config.resolve import parse_args
from vision_kan.data.transforms import Normalise

DEVICE_PART = "train: the device's part, on a CPU"     # one thread of this process
RESULTS = Path(__file__).resolve().parent / "results/loader.csv"


class Decoded(Dataset):
    """The images of an `ImageSet`, passed through `then`; without it a byte of each, so that only decoding counts."""

    def __init__(self, data, then=None):
        self.names, self.then = [data.images.name(i) for i in range(len(data))], then

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index):
        with Image.open(self.names[index]) as file:
            image = file.convert("RGB")
        return self.then(image) if self.then else image.getpixel((0, 0))[0]


def write_photographs(folder: Path, train: int, val: int) -> None:
    """Crops of scikit-learn's two photographs, 500 x 375, in two classes."""
    from sklearn.datasets import load_sample_images
    random = np.random.default_rng(0)
    for label, pixels in enumerate(load_sample_images().images):
        photo = Image.fromarray(pixels)
        for half, count in (("train", train), ("val", val)):
            (folder / half / f"photo{label}").mkdir(parents=True)
            for number in range(count // 2):
                width, height = (int(side * random.uniform(0.6, 1)) for side in photo.size)
                left, top = int(random.uniform(0, photo.width - width)), int(random.uniform(0, photo.height - height))
                photo.resize((500, 375), Image.Resampling.BICUBIC, (left, top, left + width, top + height)).save(
                    folder / half / f"photo{label}" / f"{number}.jpg", quality=92)


class DevicePart:
    """What the device does with --augment-on device, on this CPU: batches of loader processes, made before."""

    def __init__(self, loader):
        self.loader = copy(loader)
        self.batches = list(loader.loader)
        self.loader.loader = self

    def __iter__(self):
        return ((images.clone(), targets) for images, targets in self.batches)      # they are changed in place


def seconds_of(loader: Iterable) -> float:
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def measure(args: argparse.Namespace, folder: str) -> list[dict]:
    """A row for each pipeline: images/s, median and range over `--repeats` passes taken in turn."""
    words = ["--data-path", folder, "--data-set", "FOLDER", "--num_workers", args.num_workers, "--no-repeated-aug",
             "--batch-size", args.batch_size, "--device", "cpu"]
    loaders, device = (build_loaders(parse_args([*map(str, words), "--augment-on", on]).args, Process())
                       for on in ("loader", "device"))
    train, val = loaders.train.dataset, loaders.val.dataset
    crop = train.transform.steps.transforms[0]
    options = {"batch_size": args.batch_size, "num_workers": args.num_workers,
               "persistent_workers": args.num_workers > 0}

    def cropped(image):
        return Normalise()(crop(image))

    pipelines = {"train: decode": (DataLoader(Decoded(train), **options), len(train)),
                 "train: decode, crop, resize": (DataLoader(Decoded(train, cropped), **options), len(train)),
                 "train: all": (loaders.train, len(loaders.train) * args.batch_size),
                 "train: all, --augment-on device": (device.train.loader, len(loaders.train) * args.batch_size),
                 DEVICE_PART: (DevicePart(device.train).loader, len(loaders.train) * args.batch_size),
                 "val: decode": (DataLoader(Decoded(val), **options), len(val)),
                 "val: all": (loaders.val, len(val))}
    rates = {name: [] for name in pipelines}
    for turn in range(args.repeats + 1):
        loaders.train_sampler.set_epoch(turn)
        device.train_sampler.set_epoch(turn)
        for name, (loader, images) in pipelines.items():
            rate = images / seconds_of(loader)
            if turn:            # the first pass starts the workers and warms the file cache
                rates[name].append(rate)
    rows = []
    for name, values in rates.items():
        decode = statistics.median(rates[name.split(":")[0] + ": decode"])
        rows.append({"pipeline": name, "img_per_s": round(statistics.median(values), 1), "min": round(min(values), 1),
                     "max": round(max(values), 1), "n": len(values), "share_of_decoding":
                     None if name == DEVICE_PART else round(statistics.median(values) / decode, 3),
                     "workers": 0 if name == DEVICE_PART else args.num_workers,
                     "cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__,
                     "pillow": Image.__version__})
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", default="", help="folder with train/ and val/ (default: photographs written here)")
    parser.add_argument("--num_workers", type=int, default=len(os.sched_getaffinity(0))
                        if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="timed passes")
    parser.add_argument("--images", type=int, default=512, help="training photographs to write")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        if not args.data_path:
            write_photographs(Path(made), args.images, args.images // 2)
        rows = measure(args, args.data_path or made)
    print(f"{'pipeline':36}{'img/s':>9}{'range':>19}{'of decoding':>14}   ({args.num_workers} workers, n = {args.repeats})")
    for row in rows:
        spread = f"[{row['min']:.0f}, {row['max']:.0f}]"
        share = "" if row["share_of_decoding"] is None else f"{row['share_of_decoding']:.0%}"
        print(f"{row['pipeline']:36}{row['img_per_s']:>9.0f}{spread:>19}{share:>14}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    new = not args.output.exists()
    with open(args.output, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return rows


if __name__ == "__main__":
    main()
