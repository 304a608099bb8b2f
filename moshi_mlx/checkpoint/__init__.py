"""Reading checkpoint files safely, and the names that other programs give to the same weights.

Nothing here knows the model as code: files become dicts of arrays, and dicts are renamed. ``weights`` puts them into
the model.
"""
