"""One update compared with common implementations, and with the memory floor.

The floor is `torch.add(x, e, out=o)`: two reads and one write. Contenders are
`diffusers.DDIMScheduler.step`, the update written out in eager PyTorch, and the same under
`torch.compile`. All must agree before any is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from harness import case_id, compare
from torch import Tensor

import fastddim
from fastddim import ops, philox
from fastddim.plan import Update, coefficient_row, stack_row

RESULTS = "step-cpu"
T, T_PREV, STEPS = 500, 480, 50


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    eta: float = 0.0
    dtype: torch.dtype = torch.float32
    guided: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        parts = [f"η = {self.eta:g}", "×".join(map(str, self.shape))]
        parts += [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        parts += ["guided"] if self.guided else []
        parts += ["channels_last"] if self.channels_last else []
        return ", ".join(parts)

    @property
    def id(self) -> str:
        parts: list[object] = [self.shape, f"eta{self.eta:g}"]
        parts += [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        parts += ["guided"] if self.guided else []
        parts += ["channels_last"] if self.channels_last else []
        return case_id(*parts)


CASES = [
    Case((64, 3, 256, 256)),
    Case((64, 3, 256, 256), eta=1.0),
    Case((64, 3, 64, 64), eta=1.0),
    Case((64, 3, 64, 64)),
    Case((1, 4, 64, 64)),
    Case((1, 4, 64, 64), eta=1.0),
    Case((64,)),
    Case((4096, 112)),
    Case((4096, 112), eta=1.0),
    Case((1, 3, 2048, 2048)),
    Case((1, 3, 2048, 2048), eta=1.0),
    Case((64, 3, 64, 64), dtype=torch.bfloat16),
    Case((64, 3, 64, 64), dtype=torch.float16),
    Case((64, 3, 64, 64), guided=True),
    Case((64, 3, 64, 64), channels_last=True),
    Case((64, 3, 64, 64), eta=1.0, channels_last=True),
]


class Setup:
    """Tensors and contenders of one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(1)
        batch = case.shape[0]
        doubled = (2 * batch, *case.shape[1:]) if case.guided else case.shape
        layout = torch.channels_last if case.channels_last else torch.contiguous_format

        def draw(shape: tuple[int, ...]) -> Tensor:
            values = torch.randn(shape, generator=generator).to(case.dtype)
            return values.contiguous(memory_format=layout)

        self.x, self.m = draw(case.shape), draw(doubled)
        self.out = torch.empty_like(self.x)
        self.scheduler = DDIMScheduler(clip_sample=False)
        self.scheduler.set_timesteps(STEPS)
        self.a = self.scheduler.alphas_cumprod[T].item()
        self.p = self.scheduler.alphas_cumprod[T_PREV].item()
        self.g = 3.0 if case.guided else None
        row = coefficient_row(self.a, self.p, Update(eta=case.eta, guidance_scale=self.g))
        self.direction, self.sigma = float(row.km), float(row.pn)
        schedule = fastddim.Schedule(self.scheduler.alphas_cumprod)
        # Step 3 of these timesteps is the step of this case.
        visited = [T + 3, T + 2, T + 1, T, T_PREV]
        self.stepper = fastddim.Stepper(schedule, visited, eta=case.eta, guidance_scale=self.g)
        self.table = stack_row(row).float()[None]
        self.row = torch.zeros(1, dtype=torch.int64)
        self.keys = philox.make_keys(7, batch, step_index=3) if case.eta else None

    def fastddim(self, out: Tensor) -> Tensor:
        ops.update_out(
            self.x,
            self.m,
            self.table,
            self.row,
            noise=None,
            keys=self.keys,
            out=out,
            x_0=None,
            model_input=None,
        )
        return out

    def public(self, out: Tensor) -> Tensor:
        """The call of the public function."""
        keys = {"seed": 7, "step_index": 3} if self.case.eta else {}
        return fastddim.step(
            self.x,
            self.m,
            self.a,
            self.p,
            eta=self.case.eta,
            guidance_scale=self.g,
            out=out,
            **keys,
        )

    def prepared(self, out: Tensor) -> Tensor:
        return self.stepper(self.x, self.m, 3, seed=7, out=out)

    def in_place(self) -> None:
        ops.update_out(
            self.out,
            self.m,
            self.table,
            self.row,
            noise=None,
            keys=self.keys,
            out=self.out,
            x_0=None,
            model_input=None,
        )

    def epsilon(self) -> Tensor:
        if self.g is None:
            return self.m
        unconditional, conditional = self.m.chunk(2)
        return unconditional + self.g * (conditional - unconditional)

    def diffusers(self, noise: Tensor | None = None) -> Tensor:
        step = self.scheduler.step(
            self.epsilon(), T, self.x, eta=self.case.eta, variance_noise=noise
        )
        return step.prev_sample

    def eager(self, noise: Tensor | None = None) -> Tensor:
        return self.formula(self.x, self.m, noise)

    def formula(self, x: Tensor, m: Tensor, noise: Tensor | None) -> Tensor:
        """Equation 12 in its usual form."""
        if self.g is not None:
            unconditional, conditional = m.chunk(2)
            m = unconditional + self.g * (conditional - unconditional)
        x_0 = (x - (1 - self.a) ** 0.5 * m) / self.a**0.5
        x_prev = self.p**0.5 * x_0 + self.direction * m
        if self.case.eta:
            x_prev = x_prev + self.sigma * (torch.randn_like(x) if noise is None else noise)
        return x_prev

    def compiled(self) -> Callable[[], Tensor]:
        torch.compiler.reset()
        formula = torch.compile(self.formula, fullgraph=True, dynamic=False)
        return lambda: formula(self.x, self.m, None)

    def noise(self) -> Tensor | None:
        if not self.case.eta:
            return None
        return philox.step_noise(self.case.shape, 3, 7).to(self.case.dtype)


def assert_parity(setup: Setup) -> None:
    ours = setup.fastddim(torch.full_like(setup.x, float("nan")))
    noise = setup.noise()
    exact = setup.formula(setup.x.float(), setup.m.float(), noise)
    rounding = torch.finfo(setup.case.dtype).eps
    torch.testing.assert_close(ours.float(), exact, rtol=rounding, atol=1e-5)
    # The other contenders round after each operation.
    tolerance = 1e-5 if setup.case.dtype == torch.float32 else 0.05
    for other in (setup.diffusers(noise), setup.eager(noise)):
        torch.testing.assert_close(ours, other, rtol=tolerance, atol=tolerance)
    compiled = setup.compiled()()
    if not setup.case.eta:
        torch.testing.assert_close(ours, compiled, rtol=tolerance, atol=tolerance)
    for call in (setup.public, setup.prepared):
        assert torch.equal(call(torch.full_like(setup.x, float("nan"))), ours)
    setup.out.copy_(setup.x)
    setup.in_place()
    assert torch.equal(setup.out, ours)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_step(case: Case, rows: list[dict[str, Any]], benchmark: Any) -> None:
    torch.set_num_threads(2)
    setup = Setup(case)
    assert_parity(setup)
    floor_input = setup.m[: case.shape[0]]
    contenders = {
        "floor": lambda: torch.add(setup.x, floor_input, out=setup.out),
        "fastddim.step": lambda: setup.public(setup.out),
        "Stepper": lambda: setup.prepared(setup.out),
        "fastddim": lambda: setup.fastddim(setup.out),
        "fastddim in place": setup.in_place,
        "diffusers": setup.diffusers,
        "eager": setup.eager,
        "torch.compile": setup.compiled(),
    }
    timings = compare(contenders, "floor")
    rows.append(
        {
            "case": case.name,
            "elements": setup.x.numel(),
            "timings": {name: asdict(timing) for name, timing in timings.items()},
        }
    )
    benchmark.extra_info.update({name: timing.ratio for name, timing in timings.items()})
    benchmark.pedantic(contenders["fastddim"], rounds=5, iterations=3, warmup_rounds=1)
