"""What the training sees: which slices are drawn, which part of them, and what each case weighs."""
