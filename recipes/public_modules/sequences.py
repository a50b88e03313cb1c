"""Modules for text, sound and time series."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recipes.public_modules import Public
from recipes.public_modules.vision import Task


def bert() -> Public:
    """Return a text classifier of transformers: token ids and a mask, and the loss inside the output."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_labels": 3,
    }
    network = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))
    module = Task(network, lambda module, batch: module(**batch).loss)
    mask = (torch.arange(7) < torch.tensor([[7], [5], [6], [7], [3], [4]])).long()
    batch = {"input_ids": torch.randint(30, (6, 7)), "attention_mask": mask, "labels": torch.randint(3, (6,))}

    def logits(embedded: Tensor) -> Tensor:
        result: Tensor = network(inputs_embeds=embedded, attention_mask=mask).logits
        return result

    return Public(module, batch, logits, lambda: network.bert.embeddings.word_embeddings(batch["input_ids"]))


def wav2vec2() -> Public:
    """Return torchaudio's wav2vec 2.0 with a classifier of the mean: waveforms and their lengths."""
    from torchaudio.models import wav2vec2_model

    network = wav2vec2_model(
        extractor_mode="layer_norm",
        extractor_conv_layer_config=[(8, 10, 5), (8, 3, 2)],
        extractor_conv_bias=True,
        encoder_embed_dim=16,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=4,
        encoder_pos_conv_groups=2,
        encoder_num_layers=1,
        encoder_num_heads=2,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=16,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=True,
        encoder_layer_drop=0.0,
        aux_num_out=4,
    )

    def loss(module: Any, batch: Any) -> Tensor:
        waveforms, labels, lengths = batch
        return nn.functional.cross_entropy(module(waveforms, lengths)[0].mean(1), labels)

    batch = (torch.randn(4, 400), torch.randint(4, (4,)), torch.tensor([400, 400, 300, 350]))
    return Public(Task(network, loss), batch, lambda x: network(x, batch[2][: len(x)])[0].mean(1), lambda: batch[0])


def asteroid_system() -> Public:
    """Return asteroid's System around a separator: a mixture, and two waveforms for an output."""
    from asteroid.engine.system import System
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
    from asteroid.models import ConvTasNet

    sizes = {"n_blocks": 1, "n_repeats": 1, "bn_chan": 4, "hid_chan": 4, "skip_chan": 4, "n_filters": 8}
    network = ConvTasNet(n_src=2, **sizes)
    module = System(network, torch.optim.SGD(network.parameters(), lr=1e-3), PITLossWrapper(pairwise_neg_sisdr), None)
    batch = (torch.randn(4, 160), torch.randn(4, 2, 160))
    return Public(module, batch, lambda x: network(x).mean(2), lambda: batch[0])


def bolts_logistic_regression() -> Public:
    """Return logistic regression of lightning-bolts."""
    from pl_bolts.models.regression import LogisticRegression

    module = LogisticRegression(input_dim=8, num_classes=3)
    batch = (torch.randn(6, 8), torch.randint(3, (6,)))
    return Public(module, batch, module.linear, lambda: batch[0])


def forecasting_tft() -> Public:
    """Return the temporal fusion transformer of pytorch-forecasting: a dictionary of 13 entries, quantiles out."""
    import pandas as pd
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    steps = pd.DataFrame({"time": list(range(12)) * 4, "group": [str(i) for i in range(4) for _ in range(12)]})
    steps["value"] = torch.randn(48).numpy()
    data = TimeSeriesDataSet(
        steps, "time", "value", ["group"], max_encoder_length=6, max_prediction_length=2,
        time_varying_unknown_reals=["value"],
    )  # fmt: skip
    module = TemporalFusionTransformer.from_dataset(data, hidden_size=8, attention_head_size=1, log_interval=-1)
    batch = next(iter(data.to_dataloader(train=False, batch_size=6, num_workers=0)))

    def network(x: Tensor) -> Tensor:
        result: Tensor = module({**batch[0], "encoder_cont": x})["prediction"].flatten(1)
        return result

    return Public(module, batch, network, lambda: batch[0]["encoder_cont"])


def neuralforecast_nhits() -> Public:
    """Return N-HiTS of neuralforecast, which cuts windows out of whole series in its training step."""
    from neuralforecast.models import NHITS

    module = NHITS(h=2, input_size=6, max_steps=2, mlp_units=3 * [[8, 8]], scaler_type="identity")
    temporal = torch.stack([torch.randn(4, 20), torch.ones(4, 20)], 1)
    columns = __import__("pandas").Index(["y", "available_mask"])
    batch = {"temporal": temporal, "temporal_cols": columns, "y_idx": 0}

    def network(x: Tensor) -> Tensor:
        windows = {"insample_y": x[..., None], "insample_mask": torch.ones_like(x), "futr_exog": None}
        result: Tensor = module(windows | {"hist_exog": None, "stat_exog": None}).flatten(1)
        return result

    return Public(module, batch, network, lambda: temporal[:, 0, :6])
