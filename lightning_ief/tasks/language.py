"""Causal language models of transformers: which token comes next."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_ief.capture.linearization import logits_of
from lightning_ief.module import NaturalGradientMixin
from lightning_ief.objectives import CrossEntropy
from lightning_ief.tasks.adapters import TrainableCheckpointMixin, trained_weights
from lightning_ief.tasks.extras import import_extra
from lightning_ief.tasks.pretrained import adapted, pretrained, require_one
from lightning_ief.tasks.schedules import Schedule, configured, require_schedule
from lightning_ief.training.repeated_samples import without_repeated

if TYPE_CHECKING:  # an extra that takes seconds to import
    from peft import PeftConfig

__all__ = ["LanguageModel", "causal_lm", "next_token_targets"]

_IGNORED = -100


def next_token_targets(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Shift tokens to where they are predicted: targets for the logits [N, T, V] of a causal language model.

    Models of transformers take labels that stand where the tokens do, and shift them within their own loss. Here the
    loss is of logits and targets, so that the shift is made before it, once: the logits at t predict token t + 1. The
    last position predicts nothing; neither does padding, nor is it predicted.

    Args:
        labels: What transformers calls `labels`, or the `input_ids` themselves; int64 [N, T], −100 where a token is not
            to be learnt, such as that of a question.
        attention_mask: [N, T], 0 for padding, on whichever side it stands. Without it, labels have to be −100 there.

    Returns:
        int64 [N, T], −100 where nothing counts.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> next_token_targets(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
        tensor([[   6,    7, -100],
                [   9, -100, -100]])

    """
    if labels.ndim != 2 or (attention_mask is not None and attention_mask.shape != labels.shape):  # noqa: PLR2004
        mask = "" if attention_mask is None else f", an attention_mask {tuple(attention_mask.shape)}"
        raise ValueError(
            f"next_token_targets takes labels [N, T] and a mask like them, got {tuple(labels.shape)}{mask}."
        )
    targets = labels.roll(-1, dims=1).long()
    targets[:, -1:] = _IGNORED
    if attention_mask is not None:
        real = attention_mask != 0
        targets.masked_fill_(~(real & real.roll(-1, dims=1)), _IGNORED)
    return targets


def causal_lm(
    model_name_or_path: str | None = None,
    config: dict[str, Any] | None = None,
    adapter: "PeftConfig | None" = None,
    checkpoint_path: str | None = None,
) -> nn.Module:
    """Make a causal language model of transformers, with an adapter of PEFT if one is given.

    Args:
        model_name_or_path: Id on the Hugging Face hub, or a folder.
        config: Instead: model_type, such as gpt2, and arguments of its configuration, for random weights.
        adapter: What to train instead of all weights: a configuration of PEFT, such as LoraConfig.
        checkpoint_path: Beside config: the checkpoint (.ckpt) of a `LanguageModel` that trained all weights of such a
            model.

    Returns:
        The model, or a `peft.PeftModel` around it.

    Raises:
        MissingError: If weights are not to be had.
        ValueError: If not exactly one of model_name_or_path and config is given, the config has no model_type, or the
            checkpoint is of another model.

    Example:
        >>> shape = {"model_type": "gpt2", "vocab_size": 384, "n_embd": 16, "n_layer": 1, "n_head": 2}
        >>> type(causal_lm(config=shape)).__name__
        'GPT2LMHeadModel'

    """  # noqa: DOC502  # raised by pretrained, require_one and trained_weights
    transformers = import_extra("transformers", "text", "causal_lm needs transformers")
    require_one("causal_lm", model_name_or_path, config)
    auto = transformers.AutoModelForCausalLM
    if model_name_or_path is not None:
        if checkpoint_path is not None:
            raise ValueError(
                f"causal_lm(model_name_or_path={model_name_or_path!r}, checkpoint_path={checkpoint_path!r}): give "
                "config beside a checkpoint, which has weights alone."
            )
        net: Any = pretrained(auto, "causal_lm", model_name_or_path)
    else:
        if "model_type" not in (config or {}):
            raise ValueError(
                f"causal_lm(config={config}): has no model_type, such as gpt2; there are those of "
                "transformers.AutoConfig."
            )
        net = auto.from_config(transformers.AutoConfig.for_model(**(config or {})))
        if checkpoint_path is not None:
            _load(net, checkpoint_path)
    made: nn.Module = net if adapter is None else adapted(net, adapter, "CAUSAL_LM")
    return made


def _load(net: nn.Module, checkpoint_path: str) -> None:
    found = trained_weights(Path(checkpoint_path))
    own = net.state_dict()
    differ = [
        name for name in {**own, **found} if getattr(own.get(name), "shape", 0) != getattr(found.get(name), "shape", 1)
    ]
    if differ:
        raise ValueError(
            f"causal_lm(checkpoint_path={checkpoint_path!r}): the run trained a model of another config, or not in "
            f"full: {len(differ)} weights are missing or of another shape, such as {differ[0]}."
        )
    net.load_state_dict(found)


class LanguageModel(TrainableCheckpointMixin, NaturalGradientMixin, L.LightningModule):
    """Trains a causal language model.

    Batches are dictionaries as transformers has them: input_ids [N, T]; attention_mask, 0 for padding; labels, where
    other tokens are to be learnt than all, not shifted, −100 for those that are not; and whatever else the model takes.
    A sample is a text: l_n is the sum over its tokens of −log p in nats.

    Logs `train/loss` and `val/loss`, means over samples as everywhere, `train/loss_per_token` and `val/loss_per_token`,
    means over tokens that are predicted (those of the model's own loss in transformers), and `val/perplexity`, its
    exponential; the same for test.

    Args:
        net: The model: `causal_lm`, or any module that takes the inputs by name and returns logits [N, T, V] or an
            object with `.logits`.
        optimizer: Makes the optimizer from the trainable parameters: one of this package or any other.
        lr_scheduler: 'linear' or 'cosine', from lr down to 0 over all steps of the run; or makes the learning-rate
            scheduler from the optimizer, which is stepped after each epoch; or None for a constant lr.
        dropout: Whether dropout is active in training.
        warmup: Share of the run's steps in which lr rises from 0 before that; for 'linear', 'cosine' and None.

    Raises:
        ValueError: If schedule and warm-up do not go together.

    """  # noqa: DOC502  # raised by require_schedule

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: Schedule = None,
        dropout: bool = True,
        warmup: float = 0.0,
    ) -> None:
        super().__init__()
        require_schedule(lr_scheduler, warmup)
        self.net = net
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup = warmup
        self.dropout = dropout
        self.objective = CrossEntropy()
        self.per_token = nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})

    def unpack_batch(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Split a batch into what the model takes and the next tokens.

        Args:
            batch: As transformers has it.

        Returns:
            Arguments of `forward`, and targets [N, T].

        """
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        return inputs, next_token_targets(
            batch["labels"] if "labels" in batch else batch["input_ids"], inputs.get("attention_mask")
        )

    def forward(self, **inputs: Tensor) -> Tensor:
        """Compute the logits of the next token at each position.

        Args:
            **inputs: What the model takes, [N, T].

        Returns:
            Logits, [N, T, V].

        """
        return logits_of(self.net(**inputs))

    def on_fit_start(self) -> None:
        """Switch dropout on or off: models come with their modules in either mode."""
        self.net.train(self.dropout)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor | None:
        """One update on one batch; logs `train/loss` and `train/loss_per_token`.

        Args:
            batch: As transformers has it.
            batch_idx: Its number within the epoch.

        Returns:
            The mean loss of a sample, None if the step was skipped.

        """
        loss = super().training_step(batch, batch_idx)
        if loss is None:
            return None
        _, targets = without_repeated(self.trainer, *self.unpack_batch(batch))
        counts = torch.stack([targets.new_tensor(len(targets)), (targets != _IGNORED).sum()])
        if self.trainer.world_size > 1:  # the loss is of all ranks
            counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
        samples, tokens = counts  # on the device, for which the host need not wait
        per_token = loss * samples / tokens.clamp(min=1)
        self.log("train/loss_per_token", per_token, prog_bar=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log `val/loss`, and what is told at the end of the epoch.

        Args:
            batch: As transformers has it.
            batch_idx: Number of the batch.

        """
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log `test/loss`, and what is told at the end of the epoch.

        Args:
            batch: As transformers has it.
            batch_idx: Number of the batch.

        """
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss_per_token` and `val/perplexity`."""
        self._summarise("val")

    def on_test_epoch_end(self) -> None:
        """Log `test/loss_per_token` and `test/perplexity`."""
        self._summarise("test")

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str) -> None:
        inputs, targets = self.unpack_batch(batch)
        losses, tokens = self.objective.losses(self(**inputs), targets), (targets != _IGNORED).sum()
        self.log(f"{stage}/loss", losses.mean(), batch_size=len(losses))
        if tokens:
            cast(MeanMetric, self.per_token[stage]).update(losses.sum() / tokens, tokens)

    def _summarise(self, stage: str) -> None:
        # Not torchmetrics' Perplexity: it goes by probabilities in float32, and is infinite where one underflows.
        mean = cast(MeanMetric, self.per_token[stage])
        per_token = mean.compute()
        self.log(f"{stage}/loss_per_token", per_token)
        self.log(f"{stage}/perplexity", per_token.exp(), prog_bar=True)
        mean.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and, if there is one, the scheduler.

        Returns:
            What Lightning expects.

        """
        return configured(self, self.optimizer, self.lr_scheduler, self.warmup)
