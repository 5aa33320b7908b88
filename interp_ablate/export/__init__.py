"""A plan as a checkpoint, a LoRA adapter, a GGUF file or a control vector; checkpoints and adapters with a certificate.

May import: errors, sites, storage, prompts, directions, edits, models, evaluation, weights.
To add a format: a file here and a line in
`FORMATS` of `formats.py`, or the entry point `interp_ablate.export_formats`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
