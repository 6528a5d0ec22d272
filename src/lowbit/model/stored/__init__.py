"""Weights as other quantizers store them, each to a PackedMatrix of the same values: nothing is rounded
again.

gptq, awq, compressed_tensors, bitsandbytes, bitnet, fp8, mxfp4    one file for each kind of storage
tensors        which of them a checkpoint uses, and its tensors under the names of a float checkpoint
arrays, bits, grouping, packing    what they share: checked arrays, bit streams, groups, terms
"""
