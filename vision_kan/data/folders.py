"""Image files in folders: what counts as an image, and which of a folder's files are read."""
import contextlib
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import cache

from PIL import Image, features

from vision_kan.common.text import printable, say

# Formats that an image file may have, whatever its name. PIL knows some forty, and for PostScript it would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "AVIF")


@cache
def formats() -> list[str]:
    """Those of FORMATS that this machine's PIL can decode."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN
            and (name not in ("WEBP", "AVIF") or features.check(name.lower()))]     # these two need a library


@cache
def endings() -> tuple[str, ...]:
    """The file name endings of images, in lower case, as PIL lists them: `.jpg` and so on."""
    readable = formats()        # also loads PIL's plugins, which complete the list below
    return tuple(ending for ending, name in Image.registered_extensions().items() if name in readable)


def is_image(name: str) -> bool:
    return name.lower().endswith(endings())


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is not data: notebooks, file managers and macOS leave such files."""
    return name.startswith(".") or name == "__MACOSX"


def class_folders(root: str) -> list[str]:
    """Sorted names of the visible folders in `root`; none if it cannot be read."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if not is_hidden(entry.name) and _is_folder(entry))
    except OSError:
        return []


def images_in(root: str) -> list[str]:
    """Sorted names of the visible image files directly in `root`; none if it cannot be read."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries
                          if is_image(entry.name) and not is_hidden(entry.name) and not _is_folder(entry))
    except OSError:
        return []


def find_labelled(root: str, classes: Sequence[str]) -> list[tuple[str, int]]:
    """The images in and below root/CLASS for each of `classes`: (path, index into `classes`), in torchvision's order. Reports
    once, on stderr, what is left out."""
    scan = _Scan(root, class_folders(root))
    with contextlib.suppress(OSError):
        scan.hidden += [name for name in os.listdir(root) if is_hidden(name)]
    scan.outside += images_in(root)
    found = [(os.path.join(folder, name), number) for number in sorted(range(len(classes)), key=classes.__getitem__)
             for folder, names in sorted(scan.walk(os.path.join(root, classes[number]))) for name in names]
    _report_once(scan.left_out())
    return found


def find_images(root: str) -> list[str]:
    """The images in and below a folder. Reports once, on stderr, what is left out."""
    scan = _Scan(root)
    found = [os.path.join(folder, name) for folder, names in scan.walk(root) for name in names]
    _report_once(scan.left_out())
    return found


def visible(root: str, samples: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The (path, class) pairs that are not hidden, of those that another library found in `root`. Reports the others once."""
    scan = _Scan(root)
    kept = []
    for path, target in samples:
        if any(map(is_hidden, os.path.relpath(path, root).split(os.sep))):
            scan.hidden.append(path)
        else:
            kept.append((path, target))
    _report_once(scan.left_out())
    return kept


def has_images(root: str, names: Sequence[str]) -> bool:
    """Whether any of these folders in `root` has an image in or below it."""
    scan = _Scan(root, names)
    return any(images for name in names for _, images in scan.walk(os.path.join(root, name)))


class _Scan:
    """Walks through what is below `root` and records what it leaves out. It follows links to folders, but reads no folder twice
    and none that contains `root`.

    classes: names of folders in `root`. A link to one of them is not followed: it would make a class a part of another."""

    def __init__(self, root: str, classes: Sequence[str] = ()):
        self.root = root
        self.seen = {_identity(os.path.join(root, name)) for name in classes} | _ancestors(root)
        self.hidden: list[str] = []         # paths, like the last three
        self.no_images: Counter[str] = Counter()        # ending -> number of files
        self.outside: list[str] = []        # images that are not in a class folder
        self.again: list[str] = []          # links to folders that are read already
        self.closed: list[str] = []         # folders that cannot be opened

    def walk(self, top: str) -> Iterator[tuple[str, list[str]]]:
        """Yields (path, names of the images) for `top` and each folder below. top: `root` or a folder in it."""
        if os.path.islink(top):
            self.seen |= _ancestors(top)
        links = deque([top])        # followed last, so that a folder is read under its own name
        while links:
            link = links.popleft()
            if link != top and _identity(link) in self.seen:
                self.again.append(link)
                continue
            folders = [link]
            while folders:
                folder = folders.pop()
                self.seen.add(_identity(folder))
                try:
                    with os.scandir(folder) as listed:
                        entries = sorted(listed, key=lambda entry: entry.name)
                except OSError as error:
                    if os.path.lexists(folder):     # else a class without images in this half
                        self.closed.append(f"{folder}: {error.strerror}")
                    continue
                names: list[str] = []
                below: list[str] = []
                for entry in entries:
                    if is_hidden(entry.name):
                        self.hidden.append(entry.path)
                    elif _is_folder(entry):
                        (links if entry.is_symlink() else below).append(entry.path)
                    elif is_image(entry.name):
                        names.append(entry.name)
                    else:
                        self.no_images[os.path.splitext(entry.name)[1].lower() or "without an ending"] += 1
                folders += reversed(below)
                yield folder, names

    def left_out(self) -> str:
        """What was left out as a sentence, or ''."""
        most = sorted(self.no_images.items(), key=lambda item: (-item[1], item[0]))
        kinds = ", ".join([f"{count} {printable(ending, 20)}" for ending, count in most[:5]] + ["..."] * (len(most) > 5))
        parts = [(len(self.hidden), "hidden file{s} or folder{s}", self._some(self.hidden)),
                 (self.no_images.total(), "file{s} of no format that is read here", kinds),
                 (len(self.outside), "image{s} beside the class folders", self._some(self.outside)),
                 (len(self.again), "link{s} to folders that are read already", self._some(self.again)),
                 (len(self.closed), "folder{s} that cannot be opened", self._some(self.closed))]
        texts = [f"{count} {what.replace('{s}', 's' if count > 1 else '')} ({names})" for count, what, names in parts if count]
        return f"left out in {printable(self.root)}: {'; '.join(texts)}" if texts else ""

    def _some(self, paths: list[str]) -> str:
        """The first three paths, relative to `root`."""
        names = sorted(path.removeprefix(os.path.join(self.root, "")) for path in paths)
        return ", ".join([printable(name, 60) for name in names[:3]] + ["..."] * (len(names) > 3))


@cache
def _report_once(sentence: str) -> None:
    if sentence:
        say(sentence, file=sys.stderr)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:     # a link that leads to itself
        return False


def _identity(folder: str) -> tuple[int, int] | None:
    """(device, inode) of a folder, the same under every name; None if it does not exist."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _ancestors(folder: str) -> set[tuple[int, int] | None]:
    """Identities of the folder, links resolved, and of all folders above it."""
    real = os.path.realpath(folder)
    found = {_identity(real)}
    while (parent := os.path.dirname(real)) != real:
        real = parent
        found.add(_identity(real))
    return found
