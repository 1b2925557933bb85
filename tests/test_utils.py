"""Devices, processes, random numbers, JSON."""
import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import sentence

import utils
from vision_kan.common.errors import UserError
from vision_kan.common.process import Process, choose_device
from vision_kan.common.seeds import seed_everything
from vision_kan.common.text import say, to_json


# ---------------------------------------------------------------- device, processes, random numbers
@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_device(no_gpu):
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        text = sentence(choose_device, name)
        assert f"--device {name}" in text and "0 of them" in text and "--device cpu" in text
    assert "--device cpu" in sentence(choose_device, "mps")
    for name in ("gpu", "cuda:x", "meta"):
        assert f"--device {name}" in sentence(choose_device, name) and "auto, cpu, cuda" in sentence(choose_device, name)


def test_device_of_a_process(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("auto", 1) == torch.device("cuda:1")
    assert choose_device("cuda:0") == torch.device("cuda:0")
    assert chosen == [torch.device("cuda:1"), torch.device("cuda:0")]
    assert "start fewer processes" in sentence(choose_device, "cuda", 2)


def meet(rank: int, folder: Path, queue) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    process = Process(rank, 2, rank)
    told = []
    with utils.main_process_first(process):
        if rank == 0:
            time.sleep(0.5)
            (folder / "first").write_text("done")
        told.append((folder / "first").read_text())
    say(f"said by {rank}")
    for failing in (0, 1):
        try:
            with utils.stop_together(process):
                if rank == failing:
                    raise UserError(f"told by {rank}")
        except UserError as error:
            told.append(str(error))
    with utils.stop_together(process):
        told.append("went on")
    dist.destroy_process_group()
    queue.put((rank, told, dist.is_initialized()))


def test_processes_wait_for_the_first_and_stop_together(tmp_path, capfd):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    running = [context.Process(target=meet, args=(rank, tmp_path, queue)) for rank in range(2)]
    for process in running:
        process.start()
    answers = sorted(queue.get(timeout=60) for _ in running)
    for process in running:
        process.join(60)
    assert answers == [(rank, ["done", "told by 0", "told by 1", "went on"], False) for rank in range(2)]
    out = capfd.readouterr().out
    assert "said by 0" in out and "said by 1" not in out


def test_one_process_needs_no_group():
    with utils.main_process_first(Process()), utils.stop_together(Process()):
        pass
    with pytest.raises(UserError, match="^mine$"), utils.stop_together(Process()):
        raise UserError("mine")


def draw():
    return random.random(), float(np.random.random()), torch.rand(1).item()


def test_seed():
    numbers = {}
    for key in [(0,), (1,), (0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3), (0, 1, 2, 4), (2 ** 40, 0)]:
        seed_everything(*key)
        numbers[key] = draw()
        draw()
        seed_everything(*key)
        assert draw() == numbers[key]
    for generator in zip(*numbers.values(), strict=True):        # Python's, numpy's, torch's
        assert len(set(generator)) == len(numbers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is told the seed")
def test_seeding_asks_no_device_that_is_not_there(monkeypatch):
    """torch.manual_seed does, and writes a stack for each."""
    seed_everything(0, 1, 2)
    wanted = torch.rand(4)
    monkeypatch.setattr("traceback.format_stack", lambda *args: pytest.fail("a stack was written"))
    seed_everything(0, 1, 2)
    assert torch.equal(torch.rand(4), wanted)
    monkeypatch.undo()
    torch.manual_seed(torch.initial_seed())
    assert torch.equal(torch.rand(4), wanted)


# ---------------------------------------------------------------- JSON
@pytest.mark.parametrize("value", ["größe 猫 \"a\\b\n\u2028\"", os.fsdecode(b"\xff.png"), {"ä": [1, 2.5, None, True]}])
def test_json_keeps_letters(value):
    """All of it comes back from a UTF-8 file, also what UTF-8 cannot hold as it is."""
    for indent in (None, 1):
        text = to_json(value, indent)
        assert json.loads(text.encode("utf-8")) == value
    assert all(letter in to_json(value) for letter in ("ö猫" if "ö" in value else "ä" if "ä" in value else ""))
