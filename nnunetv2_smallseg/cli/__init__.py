"""Command line: argument parsing only. Each module is a thin layer over documented functions."""
