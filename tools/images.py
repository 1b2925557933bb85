"""The images on which a tool uses a checkpoint."""
import sys

from datasets import build_dataset, build_loaders
from vision_kan.common.errors import UserError
from vision_kan.common.process import Process
from vision_kan.common.text import say
from vision_kan.data.images import ImageSet, Split
from vision_kan.data.loaders import Loaders
from vision_kan.data.names import needs_splitting
from vision_kan.run.build import model_spec
from vision_kan.run.starting import Start
from vision_kan.run.trained import Trained


def loaders_of(trained: Trained) -> Loaders:
    """The loaders of the validation images that --data-path and --data-set name, as in `main.py --eval`. Raises UserError as it
    does, also if the classes differ."""
    loaders = build_loaders(trained.args, Process(device=trained.device), trained.about.get("class_names"))
    model_spec(trained.config, Start(spec=trained.spec), loaders.nb_classes)
    return loaders


def training_images(trained: Trained) -> ImageSet:
    """The training images that --data-path and --data-set name, prepared as for an evaluation. Raises UserError for a stream."""
    data, _ = build_dataset(True, trained.args, trained.about.get("class_names"))
    if data.is_stream:
        raise UserError(f"--data-set {trained.args.data_set} is a stream, from which no images can be chosen: give the "
                        "same images as a folder or as another data set that is not a stream")
    if not trained.args.val_split and needs_splitting(trained.args.data_set, trained.args.data_path):
        say(f"note: --data-path {trained.args.data_path} has no train/ and val/, so the training images here are those of the "
            "evaluation: give --val-split as in the training", file=sys.stderr)
    return ImageSet(Split(data.images, data.targets, data.classes), False, trained.args)
