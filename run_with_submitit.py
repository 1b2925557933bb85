"""Train on a Slurm cluster by submitit, with main.py's flags; a job that is cut off is requeued and resumes.

    python run_with_submitit.py --nodes 1 --ngpus 4 --partition gpu \\
        --config recipes/imagenet_tiny_kan192.yaml --data-path /shared/imagenet

One task runs per GPU, with the environment that torchrun would set. The first task takes a free port of its host and writes it to
the job's folder, which all nodes share anyway for submitit's files: nobody has to choose a port, and a requeued job finds a new
one. At Slurm's warning before the time limit (SIGUSR2) main.py saves and stops; then the job is requeued and continues with
`--resume auto`. After SIGTERM it saves and stops too, but Slurm decides whether that was a preemption, which it requeues by
itself, or the user's scancel.

`--cluster local` runs the same on this machine, without Slurm and, if need be, without a GPU.
"""
import json
import os
import shlex
import signal
import socket
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

from vision_kan.common import console

console.starting(__name__)
import torch

from vision_kan.checkpoints.write import saved_checkpoints
from vision_kan.common import peers
from vision_kan.common.errors import EXIT_PREEMPTED, UserError, one_line
from vision_kan.common.files import write_text
from vision_kan.config.checks import impossible_path, validate
from vision_kan.config.flags import get_args_parser
from vision_kan.config.parser import Parser
from vision_kan.config.resolve import parse_args
from vision_kan.run.folder import STATUS

try:
    import submitit
except ImportError:
    submitit = None     # type: ignore[assignment]

WAIT_FOR_FIRST_TASK_S = 300


def get_launch_parser() -> Parser:
    """Where and how long to run; a parent parser next to `config.flags.get_args_parser`."""
    parser = Parser(add_help=False)
    add = parser.add_argument_group("cluster").add_argument
    add("--ngpus", default=1, type=int, metavar="N", help="processes per node, one for each GPU")
    add("--nodes", default=1, type=int, metavar="N", help="nodes to ask for")
    add("--timeout", default=2800, type=int, metavar="MINUTES",
        help="length of the job; what is left then goes back into the queue")
    add("--job_dir", default="runs/slurm/%j", metavar="DIR",
        help="submitit's files, and --output_dir's default; %%j is the job's number")
    add("--cluster", default="slurm", choices=["slurm", "local", "debug"],
        help="local: processes of this machine; debug: this very process")
    add("--partition", metavar="NAME", help="Slurm partition")
    add("--account", metavar="NAME", help="Slurm account")
    add("--qos", metavar="NAME", help="Slurm quality of service")
    add("--comment", metavar="TEXT", help="shown to the Slurm administrators")
    return parser


@dataclass(frozen=True)
class Trainer:
    """The callable of every task. `checkpoint` is submitit's hook for a requeue.

    argv: main.py's flags.
    folder, output_dir: may contain %j, the job's number.
    evaluates: an evaluation, so there is nothing to resume.
    """
    argv: list[str]
    folder: str
    output_dir: str
    evaluates: bool = False
    requeues: int = 0

    def __call__(self) -> int:
        # imported here, because the login node needs no model code to submit a job
        import main

        env = submitit.JobEnvironment()
        folder = Path(self.folder.replace("%j", env.job_id))
        output_dir = Path(self.output_dir.replace("%j", env.job_id))
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))  # also counts requeues after a lost node
        os.environ.update(RANK=str(env.global_rank), LOCAL_RANK=str(env.local_rank),
                          WORLD_SIZE=str(env.num_tasks),
                          LOCAL_WORLD_SIZE=str(env.num_tasks // env.num_nodes))
        address, port = _meet(env, folder / f"{env.job_id}_{self.requeues}_{restarts}.rendezvous")
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)

        argv = [*self.argv, "--output_dir", str(output_dir)]
        if saved_checkpoints(output_dir.expanduser()) and (self.requeues or restarts) and not self.evaluates:
            argv += ["--resume", "auto"]
        warning = env._usr_sig()
        requeue = signal.getsignal(warning)         # submitit's handler, which main.py replaces while it trains
        code = main.main(argv)
        if code not in (0, EXIT_PREEMPTED):
            raise RuntimeError(f"main.py stopped with exit code {code}: see the log above")
        # only the first task, which has written the status, asks for the requeue
        if code and env.global_rank == 0 and _stopped_by(output_dir) == warning and callable(requeue):
            requeue(warning, None)                  # requeues the job and exits
        return code

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """The job to requeue: the same; `__call__` adds --resume auto if there is something to resume."""
        return submitit.helpers.DelayedSubmission(replace(self, requeues=self.requeues + 1))


def _stopped_by(output_dir: Path) -> int:
    """The signal that stopped the run, from its status.json; 0 if it names none."""
    try:
        status = json.loads((output_dir.expanduser() / STATUS).read_text(encoding="utf-8"))
        return getattr(signal, status["reason"].partition(":")[0]) if status["state"] == "preempted" else 0
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return 0


def _meet(env, file: Path) -> tuple[str, str]:
    """Address and port of the first task, which writes them to the shared `file`. Raises RuntimeError if it fails to."""
    if env.global_rank == 0:
        # containers often cannot resolve their machine's name, and one node does not need it
        address = "127.0.0.1" if env.num_nodes == 1 else env.hostnames[0]
        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        write_text(file, f"{address} {port}")
    deadline = time.monotonic() + WAIT_FOR_FIRST_TASK_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the first task did not write {file} within {WAIT_FOR_FIRST_TASK_S} s: "
                               "is --job_dir on a file system that all nodes share?")
        time.sleep(0.1)
    address, port = file.read_text(encoding="utf-8").split()
    return address, port


def launch(argv: list[str]) -> int:
    """Submit the job; with a local cluster also wait for it. Returns the exit code."""
    if submitit is None:
        raise UserError("run_with_submitit.py needs submitit: 'pip install submitit', or start main.py "
                        "with torchrun")
    Parser("run_with_submitit.py", usage="%(prog)s [--nodes N] [--ngpus N] [--flag value ...]",
           parents=[get_launch_parser(), get_args_parser()],
           description="Train on a Slurm cluster, with main.py's flags.").parse_args(argv)
    options, rest = get_launch_parser().parse_known_args(argv)
    args = parse_args(rest).args
    for flag in ("ngpus", "nodes", "timeout"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag} {getattr(options, flag)} must be at least 1")
    if options.cluster != "slurm" and options.nodes > 1 or options.cluster == "debug" and options.ngpus > 1:
        raise UserError(f"--cluster {options.cluster} is one "
                        f"{'node: --nodes' if options.nodes > 1 else 'process: --ngpus'} must be 1")
    validate(args, options.nodes * options.ngpus, complete=not args.resume)
    if reason := impossible_path(options.job_dir):
        raise UserError(f"--job_dir {options.job_dir} cannot be a path: {reason}")
    try:
        job = _submit(options, args, rest)
    except OSError as error:
        on = ", on a machine that has sbatch" if options.cluster == "slurm" else ""
        raise UserError(f"the job cannot be submitted ({one_line(error, 300)}): give a --job_dir that can be written to{on}"
                        ) from error
    print(f"job {job.job_id}: log in {job.paths.stdout}", flush=True)
    return 0 if options.cluster == "slurm" else _wait(job)


def _submit(options: Namespace, args: Namespace, argv: list[str]) -> "submitit.Job":
    """Submit a job of main.py with the words `argv`, whose flags are `args`. Raises UserError and OSError."""
    job_dir = options.job_dir
    if options.cluster != "slurm":              # submitit replaces %j only on Slurm
        job_dir = job_dir.replace("%j", f"{options.cluster}-{os.getpid()}")
    try:
        executor = submitit.AutoExecutor(folder=job_dir, cluster=options.cluster, slurm_max_num_timeout=30)
    except RuntimeError:
        raise UserError("--cluster slurm: srun was not found on this machine, so run this on a login node, "
                        "or take --cluster local") from None
    # so that the job can import main, wherever it was submitted
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    cpu = args.device == "cpu" or options.cluster != "slurm" and not torch.cuda.is_available()
    slurm = {f"slurm_{key}": getattr(options, key) for key in ("partition", "account", "qos", "comment")
             if getattr(options, key)}
    executor.update_parameters(
        name="vision_kan", nodes=options.nodes, tasks_per_node=options.ngpus, timeout_min=options.timeout,
        gpus_per_node=0 if cpu else options.ngpus, cpus_per_task=max(1, args.num_workers),
        slurm_signal_delay_s=120, slurm_setup=[f"export PYTHONPATH={shlex.quote(os.environ['PYTHONPATH'])}"],
        **slurm)
    folder = str(executor.folder)
    try:
        return executor.submit(Trainer(argv, folder, args.output_dir or folder, args.eval))
    except submitit.core.utils.FailedJobError:      # submitit has printed what sbatch says
        raise UserError("sbatch refused the job, for the reason above: correct --partition, --account, --qos, --nodes, --ngpus "
                        "or --timeout") from None


def _wait(job) -> int:
    try:
        return max(job.results())
    except KeyboardInterrupt:
        job.cancel()
        raise
    except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError):
        print(f"job {job.job_id} failed: see {job.paths.stdout} and {job.paths.stderr}", file=sys.stderr)
        return 1


def main(argv: list[str] | None = None) -> int:
    """Entry of the script: `launch` with errors as one sentence and exit code 2."""
    return peers.exit_code(lambda: launch(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
