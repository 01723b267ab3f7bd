"""memseg: train segmentation networks on whole large images, on the cards you own.

    memseg.profile(model, inputs, ...)      what a training step of any model would allocate
    memseg.profile_placed(...)              the same for a model over several cards

Importing this package changes nothing in the process and loads nothing else; what these functions need is imported when
they are first asked for.
"""

TYPE_CHECKING = False
"""As typing has it, without importing that; type checkers take it for true."""

if TYPE_CHECKING:
    from memseg.api import profile, profile_placed

__version__ = "0.1.0"

__all__ = ["__version__", "profile", "profile_placed"]


def __getattr__(name: str) -> object:
    if name in ("profile", "profile_placed"):
        from memseg import api

        function: object = getattr(api, name)
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
