"""Opens a file as bytes or text. The content shows the compression, and the encoding unless that is set."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TextIO

import pyarrow as pa

from mrd_ray.errors import UserError
from mrd_ray.runs import storage

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
Say = Callable[[str], None]  # receives notices for people about how a source is read
_CHUNK = 1 << 20
_BEGIN = 64  # bytes that identify a compressed file or a Git LFS pointer
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_BOMS |= {
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # after UTF-32, which begins alike
OF_WINDOWS = "cp1252"


def _zstd(file: BinaryIO) -> BinaryIO:
    opened: BinaryIO = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
    return opened


_MAGIC: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\x28\xb5\x2f\xfd": _zstd,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns every exception while the file is read into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except OSError as problem:
        raise UserError(f"data.path: cannot read {path}: {problem.strerror or problem}") from problem
    except Exception as problem:  # file systems, compressions and formats all have their own exceptions
        raise UserError(f"data.path: cannot read {path}: {problem}") from problem


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """The decompressed content of the file. Raises UserError; callers read from it within `reading`."""
    with contextlib.ExitStack() as stack:
        with reading(path):
            file = stack.enter_context(storage.open_file(path))
            start = file.read(_BEGIN)
            file.seek(0)
            storage.refuse_lfs_pointer("data.path", path, start)
            for magic, opener in _MAGIC.items():
                if start.startswith(magic):
                    file = stack.enter_context(opener(file))
        yield file


@contextlib.contextmanager
def open_text(path: str, encoding: str | None, guess: bool, say: Say) -> Iterator[TextIO]:
    """The file's content as text; newlines are not translated.

    Args:
        encoding: as configured, or None to detect it from the content.
        guess: whether a file that is not Unicode may be in cp1252, the encoding of Windows for western languages.
        say: receives a notice if it is.
    """
    if encoding is None:
        encoding = _encoding(path, guess)
        if encoding == OF_WINDOWS:
            say(f"{path} is not UTF-8; read as {OF_WINDOWS} (data.encoding sets another)")
    elif encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        encoding = "utf-8-sig"
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding=encoding, newline="")
        try:
            yield text
        finally:
            text.detach()  # open_bytes closes the file


def _encoding(path: str, guess: bool) -> str:
    with open_bytes(path) as file, reading(path):
        start = file.read(4)
        for mark, encoding in _BOMS.items():
            if start.startswith(mark):
                return encoding
        if b"\0" in start[:2]:  # an ASCII character in two bytes, as a header or JSON begins
            return "utf-16-be" if start[:1] == b"\0" else "utf-16-le"
        return "utf-8" if not guess or _is_utf8(path, start, file) else OF_WINDOWS


_CONTROL = re.compile("[\x00-\x08]")  # never in text: high bytes of UTF-16, or binary data


def _is_utf8(path: str, start: bytes, file: BinaryIO) -> bool:
    """Whether the whole file is UTF-8. Raises UserError if only parts are: no encoding would fit all of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # bytes that are not UTF-8 become \udc80..\udcff
    lines, bad_line, of_unicode = 1, 0, False
    chunk = start
    while chunk:
        text = decoder.decode(chunk)
        if bad := _CONTROL.search(text):
            raise UserError(
                f"{path}, line {lines + text.count(chr(10), 0, bad.start())}: holds control characters; set "
                "data.encoding to the file's encoding, for example utf-16-le"
            )
        if not text.isascii():
            of_unicode = of_unicode or re.search("[^\x00-\x7f\udc80-\udcff]", text) is not None
            if not bad_line and (bad := re.search("[\udc80-\udcff]", text)):
                bad_line = lines + text.count("\n", 0, bad.start())
        lines += text.count("\n")
        chunk = file.read(_CHUNK)
    if decoder.decode(b"", True):  # cut off within a character
        bad_line = bad_line or lines
    if bad_line and of_unicode:
        raise UserError(
            f"{path}, line {bad_line}: not UTF-8, though other parts of the file are; fix that line, or set "
            "data.encoding"
        )
    return not bad_line
