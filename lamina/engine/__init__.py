"""What happens between a request and its tokens.

A batch's way through this package: ``scheduler`` decides what the next step consists of, ``step`` takes it through
the slices, ``remote`` carries q, k, v to the memory nodes and o back, ``shard`` is what a memory node does with
them, ``prompts`` holds the keys and values of prompts until the memory nodes have them, ``sampler`` chooses the tokens.
"""
