"""What arrives at the loggers, read back from the files that their real clients write; nothing is sent anywhere."""

import json
import struct
import zipfile

import lightning.pytorch
import lightning.pytorch.loggers
import pytest
import pytorch_lightning as pl
import pytorch_lightning.loggers
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_reg import FisherMonitor
from tests import cases
from tests.callbacks.test_monitor import SHOWN

NAMESPACES = {
    "pytorch_lightning": (pl.Trainer, cases.Plain, pytorch_lightning.loggers),
    "lightning": (lightning.pytorch.Trainer, cases.OtherPlain, lightning.pytorch.loggers),
}
FIGURES = ("fisher/bound_versus_empirical", "fisher/sensitive_examples")
HISTOGRAM = "fisher/log10_lambda_max"
STEPS = [1, 3]
"""Of the loggers at the ends of two epochs of two steps, which Lightning counts from 0."""
PNG = b"\x89PNG\r\n"

namespaces = pytest.mark.parametrize("namespace", NAMESPACES)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "COMET_START_ONLINE": "0",  # CometLogger(online=False) writes nothing at all
        "COMET_OFFLINE_DIRECTORY": str(tmp_path),
        "COMET_LOGGING_CONSOLE": "CRITICAL",
        "COMET_AUTO_LOG_ENV_DETAILS": "0",
        "COMET_AUTO_OUTPUT_LOGGING": "0",
    }.items():
        monkeypatch.setenv(name, value)


def _images(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(8, *shape, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 4, (8,), generator=generator)), batch_size=4)


def _fit(folder, loggers, monitor=None, namespace="pytorch_lightning", shape=(3, 4, 4), **options):
    trainer_type, module_type, _ = NAMESPACES[namespace]
    torch.manual_seed(0)
    size = torch.Size(shape).numel()
    module = module_type(nn.Sequential(nn.Flatten(), nn.Linear(size, 4)))
    callbacks = [monitor or FisherMonitor(num_samples=4)]
    options = {"max_epochs": 2, "log_every_n_steps": 1} | options
    trainer = cases.trainer(folder, trainer_type, callbacks=callbacks, logger=loggers, **options)
    trainer.fit(module, _images(shape, 0), _images(shape, 1))
    return trainer


def _steps(pairs, name):
    return [step for key, step in pairs if key == name]


def _tensorboard(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    return events


def _records(path):
    """Yield the records of a file of W&B: the log format of LevelDB after a header of seven bytes."""
    data, i, record = path.read_bytes(), 7, b""
    while i + 7 <= len(data):
        if (left := 32768 - i % 32768) < 7:
            i += left
            continue
        _, length, part = struct.unpack("<IHB", data[i : i + 7])
        record += data[i + 7 : i + 7 + length]
        i += 7 + length
        if part in (1, 4):  # whole, or the last of several parts
            yield record
            record = b""


def _wandb_rows(logger, folder):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    logger.experiment.finish()
    wandb.teardown()  # its process may write for a while after the run is finished
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in _records(path):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def _wandb_logger(loggers, folder):
    pytest.importorskip("wandb")
    return loggers.WandbLogger(save_dir=folder, offline=True, project="test")


def _wandb_steps(rows, name):
    """Return the steps of the rows that have a value, a picture or a histogram ``name``."""
    return [row["trainer/global_step"] for row in rows if name in row or f"{name}/_type" in row]


@namespaces
def test_wandb_gets_scalars_figures_and_histogram_at_the_same_steps(tmp_path, namespace):
    logger = _wandb_logger(NAMESPACES[namespace][2], tmp_path)
    _fit(tmp_path, logger, namespace=namespace)
    summary = dict(logger.experiment.summary)
    rows = _wandb_rows(logger, tmp_path)
    for name in (*SHOWN, *FIGURES, HISTOGRAM):
        assert _wandb_steps(rows, name) == STEPS, name
        assert name in summary
    assert {key for row in rows for key in row if key.startswith("fisher/") and key.count("/") == 1} == SHOWN
    media = [path for path in tmp_path.glob("wandb/offline-run-*/files/media/images/fisher/*") if path.is_file()]
    assert sorted(f"fisher/{path.name.rsplit('_', 2)[0]}" for path in media) == sorted(2 * FIGURES)
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size < 200_000 for path in media)


def test_wandb_rows_never_go_back_and_none_is_lost(tmp_path):
    class Logging(cases.Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    logger = _wandb_logger(pytorch_lightning.loggers, tmp_path)
    torch.manual_seed(0)
    module = Logging(nn.Sequential(nn.Flatten(), nn.Linear(48, 4)))
    options = {"max_epochs": 2, "log_every_n_steps": 1, "val_check_interval": 0.5}
    trainer = cases.trainer(tmp_path, callbacks=[FisherMonitor(num_samples=4)], logger=logger, **options)
    trainer.fit(module, _images((3, 4, 4), 0), _images((3, 4, 4), 1))
    rows = _wandb_rows(logger, tmp_path)
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    times = [row["trainer/global_step"] for row in rows]
    assert times == sorted(times)
    for name in ("loss", "val_loss", "fisher/lambda_max_mean", "fisher/sensitive_examples", HISTOGRAM):
        assert _wandb_steps(rows, name) == [0, 1, 2, 3], name
    assert _wandb_steps(rows, "fisher/bound_versus_empirical") == [0, 3]  # where bounds are measured


@namespaces
def test_mlflow_gets_scalars_and_figures(tmp_path, namespace):
    pytest.importorskip("mlflow")
    loggers = NAMESPACES[namespace][2]
    logger = loggers.MLFlowLogger(experiment_name="test", tracking_uri=(tmp_path / "mlruns").as_uri())
    _fit(tmp_path, logger, namespace=namespace)
    client, run = logger.experiment, logger.run_id
    for name in SHOWN:
        assert [metric.step for metric in client.get_metric_history(run, name)] == STEPS, name
    for name in FIGURES:
        paths = [file.path for file in client.list_artifacts(run, name)]
        assert paths == [f"{name}/step_{step:08d}.png" for step in STEPS]
        (file,) = tmp_path.glob(f"mlruns/*/*/artifacts/{paths[0]}")
        assert file.read_bytes().startswith(PNG)


def _comet(folder):
    (path,) = folder.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        lines = archive.read("messages.json").decode().splitlines()
        payloads = [json.loads(line)["payload"] for line in lines]
        files = {one["file_path"]: archive.read(one["file_path"]) for one in payloads if one.get("additional_params")}
    return payloads, files


@namespaces
def test_comet_gets_scalars_figures_and_histogram(tmp_path, namespace):
    pytest.importorskip("comet_ml")
    logger = NAMESPACES[namespace][2].CometLogger(workspace="test", project="test")
    _fit(tmp_path, logger, namespace=namespace)
    logger.experiment.end()
    payloads, files = _comet(tmp_path)
    metrics = [one["metric"] for one in payloads if "metric" in one]
    scalars = [(metric["metricName"], metric["step"]) for metric in metrics]
    for name in SHOWN:
        assert _steps(scalars, name) == STEPS, name
    uploads = [one for one in payloads if one.get("additional_params")]
    assets = [one["additional_params"] for one in uploads]
    for name in FIGURES:
        assert _steps([(one.get("figName"), one["step"]) for one in assets], name) == STEPS
    assert _steps([(one.get("fileName"), one["step"]) for one in assets], HISTOGRAM) == STEPS
    figures = [files[one["file_path"]] for one in uploads if one["additional_params"].get("figName") in FIGURES]
    assert all(b"<svg" in figure for figure in figures)


@namespaces
@pytest.mark.parametrize("channels", [1, 3])
def test_tensorboard_gets_scalars_figures_and_histogram(tmp_path, namespace, channels):
    logger = NAMESPACES[namespace][2].TensorBoardLogger(tmp_path, name="", version="")
    _fit(tmp_path, logger, namespace=namespace, shape=(channels, 4, 4))
    events = _tensorboard(tmp_path)
    assert events.Tags()["images"] == list(FIGURES)
    for name in FIGURES:
        assert [image.step for image in events.Images(name)] == STEPS
        assert all(image.encoded_image_string.startswith(PNG) for image in events.Images(name))
    assert [histogram.step for histogram in events.Histograms(HISTOGRAM)] == STEPS
    assert [scalar.step for scalar in events.Scalars("fisher/lambda_max_mean")] == STEPS


def test_pictures_between_validations_are_at_the_steps_of_their_scalars(tmp_path):
    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path, name="", version="")
    _fit(tmp_path, logger, FisherMonitor(probe=torch.rand(3, 3, 4, 4), every_n_steps=1))
    events = _tensorboard(tmp_path)
    scalars = {scalar.step for scalar in events.Scalars("fisher/lambda_max_mean")}
    assert {image.step for image in events.Images("fisher/sensitive_examples")} == scalars == {0, 1, 2, 3}
    bounds = {scalar.step for scalar in events.Scalars("fisher/bound_global")}
    assert {image.step for image in events.Images("fisher/bound_versus_empirical")} == bounds == {0, 3}


@pytest.mark.parametrize("shape", [(12,), (2, 4, 4), (3, 2, 2, 2)])
def test_of_inputs_that_are_no_images_no_examples_are_drawn(tmp_path, shape):
    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path, name="", version="")
    _fit(tmp_path, logger, shape=shape)
    assert _tensorboard(tmp_path).Tags()["images"] == [FIGURES[0]]


def test_two_loggers_at_once_both_get_the_pictures(tmp_path):
    loggers = [
        pytorch_lightning.loggers.TensorBoardLogger(tmp_path / "board", name="", version=""),
        _wandb_logger(pytorch_lightning.loggers, tmp_path),
    ]
    _fit(tmp_path, loggers)
    events, rows = _tensorboard(tmp_path / "board"), _wandb_rows(loggers[1], tmp_path)
    for name in FIGURES:
        assert [image.step for image in events.Images(name)] == _wandb_steps(rows, name) == STEPS


def test_the_keys_of_pictures_begin_with_the_prefix(tmp_path):
    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path, name="", version="")
    _fit(tmp_path, logger, FisherMonitor(num_samples=4, prefix="curvature"))
    tags = _tensorboard(tmp_path).Tags()
    assert tags["images"] == ["curvature/bound_versus_empirical", "curvature/sensitive_examples"]
    assert tags["histograms"] == ["curvature/log10_lambda_max"]


def test_a_client_that_raises_costs_one_warning_and_not_the_others(tmp_path, monkeypatch):
    failing = pytorch_lightning.loggers.TensorBoardLogger(tmp_path / "failing", name="", version="")
    working = _wandb_logger(pytorch_lightning.loggers, tmp_path)

    def refuse(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(failing.experiment, "add_figure", refuse)
    with pytest.warns(UserWarning, match="draws nothing on TensorBoardLogger, .*OSError: the disk is full") as caught:
        trainer = _fit(tmp_path, [failing, working])
    assert sum("the disk is full" in str(warning.message) for warning in caught) == 1
    assert trainer.current_epoch == 2
    assert _wandb_steps(_wandb_rows(working, tmp_path), FIGURES[1]) == STEPS
    assert [scalar.step for scalar in _tensorboard(tmp_path / "failing").Scalars("fisher/lambda_max_mean")] == STEPS
