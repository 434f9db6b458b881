"""Normals inside a kernel: csrc/formula.h in Triton, bit for bit, as philox.py specifies them.

All operations are correctly rounded. Triton's own `log`, `sin`, `cos` and `sqrt` are approximate on
GPUs, and its `randn` needs local memory for them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

# The highest power first, for Horner's scheme.
_LN = tl.constexpr(
    tuple(
        map(
            float.fromhex,
            (
                "0x1.6607fep-4",
                "-0x1.25183ap-3",
                "0x1.3174c8p-3",
                "-0x1.53522ap-3",
                "0x1.98d22cp-3",
                "-0x1.0004cap-2",
                "0x1.5556f6p-2",
                "-0x1.fffffap-2",
            ),
        )
    )
)
# The factor for an exponent that is scaled by 2^23.
_LN_2 = tl.constexpr(float.fromhex("0x1.62e430p-24"))
_SIN = tl.constexpr(
    tuple(
        map(
            float.fromhex,
            ("-0x1.2da156p+6", "0x1.465eeap+6", "-0x1.4abbbap+5", "-0x1.a32bd0p-23"),
        )
    )
)
_TWO_PI = tl.constexpr(float.fromhex("0x1.921fb6p+2"))
_COS = tl.constexpr(
    tuple(
        map(
            float.fromhex,
            ("0x1.d47d48p+5", "-0x1.55b146p+6", "0x1.03c1aep+6", "-0x1.3bd3ccp+4", "0x1.0p+0"),
        )
    )
)
_MULTIPLIER_0, _MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_WEYL_0, _WEYL_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def polynomial(coefficients: tl.constexpr, degree: tl.constexpr, x):
    value = tl.full(x.shape, coefficients[0], tl.float32)
    for i in tl.static_range(1, degree + 1):
        value = tl.fma(value, x, coefficients[i])
    return value


@triton.jit
def ln(u):
    word = u.to(tl.int32, bitcast=True)
    exponent = (word - 0x3F3504F3) & -0x800000
    f = (word - exponent).to(tl.float32, bitcast=True) - 1.0
    mantissa = tl.fma(f * f, polynomial(_LN, 7, f), f)
    return tl.fma(exponent.to(tl.float32), _LN_2, mantissa)


@triton.jit
def sincos_2pi(u):
    quarter = tl.fma(u, 4.0, 0.5).to(tl.int32)
    r = tl.fma(quarter.to(tl.float32), -0.25, u)
    square = r * r
    s = tl.fma(r, _TWO_PI, r * polynomial(_SIN, 3, square))
    c = polynomial(_COS, 4, square)
    swapped = (quarter & 1) != 0
    # Bit 1 of the quarter is the sign of both. Triton's unary minus would be 0 - s.
    sign = (quarter >> 1) << 31
    return tl.where(swapped, c, s), tl.where(swapped, s * -1.0, c), sign


@triton.jit
def uniform(word):
    # The conversion from uint32 rounds once.
    return tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)


@triton.jit
def root(a, NVIDIA: tl.constexpr):
    """√a as in csrc/scalar.h; `tl.sqrt_rn` has a branch for numbers that do not occur here."""
    if NVIDIA:
        reciprocal = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
        )
        reciprocal = tl.minimum(tl.abs(reciprocal), 2.0**40)
        approximate = a * reciprocal
        rest = tl.fma(approximate * -1.0, approximate, a)
        return tl.fma(rest, 0.5 * reciprocal, approximate)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def box_muller(word_0, word_1, NVIDIA: tl.constexpr):
    radius = root(ln(uniform(word_0)) * -2.0, NVIDIA)
    sine, cosine, sign = sincos_2pi(uniform(word_1))
    radius = (radius.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return radius * cosine, radius * sine


@triton.jit
def product(multiplier: tl.constexpr, word, NVIDIA: tl.constexpr):
    """Both words of a product of two, the upper one first."""
    if NVIDIA and word.type.is_block():
        # One instruction, where Triton's two operations would be two.
        return tl.inline_asm_elementwise(
            "{.reg .b64 both; mul.wide.u32 both, $2, $3; mov.b64 {$1, $0}, both;}",
            "=r,=r,r,r",
            [word, multiplier],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.umulhi(word, multiplier), tl.mul(word, multiplier, sanitize_overflow=False)


@triton.jit
def philox(seed, c_0, c_1, c_2, c_3, NVIDIA: tl.constexpr):
    k_0, k_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high_0, low_0 = product(_MULTIPLIER_0, c_0, NVIDIA)
        high_1, low_1 = product(_MULTIPLIER_1, c_2, NVIDIA)
        c_0, c_1 = high_1 ^ c_1 ^ k_0, low_1
        c_2, c_3 = high_0 ^ c_3 ^ k_1, low_0
        k_0 = tl.add(k_0, _WEYL_0, sanitize_overflow=False)
        k_1 = tl.add(k_1, _WEYL_1, sanitize_overflow=False)
    return c_0, c_1, c_2, c_3


@triton.jit
def words(keys, position, quad, stream: tl.constexpr, NVIDIA: tl.constexpr):
    """Four random words for each quad of elements of the sample that `position` keys."""
    seed = tl.load(keys.seed + position)
    step = tl.load(keys.step + position).to(tl.uint32)
    sample = tl.load(keys.sample + position).to(tl.uint32)
    return philox(seed, quad, step, sample, tl.full([], stream, tl.uint32), NVIDIA)


@triton.jit
def normals_of_quads(keys, position, quad, stream: tl.constexpr, NVIDIA: tl.constexpr):
    r_0, r_1, r_2, r_3 = words(keys, position, quad, stream, NVIDIA)
    z_0, z_1 = box_muller(r_0, r_1, NVIDIA)
    z_2, z_3 = box_muller(r_2, r_3, NVIDIA)
    return z_0, z_1, z_2, z_3


@triton.jit
def quads(first, TILE: tl.constexpr):
    """The quads of a tile, one a thread."""
    return (first // 4).to(tl.uint32) + tl.arange(0, TILE // 4).to(tl.uint32)


@triton.jit
def normals(
    keys,
    position,
    first,
    stream: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """float32 `[TILE]`: normals first … first + TILE − 1, each drawn by the thread that stores it.

    A thread stores VECTOR neighbours: half a quad, a quad, or two.
    """
    first_quad = (first // 4).to(tl.uint32)
    lane = tl.arange(0, TILE // VECTOR).to(tl.uint32)
    if VECTOR == 2:
        quad = first_quad + (lane >> 1)
        r_0, r_1, r_2, r_3 = words(keys, position, quad, stream, NVIDIA)
        second = (lane & 1) != 0
        word_0, word_1 = tl.where(second, r_2, r_0), tl.where(second, r_3, r_1)
        z = tl.join(*box_muller(word_0, word_1, NVIDIA))
    elif VECTOR == 4:
        z_0, z_1, z_2, z_3 = normals_of_quads(keys, position, first_quad + lane, stream, NVIDIA)
        z = tl.join(tl.join(z_0, z_2), tl.join(z_1, z_3))
    else:
        tl.static_assert(VECTOR == 8)
        quad = first_quad + 2 * lane
        y_0, y_1, y_2, y_3 = normals_of_quads(keys, position, quad, stream, NVIDIA)
        z_0, z_1, z_2, z_3 = normals_of_quads(keys, position, quad + 1, stream, NVIDIA)
        z = tl.join(
            tl.join(tl.join(y_0, z_0), tl.join(y_2, z_2)),
            tl.join(tl.join(y_1, z_1), tl.join(y_3, z_3)),
        )
    return z.reshape(TILE)
