"""Trained weights that come with this code, each under a model's name with a tag: `vit_nano_patch8_32_GKAN.digits`.

The files lie in vision_kan/pretrained as NAME-HASH.safetensors, and tools/ship.py writes them. HASH begins the file's SHA-256, as
in timm's names, so that a new file needs no change here."""
import re
from pathlib import Path

from vision_kan.common.errors import UserError
from vision_kan.common.files import sha256

FOLDER = Path(__file__).resolve().parent.parent / "pretrained"
_FILE = re.compile(r"(.+)-([0-9a-f]{8,64})\.safetensors")


def shipped() -> dict[str, Path]:
    """The name of each of these models -> its file."""
    return {found[1]: path for path in sorted(FOLDER.glob("*.safetensors")) if (found := _FILE.fullmatch(path.name))}


def checked(name: str) -> Path:
    """The file of a name in `shipped`. Raises UserError if its content is not the one that it was shipped with."""
    path = shipped()[name]
    found = _FILE.fullmatch(path.name)
    try:
        if found and sha256(path).startswith(found[2]):
            return path
    except OSError as error:
        raise UserError(f"the weights of {name}, {path}, cannot be read ({error.strerror})") from error
    raise UserError(f"the weights of {name}, {path}, have been changed (their SHA-256 is not the one in the file's name): get "
                    "them from this project again")
