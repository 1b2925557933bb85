"""tools/inspect_kan.py as a user calls it: real checkpoints, real images, the page and its pictures, every mistake."""
import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from e2e import QUICK, checkpoint, run, write_digits
from helpers import RELEASED, ROOT, every, needs_released
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from PIL import Image

from tools import inspect_kan
from tools.images import loaders_of
from vision_kan.analysis.inputs import ActivationStats, collect_inputs
from vision_kan.analysis.measures import LayerStats, measure
from vision_kan.layers.function_layer import function_layers
from vision_kan.run.trained import default_output, load_trained

ONE = ("--layer", "blocks.0")       # few panels are drawn quickly


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A run of each feed-forward on real digits."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_digits(folder / "data")
    for suffix in ("GKAN", "KAN", "ViT"):
        assert run(*QUICK, "--model", f"vit_nano_patch8_32_{suffix}", "--data-path", data, "--epochs", 2, "--lr", 0.01,
                   "--unscale-lr", "--output_dir", folder / suffix) == 0
    return folder


@pytest.fixture(autouse=True)
def two_images(monkeypatch):
    """Two are enough: six show nothing more of the attention."""
    monkeypatch.setattr(inspect_kan, "SHOWN", 2)


def inspected(*argv) -> int:
    return inspect_kan.main([*map(str, argv), "--device", "cpu"])


class Page(HTMLParser):
    """What a browser would find in the report: tags, text, sources of pictures, rows of cells."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags, self.text, self.pictures, self.rows, self.columns, self.open = [], "", [], [], 0, []
        self.feed(file.read_text())
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.pictures.append(dict(attributes))
        assert {name for name, _ in attributes} <= {"lang", "charset", "class", "alt", "src"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if "style" not in self.open:
            self.text += data

    def png(self, number: int) -> bytes:
        head, _, content = self.pictures[number]["src"].partition(",")
        assert head == "data:image/png;base64"
        return base64.b64decode(content)


def colours(content: bytes) -> int:
    return len(Image.open(io.BytesIO(content)).convert("RGB").getcolors(1 << 24))


# ---------------------------------------------------------------- the report
@pytest.mark.slow
def test_a_group_kan_on_its_data(places, tmp_path, capsys):
    file, data = places / "GKAN/checkpoint.pth", places / "data"
    assert inspected(file, "--data-path", data, "--output", tmp_path / "deep/out") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "deep/out/report.html")
    page = Page(tmp_path / "deep/out/report.html")
    # complete in one file: pictures are in it, and the same lie beside it
    assert "script" not in page.tags and "link" not in page.tags and "http" not in (tmp_path / "deep/out/report.html").read_text()
    names = ["functions.png", *(f"attention_{n}.png" for n in range(1, 3))]
    assert [picture["alt"] for picture in page.pictures] == names
    for number, name in enumerate(names):
        assert page.png(number) == (tmp_path / "deep/out" / name).read_bytes() and colours(page.png(number)) > 100
    assert sorted(path.name for path in (tmp_path / "deep/out").iterdir()) == sorted([*names, "report.html"])
    # the numbers are those of the model on the validation images
    trained = load_trained(str(file), device="cpu", flags=["--data-path", str(data)])
    found = collect_inputs(trained.model, [torch.cat([images for images, _ in loaders_of(trained).val])])
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["measured on"] == ["24 images"] and rows["epochs done"] == ["2"] and rows["model"] == ["vit_nano_patch8_32_GKAN"]
    assert rows["parameters"] == [f"{sum(p.numel() for p in trained.model.parameters()):,}"]
    for block in range(4):
        assert rows[f"blocks.{block}"] == [f"{found.outputs[f'blocks.{block}{part}']:.3g}" for part in (".attn", ".mlp", "")]
    for name, layer in function_layers(trained.model).items():
        measured = measure(layer, found.inputs[name])
        assert rows[name][:2] == ["8", "8 on [-3, 3]"] and rows[name][4] == f"{measured.off_grid:.1%}"
        assert float(rows[name][5]) == pytest.approx(measured.distance, rel=0.01) and float(rows[name][5]) > 0
        assert rows[name][-1] == "0 of 8 groups"


@pytest.mark.slow
def test_the_same_twice(places, tmp_path):
    for name in ("a", "b"):
        assert inspected(places / "KAN/checkpoint.pth", "--data-path", places / "data", *ONE, "--output", tmp_path / name) == 0
    assert (tmp_path / "a/report.html").read_bytes() == (tmp_path / "b/report.html").read_bytes()


@pytest.mark.slow
def test_images_that_are_named(places, tmp_path):
    """They are accepted and measured."""
    images = sorted((places / "data/val/digit1").iterdir())[:2]
    assert inspected(places / "KAN/checkpoint.pth", *images, *ONE, "--output", tmp_path) == 0
    page = Page(tmp_path / "report.html")
    rows = {row[0]: row for row in page.rows}
    assert rows["measured on"][1] == "2 images" and len(page.pictures) == 3
    assert [name for name in rows if name.startswith("blocks.0.")] == ["blocks.0.mlp.layers.0", "blocks.0.mlp.layers.1"]
    assert rows["blocks.0.mlp.layers.0"][1:3] == ["4,608", "8 on [-2, 2]"]
    assert rows["blocks.0.mlp.layers.0"][-1].endswith("96 inputs")
    # with a data set beside them, they are only looked at
    assert inspected(places / "KAN/checkpoint.pth", *images, "--data-path", places / "data", *ONE, "--output", tmp_path) == 0
    page = Page(tmp_path / "report.html")
    assert ["measured on", "24 images"] in page.rows and len(page.pictures) == 3


@pytest.mark.slow
def test_without_any_image(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.pth").write_bytes((places / "GKAN/checkpoint.pth").read_bytes())
    assert inspected("c.pth", *ONE) == 0
    page = Page(tmp_path / "c_inspect/report.html")
    assert [picture["alt"] for picture in page.pictures] == ["functions.png"]
    assert page.text.count("no images were given") == 2 and "no image was given: name some" in page.text
    assert default_output("https://a.b/c/deit.pth?x=1", "_inspect") == Path("deit_inspect")


@pytest.mark.slow
def test_before_and_after(places, tmp_path, monkeypatch):
    """One epoch earlier beside the last: pictures of the same scale, both tables."""
    heights = []
    real = inspect_kan.share_limits

    def share(a, b):
        real(a, b)
        heights.append([{axes.get_label(): (axes.get_xlim(), axes.get_ylim()) for axes in figure.axes if axes.get_label()}
                        for figure in (a, b)])

    monkeypatch.setattr(inspect_kan, "share_limits", share)
    before, after = places / "GKAN/checkpoint_previous.pth", places / "GKAN/checkpoint.pth"
    assert inspected(before, "--compare", after, "--data-path", places / "data", *ONE, "--output", tmp_path) == 0
    page = Page(tmp_path / "report.html")
    assert [row[1] for row in page.rows if row[0] == "epochs done"] == ["1", "2"]
    distances = [float(row[6]) for row in page.rows if row[0] == "blocks.0.mlp.phi2"]
    assert len(distances) == 2 and 0 < distances[0] < distances[1]
    names = [picture["alt"] for picture in page.pictures]
    assert names[:2] == ["functions.png", "other_functions.png"] and len(names) == 2 + 2 * 2
    assert page.png(0) != page.png(1)
    [(ours, theirs)] = heights
    assert ours == theirs and list(ours) == ["blocks.0.mlp.phi1", "blocks.0.mlp.phi2"]


@pytest.mark.slow
def test_a_kan_beside_its_mlp_twin(places, tmp_path):
    assert inspected(places / "ViT/checkpoint.pth", "--compare", places / "KAN/checkpoint.pth", "--data-path", places / "data",
                     "--output", tmp_path) == 0
    page = Page(tmp_path / "report.html")
    assert "vit_nano_patch8_32_ViT has no learned functions" in page.text
    assert [picture["alt"] for picture in page.pictures][0] == "other_functions.png" and len(page.pictures) == 5
    assert len([row for row in page.rows if re.fullmatch(r"blocks\.\d", row[0])]) == 8
    assert len([row for row in page.rows if row[0].endswith(".layers.1")]) == 4


@pytest.mark.slow
def test_the_moving_average(places, tmp_path):
    for weights in ("model", "model_ema"):
        assert inspected(places / "GKAN/checkpoint.pth", "--weights", weights, *ONE, "--output", tmp_path / weights) == 0
    assert (tmp_path / "model/functions.png").read_bytes() != (tmp_path / "model_ema/functions.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name, size, words, pictures", [
    ("vit_tiny_patch16_224", 224, "no learned functions", 1), ("resnet10t", 176, "no attention", 0)])
def test_models_of_timms(places, tmp_path, name, size, words, pictures):
    torch.manual_seed(0)
    torch.save({"model": timm.create_model(name, num_classes=3).state_dict(), "args": {"model": name}}, tmp_path / "m.pth")
    image = next((places / "data/val/digit0").iterdir())
    assert inspected(tmp_path / "m.pth", image, "--output", tmp_path / "out") == 0
    page = Page(tmp_path / "out/report.html")
    assert words in page.text and len(page.pictures) == pictures


@needs_released
def test_a_file_of_the_original_code(places, tmp_path, capsys):
    image = next((places / "data/val/digit0").iterdir())
    assert inspected(RELEASED, image, "--layer", "blocks.11", "--output", tmp_path) == 0
    page = Page(tmp_path / "report.html")
    rows = {row[0]: row for row in page.rows}
    assert rows["blocks.11.mlp.layers.0"][1:3] == ["3,840", "8 on [-2, 2]"] and len(page.pictures) == 2
    share = float(rows["blocks.11.mlp.layers.0"][5].rstrip("%"))
    assert 2 < share < 12       # a standard normal has 4.6% beyond
    assert ("fall off its grid" in capsys.readouterr().err) == ("fall off its grid" in page.text)


# ---------------------------------------------------------------- mistakes, and what strangers write
def test_the_widest_table_fits_a_page_of_1500_pixels():
    """The layers' table with longer words than a full-edge KAN of 12 blocks has, in the widest of the usual fonts."""
    layer = LayerStats(functions=2_359_296, low=-2, high=2, points=16, mean=-12.34, std=12.34, smallest=-123.45,
                                largest=123.45, p5=-12.34, p95=12.34, off_grid=0.1234, distance=0.000123, furthest=0.000123,
                                units="inputs", gain=torch.tensor([1.2e-05] * 3072))
    rows = inspect_kan.layers_table(SimpleNamespace(measured={"blocks.11.mlp.layers.0": layer}))
    assert f"-123.45, -12.34, 12.34, 123.45 {'12.3%'} 0.000123" in " ".join(rows[1]) and rows[1][-1] == "3072 of 3072 inputs"
    style = (ROOT / "tools/report.html.jinja").read_text()
    size = int(re.search(r"^table \{.*font-size: (\d+)px", style, re.MULTILINE)[1])
    padding = float(re.search(r"^td, th \{.*padding: \S+ ([.\d]+)em", style, re.MULTILINE)[1])
    font = FontProperties(family="DejaVu Sans", size=size)

    def width(words: str) -> float:
        return TextPath((0, 0), words, prop=font).get_extents().width + 2 * padding * size + 2

    head, cells = rows      # a head may break between words
    total = sum(max(width(cell), *(width(word) for word in title.split())) for title, cell in zip(head, cells))
    page = int(re.search(r"max-width: (\d+)px", style)[1])
    assert 900 < total < page < 1500
    assert '<div class="pair wide">' in inspect_kan.page([NOTHING, NOTHING], [{}, {}])      # two tables, one above the other


# A model without learned functions, and no image.
NOTHING = inspect_kan.Findings(
    SimpleNamespace(path="a.pth", spec=SimpleNamespace(name="vit", kwargs={}), about={}, results={}, model=torch.nn.Linear(1, 1)),
    ActivationStats({}), {}, None, [], "none")


def test_names_are_escaped(places, tmp_path):
    content = checkpoint(places / "GKAN")
    content["class_names"] = ["<script>alert(1)</script>", "a$b_{", "ä\\frac"]
    torch.save(content, tmp_path / "<b>&\"'.pth")
    image = tmp_path / "<i>$\n\udcff.png"
    image.write_bytes(next((places / "data/val/digit0").iterdir()).read_bytes())
    assert inspected(tmp_path / "<b>&\"'.pth", image, *ONE, "--output", tmp_path / "out") == 0
    page = Page(tmp_path / "out/report.html")
    assert "<b>&\"'.pth" in page.text and not {"b", "i", "script"} & set(page.tags)


def test_unreadable_images_are_left_out(places, tmp_path, capfd):
    (tmp_path / "broken.png").write_bytes(b"no image")
    image = next((places / "data/val/digit0").iterdir())
    assert inspected(places / "GKAN/checkpoint.pth", image, tmp_path / "broken.png", *ONE, "--output", tmp_path / "out") == 0
    assert "broken.png" in capfd.readouterr().err and ["measured on", "1 images"] in Page(tmp_path / "out/report.html").rows


@pytest.mark.parametrize("words, sentence", every(3, [
    (["nowhere.pth"], "does not exist"), (["CHECKPOINT", "nowhere.png"], "nowhere.png does not exist"),
    (["CHECKPOINT", "--layer", "blocks.9"], "--layer blocks.9"), (["MLP", "--layer", "blocks.0"], "no learned functions"),
    (["CHECKPOINT", "--samples", "0"], "--samples 0"), (["CHECKPOINT", "--compar", "x"], "did you mean --compare"),
    (["CHECKPOINT", "BROKEN"], "none of the 1 images"), (["CHECKPOINT", "--compare", "BROKEN"], "cannot be read"),
    (["CHECKPOINT", "--output", "BROKEN", *ONE], "cannot be written"), (["CHECKPOINT", "--weights", "best"], "model_ema"),
    (["CHECKPOINT", "--data-path", "nowhere"], "nowhere"), (["CHECKPOINT", "--data-set", "NONE"], "--data-set"),
    ([], "CHECKPOINT")]))
def test_mistakes(words, sentence, places, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    named = {"CHECKPOINT": places / "GKAN/checkpoint.pth", "MLP": places / "ViT/checkpoint.pth",
             "BROKEN": tmp_path / "broken.png"}
    assert inspect_kan.main([str(named.get(word, word)) for word in words]) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err and err.splitlines()[-1].startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]
