"""tools/slurm.sh with an srun and an scontrol of our own in the PATH, which do on this machine what Slurm's do on a cluster."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from e2e import checkpoint, finish, free_port, launch, log, write_digits
from helpers import NANO, ROOT, differences

SCRIPT = ROOT / "tools/slurm.sh"
HANGS = 600         # seconds without an end: no busy machine is so slow, the script waits for what never comes
slow = pytest.mark.slow

# One task on each of the nodes; srun passes signals on and ends all tasks when one has failed.
SRUN = f"""#!{sys.executable} -S
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = [subprocess.Popen(words, env={{**os.environ, "SLURM_NODEID": str(node)}}, start_new_session=True)
         for node in range(int(os.environ.get("SLURM_NNODES", 1)))]
def hand_on(number, frame):
    for task in tasks:
        task.send_signal(number)
signal.signal(signal.SIGTERM, hand_on)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "$CALLS/scontrol"
case "$1" in
    show) printf 'localhost\\nnode2\\n' ;;
    requeue) exit "${REQUEUE_FAILS:-0}" ;;
esac
"""
# In place of `python -m torch.distributed.run ... main.py`: writes down its words, then does what $BEHAVIOUR says. Anything
# else that is asked of it is real.
PYTHON = f"""#!/bin/bash
[ "$1" = -m ] || exec {sys.executable} -S "$@"
printf '%s\\n' "$@" > "$CALLS/python$SLURM_NODEID"
status() {{ printf '{{"state": "%s", "exit_code": %s, "reason": ""}}' "$1" "$2" > "$OUT/status.json"; }}
eval "$BEHAVIOUR"
"""
# Until it is asked to stop; `kill` reaches bash between two short sleeps.
WAITS = "trap stop=1 TERM; touch $CALLS/started; while [ -z \"${stop:-}\" ]; do sleep 0.02; done; "


@pytest.fixture
def sbatch(tmp_path):
    """sbatch(behaviour, *words, **environment) runs the script as Slurm would; .start does not wait for its end. Whatever it
    has started is ended with the test, also where that fails."""
    jobs: list[subprocess.Popen] = []
    programs, calls, out = (tmp_path / name for name in ("bin", "calls", "out dir"))
    for folder in (programs, calls, out):
        folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    spooled = Path(shutil.copy(SCRIPT, tmp_path / "slurm_script"))      # Slurm runs a copy

    def start(behaviour="status finished 0", *words, **environment) -> subprocess.Popen:
        jobs.append(subprocess.Popen(
            ["bash", str(spooled), *map(str, words or ("--output_dir", out))], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "OUT": str(out),
                 "BEHAVIOUR": behaviour, "SLURM_JOB_ID": "4077", "SLURM_JOB_NODELIST": "node[1-2]", "PYTHON":
                 str(programs / "python"), "SLURM_SUBMIT_DIR": str(ROOT), "OMP_NUM_THREADS": "1", **environment}))
        return jobs[-1]

    def run(*words, **environment) -> tuple[int, str]:
        job = start(*words, **environment)
        _, err = job.communicate(timeout=HANGS)
        return job.returncode, err

    def end() -> None:
        while left := of_the_job(calls):        # again: one may just have started another
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            for job in jobs:
                job.wait(HANGS)
            time.sleep(0.01)

    run.start, run.out, run.programs = start, out, programs
    run.requeued = lambda: (calls / "scontrol").read_text().splitlines().count("requeue 4077")
    run.words = lambda node=0: (calls / f"python{node}").read_text().splitlines()
    run.calls, run.started, run.end = calls, calls / "started", end
    try:
        yield run
    finally:
        end()
        for job in jobs:
            job.communicate()


def of_the_job(calls: Path) -> list[int]:
    """All running processes with the job's environment: torchrun's workers are not of its process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):     # it has ended, or is of somebody else; a zombie's environment is empty
            if f"CALLS={calls}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def wait_for(path: Path, job: subprocess.Popen) -> None:
    """Until the file is there and the script waits for srun, so that a signal finds it there."""
    end = time.monotonic() + HANGS
    while not path.exists() or Path(f"/proc/{job.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end, f"{path} has not come"
        time.sleep(0.01)


# ---------------------------------------------------------------- the script itself
def test_syntax():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shellcheck():
    done = subprocess.run(["shellcheck", str(SCRIPT)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_slurm_is_asked_for():
    options = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.M)
    assert {"--signal=B:USR2@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(options)
    first = next(i for i, line in enumerate(SCRIPT.read_text().splitlines()) if line and not line.startswith("#"))
    assert "#SBATCH" not in "".join(SCRIPT.read_text().splitlines()[first:])        # sbatch reads no further


# ---------------------------------------------------------------- what is started
def test_one_torchrun_a_node(sbatch):
    words = ("--lr", "1e-3", "--data-path", "a b", "--output_dir", sbatch.out)
    assert sbatch("status finished 0", *words, SLURM_NNODES="2", SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="16")[0] == 0
    for node in (0, 1):
        asked = sbatch.words(node)
        assert asked[:2] == ["-m", "torch.distributed.run"]
        main = asked.index(str(ROOT / "main.py"))
        assert asked[main + 1:] == [*map(str, words), "--resume", "auto"]
        options = dict(zip(asked[2:main:2], asked[3:main:2], strict=True))
        assert options == {"--nnodes": "2", "--node-rank": str(node), "--nproc-per-node": "8", "--master-addr": "localhost",
                           "--master-port": "24077"}
    assert sbatch.requeued() == 0


@pytest.mark.parametrize("words,environment,says", [
    (("--lr", "1"), {}, "give --output_dir"), (("--output_dir",), {}, "give --output_dir"),
    (("--output_dir=x",), {"SLURM_JOB_ID": ""}, "sbatch"), (("--output_dir", "x", "--resume", "f.pth"), {}, "--finetune"),
    (("--output-dir", "x", "--resume=f.pth"), {}, "--resume f.pth"),
    (("--output_dir", "x"), {"VISION_KAN": "/nowhere"}, "/nowhere")])
def test_what_cannot_work_is_refused_at_once(sbatch, words, environment, says):
    code, err = sbatch("exit 9", *words, **environment)
    assert code == 2 and err.startswith("slurm.sh: error: ") and err.count("\n") == 1 and says in err


# ---------------------------------------------------------------- how it ends
@pytest.mark.parametrize("behaviour,code", [
    ("status finished 0", 0), ("status finished 0; exit 1", 0),        # it is the run that counts
    ("status failed 2; exit 1", 2), ("status failed 1; exit 1", 1), ("status failed null; exit 1", 1),
    ("status running null; exit 137", 137),        # killed: out of memory, say
    ("status preempted 75; exit 1", 75),           # by scancel, or by Slurm, which puts it back itself
    ("exit 0", 0), ("exit 3", 3), ("echo nonsense > $OUT/status.json; exit 4", 4)])
def test_an_end_of_its_own(sbatch, behaviour, code):
    ended, err = sbatch(behaviour)
    assert ended == code and sbatch.requeued() == 0, err


def test_what_an_earlier_start_left_does_not_count(sbatch):
    (sbatch.out / "status.json").write_text('{"state": "finished", "exit_code": 0}')
    assert sbatch("exit 3")[0] == 3


@pytest.mark.parametrize("behaviour,environment,code,requeued", [
    ("status preempted 75; exit 1", {}, 0, 1),
    ("status running null; exit 1", {}, 0, 1),     # torchrun had to kill it: the checkpoint before is there
    ("status finished 0", {}, 0, 0), ("status failed 1; exit 1", {}, 1, 0), ("exit 1", {}, 1, 0),
    ("status preempted 75; exit 1", {"SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}, 75, 0),
    ("status preempted 75; exit 1", {"REQUEUE_FAILS": "1"}, 75, 1)])
def test_after_the_early_warning(sbatch, behaviour, environment, code, requeued):
    job = sbatch.start(WAITS + behaviour, **environment)
    wait_for(sbatch.started, job)
    job.send_signal(signal.SIGUSR2)
    _, err = job.communicate(timeout=HANGS)
    assert (job.returncode, sbatch.requeued()) == (code, requeued), err
    assert "the time is nearly up" in err


def test_a_job_that_slurm_ends_waits_for_what_the_training_saves(sbatch):
    """Slurm sends TERM to the script and to srun."""
    saves = "touch $CALLS/saves; while [ ! -e $CALLS/saved ]; do sleep 0.02; done; "
    job = sbatch.start(f"{WAITS}{saves}status preempted 75; exit 1")
    wait_for(sbatch.started, job)
    srun = int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[0])
    job.terminate()
    os.kill(srun, signal.SIGTERM)
    wait_for(sbatch.calls / "saves", job)       # and the script still runs
    (sbatch.calls / "saved").touch()
    _, err = job.communicate(timeout=HANGS)
    assert job.returncode == 75 and sbatch.requeued() == 0, err


def test_these_tests_leave_nothing_behind(sbatch):
    job = sbatch.start("trap '' TERM; setsid sleep 1000 & touch $CALLS/started; wait")
    wait_for(sbatch.started, job)
    assert len(of_the_job(sbatch.calls)) >= 3
    sbatch.end()
    assert not of_the_job(sbatch.calls) and job.returncode == -signal.SIGKILL


# ---------------------------------------------------------------- real torchrun, real training
@slow
@pytest.mark.parametrize("nodes,processes", [(1, 2), (2, 1)])
def test_a_real_run_is_requeued_and_ends_as_if_it_had_not_been(nodes, processes, sbatch, tmp_path, request):
    flags = ("--model", NANO, "--num_workers", 0, "--batch-size", 8, "--warmup-epochs", 0, "--epochs", 25, "--lr", 0.1,
             "--drop", 0.1, "--device", "cpu", "--data-path", write_digits(tmp_path / "digits"))
    whole = launch(tmp_path, *flags, "--resume", "auto", "--output_dir", tmp_path / "whole")
    for one in whole:
        request.addfinalizer(one.kill)
    environment = {"PYTHON": sys.executable, "SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": str(processes),
                   "MASTER_PORT": str(free_port())}
    job = sbatch.start("", *flags, "--output_dir", sbatch.out, **environment)
    wait_for(sbatch.out / "checkpoint_previous.pth", job)
    job.send_signal(signal.SIGUSR2)
    out, err = job.communicate(timeout=HANGS)
    assert job.returncode == 0 and sbatch.requeued() == 1, out + err
    assert "stopped: SIGTERM: saved" in err and "the training is preempted" in err
    again = sbatch.start("", *flags, "--output_dir", sbatch.out, **environment, SLURM_RESTART_COUNT="1")
    out, err = again.communicate(timeout=HANGS)
    assert again.returncode == 0 and sbatch.requeued() == 1 and "resumed from" in out, out + err
    finish(whole, timeout=HANGS)
    assert not differences(*({key: value for key, value in checkpoint(folder).items() if key not in ("args", "seconds")}
                             for folder in (tmp_path / "whole", sbatch.out)))
    assert log(tmp_path / "whole") == log(sbatch.out)
