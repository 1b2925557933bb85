import random

import numpy as np
import pytest
import torch
from e2e import QUICK, run, write_digits
from helpers import differences, sentence
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

from datasets import build_loaders
from vision_kan.common.process import Process, exact_float
from vision_kan.config.resolve import parse_args
from vision_kan.data import device as device_module
from vision_kan.data import device_augment
from vision_kan.data.device import NotOnDevice, TrainLoader, build_augmentation, move_to_device
from vision_kan.data.device_augment import (
    FILTERS,
    Augmentation,
    _crop_box,
    _jitter,
    _resampled,
    _three_augment,
    greyscale,
    resampling,
    uniforms,
)

PLAIN = ("--aa", "none", "--reprob", "0", "--color-jitter", "0")
CPU = Process()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), train=40, val=8)


def flags(data, *words):
    return parse_args(["--data-set", "FOLDER", "--data-path", str(data), "--num_workers", "0", "--batch-size", "16",
                       "--no-repeated-aug", "--input-size", "32", "--data-on-device", "on", *PLAIN, *words]).args


def loaders(data, *words, process=CPU):
    args = flags(data, *words)
    return move_to_device(build_loaders(args, process), args, process)


def photo(size: int = 48) -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((size, size), Image.Resampling.BICUBIC)


def pixels(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def augmentation(**values) -> Augmentation:
    plain = {"size": 48, "padded": False, "padding": 0, "padding_mode": "constant", "kinds": ("bicubic",), "flip": 0.0,
             "three": False, "jitter": 0.0, "erase": 0.0, "erase_mode": "const", "erase_count": 1, "spare_first": False}
    return Augmentation(**plain | values)


# ---------------------------------------------------------------- random numbers
def test_random_numbers_are_uniform_independent_and_belong_to_their_position():
    u = uniforms(3, 5, torch.arange(20000), 40)
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - 12500).abs() < 6 * 12500 ** 0.5).all()
    correlation = torch.corrcoef(torch.cat([u.T, u.roll(1, 0).T]))
    assert (correlation - torch.eye(80)).abs().max() < 6 / 20000 ** 0.5
    assert torch.equal(uniforms(3, 5, torch.tensor([17, 4]), 12), u[[17, 4], :12])
    for seed, epoch in ((3, 6), (4, 5), (5, 3)):
        assert abs(torch.corrcoef(torch.stack([uniforms(seed, epoch, torch.arange(20000), 1)[:, 0], u[:, 0]]))[0, 1]) < 0.05


def test_random_numbers_stay_what_they_are():
    """Any other value changes the training of every seed."""
    assert uniforms(0, 0, torch.tensor([0, 1]), 3).tolist() == [
        [0.09563213586807251, 0.3375016450881958, 0.05320233106613159],
        [0.12578272819519043, 0.06075704097747803, 0.6749845743179321]]


# ---------------------------------------------------------------- against PIL
@pytest.mark.parametrize("kind", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
@pytest.mark.parametrize("size", [20, 96])
def test_a_resized_cut_is_pils(kind, size):
    image = photo()
    for top, left, height, width in ((0, 0, 48, 48), (3, 7, 30, 41), (20, 1, 11, 9)):
        want = image.crop((left, top, left + width, top + height)).resize((size, size), str_to_pil_interp(kind))
        rows, columns = (resampling(kind, torch.tensor([float(start)]), torch.tensor([float(length)]), 48, size)
                         for start, length in ((top, height), (left, width)))
        difference = (_resampled(pixels(image).float(), rows, columns) - pixels(want)).abs()
        if kind == "nearest":       # between two pixels PIL's accumulated rounding decides
            assert (difference == 0).float().mean() > 0.8
        else:
            assert difference.max() <= 2 and difference.mean() < 0.05


class NoFloat64(TorchDispatchMode):
    """Fails where an operation gives float64, as on an Apple GPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        assert getattr(result, "dtype", None) != torch.float64, operation
        return result


@pytest.mark.parametrize("kind", FILTERS)
def test_resampling_on_an_apple_gpu(kind, monkeypatch):
    assert exact_float(torch.device("mps")) == torch.float32 and exact_float(torch.device("cpu")) == torch.float64
    boxes = torch.tensor([3.0, 0.0]), torch.tensor([30.0, 48.0])
    want = resampling(kind, *boxes, 48, 20)
    monkeypatch.setattr(device_augment, "exact_float", lambda device: torch.float32)
    with NoFloat64():
        torch.testing.assert_close(resampling(kind, *boxes, 48, 20), want)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_a_padded_crop_is_torchvisions(mode):
    image = photo(32)
    padded = pixels(transforms.Pad(4, padding_mode=mode)(image))
    x = augmentation(size=32, padded=True, padding=4, padding_mode=mode, flip=0.5)(
        pixels(image).expand(200, -1, -1, -1), uniforms(0, 0, torch.arange(200), 40)).byte()
    windows = {padded[0, :, i:i + 32, j:j + 32].flatten().numpy().tobytes(): (i, j) for i in range(9) for j in range(9)}
    found = [(windows.get(one.flatten().numpy().tobytes()), windows.get(one.flip(2).flatten().numpy().tobytes())) for one in x]
    assert all(bool(plain) != bool(flipped) for plain, flipped in found)
    assert 70 < sum(bool(flipped) for _, flipped in found) < 130
    assert {i for pair in found for place in pair if place for i in place} == set(range(9))


def test_colours_are_pils():
    image = photo()
    x = pixels(image).float()
    assert (greyscale(x)[0, 0] - torch.from_numpy(np.array(image.convert("L")))).abs().max() <= 1
    third = torch.tensor([[0.1, 0.5], [0.5, 0.5], [0.9, 0.5]])
    solarised, grey, blurred = _three_augment(x.expand(3, -1, -1, -1), third)
    assert torch.equal(solarised.byte(), pixels(ImageOps.solarize(image, 128))[0])
    assert (grey - pixels(image.convert("L").convert("RGB"))[0]).abs().max() <= 1
    assert (blurred - pixels(image.filter(ImageFilter.GaussianBlur(1.05)))[0]).abs().mean() < 1
    for kind, name in enumerate(("Brightness", "Contrast", "Color")):
        for u, factor in ((0.0, 0.6), (0.9, 1.32)):
            draws = torch.full((1, 6), 0.5)     # a factor of 1 for the others
            draws[0, kind] = u
            draws[0, 3 + kind] = 0.9            # this one last
            want = getattr(ImageEnhance, name)(image).enhance(factor)
            assert (_jitter(x, draws, 0.4) - pixels(want)).abs().max() <= 2


# ---------------------------------------------------------------- distributions
def moments(boxes) -> np.ndarray:
    boxes = np.asarray(boxes, dtype=float)
    return np.concatenate([boxes.mean(0), boxes.std(0)])


@pytest.mark.parametrize("high, wide", [(32, 32), (20, 60)])
def test_crops_are_distributed_as_timms(high, wide):
    u = uniforms(0, 0, torch.arange(4000), 24)
    ours = torch.stack(_crop_box(u, high, wide), 1)
    random.seed(0)
    image = Image.new("L", (wide, high))
    theirs = [RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    np.testing.assert_allclose(moments(ours), moments(theirs), atol=0.03 * max(high, wide))


@pytest.mark.parametrize("mode, count", [("const", 1), ("pixel", 1), ("rand", 2), ("pixel", 3)])
def test_random_erasing_is_distributed_as_timms(mode, count):
    ours = augmentation(size=24, erase=0.6, erase_mode=mode, erase_count=count)
    x = torch.full((2000, 3, 24, 24), 9.0)
    got = ours.random_erase(x, uniforms(1, 0, torch.arange(2000), ours.num_uniforms), torch.zeros(2000, dtype=torch.long))
    random.seed(0)
    torch.manual_seed(0)
    want = RandomErasing(0.6, mode=mode, max_count=count, device="cpu")(x.clone())

    def seen(images):
        erased = images != 9
        rest = images[erased]
        return np.array([erased.any(1).float().mean(), (erased.flatten(1).any(1)).float().mean(), erased.any(3).float().mean(),
                         rest.mean(), rest.std() if mode != "const" else 0, (rest - rest.roll(1)).abs().mean()])

    np.testing.assert_allclose(seen(got), seen(want), atol=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    pytest.param(("--src",), marks=pytest.mark.slow),
    pytest.param(("--input-size", "40", "--train-interpolation", "random"), marks=pytest.mark.slow),
    ("--color-jitter", "0.4"), pytest.param(("--ThreeAugment",), marks=pytest.mark.slow)], ids=str)
def test_batches_are_distributed_as_the_loaders(data, words):
    """Mean, deviation, quantiles and differences of neighbouring pixels over 4 epochs of one small data set."""
    ours, theirs = loaders(data, *words), build_loaders(flags(data, *words), CPU)
    assert type(ours.train).__name__ == "TrainLoader" and len(ours.train) == len(theirs.train)

    def seen(loader, sampler):
        images = []
        for epoch in range(4):
            sampler.set_epoch(epoch)
            images += [images for images, _ in loader]
        x = torch.cat(images)
        return np.array([x.mean(), x.std(), *torch.quantile(x.flatten()[:2 ** 22:4], torch.tensor([0.1, 0.5, 0.9])),
                         x.diff(dim=2).abs().mean(), x.diff(dim=3).abs().mean()])

    np.testing.assert_allclose(seen(ours.train, ours.train_sampler), seen(theirs.train, theirs.train_sampler), atol=0.12)


def test_the_order_and_the_targets_are_the_loaders(data):
    ours, theirs = loaders(data), build_loaders(flags(data), CPU)
    for one in (ours, theirs):
        one.train_sampler.set_epoch(3)
    for (_, ours_targets), (_, their_targets) in zip(ours.train, theirs.train, strict=True):
        assert torch.equal(ours_targets, their_targets)
    for (images, targets), (their_images, their_targets) in zip(ours.val, theirs.val, strict=True):
        assert torch.equal(images, their_images) and torch.equal(targets, their_targets)


# ---------------------------------------------------------------- resume, processes
@pytest.mark.parametrize("words", [(), ("--input-size", "40", "--reprob", "0.5")], ids=str)
def test_a_resumed_epoch_is_the_rest_of_it_bit_by_bit(data, words, monkeypatch):
    monkeypatch.setattr(device_module, "CHUNK_BYTES", 3 * 16 * 3 * 40 ** 2 * 4)      # three batches at a time
    whole, rest = loaders(data, *words), loaders(data, *words)
    whole.train_sampler.set_epoch(1)
    images = [images.clone() for images, _ in whole.train]
    for done in (1, 3, 5):
        rest.train_sampler.set_epoch(1, done * 16)
        assert all(map(torch.equal, images[done:], [images for images, _ in rest.train]))
    whole.train_sampler.set_epoch(2)
    assert not torch.equal(next(iter(whole.train))[0], images[0])


@pytest.mark.slow
def test_two_processes_share_the_images_of_one(data):
    words = ("--batch-size", "8", "--reprob", "0.5")
    one = loaders(data, "--batch-size", "16", *words[2:])
    halves = [loaders(data, *words, process=Process(rank, 2)) for rank in range(2)]
    images, targets = next(iter(one.train))
    for rank, half in enumerate(halves):
        own, own_targets = next(iter(half.train))
        assert torch.equal(own, images[rank::2]) and torch.equal(own_targets, targets[rank::2])


@pytest.mark.slow
def test_a_run_on_the_device_resumes_bit_by_bit(data, tmp_path):
    words = [*QUICK, "--data-path", data, "--data-set", "FOLDER", "--data-on-device", "on", *PLAIN, "--reprob", "0.5", "--epochs"]
    assert run(*words, 2, "--output_dir", tmp_path / "whole") == 0
    assert run(*words, 1, "--output_dir", tmp_path / "parts") == 0
    assert run(*words, 2, "--output_dir", tmp_path / "parts", "--resume", "auto") == 0
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"] for name in ("whole", "parts"))
    assert not differences(whole, parts)


# ---------------------------------------------------------------- what it cannot do
def test_an_unreadable_image_is_named_counted_and_replaced(data, tmp_path, capsys):
    folder = write_digits(tmp_path / "broken", train=40, val=8)
    bad = sorted((folder / "train").rglob("*.png"))[5]
    bad.write_bytes(b"no image")
    made = loaders(folder, "--max-unreadable", "0.5")
    assert capsys.readouterr().err.count(bad.name) == 1
    for epoch in range(2):
        made.train_sampler.set_epoch(epoch)
        for images, targets in made.train:
            assert images.std(dim=(1, 2, 3)).min() > 0 and targets.min() >= 0
    assert made.gather_unreadable_train() == 1 and not capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    (("--aa", "rand-m9-mstd0.5-inc1"), "--aa rand-m9-mstd0.5-inc1"),
    (("--train-interpolation", "random", "--input-size", "24"), "--train-interpolation random"),
    (("--input-size", "24", "32"), "--input-size 24 32")])
def test_what_has_no_counterpart_is_refused_or_left_to_the_loader(data, words, told, capsys, monkeypatch):
    assert told in sentence(loaders, data, *words)
    args = flags(data, *words, "--data-on-device", "auto")
    made = build_loaders(args, CPU)
    before = made.train
    assert move_to_device(made, args, CPU).train is before and not capsys.readouterr().out      # on a CPU not even tried
    monkeypatch.setattr(device_module, "_memory", lambda device: 2 ** 40)
    with pytest.raises(NotOnDevice, match=told.split()[0]):
        TrainLoader(made.train.dataset, made.train_sampler, args, CPU)


def test_images_of_several_sizes_and_too_many_are_refused(data, tmp_path, monkeypatch):
    folder = write_digits(tmp_path / "sizes", train=16, val=8)
    odd = sorted((folder / "train").rglob("*.png"))[-1]
    Image.open(odd).resize((50, 32)).save(odd)
    assert odd.name in sentence(loaders, folder)
    monkeypatch.setattr(device_module, "_memory", lambda device: 1000)
    assert "GiB" in sentence(loaders, data)


def test_off_and_auto_without_cuda_keep_the_loader(data):
    for choice, device in (("off", "cpu"), ("auto", "cpu"), ("auto", "mps")):
        args = flags(data, "--data-on-device", choice)
        made = move_to_device(build_loaders(args, CPU), args, Process(device=torch.device(device)))
        assert isinstance(made.train, torch.utils.data.DataLoader)
    assert build_augmentation(flags(data, "--aa", "3a")).three
