"""The Slurm launcher, with submitit's own local executor: real processes, a small stand-in for main.py."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from e2e import checkpoint, finish, launch, log, write_digits
from helpers import NANO, ROOT, differences

import run_with_submitit
from run_with_submitit import Trainer, main

submitit = pytest.importorskip("submitit")

# Writes down what it was called with; what else it does is up to the test.
STUB = """
import json, os, signal, sys, time
from pathlib import Path
def main(argv=None):
    out = Path(argv[argv.index("--output_dir") + 1])
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank = os.environ["RANK"]
    with open(out / f"calls{rank}.jsonl", "a") as f:
        f.write(json.dumps({"argv": argv, "cuda": os.environ.get("CUDA_VISIBLE_DEVICES"),
                            **{k: os.environ[k] for k in keys}}) + "\\n")
    return behave(argv, out, rank)
def stopped_by(reason, out, rank):
    if rank == "0":
        status = {"state": "preempted", "reason": reason + ": saved", "exit_code": 75}
        (out / "status.json").write_text(json.dumps(status))
    return 75
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the launcher beside a stub main.py that ends in `behaviour`; run(...) starts it."""
    for path in ROOT.glob("*.py"):
        if path.name != "main.py":
            shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "vision_kan", tmp_path / "vision_kan")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(behaviour: str, *argv: str):
        body = "\n".join("    " + line for line in behaviour.splitlines())
        (tmp_path / "main.py").write_text(STUB + f"\ndef behave(argv, out, rank):\n{body}\n")
        # from another folder: the job must find main.py all the same
        done = subprocess.run([sys.executable, str(tmp_path / "run_with_submitit.py"), "--cluster", "local",
                               "--job_dir", str(tmp_path / "job"), "--device", "cpu", *argv],
                              check=False, cwd=elsewhere, capture_output=True, text=True, timeout=100)
        calls = {file.name[5:-6]: [json.loads(line) for line in file.read_text().splitlines()]
                 for file in sorted((tmp_path / "job").glob("calls*.jsonl"))}
        return done, calls

    run.folder = tmp_path / "job"
    return run


def refused(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


# ---------------------------------------------------------------- before anything is submitted
def test_without_submitit(monkeypatch, capsys):
    monkeypatch.setattr(run_with_submitit, "submitit", None)
    assert "pip install submitit" in refused(capsys, "--cluster", "local")


@pytest.mark.parametrize("argv,words", [
    ("--ngpuss 3", "did you mean --ngpus?"), ("--modle x", "did you mean --model?"),
    ("--ngpus 0", "--ngpus 0"), ("--timeout 0", "--timeout 0"), ("--cluster locl", "did you mean local?"),
    ("--cluster local --nodes 2", "--nodes must be 1"), ("--cluster debug --ngpus 2", "--ngpus must be 1"),
    ("--cluster local --lr nan", "--lr nan"), ("--cluster local --config nowhere.yaml", "nowhere.yaml"),
    ("--cluster local --ngpus 2 --world_size 3", "--world_size 3"), ("--batch-size 33", "--batch-size 33"),
    ("--cluster local --job_dir ~nouser/x", "--job_dir ~nouser/x cannot be a path: there is no such user"),
    ("--cluster local --job_dir /dev/null/x", "Not a directory: '/dev/null/x'): give a --job_dir"),
    ("--cluster local --job_dir /proc/x", "No such file or directory: '/proc/x'): give a --job_dir"),
])
def test_bad_flags_are_refused_at_once(argv, words, capsys):
    assert words in refused(capsys, *argv.split())


@pytest.mark.skipif(shutil.which("srun") is not None, reason="there is a Slurm here")
def test_no_slurm_here(capsys, tmp_path):
    assert "--cluster local" in refused(capsys, "--job_dir", str(tmp_path))


@pytest.fixture
def refusing(monkeypatch, tmp_path):
    """A Slurm that refuses every job."""
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: nope' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", "")


def test_a_job_that_slurm_refuses(refusing, capsys, tmp_path):
    assert main(["--partition", "nope", "--job_dir", str(tmp_path / "%j")]) == 2
    reason, told = capsys.readouterr().err.splitlines()
    assert reason == "sbatch: error: invalid partition specified: nope"
    assert told.startswith("error: sbatch refused the job, for the reason above: correct --partition")


@pytest.mark.parametrize("job_dir, words", [("~nouser/x", "there is no such user"), ("/dev/null/%j", "'/dev/null'"),
                                            ("/proc/x", "'/proc/x'")])
def test_a_job_dir_that_cannot_be_is_told_on_slurm_too(job_dir, words, refusing, capsys):
    assert words in (said := refused(capsys, "--job_dir", job_dir)) and "--job_dir" in said


def test_help_lists_both_kinds_of_flags(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and "--partition" in out and "--mixup-prob" in out


# ---------------------------------------------------------------- what Slurm is asked for
class FakeSlurm:
    """Stands in for AutoExecutor: keeps what it was asked for."""

    def __init__(self, folder, cluster, **kwargs):
        self.folder = Path(folder)
        FakeSlurm.made = self

    def update_parameters(self, **parameters):
        self.parameters = parameters

    def submit(self, trainer):
        self.trainer = trainer
        return SimpleNamespace(job_id="77", paths=SimpleNamespace(stdout="log"))


def test_slurm_parameters(monkeypatch, capsys):
    monkeypatch.setattr(submitit, "AutoExecutor", FakeSlurm)
    monkeypatch.setenv("PYTHONPATH", "/a b")
    flags = ["--num-workers", "6", "--batch-size", "8", "--kan-grid-range", "-3", "3", "--dist-eval"]
    assert main(["--nodes", "2", "--ngpus", "4", "--timeout", "60", "--partition", "gpu", *flags,
                 "--qos", "high"]) == 0
    asked, trainer = FakeSlurm.made.parameters, FakeSlurm.made.trainer
    assert (asked["nodes"], asked["tasks_per_node"], asked["gpus_per_node"]) == (2, 4, 4)
    assert (asked["timeout_min"], asked["cpus_per_task"]) == (60, 6)
    assert (asked["slurm_partition"], asked["slurm_qos"]) == ("gpu", "high") and "slurm_account" not in asked
    assert asked["slurm_setup"] == [f"export PYTHONPATH='{ROOT}:/a b'"]
    assert trainer.argv == flags
    assert trainer.folder == trainer.output_dir == "runs/slurm/%j"
    assert "job 77" in capsys.readouterr().out


def test_output_dir_of_the_user_or_the_recipe_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(submitit, "AutoExecutor", FakeSlurm)
    monkeypatch.setenv("PYTHONPATH", "")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("output_dir: from_recipe\neval: true")
    main(["--config", str(recipe)])
    assert FakeSlurm.made.trainer.output_dir == "from_recipe" and FakeSlurm.made.trainer.evaluates
    main(["--config", str(recipe), "--output-dir", "mine/%j", "--no-eval"])
    assert FakeSlurm.made.trainer.output_dir == "mine/%j" and not FakeSlurm.made.trainer.evaluates


@pytest.mark.parametrize("flags", [("--distillation-type", "hard"), ("--batch-size", "33")])
def test_what_a_checkpoint_may_fill_in_is_not_missed(flags, monkeypatch):
    """The teacher, or that mixup is off."""
    monkeypatch.setattr(submitit, "AutoExecutor", FakeSlurm)
    monkeypatch.setenv("PYTHONPATH", "")
    assert main(["--resume", "auto", *flags]) == 0 and FakeSlurm.made.trainer.argv == ["--resume", "auto", *flags]


def test_cpu_asks_slurm_for_no_gpu(monkeypatch):
    monkeypatch.setattr(submitit, "AutoExecutor", FakeSlurm)
    monkeypatch.setenv("PYTHONPATH", "")
    main(["--ngpus", "3", "--device", "cpu"])
    assert (FakeSlurm.made.parameters["gpus_per_node"], FakeSlurm.made.parameters["tasks_per_node"]) == (0, 3)


# ---------------------------------------------------------------- one task of several nodes
@pytest.fixture
def task(monkeypatch, tmp_path):
    """Calls a Trainer as task `rank` of 2 nodes x 2 tasks, where main returns `code`; returns main's argv."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "")

    def call(trainer, rank, code=0, **env):
        seen = []
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        job = SimpleNamespace(job_id="9", global_rank=rank, local_rank=rank % 2, num_tasks=4, num_nodes=2,
                              hostnames=["node3", "node4"], _usr_sig=lambda: signal.SIGUSR2)
        monkeypatch.setattr(submitit, "JobEnvironment", lambda: job)
        monkeypatch.setitem(sys.modules, "main", SimpleNamespace(main=lambda argv: seen.append(argv) or code))
        assert trainer() == code
        return seen[0]

    return call


def test_tasks_of_two_nodes_meet_at_the_first_host(task, tmp_path):
    (tmp_path / "9").mkdir()
    trainer = Trainer(["--lr", "1"], str(tmp_path / "%j"), str(tmp_path / "out%j"))
    assert task(trainer, 0) == ["--lr", "1", "--output_dir", str(tmp_path / "out9")]
    port = os.environ["MASTER_PORT"]
    with socket.socket() as s:
        s.bind(("", int(port)))                                  # it was free
    task(trainer, 3)
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[k] for k in keys] == ["3", "1", "4", "2", "node3", port]


def test_a_first_task_that_never_comes(task, tmp_path, monkeypatch):
    monkeypatch.setattr(run_with_submitit, "WAIT_FOR_FIRST_TASK_S", 0.2)
    with pytest.raises(RuntimeError, match="--job_dir"):
        task(Trainer([], str(tmp_path), str(tmp_path)), 1)


@pytest.mark.parametrize("requeues,restarts,saved,evaluates,resumes", [
    (0, "0", "checkpoint.pth", False, False),   # a first start beside an old checkpoint: main.py's business
    (1, "0", "checkpoint.pth", False, True),
    (1, "0", "checkpoint_previous.pth", False, True),  # stopped between the two renames
    (0, "1", "checkpoint.pth", False, True),    # Slurm lost a node and started the same job again
    (1, "0", None, False, False),               # nothing saved yet: --resume of the user, if any, still holds
    (1, "0", "checkpoint.pth", True, False),
])
def test_when_to_resume(task, tmp_path, requeues, restarts, saved, evaluates, resumes):
    if saved:
        (tmp_path / saved).touch()
    trainer = Trainer(["--resume", "mine.pth"], str(tmp_path), str(tmp_path), evaluates, requeues)
    argv = task(trainer, 0, SLURM_RESTART_COUNT=restarts)
    assert (argv[-2:] == ["--resume", "auto"]) == resumes
    assert argv[:2] == ["--resume", "mine.pth"]


def test_a_requeued_job_finds_its_run_in_the_home_folder(task, tmp_path, monkeypatch):
    """bash leaves the ~ in --output_dir=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pth").touch()
    assert task(Trainer([], str(tmp_path), "~/run", requeues=1), 0)[-2:] == ["--resume", "auto"]


def test_a_restart_does_not_read_the_old_address(task, tmp_path, monkeypatch):
    trainer = Trainer([], str(tmp_path), str(tmp_path))
    task(trainer, 0)
    monkeypatch.setattr(run_with_submitit, "WAIT_FOR_FIRST_TASK_S", 0.2)
    for later in (trainer.checkpoint().function, trainer):
        with pytest.raises(RuntimeError, match="first task"):
            task(later, 1, SLURM_RESTART_COUNT="1")


STOPPED = '{"state": "preempted", "reason": "SIGUSR2: saved, --resume auto goes on after step 3 of epoch 1"}'


@pytest.mark.parametrize("rank,status,requeued", [
    (0, STOPPED, True), (1, STOPPED, False), (0, STOPPED.replace("SIGUSR2", "SIGTERM"), False),
    (0, STOPPED.replace("SIGUSR2", "SIGINT"), False), (0, STOPPED.replace("preempted", "failed"), False),
    (0, '{"state": "preempted", "reason": "", "exit_code": 75}', False), (0, "[1]", False), (0, STOPPED[:20], False),
    (0, None, False)])
def test_the_first_task_puts_the_job_back_after_the_early_warning_alone(task, tmp_path, rank, status, requeued):
    if status:
        (tmp_path / "status.json").write_text(status)
    calls = []
    before = signal.signal(signal.SIGUSR2, lambda *call: calls.append(call))        # submitit's, set before the job runs
    try:
        (tmp_path / "9_0_0.rendezvous").write_text("node3 1234")
        task(Trainer([], str(tmp_path), str(tmp_path)), rank, code=75)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert calls == ([(signal.SIGUSR2, None)] if requeued else [])


# ---------------------------------------------------------------- real processes
slow = pytest.mark.slow


@slow
def test_two_local_tasks(checkout):
    done, calls = checkout("return 0", "--ngpus", "2", "--epochs", "3")
    assert done.returncode == 0, done.stderr
    assert sorted(calls) == ["0", "1"]
    for rank, (call,) in calls.items():
        assert (call["RANK"], call["LOCAL_RANK"], call["WORLD_SIZE"]) == (rank, rank, "2")
        assert call["MASTER_ADDR"] == "127.0.0.1" and call["cuda"] == ""
        assert call["argv"] == ["--device", "cpu", "--epochs", "3", "--output_dir", str(checkout.folder)]
    assert calls["0"][0]["MASTER_PORT"] == calls["1"][0]["MASTER_PORT"]
    assert re.search(r"job \d+: log in .*0_log.out", done.stdout)


# in the first attempt, main.py saves at a step boundary and returns a code of its own; the tasks have met before, as
# in a process group (one that starts only after the requeue would read the second attempt's job)
SAVES_AND_STOPS = """
while len(list(out.glob("calls*.jsonl"))) < int(os.environ["WORLD_SIZE"]): time.sleep(.01)
if len((out / f"calls{rank}.jsonl").read_text().splitlines()) == 1:
    got = []
    signal.signal(signal.SIGUSR2, lambda *_: got.append(1))
    os.kill(os.getpid(), signal.SIGUSR2)
    while not got: time.sleep(.01)
    if rank == "0": (out / "checkpoint.pth").touch()
    return stopped_by("SIGUSR2", out, rank)
return 0
"""
# or it leaves the signal to submitit
LEAVES_IT_TO_SUBMITIT = """
if len((out / "calls0.jsonl").read_text().splitlines()) == 1:
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(60)
return 0
"""
# scancel sends SIGTERM: the user wants it to end, and where Slurm wants that, it puts the job back by itself
ENDS_AT_SIGTERM = """
signal.signal(signal.SIGTERM, lambda *_: None)
os.kill(os.getpid(), signal.SIGTERM)
return stopped_by("SIGTERM", out, rank)
"""
@slow
@pytest.mark.parametrize("behaviour,tasks", [(SAVES_AND_STOPS, 2), (LEAVES_IT_TO_SUBMITIT, 1)])
def test_early_warning_requeues(checkout, behaviour, tasks):
    done, calls = checkout(behaviour, "--ngpus", str(tasks))
    assert done.returncode == 0, done.stderr
    assert len(calls) == tasks
    for first, second in calls.values():
        assert "auto" not in first["argv"]
        assert (second["argv"][-2:] == ["--resume", "auto"]) == (behaviour == SAVES_AND_STOPS)
        assert first["MASTER_PORT"] != second["MASTER_PORT"]


@slow
def test_failure_is_not_requeued(checkout):
    done, calls = checkout("return 2")
    assert done.returncode == 1 and len(calls["0"]) == 1
    assert "failed: see" in done.stderr and "Traceback" not in done.stderr


@slow
def test_a_run_that_is_told_to_end_is_not_requeued(checkout):
    done, calls = checkout(ENDS_AT_SIGTERM)
    assert done.returncode == 75 and len(calls["0"]) == 1 and done.stderr == ""


@slow
def test_debug_runs_in_this_process(checkout):
    done, calls = checkout("print('stub ran')\nreturn 0", "--cluster", "debug")
    assert done.returncode == 0 and "stub ran" in done.stdout, done.stderr
    assert calls["0"][0]["WORLD_SIZE"] == "1"


# ---------------------------------------------------------------- real training
FLAGS = ("--model", NANO, "--num_workers", 0, "--batch-size", 8, "--warmup-epochs", 0, "--epochs", 8, "--lr", 0.1, "--drop", 0.1,
         "--device", "cpu")


@slow
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_real_run_is_interrupted_requeued_and_ends_as_if_it_had_not_been(tasks, tmp_path):
    """Slurm's early warning, in the middle of the training, to each task."""
    flags = (*FLAGS, "--data-path", write_digits(tmp_path / "digits"))
    whole = launch(tmp_path, *flags, "--output_dir", tmp_path / "whole", processes=tasks)
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "run_with_submitit.py"), "--cluster", "local", "--ngpus", str(tasks), "--job_dir",
         str(tmp_path / "job"), *map(str, flags)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        end = time.monotonic() + 100
        while len(written(tmp_path / "job/log.txt")) < 2:
            assert time.monotonic() < end and job.poll() is None
            time.sleep(0.01)
        controller, = children(job.pid)
        for task in children(controller):
            os.kill(task, signal.SIGUSR2)
        out, err = job.communicate(timeout=200)
    finally:
        job.kill()
    logs = "".join(file.read_text() for file in (tmp_path / "job").glob("*_log.*"))
    assert job.returncode == 0, err + logs
    assert "stopped: SIGUSR2: saved" in logs and "resumed from" in logs and "Requeued job" in logs
    finish(whole)
    assert not differences(*({key: value for key, value in checkpoint(tmp_path / name).items() if key not in ("args", "seconds")}
                             for name in ("whole", "job")))
    assert log(tmp_path / "whole") == log(tmp_path / "job")
    assert len(written(tmp_path / "job/run.yaml", "command:")) == 2


def written(path: Path, word: str = "") -> list[str]:
    return [line for line in path.read_text().splitlines() if word in line] if path.exists() else []


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
