"""Rebuilding a module: keep what it reads, run its forward again in backward.

torch.utils.checkpoint does the second run, but leaves three things to its caller, which are done here:

- Batch norm would count the batch twice (pytorch/pytorch#96136). Our own norms hold still inside `statistics_paused`;
  torch's are lent copies of their statistics to write to. What they hold is theirs again at the end, also of a second
  run that stops early, fails, or overlaps with one in another thread.
- Inputs inside lists, dicts and tuples are neither guarded against changes nor safe from `list.append`. They are taken
  apart at the call and put together for each run anew.
- It is written into a network's forward. Here it is given by name, and taken back by name.

Source: Chen et al., arXiv:1604.06174.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from threading import Lock
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from memseg.errors import InputError, ProblemsError, UnknownNameError, suggest
from memseg.levels import Recompute
from memseg.nn.autograd import is_traced
from memseg.nn.batch_norm import BatchNorm2d, statistics_paused

Result = TypeVar("Result")


def recompute(model: nn.Module, levels: Recompute | str | Mapping[str, Recompute | str]) -> None:
    """Set how much the named modules of any model throw away in forward and rebuild in backward.

    A module of memseg's (one with `recompute` and `levels`, such as DenseBlock or what `convert` makes) is given the
    level. Any other module has two: `segment` keeps only what its forward reads and runs it again in backward, `none`
    takes that back. The model stays as it is but for this: same modules, names, state dict and hooks; copies and
    pickles keep their levels. In the second run random numbers and autocast are those of the first, and running
    statistics of batch and instance norms stand still; everything else that a forward does besides computing its
    result (printing, hooks of inner modules, power iterations of spectral norm) is done again. A module that
    overwrites its input raises InputError in forward.

    Args:
        model: Changed in place.
        levels: Names as in `named_modules`, "" being the model itself, each with its level. A name may be a pattern
            as for paths in a shell: `*`, `?` and `[...]` stand for parts of one name between dots. Where several match
            a module, the last one holds. A level alone holds for all modules of memseg's inside the model; `none`
            alone also takes back all that this function did.

    Raises:
        UnknownNameError: a name matches no module of the model, or a level is none of Recompute.
        ProblemsError: a module cannot take its level: all are named, and nothing has been changed.
        InputError: a level is given alone, and the model has no module of memseg's.

    >>> model = nn.Sequential(nn.Linear(2, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout()))
    >>> recompute(model, {"1": "segment"})
    >>> recompute(model, {"1.*": "units"})
    Traceback (most recent call last):
    memseg.errors.ProblemsError: recompute: 3 problems
      1.0: Linear takes none or segment, got units
      1.1: GELU takes none or segment, got units
      1.2: Dropout takes none or segment, got units
    >>> recompute(model, "none")
    """
    modules = dict(model.named_modules())
    chosen = _for_all(modules, levels) if isinstance(levels, str) else _by_name(modules, levels)
    refusals = {name: _refusal(modules[name], level) for name, level in chosen.items()}
    if problems := [f"{name or 'the model itself'}: {why}" for name, why in refusals.items() if why]:
        raise ProblemsError("recompute", problems)
    for name, level in chosen.items():
        _set_level(modules[name], level)


@_disable_dynamo  # torch.compiler.disable, but without importing the compiler before it is needed
def rebuild(function: Callable[..., Result], *inputs: Any, owner: nn.Module | None = None) -> Result:
    """function(*inputs), keeping only the inputs for backward, which runs the function a second time.

    Random state is restored for the second run, running statistics are left alone in it.

    Args:
        function: Returns any structure of tensors.
        inputs: Anything; tensors directly among them are guarded by autograd against changes in between.
        owner: The module that the function runs. Its parameters are guarded as inputs are; where they, or buffers, were
            lent for the first run (torch.func.functional_call), the second has them too; its torch norms count once.

    torch.compile leaves it to eager execution.

    Raises:
        InputError: the function overwrites one of its inputs, so that a second run would read something else.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    second = _SecondRun(owner)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    versions = [x._version for x in tensors]

    def run(*inputs_and_parameters: Any) -> Result:
        return function(*inputs_and_parameters[: len(inputs)])

    parameters = [] if owner is None else list(owner.parameters())
    out = checkpoint(run, *inputs, *parameters, use_reentrant=False, context_fn=lambda: (nullcontext(), second))
    if versions != [x._version for x in tensors]:
        raise InputError(
            f"what is rebuilt must leave its inputs as they are, but {type(owner or function).__name__} overwrites one "
            "in place; use inplace=False there, or rebuild it together with the module that makes this input"
        )
    return out


def parse_level(level: Recompute | str) -> Recompute:
    """A level by its name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if level not in list(Recompute):
        raise UnknownNameError("recompute level", str(level), Recompute)
    return Recompute(level)


def has_levels(module: nn.Module) -> bool:
    """Whether the module is one of memseg's that rebuild by a level of their own."""
    return hasattr(module, "recompute") and hasattr(module, "levels")


def _for_all(modules: Mapping[str, nn.Module], level: str) -> dict[str, Recompute]:
    """The level of every module of ours; `none` also of every rebuilt one."""
    level = parse_level(level)
    chosen = {name: level for name, module in modules.items() if has_levels(module)}
    if level is Recompute.NONE:
        return chosen | {name: level for name, module in modules.items() if _is_rebuilt(module)}
    if not chosen:
        raise InputError(
            f"recompute: a level alone is for modules of memseg's, and {type(modules['']).__name__} has none; name "
            "modules of its own, as in {'layer1.*': 'segment'}, or convert it first"
        )
    return chosen


def _by_name(modules: Mapping[str, nn.Module], levels: Mapping[str, Recompute | str]) -> dict[str, Recompute]:
    """The level of every module that is matched by a name."""
    chosen: dict[str, Recompute] = {}
    for pattern, level in levels.items():
        matched = [name for name in modules if _matches(name, pattern)]
        if not matched:
            near = suggest(pattern, modules)
            known = modules if near else [name for name in modules if name and "." not in name]
            raise UnknownNameError("module", pattern, known)
        chosen |= dict.fromkeys(matched, parse_level(level))
    return chosen


def _matches(name: str, pattern: str) -> bool:
    """Whether each part of a dotted name matches its part of the pattern.

    >>> _matches("layer1.0", "layer?.*"), _matches("layer1.0.conv1", "layer?.*")
    (True, False)
    """
    if not name:
        return not pattern
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _refusal(module: nn.Module, level: Recompute) -> str | None:
    """Why the module cannot take the level, if so."""
    kind = type(module).__name__
    if has_levels(module) or level is Recompute.NONE:
        return None
    if level is not Recompute.SEGMENT:
        return f"{kind} takes none or segment, got {level}"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{kind} is compiled by TorchScript, and its forward cannot be run from outside; script it later"
    if type(module).forward is nn.Module.forward and "forward" not in module.__dict__:
        return f"{kind} has no forward to run again; name its members"
    return None


def _set_level(module: nn.Module, level: Recompute) -> None:
    if has_levels(module):
        module.recompute = level  # type: ignore[assignment]
    elif level is Recompute.SEGMENT and not _is_rebuilt(module):
        module.__dict__["forward"] = _RebuiltForward(module, module.__dict__.get("forward"))
    elif level is Recompute.NONE and _is_rebuilt(module):
        plain = module.__dict__.pop("forward").plain
        if plain is not None:
            module.__dict__["forward"] = plain


def _is_rebuilt(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), _RebuiltForward)


class _RebuiltForward:
    """Stands before the forward of one module, as an attribute of the module itself.

    Args:
        module: Whose forward it is. Held weakly, so that the two form no cycle and die at once; in a copy or a pickle
            of the module it is the copy.
        plain: What stood there before, when that was not the method of the class.
    """

    def __init__(self, module: nn.Module, plain: Callable[..., Any] | None) -> None:
        self.module, self.plain = weakref.ref(module), plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = cast(nn.Module, self.module())
        plain = self.plain or partial(type(module).forward, module)
        if is_traced() or not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))

        def run(*leaves: Any) -> Any:
            # What follows the leaves only tells checkpoint whose random state matters.
            args, kwargs = tree_unflatten(leaves[: structure.num_leaves], structure)
            return plain(*args, **kwargs)

        return rebuild(run, *leaves, *_device_markers(module), owner=module)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module(), "plain": self.plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module, self.plain = weakref.ref(state["module"]), state["plain"]


def _device_markers(module: nn.Module) -> list[Tensor]:
    """An empty tensor on the module's accelerator: checkpoint keeps the random state of its inputs' devices only."""
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.device.type in ("cpu", "meta"):
        return []
    return [torch.empty(0, device=parameter.device)]


class _SecondRun(ExitStack):
    """Running statistics stand still inside, and the owner has the parameters and buffers that the first run had.

    May be entered again: a retained graph is rebuilt in every backward.
    """

    def __init__(self, owner: nn.Module | None) -> None:
        super().__init__()
        self._owner = owner
        self._had = [] if owner is None else [(held, dict(held)) for held in _holders(owner)]

    def __enter__(self) -> Self:
        self.enter_context(statistics_paused())
        for held, had in self._had:
            now = {name: value for name, value in held.items() if name in had and value is not had[name]}
            held |= {name: had[name] for name in now}
            self.callback(held.update, now)
        if self._owner is not None:
            self.enter_context(_copies_lent(self._owner))
        return self


def _holders(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Where a module and all in it hold what a forward reads: not the running statistics that only follow a batch."""
    for part in module.modules():
        yield part._parameters
        if not (part.training and isinstance(part, _NormBase)):
            yield part._buffers


_lent: dict[_NormBase, tuple[int, dict[str, Tensor | None]]] = {}
"""Of each norm that writes to copies now: how many second runs want it so, and its own buffers."""
_lent_lock = Lock()


@contextmanager
def _copies_lent(owner: nn.Module) -> Iterator[None]:
    """Inside, the torch norms of a module that follow their batches write to copies of their statistics.

    Copies, not a momentum of 0, for torch.utils.checkpoint wants the second run to save as many tensors as the first.
    What is not seen: a batch that another thread runs forward through the same norm meanwhile is not counted.
    """
    norms = [norm for norm in owner.modules() if isinstance(norm, _NormBase) and not isinstance(norm, BatchNorm2d)]
    norms = [norm for norm in norms if norm.training and norm.running_mean is not None]
    with _lent_lock:
        for norm in norms:
            count, own = _lent.get(norm, (0, dict(norm._buffers)))
            norm._buffers |= {name: buffer if buffer is None else buffer.clone() for name, buffer in own.items()}
            _lent[norm] = count + 1, own
    try:
        yield
    finally:
        with _lent_lock:
            for norm in norms:
                count, own = _lent.pop(norm)
                if count == 1:
                    norm._buffers |= own
                else:
                    _lent[norm] = count - 1, own
