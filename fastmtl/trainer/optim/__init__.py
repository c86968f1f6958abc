"""What moves the parameters: optimizers, masked steps and learning rates."""
