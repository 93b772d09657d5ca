"""Tensors in, tensors out: the decoder, its linears, attention and loading."""
