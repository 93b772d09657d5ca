"""One file per benchmark: load the samples, write the prompt, hand the answer to a grader."""
