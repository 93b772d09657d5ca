"""Records in, model card out."""
