"""The Gaussians of the paper against brute-force algebra, sampling, and other published forms.

Throughout, a, p and s are α_t, α_{t−1} and σ_t.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from fastddim import Schedule, process
from fastddim.plan import Update, coefficient_row

from .support.models import GaussianModel, SmallNet
from .support.paper import ddim_step, linear_alphas

# A handful of float64 operations on numbers near 1.
TOLERANCE = 1e-12

# Standard errors that an estimate of fixed seed may be off.
ERRORS = 4

NUMBER = st.floats(-3, 3)


def close(actual, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def affine(gaussian_of, like):
    """(slope, intercept) of a mean that is slope·x + intercept with a scalar slope."""
    intercept = gaussian_of(torch.zeros_like(like)).mean
    slope = gaussian_of(torch.ones_like(like)).mean - intercept
    return slope, intercept


def log_density(x, mean, variance):
    return -((x - mean) ** 2 / variance + np.log(2 * np.pi * variance)) / 2


def before(alphas):
    """α_{t−1} of every t."""
    return np.concatenate([[1.0], alphas[:-1]])


@st.composite
def walks(draw):
    """(alphas, sigmas) of a random decreasing schedule with admissible σ > 0."""
    alphas = np.cumprod(draw(st.lists(st.floats(0.1, 0.999), min_size=2, max_size=6)))
    shares = draw(st.lists(st.floats(0.01, 1.0), min_size=len(alphas), max_size=len(alphas)))
    # Any σ_1 will do, also one above 1.
    limits = np.sqrt(1 - before(alphas))
    limits[0] = 2.0
    return alphas, np.array(shares) * limits


@st.composite
def steps(draw):
    """(a, p, s) of one step with p < 1."""
    p = draw(st.floats(0.01, 0.999))
    a = p * draw(st.floats(0.0, 0.999))
    return a, p, math.sqrt(1 - p) * draw(st.floats(0.01, 1.0))


@given(a=st.floats(0, 1))
def test_marginal(a):
    x_0 = normal(4, 3)
    mean, variance = process.marginal(x_0, a)
    close(mean, math.sqrt(a) * x_0.numpy())
    close(variance, 1 - a)


def test_marginal_is_what_add_noise_draws():
    schedule = Schedule.linear()
    x_0, z, t = normal(3, 2, 4), normal(3, 2, 4, seed=1), torch.tensor([0, 500, 999])
    mean, variance = process.marginal(x_0, schedule.alphas_cumprod[t])
    close(schedule.add_noise(x_0, t, z), mean + variance.sqrt() * z)


def test_sigma_by_hand():
    # √((1 − 0.6)/(1 − 0.5))·√(1 − 0.5/0.6) = √0.8·√(1/6); with the second root misprinted as
    # (1 − a)/p it would be √0.8·√(5/6).
    assert process.sigma(0.5, 0.6, 1.0).item() == pytest.approx(math.sqrt(2 / 15), rel=1e-14)
    assert process.sigma(0.5, 0.6, 0.25).item() == pytest.approx(math.sqrt(2 / 15) / 4, rel=1e-14)
    assert process.sigma_hat(0.5, 0.6).item() == pytest.approx(math.sqrt(1 / 6), rel=1e-14)


@given(step=steps(), eta=st.floats(0, 1))
def test_sigmas_are_those_of_the_sampler(step, eta):
    a, p, _ = step
    small = coefficient_row(a, p, Update(eta=eta, prediction="v_prediction"))
    large = coefficient_row(a, p, Update(eta=1, variance="large", prediction="v_prediction"))
    close(process.sigma(a, p, eta), small.pn)
    close(process.sigma_hat(a, p), large.pn)


@given(step=steps())
def test_posterior_written_out(step):
    a, p, s = step
    x_t, x_0 = normal(2, 5), normal(2, 5, seed=1)
    mean, variance = process.posterior(x_t, x_0, a, p, s)
    direction = (x_t.numpy() - math.sqrt(a) * x_0.numpy()) / math.sqrt(1 - a)
    close(mean, math.sqrt(p) * x_0.numpy() + math.sqrt(max(1 - p - s**2, 0)) * direction)
    close(variance, s**2)


@given(walk=walks())
def test_lemma_1_exactly(walk):
    """Lemma 1 holds exactly: from q(x_T | x_0) down, integrating each posterior over the marginal
    before it.
    """
    alphas, sigmas = walk
    x_0 = normal(2, 3)
    mean, variance = process.marginal(x_0, alphas[-1])
    for t in range(len(alphas) - 1, 0, -1):
        a, p, s = alphas[t], alphas[t - 1], sigmas[t]
        slope, intercept = affine(lambda x: process.posterior(x, x_0, a, p, s), x_0)  # noqa: B023
        own = process.posterior(x_0, x_0, a, p, s).variance
        mean, variance = slope * mean + intercept, slope**2 * variance + own
        close(mean, math.sqrt(p) * x_0.numpy())
        close(variance, np.full(x_0.shape, 1 - p))


@pytest.mark.parametrize("direction", ["down", "up"])
def test_lemma_1_by_sampling(direction):
    """Lemma 1 holds by sampling, along the posterior from x_T or along the forward kernel from x_1:
    each x_t has its marginal.
    """
    alphas = np.array([0.95, 0.7, 0.4, 0.1, 0.02])
    sigmas = np.sqrt(1 - before(alphas)) * [0.0, 0.9, 0.2, 0.5, 0.99]
    count, clean = 200_000, 0.8
    rng = np.random.default_rng(0)
    x_0 = torch.full((count,), clean, dtype=torch.float64)

    def draw(gaussian):
        noise = torch.from_numpy(rng.standard_normal(count))
        return gaussian.mean + gaussian.variance.sqrt() * noise

    def check(x, a):
        mean_error = math.sqrt((1 - a) / count)
        variance_error = (1 - a) * math.sqrt(2 / count)
        assert abs(x.mean().item() - math.sqrt(a) * clean) < ERRORS * mean_error
        assert abs(x.var().item() - (1 - a)) < ERRORS * variance_error

    steps_up = range(1, len(alphas))
    start = alphas[-1] if direction == "down" else alphas[0]
    kernel = process.posterior if direction == "down" else process.forward_kernel
    x = draw(process.marginal(x_0, start))
    check(x, start)
    for t in reversed(steps_up) if direction == "down" else steps_up:
        a, p = alphas[t], alphas[t - 1]
        x = draw(kernel(x, x_0, a, p, sigmas[t]))
        check(x, p if direction == "down" else a)


@given(step=steps())
def test_forward_kernel_is_the_conditioned_joint_gaussian(step):
    """The forward kernel is the conditioned joint Gaussian of both states, as linear maps of white
    noise, stacked and conditioned by linear algebra.
    """
    a, p, s = step
    d = 3
    x_prev, x_0 = normal(1, d), normal(1, d, seed=1)
    # x_t = √a·x_0 + √(1 − a)·u and x_{t−1} = √p·x_0 + √(1 − p − s²)·u + s·w.
    block = [[math.sqrt(max(1 - p - s**2, 0)), s], [math.sqrt(1 - a), 0]]
    factor = np.kron(block, np.eye(d))
    joint = factor @ factor.T
    mean = np.concatenate([math.sqrt(p) * x_0.numpy()[0], math.sqrt(a) * x_0.numpy()[0]])
    gain = np.linalg.solve(joint[:d, :d], joint[:d, d:]).T
    expected = mean[d:] + gain @ (x_prev.numpy()[0] - mean[:d])
    covariance = joint[d:, d:] - gain @ joint[:d, d:]

    actual = process.forward_kernel(x_prev, x_0, a, p, s)
    # 1 − p may be as small as 1e-3, and the difference of covariances loses that much.
    close(actual.mean[0], expected, 1e-11)
    close(actual.variance.item() * np.eye(d), covariance, 1e-11)


@given(step=steps(), x_0=NUMBER, x_prev=NUMBER, x_t=NUMBER)
def test_bayes_identity_of_the_densities(step, x_0, x_prev, x_t):
    """q(x_t | x_{t−1}, x_0)·q(x_{t−1} | x_0) = q(x_{t−1} | x_t, x_0)·q(x_t | x_0) everywhere."""
    a, p, s = step
    clean, earlier, later = (torch.tensor([v], dtype=torch.float64) for v in (x_0, x_prev, x_t))

    def log_q(x, gaussian):
        return log_density(x, gaussian.mean.item(), gaussian.variance.item())

    left = [
        log_q(x_t, process.forward_kernel(earlier, clean, a, p, s)),
        log_q(x_prev, process.marginal(clean, p)),
    ]
    right = [
        log_q(x_prev, process.posterior(later, clean, a, p, s)),
        log_q(x_t, process.marginal(clean, a)),
    ]
    size = 1 + sum(map(abs, left + right))
    assert abs(sum(left) - sum(right)) < TOLERANCE * size


@given(step=steps())
def test_predicted_x_0_inverts_the_marginal(step):
    _, a, _ = step
    x_0, epsilon = normal(3, 2), normal(3, 2, seed=1)
    x_t = math.sqrt(a) * x_0 + math.sqrt(1 - a) * epsilon
    close(process.predicted_x_0(x_t, epsilon, a), x_0)


@given(step=steps(), share=st.floats(0.001, 1))
def test_generative_is_the_posterior_at_the_predicted_x_0(step, share):
    _, p, s = step
    a = p * share * 0.999
    x_t, epsilon = normal(3, 2), normal(3, 2, seed=1)
    x_0 = (x_t - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
    q = process.posterior(x_t, x_0, a, p, s)
    mean, variance = process.generative(x_t, epsilon, a, p, s)
    # The predicted x_0 grows like 1/√a, and so does what its terms lose.
    close(mean, q.mean, TOLERANCE / math.sqrt(a))
    close(variance, q.variance)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_generative_is_equation_12(eta):
    a, p = np.array([0.1, 0.5, 0.9]), np.array([0.3, 0.9, 0.95])
    x_t, epsilon, z = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2)
    a_t, a_prev = torch.from_numpy(a), torch.from_numpy(p)
    s = process.sigma(a_t, a_prev, eta)
    mean, variance = process.generative(x_t, epsilon, a_t, a_prev, s)
    expected, _ = ddim_step(x_t.numpy(), epsilon.numpy(), a, p, eta=eta, z=z.numpy())
    close(mean + variance.sqrt() * z, expected)


def test_generative_at_the_last_step():
    """The last generative step is N(f_θ(x_1), σ_1²·I) for any σ_1, and only for the samples that
    are at that step.
    """
    x_t, epsilon = normal(3, 2), normal(3, 2, seed=1)
    a = torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64)
    p = torch.tensor([1.0, 0.85, 1.0], dtype=torch.float64)
    s = torch.tensor([1.5, 0.1, 0.0], dtype=torch.float64)
    mean, variance = process.generative(x_t, epsilon, a, p, s)
    f = (x_t - (1 - a).sqrt()[:, None] * epsilon) / a.sqrt()[:, None]
    close(mean[[0, 2]], f[[0, 2]])
    close(mean[1:2], process.generative(x_t[1:2], epsilon[1:2], 0.8, 0.85, 0.1).mean)
    close(variance[:, 0], s**2)


def affine_objectives(alphas, sigmas, x_0, slopes, offsets):
    """(J_σ of eq. 11, L_γ of eq. 5), in expectation over q_σ(x_{1:T} | x_0), for scalar data and
    ε_θ(x, t) = slopes[t]·x + offsets[t].

    Each state is kept as mean and row, x_t = mean + row·w with w white noise of T entries: then
    E(x_t²) = mean² + ‖row‖², and an integral is a sum. Nothing is said about KL divergences.
    """
    T = len(alphas)
    clean = torch.tensor([x_0], dtype=torch.float64)
    white = np.eye(T)

    def expected_square(mean, row):
        return mean**2 + row @ row

    def log_normal(square, variance):
        return -(square / variance + math.log(2 * math.pi * variance)) / 2

    mean, row = math.sqrt(alphas[-1]) * x_0, math.sqrt(1 - alphas[-1]) * white[-1]
    J = log_normal(1 - alphas[-1], 1 - alphas[-1]) - log_normal(expected_square(mean, row), 1.0)
    gamma = process.gamma(Schedule.from_alphas_cumprod(alphas), torch.from_numpy(sigmas)).numpy()
    L = 0.0
    for t in range(T - 1, -1, -1):
        a, p, s = alphas[t], before(alphas)[t], sigmas[t]
        k, b = slopes[t], offsets[t]
        L += gamma[t] * ((k * math.sqrt(a) * x_0 + b) ** 2 + (k * math.sqrt(1 - a) - 1) ** 2)
        g_slope, g_offset = affine(
            lambda x: process.generative(x, k * x + b, a, p, s),  # noqa: B023
            clean,
        )
        if t == 0:
            mean_prev, row_prev = x_0, np.zeros(T)
        else:
            q_slope, q_offset = affine(
                lambda x: process.posterior(x, clean, a, p, s),  # noqa: B023
                clean,
            )
            mean_prev = q_slope.item() * mean + q_offset.item()
            row_prev = q_slope.item() * row + s * white[t - 1]
            J += log_normal(s**2, s**2)
        square = expected_square(
            mean_prev - g_slope.item() * mean - g_offset.item(), row_prev - g_slope.item() * row
        )
        J -= log_normal(square, s**2)
        mean, row = mean_prev, row_prev
    return J, L


@given(walk=walks(), seed=st.integers(0, 2**32 - 1), x_0=NUMBER)
def test_theorem_1_exactly(walk, seed, x_0):
    """J_σ − L_γ is the same number for every model, known in closed form."""
    alphas, sigmas = walk
    rng = np.random.default_rng(seed)
    a_T = alphas[-1]
    # KL(q(x_T | x_0) ‖ N(0, 1)) and the constant of −log p_θ(x_0 | x_1).
    constant = (a_T * x_0**2 - a_T - math.log(1 - a_T)) / 2
    constant += math.log(2 * math.pi * sigmas[0] ** 2) / 2
    for _ in range(4):
        J, L = affine_objectives(
            alphas, sigmas, x_0, rng.standard_normal(len(alphas)), rng.standard_normal(len(alphas))
        )
        assert abs(J - L - constant) < 1e-11 * (1 + abs(J) + abs(L))


def test_theorem_1_for_nonlinear_models():
    """With the same samples (x_0, ε) in J_σ and L_γ the difference is exact."""
    alphas = np.array([0.99, 0.9, 0.6, 0.3, 0.1, 0.01])
    sigmas = np.sqrt(1 - before(alphas)) * [0.0, 0.9, 0.1, 0.5, 0.7, 1.0]
    sigmas[0] = 0.2
    schedule = Schedule.from_alphas_cumprod(alphas)
    weights = process.gamma(schedule, torch.from_numpy(sigmas))
    x_0 = normal(4, 3, 5, 5)
    noise = normal(len(alphas), 4, 3, 5, 5, seed=1)
    d = x_0[0].numel()

    def per_sample(values):
        return values.reshape(len(x_0), -1).sum(1)

    def objective(model):
        total = 0.0
        for t, a in enumerate(alphas):
            p, s = before(alphas)[t], sigmas[t]
            x_t = math.sqrt(a) * x_0 + math.sqrt(1 - a) * noise[t]
            epsilon = model(x_t, torch.full((len(x_0),), t))
            mean, variance = process.generative(x_t, epsilon, a, p, s)
            model_normal = Normal(mean, variance.sqrt().expand_as(mean))
            if t == 0:
                total -= per_sample(model_normal.log_prob(x_0)).mean()
            else:
                q = process.posterior(x_t, x_0, a, p, s)
                q_normal = Normal(q.mean, q.variance.sqrt().expand_as(q.mean))
                total += per_sample(kl_divergence(q_normal, model_normal)).mean()
        return total.item()

    constant = d * math.log(2 * math.pi * sigmas[0] ** 2) / 2
    objectives = []
    with torch.no_grad():
        for seed in range(5):
            model = SmallNet(seed=seed).double()
            J = objective(model)
            L = sum(
                process.training_loss(model, x_0, schedule, t, noise[t], weights).item()
                for t in range(len(alphas))
            )
            assert abs(J - L - constant) < TOLERANCE * (abs(J) + abs(L))
            objectives.append(L)
    # The models do differ, and by far more than the tolerance.
    assert np.ptp(objectives) > 1e-3 * max(objectives)


@given(walk=walks())
def test_gamma_from_the_difference_of_means(walk):
    """‖f_θ − x_0‖²/(2σ²)·(√p − √a·√(1 − p − s²)/√(1 − a))², with f_θ − x_0 by eq. 9."""
    alphas, sigmas = walk
    p = before(alphas)
    direction = np.sqrt(np.maximum(1 - p - sigmas**2, 0)) / np.sqrt(1 - alphas)
    direction[0] = 0.0
    expected = (1 - alphas) / alphas / (2 * sigmas**2)
    expected = expected * (np.sqrt(p) - np.sqrt(alphas) * direction) ** 2
    schedule = Schedule.from_alphas_cumprod(alphas)
    actual = process.gamma(schedule, torch.from_numpy(sigmas))
    assert (actual > 0).all()
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=0)


def test_gamma_of_one_sigma_for_all_timesteps():
    schedule = Schedule.from_alphas_cumprod([0.9, 0.5, 0.1])
    expected = process.gamma(schedule, torch.full((3,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(process.gamma(schedule, 0.2), expected, rtol=0, atol=0)


def test_eta_1_on_every_timestep_is_ddpm():
    """arXiv 2006.11239: eq. 7 (posterior mean and β̃), eq. 11 (mean by ε) and eq. 2 (the chain)."""
    betas = np.linspace(1e-4, 0.02, 1000)[1:, None]
    alphas_bar = linear_alphas()[:, None]
    bar, bar_prev = alphas_bar[1:], alphas_bar[:-1]
    x_t, x_0, epsilon, x_prev = (normal(999, 4, seed=i).numpy() for i in range(4))
    a, p = Schedule.linear().alphas_cumprod[1:], Schedule.linear().alphas_cumprod[:-1]
    s = process.sigma(a, p, 1.0)
    # 1 − a/p recovers a β of 1e-4 from numbers near 1.
    tolerance = 1e-11

    mean, variance = process.posterior(torch.from_numpy(x_t), torch.from_numpy(x_0), a, p, s)
    weight_0 = np.sqrt(bar_prev) * betas / (1 - bar)
    weight_t = np.sqrt(1 - betas) * (1 - bar_prev) / (1 - bar)
    close(mean, weight_0 * x_0 + weight_t * x_t, tolerance)
    np.testing.assert_allclose(variance, (1 - bar_prev) / (1 - bar) * betas, rtol=tolerance)

    mean, _ = process.generative(torch.from_numpy(x_t), torch.from_numpy(epsilon), a, p, s)
    close(mean, (x_t - betas / np.sqrt(1 - bar) * epsilon) / np.sqrt(1 - betas), tolerance)

    mean, variance = process.forward_kernel(
        torch.from_numpy(x_prev), torch.from_numpy(x_0), a, p, s
    )
    close(mean, np.sqrt(1 - betas) * x_prev, tolerance)
    np.testing.assert_allclose(variance, betas, rtol=tolerance)
    np.testing.assert_allclose(process.sigma_hat(a, p)[:, None] ** 2, betas, rtol=tolerance)


def test_other_sigmas_make_the_forward_process_remember_x_0():
    x_prev, x_0 = normal(1, 3), normal(1, 3, seed=1)
    s = process.sigma(0.5, 0.6, 0.5)
    mean = process.forward_kernel(x_prev, x_0, 0.5, 0.6, s).mean
    other = process.forward_kernel(x_prev, x_0 + 1, 0.5, 0.6, s).mean
    assert (abs(other - mean) > 0.1).all()


@given(step=steps(), share=st.floats(0.01, 1))
def test_eta_0_is_an_euler_step_of_the_ode(step, share):
    """A step at η = 0 is an Euler step of the ODE (eq. 13): x/√α moves by ε times the change of
    √(1−α)/√α.
    """
    _, p, _ = step
    a = p * share * 0.999
    x_t, epsilon = normal(2, 3), normal(2, 3, seed=1)
    change = math.sqrt((1 - p) / p) - math.sqrt((1 - a) / a)
    expected = math.sqrt(p) * (x_t / math.sqrt(a) + change * epsilon)
    mean, variance = process.generative(x_t, epsilon, a, p, 0.0)
    close(mean, expected, 1e-11)
    assert variance.item() == 0


def test_eta_0_converges_to_the_ode():
    """At η = 0 runs converge to the ODE (eq. 14) for Gaussian data, with known ε and a flow that
    keeps (x_t − E x_t)/std x_t: the error of the first-order method is inversely proportional to
    the number of steps.
    """
    centre, scale = 0.5, 0.3
    z = normal(1, 6)

    def on_the_flow(a):
        return math.sqrt(a) * centre + math.sqrt(a * scale**2 + 1 - a) * z

    def error(count):
        alphas = 1 - np.linspace(0.1, 0.99, count + 1)
        model = GaussianModel(torch.from_numpy(alphas), centre, scale)
        x = on_the_flow(alphas[-1])
        for t in range(count, 0, -1):
            epsilon = model(x, torch.tensor([t]))
            x = process.generative(x, epsilon, alphas[t], alphas[t - 1], 0.0).mean
        return (x - on_the_flow(alphas[0])).abs().max().item()

    errors = [error(count) for count in (200, 400, 800)]
    assert errors[-1] < 1e-3
    for coarse, fine in itertools.pairwise(errors):
        assert 1.95 < coarse / fine < 2.05


@given(step=steps(), share=st.floats(0.01, 1))
def test_eta_0_is_the_first_order_dpm_solver_step(step, share):
    """At η = 0 a step is that of the first-order DPM solver: arXiv 2206.00927, eq. 3.7, and the x_0
    form of arXiv 2211.01095, with λ = log(α/σ).
    """
    _, p, _ = step
    a = p * share * 0.999
    x_s, epsilon = normal(2, 3), normal(2, 3, seed=1)
    log_signal_s, log_signal_t = math.log(a) / 2, math.log(p) / 2
    log_sigma_s, log_sigma_t = math.log1p(-a) / 2, math.log1p(-p) / 2
    h = (log_signal_t - log_sigma_t) - (log_signal_s - log_sigma_s)
    by_epsilon = (
        math.exp(log_signal_t - log_signal_s) * x_s
        - math.exp(log_sigma_t) * math.expm1(h) * epsilon
    )
    x_0 = (x_s - math.exp(log_sigma_s) * epsilon) / math.exp(log_signal_s)
    by_x_0 = (
        math.exp(log_sigma_t - log_sigma_s) * x_s - math.exp(log_signal_t) * math.expm1(-h) * x_0
    )
    mean = process.generative(x_s, epsilon, a, p, 0.0).mean
    close(mean, by_epsilon, 1e-11)
    close(mean, by_x_0, 1e-11)


def test_training_loss_written_out():
    schedule = Schedule.linear()
    model = SmallNet().double()
    x_0, epsilon = normal(3, 3, 4, 4), normal(3, 3, 4, 4, seed=1)
    t = torch.tensor([0, 300, 999])
    weights = torch.linspace(0.5, 2.0, 1000, dtype=torch.float64)
    a = linear_alphas()[t].reshape(3, 1, 1, 1)
    x_t = torch.from_numpy(np.sqrt(a) * x_0.numpy() + np.sqrt(1 - a) * epsilon.numpy())
    squares = ((model(x_t, t) - epsilon) ** 2).detach().numpy().sum(axis=(1, 2, 3))
    close(process.training_loss(model, x_0, schedule, t, epsilon).item(), squares.mean())
    close(
        process.training_loss(model, x_0, schedule, t, epsilon, weights).item(),
        (weights[t].numpy() * squares).mean(),
    )
    close(process.training_loss(model, x_0, schedule, t, epsilon, 3).item(), 3 * squares.mean())


def test_training_loss_gives_the_model_one_timestep_per_sample():
    seen = []

    def model(x, t):
        seen.append(t)
        return x

    x_0 = normal(3, 2)
    for t in (7, torch.tensor([7]), torch.tensor([7, 7, 7], dtype=torch.int32)):
        process.training_loss(model, x_0, Schedule.linear(), t, x_0)
    for t in seen:
        assert torch.equal(t, torch.tensor([7, 7, 7]))


def test_training_loss_uses_the_first_half_of_a_learned_variance_model():
    x_0, epsilon = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    model = SmallNet(outputs=6).double()

    def first_half(x, t):
        return model(x, t)[:, :3]

    losses = [
        process.training_loss(m, x_0, Schedule.linear(), 10, epsilon) for m in (model, first_half)
    ]
    assert losses[0].item() == losses[1].item()


def test_training_loss_has_the_gradient():
    """The training loss has the gradient Σ 2·(c·x_t − ε)·x_t for ε_θ = c·x_t."""
    x_0, epsilon = normal(1, 5), normal(1, 5, seed=1)
    a = linear_alphas()[500]
    x_t = math.sqrt(a) * x_0 + math.sqrt(1 - a) * epsilon
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    process.training_loss(lambda x, t: c * x, x_0, Schedule.linear(), 500, epsilon).backward()
    close(c.grad, (2 * (0.7 * x_t - epsilon) * x_t).sum())


def gaussians(x, y, a, p, s):
    return {
        "marginal": process.marginal(x, a),
        "posterior": process.posterior(x, y, a, p, s),
        "forward_kernel": process.forward_kernel(x, y, a, p, s),
        "generative": process.generative(x, y, a, p, s),
        "predicted_x_0": process.Gaussian(process.predicted_x_0(x, y, a), torch.zeros(1)),
    }


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4, 4)])
def test_a_batch_is_its_samples(shape):
    x, y = normal(*shape), normal(*shape, seed=1)
    a, p, s = [0.1, 0.5, 0.9], [0.3, 0.9, 0.95], [0.8, 0.1, 0.0]
    batch = gaussians(x, y, *(torch.tensor(v, dtype=torch.float64) for v in (a, p, s)))
    for i in range(3):
        single = gaussians(x[i : i + 1], y[i : i + 1], a[i], p[i], s[i])
        for name, gaussian in batch.items():
            assert gaussian.mean.shape == shape
            close(gaussian.mean[i], single[name].mean[0])
            close(gaussian.variance.expand_as(gaussian.mean)[i], single[name].variance.item())
    values = torch.tensor(a), torch.tensor(p)
    for i in range(3):
        assert process.sigma(*values, 0.5)[i] == process.sigma(values[0][i], values[1][i], 0.5)
        assert process.sigma_hat(*values)[i] == process.sigma_hat(values[0][i], values[1][i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mean_is_rounded_once(dtype):
    x, y = normal(3, 7).to(dtype), normal(3, 7, seed=1).to(dtype)
    rounded = gaussians(x, y, 0.31, 0.62, 0.4)
    exact = gaussians(x.double(), y.double(), 0.31, 0.62, 0.4)
    for name, gaussian in rounded.items():
        assert torch.equal(gaussian.mean, exact[name].mean.to(dtype)), name
        assert torch.equal(gaussian.variance, exact[name].variance), name


def test_an_empty_batch_is_empty():
    x = torch.zeros(0, 3, dtype=torch.float64)
    for gaussian in gaussians(x, x, 0.5, 0.6, 0.1).values():
        assert gaussian.mean.shape == (0, 3)


def test_gradients_flow_through_the_means():
    x, y = (normal(2, 3, seed=i).requires_grad_() for i in range(2))
    for name in ("posterior", "forward_kernel", "generative"):
        kernel = getattr(process, name)
        assert torch.autograd.gradcheck(
            lambda x, y: kernel(x, y, 0.5, 0.6, 0.3).mean,  # noqa: B023
            (x, y),
        )


def test_a_sigma_of_eq_16_is_never_refused_for_rounding():
    """A σ of eq. 16 is never refused for rounding. At α_t = 0 and η = 1 it is √(1 − α_{t−1}), where
    eq. 7 takes the root of a rounding error.
    """
    x = normal(1, 2)
    for p in np.linspace(0.001, 0.999, 999):
        s = process.sigma(0.0, p, 1.0)
        close(process.posterior(x, x, 0.0, p, s).mean, math.sqrt(p) * x.numpy(), 1e-7)


@pytest.mark.gpu
def test_states_and_coefficients_on_a_gpu():
    x, y = normal(2, 3), normal(2, 3, seed=1)
    values = [torch.tensor(v, dtype=torch.float64) for v in ([0.1, 0.5], [0.3, 0.9], [0.8, 0.1])]
    on_cpu = gaussians(x, y, *values)
    for coefficients in (values, [v.cuda() for v in values]):
        for name, gaussian in gaussians(x.cuda(), y.cuda(), *coefficients).items():
            assert gaussian.mean.device.type == "cuda"
            close(gaussian.mean.cpu(), on_cpu[name].mean)
            close(gaussian.variance.cpu(), on_cpu[name].variance)
    with pytest.raises(ValueError, match=r"alpha_t\[1\]: .* got nan"):
        process.marginal(x.cuda(), torch.tensor([0.5, NAN]).cuda())
    model, schedule = SmallNet().double(), Schedule.linear()
    image, z = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    expected = process.training_loss(model, image, schedule, 500, z, 2.0).item()
    loss = process.training_loss(model.cuda(), image.cuda(), schedule, 500, z.cuda(), 2.0)
    close(loss.item(), expected)


X = torch.zeros(2, 3, dtype=torch.float64)
NAN = float("nan")
KERNELS = [process.posterior, process.forward_kernel, process.generative]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("a", "p", "s", "message"),
    [
        (-0.1, 0.6, 0.1, r"alpha_t: expected a number in \[0, 1\], got -0.1"),
        (NAN, 0.6, 0.1, r"alpha_t: expected a number in \[0, 1\], got nan"),
        (0.5, 1.1, 0.1, r"alpha_prev: expected a number in \[0, 1\], got 1.1"),
        (0.5, NAN, 0.1, r"alpha_prev: .* got nan"),
        (0.5, torch.tensor([0.6, NAN]), 0.1, r"alpha_prev\[1\]: .* got nan"),
        (torch.tensor([0.5, 2.0]), 0.6, 0.1, r"alpha_t\[1\]: .* got 2.0"),
        (0.6, 0.5, 0.1, r"alpha_prev: expected a value above alpha_t, got .* = 0.5, alpha_t = 0.6"),
        (0.5, 0.5, 0.1, "alpha_prev: expected a value above alpha_t"),
        (0.5, 0.6, -0.1, "sigma: expected a finite number >= 0, got -0.1"),
        (0.5, 0.6, NAN, "sigma: expected a finite number >= 0, got nan"),
        (0.5, 0.6, math.inf, "sigma: expected a finite number >= 0, got inf"),
        (0.5, 0.75, 0.501, r"sigma: expected sigma\*\*2 <= 1 - alpha_prev, got sigma = 0.501"),
        (0.5, torch.tensor([0.6, 0.75]), 0.51, r"alpha_prev = 0.75 at index 1"),
        (torch.tensor([0.5] * 3), 0.6, 0.1, r"alpha_t: expected a number or a tensor \[2\]"),
        (0.5, torch.full((2, 1), 0.6), 0.1, r"alpha_prev: .* got shape \(2, 1\)"),
    ],
)
def test_bad_coefficients(kernel, a, p, s, message):
    with pytest.raises(ValueError, match=message):
        kernel(X, X, a, p, s)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bad_states(kernel):
    with pytest.raises(ValueError, match=r"expected the shape of x_\w+, \(2, 3\), got \(2, 4\)"):
        kernel(X, torch.zeros(2, 4), 0.5, 0.6, 0.1)
    with pytest.raises(TypeError, match=r"x_\w+: expected a floating-point tensor"):
        kernel(X.long(), X, 0.5, 0.6, 0.1)
    with pytest.raises(TypeError, match=r"(x_0|epsilon): expected a tensor"):
        kernel(X, X.tolist(), 0.5, 0.6, 0.1)
    with pytest.raises(TypeError, match="alpha_t: expected a number"):
        kernel(X, X, "0.5", 0.6, 0.1)


def test_nan_states_stay_nan():
    x = torch.tensor([[NAN, 1.0]], dtype=torch.float64)
    for gaussian in gaussians(x, torch.ones_like(x), 0.5, 0.6, 0.1).values():
        assert gaussian.mean.isnan().tolist() == [[True, False]]


def test_what_only_some_refuse():
    with pytest.raises(ValueError, match="alpha_t: expected a value above 0 to predict x_0"):
        process.predicted_x_0(X, X, 0.0)
    with pytest.raises(ValueError, match=r"alpha_t: .*, got alpha_t = 0.0 at index 1"):
        process.generative(X, X, torch.tensor([0.1, 0.0]), 0.6, 0.1)
    with pytest.raises(ValueError, match=r"alpha_prev: expected a value below 1 .*marginal"):
        process.forward_kernel(X, X, 0.5, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"sigma: .*, got sigma = 0.1, alpha_prev = 1.0"):
        process.posterior(X, X, 0.5, 1.0, 0.1)
    assert torch.equal(process.posterior(X, X + 2, 0.5, 1.0, 0.0).mean, X + 2)
    with pytest.raises(ValueError, match=r"alpha_t: expected a number in \[0, 1\], got 1.5"):
        process.marginal(X, 1.5)
    with pytest.raises(TypeError, match="x_0: expected a tensor"):
        process.marginal(1.0, 0.5)


def test_bad_arguments_of_sigma():
    with pytest.raises(ValueError, match="eta: expected a finite number >= 0, got -1"):
        process.sigma(0.5, 0.6, -1.0)
    with pytest.raises(ValueError, match="alpha_prev: expected a value above alpha_t"):
        process.sigma(0.6, 0.5, 1.0)
    with pytest.raises(ValueError, match="alpha_prev: expected a value above alpha_t"):
        process.sigma_hat(0.6, 0.5)
    with pytest.raises(ValueError, match=r"eta: expected a number or a tensor \[2\]"):
        process.sigma(torch.tensor([0.4, 0.5]), 0.6, torch.ones(3))
    with pytest.raises(ValueError, match=r"alpha_prev: expected a number or a tensor \[2\]"):
        process.sigma_hat(torch.tensor([0.4, 0.5]), torch.full((3,), 0.6))


def test_bad_arguments_of_gamma():
    schedule = Schedule.from_alphas_cumprod([0.9, 0.5, 0.1])
    with pytest.raises(TypeError, match=r"schedule: expected a fastddim.Schedule, got list"):
        process.gamma([0.9, 0.5], 0.1)
    with pytest.raises(ValueError, match=r"sigma: expected a number or a tensor \[3\]"):
        process.gamma(schedule, torch.full((4,), 0.1))
    with pytest.raises(ValueError, match=r"sigma: expected values above 0, got .* at index 0"):
        process.gamma(schedule, torch.tensor([0.0, 0.1, 0.1]))
    with pytest.raises(ValueError, match=r"sigma: expected sigma\*\*2 .* at index 1"):
        process.gamma(schedule, torch.tensor([0.5, 0.5, 0.5]))
    with pytest.raises(ValueError, match="schedule: expected alphas_cumprod above 0"):
        process.gamma(schedule.zero_terminal_snr(), 0.1)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a callable"),
        ({"model": lambda x, t: x[:, :1]}, ValueError, "model output: expected shape"),
        ({"schedule": [0.5]}, TypeError, "schedule: expected a fastddim.Schedule, got list"),
        ({"t": 1000}, ValueError, r"t: expected an integer in \[0, 999\], got 1000"),
        ({"t": torch.tensor([1, 2, 3])}, ValueError, r"t: expected .* \[2\]"),
        ({"t": 1.0}, TypeError, "t: expected an integer"),
        ({"epsilon": torch.zeros(2, 4)}, ValueError, "epsilon: expected the shape of x_0"),
        ({"gamma": torch.ones(3)}, ValueError, r"gamma: expected a number or a tensor \[1000\]"),
        ({"gamma": -1.0}, ValueError, "gamma: expected a finite number >= 0, got -1"),
        ({"x_0": X[:0], "epsilon": X[:0]}, ValueError, "batch of x_0: .* got 0"),
        ({"x_0": X.long()}, TypeError, "x_0: expected a floating-point tensor"),
    ],
)
def test_bad_arguments_of_training_loss(changed, error, message):
    arguments = {
        "model": lambda x, t: x,
        "x_0": X,
        "schedule": Schedule.linear(),
        "t": 5,
        "epsilon": X,
    }
    with pytest.raises(error, match=message):
        process.training_loss(**{**arguments, **changed})
