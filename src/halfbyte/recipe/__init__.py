"""Who gets which format: recipes (YAML) and the plans they make for a model."""
