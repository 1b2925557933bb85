import random

import numpy as np
import pytest
import torch
from hostile_images import grown
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg
from torchvision import transforms

from vision_kan.common.errors import UserError
from vision_kan.config.flags import get_args_parser
from vision_kan.data.transforms import GREY_SCALE, Normalise, build_transform, shorten, to_rgb


def make_args(**changes):
    args = get_args_parser().parse_args([])
    vars(args).update(changes)
    return args


def photo(width=80, height=60, seed=0):
    """Smooth colours with some structure, so that every augmentation shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def seed_all(seed=0):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train_outputs(image=None, count=12, **changes):
    """`count` training tensors stacked, the same random numbers whatever the flags."""
    transform = build_transform(True, make_args(**{"input_size": 48, **changes}))
    outputs = []
    for seed in range(count):
        seed_all(seed)
        outputs.append(transform(image or photo()))
    return torch.stack(outputs)


def pixels(tensor):
    """A normalised tensor as the PIL image it was made of."""
    mean, std = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])[:, :, None, None]
    values = ((tensor * std + mean) * 255).round().clamp(0, 255)
    return Image.fromarray(values.byte().permute(1, 2, 0).numpy())


PLAIN = {"aa": "none", "color_jitter": 0.0, "reprob": 0.0}


# ---------------------------------------------------------------- no flag is dead
@pytest.mark.parametrize("base, change", [
    ({}, {"aa": "none"}),
    ({}, {"aa": "rand-m3-mstd0.5-inc1"}),
    ({"aa": "none"}, {"color_jitter": 0.0}),
    ({"ThreeAugment": True}, {"color_jitter": 0.0}),
    ({}, {"hflip": 0.0}),
    ({}, {"reprob": 0.0}),
    ({"reprob": 1.0, **{k: v for k, v in PLAIN.items() if k != "reprob"}}, {"remode": "const"}),
    ({"reprob": 1.0}, {"remode": "rand"}),
    ({"reprob": 1.0}, {"recount": 4}),
    ({"ThreeAugment": True, "reprob": 1.0}, {"reprob": 0.0}),
    ({}, {"train_interpolation": "bilinear"}),
    ({}, {"train_interpolation": "random"}),
    ({"src": True, **PLAIN}, {"train_interpolation": "nearest"}),
    ({"src": True, **PLAIN}, {"train_interpolation": "random"}),
    ({"input_size": 24, **PLAIN}, {"train_interpolation": "nearest"}),
    ({}, {"ThreeAugment": True}),
    ({}, {"src": True}),
    ({"ThreeAugment": True}, {"src": True}),
    ({"input_size": 32}, {"src": True}),
    ({"input_size": 32}, {"crop_padding": 0}),
    ({"src": True}, {"crop_padding": 8}),
], ids=str)
def test_flag_changes_what_training_sees(base, change):
    before, after = train_outputs(**base), train_outputs(**{**base, **change})
    assert before.shape == after.shape
    assert not torch.equal(before, after)
    assert torch.equal(before, train_outputs(**base))  # or the comparison would say nothing


@pytest.mark.parametrize("size", [24, 48])
def test_eval_crop_ratio_changes_what_evaluation_sees(size):
    one, other = (build_transform(False, make_args(input_size=size, eval_crop_ratio=ratio))(photo())
                  for ratio in (0.875, 1.0))
    assert one.shape == other.shape == (3, size, size)
    assert not torch.equal(one, other)


# ---------------------------------------------------------------- as DeiT
def test_training_is_timms_transform_above_32_px():
    args = make_args(input_size=48)
    theirs = create_transform(48, is_training=True, color_jitter=args.color_jitter, auto_augment=args.aa,
                              interpolation=args.train_interpolation, re_prob=1.0, re_mode=args.remode,
                              re_count=args.recount)
    for seed, ours in enumerate(train_outputs(reprob=1.0)):
        seed_all(seed)
        assert torch.equal(ours, theirs(photo()))


@pytest.mark.parametrize("size, ratio, resized", [(48, 0.875, 54), (33, 1.0, 33), (224, 0.875, 256)])
def test_evaluation_is_deits_resize_and_centre_crop(size, ratio, resized):
    theirs = transforms.Compose([
        transforms.Resize(resized, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size), transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])
    ours = build_transform(False, make_args(input_size=size, eval_crop_ratio=ratio))
    assert torch.equal(ours(photo()), theirs(photo()))


# center at two crops, squash, border, bilinear; a crop ratio above 1
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "csatv2.r512_in1k",
                                  "convnext_base.fb_in22k_ft_in1k_384", "deepseek_vit_412m_enc.deepseek_v4_1_flash",
                                  "wide_resnet50_2.tv_in1k", "volo_d4_448.sail_in1k"])
@pytest.mark.parametrize("width, height", [(80, 60), (33, 90)])
def test_evaluation_is_timms_of_a_pretrained_configuration(name, width, height):
    cfg = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
    cfg["input_size"] = (3, 48, 48)
    ours = build_transform(False, make_args(input_size=48, eval_crop_ratio=cfg["crop_pct"], crop_mode=cfg["crop_mode"],
                                            interpolation=cfg["interpolation"], mean=list(cfg["mean"]), std=list(cfg["std"])))
    assert torch.equal(ours(photo(width, height)), create_transform(**cfg)(photo(width, height)))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [8, 32, 48, [8, 32], [96, 16]])
@pytest.mark.parametrize("width, height", [(1, 1), (100, 40), (20_000, 1), (1, 20_000)])
def test_every_way_to_crop_takes_images_of_any_size(mode, size, width, height):
    args = make_args(input_size=size, crop_mode=mode, eval_crop_ratio=1.0)
    output = build_transform(False, args)(Image.new("RGB", (width, height), "red"))
    assert output.shape == (3, *to_2tuple(size)) and output[0].max() > 2


def test_training_images_have_the_mean_and_deviation_that_are_asked_for():
    half = {"mean": [0.5] * 3, "std": [0.25] * 3}
    mean, std = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])[:, :, None, None]
    for size in (32, 48):
        plain, other = (train_outputs(input_size=size, crop_padding=0, **PLAIN, **flags) for flags in ({}, half))
        torch.testing.assert_close((plain * std + mean - 0.5) / 0.25, other, rtol=0, atol=1e-5)
    args = make_args(input_size=48, **half)
    theirs = create_transform(48, is_training=True, color_jitter=args.color_jitter, auto_augment=args.aa, mean=(0.5,) * 3,
                              std=(0.25,) * 3, interpolation=args.train_interpolation, re_prob=1.0, re_mode=args.remode)
    for seed, ours in enumerate(train_outputs(reprob=1.0, **half)):     # what rotations uncover is filled with the mean, too
        seed_all(seed)
        assert torch.equal(ours, theirs(photo()))


@pytest.mark.parametrize("off", ["none", "", None])
def test_aa_can_be_switched_off(off):
    assert torch.equal(train_outputs(aa=off), train_outputs(aa="none"))


@pytest.mark.parametrize("policy", ["augmix-m3", "original", "v0", "3a", "rand-m9-mstd0.5"])
def test_timms_other_policies_work(policy):
    assert train_outputs(aa=policy, count=3).shape == (3, 3, 48, 48)


def test_the_strongest_posterize_survives():
    assert train_outputs(aa="rand-m10-mstd0.5-inc1-n9", count=30).isfinite().all()


@pytest.mark.parametrize("policy", ["nonsense", "rand-nonsense9", "augmix-q1"])
def test_an_unknown_policy_names_the_flag(policy):
    with pytest.raises(UserError, match=f"--aa {policy} .*none"):
        build_transform(True, make_args(aa=policy))


def test_an_unknown_remode_names_the_flag():
    with pytest.raises(UserError, match="--remode sometimes"):
        build_transform(True, make_args(remode="sometimes"))


# ---------------------------------------------------------------- 32 px and below
def test_small_training_image_is_padded_by_4_and_cropped():
    image = photo(32, 32)
    padded = ImageOps.expand(image, border=4, fill=0)
    crops = {padded.crop((x, y, x + 32, y + 32)).tobytes(): (x, y) for x in range(9) for y in range(9)}
    outputs = train_outputs(image, 40, input_size=32, hflip=0., **PLAIN)
    places = {crops[pixels(output).tobytes()] for output in outputs}
    assert len(places) > 20
    assert min(min(place) for place in places) == 0 and max(max(place) for place in places) == 8


def test_small_src_pads_by_reflection():
    image = Image.new("RGB", (32, 32), "white")
    assert train_outputs(image, 20, input_size=32, src=True, **PLAIN).min() > 2  # white all over
    assert train_outputs(image, 20, input_size=32, src=False, **PLAIN).min() < -1  # black edges


def test_small_evaluation_image_is_taken_as_it_is():
    output = build_transform(False, make_args(input_size=32))(photo(32, 32))
    assert pixels(output).tobytes() == photo(32, 32).tobytes()


@pytest.mark.parametrize("size", [8, 28, 32, 33, 48])
@pytest.mark.parametrize("width, height",
                         [(8, 8), (32, 32), (100, 40), (40, 100), (32, 48), (31, 32), (1, 1)])
@pytest.mark.parametrize("flags", [{}, {"src": True}, {"ThreeAugment": True}], ids=str)
def test_images_of_any_size_come_out_square(size, width, height, flags):
    args = make_args(input_size=size, **flags)
    for is_train in (True, False):
        output = build_transform(is_train, args)(photo(width, height))
        assert output.shape == (3, size, size) and output.dtype == torch.float32


def test_small_training_resizes_larger_images_instead_of_cutting_a_corner_out():
    image = Image.new("RGB", (200, 100))
    image.paste("white", (100, 0, 200, 100))  # left half black, right half white
    outputs = train_outputs(image, 60, input_size=32, **PLAIN)[:, :, 8:-8, 8:-8]  # away from the padding
    both = sum(int(output.min() < -1 and output.max() > 2) for output in outputs)
    assert both > 20  # a 32 px cut out of 200 would show both halves in one of six


def test_src_shows_the_shorter_side_almost_whole():
    image = Image.new("RGB", (96, 96))
    image.paste("white", (40, 40, 56, 56))
    shown = (train_outputs(image, 30, src=True, **PLAIN) > 0)[:, 0].sum((1, 2))  # white pixels
    assert (shown.float() - 64).abs().max() < 20                      # 8 x 8 of 48 x 48, never zoomed into
    zoomed = (train_outputs(image, 30, **PLAIN) > 0)[:, 0].sum((1, 2))
    assert zoomed.float().std() > 50


# ---------------------------------------------------------------- very thin images
def stripes(width, height):
    """Smooth along its longer side, so that a shift of half a pixel shows."""
    wave = 127.5 + 127.5 * np.sin(np.arange(max(width, height)) / 7)
    colours = np.stack([wave, wave[::-1], np.linspace(0, 255, len(wave))], -1).astype(np.uint8)
    rows = np.repeat(colours[None], min(width, height), 0)
    return Image.fromarray(rows if width >= height else rows.transpose(1, 0, 2).copy())


@pytest.mark.parametrize("width, height", [(20, 1), (21, 1), (1, 20), (400, 20), (20, 401), (100, 80), (1, 1), (3, 60)])
def test_images_of_up_to_twenty_times_their_shorter_side_stay_as_they_are(width, height):
    image = stripes(width, height)
    assert shorten(image, None) is image
    for flags in ({"input_size": 32}, {"input_size": 48, "src": True}):
        args = make_args(**flags, **PLAIN)
        size, padding = args.input_size, args.crop_padding
        theirs = transforms.Compose([
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.RandomCrop(size, padding, padding_mode="reflect" if args.src else "constant"),
            transforms.RandomHorizontalFlip(), Normalise()])
        for seed, ours in enumerate(train_outputs(image, 4, **flags, **PLAIN)):
            seed_all(seed)
            assert torch.equal(ours, theirs(image))
    theirs = transforms.Compose([transforms.Resize(54, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(48),
                                 Normalise()])
    assert torch.equal(build_transform(False, make_args(input_size=48))(image), theirs(image))


@pytest.mark.parametrize("width, height", [(210, 10), (211, 10), (10, 300), (11, 301), (500, 9), (1001, 7), (999, 8)])
def test_the_centre_of_a_very_thin_image_is_its_centre(width, height):
    image = stripes(width, height)
    assert max(shorten(image, lambda spare: spare // 2).size) in (20 * min(image.size), 20 * min(image.size) + 1)
    theirs = transforms.Compose([transforms.Resize(54, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(48)])(image)
    ours = pixels(build_transform(False, make_args(input_size=48))(image))
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.max() <= 6 and difference.mean() < 2      # one pixel of the result at most; half one of the image is more


@pytest.mark.slow
def test_training_sees_all_of_a_very_thin_image():
    for width, height in ((3000, 10), (10, 3000)):
        image = stripes(width, height)      # blue grows from 0 to 255 along it
        for flags in ({"input_size": 32}, {"input_size": 48, "src": True}):
            outputs = train_outputs(image, 200, hflip=0.0, **flags, **{**PLAIN, "crop_padding": 0})
            middle = outputs.shape[-1] // 2
            shown = sorted(pixels(output).getpixel((middle, middle))[2] for output in outputs)
            assert shown[0] < 20 and shown[-1] > 235 and 90 < shown[100] < 165, (flags, shown[::20])


@pytest.mark.parametrize("width, height", [(20_000, 1), (1, 20_000), (60_000, 2)])
@pytest.mark.parametrize("is_train, flags", [(False, {}), (True, {"src": True}), (True, {"input_size": 32}), (True, {})], ids=str)
def test_a_very_thin_image_takes_little_memory(width, height, is_train, flags):
    transform = build_transform(is_train, make_args(**{"input_size": 224, **flags}))
    image = Image.new("RGB", (width, height), "red")

    assert grown(transform, image) < 80        # MB; resized as a whole it would be 4 GB


# ---------------------------------------------------------------- 3-Augment
def test_three_augment_is_gray_solarize_or_blur():
    image = photo(48, 48)
    reflected = Image.fromarray(np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect"))
    crops = [reflected.crop((x, y, x + 48, y + 48)) for x in range(9) for y in range(9)]
    expected = {crop.convert("L").convert("RGB").tobytes(): "gray" for crop in crops}
    expected |= {ImageOps.solarize(crop).tobytes(): "solarize" for crop in crops}
    outputs = train_outputs(image, 60, ThreeAugment=True, src=True, hflip=0., **PLAIN)
    outputs = [pixels(output) for output in outputs]
    kinds = [expected.get(output.tobytes(), "other") for output in outputs]
    assert all(kinds.count(kind) >= 8 for kind in ("gray", "solarize", "other")), kinds
    # What is left is blurred: near one of the crops.
    for output in (output for output, kind in zip(outputs, kinds, strict=True) if kind == "other"):
        distance = min(np.abs(np.asarray(output).astype(int) - np.asarray(crop)).mean() for crop in crops)
        assert distance < 20  # solarizing moves a pixel by 60 and more


def test_three_augment_replaces_aa():
    assert torch.equal(train_outputs(ThreeAugment=True, aa="none"), train_outputs(ThreeAugment=True))


# ---------------------------------------------------------------- random erasing can be left out
def test_erasing_is_a_last_step_that_can_be_skipped():
    with_erasing = build_transform(True, make_args(input_size=48, reprob=1.0))
    without = build_transform(True, make_args(input_size=48, reprob=0.0))
    for seed in range(5):
        outputs = []
        for call in (lambda: with_erasing(photo(), erase=False), lambda: without(photo()),
                     lambda: with_erasing(photo())):
            seed_all(seed)
            outputs.append(call())
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])


# ---------------------------------------------------------------- modes
def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 128, 257, 32896, 65535]], dtype=np.uint16)
    rgb = to_rgb(Image.fromarray(values))
    assert rgb.mode == "RGB"
    assert np.asarray(rgb)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]


@pytest.mark.parametrize("values, white, expected", [
    (np.array([0, 100, 255], np.int32), 255, [0, 100, 255]), (np.array([0, 1, 1], np.int32), 255, [0, 1, 1]),
    (np.array([0, 257, 32896, 65535], np.int32), 65535, [0, 1, 128, 255]), (np.array([0, 300], np.int32), 65535, [0, 1]),
    (np.array([0, 0.5, 1], np.float32), 1, [0, 128, 255]), (np.array([0, 99.6, 255], np.float32), 255, [0, 100, 255]),
    (np.array([0, 32896.5, 65535], np.float32), 65535, [0, 128, 255]), (np.zeros(3, np.float32), 1, [0, 0, 0])], ids=str)
def test_32_bit_grey_is_scaled_by_its_values(tmp_path, values, white, expected):
    Image.fromarray(values[None]).save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as image:
        assert image.mode in "IF"
        rgb = to_rgb(image)
    assert np.asarray(rgb)[0].tolist() == [[value] * 3 for value in expected] and rgb.info[GREY_SCALE] == white


@pytest.mark.parametrize("kind, values", [(np.int32, [-5, 3]), (np.int32, [0, 70000]), (np.float32, [0, np.nan]),
                                          (np.float32, [0, np.inf]), (np.float32, [-1, 1])])
def test_32_bit_grey_of_no_known_scale_is_refused(kind, values):
    with pytest.raises(ValueError, match="32-bit grey from .* convert it to 8 or 16 bits"):
        to_rgb(Image.fromarray(np.array([values], kind)))


def test_dark_16_bit_grey_stays_dark(tmp_path):
    """Where the file says that it has 16 bits, whatever PIL's mode for it."""
    for name in ("x.png", "x.tif", "x.pgm"):
        Image.fromarray(np.array([[0, 257, 200]], np.uint16)).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            rgb = to_rgb(image)
            assert np.asarray(rgb)[0, :, 0].tolist() == [0, 1, 1] and GREY_SCALE not in rgb.info, image.mode


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV",
                                  "F", "I", "I;16", "I;16B"])
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (5, 4))).mode == "RGB"
    assert to_rgb(Image.new(mode, (5, 4))).size == (5, 4)


@pytest.mark.parametrize("size", [(1, 1), (1500, 900), (3_000_000, 1), (1, 3_000_000)])
def test_16_bit_grey_is_scaled_a_piece_at_a_time(size):
    values = np.random.default_rng(0).integers(0, 65536, size[::-1], dtype=np.uint16)
    expected = ((values.astype(np.int64) + 128) // 257).astype(np.uint8)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(values)))[..., 1], expected)


def test_16_bit_grey_takes_little_memory():
    image = Image.new("I;16", (8192, 2048))     # 16 million pixels
    assert grown(lambda: to_rgb(image)) < 16 * 12      # MB; 30 bytes a pixel all at once


def test_alpha_is_dropped_and_the_colour_below_kept():
    assert to_rgb(Image.new("RGBA", (2, 2), (10, 20, 30, 0))).getpixel((0, 0)) == (10, 20, 30)


def test_an_animations_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.png") as image:
        assert to_rgb(image).getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_ignored_as_by_torchvision(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    photo(20, 10).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        assert to_rgb(image).size == (20, 10)


def test_normalisation_is_torchvisions_to_the_last_bit():
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])
    every_value = np.stack([np.arange(256, dtype=np.uint8).reshape(8, 32)] * 3, -1)
    every_value[..., 1] = every_value[..., 0][::-1]
    image = Image.fromarray(every_value)
    ours = Normalise()(image)
    assert ours.shape == (3, 8, 32) and ours.is_contiguous() and torch.equal(ours, theirs(image))


# ---------------------------------------------------------------- oblong inputs
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("width, height", [(80, 60), (33, 90), (200, 60)])
def test_oblong_evaluation_is_timms(mode, width, height):
    ours = build_transform(False, make_args(input_size=[48, 80], crop_mode=mode))(photo(width, height))
    theirs = create_transform((3, 48, 80), crop_pct=0.875, crop_mode=mode, interpolation="bicubic")(photo(width, height))
    assert ours.shape == (3, 48, 80) and torch.equal(ours, theirs)


def test_small_oblong_images_are_taken_as_they_are():
    image = photo(32, 24)
    assert torch.equal(build_transform(False, make_args(input_size=[24, 32]))(image), Normalise()(image))
    assert build_transform(False, make_args(input_size=[32, 24]))(image).shape == (3, 32, 24)


@pytest.mark.parametrize("size, flags", [([24, 32], {}), ([48, 64], {"src": True})])
def test_an_oblong_padded_crop_covers_the_input(size, flags):
    """An image of the input's shape is seen whole, another one at its shorter side, in its own proportions."""
    high, wide = size
    plain = {**PLAIN, "hflip": 0., "crop_padding": 0, "input_size": size, **flags}
    whole = Normalise()(photo(80, 60).resize((wide, high), Image.Resampling.BICUBIC))
    assert torch.equal(train_outputs(photo(80, 60), 3, **plain), torch.stack([whole] * 3))
    tall = Normalise()(photo(60, 90).resize((wide, round(wide * 1.5)), Image.Resampling.BICUBIC))
    windows = tall.unfold(1, high, 1).permute(1, 0, 3, 2)
    for output in train_outputs(photo(60, 90), 6, **plain):
        assert any(torch.equal(output, window) for window in windows)
    assert train_outputs(photo(), 2, **{**plain, "crop_padding": 4}).shape == (2, 3, high, wide)


def test_oblong_resized_crops_have_the_shape_of_the_input():
    """Of 3/4 to 4/3 times its ratio of width to height, as a square input's."""
    for size, shape in ((48, 1), ([48, 96], 2), ([96, 48], 1 / 2)):
        crop = build_transform(True, make_args(input_size=size, **PLAIN)).steps.transforms[0]
        seed_all()
        boxes = [crop.get_params(photo(400, 400), crop.scale, crop.ratio) for _ in range(300)]
        ratios = np.array([width / height for _, _, height, width in boxes]) / shape
        assert 0.72 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.4
        assert train_outputs(photo(), 1, input_size=size, **PLAIN).shape == (1, 3, *to_2tuple(size))


def test_what_a_thin_image_loses_depends_on_the_inputs_shape():
    image = stripes(800, 10)
    assert shorten(image, None, size=[8, 32]) is image and shorten(image, lambda spare: 0, size=[8, 31]).size == (776, 10)
    assert shorten(image, lambda spare: 0, size=[32, 8]).size == (50, 10)
