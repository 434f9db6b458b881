"""`tune`, from its arguments to tuned steps."""

from __future__ import annotations

from fastddim.options import TuneOptions
from fastddim.signatures import takes
from fastddim.tuned import TunedSteps
from fastddim.tuning.tuner import Tuner, warn_where_untuned


@takes(TuneOptions)
def tune(options: TuneOptions) -> TunedSteps | dict[int, TunedSteps]:
    """Choose the timesteps and weights of few steps for one model.

    The model's own trajectories are the measure: a teacher solves the paper's ODE (arXiv
    2010.02502, eq. 14) by many steps of order 2, and tuning searches for S steps that end as close
    to its solution as possible, by least squares on the distance (arXiv 2405.15506 has the same aim
    and trains for it). Tuning only evaluates the model: it needs no data and no gradients.
    docs/tune.md describes the method.

    On one machine, the same arguments give the same steps. Arguments not described here are those
    of `sample`; pass the values that you will sample with.

    Args:
        model: as for `sample`, in eval mode.
        steps: number of steps S, or a sequence of such numbers: one teacher serves all, and the
            timesteps found for one are a start for the next.
        guidance_scale: one number; each scale needs steps of its own.
        shape: (B, …) of the states that the model is evaluated on at a time; by default B follows
            from `samples`, and the rest is the shape that the model tells.
        batch_size: B where `shape` is not given; `model_kwargs` are those of B samples.
        effort: "quick" for a minute around a small network, "thorough" for several.
        samples: number of latents in each of three sets: to fit, to choose and to report by. It is
            rounded up to whole batches. By default some 20 to 500, fewer the larger they are.
        seed: the seed of the latents, which are its samples from 2³¹ on.
        teacher_steps: number of the teacher's steps; by default those of the effort.
        progress: show a tqdm bar on stderr.

    Returns:
        The tuned steps, for the argument `steps` of `sample` and other calls; for a sequence, a
        dictionary of them by S. Where tuning does not bring the reported latents closer to the
        exact solution, the steps are the better ones of orders 1 and 2, and a warning says so.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range, or the model's
            output is not finite; the message names it.
    """
    with Tuner(options) as tuner:
        found = {steps: tuner.tuned(steps) for steps in tuner.numbers}
    for steps in found.values():
        warn_where_untuned(steps, stacklevel=3)
    return found[options.steps] if isinstance(options.steps, int) else found
