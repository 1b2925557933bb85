"""Classify images with a trained model: its first choices, with names and probabilities.

    python tools/predict.py CHECKPOINT IMAGE|FOLDER [IMAGE|FOLDER ...] [--top 5] [--format table|json|csv] [--output FILE]

CHECKPOINT is one of ours, of the original Vision-KAN, KAT or DeiT: a file, a folder, a URL, hf-hub:OWNER/NAME or a name with
weights (main.py --list-models). Further flags are main.py's (--eval-crop-ratio, --num_workers, ...) and come last. Images that
cannot be read are named and left out; if none can be read, the exit code is 2.
"""
import argparse
import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import NamedTuple, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vision_kan.common import console

console.starting(__name__)
import torch

from tools.common import check_at_least_1, check_not_source, command, model_parser
from vision_kan.common.errors import UserError
from vision_kan.common.files import atomic_write
from vision_kan.common.text import printable, to_json
from vision_kan.config.parser import Parser
from vision_kan.run.trained import Pictures, Trained, image_files, load_trained

FORMATS = ("table", "json", "csv")


class Prediction(NamedTuple):
    file: Path
    classes: list[int]              # indices, the most probable first
    probabilities: list[float]      # of these classes, by softmax


@torch.inference_mode()
def predict(trained: Trained, pictures: Pictures, top: int = 5) -> Iterator[Prediction]:
    """The `top` first choices (all, if there are fewer classes) for each image that can be read, in their order."""
    for images, indices in pictures:
        probabilities = trained.model(images.to(trained.device)).float().softmax(1)
        best = probabilities.topk(min(top, probabilities.shape[1]))
        for index, classes, values in zip(indices.tolist(), best.indices.tolist(), best.values.tolist()):
            yield Prediction(pictures.files[index], classes, values)


# ---------------------------------------------------------------- formats
def _shown(file: Path) -> str:
    """The file's name, with bytes that are not UTF-8 escaped."""
    return str(file).encode(errors="backslashreplace").decode()


def write_table(predictions: Iterator[Prediction], names: list[str], pictures: Pictures, out: TextIO) -> None:
    first = min(60, max(5, *(len(printable(_shown(file))) for file in pictures.files)))
    second = min(40, max(5, *map(len, names)))
    out.write(f"{'image':{first}}  {'class':{second}}  probability\n")
    for file, classes, probabilities in predictions:
        left = printable(_shown(file), first)
        for number, probability in zip(classes, probabilities):
            name = names[number] if len(names[number]) <= second else names[number][:second - 3] + "..."
            out.write(f"{left:{first}}  {printable(name):{second}}  {probability:>11.2%}\n")
            left = ""
        out.flush()


def write_json(predictions: Iterator[Prediction], names: list[str], pictures: Pictures, out: TextIO) -> None:
    images = [{"file": _shown(file), "predictions": [{"class": number, "name": names[number], "probability": probability}
                                                     for number, probability in zip(classes, probabilities)]}
              for file, classes, probabilities in predictions]
    found = {"images": images, "unreadable": [_shown(file) for file in pictures.unreadable]}
    unicode = not out.encoding or codecs.lookup(out.encoding).name == "utf-8"       # ASCII for any other terminal
    out.write((to_json(found, indent=1) if unicode else json.dumps(found, indent=1)) + "\n")


def write_csv(predictions: Iterator[Prediction], names: list[str], pictures: Pictures, out: TextIO) -> None:
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["file", "rank", "class", "name", "probability"])
    for file, classes, probabilities in predictions:
        for rank, (number, probability) in enumerate(zip(classes, probabilities), 1):
            rows.writerow([_shown(file), rank, number, names[number], f"{probability:.6f}"])


WRITERS: dict[str, Callable[[Iterator[Prediction], list[str], Pictures, TextIO], None]] = {
    "table": write_table, "json": write_json, "csv": write_csv}


# ---------------------------------------------------------------- command
def arguments() -> Parser:
    parser = model_parser("predict.py", __doc__)
    parser.add_argument("places", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="folders include their subfolders")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="choices per image (default: 5)")
    parser.add_argument("--format", choices=FORMATS, help="default: the ending of --output, else table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of printing")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    return parser


def run(own: argparse.Namespace, flags: list[str]) -> int:
    check_at_least_1(own, "top", "batch_size")
    ending = own.output.suffix[1:].lower() if own.output else ""
    kind = own.format or (ending if ending in FORMATS else "table")
    files = image_files(own.places)
    if own.output and own.output.exists() and any(own.output.samefile(file) for file in files):
        raise UserError(f"--output {own.output} is one of the images, which would be lost: choose another name")
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_write(own.output)) if own.output else None     # fails before the long work
        with redirect_stdout(sys.stderr):       # stdout is for the predictions only
            trained = load_trained(own.checkpoint, weights=own.weights, device=own.device, flags=flags)
        if own.output:
            check_not_source(own.output, trained.path)
        if not trained.class_names:
            raise UserError(f"checkpoint {trained.path} has no head and so no classes to predict: give it one by training with "
                            "main.py --finetune, or name another")
        pictures = Pictures(files, trained.args, own.batch_size)
        out = stack.enter_context(open(temporary, "w", encoding="utf-8", newline="")) if temporary else sys.stdout
        WRITERS[kind](predict(trained, pictures, own.top), trained.class_names, pictures, out)
        if len(pictures.unreadable) == len(files):
            raise UserError(f"none of the {len(files)} images can be read (see above): name others")
    if pictures.unreadable:
        print(f"{len(pictures.unreadable)} of the {len(files)} images cannot be read and are left out (see above)",
              file=sys.stderr)
    if own.output:
        print(f"{own.output}: {len(files) - len(pictures.unreadable)} images", file=sys.stderr)
    return 0


main = command(arguments, run, with_main=True)

if __name__ == "__main__":
    sys.exit(main())
