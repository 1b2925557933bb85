"""Equal results: any number of images over any number of processes, two processes and one, the same run twice."""
import multiprocessing
import os
import re
from functools import cache
from pathlib import Path
from queue import Empty

import pytest
import torch
import torch.distributed as dist
from e2e import ALIKE, QUICK, Run, checkpoint, close, finish, launch, log, recording
from helpers import GKAN, NANO, differences, every
from torch import nn

import datasets
import main as program
from datasets import build_loaders
from engine import evaluate
from vision_kan.common.process import Process
from vision_kan.config.resolve import parse_args
from vision_kan.data.images import ArrayImages, Split
from vision_kan.data.known import open_digits

SIZES, WORLDS = range(1, 65), range(1, 5)


# ---------------------------------------------------------------- evaluation
class SomeUnreadable(ArrayImages):
    """Every seventh image, index 6 first, is like a file that cannot be read."""

    def load(self, index, **how):
        if index % 7 == 6:
            raise OSError("unreadable")
        return super().load(index)


def results_of(rank: int, world: int, shared: bool, folder: Path, queue) -> None:
    """`evaluate` over the real loader's share of the first 1 .. 64 of the digits; loss, counts of the right ones."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}{shared}", rank=rank, world_size=world)
    process = Process(rank, world, rank)
    whole = open_digits(is_train=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    args = parse_args(["--eval", "--data-set", "DIGITS", "--input-size", "32", "--num_workers", "0", "--batch-size", "4",
                       *(["--dist-eval"] if shared else [])]).args
    results = []
    for size in SIZES:
        split = Split(SomeUnreadable(whole.images.pixels[:size]), whole.targets[:size], whole.classes)
        datasets.open_digits = lambda is_train, split=split: split
        loaders = build_loaders(args, process)
        loaders.val.dataset.quiet = True
        results.append(evaluate(model, loaders.val, process, shared=shared))
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()


def evaluations(world: int, shared: bool, folder: Path) -> list[list[dict]]:
    """Results of each process for each size."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    running = [context.Process(target=results_of, args=(rank, world, shared, folder, queue)) for rank in range(world)]
    for process in running:
        process.start()
    answers = {}
    while len(answers) < world:
        try:
            rank, results = queue.get(timeout=1)
            answers[rank] = results
        except Empty:
            assert not any(process.exitcode for process in running), "a process has failed"
    for process in running:
        process.join(60)
    return [answers[rank] for rank in range(world)]


def counts(result: dict) -> tuple[int, ...]:
    """Images, unreadable ones, and how many were right at once and within five choices."""
    images = result["images"]
    right = tuple(round(result[key] * images / 100) for key in ("acc1", "acc5"))
    assert right == pytest.approx([result[key] * images / 100 for key in ("acc1", "acc5")], abs=1e-3)
    return images, result["unreadable"], *right


@pytest.mark.slow
def test_evaluation_is_exact_for_every_data_set_size_and_number_of_processes(tmp_path):
    """Sizes below the number of processes included: some of them then have no image."""
    (alone,) = evaluations(1, False, tmp_path)
    assert [(r["images"], r["unreadable"]) for r in alone] == [(n - n // 7, n // 7) for n in SIZES]
    assert len({counts(result) for result in alone}) == len(SIZES) and counts(alone[-1])[2] > 2     # each differs
    for world in WORLDS:
        for rank, shared in enumerate(evaluations(world, True, tmp_path)):
            for size, one, many in zip(SIZES, alone, shared):
                assert counts(many) == counts(one), (size, world, rank)
                assert many["loss"] == pytest.approx(one["loss"], rel=1e-6), (size, world, rank)
                assert many["acc1"] == one["acc1"] and many["acc5"] == one["acc5"]


# ---------------------------------------------------------------- two processes and one
def recorded(argv: list[str]) -> int:
    """The program; what enters mixup in each process, and its losses, lie beside the output folder after it."""
    with recording() as record:
        code = program.main(argv)
    out = Path(argv[argv.index("--output_dir") + 1])
    torch.save({key: torch.stack(values) for key, values in record.items()},
               out.parent / f"{out.name}{os.environ.get('RANK', '0')}.pth")
    return code


def all_of(folder: Path, name: str, processes: int = 1, accumulate: int = 1) -> dict[str, torch.Tensor]:
    """images [N, 3, S, S] and targets [N] in the order over all processes, losses [updates] of all images of an update."""
    parts = [checkpoint(folder, f"{name}{rank}.pth") for rank in range(processes)]
    assert all(part["losses"].isfinite().all() for part in parts)
    return {**{key: torch.stack([part[key].flatten(0, 1) for part in parts], 1).flatten(0, 1) for key in ("images", "targets")},
            "losses": torch.stack([part["losses"] for part in parts]).mean(0).view(-1, accumulate).mean(1)}


DEIT = "--aa rand-m9-mstd0.5-inc1 --reprob 0.25 --repeated-aug"
DEIT3 = "--ThreeAugment --src --color-jitter 0.3 --reprob 0.25 --repeated-aug"


@pytest.mark.slow
@pytest.mark.parametrize("model,augmentation,accumulate", [(GKAN, DEIT3, 2), (NANO, DEIT, 1)])
def test_two_processes_equal_one(model, augmentation, accumulate, data, tmp_path):
    """Also where each process takes a quarter of an update's images at a time."""
    flags = (*QUICK, *ALIKE, "--epochs", 2, "--data-path", data, "--model", model, *augmentation.split())
    many = launch(tmp_path, *flags, "--batch-size", 8 // accumulate, "--grad-accum", accumulate,
                  "--output_dir", tmp_path / "two", call=recorded)
    finish([Run(tmp_path, *flags, "--batch-size", 16, "--output_dir", tmp_path / "one", call=recorded), *many])
    one, two = all_of(tmp_path, "one"), all_of(tmp_path, "two", 2, accumulate)
    assert len(one["losses"]) == 6 and one["losses"].unique().numel() == 6
    assert torch.equal(two["images"], one["images"]) and torch.equal(two["targets"], one["targets"])
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    close(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two"))


# ---------------------------------------------------------------- the same run twice
# What is drawn for each process, and what is left to chance elsewhere: mixup, dropout, stochastic depth, worker processes.
RANDOM = ("--epochs", 2, "--repeated-aug", "--drop", 0.1, "--drop-path", 0.1, "--num_workers", 2, "--lr", 0.1, "--print-freq", 1)


@pytest.fixture(scope="module")
def twice(data, tmp_path_factory):
    """A folder and a function that runs there and returns what was said. one, again: a process with batches of 16; two,
    two_again: two processes with batches of 8."""
    folder = tmp_path_factory.mktemp("twice")

    @cache
    def said(name: str) -> str:
        processes = 2 if name.startswith("two") else 1
        flags = (*QUICK, *RANDOM, "--data-path", data, "--batch-size", 16 // processes, "--output_dir", folder / name)
        runs = [Run(folder, *flags, call=recorded)] if processes == 1 else launch(folder, *flags, call=recorded)
        return finish(runs)[0]

    return folder, said


@pytest.mark.parametrize("first,second,processes", every(2, [("one", "again", 1), ("two", "two_again", 2)]))
def test_the_same_run_twice_is_the_same_to_the_last_bit(first, second, processes, twice):
    folder, said = twice
    lines, others = (re.sub(r"\d+ img/s +eta .*", "", said(name)).splitlines() for name in (first, second))
    a, b = ({key: value for key, value in checkpoint(folder / name).items() if key not in ("args", "seconds")}
            for name in (first, second))
    assert {"model", "model_ema", "optimizer", "lr_scheduler", "losses"} <= a.keys() and not differences(a, b)
    assert log(folder / first) == log(folder / second) and len(log(folder / first)) == 2
    for rank in range(processes):
        assert not differences(*(checkpoint(folder, f"{name}{rank}.pth") for name in (first, second)))
    assert lines == others and sum("loss " in line for line in lines) == 6


@pytest.mark.slow
def test_what_enters_mixup_is_the_same_in_one_process_and_in_two(twice):
    folder, said = twice
    assert all(map(said, ("one", "two")))
    one, two = all_of(folder, "one"), all_of(folder, "two", 2)
    assert torch.equal(two["images"], one["images"]) and torch.equal(two["targets"], one["targets"])
    assert not torch.equal(two["losses"], one["losses"])        # mixup's own numbers are drawn for each process
    images = one["images"]
    assert len(images) == 96 and len(images.unique(dim=0)) == 96        # no two augmentations are alike
