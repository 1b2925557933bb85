"""Files that appear whole or not at all."""
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vision_kan.common.errors import UserError


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A place of the same name beside `target` for a file or a folder, which becomes `target` where the block ends well; else
    nothing is left of it. Raises UserError where the disk does not allow it, or a folder that holds something is in the way."""
    temporary = None
    try:
        if target.is_dir() and any(target.iterdir()):
            raise OSError(errno.ENOTEMPTY, "a folder that is not empty is in the way")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
        yield temporary / target.name
        os.replace(temporary / target.name, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}): free some space, or name another "
                        "place") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
