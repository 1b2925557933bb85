"""Writing and rotating checkpoints."""
import errno
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vision_kan.checkpoints import untrusted
from vision_kan.checkpoints.read import BEST, CHECKPOINT, PREVIOUS
from vision_kan.common.errors import one_line
from vision_kan.common.files import atomic_write, replacing, sync_folder
from vision_kan.common.text import to_json


def saved_checkpoints(folder: Path) -> list[Path]:
    """The existing checkpoints of a run's folder, newest first: checkpoint.pth, checkpoint_previous.pth,
    checkpoint_previous_2.pth and so on, then the best ones, which may be of any epoch."""
    stem = Path(PREVIOUS).stem
    numbered = {int(match.group(1)): path for path in folder.glob(f"{stem}_*.pth")
                if (match := re.fullmatch(rf"{stem}_([1-9]\d{{0,8}})\.pth", path.name))}
    ordered = [folder / CHECKPOINT, folder / PREVIOUS, *(numbered[number] for number in sorted(numbered)),
               *(folder / name for name in BEST)]
    return [path for path in ordered if path.exists()]


# ---------------------------------------------------------------- writing checkpoints
def save_checkpoint(checkpoint: dict[str, Any], folder: Path, also: tuple[str, ...] = (), keep: int = 2) -> None:
    """Write `checkpoint.pth`, keep the `keep` - 1 before it under the names of `saved_checkpoints`, and link the names in `also`
    to the new file. The earlier files stay intact if the process is killed or the disk fills up. Raises OSError."""
    with replacing(folder / CHECKPOINT) as temporary:
        with open(temporary, "wb") as file:
            _dump(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        for name in also:
            _link(temporary, folder / name)
        _age(folder, keep)
    sync_folder(folder)


def _dump(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:       # torch's zip writer hides the reason
        raise OSError(errno.ENOSPC, f"writing failed ({one_line(error, 80)})") from error


def save_pth(checkpoint: dict[str, Any], target: Path) -> None:
    """Write a checkpoint under any name, completely or not at all. Raises UserError if it cannot be written."""
    with atomic_write(target) as place, open(place, "wb") as file:
        _dump(checkpoint, file)


def save_safetensors(state: Mapping[str, torch.Tensor], about: Mapping[str, Any], target: Path) -> None:
    """Write weights as .safetensors, with the checkpoint's other entries `about` (built-in types) in the metadata, completely or
    not at all. `load_file` reads both back. Raises UserError if it cannot be written."""
    with atomic_write(target) as temporary:
        try:
            save_file({key: value.contiguous() for key, value in state.items()}, temporary,
                      metadata={"format": "pt", untrusted.SAFETENSORS_KEY: to_json(about)})
        except SafetensorError as error:
            raise OSError(errno.EIO, one_line(error)) from error
        os.chmod(temporary, 0o644)


def _age(folder: Path, keep: int) -> None:
    """Rename each of the last checkpoints to the next older name, and remove those beyond `keep`. `checkpoint.pth` stays in place
    until it is replaced, so that each name holds a complete file at every moment."""
    stem = Path(PREVIOUS).stem
    names = [CHECKPOINT, PREVIOUS, *(f"{stem}_{number}.pth" for number in range(2, keep))][:keep]
    for newer, older in zip(names[-2::-1], names[:0:-1]):
        if (folder / newer).exists():
            _link(folder / newer, folder / older)
    for path in saved_checkpoints(folder):
        if path.name.startswith(stem) and path.name not in names:
            path.unlink()


def _link(source: str | Path, target: Path) -> None:
    """Give a file a second name, atomically; copy it if the file system has no links."""
    with replacing(target) as place:
        try:
            os.link(source, place)
        except OSError:
            shutil.copyfile(source, place)
