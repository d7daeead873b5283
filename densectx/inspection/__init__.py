"""What a network sees and costs: fields, coverage, equivalent kernels, equivariance, operations, pictures."""
