"""What a result was made with."""

import contextlib
import importlib.metadata
import platform


def versions() -> dict[str, str]:
    names = ("sslus", "torch", "torchvision", "timm", "numpy", "scikit-learn")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
