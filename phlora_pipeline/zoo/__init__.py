"""A zoo: what is in it, what is new in it, what became of each model.

`folders` finds checkpoints by their listings and small files, `catalog` turns a zoo.yaml into the list of its models,
each with its base, and `init` writes a zoo.yaml for a place that has none. These three read listings and small files, never a tensor.
"""
