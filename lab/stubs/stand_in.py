"""Stand-ins for packages that SGLang imports by name and a CPU never calls. TEST USE ONLY."""

import importlib.abc
import importlib.machinery
import sys
import types


class StandIn(types.ModuleType):
    """A module in which every name exists: classes for capitalised ones, modules for others."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            base = Exception if name.endswith(("Error", "Resources")) else Permissive
            value = type(name, (base,), {})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args, **kwargs):
        """As a decorator, with or without arguments: leave the function alone."""
        return args[0] if len(args) == 1 and callable(args[0]) else self


class Permissive:
    """Takes any arguments; any name of it is the name itself."""

    def __init__(self, *args, **kwargs):
        pass

    def __init_subclass__(cls, **kwargs):
        pass


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, root):
        self.root = root

    def find_spec(self, name, path=None, target=None):
        if name.startswith(f"{self.root}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


def stand_in(root, **names):
    """Turn the package `root`, now being imported, into a stand-in with some real `names`."""
    sys.meta_path.insert(0, Finder(root))
    module = sys.modules[root]
    module.__class__ = StandIn
    vars(module).update(names)
