"""The noise specification against published vectors, exact arithmetic and statistics.

The statistical bounds are in standard deviations of the statistic under the null hypothesis. The
noise is a fixed function of its seed, so a test passes always or never.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddim import philox
from fastddim.philox import LATENTS, STEP_NOISE, Keys

from .support.paper import normals_of, philox_words, uniform_of
from .support.probes import torch_threads

WORD = st.integers(0, 2**32 - 1)
SIGMAS = 4.0

# kat_vectors of the Random123 distribution, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def words_of(counter, key):
    tensors = philox.philox4x32(
        [torch.tensor([c]) for c in counter], [torch.tensor(k) for k in key]
    )
    return tuple(int(t) for t in tensors)


class TestWords:
    @pytest.mark.parametrize(
        ("counter", "key", "expected"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS
    )
    def test_known_answers(self, counter, key, expected):
        assert words_of(counter, key) == expected
        assert philox_words(counter, key) == expected

    @given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
    def test_exact_integers(self, counter, key):
        assert words_of(counter, key) == philox_words(counter, key)

    @pytest.mark.parametrize("place", range(6))
    @pytest.mark.parametrize("word", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    def test_extreme_words(self, place, word):
        values = [123, 456, 789, 1011, 1213, 1415]
        values[place] = word
        assert words_of(values[:4], values[4:]) == philox_words(values[:4], values[4:])

    def test_broadcast(self):
        counter = [torch.arange(5), torch.tensor(3), torch.tensor(4), torch.tensor(1)]
        words = philox.philox4x32(counter, [torch.tensor(7), torch.tensor(8)])
        expected = [philox_words((q, 3, 4, 1), (7, 8)) for q in range(5)]
        assert torch.stack(words, 1).tolist() == [list(w) for w in expected]


def float32_points(low_exponent, dense=100_000):
    """float32 numbers in [2^low, 1]: random in the exponent, random in the value, and edges."""
    rng = np.random.default_rng(0)
    exponents = np.arange(low_exponent, 1)
    edges = np.float32(2.0) ** exponents.astype(np.float32)
    quarters = np.arange(1, 17, dtype=np.float32) / 16
    points = np.concatenate(
        [
            2.0 ** rng.uniform(low_exponent, 0, dense),
            rng.uniform(0, 1, dense),
            1 - 2.0 ** rng.uniform(-24, -1, dense // 4),
            *(np.outer(edges, 1 + 2.0**-23 * k).ravel() for k in np.arange(-40, 41)),
            *(quarters * np.float32(1 + 2.0**-23 * k) for k in range(-40, 41)),
            # Where ln's range reduction changes exponent.
            *(np.outer(edges, math.sqrt(0.5) * (1 + 2.0**-23 * k)).ravel() for k in range(-40, 41)),
        ]
    ).astype(np.float32)
    return np.unique(points[(points >= 2.0**low_exponent) & (points <= 1)])


def ulps(value, exact):
    """The error in units of the last place of the exact value, in float32."""
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return np.abs(value.astype(np.float64) - exact) / spacing


class TestFunctions:
    def test_ln(self):
        u = float32_points(-33)
        own = philox.ln(torch.from_numpy(u)).numpy()
        assert ulps(own, np.log(u.astype(np.float64))).max() < 2
        assert (own[u < 1] < 0).all()
        assert own[u == 1] == 0.0

    def test_sincos(self):
        u = np.append(np.float32(0), float32_points(-33))
        sine, cosine = (v.numpy() for v in philox.sincos_2pi(torch.from_numpy(u)))
        # Reduced to an eighth of a turn in exact arithmetic, so that the zeros are exact.
        wide = u.astype(np.float64)
        quarter = np.rint(4 * wide)
        angle = 2 * np.pi * (wide - quarter / 4)
        turns = quarter.astype(int) % 4
        exact_sine = np.choose(
            turns, [np.sin(angle), np.cos(angle), -np.sin(angle), -np.cos(angle)]
        )
        exact_cosine = np.choose(
            turns, [np.cos(angle), -np.sin(angle), -np.cos(angle), np.sin(angle)]
        )
        assert ulps(sine, exact_sine).max() < 2
        assert ulps(cosine, exact_cosine).max() < 2

    def test_sincos_on_the_quarters(self):
        u = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
        sine, cosine = philox.sincos_2pi(u)
        assert sine.tolist() == [0, 1, 0, -1, 0]
        assert cosine.tolist() == [1, 0, -1, 0, 1]

    def test_uniform(self):
        rng = np.random.default_rng(0)
        words = np.unique(
            np.concatenate(
                [
                    rng.integers(0, 2**32, 30_000),
                    2 ** rng.integers(0, 32, 1000) + rng.integers(-3, 4, 1000),
                    # Ties of the rounding to 24 bits, and their neighbours.
                    2**31 + 2**8 * rng.integers(0, 2**23, 1000) + 2**7 + rng.integers(-1, 2, 1000),
                    [0, 1, 2**24, 2**24 + 1, 2**32 - 1, 2**32 - 128, 2**32 - 129],
                ]
            )
        )
        words = words[(words >= 0) & (words < 2**32)]
        own = philox.uniform(torch.from_numpy(words))
        assert own.dtype == torch.float32
        assert np.array_equal(own.numpy(), [uniform_of(int(w)) for w in words])

    def test_uniform_of_the_extremes(self):
        u = philox.uniform(torch.tensor([0, 2**32 - 1]))
        assert u.tolist() == [2.0**-33, 1.0]

    @pytest.mark.parametrize("first", [0, 2**32 - 1])
    @pytest.mark.parametrize("second", [0, 2**30, 2**31, 3 * 2**30, 2**32 - 1])
    def test_box_muller_of_the_extremes(self, first, second):
        u = philox.uniform(torch.tensor([first, second]))
        z = torch.stack(philox.box_muller(u[:1], u[1:])).flatten()
        expected = normals_of([first, second, 1, 1])[:2]
        np.testing.assert_allclose(z.numpy(), expected, rtol=0, atol=4e-6)
        if first == 2**32 - 1:
            assert z.tolist() == [0.0, 0.0]

    def test_box_muller_takes_a_correctly_rounded_root(self):
        """Box–Muller takes a correctly rounded root. At u₁ = 1 the cosine is exactly 1, which
        leaves √(−2 ln u₀).
        """
        u = torch.from_numpy(float32_points(-33))
        radius, zero = philox.box_muller(u, torch.ones_like(u))
        assert np.array_equal(radius.numpy(), np.sqrt(-2 * philox.ln(u).numpy()))
        assert (zero == 0).all()

    def test_box_muller_agrees_with_float64(self):
        rng = np.random.default_rng(1)
        words = rng.integers(0, 2**32, (2, 200_000))
        words[0, :2000] = rng.integers(0, 2**8, 2000)
        words[0, 2000:4000] = 2**32 - 1 - rng.integers(0, 2**12, 2000)
        words[1, :4000] = rng.integers(0, 4, 4000) * 2**30 + rng.integers(0, 2**6, 4000)
        u = philox.uniform(torch.from_numpy(words))
        own = torch.stack(philox.box_muller(u[0], u[1])).double().numpy()
        wide = u.double().numpy()
        radius = np.sqrt(-2 * np.log(wide[0]))
        exact = radius * np.stack([np.cos(2 * np.pi * wide[1]), np.sin(2 * np.pi * wide[1])])
        assert np.abs(own - exact).max() < 4e-6


def to_float32(exact: Fraction) -> np.float32:
    """Nearest float32 of a rational number, ties to even, in integers; no subnormals."""
    if exact == 0:
        return np.float32(0)
    sign, magnitude = (-1 if exact < 0 else 1), abs(exact)
    exponent = math.floor(math.log2(magnitude))
    exponent += (magnitude >= Fraction(2) ** (exponent + 1)) - (magnitude < Fraction(2) ** exponent)
    unit = Fraction(2) ** (exponent - 23)
    return np.float32(sign * float(round(magnitude / unit) * unit))


class TestFma:
    def check(self, a, b, c):
        a, b, c = (np.atleast_1d(np.asarray(v, dtype=np.float32)) for v in (a, b, c))
        own = philox._fma(*(torch.from_numpy(v) for v in (a, b, c))).numpy()
        exact = [
            to_float32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
            for x, y, z in zip(a, b, c, strict=True)
        ]
        assert np.array_equal(own, np.array(exact, dtype=np.float32))

    def test_double_rounding(self):
        """The float64 sum falls on a float32 tie that the exact sum is not on.

        (1 + x)(1 − x) = 1 − x² is 1 to more bits than float64 has left next to c, so a·b + c lies
        x²·2⁻²⁴ from a tie, and its side decides.
        """
        changed = 0
        for k, odd, scale in itertools.product(range(15, 23), range(4), (-20, 0, 13)):
            x, unit = 2.0**-k, 2.0**-23
            c = (1 + odd * unit) * 2.0**scale
            for sign, c_sign in itertools.product((1, -1), repeat=2):
                a, b = sign * (1 + x) * 2.0 ** (scale - 12), (1 - x) * 2.0**-12
                self.check(a, b, c_sign * c)
                changed += np.float32(a * b + c_sign * c) != to_float32(
                    Fraction(a) * Fraction(b) + Fraction(c_sign * c)
                )
        # Rounding twice would have gone wrong here.
        assert changed > 50

    def test_cancellation(self):
        rng = np.random.default_rng(3)
        a, b = np.float32(rng.normal(size=(2, 2000)))
        self.check(a, b, -(a * b))

    def test_random(self):
        rng = np.random.default_rng(4)
        a, b, c = rng.normal(size=(3, 2000)) * 2.0 ** rng.integers(-30, 30, (3, 2000))
        self.check(a, b, c)

    def test_zeros(self):
        self.check([0.0, 1.0, 0.0], [3.0, 0.0, 0.0], [1.0, -2.0, 0.0])


def keys_of(seeds, steps, samples):
    return Keys(*(torch.tensor(v) for v in (seeds, steps, samples)))


class TestLayout:
    @pytest.mark.parametrize("stream", [LATENTS, STEP_NOISE])
    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13])
    def test_counter(self, stream, count):
        """Elements 4q…4q+3 come from the four words of counter (q, step, sample, stream)."""
        seed, step, sample = 0x123456789ABCDEF0, 0 if stream == LATENTS else 17, 5
        own = philox.normal(keys_of([seed], [step], [sample]), (count,), stream)
        assert own.dtype == torch.float32
        assert own.shape == (1, count)
        key = (seed & 0xFFFFFFFF, seed >> 32)
        expected = [
            z
            for q in range((count + 3) // 4)
            for z in normals_of(philox_words((q, step, sample, stream), key))
        ][:count]
        np.testing.assert_allclose(own[0].numpy(), expected, rtol=0, atol=4e-6)

    def test_streams(self):
        assert (LATENTS, STEP_NOISE) == (0, 1)
        shape = (2, 3, 4)
        keys = philox.make_keys(9, 2)
        assert torch.equal(philox.initial_latents(shape, 9), philox.normal(keys, (3, 4), 0))
        keys = philox.make_keys(9, 2, step_index=6)
        assert torch.equal(philox.step_noise(shape, 6, 9), philox.normal(keys, (3, 4), 1))

    def test_row_major(self):
        flat = philox.initial_latents((3, 24), 1)
        for shape in ((3, 2, 3, 4), (3, 24, 1), (3, 1, 24), (3, 4, 6)):
            assert torch.equal(philox.initial_latents(shape, 1), flat.reshape(shape))

    def test_prefix(self):
        long = philox.initial_latents((2, 103), 1)
        for n in (1, 2, 3, 4, 7, 100):
            assert torch.equal(philox.initial_latents((2, n), 1), long[:, :n])

    def test_one_number_per_sample(self):
        assert torch.equal(philox.initial_latents((5,), 3), philox.initial_latents((5, 1), 3)[:, 0])

    def test_dtype(self):
        single = philox.step_noise((2, 50), 3, 4)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            other = philox.step_noise((2, 50), 3, 4, dtype=dtype)
            assert other.dtype == dtype
            assert torch.equal(other, single.to(dtype))

    @pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
    def test_all_64_bits_of_the_seed(self, seed):
        own = philox.initial_latents((1, 4), seed)
        expected = normals_of(philox_words((0, 0, 0, 0), (seed % 2**32, seed // 2**32)))
        np.testing.assert_allclose(own[0].numpy(), expected, rtol=0, atol=4e-6)
        signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
        assert torch.equal(philox.initial_latents((1, 4), signed), own)
        assert torch.equal(philox.initial_latents((1, 4), [seed]), own)
        assert torch.equal(philox.initial_latents((1, 4), np.array([seed], dtype=np.uint64)), own)

    def test_largest_indices(self):
        last = 2**32 - 1
        own = philox.step_noise((1, 4), last, 5, sample_offset=last)
        expected = normals_of(philox_words((0, last, last, 1), (5, 0)))
        np.testing.assert_allclose(own[0].numpy(), expected, rtol=0, atol=4e-6)

    def test_largest_element(self):
        """A counter word of the last quad a sample may have."""
        words = words_of((2**32 - 1, 0, 0, 0), (0, 0))
        assert words == philox_words((2**32 - 1, 0, 0, 0), (0, 0))
        with pytest.raises(ValueError, match=r"^shape: expected at most 2\*\*34 elements"):
            philox.normal(philox.make_keys(0, 1), (2**34 + 1,), LATENTS)


class TestPinned:
    """Seeds outlive releases: these bits may not change, not even within the accuracy bounds."""

    def test_latents(self):
        expected = [
            "-0x1.dee4d0p-4",
            "0x1.fee730p-1",
            "0x1.38312ap-3",
            "0x1.69dd1ep-4",
            "-0x1.56fdeap+0",
            "0x1.244952p-1",
        ]
        own = philox.initial_latents((1, 6), 2024)
        assert own[0].tolist() == [float.fromhex(v) for v in expected]

    def test_step_noise(self):
        expected = [
            "-0x1.b65720p-1",
            "0x1.d61e9cp-4",
            "0x1.ccdb3cp-1",
            "0x1.15323ap+0",
            "-0x1.52570ep-4",
            "0x1.05efc8p+0",
        ]
        own = philox.step_noise((1, 6), 7, 2**64 - 3, sample_offset=5)
        assert own[0].tolist() == [float.fromhex(v) for v in expected]

    def test_many(self):
        own = philox.initial_latents((2, 100_000), 1).numpy()
        digest = hashlib.sha256(own.astype("<f4").tobytes()).hexdigest()
        assert digest == "3df88dae17dd7516be353abb2fdd751c26d80f446c21b061c718ff23489df158"


class TestIndependence:
    shape = (3, 5, 7)

    def whole(self):
        return philox.step_noise((64, *self.shape), 11, 2024)

    @pytest.mark.parametrize("batch", [1, 7, 64])
    def test_batch_size(self, batch):
        parts = [
            philox.step_noise((min(batch, 64 - start), *self.shape), 11, 2024, sample_offset=start)
            for start in range(0, 64, batch)
        ]
        assert torch.equal(torch.cat(parts), self.whole())

    def test_threads(self):
        with torch_threads(1):
            single = philox.initial_latents((3, 50_001), 4)
        with torch_threads(2):
            assert torch.equal(philox.initial_latents((3, 50_001), 4), single)

    def test_seed_per_sample(self):
        seeds = [5, 0, 2**64 - 1, 5]
        batch = philox.initial_latents((4, *self.shape), seeds)
        for i, seed in enumerate(seeds):
            assert torch.equal(batch[i], philox.initial_latents((1, *self.shape), seed)[0])
        assert torch.equal(batch[0], batch[3])

    def test_step_per_sample(self):
        steps = torch.tensor([4, 0, 9])
        batch = philox.step_noise((3, 10), steps, 7)
        for i, s in enumerate(steps.tolist()):
            assert torch.equal(batch[i], philox.step_noise((3, 10), s, 7)[i])

    def test_everything_that_should_differ_does(self):
        """Distinct seeds, steps, samples and streams share no number."""
        rows = [
            philox.initial_latents((2, 40), 0),
            philox.initial_latents((2, 40), 1),
            philox.initial_latents((2, 40), 2**32),
            philox.step_noise((2, 40), 0, 0),
            philox.step_noise((2, 40), 1, 0),
            philox.step_noise((2, 40), 0, 1),
        ]
        values = torch.cat(rows).flatten()
        assert len(values.unique()) == len(values)


@pytest.fixture(scope="module")
def z():
    return philox.initial_latents((4, 1 << 17), 31415).double().flatten().numpy()


class TestStatistics:
    def test_moments(self, z):
        """The moments are those of N(0, 1): E zᵏ = 0, 1, 0, 3; the variances of the powers are 1,
        2, 15, 96.
        """
        for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            deviation = (z**power).mean() - expected
            assert abs(deviation) < SIGMAS * math.sqrt(variance / len(z)), f"moment {power}"

    def test_kolmogorov_smirnov(self, z):
        for part in (z, z[0::4], z[1::4], z[2::4], z[3::4]):
            assert scipy.stats.kstest(part, "norm", method="asymp").pvalue > 1e-3

    def test_kolmogorov_smirnov_of_step_noise(self):
        z = torch.cat([philox.step_noise((2, 4096), s, 99).flatten() for s in range(32)])
        assert scipy.stats.kstest(z.double().numpy(), "norm").pvalue > 1e-3

    def test_tails(self, z):
        """Counts beyond k standard deviations, against the binomial."""
        for k in (2.0, 3.0, 4.0):
            p = 2 * scipy.stats.norm.sf(k)
            count = (np.abs(z) > k).sum()
            assert abs(count - len(z) * p) < SIGMAS * math.sqrt(len(z) * p * (1 - p))

    def uncorrelated(self, x, y):
        """No correlation is found between the values, nor between the squares, in which a
        dependence like √(1 − r²) would show.
        """
        bound = SIGMAS / math.sqrt(x.numel())
        for f in (torch.Tensor.double, lambda v: v.double().square()):
            a, b = f(x).flatten(), f(y).flatten()
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < bound

    @pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 32, 64])
    def test_neighbouring_elements(self, lag):
        z = philox.initial_latents((1, 1 << 17), 1)
        self.uncorrelated(z[:, :-lag], z[:, lag:])

    def test_neighbouring_steps(self):
        steps = [philox.step_noise((1, 1 << 17), s, 1) for s in range(3)]
        for a, b in itertools.combinations(steps, 2):
            self.uncorrelated(a, b)

    def test_neighbouring_samples(self):
        z = philox.initial_latents((3, 1 << 17), 1)
        for a, b in itertools.combinations(z, 2):
            self.uncorrelated(a, b)

    @pytest.mark.parametrize("other", [1, 2, 2**32, 2**63])
    def test_neighbouring_seeds(self, other):
        self.uncorrelated(
            philox.initial_latents((1, 1 << 17), 0), philox.initial_latents((1, 1 << 17), other)
        )

    def test_latents_and_step_noise(self):
        self.uncorrelated(
            philox.initial_latents((1, 1 << 17), 0), philox.step_noise((1, 1 << 17), 0, 0)
        )

    def test_short_rows(self):
        """First elements of many steps, samples and seeds: the counters that differ least."""
        rows = {
            "steps": philox.step_noise((4096, 4), torch.arange(4096), [3] * 4096),
            "samples": philox.initial_latents((4096, 4), 3),
            "seeds": philox.initial_latents((4096, 4), torch.arange(4096)),
        }
        for z in rows.values():
            assert scipy.stats.kstest(z.double().flatten().numpy(), "norm").pvalue > 1e-3
            self.uncorrelated(z[:-1], z[1:])
