"""Imports this repository as the package `layerstream`, whatever its folder is called.

ComfyUI imports a custom node pack by its path, so the pack's modules use relative imports and the folder may carry
any name, dashes included. Tests, benchmarks and scripts need one fixed name instead. The repository root never has to
be on `sys.path` for that, which matters: its `nodes/` would shadow ComfyUI's top-level `nodes` module there.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
"""The root of this repository."""


def load_pack(name: str = "layerstream") -> ModuleType:
    """Import the repository root as package `name` and return it; a second call returns the same module.

    Registers the package in `sys.modules`, so that `import layerstream.streaming.engine.plan` works afterwards.

    Raises:
        ImportError: the root has no `__init__.py`, or `name` already belongs to another package.
    """
    entry = ROOT / "__init__.py"
    loaded = sys.modules.get(name)
    if loaded is not None:
        if loaded.__file__ is None or Path(loaded.__file__).resolve() != entry:
            raise ImportError(f"`{name}` is already imported from {loaded.__file__}: uninstall it or pass another name")
        return loaded
    if not entry.is_file():
        raise ImportError(f"{entry} is missing: the repository root must be the pack's package")
    specification = importlib.util.spec_from_file_location(name, entry, submodule_search_locations=[str(ROOT)])
    assert specification is not None and specification.loader is not None
    package = importlib.util.module_from_spec(specification)
    sys.modules[name] = package
    try:
        specification.loader.exec_module(package)
    except BaseException:
        # A half-imported package would make the next import succeed with missing names.
        del sys.modules[name]
        raise
    return package
