"""What the tools share: their flags for a checkpoint, and the images that it is used on."""
import argparse

from datasets import build_dataset, build_loaders
from vision_kan.checkpoints.checkpoint import WEIGHTS
from vision_kan.common.errors import UserError
from vision_kan.common.process import Process
from vision_kan.data.images import ImageSet, Split
from vision_kan.data.loaders import Loaders
from vision_kan.run.build import model_spec
from vision_kan.run.starting import Start
from vision_kan.run.trained import Trained


def loaders_of(trained: Trained) -> Loaders:
    """The validation images that --data-path and --data-set among the flags name, as `main.py --eval` has them.
    Raises UserError as that does, also where the classes are others."""
    loaders = build_loaders(trained.args, Process(device=trained.device), trained.about.get("class_names"))
    model_spec(trained.config, Start(spec=trained.spec), loaders.nb_classes)
    return loaders


def training_images(trained: Trained) -> ImageSet:
    """The training images that --data-path and --data-set name, prepared as those of an evaluation are."""
    data, _ = build_dataset(True, trained.args, trained.about.get("class_names"))
    if data.is_stream:
        raise UserError(f"--data-set {trained.args.data_set} is a stream, from which no images can be chosen: give the "
                        "same images as a folder or as another data set that is read by number")
    return ImageSet(Split(data.images, data.targets, data.classes), False, trained.args)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """CHECKPOINT, --weights and --device of a tool; what it does not know are flags of main.py's."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of main.py's or tools/convert.py's, of the "
                        "original Vision-KAN or DeiT: a file, a folder, a URL or hf-hub:OWNER/NAME")
    parser.add_argument("--weights", choices=WEIGHTS, default="model", help="the trained ones or their moving average")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
