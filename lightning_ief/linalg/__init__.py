"""Pure functions on tensors: the Gram matrix, the damped solve, dictionaries of tensors as vectors."""
