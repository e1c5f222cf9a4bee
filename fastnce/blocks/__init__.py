"""The kernels of the ``blocks`` backend: exact, in PyTorch's own operators, with no N x M matrix, on every device.

Their signatures are those that ``fastnce.backends.operators`` describes.
"""

import importlib
import pkgutil

# The functions of the backend, whichever file they are in.
for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    for _name, _function in vars(importlib.import_module(_file.name)).items():
        if _name.endswith(("_forward", "_backward", "_add_")):
            globals()[_name] = _function
