"""Reading a config.json strictly: every key is used, known to be harmless, or an error that names it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxmoe.config import canonical_dtype
from jaxmoe.errors import ConfigError
from jaxmoe.families.known_keys import is_harmless, is_usual

REQUIRED = object()  # in place of a default
_AS_NULL = object()
MAX_WHOLE = 2**31 - 1
MAX_LAYERS = 10_000
MAX_HEADS = _MAX_EXPERTS = 10_000
MAX_SHOWN = 10  # keys that an error names; of more it says how many


def is_finite(value: Any) -> bool:
    """Tell whether a value is a number that a float can hold; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def shown(value: Any, limit: int = 60) -> str:
    """Return a value of a config.json for an error or a note: on one line, without control characters, cut at a
    limit of characters, and null as the file has it."""
    if value is None:
        return "null"
    try:
        return f"{value!r:.{limit}}"
    except ValueError:  # Python converts no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def shown_settings(settings: Mapping[Any, Any]) -> str:
    """Return "'key' = value" of the first settings and how many more there are."""
    first = ", ".join(f"{shown(key)} = {shown(value)}" for key, value in list(settings.items())[:MAX_SHOWN])
    return first + and_more(len(settings))


def and_more(count: int) -> str:
    """Return how many of count items are not among the first MAX_SHOWN, as the end of a list of these."""
    return f" and {count - MAX_SHOWN:,} more" if count > MAX_SHOWN else ""


def only_supported(key: str, value: Any, choices: str) -> str:
    """Return the message for a value that the computation here does not implement."""
    return (
        f"config key {key!r} = {shown(value)} changes the maths and only {choices} is supported: use a model that has "
        f"it, or correct config.json where the value is a mistake"
    )


class ConfigReader:
    """Hands out the values of one config.json and remembers which were asked for."""

    def __init__(self, raw: Mapping[str, Any], *, ignore: Iterable[str] = (), lenient: bool = False) -> None:
        """lenient: a setting that is not supported, and changes no shape, is listed in `passed_over` in place of an
        error."""
        self._raw = dict(raw)
        self._used = set(ignore)
        self._lenient = lenient
        self.passed_over: dict[str, Any] = {}

    def inside(self, raw: Mapping[str, Any]) -> ConfigReader:
        """Return a reader of an object within the file, as lenient as this one, that lists in the same place."""
        inner = ConfigReader(raw, lenient=self._lenient)
        inner.passed_over = self.passed_over
        return inner

    def stated(self, key: str) -> Any:
        """Return the value of a key as the file has it; None where it is null or absent."""
        return self._raw.get(key)

    def get(self, key: str, default: Any = REQUIRED, *, absent: Any = _AS_NULL) -> Any:
        """The value of key; default where it is null. absent: what a file without the key means, by default the same.

        Raises: ConfigError where it is required and not there.
        """
        self._used.add(key)
        value = self._raw.get(key)
        if value is None:
            default = default if absent is _AS_NULL or key in self._raw else absent
            if default is REQUIRED:
                raise ConfigError(f"config.json has no {key!r}, which this family needs: add it")
            return default
        return value

    def whole(
        self, key: str, default: Any = REQUIRED, *, absent: Any = _AS_NULL, within: tuple[int, int] | None = None
    ) -> Any:
        """A whole number (or the default), within limits. absent: see get."""
        value = self.get(key, default, absent=absent)
        if value is default or value is absent:
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"config key {key!r} = {shown(value)} must be a whole number")
        if abs(value) > MAX_WHOLE:
            raise ConfigError(f"config key {key!r} = {shown(value, 20)}... must lie within +-{MAX_WHOLE}")
        if within is not None and not within[0] <= value <= within[1]:
            raise ConfigError(f"config key {key!r} = {value} must lie in [{within[0]}, {within[1]}]")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A finite number (or the default)."""
        value = self.get(key, default)
        if value is default:
            return value
        if not is_finite(value):
            raise ConfigError(f"config key {key!r} = {shown(value)} must be a finite number")
        return float(value)

    def flag(self, key: str, default: Any = False) -> bool:
        """True or false (or the default)."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config key {key!r} = {shown(value)} must be true or false")
        return value

    def expect(self, key: str, *allowed: Any, sized: bool = False) -> None:
        """Insist on one of the values the family implements. sized: whether shapes depend on the key, so that a lenient
        reader raises, too. Raises ConfigError naming key, value, choices and remedy."""
        value = self.get(key, None)
        if value is None or value in allowed:
            return
        message = only_supported(key, value, " or ".join(repr(a) for a in allowed))
        if sized:
            raise ConfigError(message)
        self.unsupported(key, value, message)

    def unsupported(self, key: str, value: Any, message: str) -> None:
        """Raise a ConfigError with a message, unless the reader is lenient. value: the part of key's that is meant."""
        if not self._lenient:
            raise ConfigError(message)
        self.passed_over[key] = value

    def unknown(self) -> dict[str, Any]:
        """Return the keys that nobody asked for, with values that say more than what any family does anyway."""
        return {
            key: value
            for key, value in sorted(self._raw.items(), key=lambda item: str(item[0]))
            if key not in self._used and not is_harmless(key) and not is_usual(key, value)
        }

    def finish(self, where: str, remedy: str) -> None:
        """Raise ConfigError for any key nobody asked for that could change the maths. where: whose keys these are."""
        if unknown := self.unknown():
            raise ConfigError(
                f"config.json {where} has keys that may change the maths and are not supported: "
                f"{shown_settings(unknown)}; {remedy}"
            )


def read_dtype(reader: ConfigReader) -> str:
    """The dtype the checkpoint was published in ("bfloat16" when it does not say)."""
    key = "torch_dtype" if reader.get("dtype", None) is None else "dtype"  # of both the newer, as transformers does
    dtype = canonical_dtype(str(reader.get(key, "bfloat16")))
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"config key {key!r} = {shown(dtype)} must be bfloat16, float16 or float32")
    return dtype


def read_agreed(reader: ConfigReader, what: str, *keys: str, **how: Any) -> Any:
    """A whole number under whichever of the keys the file uses; they must agree. how: of ConfigReader.whole."""
    used = [key for key in keys if reader.get(key, None) is not None] or keys[:1]
    counts = {key: reader.whole(key, **how) for key in used}
    if len(set(counts.values())) != 1:
        raise ConfigError(f"config.json gives different numbers of {what}: {counts}; keep one")
    return counts[used[0]]


def read_num_experts(reader: ConfigReader, *keys: str) -> int:
    """How many experts there are, as read_agreed."""
    return read_agreed(reader, "experts", *keys, within=(1, _MAX_EXPERTS))
