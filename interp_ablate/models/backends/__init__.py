"""The TransformerLens classes that a model can run on; no other folder knows them.

May import: errors, sites, edits, models/architectures. To add a backend: a file with a class that has the members of `Backend`, and a line in `registry.py`.
"""
