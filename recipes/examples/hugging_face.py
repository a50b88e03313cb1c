"""The penalty and the measurement in Hugging Face's Trainer: ``python -m recipes.examples.hugging_face``.

Token ids have no small perturbations; the inputs of a text classifier are therefore their embeddings.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from fisher_reg import FisherSpectralNorm, KLPenalty, LogitsOf
from recipes.examples.tasks import sentences


def logits_of_embeddings(module: nn.Module, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the logits ``(B, K)`` of embeddings ``(B, T, D)``."""
    result: Tensor = module(inputs_embeds=embeddings, attention_mask=attention_mask).logits
    return result


def function_and_inputs(model: Any, batch: dict[str, Tensor]) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """Return the function from embeddings to logits, the embeddings of a batch, and its side inputs."""
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    return LogitsOf(model, logits_of_embeddings), embeddings, {"attention_mask": batch["attention_mask"]}


class FisherTrainer(Trainer):
    """A Trainer that adds ``n * weight * penalty`` to the loss of each n-th step."""

    def __init__(self, *args: Any, weight: float = 0.001, every_n_steps: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # the step is in the unit of the embeddings, whose rows have a norm of about 0.02 * sqrt(32) = 0.1
        self.weight, self.every_n_steps, self.penalty = weight, every_n_steps, KLPenalty(step=0.05)
        self.model_accepts_loss_kwargs = False  # so that the Trainer divides by the number of accumulated batches

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Add the penalty in training."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if not model.training or self.weight == 0 or self.state.global_step % self.every_n_steps:
            return result
        function, embeddings, side_inputs = function_and_inputs(self.accelerator.unwrap_model(model), inputs)
        penalty = self.every_n_steps * self.weight * self.penalty(function, embeddings, side_inputs=side_inputs)
        return (result[0] + penalty, *result[1:]) if isinstance(result, tuple) else result + penalty


class LogLambda(TrainerCallback):
    """Log the mean λ_max of the evaluation examples after each epoch, as ``fisher/lambda_max_mean``."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, and add the number to the Trainer's logs."""
        model, metric = kwargs["model"], FisherSpectralNorm().to(self.trainer.args.device)
        for batch in self.trainer.get_eval_dataloader():
            metric.update(*function_and_inputs(model, batch))
        self.trainer.log({"fisher/lambda_max_mean": metric.compute().item()})


def main(weight: float = 0.001, num_epochs: int = 3) -> list[float]:
    """Train, and print the mean λ_max of the evaluation sentences after each epoch.

    Args:
        weight: Weight of the penalty; 0 for none.
        num_epochs: Number of passes over the training sentences.

    Returns:
        The values, one per epoch.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    model = BertForSequenceClassification(BertConfig(vocab_size=32, pad_token_id=0, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=num_epochs,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = FisherTrainer(
            model, args, train_dataset=sentences(1024, 0), eval_dataset=sentences(128, 1), weight=weight
        )
        trainer.add_callback(LogLambda(trainer))
        trainer.train()
    lambdas = [
        entry["fisher/lambda_max_mean"] for entry in trainer.state.log_history if "fisher/lambda_max_mean" in entry
    ]
    for epoch, value in enumerate(lambdas):
        print(f"epoch {epoch}: mean λ {value:.3g}")
    return lambdas


if __name__ == "__main__":
    main()
