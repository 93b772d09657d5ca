"""Every numeric bound of the tests, by name, with its reason. No other tolerance exists.

Exact comparisons need no entry. A bound is a factor on something measured, or a count of rounding
steps; the comment says which and why.
"""

# Activation maxima are bf16 values of bf16 forward passes; another kernel or summation order moves
# some by a bf16 step (2**-8 relative) or two. 2**-7 for most, 2**-6 for all:
# docs/reference/formats.md#what-equal-means.
OWN_FORWARD_SCALE = 2.0**-6
OWN_FORWARD_SCALE_MOST = 2.0**-7

# The same token's log-prob computed in steps of another shape. Sums may run in another order, which
# moves bf16 activations by a rounding step, 2**-8 relative; the logits of the tiny models reach 4,
# and two such steps of the largest are 2 * 4 * 2**-8 = 2**-5. (Measured: at most 0.007.)
SAME_LOGPROB = 2.0**-5

# Chance that a chi-square test fails a right sampler; seeds are fixed, so it fails never or always.
CHI_SQUARE_P = 1e-3

# Hidden states that wait between layers are bf16: one rounding (2**-9 relative) of the residual
# stream per layer more than a fused pass, three layers, and bf16 logits against f32 ones.
STREAMED_LAYERS = 8 * 2.0**-9

# Bounded class (`kernels.dispatch`): a reduction's error against float64 may be this many times the
# error of plain torch in the same dtype ...
TIMES_PLAIN = 2.0
# ... plus a floor of one rounding to the result's dtype: half a step of bf16 or f32, relative.
HALF_STEP = {"bfloat16": 2.0**-9, "float32": 2.0**-24}

# Logits against golden ones, relative norm (docs/reference/formats.md#what-equal-means): fp32 sums
# in another order; bf16 with another attention; 4-bit activations make tiny random models jumpy.
GOLDEN_FP32 = 1e-5
GOLDEN_BF16 = 0.02
GOLDEN_ROUNDED = 0.15
GOLDEN_ROUNDED_KL = 0.01

# An f32 cosine of a float64 angle: one rounding, and the attention factor's product before it.
ANGLE = 2.0**-23

# Logits of ranks against one process, relative norm. Partial sums are f32 and rounded once, so only
# the order of sums differs; a result near the middle of two bf16 values may then round to the other
# one (2**-8 relative), in a few places of each of a layer's products, and layers pass that on.
SPLIT_SUMS = 2.0**-7

# A draft model's bf16 against float64, relative norm: two layers and a product before them, each
# rounding its output (2**-9 relative), six such roundings on the way of a value in random weights.
# (Measured: at most 0.007.)
EAGLE_LAYERS = 6 * 2.0**-9
