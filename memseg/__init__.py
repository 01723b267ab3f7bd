"""memseg: train segmentation networks on whole large images, on the cards you own.

    memseg.profile(model, inputs, ...)      what a training step of any model would allocate
    memseg.profile_placed(...)              the same for a model over several cards

Importing this package changes nothing in the process; what these need is imported when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memseg.api import profile, profile_placed

__version__ = "0.1.0"

__all__ = ["__version__", "profile", "profile_placed"]


def __getattr__(name: str) -> Any:
    if name in ("profile", "profile_placed"):
        from memseg import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
