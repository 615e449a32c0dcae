"""What the training sees: which slices are drawn, and which part of them."""
