"""Bytes of others as text."""

from uni_x.errors import DataError


def decode_utf8(content: bytes, where: str = "") -> str:
    """The text, without a byte order mark. Raises `DataError`, which says `where`, for what is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where and f'{where}: '}{utf8_fault(error)}") from None


def utf8_fault(error: UnicodeDecodeError) -> str:
    """What is wrong with the bytes, in words."""
    return f"not valid UTF-8 (byte {error.start + 1})"
