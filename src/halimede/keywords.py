"""Unknown keywords are errors that name the closest known one."""

import difflib
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Self

from halimede.errors import ConfigError


def check_keywords(given: Iterable[str], known: Collection[str], owner: str) -> None:
    """Raise ConfigError for the first of `given` that is not in `known`, naming the closest one."""
    for keyword in given:
        if keyword in known:
            continue
        close = difflib.get_close_matches(keyword, known, n=1, cutoff=0.5)
        remedy = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
        raise ConfigError(f"{owner} has no option {keyword!r}; {remedy}")


class KeywordChecked:
    """Base of a dataclass whose constructor answers an unknown keyword with the closest known one."""

    __slots__ = ()

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Any]]
    else:

        def __new__(cls, *args: Any, **kwargs: Any) -> Self:
            """Check the keywords before the dataclass's own constructor sees them."""
            check_keywords(kwargs, cls.__dataclass_fields__, cls.__name__)
            return super().__new__(cls)
