"""Every numeric bound of the tests, by name, with its reason. No other tolerance exists.

Exact comparisons need no entry. A bound is a factor on something measured, or a count of rounding
steps; the comment says which and why.
"""

# Activation maxima are bf16 values of bf16 forward passes; another kernel or summation order moves
# some by a bf16 step (2**-8 relative) or two. Format reference, section 10: 2**-7 for most, 2**-6
# for all.
OWN_FORWARD_SCALE = 2.0**-6
OWN_FORWARD_SCALE_MOST = 2.0**-7
