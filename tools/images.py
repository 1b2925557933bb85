"""The images that a tool uses a checkpoint on."""
from datasets import build_dataset, build_loaders
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
