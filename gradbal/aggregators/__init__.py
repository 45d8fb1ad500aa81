"""One file a method: a pure function, and a class that holds hyperparameters and state.

Every module in this folder is imported here, so a method is registered by its file alone.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
