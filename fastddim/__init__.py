"""DDIM sampling (arXiv 2010.02502) with a fused update kernel.

`fastddim.sample(model, steps)` draws samples; `step` is one update for loops of your own.
"""

from fastddim import actions, graph, images, models, philox, process, runs
from fastddim._version import __version__ as __version__
from fastddim.actions import ActionSampler, ActionStream
from fastddim.api import invert, sample, step
from fastddim.interpolation import slerp
from fastddim.plan import select_timesteps
from fastddim.runs import generate
from fastddim.sampler import Sampler
from fastddim.schedule import Schedule
from fastddim.stepper import Stepper
from fastddim.stopping import STOP
from fastddim.stream import Stream
from fastddim.tuned import TunedSteps, load_steps
from fastddim.tuning import tune

__all__ = [
    "STOP",
    "ActionSampler",
    "ActionStream",
    "Sampler",
    "Schedule",
    "Stepper",
    "Stream",
    "TunedSteps",
    "actions",
    "generate",
    "graph",
    "images",
    "invert",
    "load_steps",
    "models",
    "philox",
    "process",
    "runs",
    "sample",
    "select_timesteps",
    "slerp",
    "step",
    "tune",
]
