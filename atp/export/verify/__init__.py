"""Verification: exports opened in fresh processes and compared with the model they came from.

Takes an export and the model; gives the largest difference of logits and whether it is within what rounding explains.
It does not know how the files were written.
"""
