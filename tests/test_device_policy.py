"""timm's policies on the device against timm's own: each operation, and how often which with what."""
import math
import random

import numpy as np
import pytest
import torch
from helpers import alike_on_average, every
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import auto_augment, create_transform

from vision_kan.data.device_augment import uniforms
from vision_kan.data.device_policy import _KINDS, _OPERATIONS, ARGUMENTS, Policy, Step
from vision_kan.data.transforms import _posterize  # its import mends timm's

CPU = torch.device("cpu")
MEAN = (124, 116, 104)
WIDE, HIGH = 60, 45
FILTERS = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
GEOMETRIC = [name for name, (kind, _) in _OPERATIONS.items() if kind == "affine"]


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Photographs, and images at whose edges an operation has a case of its own: one colour, two, few levels."""
    real = [Image.fromarray(load_sample_image(name)).resize((WIDE, HIGH), Image.Resampling.BICUBIC)
            for name in ("china.jpg", "flower.jpg")]
    two = np.zeros((HIGH, WIDE, 3), np.uint8)
    two[:20] = 200
    return [*real, Image.new("RGB", (WIDE, HIGH), (7, 0, 255)), Image.fromarray(two), real[0].point(lambda v: v // 32 + 90)]


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def timms(policy: str, size: int = 48, interpolation: str = "bicubic"):
    _, secondary, _ = create_transform(size, is_training=True, auto_augment=policy, interpolation=interpolation, separate=True)
    return secondary.transforms[0]


def ours(transform) -> Policy:
    return Policy(transform, CPU)


def drawn(policy: Policy, count: int) -> np.ndarray:
    return uniforms(0, 0, torch.arange(count), policy.num_uniforms).double().numpy()


# ---------------------------------------------------------------- each operation
def both(name: str, magnitude: float, u: float, images: list[Image.Image], monkeypatch, kind: str = "bicubic"):
    """An operation at a magnitude, its direction by u: ours and timm's, int16 [N, 3, H, W]."""
    op = auto_augment.AugmentOp(name, 1.0, magnitude, {"img_mean": MEAN, "interpolation": FILTERS[kind]})
    with monkeypatch.context() as patch:
        patch.setattr(random, "random", lambda: u)
        patch.setattr(random, "uniform", lambda low, high: low + (high - low) * u)
        theirs = torch.stack([pixels(op(image)) for image in images])
    does, arguments_of = _OPERATIONS[name]
    arguments = np.zeros((len(images), ARGUMENTS))
    for column, value in enumerate(arguments_of(np.array([magnitude / 10]), np.array([u]), WIDE, HIGH, op.hparams)):
        arguments[:, column] = value
    step = Step(f"{does} {kind}" if does == "affine" else does, np.arange(len(images)), arguments)
    got = ours(auto_augment.RandAugment([op], 1))(torch.stack([pixels(image) for image in images]), [step])
    return got.short(), theirs.short()


@pytest.mark.parametrize("name", _OPERATIONS)
def test_an_operation_is_timms(name, photos, monkeypatch):
    """Equal but for roundings of 1 in few pixels; a blur, which PIL approximates by boxes, on the average."""
    for magnitude in (0, 1.5, 3.3, 5, 7.7, 9, 10):
        for u in (0.2, 0.8):
            got, theirs = both(name, magnitude, u, photos, monkeypatch)
            difference = (got - theirs).abs().float()
            if _OPERATIONS[name][0] == "blur":
                assert difference.mean() < 1.2 and difference.max() < 30
            else:
                assert difference.max() <= 1 and difference.mean() < 0.01, (magnitude, u)


@pytest.mark.parametrize("kind", ["nearest", "bilinear"])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_other_filters_are_timms(name, kind, photos, monkeypatch):
    for magnitude in (0, 3.3, 10):
        got, theirs = both(name, magnitude, 0.7, photos, monkeypatch, kind)
        if kind == "nearest":       # between two pixels PIL's fixed point decides
            assert (got == theirs).float().mean() > 0.99
        else:
            assert (got - theirs).abs().max() <= 1


def test_every_kind_is_some_operations_and_every_operation_of_timms_is_known():
    assert {kind for kind, _ in _OPERATIONS.values()} == {*_KINDS, "affine"}
    for policy in ("rand-m9", "rand-inc1", "rand-tweights", "rand-t3a", "rand-t3aw", "v0", "v0r", "original", "originalr", "3a"):
        assert {op.name for op in ours(timms(policy)).ops} <= set(_OPERATIONS), policy
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is _posterize


# ---------------------------------------------------------------- how often
def near(counts, expected) -> None:
    """As many as expected, within five standard deviations of the difference of two counts."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    assert (np.abs(counts - expected) <= 5 * np.sqrt(counts + expected + 1)).all(), (counts, expected)


def watched(transform, monkeypatch, count: int) -> list[list[tuple]]:
    """What timm's own does to so many images: (name, argument or None) of each operation that happens."""
    seen: list[list[tuple]] = []
    for op in transform.ops if hasattr(transform, "ops") else [op for chain in transform.policy for op in chain]:
        def note(image, *args, name=op.name, **_):
            seen[-1].append((name, args[0] if args else None))
            return image

        monkeypatch.setattr(op, "aug_fn", note)
    random.seed(1)
    np.random.seed(1)
    for _ in range(count):
        seen.append([])
        transform(None)
    return seen


@pytest.mark.parametrize("policy", every(3, [
    "rand-m9-mstd0.5-inc1", "rand-m5-n3-p0.8", "rand-m7-mstd101-tweights", "rand-m6-n4-t3aw-inc1", "original-mstd1", "v0"]))
def test_operations_come_as_often_as_in_timms(policy, monkeypatch):
    count = 6000
    transform = timms(policy)
    mine = ours(transform)
    u = drawn(mine, count)
    chosen, layers = mine.chosen(u), mine.num_uniforms - 4 * mine.layers
    happens = u[:, layers::4] < mine.numbers[chosen, 0]
    names = np.array([op.name for op in mine.ops])[chosen]
    theirs = watched(transform, monkeypatch, count)
    known = sorted({op.name for op in mine.ops})
    near([(names[happens] == name).sum() for name in known], [sum(n == name for one in theirs for n, _ in one) for name in known])
    near(np.bincount(happens.sum(1), minlength=5), np.bincount([len(one) for one in theirs], minlength=5))
    ours_in_order = ["+".join(row[yes]) for row, yes in zip(names, happens)]
    theirs_in_order = ["+".join(n for n, _ in one) for one in theirs]
    often = [chain for chain in set(theirs_in_order) if theirs_in_order.count(chain) > 20]
    assert often
    near([ours_in_order.count(chain) for chain in often], [theirs_in_order.count(chain) for chain in often])
    steps = mine.draw(u, 48, 48)
    assert sum(len(step.rows) for step in steps) == happens.sum()
    near(np.bincount(np.concatenate([step.rows for step in steps]), minlength=count), happens.sum(1))


def arguments_of(name: str, value) -> float:
    """timm's argument as the first of ours that tells."""
    if name == "Rotate":
        return -math.radians(value)
    if name.startswith("Posterize"):
        return 256 - 2 ** (8 - min(8, max(1, value)))
    if name == "Desaturate":
        return 1 - value
    return value * 48 if name.startswith("Translate") else value


def told(name: str, arguments: np.ndarray) -> np.ndarray:
    if name == "Rotate":
        return np.arctan2(-arguments[:, 3], arguments[:, 0])
    column = {"ShearX": 1, "ShearY": 3, "TranslateXRel": 2, "TranslateYRel": 5}.get(name, 0)
    return arguments[:, column]


@pytest.mark.parametrize("noise", ["-mstd0.5", *(pytest.param(noise, marks=pytest.mark.slow) for noise in (
    "-mstd3-mmax15", "-mstd101", ""))])
@pytest.mark.parametrize("name", every(3, [name for name in _OPERATIONS if name not in ("AutoContrast", "Equalize", "Invert")]))
def test_magnitudes_are_distributed_as_timms(name, noise, monkeypatch):
    """Kolmogorov and Smirnov's largest distance of the two distributions."""
    count = 3000
    transform = auto_augment.rand_augment_transform(f"rand-m8-n1-p1{noise}", {"img_mean": MEAN, "translate_const": 21}, [name])
    mine = ours(transform)
    steps = mine.draw(drawn(mine, count), 48, 48)
    got = np.sort(np.concatenate([told(name, step.arguments) for step in steps]).round(6))
    want = np.sort([round(arguments_of(name, value), 6) for one in watched(transform, monkeypatch, count) for _, value in one])
    if name == "GaussianBlurRand":      # timm draws the deviation where it blurs
        random.seed(2)
        want = np.sort([random.uniform(0.1, 2 * factor) for factor in want])
    assert len(got) == len(want) == count
    all_of_them = np.concatenate([got, want])
    distance = np.abs(np.searchsorted(got, all_of_them, "right") - np.searchsorted(want, all_of_them, "right")).max() / count
    assert distance < 2.2 * math.sqrt(2 / count)


def test_random_interpolation_takes_both_filters():
    policy = ours(timms("rand-m9-p1", interpolation="random"))
    steps = policy.draw(drawn(policy, 4000), 48, 48)
    rows = [sum(len(step.rows) for step in steps if step.kind == f"affine {kind}") for kind in ("bilinear", "bicubic")]
    near(*rows)
    assert {step.kind for step in ours(timms("rand-p1")).draw(drawn(policy, 400), 48, 48)} >= {"affine bicubic"}


# ---------------------------------------------------------------- image by image
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9-n3-tweights", "original"])
def test_an_image_does_not_depend_on_its_batch(policy, photos):
    mine = ours(timms(policy))
    images = torch.stack([pixels(photos[number % len(photos)]) for number in range(60)])
    u = drawn(mine, 60)

    def apply(rows):
        return mine(images[rows].clone(), mine.draw(u[rows], WIDE, HIGH))

    whole = apply(list(range(60)))
    assert (whole != images).flatten(1).any(1).float().mean() > 0.4
    assert torch.equal(torch.cat([apply([row]) for row in range(20)]), whole[:20])
    assert torch.equal(apply(list(range(0, 60, 2))), whole[::2])


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9-n3-tweights", "original"])
def test_pictures_look_alike_on_the_average(policy, photos):
    transform = timms(policy)
    mine, image = ours(transform), photos[0]
    got = mine(pixels(image).repeat(1000, 1, 1, 1), mine.draw(drawn(mine, 1000), WIDE, HIGH))
    random.seed(3)
    np.random.seed(3)
    alike_on_average(got, torch.stack([pixels(transform(image)) for _ in range(1000)]), 0, 256)
