"""Downloads from URLs, kept only if complete and checked. A server may be slow, lie, break off or redirect."""
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import BinaryIO
from urllib.error import URLError
from urllib.parse import unquote, urlparse
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch

from vision_kan.checkpoints.read import FOLDER_CONFIG, FOLDER_WEIGHTS, load_file
from vision_kan.checkpoints.shipped import checked, shipped
from vision_kan.common.errors import UserError, one_line
from vision_kan.common.files import sha256
from vision_kan.common.text import say, warn

try:
    import fcntl
except ImportError:         # Windows, where the partial file of a killed process stays
    fcntl = None        # type: ignore[assignment]
HUB, LOCAL = "hf-hub:", "local-dir:"        # timm's prefixes for models from elsewhere
STALL_S, STALL_BYTES = 60.0, 2 ** 16        # a download that receives fewer bytes in this time is given up


def is_url(location: str) -> bool:
    return urlparse(location).scheme in ("http", "https", "file")


def quiet_hub() -> None:
    """Silence the Hub client's message on each retry."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def local_path(location: str) -> Path | None:
    """The path of a location that `fetch` need not download; None for others."""
    if location.startswith(LOCAL):
        return Path(os.path.expanduser(location.removeprefix(LOCAL)))       # leaves ~nobody as it is
    if location.startswith(HUB):
        return None
    if is_url(location):
        url = urlparse(location)
        return Path(unquote(url.path)) if url.scheme == "file" else None
    path = Path(location).expanduser()
    return checked(location) if location in shipped() and not path.exists() else path


def fetch(location: str) -> Path:
    """A local path for `location`: a file or folder; the name of weights that come with this code (`shipped`), unless there is a
    file or folder of that name; a URL, which is downloaded once; or timm's `hf-hub:OWNER/NAME[@REVISION]`, a model's folder in
    the Hub's cache, and `local-dir:FOLDER`.

    DeiT's URLs end in the first digits of the file's SHA-256 (`name-a1311bcf.pth`), which is checked at every use. A file without
    them is kept only if it can be read as a checkpoint, because a server need not announce its length. Raises UserError."""
    if path := local_path(location):
        return path
    if location.startswith(HUB):
        return _from_hub(location)
    url = urlparse(location)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = Path(url.path).name[-150:]
    found = re.search(r"-([a-f0-9]{8,64})\.[^.]+$", name)
    digest = found.group(1) if found else ""
    # without a hash, two servers may offer different files under one name
    target = folder / (name if digest else f"{hashlib.sha256(location.encode()).hexdigest()[:12]}-{name}")
    if target.is_file():
        if sha256(target).startswith(digest):
            return target
        warn(f"{target} is damaged: its SHA-256 is not the one in its name, so it is downloaded again")
    say(f"downloading {location} to {target}")
    try:
        _download(location, target, digest)
    except (HTTPException, URLError, OSError, ValueError) as error:
        reason = one_line(getattr(error, "reason", None) or error)
        raise UserError(f"{location} cannot be downloaded ({reason}): check the address and the connection, or "
                        "download it elsewhere and give the file") from error
    return target


def _from_hub(location: str) -> Path:
    from huggingface_hub import hf_hub_download  # slow to import
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    quiet_hub()
    name, _, revision = location.removeprefix(HUB).partition("@")
    try:
        config = Path(hf_hub_download(name, FOLDER_CONFIG, revision=revision or None))
        for number, file in enumerate(FOLDER_WEIGHTS, 1):
            try:
                hf_hub_download(name, file, revision=revision or None)
                break
            except EntryNotFoundError:
                if number == len(FOLDER_WEIGHTS):
                    raise
        return config.parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(f"{location} cannot be downloaded from the Hub ({one_line(error)}): check the name and the connection, "
                        "or give a downloaded folder") from error


def _download(location: str, target: Path, digest: str) -> None:
    """Download to `target`, completely or not at all (`torch.hub.download_url_to_file` keeps half a file if the connection breaks
    off)."""
    with _local_write(location, target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, handle = _partial(target)
    try:
        with os.fdopen(handle, "wb") as file:
            _Transfer(location, file, target.parent).finish()
            with _local_write(location, target.parent):
                os.chmod(temporary, 0o644)
                file.flush()
                os.fsync(handle)
            _check(location, temporary, digest)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _partial(target: Path) -> tuple[Path, int]:
    """A new file beside the target, locked while this process lives. Removes the leftovers of killed processes."""
    for leftover in target.parent.glob(f"{re.sub(r'[][*?]', '?', target.name)}.*.partial{target.suffix}"):
        if fcntl:
            try:
                with open(leftover, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    leftover.unlink()
            except OSError:     # another process is downloading it, or has removed it
                pass
    while True:
        handle, name = tempfile.mkstemp(prefix=f"{target.name}.", suffix=f".partial{target.suffix}", dir=target.parent)
        if fcntl:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:     # a file system without locks
                pass
        if os.path.exists(name):        # another process may have removed it as a leftover before it was locked
            return Path(name), handle
        os.close(handle)


def _check(location: str, file: Path, digest: str) -> None:
    if digest:
        actual = sha256(file)
        if not actual.startswith(digest):
            raise UserError(f"{location} is not the file that its name promises (its SHA-256 is {actual}): nothing "
                            "was kept, check the address")
        return
    try:
        load_file(file)
    except UserError as error:
        raise UserError(f"{location} is not a complete checkpoint ({one_line(error.__cause__ or error)}): nothing was kept, "
                        "check the address and the connection") from error


@contextmanager
def _local_write(location: str, folder: Path) -> Iterator[None]:
    """Raises an OSError inside as a UserError: it concerns the disk, not the connection."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{location} cannot be kept in {folder} ({error.strerror or error}): free some space there, or set "
                        "TORCH_HOME to another folder") from error


class _Transfer(Thread):
    """A download in its own thread, so that the main thread notices a stall wherever it occurs: name lookup, connection, headers
    or a trickle of bytes."""

    def __init__(self, location: str, file: BinaryIO, folder: Path):
        super().__init__(daemon=True)
        self.location, self.file, self.folder = location, file, folder
        self.received, self.missing = 0, None
        self.failure: Exception | None = None
        self.given_up = False

    def run(self) -> None:
        try:
            request = Request(self.location, headers={"User-Agent": "torch.hub"})
            with build_opener(_Redirects).open(request, timeout=STALL_S) as response:
                while (chunk := response.read1(2 ** 16)) and not self.given_up:
                    with _local_write(self.location, self.folder):
                        self.file.write(chunk)
                    self.received += len(chunk)
                self.missing = response.length      # counts down from Content-Length; None without it
        except Exception as error:
            self.failure = error

    def finish(self) -> None:
        """Wait until everything is written. Raises UserError, OSError, HTTPException or ValueError."""
        self.start()
        before = 0
        while True:
            self.join(STALL_S)
            if not self.is_alive():
                break
            if self.received - before < STALL_BYTES:
                self.given_up = True
                raise OSError(f"{self.received - before} bytes in {STALL_S:g} s, after {self.received} before")
            before = self.received
        if self.failure:
            raise self.failure
        if self.missing:
            raise OSError(f"the connection broke off {self.missing} bytes before the end")


class _Redirects(HTTPRedirectHandler):
    """Refuses redirects to ftp:, and from https: to http:, which urllib follows."""

    def redirect_request(self, request, response, code, message, headers, location):
        scheme = urlparse(location).scheme
        if scheme not in ("http", "https") or (request.type, scheme) == ("https", "http"):
            raise URLError(f"it sends from {request.type}: on to {scheme}:, which is not followed")
        return super().redirect_request(request, response, code, message, headers, location)
