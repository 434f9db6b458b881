"""Drop-ins for the schedulers of diffusers, whose step is one pass over memory.

```python
import diffusers, fastddim.integrations.diffusers
unet = diffusers.UNet2DModel(sample_size=16, block_out_channels=(32, 32, 32, 32))
pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())  # or any of yours
pipe.scheduler = fastddim.integrations.diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
image = pipe(num_inference_steps=2).images[0]
```

Every class is a subclass of the one that it is named after, with the same arguments and, to
rounding, the same results. Noise is drawn with the same calls from the same generators. Roots are
those that diffusers takes, one timestep at a time in the dtype of `alphas_cumprod`. Its deviations
from the paper are kept:

- the timestep before is `t - T // N`, whatever timesteps are visited next;
- `set_alpha_to_one=False` adds noise in the last step where that does not end at t = 0;
- `timestep_spacing="trailing"` visits t = -1, which reads the last ᾱ, for 62 values of N;
- epsilon is divided by √ᾱ = 0 at zero terminal SNR, which only clipping hides: infinite without
  it in diffusers, of the order of 1e30 here;
- an η for which 1 − ᾱ_prev − σ² < 0 gives NaN, and so does `fixed_large_log`.

Where only rounding takes 1 − ᾱ_prev − σ² below 0, as η = 1 does at zero terminal SNR, diffusers
gives NaN and this gives the limit.

`fastddim.sample` does none of this. A half-precision state is computed in float32 and rounded once,
where diffusers rounds every operation. Cases that the kernel does not cover (tensors that
broadcast, an η that is not a number ≥ 0, integer samples) go to diffusers' own code, and so do all
steps where a subclass or an object overrides a method that they call, such as `_get_variance`. One
that is set on diffusers' class counts from the next `set_timesteps` on.

Timesteps are indices, as in diffusers: a float or a boolean is refused. Their errors name the
argument.

Nothing waits for a device: timesteps that `set_timesteps` has put there are known on the host too,
and seeds that are drawn on a device stay there. Only `DDPMScheduler`, philox noise and tuned steps
read a timestep that lies on a device and comes from elsewhere, since they need its value.

Under `torch.compile` and `torch.export` a step is one operator, and its table a constant of the
graph. A timestep may be an int or a tensor there; philox noise takes no generator. What changes
`alphas_cumprod` or, for DDPM, `timesteps` in place is not seen by a graph that is made; a new
tensor is. A graph does not tell that a tensor's timestep is none of the scheduler's: DDPM's step is
NaN then, and philox noise that of the first step. DDPM draws noise for a tensor's timestep 0 too,
and leaves it out.

`from_config(..., noise="philox", seed=7, sample_offset=0)`, or `set_noise` later, takes the noise
of the steps from the seed instead of from torch: see `fastddim.sample`. It is a part of the config,
and a saved pipeline has it. Where a pipeline is given a `generator`, the seed is one 64-bit number
that is drawn from it at the first step of a run. So a generator that is seeded anew repeats a run,
two runs with one generator have different noise, and of a list each sample has a seed of its own,
whatever else is in the batch. Without a generator every run has the noise of the scheduler's seed;
where it has none, the seed of each run is drawn from torch's default generator of the CPU.
`initial_latents` gives latents that do not depend on the device either.

`set_timesteps(timesteps=[...])`, and so `pipe(timesteps=[...])` of pipelines that have that
argument, visits these and no others: each step ends at the next of them, as `fastddim.sample` has
it and `DDPMScheduler`. diffusers' own DDIM refuses them. Steps that go to diffusers' own code are
refused then.

`DDIMScheduler.from_config(..., tuned=...)`, or `set_tuned` later, takes tuned steps, an object or
the path of a file, and gives what `fastddim.sample` gives with them. They are a part of the config,
and a saved pipeline has them.

A pipeline that is saved with one of these schedulers names this module. diffusers 0.36 imports it
when the pipeline is loaded; newer releases import nothing that a file names, and say in their error
to `import fastddim.integrations.diffusers` before.
"""

from __future__ import annotations

# A pipeline that is loaded looks for SchedulerMixin in the scheduler's module.
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

# Saved pipelines and pickles name the module of a class, which must outlast the layout of files.
for _saved in (
    DDIMScheduler,
    DDIMParallelScheduler,
    DDIMInverseScheduler,
    DDPMScheduler,
    initial_latents,
    _restored,
):
    _saved.__module__ = __name__
