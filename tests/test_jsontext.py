from __future__ import annotations

import json
import math

from jaxmoe.jsontext import json_text


def test_numbers_that_are_not_finite_are_null():
    value = {"a": math.nan, "b": [1.5, (math.inf, -math.inf)], "c": {"d": 2}, "e": "NaN"}
    assert json.loads(json_text(value)) == {"a": None, "b": [1.5, [None, None]], "c": {"d": 2}, "e": "NaN"}
    assert json_text({"a": 1.0}, indent=1) == json.dumps({"a": 1.0}, indent=1)
