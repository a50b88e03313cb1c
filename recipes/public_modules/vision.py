"""Modules for images, from packages with their own modules or written like the examples of a package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from recipes.public_modules import Public


class Task(pl.LightningModule):
    """A module like those in the examples of most packages: a network, one loss, one optimiser.

    Args:
        network: Any network; ``forward`` calls it.
        loss: ``loss(module, batch)`` returns the loss.
    """

    def __init__(self, network: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
        return self.network(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.loss(self, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Compute the loss."""
        self.loss(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def _cross_entropy(module: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def timm_classifier() -> Public:
    """Return a residual network of timm on images and classes."""
    import timm

    module = Task(timm.create_model("resnet10t", num_classes=5), _cross_entropy)
    batch = [torch.rand(6, 3, 32, 32), torch.randint(5, (6,))]
    return Public(module, batch, module.network, lambda: batch[0])


def detector() -> Public:
    """Return a detector of torchvision: lists of images and of boxes, and boxes for an output."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(*batch) if module.training else None
        return sum(out.values()) if out else torch.zeros(())

    network = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in range(2)]
    return Public(Task(network, loss), (images, targets), network, lambda: torch.stack(images))


def segmenter() -> Public:
    """Return a U-Net of segmentation_models_pytorch with the loss of its examples: a yes/no label per pixel."""
    import segmentation_models_pytorch as smp

    dice = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)
    network = smp.Unet("resnet18", encoder_weights=None, classes=1, decoder_channels=(32, 16, 8, 8, 8))
    module = Task(network, lambda module, batch: dice(module(batch["image"]), batch["mask"]))
    batch = {"image": torch.rand(4, 3, 32, 32), "mask": torch.randint(2, (4, 1, 32, 32)).float()}
    return Public(module, batch, lambda x: network(x).flatten(2).mean(2), lambda: batch["image"])


def torchgeo_classification() -> Public:
    """Return torchgeo's classifier: a dictionary with image and label."""
    from torchgeo.trainers import ClassificationTask

    module = ClassificationTask(model="resnet18", in_channels=4, num_classes=5)
    batch = {"image": torch.rand(6, 4, 32, 32), "label": torch.randint(5, (6,))}
    return Public(module, batch, module.model, lambda: batch["image"])


def torchgeo_segmentation() -> Public:
    """Return torchgeo's segmentation: class logits per pixel."""
    from torchgeo.trainers import SemanticSegmentationTask

    module = SemanticSegmentationTask(model="fcn", in_channels=4, num_classes=5, num_filters=8)
    batch = {"image": torch.rand(4, 4, 16, 16), "mask": torch.randint(5, (4, 16, 16))}
    return Public(module, batch, lambda x: module.model(x).flatten(2).mean(2), lambda: batch["image"])


def torchgeo_regression() -> Public:
    """Return torchgeo's regression: one number per image."""
    from torchgeo.trainers import RegressionTask

    module = RegressionTask(model="resnet18", in_channels=3, num_outputs=1)
    batch = {"image": torch.rand(6, 3, 32, 32), "label": torch.rand(6)}
    return Public(module, batch, module.model, lambda: batch["image"])


def lightly_linear() -> Public:
    """Return lightly's linear evaluation of frozen features."""
    from lightly.utils.benchmarking import LinearClassifier
    from torchvision.models import resnet18

    backbone = resnet18()
    backbone.fc = nn.Identity()
    module = LinearClassifier(backbone, 6, feature_dim=512, num_classes=5, topk=(1,))
    batch = (torch.rand(6, 3, 32, 32), torch.randint(5, (6,)), [f"{i}.jpg" for i in range(6)])

    def network(x: Tensor) -> Tensor:
        result: Tensor = module.classification_head(backbone(x).flatten(1))
        return result

    return Public(module, batch, network, lambda: batch[0])


class SimCLR(pl.LightningModule):
    """Lightly's example: two views of each image, and no class."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead
        from torchvision.models import resnet18

        self.backbone = nn.Sequential(*list(resnet18().children())[:-1])
        self.projection_head = SimCLRProjectionHead(512, 64, 8)
        self.criterion = NTXentLoss()

    def forward(self, x: Tensor) -> Tensor:
        """Project."""
        result: Tensor = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Contrast two views."""
        x0, x1 = batch[0]
        result: Tensor = self.criterion(self.forward(x0), self.forward(x1))
        return result

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.06)


def lightly_simclr() -> Public:
    """Return SimCLR: its projection is a regression to ``K = 8`` numbers."""
    module = SimCLR()
    batch = (
        [torch.rand(6, 3, 32, 32), torch.rand(6, 3, 32, 32)],
        torch.zeros(6).long(),
        [f"{i}.jpg" for i in range(6)],
    )
    return Public(module, batch, module.forward, lambda: batch[0][0])


def monai_classification() -> Public:
    """Return a network of MONAI on a dictionary of volumes and classes."""
    from monai.data import MetaTensor
    from monai.networks.nets import DenseNet121

    network = DenseNet121(
        spatial_dims=3, in_channels=1, out_channels=3, init_features=8, growth_rate=4, block_config=(2, 2)
    )
    module = Task(network, lambda module, batch: nn.functional.cross_entropy(module(batch["img"]), batch["label"]))
    batch = {"img": MetaTensor(torch.rand(4, 1, 16, 16, 16)), "label": torch.randint(3, (4,))}
    return Public(module, batch, network, lambda: batch["img"].as_tensor())


def monai_segmentation() -> Public:
    """Return the U-Net of MONAI's Lightning tutorial: image and label are floating-point volumes."""
    from monai.data import MetaTensor
    from monai.losses import DiceLoss
    from monai.networks.nets import UNet

    dice = DiceLoss(to_onehot_y=True, softmax=True)
    network = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), norm="batch")
    module = Task(network, lambda module, batch: dice(module(batch["image"]), batch["label"]))
    label = MetaTensor(torch.randint(2, (4, 1, 16, 16, 16)).float())
    batch = {"image": MetaTensor(torch.rand(4, 1, 16, 16, 16)), "label": label}
    return Public(module, batch, lambda x: network(x).flatten(2).mean(2), lambda: batch["image"].as_tensor())


def torch_uncertainty_classification() -> Public:
    """Return torch_uncertainty's routine around a network of torchvision."""
    from torch_uncertainty.routines import ClassificationRoutine
    from torchvision.models import resnet18

    network = resnet18(num_classes=5)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    module = ClassificationRoutine(network, 5, nn.CrossEntropyLoss(), optim_recipe=optimizer)
    batch = (torch.rand(6, 3, 32, 32), torch.randint(5, (6,)))
    return Public(module, batch, network, lambda: batch[0])


def uq_box_classification() -> Public:
    """Return lightning-uq-box's classifier with dropout at prediction."""
    from lightning_uq_box.uq_methods import MCDropoutClassification

    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    module = MCDropoutClassification(network, 5, nn.CrossEntropyLoss())
    batch = {"input": torch.rand(6, 8), "target": torch.randint(4, (6,))}
    return Public(module, batch, network, lambda: batch["input"])


def anomalib_fastflow() -> Public:
    """Return anomalib's normalising flow: an anomaly map and no classes."""
    from anomalib.data import ImageBatch
    from anomalib.models import Fastflow

    module = Fastflow("resnet18", pre_trained=False, flow_steps=1, evaluator=False, visualizer=False)
    module.model.setup = lambda *args: None
    batch = ImageBatch(image=torch.rand(2, 3, 256, 256), gt_label=torch.zeros(2).bool())
    return Public(module, batch, lambda x: module.model(x).pred_score[:, None], lambda: batch.image)


def kornia_classifier() -> Public:
    """Return a vision transformer of kornia."""
    from kornia.models.vit import VisionTransformer

    network = nn.Sequential(
        VisionTransformer(image_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2), _First()
    )
    module = Task(nn.Sequential(network, nn.Linear(32, 5)), _cross_entropy)
    batch = (torch.rand(6, 3, 32, 32), torch.randint(5, (6,)))
    return Public(module, batch, module.network, lambda: batch[0])


class _First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]
