import subprocess
import sys
from importlib import import_module

import pytorch_lightning as pl
import torch

from fisher_reg import FisherMonitor, FisherRegularizer

MODULE = """
import pytorch_lightning as pl
import torch
from torch import nn

class Classifier(pl.LightningModule):
    def __init__(self, width=6):
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Linear(width, 3)

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(8, 6, generator=generator), torch.arange(8) % 3)
        return torch.utils.data.DataLoader(data, batch_size=4)

    val_dataloader = train_dataloader
"""

ELSEWHERE = """
import sys
sys.modules["fisher_reg"] = None  # importing it raises ModuleNotFoundError
import pytorch_lightning as pl
import torch
from classifier_of_a_user import Classifier

checkpoint = torch.load("model.ckpt", weights_only=True)
loaded = Classifier.load_from_checkpoint("model.ckpt", weights_only=True)
torch.testing.assert_close(dict(loaded.state_dict()), dict(checkpoint["state_dict"]))
trainer = pl.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(Classifier(), ckpt_path="model.ckpt", weights_only=True)
print("epochs", trainer.current_epoch, "of it", [name for name in sys.modules if name.startswith("fisher_reg.")])
"""


def test_a_checkpoint_loads_and_resumes_where_the_package_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "classifier_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    module = import_module("classifier_of_a_user").Classifier()
    callbacks = [
        FisherMonitor(num_samples=4),
        FisherRegularizer(target_lambda=0.1, every_n_steps=1, batch_fraction=1.0),
    ]
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert len(checkpoint["FisherMonitor"]["fisher"]) == 2
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "epochs 3 of it []" in done.stdout
