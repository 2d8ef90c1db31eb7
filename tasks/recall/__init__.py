"""Tasks of exact recall over long sequences: associative recall, needles, copying, induction."""
