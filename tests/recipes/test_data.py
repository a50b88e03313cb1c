import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from recipes import data as recipes_data
from recipes.data import Digits, ImageFolder, Npz, Numbers, TorchvisionArrays


def test_digits_are_pixels_with_disjoint_stratified_splits(digits):
    sizes = {name: len(split) for name, split in digits.splits.items()}
    assert sum(sizes.values()) == 1797
    images, labels = digits.splits["train"].tensors
    assert images.shape[1:] == (1, 16, 16)
    assert images.min() == 0
    assert images.max() <= 1
    assert labels.bincount().min() > 0.08 * len(labels)
    flat = [{image.numpy().tobytes() for image in split.tensors[0]} for split in digits.splits.values()]
    assert not flat[0] & flat[1]
    assert not flat[0] & flat[2]
    assert digits.spec.num_classes == 10
    std, mean = torch.std_mean(images)
    assert_close((mean.item(), std.item()), (digits.spec.mean[0], digits.spec.std[0]))


def test_the_split_does_not_follow_the_global_seed(digits):
    torch.manual_seed(99)
    np.random.seed(99)
    again = Digits()
    again.setup()
    assert torch.equal(again.splits["test"].tensors[0], digits.splits["test"].tensors[0])


@pytest.mark.parametrize("colour", [False, True])
def test_npz_is_read_as_pixels(tmp_path, colour):
    shape = (40, 6, 6, 3) if colour else (40, 6, 6)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(40) % 4
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels[:, None], x_test=images[:8], y_test=labels[:8])
    data = Npz(str(tmp_path / "a.npz"), val_fraction=0.2)
    data.setup()
    assert data.spec.num_classes == 4
    assert data.spec.num_channels == (3 if colour else 1)
    assert len(data.splits["val"]) == 8
    pixel = images[0, 1, 2] / 255
    assert_close(data.splits["test"].tensors[0][0, :, 1, 2], torch.as_tensor(pixel).float().reshape(-1))


def test_a_missing_or_incomplete_npz_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nothing.npz; say where it is with data.path"):
        Npz(str(tmp_path / "nothing.npz"))
    np.savez(tmp_path / "a.npz", x_train=np.zeros(1))
    with pytest.raises(ValueError, match=r"lacks \['y_train', 'x_test', 'y_test'\]; it has \['x_train'\]"):
        Npz(str(tmp_path / "a.npz")).setup()


def _folder(root, splits=("train", "test"), classes=("cat", "dog")):
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(10):
                Image.new("RGB", (12, 9), (label * 255, 0, 0)).save(root / split / name / f"{index}.png")


def test_image_folder_holds_out_validation_images(tmp_path):
    _folder(tmp_path)
    data = ImageFolder(str(tmp_path), image_size=8, val_fraction=0.2, batch_size=4)
    data.setup()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 16, "test": 20, "val": 4}
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert_close(images[:, 0, 0, 0], labels.float())


def test_image_folder_names_what_is_missing_or_different(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*train; expected train/<class>/<image> below data.root"):
        ImageFolder(str(tmp_path))
    _folder(tmp_path)
    (tmp_path / "test" / "cow").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "test" / "cow" / "0.png")
    with pytest.raises(ValueError, match=r"classes \['cat', 'cow', 'dog'\], but train has \['cat', 'dog'\]"):
        ImageFolder(str(tmp_path)).setup()


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "CIFAR100"])
def test_a_failed_download_says_where_the_files_belong(tmp_path, monkeypatch, name):
    def offline(*args, **kwargs):
        raise recipes_data.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", offline)
    with pytest.raises(RuntimeError, match=f"{name} is not in .* could not be downloaded(.|\n)*data=digits"):
        TorchvisionArrays(name, str(tmp_path)).prepare_data()


def _idx(path, array):
    """Write the format of MNIST: magic number with the rank, big-endian sizes, bytes."""
    header = [0x0800 + array.ndim, *array.shape]
    path.write_bytes(b"".join(number.to_bytes(4, "big") for number in header) + array.tobytes())


def test_torchvision_files_that_are_there_are_read_as_pixels(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 30), ("t10k", 10)):
        _idx(raw / f"{split}-images-idx3-ubyte", np.full((count, 28, 28), 255, dtype=np.uint8))
        _idx(raw / f"{split}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 3)
    data = TorchvisionArrays("MNIST", str(tmp_path))
    data.prepare_data()
    data.setup()
    assert data.spec.num_classes == 3
    assert_close(data.splits["test"].tensors[0], torch.ones(10, 1, 28, 28))
    assert data.splits["test"].tensors[1].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_numbers_cover_every_class_with_other_handwriting_for_testing():
    sizes = {"num_train": 600, "num_test": 200}
    data = Numbers(num_digits=2, noise=0, **sizes)
    data.setup()
    assert data.spec.num_classes == 100
    assert (data.spec.num_channels, data.spec.image_size) == (1, 32)
    for split in ("train", "val", "test"):
        images, labels = data.splits[split].tensors
        assert images.min() == 0
        assert images.max() <= 1
        assert labels.bincount(minlength=100).min() > 0
    one = Numbers(num_digits=1, noise=0, **sizes)
    assert (one.arrays()["train"][0] > 0).mean() < (data.arrays()["train"][0] > 0).mean()
    noisy = Numbers(num_digits=2, **sizes).arrays()
    np.testing.assert_array_equal(noisy["test"][0], Numbers(num_digits=2, **sizes).arrays()["test"][0])
    assert 0 < noisy["test"][0].min() < noisy["test"][0].max() < 1
    written = {split: _digits_of(*data.arrays()[split]) for split in ("train", "val", "test")}
    assert not written["train"] & (written["test"] | written["val"])
    assert not written["test"] & written["val"]


def _digits_of(images, numbers):
    """The handwriting of the last digit, cut out where it begins."""
    cut = images[:, :, 16:26]
    return {image[image.any(1)].tobytes() for image in cut}


@pytest.mark.parametrize("arguments", [{"num_digits": 4}, {"num_digits": 0}, {"num_digits": 3, "num_test": 999}])
def test_numbers_that_cannot_be_are_refused(arguments):
    with pytest.raises(ValueError, match="num_digits must be 1, 2 or 3|do not cover the 1000 classes"):
        Numbers(**arguments)
