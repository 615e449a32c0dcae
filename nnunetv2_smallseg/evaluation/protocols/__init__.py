"""The official protocols of challenges and papers, one module each, with their edge cases."""
