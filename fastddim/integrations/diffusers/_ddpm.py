"""The scheduler of DDPM's ancestral steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.schedulers import scheduling_ddpm as _ddpm
from torch import Tensor

from fastddim.integrations._coefficients import ancestral_row, limits, posterior
from fastddim.integrations._hooks import Hooks
from fastddim.integrations._shared import each
from fastddim.integrations.diffusers._noising import Noising
from fastddim.integrations.diffusers._rows import SignedTable, signed_table
from fastddim.integrations.diffusers._scheduler import drawn_like, output_object
from fastddim.kept import keep
from fastddim.tracing import constant, is_constant, is_traced


class DDPMScheduler(Noising, _ddpm.DDPMScheduler):  # type: ignore[misc]
    """diffusers' `DDPMScheduler` with fused steps; the module says what they keep.

    ```python
    import diffusers, fastddim.integrations.diffusers, torch
    theirs = diffusers.DDPMScheduler()
    scheduler = fastddim.integrations.diffusers.DDPMScheduler.from_config(theirs.config)
    scheduler.set_timesteps(50)
    x = scheduler.step(torch.zeros(1, 3, 8, 8), scheduler.timesteps[0], torch.ones(1, 3, 8, 8))
    ```
    """

    _fastddim_hooks = Hooks(
        "_get_variance",
        "_threshold_sample",
        "previous_timestep",
        of=("DDPMScheduler",),
        attributes=("alphas_cumprod",),
    )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the timesteps, as in diffusers."""
        super().set_timesteps(num_inference_steps, timesteps=timesteps)  # type: ignore[arg-type]
        self._move_timesteps(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take one ancestral step (arXiv 2006.11239, eq. 7), as in diffusers, in one pass.

        Args:
            model_output: `[B, C, …]`, or `[B, 2C, …]` with a learned variance.
            timestep: an int, or a tensor with one, among `timesteps` if these are set.
            sample: `[B, C, …]`, floating point.
            generator: generator of the noise, which is added if t > 0. Philox noise takes its seed
                from a generator; see `set_noise`.
            return_dict: return diffusers' output object instead of a tuple.

        Returns:
            prev_sample and pred_original_sample, each shaped like `sample`.

        Raises:
            IndexError: the timestep is not among `timesteps`, or not an integer.
            TypeError: the timestep is not a number.
            ValueError: there is more than one timestep, or the config's prediction type is unknown;
                or a method of diffusers is overridden, and noise="philox".
        """
        in_graph = is_traced(timestep)
        t: int | Tensor
        if type(timestep) is int:
            t = timestep
        else:
            t = self._row(timestep, sample.device) if in_graph else self._read(timestep)
        learned = self.variance_type in ("learned", "learned_range")
        predicted = None
        mean = model_output
        if learned and model_output.shape[1] == 2 * sample.shape[1]:
            mean, predicted = model_output.split(sample.shape[1], dim=1)
        state = self._state(sample, mean)
        steps = None if state is None else self._steps(state, t, in_graph)
        if state is None or steps is None or (learned and predicted is None):
            if not isinstance(t, Tensor) and not in_graph:
                self._check_fallback(t)
            return super().step(model_output, timestep, sample, generator, return_dict)
        noise, keys = None, None
        # For a timestep in a tensor, noise is drawn at 0 too, and not read there.
        if isinstance(t, Tensor) or t > 0:
            at = timestep if in_graph else t
            if self._fastddim_work.seed is None:
                noise = drawn_like(mean, generator)
            elif predicted is None:
                keys = self._philox_keys(at, state, generator)
            else:
                noise = self._philox_noise(at, mean, generator)
        if noise is not None and predicted is not None:
            noise = self._deviation(steps, t, predicted) * noise
        results = steps.table.take(state, mean, t, noise=noise, keys=keys)
        if not return_dict:
            return results
        return output_object(_ddpm.DDPMSchedulerOutput, results[0], results[1], in_graph)

    def _check_fallback(self, t: int) -> None:
        """Refuse cases for which diffusers' own step has an unclear error or none."""
        hook = self._fastddim_hooks.overridden(self)
        if hook is not None and self._fastddim_work.seed is not None:
            raise ValueError(
                f"noise: expected 'torch' if {hook} is overridden, since diffusers' own step "
                "draws the noise then, got 'philox'"
            )
        visiting = self.custom_timesteps or self.num_inference_steps
        if hook is None and visiting and t not in self._host_timesteps().step_of:
            raise IndexError(f"timestep: expected one of the scheduler's timesteps, got {t}")

    def _deviation(self, steps: _Ancestral, t: int | Tensor, predicted: Tensor) -> Tensor:
        """Standard deviation of the noise of each element, if it is learned."""
        if self.variance_type == "learned":
            return predicted**0.5
        low, high = steps.log_variances[t]
        fraction = (predicted + 1) / 2
        return torch.exp(0.5 * (fraction * high + (1 - fraction) * low))

    def _steps(self, state: Tensor, t: Any, in_graph: bool) -> _Ancestral | None:
        """The steps; None if diffusers has an error to raise, such as for a timestep that is not
        visited.
        """
        if in_graph:
            return self._steps_in_graph(state, t)
        steps = self._ancestral()
        return steps if steps is not None and t in steps.visited else None

    def _ancestral(self) -> _Ancestral | None:
        """The steps; None if diffusers has an error to raise."""
        alphas, timesteps, config = self.alphas_cumprod, self.timesteps, self.config
        kind, custom, steps = self.variance_type, self.custom_timesteps, self.num_inference_steps
        try:
            versions = alphas._version, timesteps._version
        except RuntimeError:  # from a tensor of inference mode
            return self._ancestral() if self._count_changes("alphas_cumprod", "timesteps") else None
        key = (steps, custom, kind, *versions, id(config), id(alphas), id(timesteps))
        kept = self._fastddim_work.tables
        found: _Ancestral | None = kept.get(key)
        if found is None and kind == config["variance_type"] and self._covered():
            every = range(len(alphas))[::-1]
            visited = self._host_timesteps().values if custom or steps else every
            host = self._on_host("alphas_cumprod")
            found = keep(
                kept,
                key,
                lambda: _ancestral(config, host, visited),
                sources=(config, alphas, timesteps),
            )
        return found

    def _steps_in_graph(self, state: Tensor, t: int | Tensor) -> _Ancestral | None:
        """`_steps` for a graph; a timestep that the graph does not hold constant and that is not
        visited gives NaN.
        """
        kind, visited = self.variance_type, self._visited_in_graph()
        constant_t = t if not isinstance(t, Tensor) and is_constant(t) else None
        if visited is None or (kind == "learned_range" and constant_t is None):
            return None
        rescaling = limits(self.config)[1]
        arguments = (kind, self.custom_timesteps, self.num_inference_steps, visited, constant_t)
        table = self._in_graph(
            "_kept_table", state, *arguments, rescaling=rescaling, kind=SignedTable
        )
        if table is None:
            return None
        bounds = {}
        if kind == "learned_range" and constant_t is not None:
            bounds[constant_t] = self._bounds_in_graph(constant_t)
        return _Ancestral(table, frozenset(), bounds)

    def _kept_table(self, *arguments: Any) -> SignedTable | None:
        found, t = self._ancestral(), arguments[-1]
        visited = found is not None and (t is None or t in found.visited)
        return found.table if found is not None and visited else None

    @constant
    def _bounds_in_graph(self, t: int) -> tuple[float, float]:
        found = self._ancestral()
        assert found is not None
        return found.log_variances[t]


class _Ancestral(NamedTuple):
    """The steps of DDPM down some timesteps."""

    table: Any  # a SignedTable, or its step in a graph
    visited: frozenset[int]
    log_variances: Mapping[Any, tuple[float, float]]
    """(smallest, largest) of each timestep, if the variance is learned between them."""


def _ancestral(config: Mapping[str, Any], alphas: Tensor, visited: Sequence[int]) -> _Ancestral:
    # If a timestep occurs twice, diffusers finds the first.
    pairs = list(zip(visited, [*visited[1:], -1], strict=True))[::-1]
    previous = dict(pairs)
    before = torch.full_like(alphas, float("nan")).repeat(2)
    for t, earlier in previous.items():
        before[t] = alphas[earlier] if earlier >= 0 else 1.0
    a, p = alphas.repeat(2), before
    row = ancestral_row(config, a, p)
    deviation: Any = row.pn
    deviation[[0, len(alphas)]] = 0.0  # There is no noise at t = 0.
    log_variances = {}
    if config["variance_type"] == "learned_range":
        _, _, *variances = posterior(a, p)
        logs = (each(torch.log, v[: len(alphas)]).tolist() for v in variances)
        log_variances = dict(enumerate(zip(*logs, strict=True)))
    _, rescaling = limits(config)
    return _Ancestral(signed_table(row, rescaling), frozenset(previous), log_variances)
