"""Data under the names of timm.data.create_dataset: local data of each kind, read as the folder it was made from."""
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from e2e import QUICK, checkpoint, evaluation, launch, log, refusal, run, write_digits
from helpers import ROOT, differences, every, sentence
from PIL import Image
from torchvision import datasets as torchvision_datasets

import datasets as ours
from datasets import build_loaders
from vision_kan.common.errors import UserError
from vision_kan.common.process import Process
from vision_kan.config.flags import get_args_parser
from vision_kan.data.hub import huggingface_datasets, package_spec
from vision_kan.data.known import _digits_file
from vision_kan.data.streams import HuggingFaceStream, WebDataset
from vision_kan.data.workers import batches

STREAM = ("hfids", "wds")


def make_args(data_set, data_path="", **changes):
    args = get_args_parser().parse_args([])
    vars(args).update({"data_set": str(data_set), "data_path": str(data_path), "input_size": 32, "batch_size": 8,
                       "num_workers": 0, "repeated_aug": False, **changes})
    return args


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "folder")


def files_of(folder, half):
    """(file, class) of each image, mixed as the shards of a well-made data set are."""
    files = [(path, int(path.parent.name[-1])) for path in sorted((folder / half).rglob("*.png"))]
    random.Random(0).shuffle(files)
    return files


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Hugging Face's package, without the hub and with a cache of its own."""
    if package_spec("datasets") is None:
        pytest.skip("needs pip install datasets")
    datasets = huggingface_datasets()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)      # it waits at the end of a shuffled stream
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        datasets.disable_progress_bars()
        yield datasets


def table(datasets, files, names=("zero", "one", "two")):
    """A data set with the bytes of each file in it."""
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    return datasets.Dataset.from_dict({"picture": [{"bytes": file.read_bytes(), "path": file.name} for file, _ in files],
                                       "label": [c for _, c in files], "number": list(range(len(files)))},
                                      datasets.Features({"picture": datasets.Image(), "label": label,
                                                         "number": datasets.Value("int64")}))


@pytest.fixture(scope="module")
def parquet(hub, folder):
    for half, name in (("train", "train"), ("val", "validation")):
        for shard in range(2):
            place = folder.parent / "parquet" / f"{name}-{shard}.parquet"
            place.parent.mkdir(exist_ok=True)
            table(hub, files_of(folder, half)[shard::2]).to_parquet(place)
    return folder.parent / "parquet"


def write_shards(place, files, half, shards=3):
    place.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(place / f"{half}-{shard}.tar", "w") as tar:
            for file, c in files[shard::shards]:
                for name, content in ((f"{file.stem}.png", file.read_bytes()), (f"{file.stem}.cls", str(c).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(folder):
    pytest.importorskip("webdataset", reason="needs pip install webdataset")
    for half in ("train", "val"):
        write_shards(folder.parent / "wds", files_of(folder, half), half)
    return folder.parent / "wds"


WDS_SPLIT = ["train-{0..2}.tar|48", "val-{0..2}.tar|24"]
HFIDS_SPLIT = ["train|48", "validation|24"]


@pytest.fixture(params=every(4, ["wds", "torch", "hfids", "hfds"]))
def flags(request, folder):
    """--data-set and what else is needed to read the folder's images in each way."""
    if request.param == "torch":
        return ["--data-set", "torch/image_folder", "--data-path", folder]
    if request.param == "wds":
        return ["--data-set", "wds/digits", "--data-path", request.getfixturevalue("shards"), "--data-split", *WDS_SPLIT,
                "--num-classes", 3]
    place = request.getfixturevalue("parquet")
    return ["--data-set", f"{request.param}/{place}", *(["--data-split", *HFIDS_SPLIT] if request.param == "hfids" else [])]


def content(loader):
    """{bytes of the image: target} of a loader that does not change images."""
    return {image.numpy().tobytes(): int(target) for images, targets in loader for image, target in zip(images, targets)}


STILL = {"aa": "none", "reprob": 0.0, "hflip": 0.0, "color_jitter": 0.0, "crop_padding": 0}


def loaders_of(flags, **changes):
    parsed = get_args_parser().parse_args([str(word) for word in flags])
    vars(parsed).update({**STILL, "input_size": 32, "batch_size": 8, "num_workers": 0, "repeated_aug": False, **changes})
    return build_loaders(parsed, Process())


# ---------------------------------------------------------------- what all kinds have in common
@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_is_evaluated_once_and_trained_on_as_from_the_folder(flags, folder, workers, capsys):
    loaders = loaders_of(flags, num_workers=workers)
    plain = loaders_of(["--data-set", "FOLDER", "--data-path", folder])
    assert loaders.nb_classes == 3 and len(loaders.train) == 6
    assert sum(len(targets) for _, targets in loaders.val) == 24 and content(loaders.val) == content(plain.val)
    loaders.train_sampler.set_epoch(0)
    drawn = [(images, targets) for images, targets in loaders.train]
    whole = content(plain.train)
    assert len(whole) == 48 and content(drawn).items() <= whole.items()
    if loaders.data_set.partition("/")[0] in STREAM:
        assert "read as a stream" in capsys.readouterr().err
        assert len(content(drawn)) >= 40       # with three shards and two workers not all
    else:
        assert content(drawn) == whole


@pytest.mark.slow
def test_a_run_is_resumed_and_evaluated(flags, tmp_path, capfd):
    """Between epochs exactly so, also where it is a stream; the checkpoint knows the data and the classes."""
    words = [*QUICK, *flags]
    assert run(*words, "--epochs", 2, "--output_dir", tmp_path / "whole") == 0
    assert run(*words, "--epochs", 1, "--output_dir", tmp_path / "half") == 0
    assert run("--resume", "auto", "--epochs", 2, "--output_dir", tmp_path / "half", "--device", "cpu", "--num_workers", 0,
               *(["--data-path", flags[3]] if "--data-path" in flags else [])) == 0
    one, other = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "half")
    assert not differences(one["model"], other["model"]) and log(tmp_path / "whole") == log(tmp_path / "half")
    assert one["class_names"] == {"torch": ["digit0", "digit1", "digit2"], "wds": ["0", "1", "2"]}.get(
        str(flags[1]).partition("/")[0], ["zero", "one", "two"])
    capfd.readouterr()
    assert run("--eval", "--resume", tmp_path / "whole/checkpoint.pth", "--device", "cpu", "--num_workers", 0,
               *(["--data-path", flags[3]] if "--data-path" in flags else [])) == 0
    top1, _, images = evaluation(capfd.readouterr().out)["model"]
    assert (float(top1), images) == (pytest.approx(log(tmp_path / "whole")[-1]["test_acc1"], abs=0.005), 24)


# ---------------------------------------------------------------- torch/
def test_torchvisions_arrays(tmp_path):
    """MNIST in its own files, made of digits."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    images, targets = _digits_file()
    large = np.kron(images[:30].astype(np.uint8) * 15, np.ones((4, 4), np.uint8))[:, 2:30, 2:30]
    for half in ("train", "t10k"):
        for kind, array in (("images-idx3", large), ("labels-idx1", targets[:30].astype(np.uint8))):
            head = (0x0800 + array.ndim).to_bytes(4) + b"".join(n.to_bytes(4) for n in array.shape)
            (raw / f"{half}-{kind}-ubyte").write_bytes(head + array.tobytes())
    loaders = build_loaders(make_args("torch/mnist", tmp_path), Process())
    data = loaders.val.dataset
    assert loaders.class_names[3] == "3 - three" and data.targets.tolist() == targets[:30].tolist()
    assert np.array_equal(np.asarray(data.images.load(4))[..., 1], large[4])
    with pytest.raises(UserError, match="torch/cifar10 cannot be opened .*--data-path"):
        build_loaders(make_args("torch/cifar10", tmp_path), Process())
    with pytest.raises(UserError, match="torch/nothing cannot be opened .*Unknown"):
        build_loaders(make_args("torch/nothing", tmp_path), Process())


def test_torchvisions_inaturalist(tmp_path, folder):
    for half in ("2021_train", "2021_valid"):
        for number, species in enumerate(("Plantae_B_C_D_E_F_fern", "Animalia_B_C_D_E_F_newt")):
            place = tmp_path / half / f"{number:05d}_{species}"
            place.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32), (i, i, i)).save(place / f"{i}.jpg")
    (tmp_path / "2021_valid/00001_Animalia_B_C_D_E_F_newt/3.jpg").unlink()
    loaders = build_loaders(make_args("torch/inaturalist", tmp_path), Process())
    assert loaders.nb_classes == 2 and [t for _, ts in loaders.val for t in ts.tolist()] == [0] * 4 + [1] * 3


def test_one_folder_is_not_evaluated_on_what_it_is_trained_on(folder):
    """timm takes the whole of it for both."""
    with pytest.raises(UserError, match="no validation images of its own.*--val-split"):
        build_loaders(make_args("torch/image_folder", folder / "train"), Process())
    loaders = build_loaders(make_args("torch/image_folder", folder / "train", val_split=0.25), Process())
    train, val = ({data.images.name(i) for i in range(len(data))} for data in (loaders.train.dataset, loaders.val.dataset))
    assert (len(train), len(val)) == (36, 12) and not train & val


# ---------------------------------------------------------------- hfds/
def test_saved_to_disk_without_a_validation_part(hub, folder, tmp_path, capsys):
    table(hub, files_of(folder, "train")).save_to_disk(tmp_path / "saved")
    words = [*QUICK, "--data-set", f"hfds/{tmp_path}/saved"]
    assert "--val-split 0.2" in refusal(capsys, *words)
    assert run(*words, "--epochs", 1, "--val-split", 0.25, "--output_dir", tmp_path / "run") == 0
    assert "36 images to train on, 12 held out (--val-split 0.25, --seed 0)" in capsys.readouterr().out
    assert run("--eval", "--resume", tmp_path / "run/checkpoint.pth", "--device", "cpu", "--num_workers", 0) == 0
    assert evaluation(capsys.readouterr().out)["model"][2] == 12


def test_a_folder_of_images_through_hugging_face(hub, folder):
    loaders = build_loaders(make_args(f"hfds/{folder}", data_split=["train", "validation"]), Process())
    assert loaders.class_names == ["digit0", "digit1", "digit2"]
    assert content(loaders.val) == content(loaders_of(["--data-set", "FOLDER", "--data-path", folder]).val)


def test_columns(hub, folder, tmp_path):
    data = table(hub, files_of(folder, "val"), names=None)
    data.to_parquet(tmp_path / "plain/train.parquet")
    name, half = f"hfds/{tmp_path}/plain", ["train", "train"]
    for changes, words in (({}, "0 columns of the kind ClassLabel among picture, label, number: .*--target-key"),
                           ({"target_key": "x"}, "--target-key x: .*no such column but picture"),
                           ({"target_key": "label"}, "does not declare its classes: give --num-classes"),
                           ({"target_key": "label", "num_classes": 2}, "images of no class"),
                           ({"target_key": "picture", "num_classes": 3}, "not whole numbers.*class_encode_column"),
                           ({"target_key": "label", "num_classes": 3, "data_split": ["train", "test"]},
                            "no part 'test' but train")):
        with pytest.raises(UserError, match=words):
            build_loaders(make_args(name, **{"data_split": half, **changes}), Process())
    loaders = build_loaders(make_args(name, data_split=half, target_key="label", num_classes=4), Process())
    assert (loaders.nb_classes, loaders.class_names) == (4, ["0", "1", "2", "3"])
    with pytest.raises(UserError, match="cannot be opened .*the connection"):
        build_loaders(make_args("hfds/nobody/nothing"), Process())


def test_no_script_is_run(hub, tmp_path):
    """A data set that brings a loading script is refused."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be opened"):
        build_loaders(make_args(f"hfds/{tmp_path}/evil"), Process())
    assert not (tmp_path / "ran").exists()


# Loader processes that are started anew, each of which reads what the process that started it reads.
STARTED = """
import multiprocessing, sys
import torch
sys.path.insert(0, sys.argv[1])
from datasets import build_loaders
from vision_kan.common.process import Process
from vision_kan.config.flags import get_args_parser

def batch_of(words, workers):
    args = get_args_parser().parse_args([*words, "--input-size", "32", "--batch-size", "4", "--no-repeated-aug",
                                         "--num_workers", str(workers)])
    loaders = build_loaders(args, Process())
    loaders.train_sampler.set_epoch(0)
    return [*next(iter(loaders.train)), *next(iter(loaders.val))]

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    for words in sys.argv[3:]:
        here, there = batch_of(words.split(";"), 0), batch_of(words.split(";"), 1)
        print(words, all(map(torch.equal, here, there)), len(here))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_loader_processes_that_are_started_anew(method, parquet, shards, folder, tmp_path):
    """fork is what all other tests have."""
    kinds = [["--data-set", "DIGITS"], ["--data-set", "FOLDER", "--data-path", folder],
             ["--data-set", "torch/image_folder", "--data-path", folder],
             ["--data-set", f"hfds/{parquet}"], ["--data-set", f"hfids/{parquet}", "--data-split", *HFIDS_SPLIT],
             ["--data-set", "wds/digits", "--data-path", shards, "--data-split", *WDS_SPLIT, "--num-classes", 3]]
    words = [";".join(map(str, kind)) for kind in kinds]
    script = tmp_path / "read.py"
    script.write_text(STARTED)
    done = subprocess.run([sys.executable, str(script), str(ROOT), method, *words], capture_output=True, text=True, timeout=1000,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.endswith(" 4")] == [f"{kind} True 4" for kind in words]


# ---------------------------------------------------------------- streams
def test_the_order_of_a_stream_is_the_seeds_and_the_epochs(shards):
    flags = ["--data-set", "wds/x", "--data-path", shards, "--data-split", *WDS_SPLIT, "--num-classes", 3]

    def epoch(number, position=0, **changes):
        loaders = loaders_of(flags, **changes)
        loaders.train_sampler.set_epoch(number, position)
        return torch.cat([images for images, _ in loaders.train])

    assert torch.equal(epoch(0), epoch(0)) and torch.equal(epoch(1, num_workers=2), epoch(1, num_workers=2))
    assert not torch.equal(epoch(0), epoch(1)) and not torch.equal(epoch(0), epoch(0, seed=1))
    assert not torch.equal(epoch(0)[:8], epoch(0, position=8)[:8])      # else a run that is killed often sees no more than those
    loaders = loaders_of(flags)
    both = [torch.cat([images for images, _ in loaders.train]) for _ in range(2) if loaders.train_sampler.set_epoch(0) is None]
    assert torch.equal(*both)


@pytest.mark.parametrize("kind", STREAM)
def test_more_processes_than_shards_share_the_records(kind, request, folder):
    """What each part of a stream gets: together all, none twice."""
    place = request.getfixturevalue("shards" if kind == "wds" else "parquet")
    args = make_args("wds/x" if kind == "wds" else f"hfids/{place}", place if kind == "wds" else "",
                     data_split=WDS_SPLIT if kind == "wds" else HFIDS_SPLIT)
    stream = (WebDataset if kind == "wds" else HuggingFaceStream)(args, True)
    for parts in (2, 5):
        found = [[record.image["bytes"] for record in stream.records(7, part, parts)] for part in range(parts)]
        assert min(map(len, found)) >= 48 // (parts + 2)
        assert sorted(sum(found, [])) == sorted(file.read_bytes() for file, _ in files_of(folder, "train"))


@pytest.mark.slow
def test_two_processes_share_a_stream(shards, tmp_path):
    words = [*QUICK, "--batch-size", 8, "--data-set", "wds/x", "--data-path", shards, "--data-split", *WDS_SPLIT, "--num-classes",
             3, "--epochs", 1, "--dist-eval", "--output_dir", tmp_path / "run"]
    assert [process.wait() for process in launch(tmp_path, *words)] == [0, 0]
    last, out = log(tmp_path / "run")[-1], (tmp_path / "process0.out").read_text()
    assert last["test_images"] == 24 and "step 3/3" in out


@pytest.mark.parametrize("told, words, workers", [("23", "has more images than the 23 declared", 0),
                                                  ("25", "has fewer images than the 25 declared", 2)])
def test_a_wrong_length_is_noticed(shards, told, words, workers):
    loaders = loaders_of(["--data-set", "wds/x", "--data-path", shards, "--data-split", WDS_SPLIT[0], f"val-{{0..2}}.tar|{told}",
                          "--num-classes", 3], num_workers=workers)
    assert words in sentence(list, batches(loaders.val))
    if workers:     # else each of them takes five seconds to end, whenever the error is collected
        loaders.val._iterator._shutdown_workers()


@pytest.mark.slow
def test_unreadable_images_of_a_stream_are_counted(folder, tmp_path, capfd):
    pytest.importorskip("webdataset", reason="needs pip install webdataset")
    for half in ("train", "val"):
        files = files_of(folder, half)
        broken = tmp_path / f"{half}_broken.png"
        broken.write_bytes(b"no image")
        write_shards(tmp_path / "wds", [*files[:7], (broken, 0), *files[7:-1]], half)
    words = [*QUICK, "--data-set", "wds/x", "--data-path", tmp_path / "wds", "--data-split", *WDS_SPLIT, "--num-classes", 3,
             "--epochs", 2]
    assert run(*words, "--output_dir", tmp_path / "run", "--num_workers", 2) == 0
    last, err = log(tmp_path / "run")[-1], capfd.readouterr().err
    assert (last["train_unreadable"], last["test_unreadable"], last["test_images"]) == (1, 1, 23)
    for half in ("train", "val"):
        named = [line for line in err.splitlines() if f"{half}_broken" in line]
        assert len(named) == 1 and f"{half}-1.tar" in named[0] and "not an image" in named[0]
    assert run("--resume", "auto", "--epochs", 3, "--output_dir", tmp_path / "run", "--data-path", tmp_path / "wds", "--device",
               "cpu", "--num_workers", 0) == 0
    assert log(tmp_path / "run")[-1]["train_unreadable"] == 1 and "train_broken" not in capfd.readouterr().err
    assert run(*words, "--strict-data") == 2
    assert "train_broken" in capfd.readouterr().err


def test_what_a_stream_refuses(shards, parquet, tmp_path):
    def refused(data_set, place, **changes):
        with pytest.raises(UserError) as error:
            args = make_args(data_set, place, **{"num_classes": 3, "data_split": WDS_SPLIT, **changes})
            list(build_loaders(args, Process()).train)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
        return str(error.value)

    assert "give --num-classes" in refused("wds/x", shards, num_classes=None)
    assert "has class 2, but classes go from 0 to 1" in refused("wds/x", shards, num_classes=2)
    assert "no repeats" in refused("wds/x", shards, resplit=True, repeated_aug=True)
    assert "does not declare its number of images" in refused("wds/x", shards, data_split=["train-0.tar", "val-0.tar"])
    assert "must be the number of images" in refused("wds/x", shards, data_split=["train-0.tar|x", "val-0.tar"])
    assert "train-9.tar is not a local file" in refused("wds/x", shards, data_split=["train-9.tar|5", "val-0.tar|5"])
    assert "no class under 'json'" in refused("wds/x", shards, target_key="json")
    assert "cannot be opened" in refused("wds/x", shards, data_split=["train", "val"])
    shutil.copytree(parquet, tmp_path / "other")        # of this one no cache knows the length
    assert "does not declare its number of images" in refused(f"hfids/{tmp_path}/other", "", data_split=None, num_classes=None)
    (tmp_path / "cut.tar").write_bytes((shards / "train-0.tar").read_bytes()[:3000])
    assert "cannot be read any further" in refused("wds/x", tmp_path, data_split=["cut.tar|8", "cut.tar|8"])


def test_no_shard_is_a_shell_command(tmp_path, monkeypatch):
    """The library would run what follows `pipe:`, which may come from a checkpoint's flags."""
    pytest.importorskip("webdataset", reason="needs pip install webdataset")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").touch()
    command = f"pipe:touch {tmp_path}/ran; echo x.tar"
    os.makedirs(f"{tmp_path}/{command.rpartition('/')[0]}")
    (tmp_path / command).touch()
    for place in (".", "pipe:touch ran"):
        with pytest.raises(UserError):
            loaders = build_loaders(make_args("wds/x", place, data_split=[f"{command}|8"] * 2, num_classes=3), Process())
            list(loaders.train)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- what is missing
@pytest.mark.parametrize("kind, package", [("hfds", "datasets"), ("hfids", "datasets"), ("wds", "webdataset")])
def test_a_missing_package_is_named(kind, package, monkeypatch, tmp_path):
    monkeypatch.setattr(ours, "package_spec", lambda name: None)
    with pytest.raises(UserError, match=f"needs the package {package}.*: pip install '{package}"):
        build_loaders(make_args(f"{kind}/x", tmp_path), Process())


def test_an_old_version_would_run_scripts(monkeypatch, hub):
    monkeypatch.setattr(ours, "version", lambda name: "3.6.0")
    with pytest.raises(UserError, match="datasets 4 or newer"):
        build_loaders(make_args("hfds/x"), Process())


def test_the_projects_module_does_not_hide_hugging_faces(hub):
    assert hub.__file__.endswith("datasets/__init__.py") and hasattr(hub, "load_dataset")
    assert torchvision_datasets.ImageFolder is not None
