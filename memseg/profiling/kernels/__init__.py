"""What an operation takes and computes that a trace of tensors does not see."""
