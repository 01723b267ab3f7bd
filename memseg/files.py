"""Files that are whole or not there, whatever ends the process that writes them."""

import os
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file so that at every moment either the old or the new one is there, whole: a synced copy, renamed.

    Behind a link it is the file that is replaced; what is no file, such as /dev/stdout, is written to as it is.

    Args:
        path: Of the file; its folder exists.
        content: Text is written as UTF-8.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file is as it was.
    """
    asked, path = path, path.resolve()
    written = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(written)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(written)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(asked)) from None
    finally:
        temporary.unlink(missing_ok=True)
