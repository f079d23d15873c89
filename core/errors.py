"""One way to tell people what is wrong with their input."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message always names the thing (`what`), and where they apply what was found, what was expected
    and the remedy. Command lines print it without a traceback and exit with status 2.

    Example:
        `InputError("width of photo.png", found=0, expected="at least 1 pixel", remedy="Export the picture again.")`
        reads "width of photo.png: found 0, expected at least 1 pixel. Export the picture again."
    """

    def __init__(self, what: str, *, found: object = None, expected: object = None, remedy: str | None = None):
        details = [
            f"found {found}" if found is not None else "",
            f"expected {expected}" if expected is not None else "",
        ]
        details = ", ".join(d for d in details if d)
        message = f"{what}: {details}." if details else f"{what}."
        super().__init__(f"{message} {remedy}" if remedy else message)


def check_one_of(what: str, value: str, options: tuple[str, ...]) -> None:
    """Raise InputError where `value` is none of the options."""
    if value not in options:
        raise InputError(what, found=repr(value), expected=f"one of {', '.join(options)}")


def check_share(what: str, value: float) -> None:
    """Raise InputError where `value` is not in 0..1 (nan is not)."""
    if not 0 <= value <= 1:
        raise InputError(what, found=value, expected="a share from 0 to 1")
