"""Drop-ins for the schedulers of diffusers, whose step is one pass over memory.

```python
import diffusers, fastddim.integrations.diffusers
unet = diffusers.UNet2DModel(sample_size=16, block_out_channels=(32, 32, 32, 32))
pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())  # or any of yours
pipe.scheduler = fastddim.integrations.diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
image = pipe(num_inference_steps=2).images[0]
```

Every class is a subclass of the one with the same name. It has the same arguments and, to rounding,
the same results. Noise is drawn with the same calls from the same generators. Roots are taken as in
diffusers, one timestep at a time in the dtype of `alphas_cumprod`. The deviations of diffusers from
the paper are kept:

- the timestep before is `t - T // N`, whatever timesteps are visited next;
- `set_alpha_to_one=False` adds noise in the last step if that does not end at t = 0;
- `timestep_spacing="trailing"` visits t = -1, which reads the last ᾱ, for 62 values of N;
- epsilon is divided by √ᾱ = 0 at zero terminal SNR, which only clipping hides: without a clip it is
  infinite in diffusers, and of the order of 1e30 here;
- an η for which 1 − ᾱ_prev − σ² < 0 gives NaN, and so does `fixed_large_log`.

If only rounding takes 1 − ᾱ_prev − σ² below 0, as η = 1 does at zero terminal SNR, diffusers gives
NaN and these classes give the limit.

`fastddim.sample` has none of these deviations. A half-precision state is computed in float32 and
rounded once, while diffusers rounds every operation. Cases that the kernel does not cover (tensors
that broadcast, an η that is not a number ≥ 0, integer samples) go to diffusers' own code. So do all
steps if a subclass or an object overrides a method that they call, such as `_get_variance`. A
method that is set on diffusers' class counts from the next `set_timesteps` on.

Timesteps are indices, as in diffusers: a float or a boolean is refused, and the error names the
argument.

Nothing waits for a device: the host also knows the timesteps that `set_timesteps` has put there,
and seeds that are drawn on a device stay there. Only `DDPMScheduler`, philox noise and tuned steps
need the value of a timestep, and read one that lies on a device and comes from elsewhere.

Under `torch.compile` and `torch.export`, a step is one operator and its table a constant of the
graph. A timestep may be an int or a tensor there; philox noise takes no generator. A finished graph
does not notice changes in place of `alphas_cumprod` or, for DDPM, `timesteps`, but notices a new
tensor. Nor does it refuse a timestep in a tensor that is none of the scheduler's: DDPM's step is
then NaN, and philox noise is that of the first step. DDPM draws noise for a timestep 0 in a tensor
too, and does not add it.

`from_config(..., noise="philox", seed=7, sample_offset=0)`, or `set_noise` later, takes the noise
of the steps from the seed instead of from torch: see `fastddim.sample`. These arguments become a
part of the config, also in a saved pipeline. If a pipeline is given a `generator`, the seed is one
64-bit number that is drawn from the generator at the first step of a run. So a generator that is
seeded anew repeats a run, two runs with one generator have different noise, and with a list of
generators each sample has a seed of its own, independent of the rest of the batch. Without a
generator, every run has the noise of the scheduler's seed; if the scheduler has none, the seed of
each run is drawn from torch's default generator of the CPU. `initial_latents` gives latents that do
not depend on the device either.

`set_timesteps(timesteps=[...])`, and so `pipe(timesteps=[...])` of pipelines that have that
argument, visits exactly these timesteps: each step ends at the next of them, as in
`fastddim.sample` and in `DDPMScheduler`. diffusers' own DDIM refuses such timesteps, so steps that
would go to diffusers' own code are refused then.

`DDIMScheduler.from_config(..., tuned=...)`, or `set_tuned` later, takes tuned steps, as an object
or the path of a file, and gives the results of `fastddim.sample` with them. Tuned steps become a
part of the config, also in a saved pipeline.

A saved pipeline with one of these schedulers names this module. diffusers 0.36 imports the module
when it loads the pipeline. Newer releases import nothing that a file names, and their error asks
you to `import fastddim.integrations.diffusers` first.
"""

from __future__ import annotations

# diffusers looks for SchedulerMixin in the scheduler's module when it loads a pipeline.
from diffusers import SchedulerMixin

from fastddim.integrations.diffusers._ddim import DDIMScheduler
from fastddim.integrations.diffusers._ddim_parallel import DDIMParallelScheduler
from fastddim.integrations.diffusers._ddpm import DDPMScheduler
from fastddim.integrations.diffusers._inverse import DDIMInverseScheduler
from fastddim.integrations.diffusers._latents import initial_latents
from fastddim.integrations.diffusers._state import _restored

__all__ = [
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "SchedulerMixin",
    "initial_latents",
]

# Saved pipelines and pickles name the module of a class, and that name must survive moved files.
for _saved in (
    DDIMScheduler,
    DDIMParallelScheduler,
    DDIMInverseScheduler,
    DDPMScheduler,
    initial_latents,
    _restored,
):
    _saved.__module__ = __name__
