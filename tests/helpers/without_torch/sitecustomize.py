"""Run by Python where it starts with this folder on its path: torch cannot be found from there on.

transformers imports it wherever it is installed, which takes a process 4 seconds for nothing.
"""

import importlib.machinery
import sys


class WithoutTorch(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "torch" else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = WithoutTorch
