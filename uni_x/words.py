"""Words for people."""


def count_of(number: int, noun: str) -> str:
    """`1 picture`, `1,200 pictures`; the plural takes an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
