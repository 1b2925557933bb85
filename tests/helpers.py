"""Shared by many test files, without the models and the program: names, sentences, forks, files, flags, comparisons, waiting."""
import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from vision_kan.common.errors import UserError
from vision_kan.config.flags import get_args_parser

ROOT = Path(__file__).resolve().parent.parent
DEIT = json.loads((ROOT / "tests/data/deit_flags.json").read_text())       # its flags
NANO, GKAN, EKAN, KAT, TWIN = (f"vit_nano_patch8_32_{suffix}" for suffix in ("KAN", "GKAN", "EKAN", "KAT", "ViT"))
RELEASED = ROOT.parent / "shared/reference/vision_kan_tiny_hdim20_64px.pth"      # of the original Vision-KAN
needs_released = pytest.mark.skipif(not RELEASED.exists(), reason=f"{RELEASED.name} is not beside this checkout")
RELEASED_KAT = RELEASED.with_name("kat_tiny_64px.pth")      # in the layout of KAT's own code
needs_released_kat = pytest.mark.skipif(not RELEASED_KAT.exists(), reason=f"{RELEASED_KAT.name} is not beside this checkout")


def sentence(call, *args, **kwargs) -> str:
    """The text of the UserError that call(*args, **kwargs) raises: one line of bounded length."""
    with pytest.raises(UserError) as e:
        call(*args, **kwargs)
    text = str(e.value)
    assert text and "\n" not in text and len(text) < 600
    return text


def every(n: int, cases) -> list:
    """The cases for `pytest.mark.parametrize`, of which every n-th is run every time and the others with the slow tests."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if number % n == 0 else pytest.mark.slow)
            for number, case in enumerate(cases)]


def forked(function, *args):
    """function(*args) in a fork of this process, so that its limits and patches end with it."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join(60)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def epochs(folder: Path) -> dict[str, int]:
    return {path.name: torch.load(path, weights_only=True)["epoch"] for path in folder.iterdir()}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds: tag -> (step, value) pairs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder), {"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def make_args(data_path="", **changes):
    args = get_args_parser().parse_args([])
    vars(args).update({"data_path": str(data_path), "data_set": None, "input_size": 32, "batch_size": 4,
                       "num_workers": 0, **changes})
    return args


def differences(a, b, path: str = "") -> list[str]:
    """Paths at which two nests of dictionaries, lists, tensors and plain values differ by a bit or more."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{path}.{key}" for key in a.keys() ^ b.keys()]
        return found + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}[{i}]")]
    return [] if type(a) is type(b) and a == b else [path]


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{condition} not within {seconds:g} s"
        time.sleep(0.01)


def wait_for(path: Path, seconds: float = 60) -> None:
    wait_until(path.exists, seconds)


def alike_on_average(images: torch.Tensor, others: torch.Tensor, low: float, high: float) -> None:
    """Two samples of images [N, 3, H, W] have means, deviations, slopes and histograms that differ, on the average over the
    images, by less than five standard errors."""
    def seen(x: torch.Tensor) -> torch.Tensor:
        bins = ((x[:, :, ::2, ::2] - low) * (24 / (high - low))).long().clamp(0, 23).flatten(1)
        shares = torch.stack([(bins == number).double().mean(1) for number in range(24)], 1)
        rest = [x.mean((1, 2, 3)), x.std((1, 2, 3)), *(x.diff(dim=dim).abs().mean((1, 2, 3)) for dim in (2, 3))]
        return torch.cat([shares, torch.stack(rest, 1), torch.stack([rest[0], rest[1]], 1) ** 2], 1)

    mine, theirs = seen(images.double()), seen(others.double())
    errors = (mine.var(0) / len(mine) + theirs.var(0) / len(theirs)).sqrt()
    assert ((mine.mean(0) - theirs.mean(0)).abs() <= 5 * errors + 1e-9).all(), (mine.mean(0), theirs.mean(0), errors)
