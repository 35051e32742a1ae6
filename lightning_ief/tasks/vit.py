"""Vision transformers of timm, adapted by LoRA."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_ief.tasks.adapters import TrainableCheckpointMixin, trained_weights
from lightning_ief.tasks.classifier import Classifier
from lightning_ief.tasks.extras import import_extra
from lightning_ief.tasks.hub import MissingError, load
from lightning_ief.tasks.schedules import Schedule

__all__ = ["AdaptedClassifier", "split_qkv", "timm_lora", "timm_vit"]

_WEIGHTS = "model.safetensors"  # timm's file on the hub
Projection = Literal["q", "k", "v"]


class AdaptedClassifier(TrainableCheckpointMixin, Classifier):
    """A `Classifier` that trains what is not frozen, and whose checkpoints hold that alone.

    Args:
        net: The network; maps inputs to logits [N, num_classes].
        optimizer: Makes the optimizer from the trainable parameters: one of this package or any of torch.
        num_classes: Number of logits; more than there are classes if a pretrained classifier stays as it is.
        lr_scheduler: 'linear' or 'cosine', from lr down to 0 over all steps of the run; or makes the learning-rate
            scheduler from the optimizer, which is stepped after each epoch; or None for a constant lr.
        dropout: Whether dropout is active in training.
        warmup: Share of the run's steps in which lr rises from 0 before that; for 'linear', 'cosine' and None.

    Raises:
        ValueError: If schedule and warm-up do not go together.

    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        num_classes: int,
        lr_scheduler: Schedule = None,
        dropout: bool = True,
        warmup: float = 0.0,
    ) -> None:
        super().__init__(net, optimizer, num_classes, lr_scheduler, warmup)
        self.dropout = dropout

    def on_fit_start(self) -> None:
        """Switch dropout on or off."""
        self.net.train(self.dropout)


class _SplitLinear(nn.Module):
    """A fused projection to queries, keys and values as three, in the place of the one."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        self.q, self.k, self.v = (_part(fused, number) for number in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def _part(fused: nn.Linear, number: int) -> nn.Linear:
    width, weight = fused.out_features // 3, fused.weight
    part = nn.Linear(fused.in_features, width, fused.bias is not None, weight.device, weight.dtype)
    part.load_state_dict({name: whole.chunk(3)[number] for name, whole in fused.state_dict().items()})
    return part.requires_grad_(weight.requires_grad)


def split_qkv(model: nn.Module) -> nn.Module:
    """Split the fused projections of timm's attention into those of queries, keys and values.

    The outputs stay the same; q, k and v are layers of their own, which adapters can name.

    Args:
        model: A model of timm; changed in place.

    Returns:
        The model.

    Raises:
        ValueError: If it has no such projections.

    """
    attentions = [
        part
        for part in model.modules()
        # Attention with biases of its own uses the weights of its projection without calling it.
        if isinstance(getattr(part, "qkv", None), nn.Linear) and getattr(part, "q_bias", None) is None
    ]
    if not attentions:
        raise ValueError(
            f"split_qkv({type(model).__name__}): it has no attention with a linear layer 'qkv'. Use split_qkv=False "
            "for models that keep queries, keys and values in another way."
        )
    for attention in attentions:
        attention.qkv = _SplitLinear(cast(nn.Linear, attention.qkv))
    return model


def timm_vit(
    name: str,
    num_classes: int | None = None,
    pretrained: bool = True,
    checkpoint_path: str | None = None,
    img_size: int | None = None,
    split_qkv: bool = True,
    model_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a vision transformer of timm.

    Args:
        name: Its name in timm, such as vit_base_patch16_224.orig_in21k_ft_in1k.
        num_classes: Number of classes; those of the pretrained classifier if None. With another number the classifier
            is made anew, with random weights.
        pretrained: Whether to take pretrained weights from the Hugging Face hub, or its cache; random ones if not.
        checkpoint_path: A file with the pretrained weights, or the folder of a `model.safetensors`, instead of the hub;
            or a checkpoint (.ckpt) of a `Classifier` that trained such a model in full, with split_qkv=False.
        img_size: Height and width of the images; those of the pretrained model if None.
        split_qkv: Whether queries, keys and values get layers of their own (`split_qkv`).
        model_kwargs: Further options of timm's model, such as {"patch_size": 7, "in_chans": 1, "embed_dim": 96,
            "depth": 4, "num_heads": 3} for a small one of grey images.

    Returns:
        The model.

    Raises:
        MissingError: If weights are neither in the file, nor in the cache, nor to be had from the hub.
        ValueError: If timm has no such model, or no weights for it, or the checkpoint is of another one, or an option
            stands twice.

    """
    timm = _timm()
    config = _config(name)
    options = {**(model_kwargs or {})}
    if twice := options.keys() & {"num_classes", "img_size", "pretrained", "checkpoint_path"}:
        raise ValueError(
            f"timm_vit(model_kwargs={model_kwargs}): give {', '.join(sorted(twice))} beside it, not in it."
        )
    if num_classes is not None:
        options["num_classes"] = num_classes
    if img_size is not None:
        options["img_size"] = img_size
    source: dict[str, Any] = {}
    if pretrained or checkpoint_path is not None:
        # Found before the model is made, which takes seconds.
        file = _weights(name, config, checkpoint_path)
        source = {"state_dict": trained_weights(file)} if file.suffix == ".ckpt" else {"file": str(file)}
        options |= {"pretrained": True, "pretrained_cfg_overlay": source}
    model: nn.Module = timm.create_model(name, **options)
    # timm takes no offence at missing weights where the number of classes differs.
    if (found := source.get("state_dict")) is not None:
        missing = [key for key in model.state_dict() if key not in found and not key.startswith(config.classifier)]
        if missing:
            raise ValueError(
                f"timm_vit(checkpoint_path={checkpoint_path}): the run trained another model, or not in full, or with "
                f"split_qkv=True: {len(missing)} weights are missing, such as {missing[0]}."
            )
    return _split(model) if split_qkv else model


def timm_lora(
    name: str,
    num_classes: int | None = None,
    pretrained: bool = True,
    checkpoint_path: str | None = None,
    img_size: int | None = None,
    split_qkv: bool = True,
    projections: list[Projection] | None = None,
    train_head: bool = False,
    r: int = 8,
    lora_alpha: int = 8,
    lora_dropout: float = 0.1,
    bias: Literal["none", "all", "lora_only"] = "lora_only",
    model_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a vision transformer of timm with LoRA on its attention; everything else is frozen.

    The defaults are those of the paper: for ViT-B/16, r = 8 on q and v and their biases are 313,344 parameters. The
    classifier is not among them: the paper's code keeps the pretrained one for 1,000 classes.

    Args:
        name: Its name in timm, such as vit_base_patch16_224.orig_in21k_ft_in1k.
        num_classes: Number of classes; those of the pretrained classifier if None. With another number the classifier
            is made anew, with random weights, and has to be trained.
        pretrained: Whether to take pretrained weights from the Hugging Face hub, or its cache; random ones if not.
        checkpoint_path: A file with the pretrained weights, or the folder of a `model.safetensors`, instead of the hub;
            or a checkpoint (.ckpt) of a `Classifier` that trained such a model in full, with split_qkv=False.
        img_size: Height and width of the images; those of the pretrained model if None.
        split_qkv: Whether queries, keys and values get adapters of their own; one for all three if not.
        projections: Which of q, k and v are adapted; q and v if None, or all that is fused.
        train_head: Whether the classifier is trained, too.
        r: Rank of the adapters.
        lora_alpha: α; the change of the weights is α/r · B A.
        lora_dropout: Probability of dropout at the inputs of the adapters.
        bias: Which biases are trained: none, all, or lora_only, those of the adapted layers.
        model_kwargs: Further options of timm's model, see `timm_vit`.

    Returns:
        The model, a `peft.PeftModel`.

    Raises:
        ValueError: If there is no classifier, or a new one would stay random, or q, k and v are told apart without
            being split.

    """
    peft = import_extra("peft", "vit", "Vision transformers need peft")
    chosen = projections or (["q", "v"] if split_qkv else ["q", "k", "v"])
    if not split_qkv and {*chosen} != {"q", "k", "v"}:
        raise ValueError(f"timm_lora(split_qkv=False, projections={projections}): fused projections have one adapter.")
    classes = _config(name).num_classes
    if num_classes is None and not classes:
        raise ValueError(f"timm_lora('{name}'): it has no classifier; set num_classes, and train_head=True.")
    new_head = num_classes is not None and num_classes != classes
    if new_head and not train_head and (pretrained or checkpoint_path is not None):
        raise ValueError(
            f"timm_lora(num_classes={num_classes}): the pretrained classifier is for {classes} classes, so that a new "
            "one has to be trained: set train_head=True."
        )
    model = timm_vit(name, num_classes, pretrained, checkpoint_path, img_size, split_qkv, model_kwargs)
    config = peft.LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        bias=bias,
        target_modules=rf".*\.qkv\.({'|'.join(chosen)})" if split_qkv else r".*\.qkv",
        modules_to_save=["head"] if train_head else None,
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    if new_head and train_head:
        # PEFT keeps the head that was there before: random, unused, and it would make backbones differ by their seeds.
        for parameter in adapted.get_submodule("base_model.model.head.original_module").parameters():
            nn.init.zeros_(parameter)
    return adapted


_split = split_qkv  # the name is that of an option, too


def _timm() -> Any:
    return import_extra("timm", "vit", "Vision transformers need timm")


def _config(name: str) -> Any:
    timm = _timm()
    if not timm.is_model(name):
        similar = get_close_matches(name, timm.list_models())
        raise ValueError(f"timm has no model '{name}'" + (f"; similar are {similar}." if similar else "."))
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise ValueError(f"timm has no weights '{name}'; there are {tags}.") from error


def _weights(name: str, config: Any, checkpoint_path: str | None) -> Path:
    """The file of the pretrained weights."""
    if checkpoint_path is not None:
        path = Path(checkpoint_path).expanduser()
        file = path / _WEIGHTS if path.is_dir() else path
        if not file.is_file():
            raise MissingError(f"checkpoint_path={checkpoint_path}: there is no file {file}.")
        return file
    if not config.hf_hub_id:
        raise ValueError(f"timm has no pretrained weights for '{name}'; set pretrained=False for random ones.")
    from huggingface_hub import hf_hub_download

    return Path(load(hf_hub_download, config.hf_hub_id, _WEIGHTS, option="checkpoint_path"))
