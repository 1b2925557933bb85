"""Upload a folder written by `tools/export.py CHECKPOINT FOLDER` to the Hugging Face Hub, in one commit.

    python tools/push_to_hub.py FOLDER USER/NAME [--private]

Read its README.md, the model card, first: others will see its results, data and licence. The upload needs `hf auth login` or
HF_TOKEN. Afterwards `timm.create_model("hf-hub:USER/NAME", pretrained=True)` loads the model once `models_kan` is imported.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vision_kan.common import console

console.starting(__name__)
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from tools.common import PLACE, command, tool_parser
from vision_kan.common.errors import UserError, one_line
from vision_kan.common.text import say
from vision_kan.config.parser import Parser

FILES = ("config.json", "model.safetensors", "README.md")


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload the folder's files to the model `repo` ("USER/NAME"), which is created if it does not exist.

    Returns: the URL of the commit.
    Raises: UserError for any other folder, without a login, for an invalid name or another user's, and without a connection."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} has no {' and no '.join(missing)}: write it with tools/export.py CHECKPOINT FOLDER")
    if get_token() is None:
        raise UserError("nobody is logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / 'README.md'} cannot be read ({one_line(error)}): save it in UTF-8, or write the folder again "
                        "with tools/export.py CHECKPOINT FOLDER") from error
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id       # adds the owner if it is missing
        files: list[tuple[str, str | bytes]] = [(name, str(folder / name)) for name in FILES if name != "README.md"]
        files.append(("README.md", card.replace(PLACE, repo).encode()))
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files]
        return api.create_commit(repo, operations, commit_message=f"Add {folder.resolve().name}").commit_url
    except HFValidationError as error:
        raise UserError(f"{repo} is not a name of a model on the Hub ({one_line(error)}): give {PLACE}") from error
    except HfHubHTTPError as error:
        raise UserError(f"the Hub refuses {repo} ({one_line(error)}): check the name, and that the token of `hf auth login` or "
                        "HF_TOKEN may write there") from error
    except Exception as error:      # the Hub's client raises many kinds
        raise UserError(f"the Hub cannot be reached ({one_line(error)}): nothing was pushed, check the connection and "
                        "HF_HUB_OFFLINE") from error


def arguments() -> Parser:
    parser = tool_parser("push_to_hub.py", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("repo", metavar=PLACE)
    parser.add_argument("--private", action="store_true", help="make a new model private")
    return parser


def run(own: argparse.Namespace, _: list[str]) -> int:
    say(push(own.folder, own.repo, own.private))
    return 0


main = command(arguments, run)

if __name__ == "__main__":
    sys.exit(main())
