"""Losses of one's own: one method is enough, what contradicts it is refused on the first batch."""

import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ief import IEF, NaturalGradientMixin, directions, gamma, linearize, objectives
from lightning_ief.objectives import Objective
from tests.helpers import assert_exact, flatten, relative_error, small_network

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
REAL = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


class Own(Objective):
    """Cross entropy, written as whoever has read no more than `losses` would write it."""

    def losses(self, z, y):
        return nn.functional.cross_entropy(z, y, reduction="none")


class LogCosh(Objective):
    def losses(self, z, y):
        return torch.cosh(z - y).log().flatten(1).sum(1)


class Confident(objectives.CrossEntropy):
    """A subclass of one with formulas that overrides `losses` alone."""

    def losses(self, z, y):
        return super().losses(z, y) + 0.5 * z.square().sum(-1)


def double(model=None):
    return (model or small_network()).double()


def test_one_method_is_enough():
    """Directions, γ and rows are those of the objective that has formulas for the same loss."""
    model = double()
    own, written = (linearize(model, X.double(), Y, objective) for objective in (Own(), objectives.CrossEntropy()))
    assert relative_error(own.logit_gradients, written.logit_gradients) < 1e-12
    for find in (
        lambda lin: directions.ief(lin, 1e-3),
        lambda lin: directions.natural_gradient(lin, 1e-3),
        lambda lin: directions.gauss_newton(lin, 1e-3),
    ):
        d, expected = find(own), find(written)
        assert relative_error(flatten(d), flatten(expected)) < 1e-7
        assert float(gamma(own, d)) == pytest.approx(float(gamma(written, expected)), rel=1e-7)
    assert relative_error(flatten(own.fisher_product(d)), flatten(written.fisher_product(d))) < 1e-10


def test_rows_of_a_loss_that_nobody_else_has():
    assert_exact(double(), X.double(), REAL.double(), LogCosh())


def test_a_piecewise_linear_loss_has_no_curvature():
    class Absolute(Objective):
        def losses(self, z, y):
            return (z - y).abs().sum(1)

    lin = linearize(double(), X.double(), REAL.double(), Absolute())
    assert (lin.logit_gradients.abs() == 1).all()
    assert Absolute().hessian_form(lin.logits, lin.targets, torch.ones_like(lin.logits)).eq(0).all()
    with pytest.raises(ValueError, match=r"Hessian of Absolute does not span the gradient of sample 0.*take IEF"):
        directions.natural_gradient(lin, 1e-3)


def test_what_losses_do_not_say_is_refused_by_name():
    lin = linearize(double(), X.double(), Y, Own())
    with pytest.raises(NotImplementedError, match=r"Write Own\.sample\(logits, targets, generator\)"):
        directions.sampled_fisher(lin, 1e-3)


def test_a_hessian_that_is_no_fisher_matrix_is_refused_by_name():
    class Welsch(Objective):
        def losses(self, z, y):
            return (1 - torch.exp(-(z - y).square())).sum(1)

    lin = linearize(double(), X.double(), 4 + REAL.double(), Welsch())
    d = directions.ief(lin, 1e-3)  # needs the gradient alone
    assert torch.isfinite(flatten(d)).all()
    for refused in (lambda: gamma(lin, d), lambda: directions.natural_gradient(lin, 1e-3)):
        with pytest.raises(ValueError, match="Hessian of Welsch is not positive semidefinite"):
            refused()


@pytest.mark.parametrize("kind", [Confident, type("Deeper", (Confident,), {})])
def test_a_subclass_that_overrides_losses_alone_has_the_rest_from_autograd(kind):
    lin = assert_exact(double(), X.double(), Y, kind())
    z = lin.logits
    assert relative_error(lin.logit_gradients, torch.softmax(z, 1) - nn.functional.one_hot(Y, 3) + z) < 1e-12
    u = torch.randn_like(z)
    expected = objectives.CrossEntropy().hessian_product(z, Y, u) + u
    assert relative_error(kind().hessian_product(z, Y, u), expected) < 1e-12
    with pytest.raises(NotImplementedError, match=r"Write \w+\.sample"):
        lin.sample()
    with pytest.raises(ValueError, match="one class"):  # what does not depend on the losses is inherited
        kind().validate(torch.zeros(2, 1), torch.zeros(2).long())


def test_a_mixin_that_overrides_losses_has_the_rest_from_autograd():
    class Squares:
        def losses(self, z, y):
            return z.square().sum(-1)

    class Mixed(Squares, objectives.CrossEntropy):
        pass

    assert Mixed.gradient is Objective.gradient
    assert torch.equal(Mixed().gradient(torch.ones(2, 3), Y[:2]), 2 * torch.ones(2, 3))


def test_formulas_of_a_base_without_losses_are_inherited():
    class Base(Objective):
        def hessian_product(self, z, y, u):
            return u

    class Child(Base):
        def losses(self, z, y):
            return ((z - y) ** 2).sum(1) / 2

    class Grandchild(Child):
        def gradient(self, z, y):
            return z - y

    assert Child.hessian_product is Base.hessian_product and Grandchild.hessian_product is Base.hessian_product
    assert type("Leaf", (Grandchild,), {}).gradient is Grandchild.gradient


class WrongGradient(objectives.CrossEntropy):
    def gradient(self, z, y):
        return torch.softmax(z, 1)


class WrongForm(objectives.LeastSquares):
    def hessian_form(self, z, y, u):
        return 2 * u.square().sum(1)


class WrongProduct(objectives.CrossEntropy):
    def hessian_product(self, z, y, u):
        return torch.softmax(z, 1) * u


class WrongFactor(objectives.LeastSquares):
    def hessian_factor(self, z, y):
        for column, coordinate in super().hessian_factor(z, y):
            yield column, -coordinate


class WrongColumns(objectives.LeastSquares):
    def hessian_factor(self, z, y):
        for column, coordinate in super().hessian_factor(z, y):
            yield 2 * column, coordinate / 2


class WrongCounted(objectives.CrossEntropy):
    def counted(self, z, y):
        return torch.zeros_like(z, dtype=torch.bool)


class Shifted(objectives.LeastSquares):
    def sample(self, z, y, generator=None):
        return super().sample(z, y, generator) + 0.3


class Wide(objectives.LeastSquares):
    def sample(self, z, y, generator=None):
        return z + 1.3 * torch.randn(z.shape, dtype=z.dtype, generator=generator)


class OwnGenerator(objectives.LeastSquares):
    def sample(self, z, y, generator=None):
        return z + torch.randn_like(z)


class WrongDtype(objectives.LeastSquares):
    def sample(self, z, y, generator=None):
        return super().sample(z, y, generator).half()


class Smoothed(Own):
    """Its losses are those of no density: softmax is not what to draw from."""

    def losses(self, z, y):
        return nn.functional.cross_entropy(z, y, reduction="none", label_smoothing=0.3)

    def sample(self, z, y, generator=None):
        return torch.multinomial(z.softmax(-1), 1, generator=generator)[:, 0]


class MeanOverTheBatch(Own):
    def losses(self, z, y):
        losses = super().losses(z, y)
        return losses - losses.mean()


class Scalar(Own):
    def losses(self, z, y):
        return super().losses(z, y).mean()


class Detached(Own):
    def losses(self, z, y):
        return super().losses(z.detach(), y)


class SingleConstants(Own):
    def losses(self, z, y):
        return nn.functional.cross_entropy(z, y, torch.ones(3), reduction="none")


class HalfFisher(Own):
    curvature = "fisher"

    def hessian_form(self, z, y, u):
        return u.square().sum(1)


@pytest.mark.parametrize(
    ("objective", "targets", "message"),
    [
        (WrongGradient(), Y, r"WrongGradient\.gradient contradicts WrongGradient\.losses.*Delete WrongGradient\.grad"),
        (WrongForm(), REAL, r"WrongForm\.hessian_form contradicts"),
        (WrongProduct(), Y, r"WrongProduct\.hessian_product contradicts"),
        (WrongFactor(), REAL, r"WrongFactor\.hessian_factor contradicts.*from the gradient"),
        (WrongColumns(), REAL, r"WrongColumns\.hessian_factor contradicts.*Σ a aᵀ"),
        (WrongCounted(), Y, r"WrongCounted\.counted contradicts"),
        (Shifted(), REAL, r"Shifted\.sample contradicts.*mean of their gradients is not 0"),
        (Wide(), REAL, r"Wide\.sample contradicts.*second moment"),
        (OwnGenerator(), REAL, "hand it on"),
        (WrongDtype(), REAL, "it must return what `losses` takes"),
        (Smoothed(), Y, r"Smoothed\.sample contradicts.*write Smoothed\.sampled_gradient"),
        (MeanOverTheBatch(), Y, "Samples influence each other"),
        (Scalar(), Y, r"expected one loss for each, \(6,\)"),
        (Detached(), Y, "no gradient in the logits"),
        (SingleConstants(), Y, r"fails on logits of float64.*\.to\(logits\)"),
        (HalfFisher(), Y, r"not \['hessian_factor', 'hessian_product'\]"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Objective) else "",
)
def test_a_contradiction_is_refused_on_the_first_batch(objective, targets, message):
    model, before = small_network(), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        linearize(model, X, targets, objective)
    assert torch.equal(torch.get_rng_state(), before)
    linearize(model, X, targets, objective, verify=False)  # at one's own risk


def test_formulas_that_are_right_pass_and_leave_the_random_numbers_alone():
    class Weighted(objectives.CrossEntropy):
        """All formulas its own, in float32."""

        def losses(self, z, y):
            return 3 * nn.functional.cross_entropy(z, y, reduction="none")

        def gradient(self, z, y):
            return 3 * objectives.CrossEntropy().gradient(z.float(), y)

        def hessian_product(self, z, y, u):
            return 3 * objectives.CrossEntropy().hessian_product(z, y, u)

        def sample(self, z, y, generator=None):
            return objectives.CrossEntropy().sample(z, y, generator)

        def sampled_gradient(self, z, y, drawn):
            return 3**0.5 * objectives.CrossEntropy().gradient(z, drawn)

    class Student(Objective):
        """A density whose Hessian is no Fisher matrix: what is drawn is held against the mean of it."""

        def losses(self, z, y):
            return (2.5 * torch.log1p((z - y).square() / 4)).sum(1)

        def sample(self, z, y, generator=None):
            n, *chi = torch.randn(5, *z.shape, dtype=z.dtype, generator=generator)
            return z + n / (sum(c.square() for c in chi) / 4).sqrt()

    model = small_network()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for objective, targets in ((Weighted(), Y), (Student(), REAL), (objectives.LeastSquares(), REAL), (Own(), Y)):
        linearize(model, X, targets, objective)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_instance_whose_losses_were_replaced_is_looked_at():
    objective = objectives.CrossEntropy()
    objective.losses = lambda z, y: z.square().sum(1)
    with pytest.raises(ValueError, match="gradient contradicts"):
        linearize(small_network(), X, Y, objective)


def test_heads_of_ones_own_are_looked_at():
    heads = objectives.WeightedSum([objectives.CrossEntropy(), WrongForm()], [2, 1])
    targets = torch.cat([Y[:, None] % 2, REAL[:, :1]], 1)
    with pytest.raises(ValueError, match=r"WrongForm\.hessian_form contradicts"):
        linearize(small_network(), X, targets, heads)


def test_what_one_head_can_not_have_is_missed_when_it_is_asked_for():
    heads = objectives.WeightedSum([LogCosh(), objectives.Gaussian()], [1, 2], [2.0, 0.5])
    lin = assert_exact(double(), X.double(), REAL[:, :2].double(), heads)
    d = directions.natural_gradient(lin, 1e-3)
    assert float(gamma(lin, d)) <= float(gamma(lin, directions.ief(lin, 1e-3)))
    with pytest.raises(NotImplementedError, match=r"Write LogCosh\.sample"):
        lin.sample()


def test_an_objective_is_looked_at_when_it_is_new():
    """Not on every batch; anew for another one on a model that is verified; never for those of the package."""
    looks = []

    class Counted(LogCosh):
        def __init__(self, scale=1.0):
            self.scale = scale

        def losses(self, z, y):
            looks.append(z.dtype == torch.float64)
            return self.scale * super().losses(z, y)

    model, objective = small_network(), Counted()
    linearize(model, X, REAL, objective)
    assert sum(looks) > 0
    looks.clear()
    for _ in range(3):
        linearize(model, X, REAL, objective)
        linearize(model, X, REAL, Counted())  # with the same settings
    assert sum(looks) == 0
    linearize(model, X, REAL, Counted(2.0))
    assert sum(looks) > 0
    with pytest.raises(ValueError, match="contradicts"):
        linearize(model, X, REAL, WrongForm())


def test_in_inference_mode():
    with torch.inference_mode():
        z, y = torch.zeros(2, 3), REAL[:2].clone()
        assert torch.allclose(LogCosh().gradient(z, y), torch.tanh(-REAL[:2]))


def test_nothing_more_is_dispatched_for_those_of_the_package():
    pytest.importorskip("psutil")
    from benchmarks.overhead import Dispatched

    model, counts = small_network(), []
    for objective in (objectives.LeastSquares(), LogCosh(), objectives.LeastSquares()):
        linearize(model, X, REAL, objective).release()
        dispatched = Dispatched()
        with dispatched.watching():
            linearize(model, X, REAL, objective).release()
        counts.append(dispatched.operations.total())
    assert counts[0] == counts[2] and counts[1] < counts[0] + 20


# --- where an objective comes in


class Module(NaturalGradientMixin, L.LightningModule):
    def __init__(self, objective=None, adapt=lambda y: y):
        super().__init__()
        self.net = small_network()
        self.adapt = adapt
        if objective is not None:
            self.objective = objective

    def forward(self, x):
        return self.net(x)

    def unpack_batch(self, batch):
        return batch[0], self.adapt(batch[1])

    def configure_optimizers(self):
        return IEF(self.parameters(), lr=0.5, damping=1e-3)


def fit(module):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), 3))
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_a_loss_of_torch_trains_as_the_objective_does():
    weight = torch.tensor([1.0, 2.0, 3.0])
    with pytest.warns(UserWarning, match=r"taken as objectives\.CrossEntropy.*reduction='mean'"):
        module = Module(nn.CrossEntropyLoss(weight, label_smoothing=0.1))
    assert isinstance(module.objective, objectives.CrossEntropy) and not [k for k in module.state_dict() if "obj" in k]
    assert torch.equal(fit(module), fit(Module(objectives.CrossEntropy(weight, 0.1))))


def test_a_loss_of_torch_as_an_attribute_of_the_class():
    class OfClass(Module):
        objective = nn.CrossEntropyLoss(reduction="sum")

    assert torch.equal(fit(OfClass()), fit(Module(objectives.CrossEntropy())))


def test_linearize_takes_a_loss_of_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a sum nothing is to be said
        lin = linearize(small_network(), X, Y, nn.CrossEntropyLoss(reduction="sum"))
    assert isinstance(lin.objective, objectives.CrossEntropy)


@pytest.mark.parametrize(
    ("given", "name", "words"),
    [
        (nn.MSELoss(), "LeastSquares", "twice that"),
        (nn.SmoothL1Loss(beta=0.5), "Huber", "that over beta"),
        (nn.BCEWithLogitsLoss(), "BinaryCrossEntropy", "'mean'"),
        (nn.PoissonNLLLoss(), "Poisson", "'mean'"),
    ],
)
def test_losses_of_torch_that_are_taken(given, name, words):
    with pytest.warns(UserWarning, match=words):
        taken = objectives.as_objective(given)
    assert type(taken).__name__ == name
    z, y = torch.rand(4, 1, dtype=torch.float64), torch.tensor([[0.0], [1], [0], [1]], dtype=torch.float64)
    given.reduction = "sum"
    factor = {nn.MSELoss: 2.0, nn.SmoothL1Loss: 2.0}.get(type(given), 1.0)
    assert relative_error(factor * taken.losses(z, y).sum(), given(z, y)) < 1e-6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (nn.NLLLoss(), r"NLLLoss.*Write objectives\.CrossEntropy\(\).*without log_softmax"),
        (nn.BCELoss(), "without sigmoid"),
        (nn.GaussianNLLLoss(), r"objectives\.Gaussian\(\)"),
        (nn.PoissonNLLLoss(log_input=False), "logarithm of the rate"),
        (nn.CosineEmbeddingLoss(), r"one method, losses\(logits, targets\)"),
        (nn.functional.cross_entropy, "the function cross_entropy.*one method"),
        (nn.CrossEntropyLoss, r"class CrossEntropyLoss\. Write CrossEntropyLoss\(\)"),
        (objectives.CrossEntropy, r"Write CrossEntropy\(\), with parentheses"),
        ("cross_entropy", "a str"),
        (None, r"self\.objective = objectives\.CrossEntropy\(\)"),
    ],
)
def test_what_is_no_objective_names_the_line_to_write(given, message):
    with pytest.raises(TypeError, match=message):
        objectives.as_objective(given)


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        (lambda y: y.numpy(), r"numpy\.ndarray.*torch\.as_tensor\(targets\)"),
        (lambda y: y.tolist(), r"list.*torch\.as_tensor\(targets\)"),
        (lambda y: {"labels": y}, r"dict.*targets\['labels'\]"),
        (lambda y: (y, y), r"tuple.*WeightedSum"),
        (lambda y: y.int(), r"int32.*targets\.long\(\)"),
    ],
)
def test_targets_of_other_kinds_name_the_line_to_write(adapt, message):
    with pytest.raises(TypeError, match=message):
        fit(Module(objectives.CrossEntropy(), adapt))
    with pytest.raises(TypeError, match=message):
        linearize(small_network(), X, adapt(Y), objectives.CrossEntropy())
