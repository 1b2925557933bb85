"""Shared by many test files, without the models and the program: names, sentences, forks, a folder's files, flags."""
import multiprocessing
from pathlib import Path

import pytest
import torch

from vision_kan.common.errors import UserError
from vision_kan.config.flags import get_args_parser

ROOT = Path(__file__).resolve().parent.parent
NANO, GKAN, EKAN, TWIN = (f"vit_nano_patch8_32_{suffix}" for suffix in ("KAN", "GKAN", "EKAN", "ViT"))
RELEASED = ROOT.parent / "shared/reference/vision_kan_tiny_hdim20_64px.pth"      # of the original Vision-KAN
needs_released = pytest.mark.skipif(not RELEASED.exists(), reason=f"{RELEASED.name} is not beside this checkout")


def sentence(call, *args, **kwargs) -> str:
    """The text of the UserError that call(*args, **kwargs) raises: one line of bounded length."""
    with pytest.raises(UserError) as e:
        call(*args, **kwargs)
    text = str(e.value)
    assert text and "\n" not in text and len(text) < 600
    return text


def forked(function, *args):
    """function(*args) in a copy of this process: what it does to itself ends with it."""
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
    """What TensorBoard's own reader shows: tag -> (step, value) pairs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder), {"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def make_args(data_path="", **changes):
    args = get_args_parser().parse_args([])
    vars(args).update({"data_path": str(data_path), "data_set": None, "input_size": 32, "batch_size": 4,
                       "num_workers": 0, **changes})
    return args


