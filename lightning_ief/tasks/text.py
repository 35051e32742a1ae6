"""Text classification with transformers: T5 that answers by a word, and models that end in a classifier."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassMatthewsCorrCoef

from lightning_ief.module import NaturalGradientMixin
from lightning_ief.objectives import CrossEntropy
from lightning_ief.tasks.adapters import TrainableCheckpointMixin
from lightning_ief.tasks.extras import import_extra
from lightning_ief.tasks.pretrained import adapted, pretrained, require_one
from lightning_ief.tasks.schedules import Schedule, configured, require_schedule

if TYPE_CHECKING:  # extras that take seconds to import
    from peft import PeftConfig
    from transformers import PretrainedConfig

__all__ = ["SequenceClassifier", "T5Classifier", "TextClassifier", "TextModel"]

Inputs = dict[str, Tensor]
_IGNORED = -100


class TextModel(nn.Module, ABC):
    """A network that tells classes of texts apart, trained on logits of its own kind.

    Attributes:
        num_classes: C; None while the data have not said it.

    """

    num_classes: int | None = None

    def adopt(self, data: Any) -> None:
        """Take from the data what only they know; called before each training or evaluation.

        Args:
            data: The data module, such as GlueDataModule; None if there is none.

        """

    @abstractmethod
    def pose(self, inputs: Inputs, classes: Tensor) -> tuple[Inputs, Tensor]:
        """Say what the network is trained on.

        Args:
            inputs: What the tokenizer returns, [N, T].
            classes: int64 [N].

        Returns:
            Arguments of `forward`, and targets for cross-entropy on its logits.

        """

    @abstractmethod
    def scores(self, **inputs: Tensor) -> Tensor:
        """Log-probability of each class, up to a constant for T5: other words have a share, too.

        Args:
            **inputs: What the tokenizer returns, [N, T].

        Returns:
            [N, C].

        """


class T5Classifier(TextModel):
    """T5 that answers by a word for each class.

    Trained with cross-entropy over the whole vocabulary on the tokens of the right word (the end of text included, if
    the tokens have it); a class scores the log-probability of its word, summed over the word's tokens, so that the
    prediction is restricted to the words.

    Args:
        model_name_or_path: Id on the Hugging Face hub, or a folder.
        config: Instead: arguments of transformers' T5Config, for random weights.
        adapter: What to train instead of all weights: a configuration of PEFT, such as PromptTuningConfig or
            LoraConfig. Its task_type is set, and num_transformer_submodules to 1: of PEFT's 2 prompts for
            encoder-decoders, only the encoder's is used.
        label_tokens: Tokens of each class's word; those of the data module (its attribute `label_tokens`) if None.

    Attributes:
        net: The model of transformers, or PEFT's around it.

    Raises:
        ValueError: If not exactly one of model_name_or_path and config is given, or the config has an unknown key.

    """

    label_tokens: Tensor

    def __init__(
        self,
        model_name_or_path: str | None = None,
        config: dict[str, Any] | None = None,
        adapter: "PeftConfig | None" = None,
        label_tokens: list[list[int]] | None = None,
    ) -> None:
        super().__init__()
        transformers = import_extra("transformers", "text", "T5Classifier needs transformers")
        require_one("T5Classifier", model_name_or_path, config)
        if model_name_or_path is not None:
            net = pretrained(transformers.T5ForConditionalGeneration, "T5Classifier", model_name_or_path)
        else:
            net = transformers.T5ForConditionalGeneration(_t5_config(transformers.T5Config, config or {}))
        if adapter is not None:
            adapter = copy.copy(adapter)
            if getattr(adapter, "num_transformer_submodules", 1) is None:
                adapter.num_transformer_submodules = 1  # type: ignore[attr-defined]  # of prompts
            net = adapted(net, adapter, "SEQ_2_SEQ_LM")
        self.net: Any = net
        self._takes_prompt = adapter is not None
        # Weights that were loaded are not to be started anew.
        self.register_load_state_dict_post_hook(T5Classifier._keep_prompt)
        self._knows_labels = label_tokens is not None
        if label_tokens is not None:
            self._set_labels(label_tokens)

    def _keep_prompt(self, keys: Any) -> None:
        self._takes_prompt = False

    def _set_labels(self, label_tokens: Sequence[Sequence[int]]) -> None:
        tokens = [torch.tensor(each) for each in label_tokens]
        padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=_IGNORED)
        device = next(self.parameters()).device
        self.register_buffer("label_tokens", padded.to(device), persistent=False)
        self.num_classes = len(padded)

    def adopt(self, data: Any) -> None:
        """Take the label words, and what a prompt starts from.

        Args:
            data: Its attributes are `label_tokens` and, if the prompt is to start from a text, `prompt_tokens`.

        Raises:
            MisconfigurationException: If nobody says what the label words are.

        """
        if not self._knows_labels:
            found = getattr(data, "label_tokens", None)
            if found is None:
                raise MisconfigurationException(
                    "T5Classifier does not know the label words: give it label_tokens=[[...], ...], a list of tokens "
                    "for each class, or train with a data module that has such an attribute, as GlueDataModule."
                )
            self._set_labels(found)
        tokens = getattr(data, "prompt_tokens", None)
        if self._takes_prompt and tokens:
            for encoder in getattr(self.net, "prompt_encoder", {}).values():
                # As PEFT does with a text: repeated to the prompt's length.
                weight = encoder.embedding.weight
                repeated = torch.tensor(tokens, device=weight.device).repeat(-(-len(weight) // len(tokens)))
                with torch.no_grad():
                    weight.copy_(self.net.get_input_embeddings()(repeated[: len(weight)]))
        self._takes_prompt = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Compute the logits of the next token at each position of the answer.

        Args:
            input_ids: [N, T].
            attention_mask: [N, T], 0 for padding.
            decoder_input_ids: The answer, moved one to the right; [N, A].

        Returns:
            Logits, [N, A, V].

        """
        logits: Tensor = self._run(input_ids, attention_mask, decoder_input_ids).logits
        return logits

    def _run(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, **options: Any) -> Any:
        return self.net(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
            **options,
        )

    def pose(self, inputs: Inputs, classes: Tensor) -> tuple[Inputs, Tensor]:
        """Put the right word where the answer is.

        Args:
            inputs: input_ids and attention_mask, [N, T].
            classes: int64 [N].

        Returns:
            Arguments of `forward`, and the tokens of the right word, [N, A], −100 after its end.

        """
        words = self.label_tokens[classes]
        return {**inputs, "decoder_input_ids": self.net.prepare_decoder_input_ids_from_labels(words)}, words

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        """Log-probability of each class's word.

        Args:
            input_ids: [N, T].
            attention_mask: [N, T], 0 for padding.

        Returns:
            [N, C]; the probabilities sum to less than 1, since other words have a share.

        """
        encoded: dict[str, Any] = {}
        scores = []
        for word in self.label_tokens:
            words = word.expand(len(input_ids), -1)
            seen = self.net.prepare_decoder_input_ids_from_labels(words)
            output = self._run(input_ids, attention_mask, seen, **encoded)
            encoded = {"encoder_outputs": (output.encoder_last_hidden_state,)}  # the same for all words
            scores.append(-CrossEntropy().losses(output.logits, words))
        return torch.stack(scores, dim=1)


class SequenceClassifier(TextModel):
    """Any model of transformers that ends in a classifier, `AutoModelForSequenceClassification`.

    Args:
        num_labels: C, number of classes.
        model_name_or_path: Id on the Hugging Face hub, or a folder. A classifier that is missing there is made anew.
        config: Instead: `model_type` and arguments of its configuration, for random weights.
        adapter: What to train, together with the classifier, instead of all weights: a configuration of PEFT, such as
            LoraConfig. Its task_type is set.

    Attributes:
        net: The model of transformers, or PEFT's around it.

    Raises:
        ValueError: If not exactly one of model_name_or_path and config is given, or there are fewer than two classes.

    """

    def __init__(
        self,
        num_labels: int,
        model_name_or_path: str | None = None,
        config: dict[str, Any] | None = None,
        adapter: "PeftConfig | None" = None,
    ) -> None:
        super().__init__()
        transformers = import_extra("transformers", "text", "SequenceClassifier needs transformers")
        require_one("SequenceClassifier", model_name_or_path, config)
        if num_labels < 2:
            raise ValueError(f"SequenceClassifier(num_labels={num_labels}): must be at least 2.")
        auto = transformers.AutoModelForSequenceClassification
        if model_name_or_path is not None:
            net = pretrained(auto, "SequenceClassifier", model_name_or_path, num_labels=num_labels)
        else:
            if "model_type" not in (config or {}):
                raise ValueError(
                    f"SequenceClassifier(config={config}): has no model_type, such as bert; there are those of "
                    "transformers.AutoConfig."
                )
            net = auto.from_config(transformers.AutoConfig.for_model(**{**(config or {}), "num_labels": num_labels}))
        self.net = net if adapter is None else adapted(net, adapter, "SEQ_CLS")
        self.num_classes = num_labels

    def adopt(self, data: Any) -> None:
        """Compare the number of classes.

        Args:
            data: With an attribute `num_classes`, if it knows.

        Raises:
            MisconfigurationException: If it is another one.

        """
        if (found := getattr(data, "num_classes", self.num_classes)) != self.num_classes:
            raise MisconfigurationException(
                f"SequenceClassifier(num_labels={self.num_classes}): the data have {found} classes. Set "
                f"num_labels={found}."
            )

    def forward(self, **inputs: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            **inputs: What the tokenizer returns, [N, T].

        Returns:
            Logits, [N, C].

        """
        logits: Tensor = self.net(**inputs).logits
        return logits

    def pose(self, inputs: Inputs, classes: Tensor) -> tuple[Inputs, Tensor]:
        """Inputs and classes as they are.

        Args:
            inputs: What the tokenizer returns, [N, T].
            classes: int64 [N].

        Returns:
            The same.

        """
        return inputs, classes

    def scores(self, **inputs: Tensor) -> Tensor:
        """Log-probability of each class.

        Args:
            **inputs: What the tokenizer returns, [N, T].

        Returns:
            [N, C].

        """
        return torch.log_softmax(self(**inputs).float(), dim=-1)


class TextClassifier(TrainableCheckpointMixin, NaturalGradientMixin, L.LightningModule):
    """Trains a network to tell classes of texts apart.

    Batches are (inputs, classes): a dictionary of what the tokenizer returns, each [N, T], and int64 [N], as those of
    GlueDataModule. Logs `train/loss`, `val/loss` and `test/loss` (mean over samples of −log p of the right class, or
    word, in nats), and of the metrics that the data name, `val/accuracy` (share of samples, 0 to 1), `val/f1` (of
    class 1, 0 to 1) and `val/matthews` (−1 to 1); the same for test.

    Args:
        net: The network: T5Classifier, SequenceClassifier, or a TextModel of your own.
        optimizer: Makes the optimizer from the trainable parameters: one of this package or any other.
        lr_scheduler: 'linear' or 'cosine', from lr down to 0 over all steps of the run; or makes the learning-rate
            scheduler from the optimizer, which is stepped after each epoch; or None for a constant lr.
        dropout: Whether dropout is active in training.
        metrics: accuracy, f1, matthews; those of the data module (its attribute `metrics`) if None, or else accuracy.
        warmup: Share of the run's steps in which lr rises from 0 before that; for 'linear', 'cosine' and None.

    Raises:
        ValueError: If schedule and warm-up do not go together.

    """

    def __init__(
        self,
        net: TextModel,
        optimizer: OptimizerCallable,
        lr_scheduler: Schedule = None,
        dropout: bool = True,
        metrics: list[Literal["accuracy", "f1", "matthews"]] | None = None,
        warmup: float = 0.0,
    ) -> None:
        super().__init__()
        require_schedule(lr_scheduler, warmup)
        self.net = net
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup = warmup
        self.dropout = dropout
        self.metric_names = metrics
        self.objective = CrossEntropy()
        self.metrics = nn.ModuleDict()

    def setup(self, stage: str) -> None:
        """Take from the data what only they know.

        Args:
            stage: What Lightning is about to do; the same for all.

        Raises:
            MisconfigurationException: If the network does not fit the data.

        """
        data = getattr(self.trainer, "datamodule", None)
        self.net.adopt(data)
        names = self.metric_names or getattr(data, "metrics", ["accuracy"])
        metrics = MetricCollection({name: _metric(name, self.net.num_classes) for name in names})
        self.metrics = nn.ModuleDict({stage: metrics.clone(prefix=f"{stage}/") for stage in ("val", "test")})

    def unpack_batch(self, batch: Any) -> tuple[Inputs, Tensor]:
        """Split a batch into what the network takes and what it is trained on.

        Args:
            batch: (inputs, classes).

        Returns:
            Arguments of `forward`, and targets.

        """
        return self.net.pose(*super().unpack_batch(batch))

    def forward(self, **inputs: Tensor) -> Tensor:
        """Compute the logits that the network is trained on.

        Args:
            **inputs: Arguments of the network.

        Returns:
            Logits, [N, ..., C].

        """
        logits: Tensor = self.net(**inputs)
        return logits

    def on_fit_start(self) -> None:
        """Switch dropout on or off: networks come with their modules in either mode."""
        self.net.train(self.dropout)

    def validation_step(self, batch: tuple[Inputs, Tensor], batch_idx: int) -> None:
        """Log `val/loss` and the metrics.

        Args:
            batch: (inputs, classes).
            batch_idx: Number of the batch.

        """
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Inputs, Tensor], batch_idx: int) -> None:
        """Log `test/loss` and the metrics.

        Args:
            batch: (inputs, classes).
            batch_idx: Number of the batch.

        """
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Inputs, Tensor], stage: str) -> None:
        inputs, classes = batch
        scores = self.net.scores(**inputs)
        self.log(f"{stage}/loss", -scores.gather(1, classes[:, None]).mean(), batch_size=len(classes))
        metrics = cast(MetricCollection, self.metrics[stage])
        metrics(scores.argmax(1), classes)
        self.log_dict(metrics, batch_size=len(classes), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and, if there is one, the scheduler.

        Returns:
            What Lightning expects.

        """
        return configured(self, self.optimizer, self.lr_scheduler, self.warmup)


def _metric(name: str, num_classes: int | None) -> Metric:
    assert num_classes is not None
    if name == "accuracy":
        return MulticlassAccuracy(num_classes, average="micro")
    if name == "f1":
        if num_classes != 2:
            raise MisconfigurationException(f"The metric f1 is of two classes, there are {num_classes}.")
        return BinaryF1Score()
    return MulticlassMatthewsCorrCoef(num_classes)


def _t5_config(kind: "type[PretrainedConfig]", values: dict[str, Any]) -> "PretrainedConfig":
    if unknown := sorted(values.keys() - kind().to_dict().keys()):
        raise ValueError(f"T5Classifier(config=...): T5Config knows no {', '.join(unknown)}.")
    # Not in the configuration's own defaults, but in those of all published T5 models.
    return kind(**{"decoder_start_token_id": 0, **values})
