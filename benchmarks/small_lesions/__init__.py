"""Study of what helps small lesions; see ``docs/results.md``."""
