"""The lesion fingerprint of a data set: sizes, what nnU-Net loses of them, and what to do about it."""
