"""The last layer of a BERT alone, on hidden states that the frozen layers below it have computed once."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_ief.tasks.extras import import_extra
from lightning_ief.tasks.glue import GlueDataModule
from lightning_ief.tasks.loaders import InMemoryDataModule
from lightning_ief.tasks.text import SequenceClassifier, TextModel

if TYPE_CHECKING:  # an extra that takes seconds to import
    from peft import PeftConfig

__all__ = ["HiddenStatesDataModule", "LastLayer"]

_Split = tuple[Tensor, Tensor, Tensor]
"""Hidden states [M, T, d], mask [M, T], classes [M]."""


class LastLayer(TextModel):
    """Last layer, pooler and classifier of a BERT, of which the first token's output is computed alone.

    The logits are those of the whole model where nothing below the last layer is trained. Without dropout in the
    attention and before the classifier.

    Args:
        num_labels: C, number of classes.
        model_name_or_path: A BERT on the Hugging Face hub, or its folder. A classifier that is missing is made anew.
        adapter: What to train, together with the classifier, instead of all weights of the layer: a configuration of
            PEFT, such as LoraConfig.

    """

    def __init__(self, num_labels: int, model_name_or_path: str, adapter: "PeftConfig | None" = None) -> None:
        super().__init__()
        net: Any = SequenceClassifier(num_labels, model_name_or_path, adapter=adapter).net
        whole = net if adapter is None else net.get_base_model()
        self.layer, self.pooler, self.classifier = whole.bert.encoder.layer[-1], whole.bert.pooler, whole.classifier
        self.num_classes = num_labels

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            hidden_states: What goes into the last layer, [N, T, d].
            attention_mask: [N, T], False for padding.

        Returns:
            Logits, [N, C].

        """
        first, attention = hidden_states[:, :1], self.layer.attention
        own = attention.self
        sides = own.query(first), own.key(hidden_states), own.value(hidden_states)
        q, k, v = (x.unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2) for x in sides)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask[:, None, None])
        attended = attention.output(mixed.transpose(1, 2).flatten(2), first)
        logits: Tensor = self.classifier(self.pooler(self.layer.output(self.layer.intermediate(attended), attended)))
        return logits

    def pose(self, inputs: dict[str, Tensor], classes: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and classes as they are."""
        return inputs, classes

    def scores(self, **inputs: Tensor) -> Tensor:
        """Log-probability of each class, [N, C]."""
        return torch.log_softmax(self(**inputs).float(), dim=-1)


class HiddenStatesDataModule(InMemoryDataModule):
    """A task of GLUE as hidden states: what goes into the last layer of a BERT whose other layers are frozen.

    Batches are (inputs, classes): a dictionary of `hidden_states`, float32 [N, T, d], and `attention_mask`, bool
    [N, T], cut to the longest of the batch; int64 [N]. They are computed once, and kept in a file whose name depends on
    the model's weights and the texts.

    Args:
        task: cola, sst2, mrpc, qqp, mnli, qnli or rte.
        model: Folder of the model and its tokenizer.
        source: Folder of the data, see `GlueDataModule`.
        cache: Folder of that file.
        max_length: Tokens at which an input is cut.
        batch_size: N, samples per batch; the last batch of an epoch may hold fewer.
        train_size: Number of training samples to train on, chosen by `seed`; all of them if None.
        seed: Seed of the subset and the order of the training samples.
        num_workers: Processes that load the data; the states are at hand, so 0 is fastest.
        order_seed: Seed of the order alone, which then leaves the subset as it is; `seed` if None.
        eval_batch_size: Samples per batch of validation and test; N if None.

    """

    def __init__(
        self,
        task: Literal["cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte"],
        model: str,
        source: str,
        cache: str,
        max_length: int = 48,
        batch_size: int = 32,
        train_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        order_seed: int | None = None,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, order_seed, eval_batch_size)
        self.text = GlueDataModule(task, model, source, "pair", 64, max_length, train_size, seed)
        self.num_classes, self.metrics = self.text.num_classes, self.text.metrics
        self.model = model
        self.cache = cache

    def prepare_data(self) -> None:
        """Compute what is not there yet; in one process only."""
        if (path := self._path()).is_file():
            return
        self.text.prepare_data()
        self.text.setup()
        auto = import_extra("transformers", "text", "HiddenStatesDataModule needs transformers").AutoModel
        model = auto.from_pretrained(self.model, dtype=torch.float32, local_files_only=True).eval()
        sets = {"train": self.text.train_set, "val": self.text.val_set, "test": getattr(self.text, "test_set", None)}
        found = {name: self._states(model, data) for name, data in sets.items() if data is not None}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".part")  # a run that is killed leaves no half file under the name
        torch.save(found, whole)
        whole.rename(path)

    def setup(self, stage: str | None = None) -> None:
        """Map the file into memory.

        Args:
            stage: What Lightning is about to do; the data are the same for all.
        """
        for name, split in torch.load(self._path(), mmap=True, weights_only=True).items():
            setattr(self, f"{name}_set", _States(split))

    def _path(self) -> Path:
        """Of the file, by all that the states depend on."""
        text = self.text
        digest = hashlib.sha256(repr((text.task, text.max_length, text.train_size, text.seed)).encode())
        for folder in (Path(self.model), Path(text.source, text.task)):
            for path in sorted(path for path in folder.iterdir() if path.is_file()):
                digest.update(path.name.encode() + path.read_bytes())
        return Path(self.cache, f"{digest.hexdigest()[:16]}.pt")

    @torch.no_grad()
    def _states(self, model: Any, data: Dataset[Any]) -> _Split:
        parts: list[_Split] = []
        for inputs, classes in DataLoader(data, self.text.batch_size):
            states = model(**inputs, output_hidden_states=True).hidden_states[-2]
            missing = self.text.max_length - states.shape[1]
            mask = F.pad(inputs["attention_mask"].bool(), (0, missing))
            parts.append((F.pad(states, (0, 0, 0, missing)), mask, classes))
        states, masks, classes = (torch.cat(part) for part in zip(*parts, strict=True))
        return states, masks, classes


class _States(Dataset[Any]):
    """Samples (inputs, class) which, taken together, are cut to the longest of them."""

    def __init__(self, split: _Split) -> None:
        self.states, self.masks, self.classes = split

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[dict[str, Tensor], Tensor]]:
        longest = int(self.masks[indices].sum(1).max())
        return [
            ({"hidden_states": self.states[n, :longest], "attention_mask": self.masks[n, :longest]}, self.classes[n])
            for n in indices
        ]
