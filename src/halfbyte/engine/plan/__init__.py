"""What runs next, and in which rows: no torch, which an import contract sees to."""
