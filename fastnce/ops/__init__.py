"""The ops: each is declared, checked, differentiated and written in plain PyTorch in a file of its own.

Every file of this folder is imported, and every public op that it declares is a function here.
"""

import importlib
import pkgutil

from fastnce.registry import OPS

for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_file.name)
__all__ = [name for name, op in OPS.items() if op.function is not None]
globals().update({name: OPS[name].function for name in __all__})
