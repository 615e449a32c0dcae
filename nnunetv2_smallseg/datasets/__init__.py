"""Conversion of public data sets into nnU-Net's raw format; ``registry`` lists what can be converted."""
