"""What a rehearsal counts before it times anything."""

from halfbyte.model.tiny import tiny_config
from halfbyte.modules import decoder_linears
from halfbyte.quantize.rehearsal import layer_weights, median_and_range, text_flops


def test_operations_of_a_text_are_those_of_linears_and_of_attention() -> None:
    config = tiny_config(layers=2)
    weights = layer_weights(config)
    own = [linear for linear in decoder_linears(config) if linear.layer == 1]
    assert weights == sum(linear.out_features * linear.in_features for linear in own)
    text = config.text
    # Two a weight and token; scores and values: two products of a head's width by the row's length.
    scores = 2 * 2 * text.num_heads * text.head_dim * 50
    assert text_flops(text, weights, 200, 50) == 200 * (2 * weights + scores)
    assert text_flops(text, weights, 0, 0) == 0


def test_of_several_times_the_median_counts() -> None:
    assert median_and_range([3.0, 1.0, 100.0]) == (3.0, 1.0, 100.0)
    assert median_and_range([]) == (0.0, 0.0, 0.0)
