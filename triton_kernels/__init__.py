"""The GPU backend's kernels: every op in Triton, from Ampere to Blackwell.

The functions are those of every backend (see ``fastnce.backends``): ``<op>_forward`` and ``<op>_backward`` over validated tensors.
With ``TRITON_INTERPRET=1``, set before the package is imported, they run on CPU tensors as well, for tests.
"""

import importlib
import pkgutil

# The functions of the backend, whichever file they are in.
for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    for _name, _function in vars(importlib.import_module(_file.name)).items():
        if _name.endswith(("_forward", "_backward", "_add_")) and not _name.startswith("_"):
            globals()[_name] = _function
