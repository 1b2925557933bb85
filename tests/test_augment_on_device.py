"""--augment-on device: loader processes crop, the device does the rest; image by image, whatever the number of either."""
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from e2e import QUICK, refusal, run, write_digits
from helpers import alike_on_average, sentence
from PIL import Image
from sklearn.datasets import load_sample_image

from datasets import build_loaders, calibration_batch
from vision_kan.common.errors import UnreadableData
from vision_kan.common.process import Process
from vision_kan.config.checks import validate
from vision_kan.config.resolve import parse_args
from vision_kan.data.device import move_to_device
from vision_kan.data.images import SampleKey
from vision_kan.data.workers import batches

CPU = Process()
STILL = ("--aa", "none", "--reprob", "0", "--color-jitter", "0")
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Photographs of many sizes and shapes, 36 to train on, half of them JPEG files."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("china", "flower"):
        photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
        for half, count in (("train", 18), ("val", 2)):
            (folder / half / name).mkdir(parents=True)
            for number in range(count):
                left, top = rng.integers(0, 300), rng.integers(0, 200)
                box = (left, top, left + rng.integers(60, 340), top + rng.integers(60, 220))
                photo.crop(box).resize(rng.integers(40, 120, 2).tolist()).save(
                    folder / half / name / f"{number}.{('png', 'jpg')[number % 2]}")
    return folder


def loaders(data, *words, augment_on="device", process=CPU):
    args = parse_args(["--data-set", "FOLDER", "--data-path", str(data), "--num_workers", "0", "--batch-size", "12",
                       "--no-repeated-aug", "--input-size", "48", "--augment-on", augment_on, *words]).args
    validate(args, process.world_size)
    return move_to_device(build_loaders(args, process), args, process)


def images_of(made, epoch=0, position=0):
    made.train_sampler.set_epoch(epoch, position)
    return [images.clone() for images, _ in batches(made.train)]


# ---------------------------------------------------------------- beside the loader
@pytest.mark.parametrize("words, most, differing", [
    ((), 8, 0.05), (("--train-interpolation", "bilinear"), 1, 0.05), (("--train-interpolation", "random"), 8, 0.05),
    (("--train-interpolation", "lanczos"), 0, 0), (("--input-size", "32"), 0, 0), (("--src",), 0, 0),
    (("--input-size", "48", "80", "--hflip", "1"), 8, 0.05)], ids=str)
def test_the_same_crops_come_out(data, words, most, differing):
    """Bit by bit where PIL resizes, and to rounding where PyTorch does (docs/data.md)."""
    ours, theirs = (torch.cat(images_of(loaders(data, *STILL, *words, augment_on=on), epoch=2)) for on in ("device", "loader"))
    difference = ((ours - theirs).abs() * STD).round()
    decoded = loaders(data, *STILL, *words).train.loader.dataset
    kinds = {isinstance(decoded._load(index), torch.Tensor) for index in range(len(decoded))}
    assert kinds == ({False} if words in (("--input-size", "32"), ("--src",)) else {False, True})
    assert difference.max() <= most and (difference > 0).float().mean() <= differing
    assert (difference > 1).float().mean() < 0.001


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    (), pytest.param(("--ThreeAugment",), marks=pytest.mark.slow),
    pytest.param(("--aa", "rand-m9-t3a", "--recount", "3", "--remode", "rand"), marks=pytest.mark.slow)], ids=str)
def test_batches_are_distributed_as_the_loaders(data, words):
    ours, theirs = ([images for epoch in range(25) for images in images_of(made, epoch)]
                    for made in (loaders(data, *words, augment_on=on) for on in ("device", "loader")))
    alike_on_average(torch.cat(ours), torch.cat(theirs), -2.2, 2.7)


def test_order_targets_and_calibration_are_the_loaders(data):
    ours, theirs = loaders(data), loaders(data, augment_on="loader")
    for one in (ours, theirs):
        one.train_sampler.set_epoch(3)
    assert len(ours.train) == len(theirs.train) == 3
    for (_, targets), (_, their_targets) in zip(ours.train, theirs.train, strict=True):
        assert torch.equal(targets, their_targets)
    assert torch.equal(calibration_batch(ours, 0), calibration_batch(theirs, 0))
    for (images, targets), (their_images, their_targets) in zip(ours.val, theirs.val, strict=True):
        assert torch.equal(images, their_images) and torch.equal(targets, their_targets)


def test_images_of_extreme_shapes_are_taken(tmp_path):
    for half in ("train", "val"):
        (tmp_path / half / "line").mkdir(parents=True)
        for number, size in enumerate([(3000, 1), (1, 3000), (1, 1)] * 4):
            Image.new("RGB", size, "red").save(tmp_path / half / "line" / f"{number}.png")
    ours, theirs = (torch.cat(images_of(loaders(tmp_path, *STILL, augment_on=on))) for on in ("device", "loader"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03)


# ---------------------------------------------------------------- resume, processes, workers
@pytest.mark.parametrize("words", [(), ("--ThreeAugment", "--remode", "rand", "--recount", "2")], ids=str)
def test_a_resumed_epoch_is_the_rest_of_it_bit_by_bit(data, words):
    whole = images_of(loaders(data, *words), epoch=1)
    for done in (1, 2):
        assert all(map(torch.equal, whole[done:], images_of(loaders(data, *words), 1, done * 12)))
    assert not torch.equal(images_of(loaders(data, *words), epoch=2)[0], whole[0])
    assert not torch.equal(images_of(loaders(data, *words, "--seed", "1"), epoch=1)[0], whole[0])


def test_two_processes_share_the_images_of_one(data):
    whole = images_of(loaders(data))
    for rank in range(2):
        halves = images_of(loaders(data, "--batch-size", "6", process=Process(rank, 2)))
        assert all(torch.equal(half, images[rank::2]) for half, images in zip(halves, whole, strict=True))


def test_loader_processes_change_nothing(data):
    whole = [*images_of(loaders(data)), *images_of(loaders(data), epoch=1)]
    made = loaders(data, "--num_workers", "2")
    assert all(map(torch.equal, whole, [*images_of(made), *images_of(made, epoch=1)]))
    assert made.train.loader.num_workers == 2 and made.train.loader.dataset[SampleKey(0, 0, 0, 0, 0)][0].dtype == torch.uint8


def test_resplit_spares_the_first_repeat_and_each_repeat_is_its_own(data):
    words = ("--aa", "none", "--color-jitter", "0", "--repeated-aug", "--resplit", "--remode", "const", "--reprob", "1")
    made = loaders(data, *words)
    made.train_sampler.set_epoch(0)
    keys, images = list(made.train_sampler)[:36], torch.cat(images_of(made))
    erased = (images == 0).all(1).flatten(1).float().mean(1) > 0.015
    assert [bool(one) for one in erased] == [key.repeat > 0 for key in keys]
    assert not torch.equal(images[1], images[2])


# ---------------------------------------------------------------- broken images
def test_unreadable_images_are_named_counted_replaced_or_the_end(data, tmp_path, capfd):
    folder = write_digits(tmp_path, train=40, val=8)
    bad = sorted((folder / "train").rglob("*.png"))[5]
    bad.write_bytes(b"no image")
    made = loaders(folder, "--max-unreadable", "0.5", "--num_workers", "1")
    for epoch in range(2):
        assert all(images.std((1, 2, 3)).min() > 0 for images in images_of(made, epoch))
    assert made.gather_unreadable_train() == 1 and capfd.readouterr().err.count(bad.name) == 1
    with pytest.raises(UnreadableData, match=bad.name):
        images_of(loaders(folder, "--strict-data"))


def test_a_streams_images_are_augmented_too(tmp_path):
    digits = write_digits(tmp_path / "digits", train=12, val=4)
    for half in ("train", "val"):
        with tarfile.open(tmp_path / f"{half}.tar", "w") as tar:
            for number, file in enumerate(sorted((digits / half).rglob("*.png"))):
                (tmp_path / "cls").write_text(str(number % 3))
                tar.add(file, f"{number}.png")
                tar.add(tmp_path / "cls", f"{number}.cls")
    words = ("--data-set", "wds/digits", "--data-split", "train.tar|36", "val.tar|12", "--num-classes", "3", "--input-size", "32")
    still = [images_of(loaders(tmp_path, *words, *STILL, augment_on=on), 1) for on in ("device", "loader")]
    assert all(map(torch.equal, *still))
    full = [images_of(loaders(tmp_path, *words), 1) for _ in range(2)]
    assert all(map(torch.equal, *full)) and not torch.equal(full[0][0], still[0][0])


# ---------------------------------------------------------------- with images on the device
@pytest.mark.slow
def test_images_on_the_device_have_the_policy_too(tmp_path):
    folder = write_digits(tmp_path, train=40, val=8)
    words = ("--data-on-device", "on", "--input-size", "32", "--aa", "rand-m9-mstd0.5-inc1")
    made = loaders(folder, *words)
    assert type(made.train).__name__ == "TrainLoader"
    whole = images_of(made, 1)
    assert all(map(torch.equal, whole[3:], images_of(loaders(folder, *words), 1, 36)))
    halves = images_of(loaders(folder, *words, "--batch-size", "6", process=Process(1, 2)), 1)
    assert all(torch.equal(half, images[1::2]) for half, images in zip(halves, whole, strict=True))
    theirs = torch.cat(images_of(loaders(folder, "--input-size", "32", augment_on="loader"), 1))
    assert abs(torch.cat(whole).mean() - theirs.mean()) < 0.15 and abs(torch.cat(whole).std() - theirs.std()) < 0.15
    assert "--augment-on device" in sentence(loaders, folder, *words, augment_on="loader")


# ---------------------------------------------------------------- as a user
def test_what_it_cannot_do_is_refused_before_anything_is_read(capsys):
    words = ("--data-path", "/nowhere", "--augment-on", "device", "--aa", "augmix-m3-w3")
    assert refusal(capsys, *words) == (
        "--augment-on device does not know --aa augmix-m3-w3, which PIL alone computes: take --augment-on loader, or a policy "
        "such as rand-m9-mstd0.5-inc1")
    assert refusal(capsys, "--augment-on", "gpu") == "--augment-on: 'gpu' is not one of loader, device"


@pytest.mark.slow
def test_a_run_says_where_it_augments_profiles_and_finds_what_is_not_finite(tmp_path, capsys):
    folder = write_digits(tmp_path / "digits")
    words = (*QUICK, "--data-path", folder, "--augment-on", "device", "--epochs", 1, "--debug-nan", "--num_workers", 1)
    assert run(*words, "--output_dir", tmp_path / "out", "--profile") == 0
    assert "cropped by loader processes and augmented on cpu" in capsys.readouterr().out
    assert (tmp_path / "out/profile/trace.json.gz").exists()
    assert run(*words, "--output_dir", tmp_path / "nan", "--lr", "1e9", "--unscale-lr", "--epochs", 3, "--opt", "sgd") == 1
    assert "not finite" in capsys.readouterr().err and list((tmp_path / "nan").glob("*nan*"))
