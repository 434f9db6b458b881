"""`fastddim.step`: one update, on every backend that serves the CPU."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import fastddim
from fastddim import Schedule, philox
from fastddim.plan import PREDICTIONS

from .support.environment import CPU_IMPLS
from .support.models import elementwise_model
from .support.paper import ddim_step, guided, linear_alphas

SHAPE = (3, 2, 4, 5)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}

pytestmark = pytest.mark.parametrize("impl", CPU_IMPLS)


def tensors(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def wide(tensor):
    return tensor.double().numpy()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_paper(impl, prediction, dtype):
    x, m, z = tensors(SHAPE, SHAPE, SHAPE, dtype=dtype)
    for (a, p), eta, variance, clip, rederive_eps in itertools.product(
        ((0.9, 1.0), (0.3, 0.6)), (0.0, 0.6), ("small", "large"), (None, 0.7), (False, True)
    ):
        kind = {
            "eta": eta,
            "variance": variance,
            "prediction": prediction,
            "clip": clip,
            "rederive_eps": rederive_eps,
        }
        own, own_x_0 = fastddim.step(x, m, a, p, noise=z, return_x0=True, impl=impl, **kind)
        expected, x_0 = ddim_step(wide(x), wide(m), a, p, z=wide(z), **kind)
        assert own.dtype == own_x_0.dtype == dtype
        np.testing.assert_allclose(wide(own), expected, rtol=0, atol=TOLERANCE[dtype])
        np.testing.assert_allclose(wide(own_x_0), x_0, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("last", [0.6, [0.6, 1.0, 0.9]], ids=["number", "[B]"])
def test_coefficients_per_sample(impl, last):
    """Coefficients per sample are numbers and `[B]` tensors, mixed freely, of any real dtype."""
    x, m, z = tensors(SHAPE, (6, *SHAPE[1:]), SHAPE)
    p = torch.tensor(last) if isinstance(last, list) else last
    for a, eta, g in itertools.product(
        (0.3, torch.tensor([0.5, 0.25, 0.125])),
        (0.5, torch.tensor([0, 1, 1])),
        (2.5, torch.tensor([1.0, 7.5, -1.0], dtype=torch.float64)),
    ):
        own = fastddim.step(x, m, a, p, eta=eta, guidance_scale=g, noise=z, impl=impl)
        expected, _ = ddim_step(wide(x), guided(wide(m), g), a, p, eta=eta, z=wide(z))
        np.testing.assert_allclose(wide(own), expected, rtol=1e-12, atol=1e-11)


def test_tensors_of_one_value_are_that_number(impl):
    x, m = tensors(SHAPE, SHAPE, dtype=torch.float32)
    number = fastddim.step(x, m, 0.3, 0.6, eta=0.5, seed=4, impl=impl)
    filled = [torch.full((3,), v, dtype=torch.float64) for v in (0.3, 0.6, 0.5)]
    assert torch.equal(fastddim.step(x, m, *filled[:2], eta=filled[2], seed=4, impl=impl), number)
    zero_dim = [v[0] for v in filled]
    assert torch.equal(
        fastddim.step(x, m, *zero_dim[:2], eta=zero_dim[2], seed=4, impl=impl), number
    )


def test_learned_variance(impl):
    x, m = tensors(SHAPE, (3, 4, 4, 5))
    plain = fastddim.step(x, m[:, :2], 0.3, 0.6, impl=impl)
    assert torch.equal(fastddim.step(x, m, 0.3, 0.6, impl=impl), plain)
    doubled = torch.cat([m, 2 * m])
    assert torch.equal(
        fastddim.step(x, doubled, 0.3, 0.6, guidance_scale=3.0, impl=impl),
        fastddim.step(x, doubled[:, :2], 0.3, 0.6, guidance_scale=3.0, impl=impl),
    )


def test_guidance_order(impl):
    """The first half is unconditional: g = 0 gives it, g = 1 the second."""
    x, u, c = tensors(SHAPE, SHAPE, SHAPE)
    m = torch.cat([u, c])
    for g, expected in ((0.0, u), (1.0, c)):
        own = fastddim.step(x, m, 0.3, 0.6, guidance_scale=g, impl=impl)
        torch.testing.assert_close(
            own, fastddim.step(x, expected, 0.3, 0.6, impl=impl), rtol=1e-13, atol=1e-13
        )


class TestNoise:
    def test_seeded(self, impl):
        x, m = tensors(SHAPE, SHAPE)
        own = fastddim.step(
            x, m, 0.3, 0.6, eta=1.0, seed=7, step_index=5, sample_offset=2, impl=impl
        )
        z = philox.step_noise(SHAPE, 5, 7, sample_offset=2, dtype=torch.float64)
        expected, _ = ddim_step(wide(x), wide(m), 0.3, 0.6, eta=1.0, z=wide(z))
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-12, atol=1e-13)

    def test_seed_and_step_index_per_sample(self, impl):
        x, m = tensors(SHAPE, SHAPE, dtype=torch.float32)
        seeds, steps = [9, 2**64 - 1, 9], torch.tensor([4, 0, 2**32 - 1])
        own = fastddim.step(x, m, 0.3, 0.6, eta=1.0, seed=seeds, step_index=steps, impl=impl)
        for i in range(3):
            one = slice(i, i + 1)
            expected = fastddim.step(
                x[one],
                m[one],
                0.3,
                0.6,
                eta=1.0,
                seed=seeds[i],
                step_index=int(steps[i]),
                impl=impl,
            )
            assert torch.equal(own[one], expected)

    def test_default_step_index(self, impl):
        x, m = tensors(SHAPE, SHAPE)
        kind = {"eta": 1.0, "impl": impl}
        default = fastddim.step(x, m, 0.3, 0.6, seed=0, **kind)
        assert torch.equal(fastddim.step(x, m, 0.3, 0.6, seed=0, step_index=0, **kind), default)
        for other in ({"seed": 1}, {"seed": 0, "step_index": 1}):
            assert not torch.equal(fastddim.step(x, m, 0.3, 0.6, **other, **kind), default)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
    def test_generators(self, impl, dtype):
        x, m = tensors(SHAPE, SHAPE, dtype=dtype)
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=dtype)
        own = fastddim.step(
            x, m, 0.3, 0.6, eta=1.0, noise=torch.Generator().manual_seed(3), impl=impl
        )
        assert torch.equal(own, fastddim.step(x, m, 0.3, 0.6, eta=1.0, noise=z, impl=impl))
        each = [torch.Generator().manual_seed(i) for i in range(3)]
        own = fastddim.step(x, m, 0.3, 0.6, eta=1.0, noise=each, impl=impl)
        z = torch.stack(
            [
                torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(i), dtype=dtype)
                for i in range(3)
            ]
        )
        assert torch.equal(own, fastddim.step(x, m, 0.3, 0.6, eta=1.0, noise=z, impl=impl))

    @pytest.mark.parametrize("variance", ["small", "large"])
    def test_none_on_the_last_step(self, impl, variance):
        x, m = tensors(SHAPE, SHAPE)
        last = fastddim.step(x, m, 0.9, 1.0, eta=1.0, variance=variance, impl=impl)
        assert torch.equal(last, fastddim.step(x, m, 0.9, 1.0, impl=impl))


class TestOut:
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_out(self, impl, eta, dtype):
        x, m = tensors(SHAPE, SHAPE, dtype=dtype)
        kind = {"eta": eta, "seed": 2, "impl": impl}
        expected, expected_x_0 = fastddim.step(x, m, 0.3, 0.6, return_x0=True, **kind)
        out = torch.empty_like(x)
        result, x_0 = fastddim.step(x, m, 0.3, 0.6, out=out, return_x0=True, **kind)
        assert result is out
        assert torch.equal(out, expected)
        assert torch.equal(x_0, expected_x_0)
        in_place = x.clone()
        assert fastddim.step(in_place, m, 0.3, 0.6, out=in_place, **kind) is in_place
        assert torch.equal(in_place, expected)

    def test_inputs_are_not_modified(self, impl):
        x, m, z = (torch.ones(SHAPE) for _ in range(3))
        fastddim.step(x, m, 0.3, 0.6, eta=1.0, noise=z, clip=0.1, impl=impl)
        assert all((v == 1).all() for v in (x, m, z))

    def test_strides(self, impl):
        """Any strides work: transposed, sliced, expanded and channels-last tensors; element order
        is logical.
        """
        x, m, z = tensors(SHAPE, SHAPE, SHAPE, dtype=torch.float32)
        kind = {"eta": 1.0, "seed": 5, "impl": impl}
        expected = fastddim.step(x, m, 0.3, 0.6, **kind)
        layouts = {
            "channels_last": lambda v: v.contiguous(memory_format=torch.channels_last),
            "transposed": lambda v: v.transpose(0, 3).contiguous().transpose(0, 3),
            "sliced": lambda v: torch.stack([v, v], -1)[..., 0],
            "offset": lambda v: torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape),
        }
        for arrange in layouts.values():
            assert torch.equal(fastddim.step(arrange(x), m, 0.3, 0.6, **kind), expected)
            assert torch.equal(fastddim.step(x, arrange(m), 0.3, 0.6, **kind), expected)
            out = arrange(torch.zeros(SHAPE))
            fastddim.step(arrange(x), arrange(m), 0.3, 0.6, out=out, **kind)
            assert torch.equal(out, expected)
            given = fastddim.step(x, m, 0.3, 0.6, eta=1.0, noise=arrange(z), impl=impl)
            assert torch.equal(given, fastddim.step(x, m, 0.3, 0.6, eta=1.0, noise=z, impl=impl))
        one = m[:1].expand(SHAPE)
        assert torch.equal(
            fastddim.step(x, one, 0.3, 0.6, **kind),
            fastddim.step(x, one.contiguous(), 0.3, 0.6, **kind),
        )

    @pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 4), (2, 1, 2, 3, 2), (0, 3), (2, 0)])
    def test_shapes(self, impl, shape):
        x, m = tensors(shape, shape)
        own = fastddim.step(x, m, 0.3, 0.6, eta=1.0, seed=3, impl=impl)
        z = philox.step_noise(shape, 0, 3, dtype=torch.float64)
        expected, _ = ddim_step(wide(x), wide(m), 0.3, 0.6, eta=1.0, z=wide(z))
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        {"eta": 0.0},
        {"eta": 1.0, "variance": "large", "clip": 1.0, "rederive_eps": True},
        {"eta": 0.5, "prediction": "v_prediction"},
        {"eta": 0.5, "prediction": "score"},
    ],
    ids=["ddim", "sigma-hat", "v", "score"],
)
def test_a_loop_of_steps_is_sample(impl, dtype, kind):
    """`sample` written out by its user, bit for bit."""
    steps, a = [900, 500, 499, 20, 3], linear_alphas()
    expected = fastddim.sample(
        elementwise_model,
        steps,
        shape=SHAPE,
        dtype=dtype,
        seed=11,
        sample_offset=4,
        impl=impl,
        **kind,
    )
    a = Schedule.linear().alphas_cumprod.tolist()
    x = philox.initial_latents(SHAPE, 11, sample_offset=4, dtype=dtype)
    for s, t in enumerate(steps):
        previous = a[steps[s + 1]] if s + 1 < len(steps) else 1.0
        m = elementwise_model(x, torch.full((SHAPE[0],), t))
        x = fastddim.step(
            x, m, a[t], previous, seed=11, sample_offset=4, step_index=s, impl=impl, **kind
        )
    assert torch.equal(x, expected)
