import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from recipes.data.files import RADIOGRAPHS, CovidRadiography, ImageFolder, ImageNet, TinyImageNet


def _image(path, red=0):
    """A gradient, so that its file does not compress to nothing and a cut through it is seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((9, 12, 3), dtype=np.uint8)
    pixels[..., 0] = red
    pixels[..., 2] = np.random.default_rng(0).integers(0, 256, (9, 12))
    Image.fromarray(pixels).save(path)


def _folder(root, splits=("train", "test"), classes=("cat", "dog")):
    for split in splits:
        for label, name in enumerate(classes):
            for index in range(10):
                _image(root / split / name / f"{index}.png", label * 255)


def _tiny_imagenet(root):
    """3 classes with 4 training images each, and 6 validation images."""
    wnids = ["n03", "n01", "n02"]
    for label, wnid in enumerate(sorted(wnids)):
        for number in range(4):
            _image(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", label * 100)
    for number in range(6):
        _image(root / "val" / "images" / f"val_{number}.JPEG", number % 3 * 100)
    _image(root / "test" / "images" / "test_0.JPEG")
    (root / "wnids.txt").write_text("\n".join(wnids))
    lines = [f"val_{number}.JPEG\tn0{number % 3 + 1}\t0\t0\t9\t9\n" for number in range(6)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return {"root": str(root), "num_classes": 3, "num_per_class": 4, "num_val": 6, "val_fraction": 0.25}


def _radiographs(root):
    counts = {"COVID": 10, "Viral Pneumonia": 20}
    for label, (name, count) in enumerate(counts.items()):
        for number in range(1, count + 1):
            _image(root / name / "images" / f"{name}-{number}.png", label * 255)
            _image(root / name / "masks" / f"{name}-{number}.png")
    return {"root": str(root), "counts": counts}


def _sizes(data):
    data.setup()
    return {split: len(images) for split, images in data.splits.items()}


def test_image_folder_holds_out_validation_images_of_every_class(tmp_path):
    _folder(tmp_path)
    data = ImageFolder(str(tmp_path), image_size=8, val_fraction=0.2, batch_size=4)
    assert _sizes(data) == {"train": 16, "test": 20, "val": 4}
    assert data.splits["val"].labels.bincount().tolist() == [2, 2]
    assert not set(data.splits["val"].paths) & set(data.splits["train"].paths)
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert_close(images[:, 0, 0, 0], labels.float())
    assert (data.spec.num_classes, data.spec.num_channels, data.spec.image_size) == (2, 3, 8)
    again = ImageFolder(str(tmp_path), val_fraction=0.2)
    again.setup()
    assert again.splits["val"].paths == data.splits["val"].paths


def test_image_folder_takes_the_validation_images_that_are_there(tmp_path):
    _folder(tmp_path, ("train", "val", "test"))
    assert _sizes(ImageFolder(str(tmp_path))) == {"train": 20, "val": 20, "test": 20}


def test_image_folder_names_what_is_missing_or_different(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*train; expected train/<class>/<image> below data.root"):
        ImageFolder(str(tmp_path))
    _folder(tmp_path)
    _image(tmp_path / "test" / "cow" / "0.png")
    with pytest.raises(ValueError, match=r"classes \['cat', 'cow', 'dog'\], but train has \['cat', 'dog'\]"):
        ImageFolder(str(tmp_path)).setup()


def test_image_folder_without_classes_says_how_to_sort_the_images(tmp_path):
    for split in ("train", "test"):
        _image(tmp_path / split / "0.png")
    with pytest.raises(ValueError, match=r"train has no folders; sort the images into .*train/<class>/"):
        ImageFolder(str(tmp_path)).setup()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_images_is_named(tmp_path, split):
    _folder(tmp_path)
    shutil.rmtree(tmp_path / split / "dog")
    (tmp_path / split / "dog").mkdir()
    with pytest.raises(ValueError, match=rf"The {split} images have 1 of the 2 classes; there is none of 1 \(dog\)"):
        ImageFolder(str(tmp_path)).setup()


def test_an_empty_file_is_named_before_any_image_is_read(tmp_path):
    _folder(tmp_path)
    (tmp_path / "test" / "dog" / "7.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test/dog/7.png is empty; copy it again"):
        ImageFolder(str(tmp_path)).setup()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda _: b"no image", lambda w: w[:20]])
def test_a_file_that_cannot_be_decoded_is_named(tmp_path, suffix, damage):
    _folder(tmp_path)
    path = tmp_path / "test" / "cat" / f"00.{suffix}"
    _image(path)
    path.write_bytes(damage(path.read_bytes()))
    data = ImageFolder(str(tmp_path), image_size=8, batch_size=2)
    data.setup()
    with pytest.raises(ValueError, match=rf"test/cat/00.{suffix} cannot be decoded as an image .*; copy it again"):
        next(iter(data.test_dataloader()))


def test_only_training_images_are_augmented_and_workers_can_have_the_data(tmp_path):
    _folder(tmp_path)
    data = ImageFolder(str(tmp_path), image_size=8, batch_size=2, train_transform=torch.neg)
    data.setup()
    assert next(iter(data.train_dataloader()))[0].min() < 0
    assert next(iter(data.val_dataloader()))[0].min() == 0
    assert len(pickle.loads(pickle.dumps(data.train_dataloader().dataset))) == 18


def test_imagenet_tests_on_its_validation_images(tmp_path):
    _folder(tmp_path, ("train", "val"), ("n01", "n02"))
    data = ImageNet(str(tmp_path), num_classes=2, num_train=20, num_val=20)
    assert _sizes(data) == {"train": 18, "val": 2, "test": 20}
    assert all("/val/" in path for path in data.splits["test"].paths)
    assert _sizes(ImageNet(str(tmp_path), num_classes=None, num_train=None, num_val=None)) == _sizes(data)


def test_imagenet_is_counted(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*train; expected train/<class>/<image>"):
        ImageNet(str(tmp_path))
    _folder(tmp_path, ("train", "val"), ("n01", "n02"))
    (tmp_path / "val" / "n02" / "3.png").unlink()
    for arguments, message in (
        ({}, "train has 2 class folders instead of 1000; copy .* or say data.num_classes=2"),
        ({"num_classes": 2}, "train has 20 images instead of 1281167, .* or say data.num_train=20"),
        (
            {"num_classes": 2, "num_train": 20, "num_val": 20},
            "val has 19 images instead of 20, the fewest in n02; copy .* or say data.num_val=19",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ImageNet(str(tmp_path), **arguments).setup()


def test_tiny_imagenet_is_labelled_by_its_annotations(tmp_path):
    data = TinyImageNet(**_tiny_imagenet(tmp_path), image_size=8, batch_size=6)
    assert _sizes(data) == {"train": 9, "val": 3, "test": 6}
    assert data.class_names == ["n01", "n02", "n03"]
    assert data.splits["val"].labels.bincount().tolist() == [1, 1, 1]
    for loader in (data.train_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert torch.equal((images[:, 0].mean((1, 2)) * 2.55).round().long(), labels)  # red is 100/255 of the label


@pytest.mark.parametrize("name", ["wnids.txt", "val/val_annotations.txt"])
def test_tiny_imagenet_needs_its_lists(tmp_path, name):
    arguments = _tiny_imagenet(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"There is no file .*{name}; expected tiny-imagenet-200 as it is"):
        TinyImageNet(**arguments)


@pytest.mark.parametrize("name", ["train/n02/images/n02_2.JPEG", "val/images/val_5.JPEG"])
def test_the_missing_image_of_tiny_imagenet_is_named(tmp_path, name):
    arguments = _tiny_imagenet(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing; copy the data set again"):
        TinyImageNet(**arguments).setup()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "val_9.JPEG\tn09\t0\t0\t9\t9",
            r"Line 7 of .*val_annotations.txt is 'val_9.*n09.*'; expected a file, a wnid of",
        ),
        ("val_9.JPEG\tn01\t0", r"Line 7 of .*val_annotations.txt is .*four numbers, separated by tabs"),
        (
            "val_6.JPEG\tn01\t0\t0\t9\t9",
            "annotates 7 images instead of 6; copy the data set again, or say data.num_val",
        ),
    ],
)
def test_wrong_annotations_of_tiny_imagenet_are_named(tmp_path, line, message):
    arguments = _tiny_imagenet(tmp_path)
    with (tmp_path / "val" / "val_annotations.txt").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=message):
        TinyImageNet(**arguments).setup()


def test_tiny_imagenet_is_counted(tmp_path):
    arguments = _tiny_imagenet(tmp_path)
    with pytest.raises(ValueError, match="wnids.txt names 3 classes instead of 200; .* or say data.num_classes="):
        TinyImageNet(str(tmp_path)).setup()
    with pytest.raises(ValueError, match=r"n01/images has 1 images beyond the 3 expected, n01_3.JPEG for one; copy"):
        TinyImageNet(**arguments | {"num_per_class": 3}).setup()


def test_radiographs_are_split_as_in_the_paper(tmp_path):
    data = CovidRadiography(**_radiographs(tmp_path), image_size=8, val_fraction=1 / 7, batch_size=9)
    assert _sizes(data) == {"train": 18, "val": 3, "test": 9}
    assert data.class_names == ["COVID", "Viral Pneumonia"]
    assert data.splits["test"].labels.bincount().tolist() == [3, 6]
    paths = [set(split.paths) for split in data.splits.values()]
    assert len(set.union(*paths)) == 30
    assert not any("masks" in path for path in set.union(*paths))
    images, labels = next(iter(data.test_dataloader()))
    assert_close(images[:, 0, 0, 0], labels.float())


def test_the_missing_radiograph_is_named(tmp_path):
    arguments = _radiographs(tmp_path)
    (tmp_path / "Viral Pneumonia" / "images" / "Viral Pneumonia-20.png").unlink()
    with pytest.raises(FileNotFoundError, match="Viral Pneumonia-20.png is missing; copy the data set again"):
        CovidRadiography(**arguments).setup()
    _image(tmp_path / "COVID" / "images" / "COVID-11.png")
    with pytest.raises(ValueError, match=r"COVID/images has 1 images beyond the 10 expected, COVID-11.png for one"):
        CovidRadiography(**arguments).setup()
    with pytest.raises(FileNotFoundError, match="no folder .*Lung_Opacity/images; expected <class>/images/<class>-"):
        CovidRadiography(str(tmp_path))
    assert sum(RADIOGRAPHS.values()) == 21_165
