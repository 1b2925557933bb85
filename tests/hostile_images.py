"""Image files that real collections hold: some that no decoder can read, odd ones that must be read; and the memory that a
call takes."""
import os
import resource
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
from helpers import forked
from PIL import Image

BLOCK = 1 << 20
LONG_NAME = "an image whose name has as many characters as a file system takes ".replace(" ", "-") * 4
EPS = ("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n0.5 setgray 0 0 40 30 rectfill showpage\n%%EOF\n")


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (40, 32), **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path, **save)
    return path


def picture(seed: int = 0, size: tuple[int, int] = (40, 32)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_black_png(path: Path, width: int, height: int) -> Path:
    """An RGB PNG file of zeros, a thousandth of its decoded size and written without that memory."""
    size = height * (3 * width + 1)                         # each row begins with the number of its filter
    deflate = zlib.compressobj(9, wbits=-15)
    block = deflate.compress(bytes(BLOCK)) + deflate.flush(zlib.Z_FULL_FLUSH)       # may be repeated
    rest = deflate.compress(bytes(size % BLOCK)) + deflate.flush()
    adler = struct.pack(">I", size % 65521 << 16 | 1)       # of zeros

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", b"\x78\xda" + block * (size // BLOCK) + rest + adler) + chunk(b"IEND", b""))
    return path


def write_unreadable(folder: Path) -> list[str]:
    """One file of each kind that cannot be read; their names. `forbidden.jpg` is a whole image without permissions: root
    reads it all the same."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(os.listdir(folder))
    for kind in ("png", "jpg", "webp", "tif", "bmp", "pgm"):
        whole = write_image(folder / f"truncated.{kind}", size=(300, 300))
        whole.write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])
    (folder / "garbage.jpg").write_bytes(np.random.default_rng(0).bytes(2000))
    png = write_image(folder / "header.png", size=(300, 300)).read_bytes()
    (folder / "header.png").write_bytes(png[:40] + np.random.default_rng(0).bytes(2000))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "postscript.jpg").write_text(EPS)
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    os.mkfifo(folder / "pipe.jpg")
    write_black_png(folder / "bomb.png", 20_000, 20_000)
    (folder / "schöne 猫 🙂.jpg").write_bytes(b"x")
    (folder / "two\nlines.jpg").write_bytes(b"x")
    (folder / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(b"x")       # not even UTF-8
    (folder / f"{LONG_NAME[:251]}.jpg").write_bytes(b"x")
    write_image(folder / "forbidden.jpg").chmod(0)
    return sorted(set(os.listdir(folder)) - before)


def write_odd(folder: Path) -> dict[str, tuple[int, int]]:
    """Odd files that can be read: name -> width and height."""
    folder.mkdir(parents=True, exist_ok=True)
    image = picture()
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("P").save(folder / "palette.png", transparency=bytes(range(256)))
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("LA").save(folder / "grey-alpha.png")
    image.convert("1").save(folder / "bilevel.png")
    Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)).save(folder / "sixteen.tif")
    for kind in ("webp", "png", "tif"):
        image.save(folder / f"animated.{kind}", save_all=True, append_images=[Image.new("RGB", image.size)])
    exif = Image.Exif()
    exif[0x0112] = 6        # to be shown turned by 90 degrees
    image.save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    Image.new("RGB", (20_000, 1), "red").save(folder / "wide.png")
    Image.new("RGB", (1, 20_000), "red").save(folder / "tall.jpg")
    Image.new("RGB", (20_000, 3), "red").save(folder / "wide.jpg")
    image.save(folder / "png inside.jpg", format="PNG")
    image.save(folder / "gif inside.jpg", format="GIF")
    image.save(folder / "schön 猫 🙂.jpg")
    image.save(folder / "three\nlines\n.png")
    image.save(folder / f"{LONG_NAME[:251]}.png")
    (folder / "read only.jpg").write_bytes((folder / "turned.jpg").read_bytes())
    (folder / "read only.jpg").chmod(stat.S_IRUSR)
    (folder / "link.jpg").symlink_to("cmyk.jpg")
    sizes = {"one.png": (1, 1), "wide.png": (20_000, 1), "tall.jpg": (1, 20_000), "wide.jpg": (20_000, 3),
             "sixteen.png": (9, 9), "sixteen.tif": (9, 9)}
    return {name: sizes.get(name, image.size) for name in sorted(os.listdir(folder))}


def grown(function, *args):
    """MB by which a call raises the peak memory of a fork of this process."""
    def measured():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function(*args)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return forked(measured)


def write_folder(root, train, val, suffix="jpg"):
    """train, val: dict class -> number of images."""
    for half, classes in (("train", train), ("val", val)):
        for c, (name, count) in enumerate(classes.items()):
            (root / half / name).mkdir(parents=True)
            for i in range(count):
                write_image(root / half / name / f"{i}.{suffix}", seed=100 * c + i + (half == "val") * 1000)
    return root
