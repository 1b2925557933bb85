"""Put a checkpoint's weights in the box: into vision_kan/pretrained, under the name of its model and a tag.

    python tools/ship.py CHECKPOINT TAG --data-path DIR [--weights model_ema] [--note "Trained in 3 hours on 2 cores."]

TAG is one of models_kan.TAGS, which gives classes, preparation of images and arguments of the architecture. The matrices are
rounded to half precision, and the result is evaluated on the validation images of --data-path. Written are NAME-HASH.safetensors,
in place of an earlier one, and the model card NAME.md. Further flags are main.py's.
"""
import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vision_kan.common import console

console.starting(__name__)
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor

import models_kan
from tools.common import command, model_parser
from tools.export import WEIGHTS_TITLES, about, card_parts, markdown, measure
from vision_kan.checkpoints import shipped
from vision_kan.checkpoints.write import save_safetensors
from vision_kan.common.errors import UserError
from vision_kan.common.files import atomic_write, sha256
from vision_kan.common.text import say, shown_size, to_builtin_types
from vision_kan.config.parser import Parser
from vision_kan.models.cost import count_parameters
from vision_kan.run.trained import Trained, describe_result, load_trained

# tag -> the name of the data, and what its card says of them
DATA = {
    "digits": ("scikit-learn's digits",
               "[The digits of scikit-learn](https://scikit-learn.org/stable/datasets/toy_dataset.html), 1,797 handwritten ones "
               "of 8 x 8 px (Alpaydin and Kaynak, 1998, CC BY 4.0), enlarged to 32 x 32. They come with scikit-learn."),
    "cifar10": ("CIFAR-10",
                "[CIFAR-10](https://www.cs.toronto.edu/~kriz/cifar.html), photos of 32 x 32 px (Alex Krizhevsky, Learning "
                "Multiple Layers of Features from Tiny Images, 2009); its page names no licence. Here they were JPEG files, "
                "45,000 for training and 5,000 for validation. They do not come with this code."),
}


@torch.no_grad()
def halved(trained: Trained) -> dict[str, Tensor]:
    """The model's state with matrices in half precision. The model itself is rounded alike, so that it is what is shipped.
    Vectors (norms, biases, grids) stay exact: they are small, and grids are no round numbers."""
    state = trained.model.state_dict()
    for value in state.values():
        if value.ndim > 1:
            value.copy_(value.half())
    if not all(value.isfinite().all() for value in state.values()):
        raise UserError(f"checkpoint {trained.path} has weights above 65504, which half precision cannot hold")
    return {key: value.half() if value.ndim > 1 else value for key, value in state.items()}


def card(name: str, trained: Trained, note: str) -> str:
    """The model card: what tools/export.py says of a model, with the results of all of its checkpoint's weights, the command, the
    note and the licence of the data."""
    parts, (title, data), args = card_parts(trained), DATA[name.partition(".")[2]], trained.about.get("args", {})
    where = "" if trained.args.data_set == "DIGITS" else "--data-path DIR "
    before = [f"{WEIGHTS_TITLES[key]}: {describe_result({**results, 'data_set': title})}"
              for key, results in trained.about.get("results", {}).items() if key in WEIGHTS_TITLES]
    parts["Results"] += " These are the weights in the file, with matrices in half precision." + "".join(
        f"\n\nAt the end of the training, in single precision: {'; '.join(before)}." if before else "")
    parts["Data"] = f"{data}\n\nClasses: {', '.join(trained.class_names)}."
    recipe = Path(str(args.get("config"))).name
    if args.get("config"):
        parts["Recipe"] = f"`python main.py --config recipes/{recipe} {where}--output_dir FOLDER`\n\n{parts['Recipe']}"
    parts["Versions"] = ", ".join(f"{key} {value}" for key, value in trained.about.get("versions", {}).items()) + "."
    if note:
        parts["Recipe"] += f"\n\n{note}"
    parts["Licence"] = "The weights: Apache-2.0, as this code. The data: see above."
    parts["Use"] = (f"`timm.create_model(\"{name}\", pretrained=True)` after `import models_kan`; "
                    f"`python main.py {where}--eval --resume {name}`; `python tools/predict.py {name} IMAGE`.")
    return markdown(name, parts)


def described(trained: Trained) -> dict[str, Any]:
    """The preparation of images and the architecture of a checkpoint."""
    kwargs = {key: value for key, value in trained.spec.kwargs.items() if key not in ("num_classes", "img_size")}
    return {**trained.data_config, **kwargs, **models_kan.own_options(trained.spec)}


def by_name(trained: Trained, tag: models_kan.Tag) -> dict[str, Any]:
    """The same of the model that timm creates by its name and the tag."""
    spec = models_kan.ModelSpec(trained.spec.name.split(".")[0], dict(tag.kwargs))
    model: Any = timm.create_model(spec.name, **spec.kwargs)
    return {**resolve_model_data_config(model), "mean": tag.mean, "std": tag.std, **tag.kwargs, **models_kan.own_options(spec)}


def arguments() -> Parser:
    parser = model_parser("ship.py", __doc__)
    parser.add_argument("tag", choices=models_kan.TAGS, metavar="TAG", help=f"one of {', '.join(models_kan.TAGS)}")
    parser.add_argument("--note", default="", metavar="TEXT", help="sentences for the card: images, machine, time")
    return parser


def run(own: argparse.Namespace, flags: list[str]) -> int:
    trained = load_trained(own.checkpoint, weights=own.weights, device=own.device, flags=flags)
    name = f"{trained.spec.name.split('.')[0]}.{own.tag}"
    size, _ = models_kan.split_name(name)
    if size is None:
        raise UserError(f"checkpoint {own.checkpoint} holds {trained.spec.name}: only models of --list-models can be shipped")
    tag = models_kan.TAGS[own.tag]
    if tuple(trained.class_names) != tag.classes:
        raise UserError(f"checkpoint {own.checkpoint} has the classes {', '.join(trained.class_names[:5])} ..., which are not "
                        f"those of TAG {own.tag} in models_kan.TAGS")
    found, named = described(trained), by_name(trained, tag)
    if differing := [f"{key} {found.get(key)} and not {named.get(key)}" for key in {**found, **named}
                     if found.get(key) != named.get(key)]:
        raise UserError(f"checkpoint {own.checkpoint} has {', '.join(differing)}, which a model of the name {name} has: ship one "
                        "that was trained so, or write what it has in a new TAG of models_kan.TAGS")
    if not trained.args.data_path and trained.args.data_set != "DIGITS":
        raise UserError("the card states the accuracy: give --data-path DIR")
    trained.about.get("versions", {}).pop("platform", None)      # of the machine, not of the weights
    state = halved(trained)
    measure(trained)
    assert trained.results
    trained.results["data_set"] = DATA[own.tag][0]
    folder, earlier = shipped.FOLDER, shipped.shipped().get(name)
    with atomic_write(folder / f"{name}.md") as place:
        target = write(folder, name, state, trained)
        place.write_text(card(name, trained, own.note), encoding="utf-8")
    if earlier and earlier != target:
        earlier.unlink()
    say(f"{target}: {count_parameters(trained.model):,} parameters at {shown_size(trained.args.input_size)} px, "
        f"{target.stat().st_size / 2 ** 20:.2f} MiB")
    return 0


def write(folder: Path, name: str, state: dict[str, Tensor], trained: Trained) -> Path:
    unnamed = folder / f".{name}"
    save_safetensors(state, to_builtin_types(about(trained)), unnamed)
    return unnamed.rename(folder / f"{name}-{sha256(unnamed)[:8]}.safetensors")


main = command(arguments, run, with_main=True)

if __name__ == "__main__":
    sys.exit(main())
