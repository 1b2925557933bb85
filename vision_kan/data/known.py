"""Data sets of a known kind: DIGITS, CIFAR, iNaturalist."""
import json
import os
from argparse import Namespace
from importlib.util import find_spec

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from vision_kan.common.errors import UserError
from vision_kan.data.images import ArrayImages, FileImages, Split
from vision_kan.data.names import data_root


def open_digits(is_train: bool) -> Split:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 with values 0 .. 16, enlarged once to 32 x 32.
    360 of them (20%, the same share of every digit, whatever --seed) are for validation."""
    pixels, targets = _digits_file()
    chosen = _digits_of(is_train, targets)
    small = (pixels[chosen] * (255 / 16)).round().astype(np.uint8)
    large = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in small]
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in large])
    return Split(ArrayImages(pixels), targets[chosen], [str(i) for i in range(10)])


def _digits_file() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, float64 [1797, 8, 8], and their classes, int64 [1797]; read from its file where it is,
    since to import scikit-learn takes longer than all else that happens before the first step but PyTorch."""
    found = find_spec("sklearn")
    file = found and os.path.join(os.path.dirname(found.origin or ""), "datasets", "data", "digits.csv.gz")
    if file and os.path.isfile(file):
        table = np.loadtxt(file, delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits
    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


def _digits_of(is_train: bool, targets: np.ndarray, held_out: int = 360) -> np.ndarray:
    """Indices of one half, ascending: those of scikit-learn's train_test_split(test_size=held_out, stratify=targets,
    random_state=0), drawn in its order."""
    random = np.random.RandomState(0)

    def shares(counts: np.ndarray, draws: int) -> np.ndarray:
        exact = counts / counts.sum() * draws
        floor = np.floor(exact).astype(int)
        remainder = exact - floor
        for rest in np.sort(np.unique(remainder))[::-1]:
            tied = np.flatnonzero(remainder == rest)
            missing = draws - floor.sum()
            if missing <= 0:
                break
            floor[random.choice(tied, min(len(tied), missing), replace=False)] += 1
        return floor

    counts = np.bincount(targets)
    train = shares(counts, len(targets) - held_out)
    val = shares(counts - train, held_out)
    chosen = []
    for label, (first, second) in enumerate(zip(train, val)):
        drawn = np.flatnonzero(targets == label)[random.permutation(counts[label])]
        chosen.append(drawn[:first] if is_train else drawn[first:first + second])
    return np.sort(np.concatenate(chosen))


def open_cifar(is_train: bool, args: Namespace, cifar: type[CIFAR10]) -> Split:
    root = data_root(args)
    try:
        # Checks the MD5 of every file before it unpickles one, so a foreign pickle never runs.
        data = cifar(root, train=is_train, download=args.download)
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        if args.download:
            raise UserError(f"--download could not fetch {cifar.url} to {root} ({error}): "
                            "check the connection and the folder") from error
        raise UserError(f"--data-path {args.data_path} holds no intact {cifar.base_folder}: name the folder "
                        "that contains it, or add --download to fetch it") from error
    return Split(ArrayImages(data.data), np.array(data.targets, dtype=np.int64), list(data.classes))


def open_inat(is_train: bool, args: Namespace, year: int) -> Split:
    """iNaturalist as DeiT reads it: classes numbered in the order in which the training annotations
    name them, files at <folder>/<category id>/<name> or where the JSON says."""
    root = data_root(args)
    half = f"{'train' if is_train else 'val'}{year}.json"
    content = {}
    for name in {"categories.json", f"train{year}.json", half}:
        try:
            with open(os.path.join(root, name), encoding="utf-8") as file:
                content[name] = json.load(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{name} under --data-path {args.data_path} cannot be read ({error}): "
                            "iNaturalist needs categories.json, train and val JSON files") from error
    try:
        label = {i: category[args.inat_category] for i, category in enumerate(content["categories.json"])}
        notes = content[f"train{year}.json"]["annotations"]
        named = dict.fromkeys(label[int(note["category_id"])] for note in notes)
        place = {name: index for index, name in enumerate(named)}
        parts = [image["file_name"].split("/") for image in content[half]["images"]]
        targets = [place[label[int(category)]] for _, _, category, _ in parts]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{half}, train{year}.json and categories.json under --data-path {args.data_path} "
                        f"do not fit together ({error!r}): check them and --inat-category "
                        f"{args.inat_category}") from error
    if not parts:
        raise UserError(f"{half} under --data-path {args.data_path} lists no image: check the file")
    paths = [os.path.join(root, top, category, name) for top, _, category, name in parts]
    if not os.path.lexists(paths[0]):
        paths = [os.path.join(root, *part) for part in parts]
    return Split(FileImages(paths), np.array(targets, dtype=np.int64), list(place))
