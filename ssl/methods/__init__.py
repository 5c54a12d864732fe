"""One file a method. The file's name is the method's name on the command line.

A method file holds a docstring (what it computes, from which paper), a frozen dataclass
`Config`, whose fields become command-line options (type, default, metadata help), and

    class Method(nn.Module):
        __init__(features: int, config: Config)         features: F, the backbone's width
        forward(ha, hb) -> (loss, terms)                ha, hb: (B, F) features of two views;
                                                        loss: (); terms: detached, for the log
        after_step(step: int, num_steps: int) -> None   state across steps: teacher, queue

Nothing else in the project names the method.
"""

import importlib
import pkgutil
from types import ModuleType

from sslus.engine.errors import InputError


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    if name not in names():
        raise InputError(f"no method {name!r}; there are: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
