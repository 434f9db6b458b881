"""Timesteps against the definitions and the official code, coefficients against the paper."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddim import Schedule, select_timesteps
from fastddim.plan import (
    PREDICTIONS,
    SPACINGS,
    Row,
    Update,
    coefficient_row,
    inversion_row,
    make_inversion_plan,
    make_plan,
)

from .support.optional import optional
from .support.paper import ddim_step, linear_alphas

diffusers = optional("diffusers")

T = 1000
LINEAR = Schedule.linear()


def increasing(steps, spacing, T=T, **kwargs):
    return select_timesteps(T, steps, spacing, **kwargs).flip(0).numpy()


def evaluate(row, x, m, z=0.0):
    """(x_prev, x_0) of the affine form that a row, or a table's rows, stand for."""
    row = Row(*(np.asarray(v, dtype=np.float64)[..., None] for v in row))
    x_0 = np.clip(row.cx * x + row.cm * m, -row.r, row.r)
    return row.k0 * x_0 + row.kx * x + row.km * m + row.pn * z, x_0


def rows_of(plan):
    """The rows of a plan as one Row of columns `[S]`."""
    return Row(*plan.table.unbind(-1))


def check_property(T, S, spacing):
    timesteps = select_timesteps(T, S, spacing)
    assert timesteps.dtype == torch.int64
    assert timesteps.shape == (S,), f"S = {S}"
    t = timesteps.numpy()
    assert (np.diff(t) < 0).all(), f"S = {S}: not strictly decreasing"
    assert t[-1] >= 0, f"S = {S}: below 0"
    assert t[0] < T, f"S = {S}: above T"


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps(spacing):
    for S in range(1, T + 1):
        check_property(T, S, spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
@given(data=st.data())
def test_other_lengths(spacing, data):
    length = data.draw(st.integers(1, 5000))
    check_property(length, data.draw(st.integers(1, length)), spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("length", range(1, 41))
def test_short_schedules(spacing, length):
    for S in range(1, length + 1):
        check_property(length, S, spacing)


@pytest.mark.parametrize("length", [1000, 999, 77])
def test_uniform(length):
    for S in range(1, length + 1):
        exact = [i * length // S for i in range(S)]
        assert increasing(S, "uniform", length).tolist() == exact
        if length % S == 0:
            assert increasing(S, "uniform", length).tolist() == list(range(0, length, length // S))


@pytest.mark.parametrize("length", [1000, 100])
def test_quadratic(length):
    unique = 0
    for S in range(1, length + 1):
        official = [int(v) for v in np.linspace(0, np.sqrt(length * 0.8), S) ** 2]
        raised = official[:1]
        for t in official[1:]:
            raised.append(max(t, raised[-1] + 1))
        own = increasing(S, "quadratic", length).tolist()
        assert own == raised
        if len(set(official)) == S:
            unique += 1
            assert own == official
    assert unique > 5


def test_leading():
    for S in range(1, T + 1):
        assert increasing(S, "leading").tolist() == [(T // S) * i for i in range(S)]
    assert increasing(50, "leading", steps_offset=1).tolist() == [20 * i + 1 for i in range(50)]


def half_even(numerator, denominator):
    """Integer nearest to a ratio, ties to even, in integers."""
    quotient, rest = divmod(numerator, denominator)
    twice = 2 * rest - denominator
    return quotient + (1 if twice > 0 or (twice == 0 and quotient % 2) else 0)


def test_trailing():
    for S in range(1, T + 1):
        exact = [half_even(T * (S - i), S) - 1 for i in range(S)]
        assert select_timesteps(T, S, "trailing").tolist() == exact
        assert exact[0] == T - 1


def test_linspace():
    for S in range(2, T + 1):
        timesteps, i = increasing(S, "linspace"), np.arange(S)
        # Nearest to i·(T − 1)/(S − 1), in integers; NumPy's linspace decides a tie by its rounding.
        assert (np.abs(2 * (S - 1) * timesteps - 2 * (T - 1) * i) <= S - 1).all(), f"S = {S}"
        assert timesteps[0] == 0
        assert timesteps[-1] == T - 1


def test_the_default_is_trailing():
    for S in (1, 2, 7, 50, 999, 1000):
        own = select_timesteps(T, S)
        assert torch.equal(own, select_timesteps(T, S, "trailing"))
        assert own[0] == T - 1
        assert torch.equal(make_plan(LINEAR, S, Update()).timesteps, own)
        assert torch.equal(make_inversion_plan(LINEAR, S, Update()).timesteps, own.flip(0))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_diffusers_spacings(spacing):
    """diffusers' own lists wherever they hold S distinct timesteps.

    Its "trailing" accumulates T/S in floating point, so an exact tie may round to the other side.
    """
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=0)
    agreed = 0
    for S in range(1, T + 1):
        scheduler.set_timesteps(S)
        official = scheduler.timesteps.tolist()
        if len(set(official)) == S and min(official) >= 0 and max(official) < T:
            agreed += 1
            own = select_timesteps(T, S, spacing).tolist()
            ties = {i for i in range(S) if spacing == "trailing" and 2 * T * i % (2 * S) == S}
            assert {i for i in range(S) if own[i] != official[i]} <= ties, f"S = {S}"
    assert agreed >= 700


def test_one_step():
    visited = {spacing: select_timesteps(T, 1, spacing).tolist() for spacing in SPACINGS}
    assert visited == {
        "uniform": [0],
        "quadratic": [0],
        "leading": [0],
        "trailing": [999],
        "linspace": [0],
    }


@pytest.mark.parametrize(
    "given_steps",
    [
        [981, 500, 3],
        (981, 500, 3),
        np.array([981, 500, 3]),
        torch.tensor([981, 500, 3]),
        torch.tensor([981, 500, 3], dtype=torch.int32),
    ],
    ids=["list", "tuple", "numpy", "int64", "int32"],
)
def test_explicit_timesteps(given_steps):
    timesteps = select_timesteps(T, given_steps)
    assert timesteps.dtype == torch.int64
    assert timesteps.tolist() == [981, 500, 3]


def test_previous_is_the_next_visited():
    """The ᾱ_prev of a step is that of the next visited timestep, 1 after the last."""
    rng = np.random.default_rng(0)
    x, m = rng.normal(size=(2, 20))
    a = linear_alphas()
    for steps in ([981, 500, 3], 7, 13, 333):
        for spacing in SPACINGS:
            plan = make_plan(LINEAR, steps, Update(), spacing=spacing)
            visited = plan.timesteps.numpy()
            assert plan.steps == len(visited)
            previous = np.append(a[visited[1:]], 1.0)
            own, own_x_0 = evaluate(rows_of(plan), x, m)
            every = np.broadcast_to(x, (len(visited), 20)), np.broadcast_to(m, (len(visited), 20))
            expected, x_0 = ddim_step(*every, a[visited], previous)
            np.testing.assert_allclose(own, expected, rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(own_x_0, x_0, rtol=1e-10, atol=1e-10)


def test_coefficients_of_x_0():
    """Coefficients of x_0 are as tabulated for each prediction type; without clipping and guidance
    they are infinity and 1.
    """
    for a in (0.9, 0.25, 1e-4):
        expected = {
            "epsilon": (1 / math.sqrt(a), -math.sqrt(1 - a) / math.sqrt(a)),
            "sample": (0.0, 1.0),
            "v_prediction": (math.sqrt(a), -math.sqrt(1 - a)),
            "score": (1 / math.sqrt(a), (1 - a) / math.sqrt(a)),
        }
        assert set(expected) == set(PREDICTIONS)
        for prediction, values in expected.items():
            row = coefficient_row(a, 0.95, Update(prediction=prediction))
            np.testing.assert_allclose((row.cx, row.cm), values, rtol=1e-14)
            assert (row.r, row.g, row.pn) == (math.inf, 1.0, 0.0)
        row = coefficient_row(a, 0.95, Update(clip=2.5, guidance_scale=7.5))
        assert (row.r, row.g) == (2.5, 7.5)


STEPS = [(0.9999, 1.0), (0.9, 0.999), (0.5, 0.500001), (0.02, 0.7), (4e-5, 6e-5)]
ZERO_SNR_STEPS = [(0.0, 0.3), (0.0, 1.0)]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_rows_are_the_paper(prediction, variance, eta):
    rng = np.random.default_rng(0)
    x, m, z = rng.normal(size=(3, 200))
    needs_signal = prediction in ("epsilon", "score")
    steps = STEPS + ([] if needs_signal else ZERO_SNR_STEPS)
    for (a, p), clip, rederive_eps in itertools.product(steps, (None, 0.7), (False, True)):
        kind = {"prediction": prediction, "clip": clip, "rederive_eps": rederive_eps}
        row = coefficient_row(a, p, Update(eta=eta, variance=variance, **kind))
        own, own_x_0 = evaluate(row, x, m, z)
        expected, x_0 = ddim_step(x, m, a, p, eta=eta, variance=variance, z=z, **kind)
        # x_0 of a nearly pure-noise state is a difference of terms of size 1/√ā.
        scale = 1 + 1 / math.sqrt(a) if needs_signal else 1.0
        np.testing.assert_allclose(own, expected, rtol=1e-12, atol=1e-13 * scale)
        np.testing.assert_allclose(own_x_0, x_0, rtol=1e-12, atol=1e-13 * scale)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_rows_of_tensors(prediction):
    rng = np.random.default_rng(1)
    x, m, z = rng.normal(size=(3, 4, 50))
    a = torch.tensor([0.9, 0.5, 0.02, 0.2], dtype=torch.float64)
    p = torch.tensor([1.0, 0.6, 0.9, 0.2], dtype=torch.float64)
    eta = torch.tensor([1.0, 0.0, 0.3, 1.0], dtype=torch.float64)
    for variance in ("small", "large"):
        row = coefficient_row(a, p, Update(eta=eta, variance=variance, prediction=prediction))
        own, _ = evaluate(row, x, m, z)
        expected, _ = ddim_step(
            x,
            m,
            a.numpy(),
            p.numpy(),
            eta=eta.numpy(),
            variance=variance,
            prediction=prediction,
            z=z,
        )
        np.testing.assert_allclose(own, expected, rtol=1e-12, atol=1e-12)


def noise_column(plan):
    return plan.table[..., Row._fields.index("pn")]


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("eta", [0.5, 1.0, torch.tensor([0.5, 1.0])])
def test_last_step_adds_no_noise(variance, eta):
    update = Update(eta=eta, variance=variance).checked(2)
    for spacing in SPACINGS:
        noise = noise_column(make_plan(LINEAR, 20, update, spacing=spacing))
        assert (noise[..., -1] == 0).all()
        assert (noise[..., :-1] > 0).all()


def test_sigma():
    """Equation 16 and σ̂ over a whole plan; at η = 1 and all 1000 steps, DDPM's two variances."""
    a = linear_alphas()
    visited = np.arange(999, -1, -1)
    a_t, p = a[visited], np.append(a[visited[1:]], 1.0)
    beta = 1 - a_t / p
    small = noise_column(make_plan(LINEAR, 1000, Update(eta=1.0))).numpy()
    np.testing.assert_allclose(small**2, (1 - p) / (1 - a_t) * beta, rtol=1e-10)
    large = noise_column(make_plan(LINEAR, 1000, Update(eta=1.0, variance="large"))).numpy()
    np.testing.assert_allclose(large[:-1] ** 2, np.linspace(1e-4, 0.02, 1000)[:0:-1], rtol=1e-10)
    half = noise_column(make_plan(LINEAR, 1000, Update(eta=0.5))).numpy()
    np.testing.assert_allclose(half, small / 2, rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_large_variance_keeps_the_direction_of_the_small(prediction):
    """Appendix D.3: two different σ enter one step."""
    small = make_plan(LINEAR, 20, Update(eta=1.0, prediction=prediction))
    large = make_plan(LINEAR, 20, Update(eta=1.0, variance="large", prediction=prediction))
    different = [i for i, name in enumerate(Row._fields) if name != "pn"]
    assert torch.equal(small.table[:, different], large.table[:, different])
    assert (noise_column(large)[:-1] > noise_column(small)[:-1]).all()


def test_eta_per_sample():
    eta = torch.tensor([0.0, 0.5, 1.0])
    plan = make_plan(LINEAR, 20, Update(eta=eta).checked(3))
    assert plan.table.shape[:2] == (3, 20)
    assert plan.kind.noisy
    for i, value in enumerate(eta.tolist()):
        single = make_plan(LINEAR, 20, Update(eta=value))
        assert torch.equal(plan.table[i], single.table)
        assert single.kind.noisy == (value > 0)


def test_guidance_per_sample():
    scales = torch.tensor([1.0, 7.5])
    plan = make_plan(LINEAR, 5, Update(guidance_scale=scales).checked(2))
    assert plan.kind.guided
    assert plan.table[..., Row._fields.index("g")].tolist() == [[1.0] * 5, [7.5] * 5]


class TestTooLargeEta:
    def test_names_the_step(self):
        # 1 − p − η²·(1−p)/(1−a)·(1−a/p) first falls below 0 where a/p is smallest.
        a = linear_alphas()
        timesteps = select_timesteps(T, 20, "uniform").numpy()
        a_t, p = a[timesteps], np.append(a[timesteps[1:]], 1.0)
        with np.errstate(divide="ignore"):
            limit = np.where(p < 1, np.sqrt((1 - a_t) / (1 - a_t / p)), np.inf)
        eta = 1.05
        first = int(np.flatnonzero(eta > limit)[0])
        with pytest.raises(
            ValueError,
            match=rf"^eta: expected .*1\.05.* step {first} \(timestep {timesteps[first]}\)",
        ):
            make_plan(LINEAR, 20, Update(eta=eta), spacing="uniform")
        per_sample = Update(eta=torch.tensor([0.0, eta])).checked(2)
        with pytest.raises(ValueError, match=rf"^eta: .*step {first} "):
            make_plan(LINEAR, 20, per_sample, spacing="uniform")

    def test_largest_allowed_is_allowed(self):
        a, p = 0.2, 0.6
        limit = math.sqrt((1 - a) / (1 - a / p))
        row = coefficient_row(a, p, Update(eta=limit))
        assert row.km == pytest.approx(0.0, abs=1e-7)
        assert row.pn == pytest.approx(math.sqrt(1 - p), rel=1e-14)
        assert not math.isnan(row.km)
        with pytest.raises(ValueError, match=r"^eta: "):
            coefficient_row(a, p, Update(eta=limit * (1 + 1e-9)))

    def test_rounding_is_not_refused(self):
        """Rounding is not refused. At η = 1 and ā_t = 0 the exact value is 0, whatever the
        rounding.
        """
        for p in np.linspace(0.001, 0.999, 999):
            row = coefficient_row(0.0, float(p), Update(eta=1.0, prediction="v_prediction"))
            assert row.kx == pytest.approx(0.0, abs=1e-7)


class TestZeroTerminalSnr:
    schedule = LINEAR.zero_terminal_snr()

    @pytest.mark.parametrize("prediction", ["epsilon", "score"])
    def test_noise_alone_is_refused(self, prediction):
        """Noise alone is refused, since x_0 does not follow from it: the score of pure noise is −x
        for any data.
        """
        update, named = Update(prediction=prediction), rf"^prediction: .*'{prediction}'"
        with pytest.raises(ValueError, match=rf"{named}.*step 0 \(timestep 999\)"):
            make_plan(self.schedule, 10, update, spacing="trailing")
        with pytest.raises(ValueError, match=rf"{named}.*\(timestep 999\)"):
            make_inversion_plan(self.schedule, 10, update, spacing="trailing")

    @pytest.mark.parametrize("prediction", ["epsilon", "score"])
    def test_elsewhere_it_is_not(self, prediction):
        update = Update(clip=1.0, prediction=prediction)
        plan = make_plan(self.schedule, 10, update, spacing="uniform")
        assert plan.timesteps[0] == 900
        assert plan.table.isfinite().all()

    @pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    @pytest.mark.parametrize("variance", ["small", "large"])
    @pytest.mark.parametrize("rederive_eps", [False, True])
    def test_others_are_finite(self, prediction, eta, variance, rederive_eps):
        update = Update(
            eta=eta, variance=variance, prediction=prediction, clip=1.0, rederive_eps=rederive_eps
        )
        for steps, spacing in ((10, "trailing"), (1, "trailing"), (1000, "linspace")):
            plan = make_plan(self.schedule, steps, update, spacing=spacing)
            assert plan.timesteps[0] == 999
            assert plan.table.isfinite().all()


class TestInversionPlan:
    def test_walks_the_same_timesteps_upwards(self):
        for spacing in SPACINGS:
            down = make_plan(LINEAR, 20, Update(), spacing=spacing).timesteps
            up = make_inversion_plan(LINEAR, 20, Update(), spacing=spacing).timesteps
            assert up.tolist() == down.tolist()[::-1]

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "score"])
    def test_a_row_undoes_a_row(self, prediction):
        """With one model output for both, down ∘ up is the identity and x_0 is the same."""
        rng = np.random.default_rng(2)
        x, m = rng.normal(size=(2, 100))
        for a, p in ((0.9999, 1.0), (0.5, 0.9), (0.02, 0.7)):
            up, x_0 = evaluate(inversion_row(a, p, Update(prediction=prediction)), x, m)
            down, expected_x_0 = ddim_step(up, m, a, p, prediction=prediction)
            np.testing.assert_allclose(down, x, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(x_0, expected_x_0, rtol=1e-12, atol=1e-12)

    def test_sample_prediction_above_the_data(self):
        """Sample prediction is invertible from ᾱ < 1, and refused from ᾱ = 1."""
        rng = np.random.default_rng(3)
        x, m = rng.normal(size=(2, 100))
        up, _ = evaluate(inversion_row(0.5, 0.9, Update(prediction="sample")), x, m)
        down, _ = ddim_step(up, m, 0.5, 0.9, prediction="sample")
        np.testing.assert_allclose(down, x, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match=r"^prediction: .*'sample'"):
            make_inversion_plan(LINEAR, 10, Update(prediction="sample"))
