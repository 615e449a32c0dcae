"""Measurements; each script writes a results file that names device and versions."""
