"""Strict reader of config.json: every key is used, known to be harmless, or reported as an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxmoe.checks import is_finite
from jaxmoe.config import canonical_dtype
from jaxmoe.errors import ConfigError
from jaxmoe.families.known_keys import is_harmless, is_usual

REQUIRED = object()  # marks a key without a default
_AS_NULL = object()
MAX_WHOLE = 2**31 - 1
MAX_NUMBER = 1e300  # of numbers in a config.json
MAX_LAYERS = 10_000
MAX_HEADS = _MAX_EXPERTS = 10_000
MAX_SHOWN = 10  # keys that an error lists; it counts the others


def shown(value: Any, limit: int = 60) -> str:
    """Return a config value as text for a message: one line, no control characters, at most `limit` characters.

    null is written as in the file.
    """
    if value is None:
        return "null"
    try:
        return f"{value!r:.{limit}}"
    except ValueError:  # Python does not format integers of more than 4,300 digits
        return "a number of thousands of digits"


def shown_settings(settings: Mapping[Any, Any]) -> str:
    """Return "'key' = value" of the first settings and the number of the others."""
    first = ", ".join(f"{shown(key)} = {shown(value)}" for key, value in list(settings.items())[:MAX_SHOWN])
    return first + and_more(len(settings))


def and_more(count: int) -> str:
    """Return " and N more" for the items beyond the first MAX_SHOWN, or an empty string."""
    return f" and {count - MAX_SHOWN:,} more" if count > MAX_SHOWN else ""


def only_supported(key: str, value: Any, choices: str) -> str:
    """Return the message for a value that this package does not implement."""
    return (
        f"config key {key!r} = {shown(value)} changes the computation and only {choices} is supported: use a model "
        f"that has it, or correct config.json where the value is a mistake"
    )


class ConfigReader:
    """Read the values of one config.json and record which keys were used."""

    def __init__(self, raw: Mapping[str, Any], *, ignore: Iterable[str] = (), lenient: bool = False) -> None:
        """Create a reader.

        ignore: keys to treat as used. lenient: whether to record an unsupported setting in `passed_over` instead of
        raising an error, if it changes no shape.
        """
        self._raw = dict(raw)
        self._used = set(ignore)
        self._lenient = lenient
        self.passed_over: dict[str, Any] = {}

    def inside(self, raw: Mapping[str, Any]) -> ConfigReader:
        """Return a reader of an object within the file, with the same leniency and the same `passed_over`."""
        inner = ConfigReader(raw, lenient=self._lenient)
        inner.passed_over = self.passed_over
        return inner

    def stated(self, key: str) -> Any:
        """Return the value of a key as the file has it, or None if it is null or absent."""
        return self._raw.get(key)

    def get(self, key: str, default: Any = REQUIRED, *, absent: Any = _AS_NULL) -> Any:
        """Return the value of key, or default if it is null.

        absent: the value if the file lacks the key; default if not given. Raises: ConfigError if a required key has no
        value.
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
        """Return a whole number within limits, or the default. absent: see get."""
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
        """Return a finite number, or the default."""
        value = self.get(key, default)
        if value is default:
            return value
        if not is_finite(value, below=MAX_NUMBER):
            raise ConfigError(f"config key {key!r} = {shown(value)} must be a finite number")
        return float(value)

    def flag(self, key: str, default: Any = False) -> bool:
        """Return true or false, or the default."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config key {key!r} = {shown(value)} must be true or false")
        return value

    def expect(self, key: str, *allowed: Any, sized: bool = False) -> None:
        """Check that a key has one of the values that the family implements; null or absent is accepted.

        sized: whether shapes depend on the key, so that a lenient reader raises an error, too. Raises: ConfigError with
        the key, its value, the choices and the remedy.
        """
        value = self.get(key, None)
        if value is None or value in allowed:
            return
        message = only_supported(key, value, " or ".join(repr(a) for a in allowed))
        if sized:
            raise ConfigError(message)
        self.unsupported(key, value, message)

    def unsupported(self, key: str, value: Any, message: str) -> None:
        """Raise ConfigError with the message; a lenient reader records the key instead.

        value: the unsupported part of the key's value.
        """
        if not self._lenient:
            raise ConfigError(message)
        self.passed_over[key] = value

    def unknown(self) -> dict[str, Any]:
        """Return the unused keys that are not harmless and do not have a usual value."""
        return {
            key: value
            for key, value in sorted(self._raw.items(), key=lambda item: str(item[0]))
            if key not in self._used and not is_harmless(key) and not is_usual(key, value)
        }

    def finish(self, where: str, remedy: str) -> None:
        """Raise ConfigError for unused keys that may change the computation. where: the owner of the keys."""
        if unknown := self.unknown():
            raise ConfigError(
                f"config.json {where} has keys that may change the computation and are not supported: "
                f"{shown_settings(unknown)}; {remedy}"
            )


def read_dtype(reader: ConfigReader) -> str:
    """Return the dtype in which the checkpoint was published, bfloat16 by default."""
    key = "torch_dtype" if reader.get("dtype", None) is None else "dtype"  # dtype takes precedence, as in transformers
    dtype = canonical_dtype(str(reader.get(key, "bfloat16")))
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"config key {key!r} = {shown(dtype)} must be bfloat16, float16 or float32")
    return dtype


def read_agreed(reader: ConfigReader, what: str, *keys: str, **how: Any) -> Any:
    """Return a whole number that the file gives under one or more of the keys, which must agree.

    how: arguments of ConfigReader.whole.
    """
    used = [key for key in keys if reader.get(key, None) is not None] or keys[:1]
    counts = {key: reader.whole(key, **how) for key in used}
    if len(set(counts.values())) != 1:
        raise ConfigError(f"config.json gives different numbers of {what}: {counts}; keep one")
    return counts[used[0]]


def read_num_experts(reader: ConfigReader, *keys: str) -> int:
    """Return the number of experts; see read_agreed."""
    return read_agreed(reader, "experts", *keys, within=(1, _MAX_EXPERTS))
