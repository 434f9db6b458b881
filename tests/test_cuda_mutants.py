"""The sharpness of the comparison: one instruction of the kernels' PTX is changed at a time, and
the updates of tests/support/gpuless/cases.py must notice.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastddim import backends, philox

from .support.environment import needs_compiler, needs_extension
from .support.gpuless import ptx
from .support.gpuless.cases import run_bare, same_bits
from .support.gpuless.cuda_on_ptx import Device, device, ptx_of
from .support.gpuless.fits import (
    BACKWARD_CASES,
    FIT_CASES,
    backward_case,
    fit_case,
    fitted,
    gradients,
)
from .support.gpuless.toolchain import needs_nvcc
from .support.updates import ALIGNED, DTYPES, Case, make_case, poisoned_like, run

__all__ = ["device"]

pytestmark = [needs_compiler, needs_extension, needs_nvcc]

MUTANTS_PER_KERNEL = 70

# What a mutation makes of an instruction; a function gets the operands.
EXCHANGED = {
    "add.f32": "sub.f32",
    "sub.f32": "add.f32",
    "add.rn.f32": "sub.rn.f32",
    "sub.rn.f32": "add.rn.f32",
    "mul.rn.f32": "add.rn.f32",
    "neg.f32": "abs.f32",
    "abs.f32": "neg.f32",
    "max.NaN.f32": "min.NaN.f32",
    "min.NaN.f32": "max.NaN.f32",
    "min.f32": "max.f32",
    "setp.lt.f32": "setp.gt.f32",
    "setp.gt.f32": "setp.lt.f32",
    "setp.eq.f32": "setp.neu.f32",
    "setp.neu.f32": "setp.eq.f32",
    "setp.lt.s64": "setp.le.s64",
    "setp.le.s64": "setp.lt.s64",
    "setp.gt.s64": "setp.ge.s64",
    "setp.ge.s64": "setp.gt.s64",
    "setp.lt.u64": "setp.le.u64",
    "setp.lt.s32": "setp.le.s32",
    "setp.gt.s32": "setp.ge.s32",
    "setp.ge.s32": "setp.gt.s32",
    "setp.lt.u32": "setp.le.u32",
    "setp.gt.u32": "setp.ge.u32",
    "setp.eq.s32": "setp.ne.s32",
    "setp.ne.s32": "setp.eq.s32",
    "setp.eq.s64": "setp.ne.s64",
    "setp.ne.s64": "setp.eq.s64",
    "add.s64": "sub.s64",
    "sub.s64": "add.s64",
    "add.s32": "sub.s32",
    "sub.s32": "add.s32",
    "xor.b32": "or.b32",
    "or.b32": "and.b32",
    "and.b32": "or.b32",
    "shl.b32": "shr.u32",
    "shl.b64": "shr.u64",
    "shr.u32": "shl.b32",
    "shr.s32": "shr.u32",
    "shr.u64": "shl.b64",
    "mul.hi.u32": "mul.lo.u32",
    "mul.wide.u32": "mul.wide.s32",
    "cvt.rn.f32.u32": "cvt.rn.f32.s32",
    "cvt.rzi.s32.f32": "cvt.rni.s32.f32",
    "add.rn.f64": "sub.rn.f64",
    "sub.rn.f64": "add.rn.f64",
    "mul.rn.f64": "add.rn.f64",
    "div.rn.f64": "mul.rn.f64",
    "div.rn.f32": "mul.rn.f32",
    "sqrt.rn.f64": "neg.f64",
    "setp.gt.f64": "setp.lt.f64",
    "setp.lt.f64": "setp.gt.f64",
    "setp.le.u32": "setp.lt.u32",
    "setp.gt.u64": "setp.ge.u64",
}


class Mutant(NamedTuple):
    kind: str
    """The change: an opcode that became another, or the part of an instruction."""
    line: int
    before: str
    after: str


def mutants(lines: list[str]) -> Iterator[Mutant]:
    """Every change of one instruction that the operators make.

    Two changes are left out: the choice between division in 32 and in 64 bits, which both give the
    quotient, and the sign of an index times the size of an element or the stride of samples, which
    only indices and strides from 2³¹ on have.
    """
    text = "\n".join(lines)
    choices = set()
    for high in re.findall(r"(%rd\d+), %rd\d+, -4294967296;", text):
        choices |= set(re.findall(rf"setp\.\w+\.s64\s+(%p\d+), {high}, 0;", text))
    for number, line in enumerate(lines):
        if any(re.search(rf"{choice}\b", line) for choice in choices):
            continue
        match = re.match(r"(\s*)(@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);", line)
        if match is None:
            continue
        space, guard, opcode, rest = match[1], match[2] or "", match[3], match[4]
        operands = [o.strip() for o in rest.split(",")]
        if guard:
            turned = guard.replace("@", "@!") if "!" not in guard else guard.replace("!", "")
            yield Mutant("guard", number, line, f"{space}{turned}{opcode} {rest};")
        if opcode == "bar.sync":
            yield Mutant("barrier", number, line, f"{space}// No barrier.")
        index = opcode == "mul.wide.u32" and re.fullmatch(r"\d{1,2}|%r\d+", operands[-1])
        if opcode in EXCHANGED and not index:
            yield Mutant(opcode, number, line, f"{space}{guard}{EXCHANGED[opcode]} {rest};")
        if opcode.startswith("fma.rn.f32"):
            d, a, b, c = operands
            yield Mutant("addend", number, line, f"{space}{guard}mul.rn.f32 {d}, {a}, {b};")
            yield Mutant("factor", number, line, f"{space}{guard}fma.rn.f32 {d}, {a}, {c}, {b};")
        if opcode.startswith("selp"):
            d, a, b, p = operands
            yield Mutant("choice", number, line, f"{space}{guard}{opcode} {d}, {b}, {a}, {p};")
        if opcode.startswith("mov.b32") and re.fullmatch(r"0f[0-9A-F]{8}", operands[-1]):
            other = f"0f{int(operands[-1][2:], 16) ^ 1:08X}"
            yield Mutant(
                "constant", number, line, f"{space}{guard}{opcode} {operands[0]}, {other};"
            )
        if opcode.startswith("fma.rn.f32") and operands[-1].startswith("0f"):
            other = f"0f{int(operands[-1][2:], 16) ^ 1:08X}"
            changed = ", ".join([*operands[:-1], other])
            yield Mutant("constant addend", number, line, f"{space}{guard}{opcode} {changed};")


class Target(NamedTuple):
    kernel: str
    cases: list[Callable[[Device], bool]]
    """True if the kernel still gives the right bits."""


def update_check(shape: tuple[int, ...], bare: bool, **arguments: Any) -> Callable[[Device], bool]:
    case = make_case(torch.Generator().manual_seed(8), shape, **arguments)
    return case_check(case, bare)


def case_check(case: Case, bare: bool) -> Callable[[Device], bool]:
    def outputs(update_out: Any) -> list[Tensor]:
        return run_bare(update_out, case) if bare else run(update_out, case).tensors()

    expected = outputs(backends.BACKENDS["cpu"].update_out)

    def right(on: Device) -> bool:
        return all(map(same_bits, outputs(on.update_out), expected))

    return right


def quiet(case: Case) -> Case:
    """Half of the rows have no noise, and its tensor must then not be read."""
    case.rows[2::2, 6] = 0
    return case


def reordered(case: Case) -> Case:
    """All tensors have their dimensions in reverse order in memory."""
    case.x, case.model_output = shuffled(case.x), shuffled(case.model_output)
    return case


def special(case: Case) -> Case:
    """Values that comparisons and conversions treat separately."""
    values = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e-42, 0.0, -0.0]
    )
    case.model_output.view(-1)[: len(values)] = values.to(case.model_output.dtype)
    return case


def shuffled(values: Tensor) -> Tensor:
    """Dimensions lie in memory in an order that leaves no two of them one run."""
    order = [0, *range(values.ndim - 1, 0, -1)]
    return values.permute(order).contiguous().permute(order)


def normal_check(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> Callable[[Device], bool]:
    case = make_case(
        torch.Generator().manual_seed(9), shape, dtype=dtype, layout=layout, noise="keyed"
    )
    if layout == "shuffled":
        case.x = shuffled(case.x)
    assert case.keys is not None
    keys = case.keys
    expected = philox.normal(keys, shape[1:], philox.LATENTS).to(dtype)

    def right(on: Device) -> bool:
        out, _ = poisoned_like(case.x)
        on.normal_out(keys, philox.LATENTS, out)
        return same_bits(out, expected)

    return right


def advance_check(count: int, more: int) -> Callable[[Device], bool]:
    def right(on: Device) -> bool:
        timesteps = torch.arange(100, 109)
        counters = torch.arange(count + more) % 8
        t = torch.full((count,), -1)
        on.advance(counters, timesteps, t)
        before = torch.arange(count + more) % 8
        return torch.equal(counters, before + 1) and torch.equal(t, timesteps[before[:count] + 1])

    return right


def fit_check(name: str) -> Callable[[Device], bool]:
    case, rescaling = fit_case(name)
    expected = fitted(backends.BACKENDS["cpu"].rescale_rows, case, rescaling, case.table, case.row)

    def right(on: Device) -> bool:
        return same_bits(fitted(on.rescale_rows, case, rescaling, case.table, case.row), expected)

    return right


def backward_check(name: str) -> Callable[[Device], bool]:
    case, *grads = backward_case(name)
    arguments = (case, (case.table, case.row), *grads)
    expected = gradients(torch.ops.fastddim.backward_out, *arguments)

    def right(on: Device) -> bool:
        return all(map(same_bits, gradients(on.backward_out, *arguments), expected))

    return right


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(10)


def targets() -> list[Target]:
    bf16 = torch.bfloat16
    everything = {"history": True, "mask": True, "guided": True, "clip": 0.8, "noise": "keyed"}
    float_any = [
        update_check((40, 8), False, per_sample=True, **everything),
        update_check((3, 2, 1100), False, model_input=torch.float32, **everything),
        update_check((2, 1021), False, noise="keyed"),
        update_check((2, 7), False, noise="keyed", mask=True),
        update_check((300, 4), False, noise="keyed", history=True, per_sample=True),
        case_check(quiet(make_case(generator(), (6, 20), noise="keyed", per_sample=True)), False),
        case_check(special(make_case(generator(), (2, 36), noise="keyed", clip=1.0)), False),
    ]
    float_plain = [
        update_check((40, 8), True, noise="keyed", per_sample=True, clip=0.8),
        update_check((3, 2, 1100), True, noise="keyed", model_input=torch.float32),
        update_check((2, 1021), True, noise="keyed"),
        update_check((300, 4), True, noise="keyed", per_sample=True),
        case_check(quiet(make_case(generator(), (6, 20), noise="keyed", per_sample=True)), True),
        case_check(special(make_case(generator(), (2, 36), noise="keyed", clip=1.0)), True),
    ]
    kind = {"dtype": bf16, "noise": "keyed", "guided": True}
    bfloat16_guided = [
        update_check((40, 16), True, per_sample=True, model_input=bf16, clip=0.8, **kind),
        update_check((3, 2, 1104), True, **kind),
        update_check((2, 1021), True, model_input=bf16, **kind),
        update_check((300, 8), True, per_sample=True, **kind),
        case_check(quiet(make_case(generator(), (6, 24), **(kind | {"per_sample": True}))), True),
        case_check(special(make_case(generator(), (2, 40), clip=1.0, **kind)), True),
    ]
    # A tail of every length.
    inputs = {"model_input": torch.float32, **everything}
    float_any += [update_check((3, n), False, **inputs) for n in (5, 6, 7)]
    plain = {"model_input": torch.float32, "noise": "keyed", "per_sample": True}
    float_plain += [update_check((3, n), True, **plain) for n in (5, 6, 7)]
    bfloat16_guided += [update_check((3, n), True, model_input=bf16, **kind) for n in range(9, 16)]
    # Outputs that are aligned: chunks are moved in whole words.
    float_any.append(update_check((3, 2, 1100), True, per_sample=True, **inputs))
    mixed = {"model_dtype": torch.float64, "model_input": torch.float16}
    strided = [
        update_check(
            (2, 3, 3, 5),
            False,
            dtype=state,
            model_dtype=model,
            layout="sliced",
            model_input=model,
            **everything,
        )
        for state, model in itertools.product((torch.float32, torch.float16, bf16), DTYPES)
    ]
    strided += [
        update_check((2, 3, 5, 7), False, layout="sliced", per_sample=True, **everything),
        update_check((2, 3, 4, 5), False, layout="permuted", noise="keyed", **mixed),
        update_check((3, 2, 9), False, dtype=bf16, noise="keyed", guided=True, **mixed),
        update_check((2, 300, 5), False, dtype=torch.float16, layout="sliced", noise="keyed"),
        update_check((2, 2, 3, 2, 5), False, layout="sliced", noise="keyed", mask=True),
        *(
            case_check(
                reordered(
                    make_case(
                        generator(),
                        (2, 2, 3, 2, 3, 2, 5)[:dims],
                        **mixed,
                        noise="keyed",
                        guided=True,
                        history=True,
                    )
                ),
                False,
            )
            for dims in (4, 5, 6, 7)
        ),
    ]
    # Every tensor in every dtype and order.
    interleaved = ("channels_last", "channels_last")
    pixels = [
        update_check(
            (2, 4, 4, 6),
            False,
            dtype=dtype,
            layout=layout,
            model_layout=model_layout,
            learned_variance=learned,
            model_input=dtype,
            per_sample=True,
            frame=ALIGNED,
            **everything,
        )
        for dtype, learned, (layout, model_layout) in itertools.product(
            (torch.float32, torch.float16, bf16),
            (False, True),
            (interleaved, ("channels_last", "contiguous"), ("contiguous", "channels_last")),
        )
    ]
    turned = {"layout": "contiguous", "model_layout": "channels_last", "noise": "keyed"}
    pixels += [
        update_check((40, 4, 2, 4), True, model_input=torch.float16, per_sample=True, **turned),
        update_check((2, 4, 33, 36), True, dtype=bf16, guided=True, **turned),
        case_check(
            quiet(
                make_case(
                    generator(),
                    (6, 4, 2, 4),
                    layout="channels_last",
                    noise="keyed",
                    per_sample=True,
                )
            ),
            True,
        ),
    ]
    normals = [
        normal_check(shape, dtype, layout)
        for dtype, layout, shape in itertools.product(
            (torch.float32, torch.float16, bf16, torch.float64),
            ("contiguous", "sliced"),
            ((3, 5, 7, 3), (1, 1501)),
        )
    ]
    normals += [
        normal_check((2, 2, 3, 2, 3, 2, 3, 5)[:dims], torch.float32, "shuffled")
        for dims in range(3, 9)
    ]
    sizes = ((1, 0), (3, 2), (256, 1), (700, 300), (256, 0), (512, 768), (3000, 0), (1024, 2000))
    advances = [advance_check(*pair) for pair in sizes]
    return [
        Target("updateIffLNS_4KindE2ELb1E", float_any),
        Target("updateIffLNS_4KindE0ELb1E", float_plain),
        Target("updateINS_8BFloat16ES1_LNS_4KindE1ELb1E", bfloat16_guided),
        Target("update_stridedIfLb1E", strided),
        Target("update_pixelsILi4ELb1E", pixels),
        Target("normalENS_10NormalCall", normals),
        Target("advanceEPl", advances),
        *(
            Target(kernel, [fit_check(name) for name in FIT_CASES if re.fullmatch(names, name)])
            for kernel, names in (
                ("fitINS_11DenseSourceIff", r"\d+-\w+|no-\w+|[a-z-]+-torch.float32"),
                ("fitINS_13StridedSourceId", r"torch.float64-(?!c|o|torch.float64).*"),
            )
        ),
        *(
            Target(kernel, [backward_check(n) for n in BACKWARD_CASES if re.fullmatch(names, n)])
            for kernel, names in (
                ("backwardIffLi4", r"\(.*|(tail-)?torch.float32-(\d|T|F).*"),
                ("backwardINS_8BFloat16", r"(tail-)?torch.bfloat16-(\d|T|F).*"),
                ("backward_stridedIf", r"(permuted|sliced-torch.b?float(16|32)|six).*"),
            )
        ),
    ]


class Mutated:
    """A kernel of which one instruction is changed at a time."""

    def __init__(self, target: Target, text: str) -> None:
        match = re.search(rf"\.entry (\w*{target.kernel}\w*)\(", text)
        assert match is not None
        start = text.index("{", match.end())
        ends = (m.start() for m in re.finditer(r"\n\t// .globl|\n\.entry|\n\.visible", text))
        end = next((place for place in ends if place > start), len(text))
        self._before, self._after = text[:start], text[end:]
        self._lines = text[start:end].split("\n")
        self._cases = target.cases
        self.mutants = list(mutants(self._lines))
        random.Random(0).shuffle(self.mutants)

    def is_noticed(self, mutant: Mutant, on: Device) -> bool:
        lines = [*self._lines[: mutant.line], mutant.after, *self._lines[mutant.line + 1 :]]
        before = on.gpu.module
        on.gpu.module = ptx.parse(self._before + "\n".join(lines) + self._after)
        try:
            return any(noticed(check, on) for check in self._cases)
        finally:
            on.gpu.module = before


def noticed(check: Callable[[Device], bool], on: Device) -> bool:
    try:
        return not check(on)
    except ptx.PtxError:
        return True


def mutated(device: Device) -> list[tuple[str, Mutated]]:
    """Each kernel by its name; its cases pass on the output of nvcc."""
    found = []
    for target in targets():
        assert all(check(device) for check in target.cases)
        found.append((target.kernel, Mutated(target, ptx_of("sm_90"))))
    return found


# Where the largest value is the order statistic itself, the pass for the next one finds nothing.
HARMLESS = {"setp.le.u32"}


def test_a_mutant_of_each_kind_is_noticed(device: Device) -> None:
    """A mutant of each kind is noticed, among a kernel's first three of that kind: some of them
    change nothing.
    """
    kinds: dict[str, bool] = {}
    for _, kernel in mutated(device):
        for kind, alike in by_kind(kernel.mutants).items():
            if not kinds.get(kind):
                kinds[kind] = any(kernel.is_noticed(mutant, device) for mutant in alike[:3])
    assert len(kinds) >= 30
    assert {kind for kind, found in kinds.items() if not found} <= HARMLESS


def by_kind(found: list[Mutant]) -> dict[str, list[Mutant]]:
    kinds = defaultdict(list)
    for mutant in found:
        kinds[mutant.kind].append(mutant)
    return kinds


def is_update(kernel: str) -> bool:
    return not kernel.startswith(("fit", "backward"))


@pytest.mark.deep
def test_mutants_are_noticed(device: Device) -> None:
    """At least 95 of 100 mutants are noticed in updates, and 90 in rows and gradients;
    docs/kernel.md describes the others.
    """
    tried: Counter[bool] = Counter()
    left = []
    for name, kernel in mutated(device):
        chosen = kernel.mutants[:MUTANTS_PER_KERNEL]
        tried[is_update(name)] += len(chosen)
        left += [(name, mutant) for mutant in chosen if not kernel.is_noticed(mutant, device)]
    unnoticed = Counter(is_update(name) for name, _ in left)
    report = [f"{sum(tried.values())} mutants, {sum(tried.values()) - len(left)} noticed"]
    report += [f"of updates, noise and counters: {tried[True]}, {tried[True] - unnoticed[True]}"]
    report += [f"{name}: {m.before.strip()} -> {m.after.strip()}" for name, m in left]
    print("\n".join(report))
    assert min(tried[True], tried[False]) >= 300
    assert unnoticed[True] <= 0.05 * tried[True], "\n".join(report)
    assert unnoticed[False] <= 0.1 * tried[False], "\n".join(report)
