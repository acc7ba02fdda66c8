"""A Hugging Face checkpoint, captured and cut at its attention operators.

The modules of this package, in the order of use: ``checkpoint`` reads the directory, ``capture`` turns the module of
``transformers`` into a graph in which attention is one opaque operator, ``cut`` divides the graph into slices,
``weights`` loads the tensors that a range of slices needs, and ``slices`` runs them.
"""
