"""The public functions: check once, then one call down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastddim import direct
from fastddim.choices import Impl, Prediction, PredictionSynonym, Variance, VarianceSynonym
from fastddim.loop.pool import POOL
from fastddim.loop.setup import prepare_inversion, prepare_sampling
from fastddim.options import Coefficient, InvertOptions, NoiseSource, SampleOptions, Seed
from fastddim.signatures import takes
from fastddim.single import StepOptions, prepared_step
from fastddim.stepping import take
from fastddim.tracing import in_program
from fastddim.validation import (
    check_bool,
    check_state,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(SampleOptions)
def sample(options: SampleOptions) -> Tensor:
    """Draw samples with DDIM (arXiv 2010.02502, eq. 12).

    Calls differ, and `torch.manual_seed` repeats them; with a `seed` they repeat by themselves.

    Args:
        model: any callable `model(x, t, **model_kwargs)` with t an int64 tensor `[B]` on x's
            device. It returns a tensor, a tuple that starts with one, or an object with `.sample`;
            of twice as many channels as x (learned variance) the first half is used. It gets x in
            `model_dtype`. x and t are buffers that the loop writes over: a model must not change
            them, nor keep them without a copy.
        steps: number of steps S in [1, T], or the timesteps themselves in the order visited
            (decreasing), or tuned steps (`fastddim.load_steps`), which have timesteps and weights
            of their own: only at eta = 0, with the default `spacing` and `order`, and with the
            schedule, prediction, clip, thresholding and guidance that they were tuned for.
        schedule: ᾱ the model was trained with; by default `model.schedule`, also of a network that
            the model wraps or reaches, else `Schedule.linear()`, with a warning.
        spacing: how S timesteps are chosen out of T: trailing, which starts at T − 1 whatever S
            is, uniform (the paper's linear τ), quadratic (or "quad"), leading or linspace (see
            `fastddim.select_timesteps`). With few steps the others may start where the model
            expects more of the data than of noise, which a warning tells where x_T is drawn.
        steps_offset: added to every timestep of `leading`.
        eta: η ≥ 0 of eq. 16, a number or a tensor `[B]`, or a sequence of S of them, one a step; 0
            is DDIM, 1 is DDPM's ancestral sampling.
        variance: "small", or "large" for noise of DDPM's larger variance; `eta=1, variance="large"`
            is the paper's σ-hat. The direction term keeps the small one (appendix D.3). Also by the
            names "fixed_small" and "fixed_large" of other libraries.
        prediction: what the model predicts: "epsilon" (or "eps", "noise", "pred_noise"), "sample",
            which is x_0 (or "x0", "x_0", "pred_x0", "x_start", "start_x"), "v_prediction" (or "v",
            "velocity", "pred_v": √ᾱ_t·ε − √(1 − ᾱ_t)·x_0), or "score", the gradient ∇ log p_t(x) of
            the log density of the noised data.
        clip: r > 0 clamps the predicted x_0 to [−r, r], and so the samples. Without it those of
            data in [−1, 1] go beyond: around the bundled digits a fifth of the values do, at 20
            steps to ±1.1. `fastddim.images` clamps what it writes.
        rederive_eps: recompute epsilon from the clipped x_0.
        guidance_scale: g of classifier-free guidance, a number or a tensor `[B]`, or a sequence of
            S of them: the model's output is u + g·(c − u), of u without the condition and c with
            it. The model is evaluated on 2B samples, of which the first half is u's;
            `uncond_kwargs` or `uncond_model` says what u is.
        temperature: factor of the noise, a number or a tensor `[B]`, or a sequence of S of them;
            x_T has none.
        guidance_rescale: φ in [0, 1] that takes the guided output of each sample towards the
            standard deviation of its conditional one (arXiv 2305.08891, section 3.4).
        dynamic_thresholding_ratio: in (0, 1]: with s this quantile of a sample's |x_0|, but at
            least 1, x_0 is clamped to [−s, s] and divided by s (arXiv 2205.11487, section 2.3).
            Instead of `clip`, for samples of any size.
        sample_max_value: the most that s can be, at least 1; None is no limit.
        denoised_fn: `denoised_fn(x_0, t)` replaces the predicted x_0 `[B, …]` before it is clipped
            or thresholded, with t the int64 timesteps `[B]`; it may change x_0 in place and must
            return it. Epsilon is the model's, unless `rederive_eps`.
        order: 2 solves the paper's ODE (eq. 14) by the two-step Adams–Bashforth method at the same
            number of model evaluations: the error falls as S⁻² instead of S⁻¹. Only for eta = 0.
        seed: int in [0, 2⁶⁴), or one per sample (a sequence, or an int64 tensor read as unsigned
            bits): then sample i is the one drawn alone with that seed. By default a fresh one from
            torch's default generator of the CPU, drawn where x_T or noise come from it.
        sample_offset: global index of the first sample: samples 64…127 of a seed are
            `sample_offset=64`.
        noise: noise to use instead of the seed's: a tensor `[S, B, …]`, a `torch.Generator` or a
            list of B of them. A generator draws x_T first. Unread where no noise is added.
        x_T: starting state `[B, …]`; by default drawn from `seed` or `noise`. Not modified.
        first_step: index of the first step that is taken, in [0, S): k > 0 goes on with a run from
            `x_T`, its state after k steps, as a `callback` or the trajectory gives it. With the
            same other arguments the result has the bits of the whole run, except that generators
            draw from where they stand and `known` data are mixed with the latents of `seed`, which
            must be given. Not at order 2 nor with tuned steps, which read the step before.
        shape: (B, …) of the state; by default that of `x_T`, else `batch_size` samples of the shape
            that the model tells (`.sample_shape`, or a diffusers `.config`), or one that it wraps.
        mask: weight of `known` in the result, 1 where it is kept and 0 where the model paints (as
            in latent-diffusion; the `mask_image` of diffusers is the opposite), or between, of any
            shape that broadcasts to the state's. Values outside [0, 1] are refused; on an
            accelerator, which would have to be waited for, they make the result NaN.
        known: data `[B, …]` for `mask`. After each step the state is blended with it as it is at
            that noise level: mixed with the noise in x_T, and itself at the end.
        batch_size: B where `shape` is not given.
        device: of the state; by default that of `x_T`, else the model's: where the hooks of
            accelerate or diffusers take offloaded weights, or where its parameters are.
        dtype: of the state; by default that of `x_T`, else float32.
        model_dtype: of x as the model gets it; by default the model's own: what hooks cast its
            weights to for computation, its `dtype`, or the one dtype of its floating-point
            parameters. Where these differ, or the model is no module, the state's.
        impl: "auto", or the backend to use and no other ("reference", …; `fastddim env` lists
            them).
        graph: CUDA graph capture, which takes the host out of the loop: True captures one step and
            replays it S times, "loop" captures all steps and replays them once (without
            `callback`; the fastest around small models, see docs/gpu.md), False captures nothing.
            "auto" captures on a CUDA device alone: all steps where they are few kernels and nothing
            watches them (see docs/graph.md), else one; where the model cannot be captured, or with
            `check_finite`, it runs without a graph, and warns of the former. Graphs are
            kept for later calls with the same model, shapes and kind of arguments, until
            `fastddim.graph.clear()`. What a captured model reads besides x, t, its parameters and
            the tensors in `model_kwargs` stays as it was at capture.
        progress: show a tqdm bar on stderr.
        callback: `callback(step_index, timestep, x_t, x_0)` after each update, with copies of the
            new state and of the predicted x_0. The run ends after a step for which it returns
            `fastddim.STOP`, with the state as it then is.
        return_trajectory: return all states.
        check_finite: stop with an error that names the step where the model returns NaN or
            infinity. This waits for the device at every step.
        model_kwargs: passed to the model. Tensors, also those in nested mappings and sequences,
            have B rows, one a sample, or one row, which the model gets as B rows. Tensors without
            dimensions, lists of tensors that differ in their number of rows, and all that is no
            tensor are passed unchanged. Under guidance without `uncond_kwargs` and `uncond_model`,
            tensors have 2B rows, those for u first.
        uncond_kwargs: under guidance, the values for u by the names of `model_kwargs`, such as
            `{"y": null_label}`: tensors of B rows or one, or numbers, with the dtype and the rest
            of the shape of the conditional ones. The model gets both as one tensor of 2B rows; what
            is in `model_kwargs` alone is the same for both.
        uncond_model: under guidance, another model that gives u, such as a weaker network
            (autoguidance, arXiv 2406.02507) or one without conditions. Both are evaluated on the
            same B samples, `uncond_model` with `model_kwargs` in which `uncond_kwargs` have
            replaced values, and must give outputs of the same shape and dtype.

    Returns:
        The samples `[B, …]`; with `return_trajectory` the states `[S + 1, B, …]` from x_T to the
        samples, fewer by the steps that are left out before `first_step` or after a stop.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it.
    """
    if in_program():
        from fastddim.loop import traced

        return traced.sample(options, _sample)
    return _sample(options)


def _sample(options: SampleOptions) -> Tensor:
    with POOL.borrow(prepare_sampling(options, x_T=options.x_T)) as loop:
        return loop.sample(options)


@takes(InvertOptions)
def invert(options: InvertOptions) -> Tensor:
    """Encode data into latents: the steps of `sample` walked upwards (arXiv 2010.02502, section
    4.3).

    `sample(model, steps, x_T=invert(model, x_0, steps))` gives back `x_0` up to an error that falls
    with the number of steps. Each step to timestep t evaluates the model at (current state, t), the
    explicit guess for the equation that `sample` solves exactly in the other direction; `refine`
    iterates towards its solution.

    Args:
        x_0: data `[B, …]`. Not modified.
        eta, clip, rederive_eps: only their defaults; anything else cannot be inverted and is
            refused.
        order: 2 inverts `sample(order=2)` up to an error that falls as S⁻²; only its first step is
            the explicit guess, the others evaluate the model where they start.
        refine: how many times each step is taken again with the model evaluated at its result: a
            fixed-point iteration on the equation that `sample` solves, each at the price of one
            more evaluation. In [0, 100], and 0 at order 2.

    The other arguments are those of `sample`.

    Returns:
        The latents `[B, …]` at the first timestep that `sample` visits; with `return_trajectory`
        the states `[S + 1, B, …]` from `x_0` to them.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range, or cannot be
            inverted (among them `prediction="sample"`, whose step from ᾱ = 1 does not depend on the
            state); the message names it.
    """
    if in_program():
        from fastddim.loop import traced

        return traced.invert(options, _invert)
    return _invert(options)


def _invert(options: InvertOptions) -> Tensor:
    with POOL.borrow(prepare_inversion(options)) as loop:
        return loop.run(options.x_0, options)


@overload
def step(
    x_t: Tensor,
    model_output: Tensor,
    alpha_t: Coefficient,
    alpha_prev: Coefficient,
    *,
    return_x0: Literal[False] = False,
    **options: Unpack[StepOptions],
) -> Tensor: ...


@overload
def step(
    x_t: Tensor,
    model_output: Tensor,
    alpha_t: Coefficient,
    alpha_prev: Coefficient,
    *,
    return_x0: Literal[True],
    **options: Unpack[StepOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def step(
    x_t: Tensor,
    model_output: Tensor,
    alpha_t: Coefficient,
    alpha_prev: Coefficient,
    *,
    return_x0: bool,
    **options: Unpack[StepOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def step(
    x_t: Tensor,
    model_output: Tensor,
    alpha_t: Coefficient,
    alpha_prev: Coefficient,
    *,
    eta: Coefficient = 0.0,
    variance: Variance | VarianceSynonym = "small",
    prediction: Prediction | PredictionSynonym = "epsilon",
    clip: float | None = None,
    rederive_eps: bool = False,
    guidance_scale: Coefficient | None = None,
    temperature: Coefficient = 1.0,
    guidance_rescale: float = 0.0,
    dynamic_thresholding_ratio: float | None = None,
    sample_max_value: float | None = None,
    seed: Seed | None = None,
    sample_offset: int = 0,
    step_index: int | Tensor = 0,
    noise: NoiseSource = None,
    out: Tensor | None = None,
    return_x0: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One DDIM update (arXiv 2010.02502, eq. 12): what `sample` does between two model evaluations.

    Args:
        x_t: state `[B, …]`, floating point.
        model_output: `[B, …]` shaped like `x_t`, or with 2C channels (learned variance: the first
            half is used), or with 2B samples under guidance. Its dtype may differ from that of
            `x_t`.
        alpha_t: ᾱ_t (`alphas_cumprod[t]`) in [0, 1), a number or a tensor `[B]`.
        alpha_prev: ᾱ at the next visited timestep in [0, 1], 1 after the last, a number or a tensor
            `[B]`.
        seed, sample_offset, step_index: key the noise; `seed` and `step_index` may be `[B]`. With
            the step's index in the plan this is the noise that `sample` adds. Without a seed the
            noise of each call is fresh.
        noise: z to use instead, shaped like `x_t`, or a `torch.Generator` or a list of B of them to
            draw it.
        out: where to write x_prev, with the shape, dtype and device of `x_t`; may be `x_t` itself.
        return_x0: also return the predicted x_0.

    The other arguments are those of `sample`. Values of coefficient tensors on an accelerator are
    not checked, since reading them would wait for the device.

    Without `out` the result is differentiable, to any order and in forward mode too, in `x_t`,
    `model_output`, a `noise` tensor and coefficient tensors (at ᾱ_prev = 1 as if the roots that are
    0 there stayed so); at a bound of the clip the derivative is that inside. The transforms of
    `torch.func` follow it. Under `torch.vmap` each of the mapped calls is that call alone, and so
    all have the same noise of a seed, unless `seed` or `step_index` are mapped too, as int64
    tensors; without a seed the `randomness` of `torch.vmap` decides.

    Returns:
        x_prev, or `(x_prev, x_0)`, with the shape, dtype and device of `x_t`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it.
        RuntimeError: `out` is given where autograd or a transform follows the result.
    """
    if not is_dynamo_compiling():
        taken = direct.step(
            x_t,
            model_output,
            alpha_t,
            alpha_prev,
            eta,
            variance,
            prediction,
            clip,
            rederive_eps,
            guidance_scale,
            temperature,
            guidance_rescale,
            dynamic_thresholding_ratio,
            sample_max_value,
            seed,
            sample_offset,
            step_index,
            noise,
            out,
            return_x0,
            impl,
        )
        if taken is not None:
            return taken
    check_state("x_t", x_t)
    check_bool("return_x0", return_x0)
    update = {
        "eta": eta,
        "variance": variance,
        "prediction": prediction,
        "clip": clip,
        "rederive_eps": rederive_eps,
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "guidance_rescale": guidance_rescale,
        "dynamic_thresholding_ratio": dynamic_thresholding_ratio,
        "sample_max_value": sample_max_value,
    }
    return take(
        prepared_step(x_t, alpha_t, alpha_prev, impl, update),
        x_t,
        model_output,
        seed=seed,
        sample_offset=sample_offset,
        step_index=step_index,
        noise=noise,
        out=out,
        return_x0=return_x0,
    )
