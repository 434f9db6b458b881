"""The public functions `sample`, `invert` and `step`, which each hand over to one call."""

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

    With a `seed`, a call always draws the same samples. Without one, each call draws others, which
    `torch.manual_seed` makes repeatable.

    Args:
        model: any callable `model(x, t, **model_kwargs)` with t an int64 tensor `[B]` on x's
            device. It returns a tensor, a tuple that starts with one, or an object with `.sample`;
            of an output with twice as many channels as x (learned variance), the first half is
            used. x has the dtype `model_dtype`. The loop overwrites x and t: a model must not
            change them, and must copy what it keeps of them.
        steps: number of steps S in [1, T], or the timesteps themselves in the order visited
            (decreasing), or tuned steps (`fastddim.load_steps`). Tuned steps have timesteps and
            weights of their own. They need eta = 0, the default `spacing` and `order`, and the
            schedule, prediction, clip, thresholding and guidance that they were tuned for.
        schedule: ᾱ that the model was trained with. The default is `model.schedule`, or that of a
            network that the model wraps or reaches; if there is none, `Schedule.linear()`, with a
            warning.
        spacing: rule that chooses S of the T timesteps: trailing, which starts at T − 1 for every
            S, uniform (the paper's linear τ), quadratic (or "quad"), leading or linspace (see
            `fastddim.select_timesteps`). With few steps, all but trailing may start at a timestep
            whose states are more data than noise; a warning says so if x_T is drawn here.
        steps_offset: number added to every timestep of `leading`.
        eta: η ≥ 0 of eq. 16: a number, a tensor `[B]`, or a sequence of S of these, one a step. 0
            is DDIM, 1 is DDPM's ancestral sampling.
        variance: "small", or "large" for noise of DDPM's larger variance; `eta=1, variance="large"`
            is the paper's σ-hat. The direction term keeps the small variance (appendix D.3). Other
            libraries' names "fixed_small" and "fixed_large" mean the same.
        prediction: quantity that the model predicts: "epsilon" (or "eps", "noise", "pred_noise"),
            "sample", which is x_0 (or "x0", "x_0", "pred_x0", "x_start", "start_x"), "v_prediction"
            (or "v", "velocity", "pred_v": √ᾱ_t·ε − √(1 − ᾱ_t)·x_0), or "score", the gradient
            ∇ log p_t(x) of the log density of the noised data.
        clip: r > 0 clamps the predicted x_0 to [−r, r], and with it the samples. Without a clip,
            samples of data in [−1, 1] can leave that range: of the bundled digits at 20 steps, a
            fifth of the values do, and reach ±1.1. `fastddim.images` clamps the images that it
            writes.
        rederive_eps: recompute epsilon from the clipped x_0.
        guidance_scale: g of classifier-free guidance: a number, a tensor `[B]`, or a sequence of S
            of these, one a step. The guided output is u + g·(c − u), where c is the model's output
            with the condition and u the output without it. The model is evaluated on 2B samples,
            those for u first; `uncond_kwargs` or `uncond_model` define u.
        temperature: factor of the noise of each step: a number, a tensor `[B]`, or a sequence of S
            of these, one a step. It does not scale x_T.
        guidance_rescale: φ in [0, 1]. It moves the standard deviation of each sample's guided
            output towards that of its conditional output (arXiv 2305.08891, section 3.4).
        dynamic_thresholding_ratio: a quantile in (0, 1]. With s this quantile of a sample's |x_0|,
            but at least 1, x_0 is clamped to [−s, s] and divided by s (arXiv 2205.11487, section
            2.3). It takes the place of `clip`. Samples may be of any size.
        sample_max_value: upper limit of s, at least 1; None for no limit.
        denoised_fn: `denoised_fn(x_0, t)` replaces the predicted x_0 `[B, …]` before it is clipped
            or thresholded; t holds the int64 timesteps `[B]`. The function may change x_0 in place,
            and must return the result. Epsilon stays the model's, unless `rederive_eps`.
        order: 2 solves the paper's ODE (eq. 14) by the two-step Adams–Bashforth method at the same
            number of model evaluations: the error falls as S⁻² instead of S⁻¹. Only for eta = 0.
        seed: int in [0, 2⁶⁴), or one per sample (a sequence, or an int64 tensor read as unsigned
            bits); with one per sample, each sample is the one that its seed gives alone. By default
            a fresh seed from torch's default generator of the CPU, if x_T or noise depend on it.
        sample_offset: global index of the first sample: with `sample_offset=64`, a batch of 64
            holds samples 64…127 of the seed.
        noise: noise to use instead of the seed's: a tensor `[S, B, …]`, a `torch.Generator` or a
            list of B of them. A generator first draws x_T. Steps that add no noise read none.
        x_T: starting state `[B, …]`; by default drawn from `seed` or `noise`. Not modified.
        first_step: index of the first step to take, in [0, S). k > 0 continues a run from `x_T`,
            its state after k steps, which a `callback` or the trajectory gives. With the other
            arguments unchanged, the result has the bits of the whole run, with two exceptions:
            generators draw from their current state, and `known` data are mixed with the latents of
            `seed`, which must be given. Order 2 and tuned steps exclude it, since their steps read
            the epsilon of the step before.
        shape: (B, …) of the state. The default is that of `x_T`; without x_T, `batch_size` samples
            of the shape that the model, or one that it wraps, declares (`.sample_shape`, or a
            diffusers `.config`).
        mask: weight of `known` in the result, of any shape that broadcasts to the state's: 1 keeps
            the known data, 0 lets the model paint (as in latent-diffusion; the `mask_image` of
            diffusers is the opposite), and values between mix both. Values outside [0, 1] are
            refused on the CPU. On an accelerator, where a check would wait for the device, they
            make the result NaN.
        known: data `[B, …]` for `mask`. After each step the state is blended with these data at the
            noise level of the state: mixed with the noise in x_T, and without noise at the end.
        batch_size: B if `shape` is not given.
        device: device of the state. The default is that of `x_T`; without x_T, the model's: the
            device to which hooks of accelerate or diffusers move offloaded weights, or else the one
            of its parameters.
        dtype: dtype of the state; by default that of `x_T`, else float32.
        model_dtype: dtype in which the model gets x. By default the model's own: the one to which
            hooks cast its weights for computation, its `dtype`, or the one dtype of its
            floating-point parameters. If they have several, or the model is not a module, it is the
            state's dtype.
        impl: "auto", or the only backend to use ("reference", …; `fastddim env` lists them).
        graph: CUDA graph capture, which takes the host out of the loop. True captures one step and
            replays it S times. "loop" captures all steps and replays them once, without `callback`:
            the fastest choice for small models (see docs/gpu.md). False captures nothing. "auto"
            captures only on a CUDA device: all steps if they are few kernels and nothing watches
            them (see docs/graph.md), otherwise one. "auto" runs without a graph under
            `check_finite` and, with a warning, if the model cannot be captured. Graphs are kept for
            later calls with the same model, shapes and kind of arguments, until
            `fastddim.graph.clear()`. What a captured model reads besides x, t, its parameters and
            the tensors in `model_kwargs` keeps the values that it had at capture.
            keeps the values that it had at capture.
        progress: show a tqdm bar on stderr.
        callback: `callback(step_index, timestep, x_t, x_0)`, called after each update with copies
            of the new state and of the predicted x_0. If it returns `fastddim.STOP`, the run ends
            with that state.
        return_trajectory: return all states.
        check_finite: raise an error that names the step if the model returns NaN or infinity. This
            check waits for the device at every step.
        model_kwargs: keyword arguments of the model. Tensors, also those in nested mappings and
            sequences, have B rows, one a sample, or one row, which the model gets as B rows.
            Tensors without dimensions, lists of tensors that differ in their number of rows, and
            everything that is not a tensor are passed unchanged. Under guidance without
            `uncond_kwargs` and `uncond_model`, tensors have 2B rows, those for u first.
        uncond_kwargs: under guidance, the values for u under names of `model_kwargs`, such as
            `{"y": null_label}`: numbers, or tensors of B rows or one whose dtype and other
            dimensions are those of the conditional ones. The model gets both as one tensor of 2B
            rows. What only `model_kwargs` has is the same for u and c.
        uncond_model: under guidance, another model that gives u, such as a weaker network
            (autoguidance, arXiv 2406.02507) or one without conditions. Both models are evaluated on
            the same B samples, `uncond_model` with the `model_kwargs` in which `uncond_kwargs`
            replace values. Their outputs must have the same shape and dtype.

    Returns:
        The samples `[B, …]`; with `return_trajectory` the states `[S + 1, B, …]` from x_T to the
        samples, without those before `first_step` or after a stop.

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
    with the number of steps. Each step to timestep t evaluates the model at (current state, t): an
    explicit guess for the equation that `sample` solves exactly in the other direction. `refine`
    iterates towards the solution of that equation.

    Args:
        x_0: data `[B, …]`. Not modified.
        eta, clip, rederive_eps: their defaults only; other values cannot be inverted and are
            refused.
        order: 2 inverts `sample(order=2)` up to an error that falls as S⁻². Only its first step is
            an explicit guess; the other steps evaluate the model where they start.
        refine: number of times that each step is taken again with the model evaluated at the
            result of the step: a fixed-point iteration on the equation that `sample` solves. Each
            time costs one more evaluation per step. In [0, 100], and 0 at order 2.

    The other arguments are those of `sample`.

    Returns:
        The latents `[B, …]` at the first timestep that `sample` visits; with `return_trajectory`
        the states `[S + 1, B, …]` from `x_0` to the latents.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range, or cannot be
            inverted; the message names it. `prediction="sample"` cannot, since its step from ᾱ = 1
            does not depend on the state.
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
    """Take one DDIM update (arXiv 2010.02502, eq. 12), as `sample` does between model evaluations.

    Args:
        x_t: state `[B, …]`, floating point.
        model_output: `[B, …]` shaped like `x_t`, or with 2C channels (learned variance: the first
            half is used), or with 2B samples under guidance. Its dtype may differ from that of
            `x_t`.
        alpha_t: ᾱ_t (`alphas_cumprod[t]`) in [0, 1), a number or a tensor `[B]`.
        alpha_prev: ᾱ at the next visited timestep in [0, 1], 1 after the last, a number or a tensor
            `[B]`.
        seed, sample_offset, step_index: keys of the noise; `seed` and `step_index` may be `[B]`.
            With the step's index in the plan, the noise is the one that `sample` adds. Without a
            seed, the noise of each call is fresh.
        noise: z to use instead of the seed's noise: a tensor shaped like `x_t`, or a
            `torch.Generator`, or a list of B of them, to draw it.
        out: tensor to write x_prev to, with the shape, dtype and device of `x_t`; may be `x_t`
            itself.
        return_x0: also return the predicted x_0.

    The other arguments are those of `sample`. Values of coefficient tensors on an accelerator are
    not checked, since reading them would wait for the device.

    Without `out`, the result is differentiable in `x_t`, `model_output`, a `noise` tensor and
    coefficient tensors, to any order and in forward mode too. At ᾱ_prev = 1 some roots are 0, and
    derivatives treat these as constants. At a bound of the clip, the derivative is that of the
    inside. The transforms of `torch.func` follow the result.

    Under `torch.vmap`, each mapped call gives the same result as the call alone. So all of them
    have the same noise of a seed, unless `seed` or `step_index` are mapped too, as int64 tensors.
    Without a seed, the `randomness` of `torch.vmap` decides.

    Returns:
        x_prev, or `(x_prev, x_0)`, with the shape, dtype and device of `x_t`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it.
        RuntimeError: `out` is given while autograd or a transform follows the result.
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
