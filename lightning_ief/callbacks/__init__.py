"""Callbacks for `Trainer(callbacks=[...])`: indicators of the updates' quality, timing, reports and schedules."""

from lightning_ief.callbacks.gamma_indicators import GammaIndicators, OwnDirection
from lightning_ief.callbacks.gradient_statistics import GradientStatistics
from lightning_ief.callbacks.option_schedule import OptionSchedule
from lightning_ief.callbacks.solver_report import SolverReport
from lightning_ief.callbacks.step_timing import StepTiming

__all__ = ["GammaIndicators", "GradientStatistics", "OptionSchedule", "OwnDirection", "SolverReport", "StepTiming"]
