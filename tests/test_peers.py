"""Processes that come late, hang, or die, in real processes that meet over gloo."""
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from e2e import free_port
from helpers import every, sentence

from vision_kan.common import peers
from vision_kan.common.console import EXIT_UNREAD
from vision_kan.common.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_PREEMPTED, Preempted, TrainingFailed, UserError
from vision_kan.common.process import cores


def child(program, rank: int, world: int, url: str, folder: Path, timeout: float) -> None:
    handle = os.open(folder / f"err{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))

    def run() -> int:
        process = peers.init_process("cpu", url, timeout)
        return program(process, folder)

    sys.exit(peers.exit_code(run))


def together(program, folder: Path, world: int = 2, timeout: float = 2.0, url: str = "", only: tuple = (), after=None):
    """Exit codes, errors and seconds of `world` processes; after(processes) happens once they run."""
    url = url or f"tcp://127.0.0.1:{free_port()}"
    context = multiprocessing.get_context("fork")
    ranks = only or range(world)
    running = {rank: context.Process(target=child, args=(program, rank, world, url, folder, timeout)) for rank in ranks}
    start = time.monotonic()
    for process in running.values():
        process.start()
    if after:
        after(running)
    for process in running.values():
        process.join(60)
        if process.is_alive():
            process.kill()
    seconds = time.monotonic() - start
    errors = {rank: (folder / f"err{rank}").read_text() for rank in ranks}
    return {rank: process.exitcode for rank, process in running.items()}, errors, seconds


def rounds(process, folder: Path, count: int = 3, before=lambda step: None) -> int:
    """Meet in `count` collectives, as the steps of a training do."""
    for step in range(count):
        peers.progress(f"the forward pass of step {step}")
        before(step)
        peers.progress(f"the update of step {step}")
        number = torch.ones(1)
        dist.all_reduce(number)
        assert number == process.world_size
    (folder / f"done{process.rank}").touch()
    return 0


def error_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith(("stopped: ", "error: "))]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


@pytest.mark.parametrize("url", ["", "file"])
def test_all_is_well(url, tmp_path):
    codes, errors, _ = together(rounds, tmp_path, 3, url=f"file://{tmp_path}/meet" if url else "")
    assert codes == {0: 0, 1: 0, 2: 0} and not any("stopped" in text for text in errors.values())


def test_a_file_that_a_killed_launch_has_left_is_named(tmp_path):
    """Its processes look as if they were there already."""
    def program(process, folder):
        return rounds(process, folder, 1, lambda step: os.kill(os.getpid(), signal.SIGKILL) if process.rank else None)

    url = f"file://{tmp_path}/meet"
    together(program, tmp_path, url=url, timeout=1.0)
    codes, errors, _ = together(rounds, tmp_path, url=url)
    assert codes == {0: EXIT_BAD_INPUT, 1: EXIT_BAD_INPUT}
    assert all(f"--dist_url {url}" in error_line(text) and text.endswith(f"delete {tmp_path}/meet\n") for text in errors.values())
    (tmp_path / "meet").unlink()
    assert together(rounds, tmp_path, url=url)[0] == {0: 0, 1: 0}


@pytest.mark.parametrize("url, words", [
    ("env://", "MASTER_ADDR' is not set): check MASTER_ADDR, MASTER_PORT and the firewall"),
    ("tcp://127.0.0.1", "it names no host and port): check this address and the firewall"),
    ("tcp://127.0.0.1:1", "check its log, its machine, this address and the firewall"),
    ("file:///proc/meet", "No such file or directory: '/proc/meet'): check that all can write this file, and delete it")])
def test_where_they_cannot_meet(url, words, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert words in sentence(peers.meet, url, 1, 2, 0.1)


@pytest.mark.parametrize("name, value, wrong", [
    ("RANK", "x", "'x', not a whole number from 0 on"), ("RANK", "-1", "'-1', not"), ("WORLD_SIZE", "", "'', not"),
    ("WORLD_SIZE", "0", "'0', not a whole number from 1 on"), ("LOCAL_RANK", "z", "'z', not")])
def test_a_launchers_variable_that_is_no_number_is_named(name, value, wrong, monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(key, value if key == name else "1")
    said = sentence(peers.init_process, "cpu")
    assert said.startswith(f"the environment variable {name} is {wrong}") and said.endswith(f"or 'unset {name}'")


@pytest.mark.parametrize("value", ["0", "many"])
def test_processes_of_a_machine_that_are_no_number_are_named(value, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert sentence(cores).startswith(f"the environment variable LOCAL_WORLD_SIZE is '{value}', not a whole number from 1 on")


@pytest.mark.parametrize("there, missing", every(2, [
    ((0, 2), "process 1 of 3 did not start"), ((1, 2), "process 0 of 3, which keeps the")]))
def test_one_that_does_not_come(there, missing, tmp_path):
    codes, errors, seconds = together(rounds, tmp_path, 3, timeout=1.0, only=there)
    assert set(codes.values()) == {EXIT_BAD_INPUT} and seconds < 6
    for text in errors.values():
        assert missing in error_line(text) and "--dist-timeout 1 s" in text


def test_one_that_comes_late_is_waited_for(tmp_path):
    port = free_port()
    context = multiprocessing.get_context("fork")
    url = f"tcp://127.0.0.1:{port}"
    running = [context.Process(target=child, args=(rounds, rank, 2, url, tmp_path, 10)) for rank in range(2)]
    running[1].start()
    time.sleep(1)
    running[0].start()
    for process in running:
        process.join(30)
    assert [process.exitcode for process in running] == [0, 0]


@pytest.mark.parametrize("victim", every(2, [0, 1]))
def test_one_that_is_killed_is_named(victim, tmp_path):
    def program(process, folder):
        return rounds(process, folder, 3, lambda step: os.kill(os.getpid(), signal.SIGKILL)
                      if step == 1 and process.rank == victim else None)

    codes, errors, seconds = together(program, tmp_path, 3, timeout=3.0)
    assert codes.pop(victim) == -signal.SIGKILL and set(codes.values()) == {EXIT_FAILED} and seconds < 12
    for rank in codes:
        assert re.search(rf"process {victim}\b", error_line(errors[rank])) and "--resume auto" in errors[rank]


def test_one_that_is_killed_between_meeting_and_the_group_is_named(tmp_path, monkeypatch):
    real = peers.Peers

    def die_first(store, rank, *args):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(store, rank, *args)

    monkeypatch.setattr(peers, "Peers", die_first)
    codes, errors, seconds = together(rounds, tmp_path, timeout=2.0)
    assert codes == {0: EXIT_FAILED, 1: -signal.SIGKILL} and seconds < 8
    assert "process 1 of 2 has not responded" in error_line(errors[0])


@pytest.mark.parametrize("how", every(2, ["is frozen", "hangs"]))
def test_one_that_hangs_is_named(how, tmp_path):
    def before(process):
        def act(step):
            if step == 1 and process.rank == 1:
                (tmp_path / "hangs").touch()
                time.sleep(50) if how == "hangs" else os.kill(os.getpid(), signal.SIGSTOP)
        return act

    def thaw(running):
        running[0].join(30)
        os.kill(running[1].pid, signal.SIGCONT)
        running[1].kill() if how == "is frozen" else None

    codes, errors, seconds = together(lambda process, folder: rounds(process, folder, 3, before(process)), tmp_path,
                                      timeout=2.0, after=thaw)
    assert codes[0] == EXIT_FAILED and 2 <= seconds < 12
    assert re.search(r"process 1\b", error_line(errors[0]))
    if how == "hangs":
        assert codes[1] == EXIT_FAILED and "time.sleep(50)" not in error_line(errors[1])
        assert "this process, 1 of 2, has hung" in errors[1] or "has stopped" in errors[1]
        assert "the update of step" in errors[0] or "the forward pass of step 1" in errors[0]


def test_one_that_stops_with_an_error_tells_the_others_why(tmp_path):
    def program(process, folder):
        def act(step):
            if step == 1 and process.rank == 1:
                raise UserError("the disk of machine B is full")
        return rounds(process, folder, 3, act)

    codes, errors, seconds = together(program, tmp_path, 2, timeout=5.0)
    assert codes == {0: EXIT_FAILED, 1: EXIT_BAD_INPUT} and seconds < 10
    assert "process 1 has stopped (the disk of machine B is full)" in error_line(errors[0])


def test_another_error_keeps_its_traceback(tmp_path):
    def program(process, folder):
        return rounds(process, folder, 3, lambda step: 1 / 0 if step == 1 else None)

    codes, errors, _ = together(program, tmp_path, 2)
    assert set(codes.values()) == {1} and all("ZeroDivisionError" in text for text in errors.values())


@pytest.mark.parametrize("error, code, text", [
    (Preempted("SIGTERM: saved"), EXIT_PREEMPTED, "stopped: SIGTERM: saved\n"),
    (UserError("bad"), EXIT_BAD_INPUT, "error: bad\n"),
    (Preempted("SIGPIPE: saved", EXIT_UNREAD), EXIT_UNREAD, ""), (KeyboardInterrupt(), 130, "stopped: interrupted\n"),
    (KeyboardInterrupt("SIGINT twice"), 130, "stopped: SIGINT twice\n")])
def test_exit_codes(error, code, text, capsys):
    def program():
        raise error

    assert peers.exit_code(program) == code and capsys.readouterr().err == text


def test_processes_that_torchrun_starts_again_know_nothing_of_those_before(tmp_path, monkeypatch):
    """Its store lives on: where the first ones could be reached must not be taken for where the new ones can."""
    port = free_port()
    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for name, value in (("USE_AGENT_STORE", "True"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))

    def fail(process, folder: Path) -> int:
        raise TrainingFailed(f"process {process.rank} has had enough")

    codes, errors, _ = together(fail, tmp_path, url="env://")
    assert codes == {0: EXIT_FAILED, 1: EXIT_FAILED}, errors
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    init = peers.init_process
    monkeypatch.setattr(peers, "init_process", lambda *given: time.sleep(int(os.environ["RANK"])) or init(*given))
    codes, errors, _ = together(rounds, tmp_path, url="env://")
    assert codes == {0: 0, 1: 0} and not any("stopped" in text for text in errors.values()), errors
    del server
