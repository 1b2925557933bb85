"""Train one model with several feed-forwards, and compare their accuracy and cost.

    python tools/compare.py --data-path DIR --ffn mlp gkan kat kan [--seeds 3] [--output-dir FOLDER] [flags of main.py]

Each run is main.py's, in FOLDER/FFN_seedN, one after the other and each seed with all feed-forwards in turn. Further flags are
main.py's and hold for all runs: --model (of any size or timm architecture), --config, --epochs ...; an option of KANs holds for
those feed-forwards that have it. FOLDER/FFN.yaml is the recipe of a feed-forward's runs. The same command continues after a stop,
also with more seeds or feed-forwards. It prints a table, and writes compare.csv and the curves, compare.png, into FOLDER.
"""
import argparse
import csv
import io
import os
import signal
import statistics
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from vision_kan.common import console

console.starting(__name__)
import torch
from matplotlib.figure import Figure
from timm.layers import to_2tuple

import models_kan
from tools.common import check_at_least_1, command, half_interval, make_folder, save_picture, tool_parser
from tools.logs import label_curves, read_log
from vision_kan.checkpoints.read import CHECKPOINT
from vision_kan.common.errors import EXIT_PREEMPTED, TrainingFailed, UserError
from vision_kan.common.files import atomic_write
from vision_kan.config.checks import validate
from vision_kan.config.flags import FFN_SUFFIXES, flag_name
from vision_kan.config.parser import Parser, show_value
from vision_kan.config.recipes import dump_yaml, load_recipe
from vision_kan.config.resolve import Config, parse_args
from vision_kan.models.cost import cost_mismatch, measure_flops
from vision_kan.run.build import COEFFICIENT_FLAGS, asked_for, build_model, model_spec
from vision_kan.run.starting import Start, effective_config
from vision_kan.run.trained import load_trained

OUTPUT = ROOT / "runs" / "compare"
OWN_FLAGS = ("seed", "resume", "eval", "output_dir", "list_models")     # of main.py, which this program sets or excludes
OF_ALL_KANS = ("kan_backend", "log_kan")
MAY_CHANGE = ("data_path", "device", "num_workers")         # of main.py, between two calls


# ---------------------------------------------------------------- recipes
def recipe_of(ffn: str, config: Config) -> dict[str, Any]:
    """The flags of a feed-forward's runs, dest -> value: those that the user gave and that have an effect on its model."""
    name = models_kan.with_feed_forward(config.args.model, FFN_SUFFIXES[ffn])
    own = models_kan.options_of(name) if models_kan.register(name) else models_kan.KAN_OPTIONS
    without = {"model", "config", *models_kan.KAN_OPTIONS} - {*own}
    without |= {*COEFFICIENT_FLAGS} if "kan_groups" not in own else set()
    without |= {*OF_ALL_KANS} if not own else set()
    return {"model": name, **{dest: getattr(config.args, dest) for dest in config.given if dest not in without}}


def check(ffn: str, recipe: dict[str, Any]) -> None:
    """Raises UserError if a run of this recipe cannot be built."""
    args = Namespace(**{**vars(parse_args(["--output_dir", "its own"]).args), **recipe})
    given = dict.fromkeys(recipe, f"--ffn {ffn}")
    config = effective_config(Config(args, given, dict(given)), Start())
    validate(config.args)
    with torch.device("meta"):
        build_model(model_spec(config, Start(), 10), config)


def check_unchanged(file: Path, recipe: dict[str, Any]) -> None:
    """Raises UserError if the runs that a folder holds have other flags."""
    if not file.exists():
        return
    before = load_recipe(str(file))
    for dest in {**before, **recipe}:
        if before.get(dest) != recipe.get(dest) and dest not in MAY_CHANGE:
            raise UserError(f"{file} has {flag_name(dest)} {show_value(before.get(dest, 'not given'))}, the command "
                            f"{show_value(recipe.get(dest, 'not given'))}: give the flags of before, or another --output-dir")


# ---------------------------------------------------------------- training
def train(ffn: str, seed: int, folder: Path, recipe: Path) -> None:
    """Run main.py to the last epoch; a complete run returns at once. Exits with main.py's code if that is not 0."""
    print(f"\n{ffn}, seed {seed}: {folder}", flush=True)
    stopped = False

    def stop(number, frame) -> None:        # main.py saves and ends
        nonlocal stopped
        stopped = True
        process.terminate()

    words = ["--config", str(recipe), "--seed", str(seed), "--output_dir", str(folder), "--resume", "auto"]
    process = subprocess.Popen([sys.executable, str(ROOT / "main.py"), *words])
    before = signal.signal(signal.SIGTERM, stop)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(timeout=2)         # a terminal sends the signal to both
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code < 0:
        raise TrainingFailed(f"{ffn}, seed {seed} was killed (signal {-code}), perhaps for want of memory: the same command "
                             "continues")
    if code or stopped:
        sys.exit(code or EXIT_PREEMPTED)


# ---------------------------------------------------------------- results
@dataclass
class Row:
    """A feed-forward's results. top1, ema: mean over the seeds of the last epoch, in %. spread: their standard deviation.
    difference, half: mean of the paired differences of top1 from the first feed-forward, and half of its 95% interval (Student's
    t). ms: median milliseconds of a training step. memory: the largest of the runs, in MiB. None: not known."""
    ffn: str
    seeds: int
    top1: float
    spread: float | None
    ema: float | None
    difference: float | None
    half: float | None
    parameters: int
    matmul_mflops: float
    ms: float
    memory_mib: float | None


def rows(logs: dict[str, list[list[dict[str, Any]]]], mflops: dict[str, float], batch_size: int) -> list[Row]:
    """logs: feed-forward -> the log of each seed, in the same order of seeds."""
    first = [log[-1]["test_acc1"] for log in next(iter(logs.values()))]
    found = []
    for number, (ffn, of_seeds) in enumerate(logs.items()):
        top1 = [log[-1]["test_acc1"] for log in of_seeds]
        ema = [log[-1]["ema_test_acc1"] for log in of_seeds if "ema_test_acc1" in log[-1]]
        memory = [record["memory_mib"] for log in of_seeds for record in log if record.get("memory_mib")]
        differences = [a - b for a, b in zip(top1, first)]
        found.append(Row(
            ffn, len(top1), statistics.mean(top1), statistics.stdev(top1) if len(top1) > 1 else None,
            statistics.mean(ema) if len(ema) == len(top1) else None, statistics.mean(differences) if number else None,
            half_interval(differences) if number and len(top1) > 1 else None, of_seeds[0][-1]["n_parameters"], mflops[ffn],
            statistics.median(1000 * batch_size / record["img_per_s"] for log in of_seeds for record in log),
            max(memory, default=None)))
    return found


def table(found: list[Row]) -> str:
    first = found[0].ffn
    lines = [f"{'':6}{'top-1 (%)':>16}{'EMA':>8}{f'from {first} (95%)':>26}{'parameters':>13}{'matmul MFLOPs':>15}"
             f"{'ms/step':>9}{'MiB':>8}"]
    for row in found:
        spread = "" if row.spread is None else f" ± {row.spread:.2f}"
        ema = "" if row.ema is None else f"{row.ema:.2f}"
        difference = "" if row.difference is None else f"{row.difference:+.2f}"
        if row.difference is not None and row.half is not None:
            difference += f" [{row.difference - row.half:+.2f}, {row.difference + row.half:+.2f}]"
        memory = "" if row.memory_mib is None else f"{row.memory_mib:,.0f}"
        lines.append(f"{row.ffn:6}{f'{row.top1:.2f}{spread}':>16}{ema:>8}{difference:>26}{row.parameters:>13,}"
                     f"{row.matmul_mflops:>15,.2f}{row.ms:>9.1f}{memory:>8}")
    for row in found[1:]:
        costs: list[dict[str, float]] = [{"parameters": one.parameters, "matmul FLOPs": one.matmul_mflops * 1e6}
                                         for one in (row, found[0])]
        if reason := cost_mismatch(*costs):
            lines.append(f"{row.ffn} and {first}: {reason}")
    if found[0].seeds == 1:
        lines.append("One seed shows no difference smaller than a few points: --seeds 3 gives an interval.")
    return "\n".join(lines)


def write_csv(found: list[Row], target: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(found[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, found))
    with atomic_write(target) as place:
        place.write_text(text.getvalue(), encoding="utf-8")


def curves(logs: dict[str, list[list[dict[str, Any]]]]) -> Figure:
    """Training loss and top-1 over the epochs: the mean of the seeds, and the range between them."""
    figure = Figure((11, 4), layout="constrained")
    for place, (key, label) in enumerate([("train_loss", "training loss"), ("test_acc1", "top-1 (%)")], 1):
        axes = figure.add_subplot(1, 2, place)
        for ffn, of_seeds in logs.items():
            by_epoch = list(zip(*([record[key] for record in log] for log in of_seeds)))
            epochs = range(1, len(by_epoch) + 1)
            line, = axes.plot(epochs, [statistics.mean(values) for values in by_epoch], label=ffn, marker=".", markersize=3)
            axes.fill_between(epochs, [min(values) for values in by_epoch], [max(values) for values in by_epoch],
                              color=line.get_color(), alpha=0.2, linewidth=0)
        label_curves(axes, label)
    return figure


# ---------------------------------------------------------------- the program
def arguments() -> Parser:
    parser = tool_parser("compare.py", __doc__)
    parser.add_argument("--ffn", nargs="+", required=True, choices=list(FFN_SUFFIXES), metavar="FFN",
                        help=f"feed-forwards, of {', '.join(FFN_SUFFIXES)}; the first is what others are compared with")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds, from 0 on (default: 3)")
    parser.add_argument("--output-dir", type=Path, default=OUTPUT, metavar="FOLDER",
                        help="the folder of all runs (default: runs/compare); one that holds them continues")
    return parser


def run(own: argparse.Namespace, flags: list[str]) -> int:
    check_at_least_1(own, "seeds")
    if len(set(own.ffn)) < len(own.ffn):
        raise UserError(f"--ffn {' '.join(own.ffn)} names one twice: name each once")
    config = parse_args(flags)
    for dest in OWN_FLAGS:
        if dest in config.given and (getattr(config.args, dest) or dest == "seed"):
            raise UserError(f"{flag_name(dest)} ({config.given[dest]}) is not for a comparison, whose runs are trained with "
                            "--seeds and continue by themselves: leave it out")
    output = Path(os.path.expanduser(own.output_dir))       # leaves a folder named ~nobody as it is
    recipes = {ffn: recipe_of(ffn, config) for ffn in own.ffn}
    for dest in (*models_kan.KAN_OPTIONS, *COEFFICIENT_FLAGS, *OF_ALL_KANS):
        if asked_for(dest, config) and not any(dest in recipe for recipe in recipes.values()):
            raise UserError(f"{flag_name(dest)} has no effect on --ffn {' '.join(own.ffn)}: leave it out")
    for ffn, recipe in recipes.items():
        check(ffn, recipe)
        check_unchanged(output / f"{ffn}.yaml", recipe)
    for ffn, recipe in recipes.items():
        with atomic_write(make_folder(output) / f"{ffn}.yaml") as place:
            place.write_text(dump_yaml(Namespace(**recipe)), encoding="utf-8")
    folders = {ffn: [output / f"{ffn}_seed{seed}" for seed in range(own.seeds)] for ffn in own.ffn}
    for seed in range(own.seeds):
        for ffn in own.ffn:
            train(ffn, seed, folders[ffn][seed], output / f"{ffn}.yaml")
    logs = {ffn: [read_log(folder) for folder in of_ffn] for ffn, of_ffn in folders.items()}
    mflops, batch_size = {}, 1
    for ffn, (folder, *_) in folders.items():
        trained = load_trained(str(folder / CHECKPOINT), device="cpu")
        mflops[ffn] = measure_flops(trained.model, to_2tuple(trained.args.input_size)).matmul / 1e6
        batch_size = trained.args.batch_size
    found = rows(logs, mflops, batch_size)
    write_csv(found, output / "compare.csv")
    save_picture(curves(logs), output / "compare.png")
    print(f"\n{table(found)}\nin {output}: compare.csv, compare.png and a folder for each run")
    return 0


main = command(arguments, run, with_main=True)

if __name__ == "__main__":
    sys.exit(main())
