"""Experiment trackers (--track): each sends every epoch's numbers to Weights & Biases or MLflow, in its own thread.

A tracker never stops or delays the training: a failure is reported once, and unsent numbers are sent with the next epoch.
"""
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from vision_kan.common.errors import UserError, one_line
from vision_kan.common.text import say

FINISH_S = 30       # time that a tracker has at the end of a run to send the rest


@dataclass(frozen=True)
class About:
    """A run's description for a tracker."""
    id: str                         # the same for all launches of the run
    name: str
    project: str
    folder: Path
    flags: Mapping[str, Any]        # dest -> value
    launch: Mapping[str, Any]       # an entry of run.yaml


class Service(Protocol):
    """A run at a tracker, found by its id or created. Raises whatever its package raises."""

    def __init__(self, about: About) -> None: ...

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None: ...

    def finish(self, state: str, exit_code: int) -> None:
        """state: as in status.json."""


class _WandB:
    def __init__(self, about: About):
        import wandb
        self.run = wandb.init(project=about.project, name=about.name, id=about.id, resume="allow", dir=str(about.folder),
                              config={**about.flags, "launch": dict(about.launch)}, allow_val_change=True,
                              reinit="create_new", settings=wandb.Settings(console="off"))

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        self.run.log({**numbers, "epoch": epoch}, step=epoch)

    def finish(self, state: str, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


class _MLflow:
    ID = "vision_kan.run"       # the tag that holds the run's id
    STATES = {"finished": "FINISHED", "preempted": "KILLED"}

    def __init__(self, about: About):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag
        self.client, self.metric = MlflowClient(), Metric
        experiment = self.client.get_experiment_by_name(about.project)
        where = experiment.experiment_id if experiment else self.client.create_experiment(about.project)
        found = self.client.search_runs([where], f"tags.`{self.ID}` = '{about.id}'", max_results=1)
        tags = {"mlflow.source.name": about.launch["command"], "mlflow.source.git.commit": about.launch["commit"],
                **{f"version.{package}": version for package, version in about.launch["versions"].items()}}
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            # a parameter cannot change, so flags that a resume changes become tags
            tags |= {f"resumed.{dest}": str(value) for dest, value in about.flags.items()
                     if found[0].data.params.get(dest) != str(value)}
            params = []
        else:
            self.id = self.client.create_run(where, run_name=about.name, tags={self.ID: about.id}).info.run_id
            params = [Param(dest, str(value)) for dest, value in about.flags.items()]
        for start in range(0, max(len(params), 1), 100):        # MLflow's limit per call
            self.client.log_batch(self.id, params=params[start:start + 100])
        self.client.log_batch(self.id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [self.metric(key, value, now, epoch) for key, value in numbers.items()])

    def finish(self, state: str, exit_code: int) -> None:
        self.client.set_terminated(self.id, self.STATES.get(state, "FAILED"))


SERVICES: dict[str, type[Service]] = {"wandb": _WandB, "mlflow": _MLflow}


def check(names: Sequence[str]) -> None:
    """Raises UserError if a tracker is not installed, or would ask for a login."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name}: the package is not installed: pip install {name}")
    if "wandb" in names and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        import wandb
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise UserError("--track wandb: there is no login: run 'wandb login', or set WANDB_MODE=offline and send the run "
                            "later with 'wandb sync'")


class Tracker:
    """Sends numbers to one service, in a thread of its own."""

    def __init__(self, name: str, about: About):
        self.name, self.about = name, about
        self.queue: SimpleQueue[tuple[Callable[[Service], None], bool]] = SimpleQueue()
        self.warned = False
        self.thread = threading.Thread(target=self._send, name=f"track-{name}", daemon=True)
        self.thread.start()

    def log(self, epoch: int, numbers: Mapping[str, float]) -> None:
        self.queue.put((lambda service: service.log(epoch, numbers), False))

    def finish(self, state: str, exit_code: int) -> None:
        """Report the end of the run, and wait up to `FINISH_S` seconds until everything is sent."""
        self.queue.put((lambda service: service.finish(state, exit_code), True))
        self.thread.join(FINISH_S)
        if self.thread.is_alive():
            self._warn_once(f"it took longer than {FINISH_S} s to take the last numbers")

    def _send(self) -> None:
        service: Service | None = None
        unsent: list[Callable[[Service], None]] = []
        last = False
        while not last:
            call, last = self.queue.get()
            unsent.append(call)
            try:
                service = service or SERVICES[self.name](self.about)
                while unsent:
                    unsent[0](service)
                    del unsent[0]
            except (Exception, SystemExit) as error:
                self._warn_once(one_line(error, 300))

    def _warn_once(self, reason: str) -> None:
        if not self.warned:
            self.warned = True
            say(f"warning: --track {self.name} failed ({reason}): the training goes on, log.txt has every epoch", file=sys.stderr)
