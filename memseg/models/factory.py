"""Models that are not ours, by the address of what makes them: package.module:function or path/file.py:function.

Constructors copy layers, convert them and read values, which fake tensors refuse and the meta device cannot give. So
where tensors are to be empty, a model is made on the meta device, or for real where it cannot be, and then copied with
empty tensors.
"""

import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from memseg.errors import InputError, MemsegError, UnknownNameError

Module = TypeVar("Module", bound=nn.Module)

_WEIGHTS = ("weights", "weights_backbone")
"""Parameters of torchvision's factories that would fetch a file."""


def load_address(address: str) -> Callable[..., Any]:
    """The function at MODULE:FUNCTION or file.py:FUNCTION; modules are looked for in the current folder too.

    Raises:
        InputError: there is no such module or function, or importing the module fails.
    """
    where, _, name = address.rpartition(":")
    if not where or not name:
        raise InputError(f"an address must be MODULE:FUNCTION or file.py:FUNCTION, got {address!r}; try nets.py:build")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    except MemsegError:
        raise
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{address}: importing {where} fails with {type(error).__name__}: {message}") from error
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UnknownNameError(f"function of {where}", name, known)
    function: Callable[..., Any] = found
    return function


def _import_module(name: str) -> Any:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such file; a model of your own is file.py:FUNCTION or package.module:FUNCTION")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Modules beside it are found, as when it is run; of its own name nothing is hidden.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def make_module(address: str, *, num_classes: int) -> nn.Module:
    """What the factory at an address makes, on the default device, and fake under a fake mode.

    Args:
        address: As for `load_address`. The factory is given `num_classes`, where it takes it, and torchvision's
            `weights` and `weights_backbone` as None.
        num_classes: Channels of the logits.

    Raises:
        InputError: there is no such factory, it fails, or it makes no module.
    """
    factory = load_address(address)
    arguments = _arguments(factory, num_classes)

    def make() -> nn.Module:
        made = factory(**arguments)
        if not isinstance(made, nn.Module):
            raise InputError(f"{address} must make a torch.nn.Module, got {type(made).__name__}")
        return made

    try:
        return _on_default_device(make)
    except MemsegError:
        raise
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise InputError(
            f"{address}, which should make the model, fails with {type(error).__name__}: "
            f"{' '.join(str(error).split())}; it is called with ({given})"
        ) from error


def _arguments(factory: Callable[..., Any], num_classes: int) -> dict[str, Any]:
    """Those of what memseg can give that the factory takes."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    if getattr(factory, "__init__", None) is nn.Module.__init__:
        return {}  # A module class without a constructor of its own: that of nn.Module takes nothing.
    arguments: dict[str, Any] = {name: None for name in _WEIGHTS if name in parameters}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if "num_classes" in parameters or takes_any:
        arguments["num_classes"] = num_classes
    return arguments


def _on_default_device(make: Callable[[], nn.Module]) -> nn.Module:
    device = torch.get_default_device()
    if _get_current_dispatch_mode() is None and device.type != "meta":
        return make()
    with unset_fake_temporarily():
        made = None
        with suppress(Exception, SystemExit), torch.device("meta"):
            made = make()
        if made is None:
            with torch.device("cpu"):
                made = make()
    return empty_copy(made)


def empty_copy(module: Module) -> Module:
    """A copy whose tensors have the same shapes, strides and types and no values: on the default device, fake under a
    fake mode. Tied tensors are tied as before.

    Raises:
        InputError: a parameter has no shape yet (a lazy module), or the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors_of(module):
        if nn.parameter.is_lazy(tensor):
            raise InputError("lazy modules have no shapes before their first batch; run one through the model first")
        if id(tensor) not in memo:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{type(module).__name__} cannot be copied ({error})") from error


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that modules hold as plain attributes."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from (leaf for leaf in tree_leaves(list(vars(part).values())) if isinstance(leaf, Tensor))
