import hashlib
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from recipes.data.sources import Digits, Npz, Numbers, TorchvisionArrays


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
    with pytest.raises(FileNotFoundError, match="no file .*nothing.npz; set its path with data.path"):
        Npz(str(tmp_path / "nothing.npz"))
    np.savez(tmp_path / "a.npz", x_train=np.zeros(1))
    with pytest.raises(ValueError, match=r"lacks \['y_train', 'x_test', 'y_test'\]; it has \['x_train'\]"):
        Npz(str(tmp_path / "a.npz")).setup()


def _npz(path, save=np.savez, **replaced):
    """40 images of 4 classes for training, 8 for testing; some arrays replaced, or left out by None."""
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 6), dtype=np.uint8)
    labels = np.arange(40) % 4
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:8], "y_test": labels[:8]} | replaced
    save(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            {"x_train": np.full((40, 6, 6), 255.0)},
            r"The train images must be uint8, or floats in \[0, 1\]; got float64 from 255.0 to 255.0.*divide by 255",
        ),
        ({"x_test": np.full((8, 6, 6), -0.1, dtype=np.float32)}, r"The test images must .* got float32 from -0.1"),
        ({"x_test": np.full((8, 6, 6), np.nan)}, r"The test images must .* got float64 from nan to nan"),
        ({"x_test": np.ones((8, 6, 6), dtype=np.int64)}, r"The test images must be uint8.* got int64"),
        ({"x_test": np.zeros((8, 36))}, r"The test images must be square, .*channels last; got \(8, 36\)"),
        ({"x_train": np.zeros((40, 3, 6, 6))}, r"The train images must be square, .* got \(40, 3, 6, 6\)"),
        ({"x_test": np.zeros((0, 6, 6)), "y_test": np.zeros(0, int)}, r"The test images must .* got \(0, 6, 6\)"),
        ({"x_test": np.zeros((8, 7, 7))}, r"test images have the shape \(7, 7\), but those of train \(6, 6\)"),
        ({"y_test": np.arange(7)}, "There are 8 test images, but 7 labels; pass one label per image"),
        ({"y_test": np.eye(8, dtype=int)}, "There are 8 test images, but 64 labels"),
        ({"y_test": np.arange(8) % 4 - 1}, "The test labels must be integers from 0; got int64 from -1 to 2"),
        ({"y_train": np.arange(40) / 10}, "The train labels must be integers from 0; got float64 from 0.0 to 3.9"),
        ({"y_train": np.full(40, 3)}, "train images have 1 of the 4 classes; there is none of 0, 1, 2. Add train"),
        ({"y_test": np.full(8, 60)}, r"The train images have 4 of the 61 classes; there is none of 4, .*, 13, …\. Add"),
        ({"y_test": np.arange(8) % 2}, "test images have 2 of the 4 classes; there is none of 2, 3. .*without gaps"),
        (
            {"y_train": np.arange(40) // 39 * 3},
            r"A share of 0.1 of 40 images cannot be held out .* change val_fraction",
        ),
        ({"x_val": np.zeros((8, 6, 6))}, r"lacks \['y_val'\]; it has"),
    ],
)
def test_arrays_that_are_no_labelled_images_are_refused_with_the_remedy(tmp_path, replaced, message):
    data = Npz(_npz(tmp_path / "a.npz", **replaced))
    with pytest.raises(ValueError, match=message):
        data.setup()
    assert not hasattr(data, "splits")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_named_whatever_part_of_it_is_damaged(tmp_path, save):
    path = tmp_path / "a.npz"
    _npz(path, save)
    whole = path.read_bytes()
    expected = Npz(str(path)).arrays()
    refusals = []
    for damage in [whole[:100], whole[:-1], b"", b"no archive"] + [
        whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :] for place in range(0, len(whole), 7)
    ]:
        path.write_bytes(damage)
        try:
            arrays = Npz(str(path)).arrays()
        except ValueError as error:
            refusals.append(str(error))  # which bytes are refused depends on what they mean
        else:
            for split, pair in expected.items():
                for array, other in zip(pair, arrays[split], strict=True):
                    np.testing.assert_array_equal(array, other)
    assert len(refusals) > len(whole) / 14
    assert all("a.npz" in text for text in refusals)
    path.write_bytes(whole.replace(expected["train"][0].tobytes(), bytes(40 * 36)))
    if save is np.savez:
        with pytest.raises(ValueError, match=r"a.npz is damaged .* x_train cannot be read \(Bad CRC-32.*Copy or write"):
            Npz(str(path)).setup()


def test_an_npz_of_pickled_objects_or_another_digest_is_refused(tmp_path):
    path = _npz(tmp_path / "a.npz", y_test=np.array([0, None]))
    with pytest.raises(ValueError, match=r"a.npz is damaged or not .* y_test cannot be read \(Object arrays"):
        Npz(path).setup()
    path = _npz(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a.npz has the SHA-256 \w{64} instead of 00; copy it again"):
        Npz(path, sha256="00").setup()
    digest = hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()
    Npz(path, sha256=digest.upper(), val_fraction=0.2).setup()


def test_the_first_images_are_used_equally_many_of_each_class(tmp_path):
    labels = np.repeat([0, 1, 2, 3], [20, 10, 6, 4])
    images = np.tile(np.arange(40, dtype=np.uint8)[:, None, None], (1, 6, 6))
    path = _npz(tmp_path / "a.npz", x_train=images, y_train=labels, x_val=images, y_val=labels)
    data = Npz(path, num_train=21, num_test=4)
    data.setup()
    kept, kept_labels = data.splits["train"].tensors
    assert kept_labels.bincount().tolist() == [6, 6, 5, 4]
    first = [*range(6), *range(20, 26), *range(30, 35), *range(36, 40)]
    assert (kept[:, 0, 0, 0] * 255).round().long().tolist() == first
    assert data.splits["test"].tensors[1].tolist() == [0, 1, 2, 3]
    assert len(data.splits["val"]) == 40
    for arguments, message in (
        ({"num_train": 41}, "num_train=41 must lie between 4, one image per class, and 40, as many as there are"),
        ({"num_test": 3}, "num_test=3 must lie between 4, one image per class, and 8"),
    ):
        with pytest.raises(ValueError, match=message):
            Npz(path, **arguments).setup()


def test_few_digits_are_among_the_many(digits):
    data = Digits(num_train=200, num_test=100)
    data.setup()
    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [180, 20, 100]
    many = {image.numpy().tobytes() for image in digits.splits["test"].tensors[0]}
    assert {image.numpy().tobytes() for image in data.splits["test"].tensors[0]} <= many
    assert data.splits["test"].tensors[1].bincount().tolist() == [10] * 10


def test_images_stay_small_in_memory_and_are_resized_and_repeated_when_asked_for(tmp_path):
    path = _npz(tmp_path / "a.npz")
    small, large = Npz(path), Npz(path, image_size=12, num_channels=3, batch_size=8)
    for data in (small, large):
        data.setup()
    assert isinstance(small.splits["train"], TensorDataset)
    assert large.splits["train"].images.shape[1:] == (1, 6, 6)
    assert large.splits["train"].images.dtype == torch.uint8
    assert (large.spec.num_classes, large.spec.num_channels, large.spec.image_size) == (4, 3, 12)
    assert_close((large.spec.mean, large.spec.std), (small.spec.mean * 3, small.spec.std * 3))
    images, labels = next(iter(large.test_dataloader()))
    pixels, expected = small.splits["test"].tensors
    assert torch.equal(labels, expected)
    assert images.shape == (8, 3, 12, 12)
    assert_close(images[:, 2], images[:, 0])
    # Enlarged twice, an inner output pixel lies a quarter of a pixel beside its source: weights 3/4 and 1/4 per axis.
    near = torch.tensor([0.75, 0.25])
    assert_close(images[:, 0, 3, 5], torch.einsum("i,j,bij->b", near, near, pixels[:, 0, 1:3, 2:4]))
    repeated = Npz(path, num_channels=3)
    repeated.setup()
    assert_close(repeated.splits["test"][0][0], pixels[0].repeat(3, 1, 1), rtol=0, atol=0)


def test_channels_that_cannot_be_made_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="num_channels=2, but the images have 1; only a single channel can be repeated to three"
    ):
        Npz(_npz(tmp_path / "a.npz"), num_channels=2).setup()
    colour = {"x_train": np.zeros((40, 6, 6, 3)), "x_test": np.zeros((8, 6, 6, 3))}
    with pytest.raises(ValueError, match="num_channels=1, but the images have 3"):
        Npz(_npz(tmp_path / "a.npz", **colour), num_channels=1).setup()


def test_only_batches_for_training_are_augmented(tmp_path):
    path = _npz(tmp_path / "a.npz", x_train=np.zeros((40, 6, 6)), x_test=np.zeros((8, 6, 6)))
    data = Npz(path, train_transform=lambda image: image + 1, batch_size=4)
    data.setup()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [next(iter(loader))[0].unique().tolist() for loader in loaders] == [[1], [0], [0]]
    assert data.splits["train"][0][0].max() == 0


def test_fewer_training_images_than_a_batch_are_refused(tmp_path):
    data = Npz(_npz(tmp_path / "a.npz"), batch_size=64)
    data.setup()
    with pytest.raises(ValueError, match="36 training images make no batch of 64; lower data.batch_size"):
        data.train_dataloader()


@pytest.fixture
def offline(monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", unreachable)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "CIFAR100"])
def test_a_failed_download_says_what_is_missing_and_where_the_files_belong(tmp_path, name):
    first = {"MNIST": "train-images-idx3-ubyte", "CIFAR10": "data_batch_1", "CIFAR100": "train"}[name]
    message = f"{name} is not in .*, which lacks .*/{first}, and could not be downloaded(.|\n)*data=digits"
    with pytest.raises(FileNotFoundError, match=message):
        TorchvisionArrays(name, str(tmp_path)).prepare_data()


def _idx(path, array):
    """Write the format of MNIST: magic number with the rank, big-endian sizes, bytes."""
    header = [0x0800 + array.ndim, *array.shape]
    path.write_bytes(b"".join(number.to_bytes(4, "big") for number in header) + array.tobytes())


def _mnist(root, counts=(60_000, 10_000)):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in zip(("train", "t10k"), counts, strict=True):
        _idx(raw / f"{split}-images-idx3-ubyte", np.full((count, 28, 28), 255, dtype=np.uint8))
        _idx(raw / f"{split}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 3)
    return raw


def test_torchvision_files_that_are_there_are_read_as_pixels(tmp_path):
    _mnist(tmp_path)
    data = TorchvisionArrays("MNIST", str(tmp_path), num_train=60, num_test=10)
    data.prepare_data()
    data.setup()
    assert data.spec.num_classes == 3
    assert_close(data.splits["test"].tensors[0], torch.ones(10, 1, 28, 28))
    assert data.splits["test"].tensors[1].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("split", ["train", "t10k"])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda _: b"", lambda whole: b"\0\0\7" + whole[3:]])
def test_a_damaged_file_of_mnist_is_named(tmp_path, split, kind, damage):
    path = _mnist(tmp_path) / f"{split}-{kind}-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"MNIST .* damaged: \S*raw/{path.name}\. Delete them and run again"):
        TorchvisionArrays("MNIST", str(tmp_path)).prepare_data()


def test_an_mnist_of_another_size_is_not_used(tmp_path):
    _mnist(tmp_path, (30, 10_000))
    with pytest.raises(ValueError, match="damaged: .*train-images-idx3-ubyte, .*train-labels-idx1-ubyte. Delete"):
        TorchvisionArrays("MNIST", str(tmp_path)).setup()


@pytest.mark.usefixtures("offline")
def test_a_damaged_file_of_cifar_is_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"CIFAR10 .* damaged: \S*data_batch_3\. Delete them and run again"):
        TorchvisionArrays("CIFAR10", str(tmp_path)).prepare_data()


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
