"""A Triton kernel that must exchange values between threads."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def transpose(source, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Reads rows and writes columns, both with wide accesses, through shared memory."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    place = tl.program_id(0) * ROWS * COLUMNS
    values = tl.load(source + place + row * COLUMNS + column)
    row, column = tl.arange(0, ROWS)[None, :], tl.arange(0, COLUMNS)[:, None]
    tl.store(out + place + column * ROWS + row, tl.trans(values))


def compiled(capability: int, type: str, rows: int, columns: int) -> tuple[str, int]:
    """(PTX, bytes of dynamic shared memory)."""
    source = ASTSource(
        fn=transpose,
        signature={
            **{"source": f"*{type}", "out": f"*{type}"},
            **{"ROWS": "constexpr", "COLUMNS": "constexpr"},
        },
        constexprs={(2,): rows, (3,): columns},
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": 4})
    return kernel.asm["ptx"], kernel.metadata.shared
