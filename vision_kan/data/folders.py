"""Image files in folders: what counts as one, and which of a folder are read. All that reads folders asks here."""
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import cache

from PIL import Image, features

from vision_kan.common.text import printable, say

# What an image file may hold, whatever its name. PIL knows some forty formats: for PostScript it would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "AVIF")


@cache
def formats() -> list[str]:
    """Those of FORMATS that this machine's PIL can decode."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN
            and (name not in ("WEBP", "AVIF") or features.check(name.lower()))]     # they need libraries


@cache
def endings() -> tuple[str, ...]:
    """By which the images of a folder are known, in lower case: `.jpg` and so on, as PIL has them."""
    readable = formats()        # the list below is whole from then on
    return tuple(ending for ending, name in Image.registered_extensions().items() if name in readable)


def is_image(name: str) -> bool:
    return name.lower().endswith(endings())


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no data: notebooks, file managers and macOS leave such beside the images."""
    return name.startswith(".") or name == "__MACOSX"


def class_folders(root: str) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones; none where it cannot be read."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if not is_hidden(entry.name) and _is_folder(entry))
    except OSError:
        return []


def images_in(root: str) -> list[str]:
    """Names of the visible image files that lie directly in a folder; none where it cannot be read."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries
                          if is_image(entry.name) and not is_hidden(entry.name) and not _is_folder(entry))
    except OSError:
        return []


def find_labelled(root: str, classes: Sequence[str]) -> list[tuple[str, int]]:
    """The images in and below root/CLASS for each of `classes`: (path, index into `classes`), in torchvision's order. What is
    left out is told once, on stderr."""
    scan = _Scan(root, class_folders(root))
    scan.hidden += [name for name in os.listdir(root) if is_hidden(name)]
    scan.beside += images_in(root)
    found = [(os.path.join(folder, name), number) for number in sorted(range(len(classes)), key=classes.__getitem__)
             for folder, names in sorted(scan.walk(os.path.join(root, classes[number]))) for name in names]
    _tell_once(scan.left_out())
    return found


def find_images(root: str) -> list[str]:
    """The images in and below a folder. What is left out is told once, on stderr."""
    scan = _Scan(root)
    found = [os.path.join(folder, name) for folder, names in scan.walk(root) for name in names]
    _tell_once(scan.left_out())
    return found


def visible(root: str, samples: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those (path, class) pairs that another library has found in `root` which are not hidden; of the others it is told once."""
    scan = _Scan(root)
    kept = []
    for path, target in samples:
        if any(map(is_hidden, os.path.relpath(path, root).split(os.sep))):
            scan.hidden.append(path)
        else:
            kept.append((path, target))
    _tell_once(scan.left_out())
    return kept


def has_images(root: str, names: Sequence[str]) -> bool:
    """Whether there is an image in or below any of these folders in `root`."""
    scan = _Scan(root, names)
    return any(images for name in names for _, images in scan.walk(os.path.join(root, name)))


class _Scan:
    """A walk through what is below `root`, and what it leaves out. Links to folders are followed, and no folder is read twice,
    nor one that `root` lies in.

    classes: names of folders in `root` that a link does not make a part of another one."""

    def __init__(self, root: str, classes: Sequence[str] = ()):
        self.root = root
        self.seen = {_identity(os.path.join(root, name)) for name in classes} | _ancestors(root)
        self.hidden: list[str] = []         # paths, as those below
        self.no_images: Counter[str] = Counter()        # ending -> files
        self.beside: list[str] = []
        self.again: list[str] = []
        self.closed: list[str] = []

    def walk(self, top: str) -> Iterator[tuple[str, list[str]]]:
        """`top`, which is `root` or a folder in it, and the folders below: each one's path and the names of its images."""
        if os.path.islink(top):
            self.seen |= _ancestors(top)
        links = deque([top])        # followed after all else, so that a folder is read under its own name
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
                    if os.path.lexists(folder):     # else a class that has no images in this half
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
        """A sentence, or ''."""
        most = sorted(self.no_images.items(), key=lambda item: (-item[1], item[0]))
        kinds = ", ".join([f"{count} {printable(ending, 20)}" for ending, count in most[:5]] + ["..."] * (len(most) > 5))
        parts = [(len(self.hidden), "hidden file{s} or folder{s}", self._some(self.hidden)),
                 (self.no_images.total(), "file{s} of no format that is read here", kinds),
                 (len(self.beside), "image{s} beside the class folders", self._some(self.beside)),
                 (len(self.again), "link{s} to folders that are read already", self._some(self.again)),
                 (len(self.closed), "folder{s} that cannot be opened", self._some(self.closed))]
        told = [f"{count} {what.replace('{s}', 's' if count > 1 else '')} ({names})" for count, what, names in parts if count]
        return f"left out in {printable(self.root)}: {'; '.join(told)}" if told else ""

    def _some(self, paths: list[str]) -> str:
        """The first of them, as they are called in `root`."""
        names = sorted(path.removeprefix(os.path.join(self.root, "")) for path in paths)
        return ", ".join([printable(name, 60) for name in names[:3]] + ["..."] * (len(names) > 3))


@cache
def _tell_once(sentence: str) -> None:
    if sentence:
        say(sentence, file=sys.stderr)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:     # a link that leads to itself
        return False


def _identity(folder: str) -> tuple[int, int] | None:
    """Of a folder, under whatever name; None where there is none."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _ancestors(folder: str) -> set[tuple[int, int] | None]:
    """The folder that it really is and all that this lies in."""
    real = os.path.realpath(folder)
    found = {_identity(real)}
    while (parent := os.path.dirname(real)) != real:
        real = parent
        found.add(_identity(real))
    return found
