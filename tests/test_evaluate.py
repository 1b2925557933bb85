"""tools/evaluate.py: the figures of `main.py --eval`, and the rest against sums by hand."""
import csv
import json
import os
import sys
from argparse import Namespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch
from e2e import evaluation, run, write_digits
from helpers import ROOT, every
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, log_loss, precision_score, top_k_accuracy_score

from datasets import build_loaders
from tools.images import loaders_of
from vision_kan.common.process import Process
from vision_kan.config.flags import get_args_parser
from vision_kan.run.trained import load_trained

sys.path.insert(0, str(ROOT / "tools"))
import evaluate  # noqa: E402

FILES = ["classes.csv", "confusion.png", "mistakes.png", "reliability.png", "report.json"]


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A model that is right for most of ten digits: random features, a head fitted to them. One image is broken."""
    folder = tmp_path_factory.mktemp("run")
    data = write_digits(folder / "data", train=40, val=12, classes=10)
    torch.manual_seed(0)
    model = timm.create_model("vit_nano_patch8_32_GKAN", num_classes=10).eval()
    args = get_args_parser().parse_args(["--data-path", str(data), "--data-set", "FOLDER", "--input-size", "32", "--eval",
                                         "--num_workers", "0"])
    images, targets = map(torch.cat, zip(*build_loaders(Namespace(**{**vars(args), "data_path": half(data)}), Process()).val))
    with torch.inference_mode():
        features = model.forward_head(model.forward_features(images), pre_logits=True).numpy()
    fitted = LogisticRegression(C=100, max_iter=3000, tol=0.01).fit(features, targets)
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(fitted.coef_))
        model.head.bias.copy_(torch.from_numpy(fitted.intercept_))
    (folder / "run").mkdir()
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        torch.save({"model": model.state_dict(), "args": {"data_set": "FOLDER"}, "class_names": [f"digit{c}" for c in range(10)],
                    "model_args": {"name": "vit_nano_patch8_32_GKAN", "kwargs": {"num_classes": 10, "img_size": 32}}},
                   folder / "run" / name)
    broken = sorted((data / "val/digit3").iterdir())[2]
    broken.write_bytes(b"no image")
    return folder / "run", data, broken


def half(data):
    """The images to train on where those to evaluate on are expected."""
    place = data.parent / "training"
    place.mkdir()
    (place / "val").symlink_to(data / "train", target_is_directory=True)
    return str(place)


@pytest.fixture(scope="module")
def report(trained_run):
    folder, data, _ = trained_run
    assert evaluate.main([str(folder / "checkpoint.pth"), "--data-path", str(data), "--device", "cpu", "--num_workers", "0",
                          "--max-unreadable", "0.1", "--batch-size", "16", "--output", str(folder / "report")]) == 0
    return json.loads((folder / "report/report.json").read_text())


@pytest.fixture(scope="module")
def outputs(trained_run):
    """Logits float32 [N, 10], targets and files of all readable images, one by one."""
    folder, data, broken = trained_run
    trained = load_trained(str(folder / "checkpoint.pth"), device="cpu", flags=["--data-path", str(data), "--num_workers", "0"])
    images = loaders_of(trained).val.dataset
    rows = [(trained.model(image[None])[0], target, images.images.name(i)) for i, (image, target) in
            ((i, images[i]) for i in range(len(images))) if target >= 0]
    assert len(rows) == 119
    logits, targets, files = zip(*rows)
    return torch.stack(logits), np.array(targets), list(files)


# ---------------------------------------------------------------- the figures
@pytest.mark.slow
def test_the_figures_of_main(trained_run, report, capsys):
    folder, data, _ = trained_run
    capsys.readouterr()
    words = ["--data-path", data, "--device", "cpu", "--num_workers", 0, "--max-unreadable", 0.1]
    assert run("--eval", "--resume", folder / "checkpoint.pth", *words) == 0
    theirs = evaluation(capsys.readouterr().out)["model"]
    assert theirs == (f"{report['acc1']:.2f}", f"{report['acc5']:.2f}", report["images"]) and report["unreadable"] == 1
    assert 40 < report["acc1"] < 100       # else the rest is tested on nothing


@pytest.mark.slow
def test_against_scikit_learn(report, outputs):
    logits, targets, _ = outputs
    probabilities = logits.double().softmax(1).numpy()
    predicted = probabilities.argmax(1)
    assert report["loss"] == pytest.approx(log_loss(targets, probabilities), rel=1e-5)
    assert report["acc1"] == pytest.approx(100 * (predicted == targets).mean())
    assert report["acc5"] == pytest.approx(100 * top_k_accuracy_score(targets, probabilities, k=5))
    matrix = confusion_matrix(targets, predicted)
    told = np.diag([round(row["top1"] * row["images"] / 100) for row in report["classes"]])
    for pair in report["confusions"]:
        told[pair["class"], pair["taken_for"]] = pair["images"]
    assert np.array_equal(told, matrix)
    assert [pair["images"] for pair in report["confusions"]] == sorted(matrix[~np.eye(10, dtype=bool)][
        matrix[~np.eye(10, dtype=bool)] > 0], reverse=True)
    precision = precision_score(targets, predicted, average=None, zero_division=0)
    for c, row in enumerate(report["classes"]):
        assert row["name"] == f"digit{c}" and row["images"] == (11 if c == 3 else 12)
        among = [c in p.argsort()[-5:] for p in probabilities[targets == c]]
        assert row["top5"] == pytest.approx(100 * np.mean(among))
        assert row["precision"] is None if not row["predicted"] else row["precision"] == pytest.approx(100 * precision[c])


def test_calibration_error_by_hand(report, outputs):
    """Guo et al., equation 3, image by image."""
    logits, targets, _ = outputs
    found, n = [[] for _ in range(15)], len(targets)
    for row, target in zip(logits.double().softmax(1).tolist(), targets):
        confidence = max(row)
        m = next(m for m in range(1, 16) if (m - 1) / 15 < confidence <= m / 15)
        found[m - 1].append((confidence, row.index(confidence) == target))
    gaps = [abs(np.mean([right for _, right in b]) - np.mean([c for c, _ in b])) if b else 0 for b in found]
    calibration = report["calibration"]
    assert calibration["ece"] == pytest.approx(sum(len(b) / n * gap for b, gap in zip(found, gaps)), rel=1e-4)
    assert calibration["mce"] == pytest.approx(max(gaps), rel=1e-4)
    assert [b["images"] for b in calibration["bins"]] == list(map(len, found)) and 0.005 < calibration["ece"] < 1


def test_calibration_at_the_edges():
    """A confidence on an edge belongs to the bin below; certain and right has error 0, certain and wrong error 1."""
    def of(logits, targets):
        tally = evaluate.Tally(2)
        logits = torch.tensor(logits)
        tally.add(torch.zeros(len(logits), 3, 2, 2), logits, torch.tensor(targets), torch.ones(len(logits), dtype=torch.bool))
        return tally.calibration()

    assert of([[50., -50], [-50, 50]], [0, 1])["ece"] == 0 and of([[50., -50]], [1])["ece"] == 1
    half = of([[0., 0]], [0])
    assert half["ece"] == half["mce"] == 0.5 and half["bins"][7]["images"] == 1
    edge = of([[np.log(2), 0.]], [0])       # 2/3 = 10/15
    assert edge["bins"][9]["images"] + edge["bins"][10]["images"] == 1


def test_the_worst_mistakes(report, outputs):
    logits, targets, files = outputs
    confidence, predicted = logits.double().softmax(1).max(1)
    wrong = [i for i in torch.argsort(confidence, descending=True, stable=True).tolist() if predicted[i] != targets[i]]
    assert len(wrong) > 3
    found = report["mistakes"]
    assert [m["image"] for m in found] == [files[i] for i in wrong[:evaluate.MISTAKES]]
    assert [(m["class"], m["taken_for"]) for m in found] == [(targets[i], predicted[i]) for i in wrong[:evaluate.MISTAKES]]
    assert found[0]["name"] == f"digit{found[0]['class']}"
    assert found[0]["confidence"] == pytest.approx(confidence[wrong[0]].item())


def test_batches_make_no_difference(outputs):
    """Nor unreadable images between; what is kept does not grow."""
    logits, targets, _ = outputs
    targets = torch.from_numpy(targets)

    def tally(size, gap):
        result = evaluate.Tally(10)
        for some, part in zip(logits.split(size), targets.split(size)):
            readable = torch.ones(len(part) + gap, dtype=torch.bool)
            readable[:gap] = False
            result.add(torch.zeros(len(part), 3, 4, 4), some, part, readable)
        return result

    one, other = tally(119, 0), tally(7, 0)
    assert np.array_equal(one.confusion, other.confusion) and np.allclose(one.bins, other.bins, rtol=1e-12)
    assert [m.index for m in one.worst] == [m.index for m in other.worst]
    assert [m.index for m in tally(119, 5).worst] == [m.index + 5 for m in one.worst]
    many = evaluate.Tally(10)
    for _ in range(30):
        many.add(torch.zeros(119, 3, 4, 4), logits, (targets + 1) % 10, torch.ones(119, dtype=torch.bool))
    assert len(many.mistakes) == evaluate.MISTAKES and many.seen == 30 * 119


# ---------------------------------------------------------------- files
def test_the_files(trained_run, report):
    folder, data, _ = trained_run
    assert sorted(os.listdir(folder / "report")) == FILES
    with open(folder / "report/classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in rows] == pytest.approx([row["top1"] for row in report["classes"]])
    for name in FILES:
        if name.endswith(".png"):
            pixels = np.asarray(Image.open(folder / "report" / name).convert("L"))
            assert min(pixels.shape) > 300 and len(np.unique(pixels)) > 20
    assert report["model"] == "vit_nano_patch8_32_GKAN" and report["data_path"] == str(data) and report["versions"]["torch"]


@pytest.mark.slow
def test_the_default_place(trained_run, capsys):
    folder, data, broken = trained_run
    words = [str(folder / "best_checkpoint.pth"), "--data-path", str(data), "--device", "cpu", "--num_workers", "0"]
    assert evaluate.main(words) == 0        # one of 120 is below the limit
    out = capsys.readouterr().out
    assert sorted(os.listdir(folder / "best_checkpoint_evaluation")) == FILES
    for text in ("1 images could not be read", "model: top-1", "expected calibration error", "hardest classes: digit",
                 "most frequent confusions: digit"):
        assert text in out
    assert str(evaluate.default_folder("https://host/a/b-12.pth", "model_ema")) == "b-12_evaluation_ema"


def test_mistakes_of_the_user(trained_run, tmp_path, capsys):
    folder, data, _ = trained_run
    file = str(folder / "checkpoint.pth")
    for words, sentence in (([file], "--data-path is not given"),
                            ([file, "--data-path", str(tmp_path / "none")], "none is not a"),
                            ([file, "--data-path", str(data), "--max-unreadable", "0"], "more than --max-unreadable"),
                            ([file, "--data-path", str(data), "--weights", "model_ema"], "no model_ema"),
                            ([file, "--data-path", str(data), "--outptu", "x"], "--outptu"),
                            (["http://[x"], "CHECKPOINT http://[x cannot be a path"),
                            (["~nouser/c.pth"], "CHECKPOINT ~nouser/c.pth cannot be a path"),
                            ([file, "--data-path", str(data), "--output", "/proc/x"], "cannot be written")):
        output = [] if "--output" in words else ["--output", str(tmp_path / "out")]
        assert evaluate.main([*words, "--device", "cpu", "--num_workers", "0", *output]) == 2
        err = capsys.readouterr().err
        assert sentence in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- pictures
def random_tally(classes, images=2000):
    generator = torch.Generator().manual_seed(classes)
    tally = evaluate.Tally(classes)
    targets = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), targets] += 4
    tally.add(torch.zeros(images, 3, 8, 8), logits, targets, torch.ones(images, dtype=torch.bool))
    return tally


@pytest.mark.parametrize("classes, cells, labels", every(5, [
    (101, 51, 26), (2, 2, 2), (10, 10, 10), (41, 41, 21), (1000, 100, 34)]))
def test_every_number_of_classes_has_a_readable_matrix(classes, cells, labels, tmp_path):
    tally = random_tally(classes)
    with plt.rc_context({"text.parse_math": False}):
        figure = evaluate.draw_confusion(tally, [f"$class_{c}$ of a long name" for c in range(classes)])
        axes = figure.axes[0]
        shown = axes.images[0].get_array()
        assert shown.shape == (cells, cells) and len(axes.get_yticks()) == labels == len(axes.get_xticks())
        evaluate.save(figure, tmp_path / "c.png")
    if classes <= evaluate.LABELLED:
        assert {int(text.get_text()) for text in axes.texts} == set(tally.confusion[tally.confusion > 0].tolist())
        assert np.allclose(shown.sum(1), 1)
    else:       # the mistakes of a block by the block's images
        wrong = 1 - tally.confusion.diagonal().sum() / tally.confusion.sum()
        size = -(-classes // evaluate.BLOCKS)
        weights = np.add.reduceat(tally.confusion.sum(1), range(0, classes, size))
        assert (shown.sum(1) * weights).sum() / weights.sum() == pytest.approx(wrong)
    assert max(Image.open(tmp_path / "c.png").size) < 2500


def test_empty_bins_have_no_bar():
    """Bars of accuracy, gap and share stand where there are images, and nothing is drawn anywhere else."""
    tally = evaluate.Tally(2)
    logits = torch.tensor([[0.5, 0], [0.6, 0], [9., 0]])        # confidences 0.622 and 0.646 (one bin), 0.9999
    tally.add(torch.zeros(3, 3, 2, 2), logits, torch.tensor([0, 1, 0]), torch.ones(3, dtype=torch.bool))
    figure = evaluate.draw_reliability(tally.calibration())
    above, below = figure.axes
    plt.close(figure)
    accuracy, gap, share = *above.containers, *below.containers
    for bars in (accuracy, gap, share):
        assert [bar.get_x() for bar in bars] == pytest.approx([9 / 15, 14 / 15])
    assert [bar.get_height() for bar in accuracy] == [0.5, 1]
    assert [bar.get_height() for bar in share] == pytest.approx([200 / 3, 100 / 3])
    assert gap[0].get_y() == 0.5 and gap[0].get_y() + gap[0].get_height() == pytest.approx((0.6225 + 0.6457) / 2, abs=1e-3)
    assert len(above.patches) == 4 and len(above.lines) == 1


def test_pictures_of_little(tmp_path):
    """No mistake; class without an image; names in a script that the font does not have."""
    tally = evaluate.Tally(3)
    tally.add(torch.zeros(2, 3, 8, 8), torch.tensor([[9., 0, 0], [0, 9, 0]]), torch.tensor([0, 1]), torch.tensor([True, True]))
    assert tally.per_class(["a", "b", "c"])[2]["top1"] is None and tally.confusions() == []
    for draw in (lambda: evaluate.draw_confusion(tally, ["猫", "b", "c"]),
                 lambda: evaluate.draw_mistakes(tally.worst, [], get_args_parser().parse_args([])),
                 lambda: evaluate.draw_reliability(tally.calibration())):
        evaluate.save(draw(), tmp_path / "p.png")
        assert os.listdir(tmp_path) == ["p.png"]
