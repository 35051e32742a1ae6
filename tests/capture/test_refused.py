"""What can't be exact is refused by name; wrong splits are caught."""

import pytest
import torch
from torch import nn

from lightning_ief import linearize, objectives
from lightning_ief.capture import rules
from lightning_ief.capture.factors import Dense
from lightning_ief.capture.plan import CaptureError
from tests.helpers import Function

SQUARES = objectives.LeastSquares()


def batch(samples=4, width=3):
    torch.manual_seed(0)
    return torch.randn(samples, width), torch.randn(samples, width)


def refuse(model, match):
    with pytest.raises(CaptureError, match=match) as caught:
        linearize(model, *batch(), SQUARES).jacobian.gram()
    assert all(type(p) is nn.Parameter for p in model.parameters())
    return str(caught.value)


def test_batch_norm_in_training():
    message = refuse(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "BatchNorm1d '1'")
    assert "eval()" in message and "GroupNorm" in message


def test_operations_across_samples():
    refuse(Function(lambda m, x: (x @ m.w) - (x @ m.w).mean(0), w=(3, 3)), "'w'.*samples of the batch influence")


def test_parameter_behind_the_captures_back():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            return x * 2 * w

        @staticmethod
        def backward(ctx, g):
            return None, 2 * g.sum(0)

    refuse(Function(lambda m, x: Double.apply(x, m.w), w=(3,)), "'w' gets a gradient, but announced no use")


def test_max_norm():
    model = Function(lambda m, x: nn.functional.embedding((x > 0).long()[:, 0], m.w, max_norm=1.0), w=(2, 3))
    with torch.no_grad():
        model.w.div_(10)
    refuse(model, "max_norm")


def test_rows_of_the_wrong_samples(monkeypatch):
    def wrong(operation, input, other):
        yield other, Dense((operation.cotangent * operation.split(input, input)).sum(2).roll(1, 1))

    monkeypatch.setitem(rules._rules, torch.Tensor.mul, wrong)
    body = lambda m, x: x * m.w  # noqa: E731
    refuse(Function(body, w=(3,)), "1 of 1 parameters: 'w'")
    linearize(Function(body, w=(3,)), *batch(), SQUARES, verify=False)


def test_no_trainable_parameter():
    with pytest.raises(ValueError, match="no trainable parameter"):
        linearize(nn.Linear(3, 3).requires_grad_(False), *batch(), SQUARES)


def test_empty_batch():
    with pytest.raises(ValueError, match="Empty batch"):
        linearize(nn.Linear(3, 3), torch.zeros(0, 3), torch.zeros(0, 3), SQUARES)


def test_logits_without_samples_in_front():
    with pytest.raises(ValueError, match="dimension 0 of the logits"):
        linearize(Function(lambda m, x: (x @ m.w).T, w=(3, 3)), *batch(), SQUARES)


@pytest.mark.parametrize(
    ("targets", "error"),
    [(torch.zeros(4), TypeError), (torch.zeros(4, 3).long(), ValueError), (torch.full((4,), 7), ValueError)],
)
def test_targets_that_do_not_fit(targets, error):
    with pytest.raises(error, match="CrossEntropy"):
        linearize(nn.Linear(3, 3), batch()[0], targets, objectives.CrossEntropy())
