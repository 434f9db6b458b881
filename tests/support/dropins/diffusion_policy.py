"""The policies of real-stanford/diffusion_policy, which no registry has: written out here.

Names, signatures and the order of operations are the repository's, of commit 5ba07ac. Networks and
encoders are small ones that are called in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

OBS, ACTION, HORIZON, N_OBS, N_ACTION = 3, 2, 8, 2, 4


class LinearNormalizer(nn.Module):
    """`scale · value + offset` of each field; without fields until a policy is given one."""

    def __init__(self, **fields: tuple[float, float]) -> None:
        super().__init__()
        self.params_dict = nn.ParameterDict()
        for name, numbers in fields.items():
            self.params_dict[name] = nn.Parameter(torch.tensor(numbers), requires_grad=False)

    def load_state_dict(self, state: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        for name, numbers in state.items():
            value = nn.Parameter(numbers.clone(), requires_grad=False)
            self.params_dict[name.removeprefix("params_dict.")] = value

    def normalize(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self[name].normalize(value) for name, value in fields.items()}

    def __getitem__(self, name: str) -> _Field:
        return _Field(self.params_dict[name])


class _Field:
    def __init__(self, numbers: Tensor) -> None:
        self.scale, self.offset = numbers.unbind()

    def normalize(self, value: Tensor) -> Tensor:
        return value * self.scale + self.offset

    def unnormalize(self, value: Tensor) -> Tensor:
        return (value - self.offset) / self.scale


NORMALIZER = {"obs": (0.5, 0.1), "image": (2.0, -1.0), "action": (0.8, -0.1)}


class _Time(nn.Module):
    """Features of the timestep, which is a number, a tensor of one, or one for each sample."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.project = nn.Linear(4, features)

    def forward(self, timestep: Any, sample: Tensor) -> Tensor:
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], dtype=torch.long, device=sample.device)
        elif timestep.ndim == 0:
            timestep = timestep[None].to(sample.device)
        t = timestep.expand(len(sample)).to(sample.dtype)[:, None] / 100
        return self.project(torch.cat([t, t.sin(), (math.tau * t).sin(), (math.tau * t).cos()], 1))


class ConditionalUnet1D(nn.Module):
    """Convolutions along time, of an input `[B, T, D]`, with both kinds of condition."""

    def __init__(
        self, input_dim: int, local_cond_dim: int | None = None, global_cond_dim: int | None = None
    ) -> None:
        super().__init__()
        width = 8
        self.time = _Time(width)
        self.local = None if local_cond_dim is None else nn.Conv1d(local_cond_dim, width, 1)
        self.whole = None if global_cond_dim is None else nn.Linear(global_cond_dim, width)
        self.first = nn.Conv1d(input_dim, width, 3, padding=1)
        self.middle = nn.Conv1d(width, width, 5, padding=2)
        self.last = nn.Conv1d(width, input_dim, 1)

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        shift = self.time(timestep, sample)
        if self.whole is not None:
            shift = shift + self.whole(global_cond)
        x = self.first(sample.transpose(1, 2)) + shift[:, :, None]
        if self.local is not None:
            x = x + self.local(local_cond.transpose(1, 2))
        x = x + nn.functional.mish(self.middle(nn.functional.mish(x)))
        return sample + self.last(x).transpose(1, 2)


class TransformerForDiffusion(nn.Module):
    """A decoder of tokens `[B, T, D]` that looks at the time and at the condition `[B, To, Do]`."""

    def __init__(self, input_dim: int, cond_dim: int = 0) -> None:
        super().__init__()
        width = 8
        self.time = _Time(width)
        self.input_emb = nn.Linear(input_dim, width)
        self.cond_obs_emb = nn.Linear(cond_dim, width) if cond_dim else None
        self.decoder = nn.TransformerDecoderLayer(width, 2, 16, 0.1, batch_first=True)
        self.head = nn.Linear(width, input_dim)

    def forward(
        self, sample: Tensor, timestep: Any, cond: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        memory = self.time(timestep, sample)[:, None]
        if self.cond_obs_emb is not None:
            assert cond is not None
            memory = torch.cat([memory, self.cond_obs_emb(cond)], 1)
        return sample + self.head(self.decoder(self.input_emb(sample), memory)) / 4


class Encoder(nn.Module):
    """Features of an observation `[B·To, …]`, from both of its fields."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.features = features
        self.image = nn.Conv2d(1, features, 3)
        self.obs = nn.Linear(OBS, features)

    def output_shape(self) -> tuple[int]:
        return (self.features,)

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        return self.image(observation["image"]).mean((2, 3)) + self.obs(observation["obs"])


class Policy(nn.Module):
    """The common parts of all policies, of the repository's `ModuleAttrMixin` and base policies
    too.
    """

    def __init__(
        self,
        model: nn.Module,
        noise_scheduler: Any,
        horizon: int,
        action_dim: int,
        n_action_steps: int,
        n_obs_steps: int,
        num_inference_steps: int | None,
        kwargs: dict[str, Any],
    ) -> None:
        super().__init__()
        self._dummy_variable = nn.Parameter()
        self.model = model
        self.noise_scheduler = noise_scheduler
        self.normalizer = LinearNormalizer()
        self.horizon = horizon
        self.action_dim = action_dim
        self.n_action_steps = n_action_steps
        self.n_obs_steps = n_obs_steps
        self.kwargs = kwargs
        if num_inference_steps is None:
            num_inference_steps = noise_scheduler.config.num_train_timesteps
        self.num_inference_steps = num_inference_steps

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters())).dtype

    def set_normalizer(self, normalizer: LinearNormalizer) -> None:
        self.normalizer.load_state_dict(normalizer.state_dict())

    def _denoise(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        evaluate: Callable[[Tensor, Tensor], Tensor],
        generator: torch.Generator | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The loop, which the repository writes out in each policy."""
        trajectory = torch.randn(
            size=condition_data.shape,
            dtype=condition_data.dtype,
            device=condition_data.device,
            generator=generator,
        )
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            trajectory[condition_mask] = condition_data[condition_mask]
            output = evaluate(trajectory, t)
            trajectory = self.noise_scheduler.step(
                output, t, trajectory, generator=generator, **kwargs
            ).prev_sample
        trajectory[condition_mask] = condition_data[condition_mask]
        return trajectory

    def _free(self, batch: int, horizon: int, dim: int) -> tuple[Tensor, Tensor]:
        """(data, mask) of a sample without known elements."""
        data = torch.zeros(size=(batch, horizon, dim), device=self.device, dtype=self.dtype)
        return data, torch.zeros_like(data, dtype=torch.bool)

    def _inpainted(self, known: Tensor) -> tuple[Tensor, Tensor]:
        """(data, mask) of actions and observations, of which the first `[B, To, Do]` are known."""
        data, mask = self._free(len(known), self.horizon, self.action_dim + known.shape[2])
        data[:, : self.n_obs_steps, self.action_dim :] = known
        mask[:, : self.n_obs_steps, self.action_dim :] = True
        return data, mask

    def _result(self, nsample: Tensor, start: int, *, only: bool, obs: bool) -> dict[str, Tensor]:
        """The actions of a sample, and its observations where these are of the data itself."""
        pred = self.normalizer["action"].unnormalize(nsample[..., : self.action_dim])
        end = start + self.n_action_steps
        result = {"action": pred if only else pred[:, start:end], "action_pred": pred}
        if obs:
            obs_pred = self.normalizer["obs"].unnormalize(nsample[..., self.action_dim :])
            result |= {"action_obs_pred": obs_pred[:, start:end], "obs_pred": obs_pred}
        return result


class DiffusionUnetLowdimPolicy(Policy):
    def __init__(
        self,
        model: nn.Module,
        noise_scheduler: Any,
        horizon: int,
        obs_dim: int,
        action_dim: int,
        n_action_steps: int,
        n_obs_steps: int,
        num_inference_steps: int | None = None,
        obs_as_local_cond: bool = False,
        obs_as_global_cond: bool = False,
        pred_action_steps_only: bool = False,
        oa_step_convention: bool = False,
        **kwargs: Any,
    ) -> None:
        sizes = (horizon, action_dim, n_action_steps, n_obs_steps)
        super().__init__(model, noise_scheduler, *sizes, num_inference_steps, kwargs)
        assert not (obs_as_local_cond and obs_as_global_cond)
        if pred_action_steps_only:
            assert obs_as_global_cond
        self.obs_dim = obs_dim
        self.obs_as_local_cond = obs_as_local_cond
        self.obs_as_global_cond = obs_as_global_cond
        self.pred_action_steps_only = pred_action_steps_only
        self.oa_step_convention = oa_step_convention

    def conditional_sample(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            return self.model(x, t, local_cond=local_cond, global_cond=global_cond)

        return self._denoise(condition_data, condition_mask, evaluate, generator, kwargs)

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        nobs = self.normalizer["obs"].normalize(obs_dict["obs"])
        batch, only = len(nobs), self.pred_action_steps_only
        known = nobs[:, : self.n_obs_steps]
        local_cond = global_cond = None
        if self.obs_as_local_cond:
            local_cond, _ = self._free(batch, self.horizon, self.obs_dim)
            local_cond[:, : self.n_obs_steps] = known
            data, mask = self._free(batch, self.horizon, self.action_dim)
        elif self.obs_as_global_cond:
            global_cond = known.reshape(batch, -1)
            length = self.n_action_steps if only else self.horizon
            data, mask = self._free(batch, length, self.action_dim)
        else:
            data, mask = self._inpainted(known)
        nsample = self.conditional_sample(
            data, mask, local_cond=local_cond, global_cond=global_cond, **self.kwargs
        )
        start = self.n_obs_steps - 1 if self.oa_step_convention else self.n_obs_steps
        obs = not (self.obs_as_local_cond or self.obs_as_global_cond)
        return self._result(nsample, start, only=only, obs=obs)


class DiffusionTransformerLowdimPolicy(Policy):
    def __init__(
        self,
        model: nn.Module,
        noise_scheduler: Any,
        horizon: int,
        obs_dim: int,
        action_dim: int,
        n_action_steps: int,
        n_obs_steps: int,
        num_inference_steps: int | None = None,
        obs_as_cond: bool = False,
        pred_action_steps_only: bool = False,
        **kwargs: Any,
    ) -> None:
        sizes = (horizon, action_dim, n_action_steps, n_obs_steps)
        super().__init__(model, noise_scheduler, *sizes, num_inference_steps, kwargs)
        if pred_action_steps_only:
            assert obs_as_cond
        self.obs_dim = obs_dim
        self.obs_as_cond = obs_as_cond
        self.pred_action_steps_only = pred_action_steps_only

    def conditional_sample(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            return self.model(x, t, cond)

        return self._denoise(condition_data, condition_mask, evaluate, generator, kwargs)

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        nobs = self.normalizer["obs"].normalize(obs_dict["obs"])
        known, only = nobs[:, : self.n_obs_steps], self.pred_action_steps_only
        cond = None
        if self.obs_as_cond:
            cond = known
            length = self.n_action_steps if only else self.horizon
            data, mask = self._free(len(nobs), length, self.action_dim)
        else:
            data, mask = self._inpainted(known)
        nsample = self.conditional_sample(data, mask, cond=cond, **self.kwargs)
        start, obs = self.n_obs_steps - 1, not self.obs_as_cond
        return self._result(nsample, start, only=only, obs=obs)


class DiffusionUnetImagePolicy(Policy):
    def __init__(
        self,
        shape_meta: dict[str, Any],
        noise_scheduler: Any,
        obs_encoder: nn.Module,
        horizon: int,
        n_action_steps: int,
        n_obs_steps: int,
        num_inference_steps: int | None = None,
        obs_as_global_cond: bool = True,
        **kwargs: Any,
    ) -> None:
        (action_dim,) = shape_meta["action"]["shape"]
        (features,) = obs_encoder.output_shape()
        if obs_as_global_cond:
            model = ConditionalUnet1D(action_dim, global_cond_dim=features * n_obs_steps)
        else:
            model = ConditionalUnet1D(action_dim + features)
        sizes = (horizon, action_dim, n_action_steps, n_obs_steps)
        super().__init__(model, noise_scheduler, *sizes, num_inference_steps, kwargs)
        self.obs_encoder = obs_encoder
        self.obs_as_global_cond = obs_as_global_cond

    def conditional_sample(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            return self.model(x, t, local_cond=local_cond, global_cond=global_cond)

        return self._denoise(condition_data, condition_mask, evaluate, generator, kwargs)

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        nobs = self.normalizer.normalize(obs_dict)
        batch = len(nobs["obs"])
        steps = {k: v[:, : self.n_obs_steps].flatten(0, 1) for k, v in nobs.items()}
        features, global_cond = self.obs_encoder(steps), None
        if self.obs_as_global_cond:
            global_cond = features.reshape(batch, -1)
            data, mask = self._free(batch, self.horizon, self.action_dim)
        else:
            data, mask = self._inpainted(features.reshape(batch, self.n_obs_steps, -1))
        nsample = self.conditional_sample(
            data, mask, local_cond=None, global_cond=global_cond, **self.kwargs
        )
        return self._result(nsample, self.n_obs_steps - 1, only=False, obs=False)


class DiffusionUnetHybridImagePolicy(DiffusionUnetImagePolicy):
    """The policy of low-dimensional and image observations with an encoder of robomimic; no
    subclass in the repository.
    """


class DiffusionUnetVideoPolicy(DiffusionUnetImagePolicy):
    """A policy that inpaints the states and has the images as a condition; no subclass in the
    repository.
    """

    def __init__(self, shape_meta: dict[str, Any], *arguments: Any, **kwargs: Any) -> None:
        super().__init__(shape_meta, *arguments, **kwargs)
        (features,) = self.obs_encoder.output_shape()
        self.model = ConditionalUnet1D(self.action_dim + OBS, None, features * self.n_obs_steps)

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        nobs = self.normalizer.normalize(obs_dict)
        steps = {k: v[:, : self.n_obs_steps] for k, v in nobs.items()}
        features = self.obs_encoder({k: v.flatten(0, 1) for k, v in steps.items()})
        data, mask = self._inpainted(steps["obs"])
        nsample = self.conditional_sample(
            data,
            mask,
            local_cond=None,
            global_cond=features.reshape(len(data), -1),
            **self.kwargs,
        )
        return self._result(nsample, self.n_obs_steps, only=False, obs=False)


class DiffusionTransformerHybridImagePolicy(DiffusionTransformerLowdimPolicy):
    """A policy with features of images as the condition; no subclass in the repository."""

    def predict_action(self, obs_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        nobs = self.normalizer.normalize(obs_dict)
        batch = len(nobs["obs"])
        steps = {k: v[:, : self.n_obs_steps].flatten(0, 1) for k, v in nobs.items()}
        cond = self.obs_encoder(steps).reshape(batch, self.n_obs_steps, -1)
        data, mask = self._free(batch, self.horizon, self.action_dim)
        nsample = self.conditional_sample(data, mask, cond=cond, **self.kwargs)
        return self._result(nsample, self.n_obs_steps - 1, only=False, obs=False)


def _unet(scheduler: Any, **options: Any) -> DiffusionUnetLowdimPolicy:
    local, whole = options.get("obs_as_local_cond"), options.get("obs_as_global_cond")
    model = ConditionalUnet1D(
        ACTION if local or whole else ACTION + OBS,
        local_cond_dim=OBS if local else None,
        global_cond_dim=OBS * N_OBS if whole else None,
    )
    sizes = (HORIZON, OBS, ACTION, N_ACTION, N_OBS)
    return DiffusionUnetLowdimPolicy(model, scheduler, *sizes, **options)


def _transformer(scheduler: Any, **options: Any) -> DiffusionTransformerLowdimPolicy:
    given = options.get("obs_as_cond", False)
    model = TransformerForDiffusion(ACTION if given else ACTION + OBS, OBS if given else 0)
    sizes = (HORIZON, OBS, ACTION, N_ACTION, N_OBS)
    return DiffusionTransformerLowdimPolicy(model, scheduler, *sizes, **options)


def _images(kind: type[DiffusionUnetImagePolicy], scheduler: Any, **options: Any) -> Any:
    meta = {"action": {"shape": [ACTION]}}
    return kind(meta, scheduler, Encoder(), HORIZON, N_ACTION, N_OBS, **options)


def _transformer_of_images(scheduler: Any, **options: Any) -> Any:
    sizes = (HORIZON, OBS, ACTION, N_ACTION, N_OBS)
    model = TransformerForDiffusion(ACTION, OBS)
    policy = DiffusionTransformerHybridImagePolicy(model, scheduler, *sizes, **options)
    policy.obs_encoder = Encoder()
    return policy


KINDS: dict[str, Callable[..., Any]] = {
    "inpainting": _unet,
    "local": partial(_unet, obs_as_local_cond=True),
    "global": partial(_unet, obs_as_global_cond=True, oa_step_convention=True),
    "actions only": partial(_unet, obs_as_global_cond=True, pred_action_steps_only=True),
    "image": partial(_images, DiffusionUnetImagePolicy),
    "inpainting of features": partial(_images, DiffusionUnetImagePolicy, obs_as_global_cond=False),
    "hybrid": partial(_images, DiffusionUnetHybridImagePolicy),
    "video": partial(_images, DiffusionUnetVideoPolicy),
    "transformer": partial(_transformer, obs_as_cond=True),
    "transformer, inpainting": _transformer,
    "transformer, actions only": partial(
        _transformer, obs_as_cond=True, pred_action_steps_only=True
    ),
    "transformer, hybrid": _transformer_of_images,
}
"""Each policy of the repository, and each way of its to give observations, around a scheduler."""


def make(kind: str, scheduler: Any, **options: Any) -> Any:
    """A policy in eval mode, with weights that depend on its kind alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        policy = KINDS[kind](scheduler, **options)
    policy.set_normalizer(LinearNormalizer(**NORMALIZER))
    return policy.eval()


def observation(tick: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The output of environments at a tick: one step more than a policy looks at."""
    generator = torch.Generator().manual_seed(tick)
    shapes = {"obs": (OBS,), "image": (1, 5, 5)}
    return {
        name: torch.randn(batch, N_OBS + 1, *shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }
