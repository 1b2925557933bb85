"""How the processes of a run find each other, and detect one that died, hangs or never started: the error names it."""
import faulthandler
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlparse

import torch.distributed as dist

from vision_kan.common import console
from vision_kan.common.errors import EXIT_FAILED, Preempted, TrainingFailed, UserError, one_line
from vision_kan.common.launch import launch_number, world_size_of_launch
from vision_kan.common.process import Process, choose_device

LOST = re.compile(r"gloo|NCCL|ProcessGroup|[Cc]onnection (closed|reset|refused)|Broken pipe|[Tt]imed out|socket")
# torch's own limit of a collective is a little above --dist-timeout, so that this module reports first and names the process.
MARGIN_S = 60
KEPT = "; the last checkpoint is complete: continue with --resume auto"


# ---------------------------------------------------------------- meeting
def meet(url: str, rank: int, world_size: int, timeout: float) -> dist.Store:
    """The store at --dist_url (env://, tcp://host:port, file:///path), once all processes are there.

    Raises UserError that names those that did not start within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    try:
        # torchrun's own store outlives a restart of all processes, with the keys of the earlier attempt
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", _store(url, rank, world_size, timeout))
        if url.startswith("file:") and store.check([f"here/{rank}"]):
            raise UserError(f"--dist_url {url}: an earlier launch has left this file, or still uses it: if it has ended, delete "
                            f"{urlparse(url).path}")
        store.set(f"here/{rank}", socket.gethostname())
    except TimeoutError as error:
        raise UserError(f"process 0 of {world_size}, which keeps the address {error}, did not start within --dist-timeout "
                        f"{timeout:g} s: check its log, its machine, {_to_check(url)}") from None
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        reason = f"{error} is not set" if isinstance(error, KeyError) else one_line(error)
        raise _cannot_meet(url, world_size, reason) from error
    missing = list(range(world_size))
    while True:
        gone = False
        try:
            missing = [other for other in missing if not store.check([f"here/{other}"])]
        except RuntimeError:        # process 0 has given up and taken the store with it
            gone = True
        if not missing:
            return store
        if gone or time.monotonic() > deadline:
            raise UserError(f"{names(missing)} of {world_size} did not start within --dist-timeout {timeout:g} s: check its log "
                            "and its machine, or raise --dist-timeout")
        time.sleep(0.05)


def _cannot_meet(url: str, world_size: int, reason: str) -> UserError:
    return UserError(f"the {world_size} processes cannot meet at --dist_url {url} ({reason[:200]}): check "
                     f"{_to_check(url)}")


def _to_check(url: str) -> str:
    """Where processes that do not meet at --dist_url may have gone wrong."""
    if url.startswith("file:"):
        return "that all can write this file, and delete it if an earlier launch has left it"
    return f"{'MASTER_ADDR, MASTER_PORT' if url.startswith('env:') else 'this address'} and the firewall"


def _store(url: str, rank: int, world_size: int, timeout: float) -> dist.Store:
    """By hand, because `torch.distributed.rendezvous` waits for all processes without naming one that is missing."""
    parts = urlparse(url)
    if parts.scheme == "file":
        open(parts.path, "ab").close()      # where it cannot be written, FileStore would go on trying
        return dist.FileStore(parts.path, world_size)
    host, port = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if parts.scheme == "env" \
        else (parts.hostname, parts.port)
    if host is None or port is None:
        raise ValueError("it names no host and port")
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and \
        (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")) == (host, str(port))       # by torchrun
    if rank > 0 or served:
        _wait_for(host, port, timeout)
    return dist.TCPStore(host, port, is_master=rank == 0 and not served, timeout=timedelta(seconds=timeout),
                         wait_for_workers=False, multi_tenant=True)


def _wait_for(host: str, port: int, timeout: float) -> None:
    """Wait until the port accepts connections. torch's own client may take twice the time, and prints its C++ stack.

    Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if isinstance(error, socket.gaierror):
                raise
            if time.monotonic() > deadline:
                raise TimeoutError(f"{host}:{port}") from error
            time.sleep(0.05)


def names(ranks: list[int]) -> str:
    return f"process {ranks[0]}" if len(ranks) == 1 else f"processes {', '.join(map(str, ranks))}"


# ---------------------------------------------------------------- watching
@dataclass
class _Seen:
    """What is known of another process."""
    beat: int = -1              # grows as long as the process lives
    reached: int = 0            # points where others may wait for it
    changed: float = 0.0        # when its beat last grew, on this process's clock


class Peers:
    """A thread that reports this process's progress and reads that of the others.

    The training calls `progress` wherever others may wait for it. Once a process has waited for `timeout` seconds, the one with
    the least progress is reported as hung. A process that ends with an error calls `announce_exit`.

    Args:
        store: where they met. timeout: seconds. on_loss: called with the sentence before this process ends itself, because
            its main thread waits in a collective that nothing will complete.
    """
    GRACE_S = 10    # for the main thread to notice by itself that another process has left

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float):
        self.store = dist.PrefixStore("peers", store.clone())      # its own connection: the main thread may wait in its own
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.interval = min(1.0, timeout / 10)
        self.on_loss: Callable[[str], None] = lambda reason: None
        self.reached, self.reached_at, self.doing = 0, time.monotonic(), "starting"
        self.seen = {other: _Seen(changed=time.monotonic()) for other in range(world_size) if other != rank}
        self.left: dict[int, str] = {}
        self.left_at = 0.0
        self.store_lost = 0.0
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.beat = 0
        self.thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self.thread.start()

    def progress(self, doing: str) -> None:
        """Record the main thread's progress. doing: its next step, for messages."""
        self.reached += 1
        self.reached_at, self.doing = time.monotonic(), doing

    def announce_exit(self, reason: str) -> None:
        """Tell the others why this process ends."""
        try:
            self.store.set(f"left/{self.rank}", reason[:300])
        except (RuntimeError, OSError):
            pass        # the others have ended too
        deadline = time.monotonic() + 2.5 * self.interval
        while self.rank == 0 and len(self.left) < len(self.seen) and time.monotonic() < deadline:
            self.poll()         # the store may end with this process: let the others read it first
            time.sleep(0.02)
        self.close()

    def close(self) -> None:
        self.closing.set()
        if threading.current_thread() is not self.thread:
            self.thread.join(5)

    # ---- what is known
    def poll(self) -> None:
        """Report this process's progress and read that of the others."""
        with self.lock:
            now = time.monotonic()
            self.beat += 1
            try:
                self.store.set(f"at/{self.rank}", f"{self.beat} {self.reached}")
                for other, seen in self.seen.items():
                    if self.store.check([f"at/{other}"]):
                        beat, reached = map(int, self.store.get(f"at/{other}").split())
                        if beat != seen.beat:
                            seen.beat, seen.reached, seen.changed = beat, reached, now
                    if other not in self.left and self.store.check([f"left/{other}"]):
                        self.left[other] = self.store.get(f"left/{other}").decode()
                        self.left_at = self.left_at or now
                self.store_lost = 0.0
            except (RuntimeError, OSError):
                self.store_lost = self.store_lost or now

    def blame(self, silence: float) -> str:
        """A clause on the process that causes a wait: it has ended, shows no sign of life for `silence` seconds, or is behind.
        '' if there is none."""
        now = time.monotonic()
        if self.left:
            other, reason = min(self.left.items())
            return f"process {other} has stopped ({reason})"
        if self.store_lost:     # then nothing is known of the others
            return "process 0 (or the launcher), which keeps the processes together, is gone" \
                if now - self.store_lost > silence else ""
        silent = [other for other, seen in self.seen.items() if now - seen.changed > silence]
        if silent:
            return f"{names(silent)} of {self.world_size} has not responded for {silence:.0f} s: killed, out of " \
                   "memory, or cut off"
        behind = [other for other, seen in self.seen.items() if seen.reached < self.reached]
        if behind and now - self.reached_at > self.timeout:
            return f"{names(behind)} of {self.world_size} did not reach the point where the others have waited for " \
                   f"--dist-timeout {self.timeout:g} s ({self.doing})"
        return ""

    def explain(self, error: Exception) -> TrainingFailed | None:
        """The error to raise after a failed collective: which process is missing. None if the error is of another kind."""
        if not LOST.search(str(error)) and not isinstance(error, dist.DistError):
            return None
        silence = 3.5 * self.interval
        deadline = time.monotonic() + silence + self.interval
        reason = ""
        while not reason and time.monotonic() < deadline:
            self.poll()
            reason = self.blame(silence)
            time.sleep(self.interval / 4)
        reason = reason or f"the connection to the other processes was lost ({one_line(error)})"
        return TrainingFailed(reason + KEPT)

    # ---- the thread
    def _watch(self) -> None:
        while not self.closing.wait(self.interval):
            self.poll()
            now = time.monotonic()
            waited = now - self.reached_at
            if self.left and now - self.left_at > self.GRACE_S and waited > self.GRACE_S:
                self._end(self.blame(self.timeout))
            elif waited > self.timeout:
                if reason := self.blame(self.timeout):
                    self._end(reason)
                elif any(seen.reached > self.reached for seen in self.seen.values()):
                    faulthandler.dump_traceback(sys.stderr)     # the others end too; show where it hangs
                    self._end(f"this process, {self.rank} of {self.world_size}, has hung for --dist-timeout {self.timeout:g} s "
                              f"({self.doing}) while the others wait")

    def _end(self, reason: str) -> None:
        """End this process from this thread, because its main thread no longer responds."""
        if self.closing.is_set():
            return
        whole = reason + KEPT
        console.tell(f"stopped: {whole}")
        try:
            self.on_loss(whole)
            self.store.set(f"left/{self.rank}", reason[:300])
        except (RuntimeError, OSError):
            pass
        os._exit(EXIT_FAILED)


# ---------------------------------------------------------------- this process
_peers: Peers | None = None


def init_process(device_name: str, dist_url: str = "env://", timeout: float = 600) -> Process:
    """Join the process group where a launcher started several processes: NCCL on GPUs, gloo on CPUs.

    timeout: seconds (--dist-timeout) that a process waits for the others, here and later. Raises UserError."""
    global _peers
    if "RANK" not in os.environ:
        return Process(device=choose_device(device_name))
    rank, world_size, local_rank = launch_number("RANK"), world_size_of_launch(), launch_number("LOCAL_RANK")
    device = choose_device(device_name, local_rank)
    store = meet(dist_url, rank, world_size, timeout)
    _peers = Peers(store, rank, world_size, timeout)        # a process may also be lost while the group is made
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore("group", store),
                                rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout + MARGIN_S))
    except (RuntimeError, ValueError, OSError) as error:
        raise _cannot_meet(dist_url, world_size, one_line(error)) from error
    return Process(rank, world_size, local_rank, device)


def progress(doing: str) -> None:
    """This process has reached a point where the others may wait for it. doing: its next step, for messages."""
    if _peers:
        _peers.progress(doing)


def on_loss(call: Callable[[str], None]) -> None:
    """Call `call(sentence)` before this process ends because another is lost."""
    if _peers:
        _peers.on_loss = call


def lost(error: Exception) -> TrainingFailed | None:
    """The error to raise in place of a collective's, if that failed because a process is lost; else None."""
    return _peers.explain(error) if _peers else None


def exit_code(program: Callable[[], int]) -> int:
    """What `program` returns. After an error, prints it as one sentence and returns its `exit_code`; 130 after Ctrl-C, 141 if
    nobody reads the output any more. Leaves the process group, and reports the reason to the other processes."""
    return console.guarded(lambda: _exit_code(program))


def _exit_code(program: Callable[[], int]) -> int:
    try:
        code = program()
    except (Exception, KeyboardInterrupt) as error:
        if end := console.ending(error):
            code, text = end
            return _leave(code, "" if code == console.EXIT_UNREAD else text, together=isinstance(error, Preempted))
        if isinstance(error, BrokenPipeError) and console.silence():
            return _leave(console.EXIT_UNREAD, "", "nobody reads its output any more")
        failure = lost(error) if isinstance(error, Exception) else None
        if failure is None:
            _leave(EXIT_FAILED, "", str(error) or type(error).__name__)
            raise
        return _leave(failure.exit_code, f"stopped: {failure}")
    return _leave(code, together=True)


def _leave(code: int, text: str = "", reason: str = "", together: bool = False) -> int:
    """together: the others end at the same point, so the group can be taken down in order."""
    global _peers
    alone = not dist.is_initialized()
    if text and (alone or not together or dist.get_rank() == 0):
        try:
            print(text, file=sys.stderr, flush=True)
        except BrokenPipeError:
            console.silence()
    if _peers:
        if together:
            _peers.close()
        else:
            _peers.announce_exit(one_line(reason or text.partition(": ")[2], 1000))
        _peers = None
    if not alone:
        dist.destroy_process_group()
    return code
