"""memseg: train segmentation networks on whole large images, on the cards you own.

Importing this package changes nothing in the process; each subpackage is imported when it is used.
"""

__version__ = "0.1.0"
