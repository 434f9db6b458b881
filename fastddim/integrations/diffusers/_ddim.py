"""The two DDIM schedulers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.schedulers import scheduling_ddim as _ddim
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastddim.integrations._coefficients import ddim_row, limits
from fastddim.integrations._hooks import Hooks
from fastddim.integrations.diffusers._noising import Noising
from fastddim.integrations.diffusers._rows import (
    SignedTable,
    doubled,
    signed_table,
    strided,
)
from fastddim.integrations.diffusers._scheduler import drawn_like, output_object
from fastddim.integrations.diffusers._timesteps import check_one_of, given_timesteps
from fastddim.integrations.diffusers._tuned import (
    CONFIG_KEY,
    TunedRun,
    tuned_steps,
    tuned_table,
)
from fastddim.kept import keep
from fastddim.steptable import StepTable, TracedTable
from fastddim.tuned import TunedSteps

METHODS = ("_get_variance", "_threshold_sample")
ATTRIBUTES = ("alphas_cumprod", "final_alpha_cumprod")


class Ddim(Noising):
    """`step` of the two DDIM schedulers."""

    final_alpha_cumprod: Tensor
    _output_class: Any
    register_to_config: Any

    @classmethod
    def from_config(
        cls,
        config: Any = None,
        return_unused_kwargs: bool = False,
        *,
        tuned: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Make a scheduler, as in diffusers. `tuned` goes to `set_tuned`, and `noise`, `seed` and
        `sample_offset` to `set_noise`; by default they are those of the config.
        """
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        given = scheduler.config.get(CONFIG_KEY) if tuned is None else tuned
        if given is not None:
            scheduler.set_tuned(given)
        return made

    def set_tuned(self, tuned: Any) -> None:
        """Take tuned steps, which become a part of the config.

        `set_timesteps` then takes only their number, and `step` takes them in their order, from the
        first on, at η = 0 and without gradients. The steps are compared with the config and ᾱ.
        Their guidance is not, since guidance belongs to the pipeline.

        Args:
            tuned: `fastddim.TunedSteps`, the path of a file of them, or None for diffusers' own
                steps.

        Raises:
            TypeError: `tuned` is none of these.
            ValueError: the steps were tuned for another schedule, prediction or limit of x_0, or a
                method that diffusers' steps call is overridden.
        """
        steps = None if tuned is None else tuned_steps(tuned)
        if steps is not None:
            self._rows_of_tuned(steps, steps.tuned_for.rederive_eps)
        if steps is not None or CONFIG_KEY in self.config:
            self.register_to_config(**{CONFIG_KEY: None if steps is None else steps.as_dict()})
        self._fastddim_work.tuned = None if steps is None else TunedRun(steps)
        self.num_inference_steps = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Set the timesteps, as in diffusers. With tuned steps, the only valid number is theirs.

        Args:
            num_inference_steps: the number of steps, whose timesteps the config determines.
            device: device of `self.timesteps`.
            timesteps: the timesteps instead of their number, decreasing, which diffusers' class
                does not take. Each step ends at the next of them, and the last at
                `final_alpha_cumprod`.

        Raises:
            TypeError, IndexError: a timestep is not an integer.
            ValueError: both a number and timesteps are given, or neither; the timesteps are not
                decreasing or out of range; the steps are tuned, and another number or timesteps are
                given.
        """
        check_one_of(num_inference_steps, timesteps)
        run = self._fastddim_work.tuned
        if timesteps is not None:
            if run is not None:
                raise ValueError(
                    "timesteps: expected None with tuned steps, which have their own, got timesteps"
                )
            self._give_timesteps(given_timesteps(timesteps, self.config["num_train_timesteps"]))
        elif run is None:
            self._fastddim_work.given = None
            super().set_timesteps(num_inference_steps)  # type: ignore[misc]
        elif num_inference_steps != run.steps.steps:
            raise ValueError(
                f"num_inference_steps: expected {run.steps.steps}, the number of the tuned steps, "
                f"got {num_inference_steps}"
            )
        else:
            self._fastddim_work.tuned = TunedRun(run.steps)
            self._fastddim_work.given = None
            self.num_inference_steps = num_inference_steps
            self.timesteps = torch.tensor(run.steps.timesteps, device="cpu")
        self._move_timesteps(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take one step, as in diffusers, in one pass.

        Args:
            model_output, sample: `[B, …]`, floating point.
            timestep: an int, or a tensor with one; need not be among `timesteps`.
            eta: η of eq. 16 of arXiv 2010.02502.
            use_clipped_model_output: re-derive epsilon from the clipped x_0.
            generator, variance_noise: source of the noise for η > 0; at most one of them. Philox
                noise takes its seed from a generator; see `set_noise`.
            return_dict: return diffusers' output object instead of a tuple.

        Returns:
            prev_sample and pred_original_sample, each shaped like `sample`.

        Raises:
            ValueError: there is more than one timestep, both kinds of noise are given,
                `set_timesteps` was not called, or the config's prediction type is unknown; or the
                steps are tuned, and η is not 0 or the timestep is not the next one; or timesteps
                were given, and the step needs diffusers' own code, which knows only their number.
            IndexError: the timestep is not an index of `alphas_cumprod`, or none of those given.
            TypeError: the timestep is not a number.
        """
        in_graph, fused = is_dynamo_compiling(), self._fastddim_work
        if fused.tuned is not None:
            results = self._tuned_step(
                fused.tuned,
                model_output,
                timestep,
                sample,
                eta,
                use_clipped_model_output,
            )
            if not return_dict:
                return results
            return output_object(self._output_class, results[0], results[1], in_graph)
        row = timestep if type(timestep) is int else self._row(timestep, sample.device)
        if fused.given is not None:
            fused.given.check(row)
        state = self._state(sample, model_output)
        table: Any = None
        if state is not None and in_graph:
            table = self._table_in_graph(state, eta, use_clipped_model_output, False)
        elif state is not None:
            table = self._table(self.num_inference_steps, eta, use_clipped_model_output, False)
        if state is None or table is None:
            self._refuse_given()
            if variance_noise is None and eta > 0:
                variance_noise = self._philox_noise(timestep, model_output, generator)
                generator = generator if variance_noise is None else None
            return super().step(  # type: ignore[misc]
                model_output,
                timestep,
                sample,
                eta,
                use_clipped_model_output,
                generator,
                variance_noise,
                return_dict,
            )
        noise, keys = None, None
        if eta > 0:
            if variance_noise is None and fused.seed is not None:
                keys = self._philox_keys(timestep, state, generator)
            else:
                noise = _noise(model_output, sample, generator, variance_noise)
        results = table.take(state, model_output, row, noise=noise, keys=keys)
        if not return_dict:
            return results
        return output_object(self._output_class, results[0], results[1], in_graph)

    def _tuned_step(
        self,
        run: TunedRun,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float,
        rederive_eps: bool,
    ) -> tuple[Tensor, Tensor]:
        if self.num_inference_steps is None:
            raise ValueError(
                "num_inference_steps: expected set_timesteps to be called first, got None"
            )
        if eta != 0:
            raise ValueError(f"eta: expected 0 with tuned steps, which solve an ODE, got {eta!r}")
        state = self._state(sample, model_output)
        if state is None:
            raise ValueError(
                "sample: expected a floating-point tensor shaped like model_output with tuned "
                f"steps, got {sample.dtype} {tuple(sample.shape)} and {model_output.dtype} "
                f"{tuple(model_output.shape)}"
            )
        table = self._tuned_table(run.steps, bool(rederive_eps))
        return run.take(table, self._read(timestep), state, model_output)

    def _tuned_table(self, steps: TunedSteps, rederive_eps: bool) -> StepTable:
        alphas, config, kept = self.alphas_cumprod, self.config, self._fastddim_work.tables
        try:
            key = (rederive_eps, alphas._version, id(config), id(alphas), id(steps))
        except RuntimeError:  # from a tensor of inference mode
            if self._count_changes("alphas_cumprod"):
                return self._tuned_table(steps, rederive_eps)
            return self._rows_of_tuned(steps, rederive_eps)
        return kept.get(key) or keep(
            kept,
            key,
            lambda: self._rows_of_tuned(steps, rederive_eps),
            sources=(config, alphas, steps),
        )

    def _rows_of_tuned(self, steps: TunedSteps, rederive_eps: bool) -> StepTable:
        hook = self._fastddim_hooks.overridden(self)
        if hook is not None:
            raise ValueError(
                f"tuned: expected None if {hook} is overridden, which tuned steps do not call, "
                "got tuned steps"
            )
        return tuned_table(steps, self.config, self._on_host("alphas_cumprod"), rederive_eps)

    def _table_in_graph(
        self, state: Tensor, eta: Any, rederive_eps: bool, ends_at_one: bool
    ) -> TracedTable | None:
        arguments = (self.num_inference_steps, eta, bool(rederive_eps), ends_at_one)
        rescaling = limits(self.config)[1]
        return self._in_graph("_table", state, *arguments, rescaling=rescaling, kind=SignedTable)

    def _table(
        self, steps: int | None, eta: Any, rederive_eps: bool, ends_at_one: bool
    ) -> SignedTable | None:
        """The table of an η; None if diffusers takes the step, because it has an error to raise or
        the kernel does not cover the case.

        Args:
            steps: `num_inference_steps`.
            ends_at_one: whether ᾱ after the last timestep is 1, whatever the scheduler's is.
        """
        if not isinstance(eta, (float, int)):
            return None
        alphas, final, config = self.alphas_cumprod, self.final_alpha_cumprod, self.config
        fused = self._fastddim_work
        kept, given = fused.tables, fused.given
        try:
            key = (
                eta,
                rederive_eps,
                ends_at_one,
                steps,
                given,
                alphas._version,
                final._version,
                id(config),
                id(alphas),
                id(final),
            )
        except RuntimeError:  # from a tensor of inference mode
            settled = self._count_changes(*ATTRIBUTES)
            return self._table(steps, eta, rederive_eps, ends_at_one) if settled else None
        table: SignedTable | None = kept.get(key)
        if table is None and steps is not None and not eta < 0 and self._covered():
            host, last = map(self._on_host, ATTRIBUTES)

            def make() -> SignedTable:
                final_alpha = host.new_ones(()) if ends_at_one else last.to(host)
                stride = config["num_train_timesteps"] // steps
                before = (
                    strided(host, stride, final_alpha)
                    if given is None
                    else given.neighbours(host, final_alpha)
                )
                return _table(config, host, before, final_alpha, float(eta), bool(rederive_eps))

            table = keep(kept, key, make, sources=(config, alphas, final))
        return table


def _table(
    config: Mapping[str, Any],
    alphas: Tensor,
    before: Tensor,
    final: Tensor,
    eta: float,
    rederive_eps: bool,
) -> SignedTable:
    row = ddim_row(config, *doubled(alphas, before, final), eta, rederive_eps)
    return signed_table(row, limits(config)[1])


def _noise(
    model_output: Tensor,
    sample: Tensor,
    generator: torch.Generator | None,
    variance_noise: Tensor | None,
) -> Tensor:
    """The given noise, or noise drawn as diffusers draws it."""
    if variance_noise is None:
        return drawn_like(model_output, generator)
    if generator is not None:
        raise ValueError(
            "Cannot pass both generator and variance_noise. Please make sure that either "
            "`generator` or `variance_noise` stays `None`."
        )
    if variance_noise.shape != sample.shape:
        return variance_noise.expand(sample.shape)
    return variance_noise


class DDIMScheduler(Ddim, _ddim.DDIMScheduler):  # type: ignore[misc]
    """diffusers' `DDIMScheduler` with fused steps; the module says what they keep.

    ```python
    import diffusers, fastddim.integrations.diffusers, torch
    theirs = diffusers.DDIMScheduler()
    scheduler = fastddim.integrations.diffusers.DDIMScheduler.from_config(theirs.config)
    scheduler.set_timesteps(50)
    x = scheduler.step(torch.zeros(1, 3, 8, 8), scheduler.timesteps[0], torch.ones(1, 3, 8, 8))
    ```
    """

    _output_class = _ddim.DDIMSchedulerOutput
    _fastddim_hooks = Hooks(*METHODS, of=("DDIMScheduler",), attributes=ATTRIBUTES)
