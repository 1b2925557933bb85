"""What all tools share: parsers, exit codes, pictures as PNG. Imports neither torch nor matplotlib."""
import argparse
import io
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vision_kan.checkpoints import WEIGHTS
from vision_kan.common import console
from vision_kan.common.errors import UserError
from vision_kan.common.files import atomic_write
from vision_kan.config.checks import impossible_path
from vision_kan.config.flags import FLAGS, parse_beside_main
from vision_kan.config.parser import Parser, show_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LOCATIONS = ("CHECKPOINT", "SOURCE")    # arguments that name a file, a folder, a URL or a name with weights: text, no Path
PLACE = "USER/NAME"     # stands in a model card for the model's name on the Hub, which push_to_hub.py fills in


def tool_parser(name: str, description: str | None) -> Parser:
    """The parser of `tools/NAME`. description: the tool's docstring, shown unchanged by --help."""
    return Parser(name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def model_parser(name: str, description: str | None) -> Parser:
    """A tool's parser with CHECKPOINT, --weights and --device."""
    parser = tool_parser(name, description)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of main.py's or tools/convert.py's, of the "
                        "original Vision-KAN, KAT or DeiT: a file, a folder, a URL, hf-hub:OWNER/NAME or a name with weights "
                        "(main.py --list-models)")
    parser.add_argument("--weights", choices=WEIGHTS, default="model", help="the trained ones or their moving average")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser


def check_at_least_1(own: argparse.Namespace, *names: str) -> None:
    """Raises UserError that names the first of these flags whose value is below 1."""
    for name in names:
        if getattr(own, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(own, name)} must be at least 1")


def check_paths(parser: Parser, own: argparse.Namespace) -> None:
    """Raises UserError for an argument that cannot be a path or a URL. A file that exists is one, whatever its
    name: `~draft.png`."""
    for action in parser._actions:
        if action.type is Path or action.metavar in LOCATIONS:
            value = getattr(own, action.dest)
            for one in value if isinstance(value, list) else [value]:
                exists = isinstance(one, Path) and os.path.lexists(one)
                if one is not None and not exists and (reason := impossible_path(str(one))):
                    name = action.option_strings[0] if action.option_strings else action.metavar
                    raise UserError(f"{name} {show_value(one)} cannot be a path ({reason}): check it")


def chooses_images(dest: str) -> bool:
    """Whether a flag of main.py says which images an evaluation takes, or how it prepares them: those of the data, and the seed,
    by which --val-split draws the held-out images. A file that a tool makes from a checkpoint keeps them."""
    return FLAGS[dest].scope == "data" or dest == "seed"


def check_not_source(target: Path, source: str) -> None:
    """Raises UserError if a tool would replace the file of the checkpoint that it has read. source: `Checkpoint.path`."""
    from vision_kan.checkpoints.downloads import local_path  # imports torch
    from vision_kan.checkpoints.read import weights_file
    place = local_path(source)
    file = weights_file(place) if place else None
    if file and os.path.exists(target) and os.path.exists(file) and os.path.samefile(target, file):
        raise UserError(f"{target} is the checkpoint itself, which would be lost: choose another name")


def make_folder(folder: Path) -> Path:
    """Make --output-dir, if it is not there. Raises UserError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be made ({error.strerror}): choose another folder") from error
    return folder


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95% interval of the mean of two or more values, by Student's t."""
    from scipy.stats import t as student_t  # slow to import
    return float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def png(figure: "Figure", dpi: int = 110, **options) -> bytes:
    """The figure as a PNG, without warnings of characters that the font lacks. options: of `Figure.savefig`."""
    memory = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(memory, dpi=dpi, format="png", **options)
    return memory.getvalue()


def save_picture(figure: "Figure", target: Path, **options) -> None:
    """Write a figure as a PNG, completely or not at all. options: of `png`."""
    with atomic_write(target) as place:
        place.write_bytes(png(figure, **options))


def command(arguments: Callable[[], Parser], run: Callable[[argparse.Namespace, list[str]], int],
            with_main: bool = False) -> Callable[..., int]:
    """The `main` of a tool. It takes the command line's words (None: sys.argv) and returns the exit code
    (`console.exit_code`): 2 for bad input, after one sentence.

    Args:
        arguments: returns the tool's parser.
        run: takes the tool's arguments and the remaining words, which are flags of main.py; returns the exit code.
        with_main: accept the flags of main.py, too; else they are refused."""
    def main(argv: list[str] | None = None) -> int:
        def program() -> int:
            words = sys.argv[1:] if argv is None else argv
            parser = arguments()
            own, rest = parse_beside_main(parser, words) if with_main else (parser.parse_args(words), [])
            check_paths(parser, own)
            return run(own, rest)
        return console.exit_code(program)
    return main
