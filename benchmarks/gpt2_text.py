"""A language model from random weights: a small GPT-2 on the language reference of Python, byte by byte."""

from dataclasses import replace
from pathlib import Path

from benchmarks.study import Regime, Study, Wanted, filled, measure, sections

__all__ = ["FULL", "QUICK", "SMOKE", "report", "study"]

_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "gpt2_text.yaml"
_BASELINES = ("sgd_nesterov", "adamw", "muon")
QUICK = Study(
    "quick", _RECIPE, ("ief", "ief_damped", "ief_preset", *_BASELINES),
    (
        Regime(
            "three", "3 epochs, 279 steps",
            ("--trainer.max_epochs=3", "--trainer.val_check_interval=31"),
        ),
    ),
    epochs=3, gamma=(), baselines=_BASELINES, metric="val/loss_per_token", minimize=True, drawn="the model",
)  # fmt: skip
FULL = replace(
    QUICK, name="full", optimizers=(*QUICK.optimizers, "ief_metric"),
    regimes=(
        *QUICK.regimes,
        Regime("twenty", "20 epochs, 1,860 steps", ("--trainer.max_epochs=20",)),
    ),
)  # fmt: skip
_TINY = "{model_type: gpt2, vocab_size: 384, n_positions: 32, n_embd: 16, n_layer: 1, n_head: 2}"
SMOKE = replace(
    QUICK, name="smoke", optimizers=("ief_preset", "adamw"), baselines=("adamw",), untuned=("ief_preset",),
    regimes=(Regime("three", "Tiny", ("--trainer.max_epochs=2",)),), epochs=2,
    lr_factors=(1.0, 3.0), widen=0, search_seeds=(100,),
    more=(f"--model.init_args.net.init_args.config={_TINY}", "--data.init_args.max_length=32",
          "--trainer.log_every_n_steps=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2",
          "--trainer.limit_test_batches=2"),
)  # fmt: skip

_TEXT = """\
# A language model from random weights

A GPT-2 of 232,832 parameters (4 layers, 64 wide, a vocabulary of bytes) learns the language reference that Python
brings for its `help()`, in pieces of 128 bytes, 32 in a batch; the end of each text is for validation and the test. The
recipe is `recipes/gpt2_text.yaml`, and the loss that of a byte, in nats. One command:

    python -m benchmarks gpt2-text{flags}

The optimizers are the files in `recipes/gpt2_text/`: iEF as in the paper (`ief`), damped in its own matrix
(`ief_damped`), and with the [preset](tuning.md) for transformers from random weights, which is SPRING
(`ief_preset`){metric}; SGD with Nesterov momentum; AdamW, which is the recipe as it is; Muon for matrices, with AdamW
for embeddings and the rest.

{protocol} ρ, μ and lr of iEF's files come from 14 trials on these texts, of 2 and 3 epochs with seed 0 in a loop
apart; AdamW and SGD had 6 there.

{sections}

Measured on {where}.{note}
"""


def study(size: Study, wanted: Wanted, output: Path, folder: Path, texts: Path, note: str = "") -> Path:
    """Measure, draw the figures and write the report.

    Args:
        size: Size of the study.
        wanted: What is to be done now; the report has all that is done.
        output: Folder of the report.
        folder: Where the runs go.
        texts: Folder of the texts, `*.txt`.
        note: What else is to be known of the measurement, a sentence.

    Returns:
        The report.
    """
    measure(size, wanted, folder, [f"--data.init_args.folder={texts}"])
    path = output / "gpt2_text.md"
    text = report(size, wanted, sections(size, folder, output / "gpt2_text"), note)
    path.write_text(text, encoding="utf-8")
    return path


def report(size: Study, wanted: Wanted, found: str, note: str = "") -> str:
    """The page.

    Args:
        size: Size of the study.
        wanted: What was asked for.
        found: The sections of its regimes.
        note: What else is to be known of the measurement.

    Returns:
        Markdown.
    """
    metric = ", and in the Kronecker metric (`ief_metric`)" if "ief_metric" in size.optimizers else ""
    return filled(_TEXT, size, wanted, found, note, metric=metric)
