"""The interpreter of PTX: its refusals, scopes, registers and predicates."""

from __future__ import annotations

import numpy as np
import pytest

from .support.gpuless import ptx
from .support.gpuless.statements import (
    HEADER,
    evaluate,
    run_statements,
)

REFUSED = [
    "foo.b32 d, a;",
    "add.rn.bogus.f32 d, a, b;",
    "add.f32 d, a, b;",
    "mul.ftz.f32 d, a, b;",
    "fma.rz.f32 d, a, b, b;",
    "add.rn.rz.f32 d, a, b;",
    "sqrt.approx.f32 d, a;",
    "sqrt.approx.ftz.f32 d, a;",
    "rsqrt.approx.f32 d, a;",
    "ex2.approx.ftz.f32 d, a;",
    "lg2.approx.f32 d, a;",
    "sin.approx.f32 d, a;",
    "rcp.approx.f32 d, a;",
    "div.full.f32 d, a, b;",
    "div.approx.f32 d, a, b;",
    "add.rn.f16 d, a, b;",
    "add.sat.s32 d, a, b;",
    "cvt.rz.f16.f32 h, a;",
    "cvt.f16.f32 h, a;",
    "cvt.s32.f32 d, a;",
    "cvt.rn.relu.bf16.f32 h, a;",
    "cvt.sat.u8.u32 h, a;",
    "min.relu.f32 d, a, b;",
    "max.xorsign.f32 d, a, b;",
    "setp.lt.b32 p, a, b;",
    "setp.lo.s32 p, a, b;",
    "setp.ltu.u32 p, a, b;",
    "mul.u32 d, a, b;",
    "mul.wide.u64 x, x, x;",
    "shf.l.b32 d, a, b, a;",
    "prmt.f4e.b32 d, a, b, a;",
    "shfl.idx.b32 d, a, 0, 31;",
    "ldmatrix.sync.aligned.m8n8.x2.b8 {d, a}, [x];",
    "stmatrix.sync.aligned.m8n8.x2.b16 [x], {d, a};",
    "vote.sync.any.pred p, p, -1;",
    "atom.global.add.u32 d, [x], a;",
    "red.global.add.u32 [x], a;",
    "atom.shared.max.u32 d, [x], a;",
    "atom.shared.exch.b32 d, [x], a;",
    "red.shared.add.f32 [x], d;",
    "atom.add.u32 d, [x], a;",
    "atom.shared.gpu.add.u32 d, [x], a;",
    "ld.global.acquire.gpu.b32 d, [x];",
    "ld.global.relaxed.sys.b32 d, [x];",
    "ld.global.v3.b32 {d, a, b}, [x];",
    "ld.global.nc.cs.ca.b32 d, [x];",
    "ld.global.v2.b32 d, [x];",
    "ld.global.L3::evict.b32 d, [x];",
    "ld.global.L2::cache_hint.b32 d, [x];",
    "st.const.b32 [x], d;",
    "st.param.b32 [x], d;",
    "st.global.nc.b32 [x], d;",
    "cp.async.ca.shared.global [x], [x], 4;",
    "call.uni f, ();",
    "membar.gl;",
    "bar.sync 1;",
    "bar.arrive 0, 64;",
    "bar.warp.sync -1;",
    "trap;",
    "brkpt;",
    "bra elsewhere;",
    "add.u32 d, a;",
    "add.u32 d, a, b, a;",
    "add.u64 x, x, a;",
    "ld.global.f32 x, [x];",
    "add.u32 d, a, nowhere;",
    "add.u32 d, a, 0x100000000;",
    "mov.f32 d, 0d3FF0000000000000;",
    "add.u32 3, a, b;",
    "add.u32 d, a, p;",
    "@a mov.u32 d, 1;",
    "mov.u32 d, %clock;",
    "mov.u32 d, %smid;",
    "ld.param.b32 d, [p_out+8];",
    "ld.param.b64 x, [p_out+4];",
]


@pytest.mark.parametrize("statement", REFUSED)
def test_refused(statement: str) -> None:
    """Unknown parts of PTX are an error, also in code that no thread reaches."""
    declarations = ".reg .pred p; .reg .b64 x; .reg .b16 h;"
    sources = {"a": np.ones(1, "u4"), "b": np.ones(1, "u4")}
    body = f"setp.ne.u32 p, a, a; @!p bra over; {statement} over: mov.u32 d, 7;"
    assert evaluate(body.replace(statement, ""), sources, "b32", declarations)[0] == 7
    with pytest.raises(ptx.PtxError):
        evaluate(body, sources, "b32", declarations)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (".visible .entry f() .maxclusterrank 2 { ret; }", "maxclusterrank"),
        (".func g() { ret; }", "unsupported statement"),
        (".visible .entry f(.param .texref t) { ret; }", "texref"),
        (".visible .entry f() { .reg .b128 %q; ret; }", "b128"),
        (".visible .entry f() { add.u32 ", "braces"),
        (".extern .global .b32 x;", "extern"),
        (".visible .entry f() { nothing }", "syntax"),
    ],
)
def test_refused_modules(text: str, reason: str) -> None:
    with pytest.raises(ptx.PtxError, match=reason):
        ptx.run(ptx.parse(HEADER + text), "f", (1, 1, 1), (1, 1, 1), [], ptx.Memory())


def test_running_past_the_end_and_endless_loops_are_refused() -> None:
    for body, reason in (("{ mov.u32 %r, 1; }", "past the end"), ("again: bra again;", "steps")):
        text = f"{HEADER}.visible .entry f() {{ .reg .b32 %r; {body} }}"
        with pytest.raises(ptx.PtxError, match=reason):
            ptx.run(ptx.parse(text), "f", (1, 1, 1), (1, 1, 1), [], ptx.Memory(), max_steps=100)


def test_scopes() -> None:
    """Registers and labels declared between braces hide those around them, and end with them."""
    body = """
        mov.u32 t, 1;
        {
            .reg .b32 t;
            mov.u32 t, 10;
            bra over;
            mov.u32 t, 20;
            over:
            {
                .reg .b32 t;
                mov.u32 t, 100;
            }
            mov.u32 d, t;
        }
        {
            .reg .b64 t;
            bra over;
            add.u32 d, d, 1000;
            over:
            cvt.u64.u32 t, d;
        }
        add.u32 d, d, t;"""
    out = evaluate(body, {"a": np.zeros(1, "u4")}, "b32", ".reg .b32 t;")
    assert out[0] == 11


def test_registers_start_poisoned() -> None:
    """Registers start poisoned: an unwritten one is NaN, so that reading it shows."""
    out = evaluate("mov.f32 d, t;", {"a": np.zeros(4, "u4")}, "f32", ".reg .f32 t;")
    assert np.isnan(out.view("f4")).all()


@pytest.mark.parametrize("count", [512, 600])
def test_predicated_lanes_keep_their_value(count: int) -> None:
    """Lanes that a predicate turns off keep their value, and the instruction does not count as
    executed for them.
    """
    a = np.arange(count, dtype="u4")
    body = """
        mov.u32 d, a;
        mov.u32 copy, d;
        and.b32 t, a, 3;
        setp.eq.u32 p, t, 2;
        @p mov.b32 d, 7;
        @!p add.u32 copy, copy, 1;
        add.u32 d, d, copy;"""
    out, launch = run_statements(body, {"a": a}, "b32", ".reg .b32 t, copy; .reg .pred p;")
    assert out.tolist() == [7 + i if i % 4 == 2 else i + i + 1 for i in range(count)]
    assert launch.executed["mov.b32"] == count // 4
    assert launch.executed["st.global.b32"] == count


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_extrema_of_a_warp(kind: str) -> None:
    a = np.random.default_rng(3).integers(0, 2**32, 512, "u4")
    signed = a.view("i4" if kind == "s32" else "u4").reshape(-1, 32)
    for name, extremum in (("min", signed.min), ("max", signed.max)):
        out = evaluate(f"redux.sync.{name}.{kind} d, a, 0xffffffff;", {"a": a}, "b32")
        assert (out.view(signed.dtype).reshape(-1, 32) == extremum(axis=1)[:, None]).all()


def test_threads_that_store_the_same() -> None:
    """Equal words may be stored together, unequal ones are a race."""
    body = "st.shared.b32 [place], {};\n mov.b32 d, a;"
    shared = ".shared .align 4 .b32 place;"
    a = np.arange(64, dtype="u4")
    assert (evaluate(body.format(7), {"a": a}, "b32", shared) == a).all()
    with pytest.raises(ptx.PtxError, match="race"):
        evaluate(body.format("a"), {"a": a}, "b32", shared)
