"""Networks, one file per published system; blocks that two systems share live in ``blocks/``."""
