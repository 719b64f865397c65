"""What a run reports while it works: progress, TensorBoard curves, memory."""
