"""Atomic writes: files appear complete or not at all; the hash of a file."""
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vision_kan.common.errors import UserError

STATUS = "status.json"      # in a run's folder


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yields a temporary path for a file or folder. It becomes `target` if the block succeeds; otherwise nothing is left,
    not even a folder that was made for it.

    The path has the target's name, in a temporary folder beside it. Raises UserError for any OSError inside, and if `target` is a
    folder that is not empty."""
    temporary, made = None, list[Path]()
    try:
        if target.is_dir() and any(target.iterdir()):
            raise OSError(errno.ENOTEMPTY, "a folder that is not empty is in the way")
        made = [folder for folder in target.parents if not folder.exists()]        # the innermost first
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
        yield temporary / target.name
        os.replace(temporary / target.name, target)
    except BrokenPipeError:         # of what the block prints
        raise
    except OSError as error:
        other = f", {error.filename}" if error.filename and Path(str(error.filename)).parent != temporary else ""
        raise UserError(f"{target} cannot be written ({error.strerror or error}{other}): free some space, or name another "
                        "place") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):     # they hold something: the target, or what others wrote
            for folder in made:
                folder.rmdir()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """As `atomic_write` for a file of a run. The temporary name is always the same, so that a kill leaves at most one such file,
    which the next write removes. Raises OSError."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a text in UTF-8 by `replacing`; it is on the disk before it gets its name. Raises OSError."""
    with replacing(target) as place, open(place, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that renamed files keep their names after a crash."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
