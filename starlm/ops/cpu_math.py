"""Elementary functions in fp32 that the compiler vectorises inside a loop; those of libm it does not.

All constants are fp32: an integer beside an fp32 number would make numba compute in fp64.
"""

import math

import numpy as np

from starlm.ops.cpu_base import kernel

# Sums may be taken in any order, products and sums fused; NaN and infinity keep their meaning.
jit = kernel(nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
f32, i32 = np.float32, np.int32
ZERO, HALF, ONE, TWO = f32(0), f32(0.5), f32(1), f32(2)
# Where exp would leave fp32, and where tanh has long been 1.
_LOWEST, _HIGHEST = f32(-87), f32(40)
_LOG2E = f32(1 / math.log(2))
# ln 2 in two parts, of which the first times any exponent of fp32 is exact.
_LN2_HIGH = f32(355 / 512)
_LN2_LOW = f32(math.log(2) - 355 / 512)


@jit
def _exp_parts(x):
    """2^n and y with exp(x) = 2^n + 2^n y."""
    # Not min and max: NaN must stay NaN.
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    whole = np.floor(x * _LOG2E + HALF)
    r = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
    # Taylor to the 7th power: |r| <= ln(2) / 2, so the next term is below 2^-27.
    y = f32(1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0):
        y = y * r + f32(factor)
    return i32((i32(whole) + i32(127)) << i32(23)).view(np.float32), y * r


@jit
def exp(x):
    """exp(x), for x clipped to -87 .. 40."""
    power, y = _exp_parts(x)
    return power + power * y


@jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return ONE / (ONE + exp(-x))


@jit
def tanh_of_half(x):
    """tanh(x / 2), by way of exp(x) - 1, which keeps its digits near 0."""
    power, y = _exp_parts(x)
    less = power * y + (power - ONE)
    return less / (less + TWO)


@jit
def softplus(x):
    """log(1 + exp(x))."""
    e = exp(-abs(x))
    # log(1 + e) = 2 artanh(s), s <= 1/3: the term after s^13 is below 2^-26.
    s = e / (e + TWO)
    square = s * s
    y = f32(2 / 15)
    for odd in (13, 11, 9, 7, 5, 3, 1):
        y = y * square + f32(2 / odd)
    return (ZERO if x < ZERO else x) + y * s
