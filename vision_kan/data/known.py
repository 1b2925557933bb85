"""Data sets with a format of their own: DIGITS, CIFAR, iNaturalist."""
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

# scikit-learn's train_test_split(arange(1797), test_size=360, stratify=targets, random_state=0), sorted: written down, since
# importing scikit-learn takes a second, and a later version may draw others.
DIGITS_VAL = np.array("""
21 24 28 34 35 37 39 42 45 51 57 77 78 81 87 96 99 102 103 105 110 117 119 131 132 134 148 159 170 173 186 188 197 198
202 204 205 211 214 227 240 243 245 252 254 264 267 275 276 279 283 286 293 298 304 305 306 307 308 312 314 326 328
335 339 344 346 364 372 374 376 380 386 393 397 403 405 407 410 413 417 420 423 425 430 433 440 442 452 454 481 493
496 497 499 500 520 527 528 538 553 556 565 567 568 569 573 587 593 604 608 610 619 637 639 641 649 652 666 667 675
694 700 701 702 704 705 709 716 719 734 738 741 744 749 760 766 767 768 770 772 783 786 787 788 789 794 800 802 805
806 808 811 812 820 822 852 854 855 860 865 876 885 888 890 899 900 905 908 918 926 929 937 943 944 945 951 960 973
977 985 989 990 992 997 1002 1003 1005 1006 1007 1009 1010 1012 1014 1016 1023 1030 1035 1037 1038 1049 1053 1056 1073
1081 1086 1088 1090 1096 1098 1101 1107 1108 1116 1118 1121 1123 1136 1141 1148 1150 1151 1152 1157 1159 1161 1162
1167 1168 1169 1173 1174 1180 1187 1192 1204 1217 1220 1221 1224 1232 1233 1242 1253 1261 1262 1264 1268 1269 1270
1287 1292 1296 1302 1312 1319 1330 1331 1332 1340 1350 1351 1352 1353 1364 1371 1372 1375 1395 1404 1405 1406 1415
1424 1429 1435 1440 1442 1450 1455 1466 1467 1470 1471 1474 1476 1482 1484 1487 1493 1496 1497 1505 1509 1512 1513
1520 1529 1530 1532 1540 1541 1542 1551 1558 1560 1566 1567 1576 1582 1592 1596 1602 1606 1608 1610 1613 1614 1617
1626 1628 1629 1634 1637 1645 1650 1655 1660 1664 1666 1668 1673 1674 1680 1688 1691 1696 1703 1704 1706 1716 1717
1726 1728 1734 1742 1745 1750 1755 1758 1767 1770 1771 1772 1776 1778 1781 1787 1789 1791
""".split(), dtype=np.int64)


def open_digits(is_train: bool) -> Split:
    """scikit-learn's 1,797 handwritten digits (8 x 8, values 0 .. 16), enlarged once to 32 x 32. 360 of them, 20% of each digit,
    are for validation, the same for every --seed."""
    pixels, targets = _digits_file()
    chosen = np.setdiff1d(np.arange(len(targets)), DIGITS_VAL) if is_train else DIGITS_VAL
    small = (pixels[chosen] * (255 / 16)).round().astype(np.uint8)
    large = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in small]
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in large])
    return Split(ArrayImages(pixels), targets[chosen], [str(i) for i in range(10)])


def _digits_file() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, float64 [1797, 8, 8], and their classes, int64 [1797]. Read from its file if possible: importing
    scikit-learn would take longer than anything else before the first step but importing PyTorch."""
    found = find_spec("sklearn")
    file = found and os.path.join(os.path.dirname(found.origin or ""), "datasets", "data", "digits.csv.gz")
    if file and os.path.isfile(file):
        table = np.loadtxt(file, delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits
    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


def open_cifar(is_train: bool, args: Namespace, cifar: type[CIFAR10]) -> Split:
    """CIFAR-10 or CIFAR-100 by torchvision. Raises UserError if it is missing or damaged."""
    root = data_root(args)
    try:
        # torchvision checks the MD5 of each file before it unpickles one, so a stranger's pickle never runs.
        data = cifar(root, train=is_train, download=args.download)
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        if args.download:
            raise UserError(f"--download could not fetch {cifar.url} to {root} ({error}): "
                            "check the connection and the folder") from error
        raise UserError(f"--data-path {args.data_path} holds no intact {cifar.base_folder}: name the folder "
                        "that contains it, or add --download to fetch it") from error
    return Split(ArrayImages(data.data), np.array(data.targets, dtype=np.int64), list(data.classes))


def open_inat(is_train: bool, args: Namespace, year: int) -> Split:
    """iNaturalist as DeiT reads it: classes are numbered in the order of the training annotations, files are at
    <folder>/<category id>/<name> or where the JSON says."""
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
    except (AttributeError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{half}, train{year}.json and categories.json under --data-path {args.data_path} "
                        f"do not fit together ({error!r}): check them and --inat-category "
                        f"{args.inat_category}") from error
    if not parts:
        raise UserError(f"{half} under --data-path {args.data_path} lists no image: check the file")
    paths = [os.path.join(root, top, category, name) for top, _, category, name in parts]
    if not os.path.lexists(paths[0]):
        paths = [os.path.join(root, *part) for part in parts]
    return Split(FileImages(paths), np.array(targets, dtype=np.int64), list(place))
