"""A trained model from a checkpoint, ready for use, and images to use it on; the tools start with these."""
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from timm.data import ImageNetInfo
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models_kan import ModelSpec
from vision_kan.checkpoints.downloads import HUB, LOCAL, is_url
from vision_kan.checkpoints.shipped import shipped
from vision_kan.common.errors import UserError
from vision_kan.common.process import choose_device
from vision_kan.common.text import to_builtin_types
from vision_kan.config.checks import validate
from vision_kan.config.flags import PREPARATION
from vision_kan.config.resolve import Config, parse_args
from vision_kan.data.folders import find_images
from vision_kan.data.images import FileImages, ImageSet, Split
from vision_kan.data.transforms import is_small
from vision_kan.data.workers import batches
from vision_kan.models import vetting
from vision_kan.models.infer import load_exactly
from vision_kan.run.build import build_model, choose_backend
from vision_kan.run.starting import effective_config, read_start


@dataclass
class Trained:
    """A trained model and what its checkpoint says of it.

    model: in evaluation mode, on its device, without gradients.
    config: the effective flags. `args.input_size` and those of `flags.PREPARATION` define the preparation of images.
    class_names: one for each output.
    path: of the checkpoint.
    about: the checkpoint's other entries (`Checkpoint.about`).
    weights: the key of the model's weights (`checkpoints.WEIGHTS`).
    results: the checkpoint's results of these weights (`result_of`), or None if images were prepared otherwise."""
    model: nn.Module
    spec: ModelSpec
    config: Config
    class_names: list[str]
    path: str
    about: dict[str, Any]
    weights: str = "model"
    results: dict[str, Any] | None = None

    @property
    def args(self) -> Namespace:
        return self.config.args

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def data_config(self) -> dict[str, Any]:
        """The preparation of an image, for `timm.data.create_transform`, with the same result. At 32 px and below this holds for
        images of this size only: timm resizes larger ones, this program crops them."""
        args, size = self.args, self.args.input_size
        return {"input_size": (3, *to_2tuple(size)), "crop_pct": 1.0 if is_small(size) else args.eval_crop_ratio,
                "crop_mode": args.crop_mode, "interpolation": args.interpolation, "mean": tuple(args.mean),
                "std": tuple(args.std)}

    @property
    def has_data(self) -> bool:
        """Whether the flags, or the checkpoint's, name a data set whose images are available."""
        return bool(self.args.data_path) or self.args.data_set.startswith(("DIGITS", "hfds/", "hfids/"))


def load_trained(location: str, *, weights: str = "model", device: str = "auto", flags: Sequence[str] = ()) -> Trained:
    """The model of a checkpoint.

    Args:
        location: a file or folder of this project, of the original Vision-KAN, of KAT or of DeiT, its URL, hf-hub:OWNER/NAME,
            or the name of weights that come with this code.
        weights: one of `checkpoints.WEIGHTS`.
        device: as --device.
        flags: further flags of main.py, such as --data-path DIR.
    Raises: UserError for anything that `main.py --eval --resume` refuses."""
    config = parse_args(["--eval", "--resume", location, "--device", device, *flags])
    start = read_start(config)
    config = effective_config(config, start)
    validate(config.args)       # the checkpoint's flags may have any value
    checkpoint, spec = start.checkpoint, start.spec
    if weights != "model" and not checkpoint.state.get(weights):
        raise UserError(f"checkpoint {checkpoint.path} holds no {weights}: leave out --weights {weights}")
    assert spec is not None
    if "num_classes" not in spec.kwargs:        # another timm model
        spec = ModelSpec(spec.name, {**spec.kwargs, "num_classes": vetting.check_weights(spec, checkpoint).num_classes})
    model: Any
    model, spec = build_model(spec, config)
    load_exactly(model, checkpoint.weights(weights), f"{weights} in checkpoint {checkpoint.path}")
    chosen = choose_device(device)
    with redirect_stdout(sys.stderr):       # a tool's stdout is for its result
        choose_backend(config, spec, model, chosen)
    model = model.to(chosen).eval().requires_grad_(False)
    about, stored = checkpoint.about, checkpoint.flags
    same = all(to_builtin_types(getattr(config.args, key)) == stored[key] for key in PREPARATION & stored.keys())
    results = about.get("results", {}).get(weights) if same else None
    return Trained(model, spec, config, class_names(about, model.num_classes), checkpoint.path, about, weights, results)


def class_names(about: Mapping[str, Any], num_classes: int) -> list[str]:
    """The checkpoint's names of its classes, ImageNet's ids replaced by words. Without names: ImageNet's for 1000 classes, else
    numbers."""
    info = ImageNetInfo()
    words = dict(zip(info.label_names(), info.label_descriptions()))
    names = about.get("class_names")
    if not isinstance(names, list) or len(names) != num_classes:
        names = info.label_names() if num_classes == info.num_classes() else [str(number) for number in range(num_classes)]
    return [words.get(name, name) for name in names]


# ---------------------------------------------------------------- images
def image_files(places: Sequence[str | Path]) -> list[Path]:
    """The files among `places`, and all images in and below the folders among them (`folders.find_images`), sorted by name.
    Raises UserError for a place that does not exist, and for a folder without images."""
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(map(Path, find_images(str(place))))
            if not inside:
                raise UserError(f"{place} holds no images: name a folder with some, or files")
            found += inside
        elif place.exists():
            found.append(place)
        else:
            raise UserError(f"{place} does not exist: check the path")
    return list(dict.fromkeys(found))


class Pictures:
    """Image files, prepared for the model, in batches of (images float32 [B, 3, H, W], indices into `files` int64 [B]).

    An unreadable file is left out and named on stderr; `unreadable` lists those found so far. Images are turned upright by their
    EXIF orientation, unless the flags or those of the training turn this off.

    workers: number of loader processes; None: at most --num_workers, and fewer for few files."""

    def __init__(self, files: Sequence[Path], args: Namespace, batch_size: int = 64, workers: int | None = None):
        self.files = list(files)
        args = Namespace(**{**vars(args), "exif_orientation": args.exif_orientation is not False})
        self.data = ImageSet(Split(FileImages(list(map(str, files))), np.arange(len(files)), []), False, args)
        if workers is None:
            workers = min(args.num_workers, len(files) // batch_size)
        self.loader = DataLoader(self.data, batch_size, num_workers=workers, generator=torch.Generator())

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, indices in batches(self.loader):
            if (readable := indices >= 0).any():
                yield images[readable], indices[readable]

    @property
    def unreadable(self) -> list[Path]:
        return [self.files[index] for index in self.data.unreadable.nonzero().flatten().tolist()]


def denormalised(image: Tensor, args: Namespace) -> Tensor:
    """A model's input [3, H, W] as an image from 0 to 1, without the normalisation by --mean and --std."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (args.mean, args.std))
    return (image * std + mean).clamp(0, 1)


def default_output(checkpoint: str, ending: str) -> Path:
    """A tool's default output: beside the checkpoint, named like it with `ending` in place of the suffix; for a URL, a model on
    the Hub or weights that come with this code in the current folder."""
    on_the_hub = checkpoint.startswith(HUB)
    if on_the_hub or is_url(checkpoint):
        path = Path(Path(urlparse(checkpoint).path).name)
    else:
        path = Path(checkpoint.removeprefix(LOCAL)).expanduser()
    whole = on_the_hub or path.is_dir() or not path.exists() and checkpoint in shipped()
    return path.with_name(f"{path.name if whole else path.stem}{ending}")


def describe_result(results: Mapping[str, Any]) -> str:
    """The results of `training.state.result_of` in words."""
    split = f", {results['split']}" if results["split"] else ""
    return (f"top-1 {results['acc1']:.2f} top-5 {results['acc5']:.2f} ({results['images']} images of {results['data_set']}"
            f"{split})")
