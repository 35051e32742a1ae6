"""Strategies and precisions that are refused."""

from typing import Any
from unittest import mock

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_ief.training.refusals import require_supported_options, require_supported_strategy
from tests.helpers import Classifier
from tests.ranks import on_ranks
from tests.training.runs import fit, ief

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    ("strategy", "what"),
    [
        (FSDPStrategy(), "FSDPStrategy hides"),
        (mock.Mock(spec=DeepSpeedStrategy), "DeepSpeedStrategy|Mock"),
        (
            mock.Mock(spec=ModelParallelStrategy, device_mesh={"tensor_parallel": mock.Mock(size=lambda: 2)}),
            "tensor_parallel_size=2",
        ),
        (mock.Mock(spec=DDPStrategy, model=mock.Mock(static_graph=True)), "static_graph=True"),
    ],
    ids=["fsdp", "deepspeed", "tensor parallel", "static graph"],
)
def test_strategies_that_are_not_exact_are_refused(strategy: Any, what: str) -> None:
    with pytest.raises(MisconfigurationException, match=what):
        require_supported_strategy(strategy)


def test_static_graph_is_refused_before_the_first_batch() -> None:
    strategy = lambda: DDPStrategy(static_graph=True)  # noqa: E731
    with pytest.raises(AssertionError, match=r"MisconfigurationException: DDPStrategy\(static_graph=True\) waits"):
        on_ranks(2, lambda rank: fit(ief, 6, ranks=2, strategy=strategy()))
    on_ranks(2, lambda rank: fit(lambda p: torch.optim.SGD(p, lr=0.1), 6, ranks=2, strategy=strategy()))


@pytest.mark.parametrize(
    "plugin",
    [HalfPrecision("16-true"), mock.Mock(spec=Precision, precision="transformer-engine-float16")],
    ids=["16-true", "transformer engine"],
)
def test_fp16_that_nothing_scales_is_refused(plugin: Any) -> None:
    trainer = mock.Mock(
        precision=plugin.precision, precision_plugin=plugin, gradient_clip_val=None, accumulate_grad_batches=1,
        callbacks=[],
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match=f"precision='{plugin.precision}'.*Use '16-mixed' on a GPU"):
        require_supported_options(trainer)
    if plugin.precision == "16-true":
        with pytest.raises(MisconfigurationException, match="would lose small per-sample gradients"):
            fit(ief, 12, plugins=[plugin])


def test_hooks_that_are_never_called_are_told() -> None:
    class Habits(Classifier):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

    _, told = fit(ief, 6, max_epochs=1, kind=Habits)
    (told,) = [message for message in told if "not called" in message]
    assert told.startswith("Habits overrides hooks") and "max_norm" in told and "optimizer_step (an lr sch" in told
    assert not [message for message in fit(ief, 6, max_epochs=1)[1] if "not called" in message]
