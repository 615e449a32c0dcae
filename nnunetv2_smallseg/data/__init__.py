"""Which patches are drawn, and what each case weighs in the loss."""
