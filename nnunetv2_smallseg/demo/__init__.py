"""The demo: a phantom with small lesions, and the way from raw data to an evaluated model."""
