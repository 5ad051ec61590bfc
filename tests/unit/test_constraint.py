"""What schemas mean as constraints: never more than they say, and a reason where they cannot be enforced."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs
import pytest
from llguidance import LLMatcher

from worker.chat.constraint import ConstraintError, bytewise, check, grammar, matcher
from worker.chat.protocol import Constraint

END = 256  # of the bytewise vocabulary
WALKS, STEPS = 60, 300
OF_SHAPE = ("date-time", "email")  # formats that are enforced but for leap seconds and lengths
WORD = {"type": "string", "maxLength": 3}

# Schemas, with texts that are and texts that are not JSON of them.
ENFORCED: list[tuple[Any, list[str], list[str]]] = [
    ({}, ["1", '{"a":[null]}'], ["{a:1}", "01", "'a'", "NaN"]),
    (True, ["1"], [""]),
    ({"type": ["string", "null"]}, ['"a"', "null"], ["1", "true"]),
    ({"type": "object"}, ["{}", '{"a":1}'], ["[]", "{ }", '{"a": 1}']),
    ({"enum": [1, "a", None, {"b": [2]}]}, ["1", '"a"', "null", '{"b":[2]}'], ["2", '{"b":[3]}']),
    ({"const": 'a"b\\c\né'}, ['"a\\"b\\\\c\\né"'], ['"a"']),
    ({"enum": [1, "a"], "type": "string"}, ['"a"'], ["1"]),
    ({"type": "integer", "minimum": -5, "maximum": 12}, ["-5", "12", "0"], ["-6", "13", "1.5"]),
    ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}, ["1", "2"], ["0", "3"]),
    ({"type": "number", "minimum": 0.5, "maximum": 1.5}, ["0.5", "1.25"], ["0.4", "1.6"]),
    ({"type": "number", "minimum": 3, "exclusiveMinimum": True}, ["4"], ["3"]),
    ({"type": "integer", "multipleOf": 3}, ["0", "9"], ["1", "10"]),
    ({"type": "number", "multipleOf": 0.1}, ["0.3", "1"], ["0.35"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"é\\n"', '"aéé"'], ['"a"', '"\\n"', '"abcd"']),
    ({"type": "string", "maxLength": 5000}, ['"a"'], ["1"]),
    ({"type": "string", "pattern": "[0-9]"}, ['"a1"'], ['"a"']),
    ({"type": "string", "pattern": "^\\d{2}$"}, ['"12"'], ['"1"', '"123"', '"٣٣"']),
    ({"type": "string", "pattern": "^a|b$"}, ['"ax"', '"xb"'], ['"xa"']),
    ({"type": "string", "pattern": "^[^a]$"}, ['"b"', '"\\n"'], ['"a"', '""']),
    ({"type": "string", "pattern": "^(a+)+$"}, ['"aaa"'], ['"b"']),
    ({"type": "string", "format": "date"}, ['"2020-02-29"'], ['"2020-02-30"', '"2020-13-01"']),
    ({"type": "string", "format": "date-time"}, ['"2020-02-29T10:00:00Z"'], ['"2020-02-29"']),
    ({"type": "string", "format": "ipv4"}, ['"1.2.3.4"'], ['"1.2.3.400"']),
    ({"type": "string", "format": "email"}, ['"a@b.de"'], ['"a"', '"@"']),
    ({"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"1"']),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, ["[1]", "[1,2]"], ["[]", '["a"]']),
    ({"type": "array", "prefixItems": [WORD], "items": False}, ["[]", '["a"]'], ["[1]", '["a","b"]']),
    ({"type": "array", "items": [WORD], "additionalItems": False}, ["[]", '["a"]'], ["[1]", '["a","b"]']),
    (
        {"type": "object", "properties": {"a": WORD, "b": {"type": "integer"}}, "required": ["b"]},
        ['{"b":1}', '{"a":"x","b":1}', '{"b":1,"c":null}'],
        ["{}", '{"b":"x"}', '{"a":1,"b":1}', '{"b":1,"a":5}', '{"b":1,"\\u0061":5}'],
    ),
    ({"type": "object", "additionalProperties": False}, ["{}"], ['{"a":1}']),
    ({"type": "object", "additionalProperties": WORD}, ['{"x":"a"}'], ['{"x":1}']),
    ({"type": "object", "properties": {'a"b': WORD}, "required": ['a"b']}, ['{"a\\"b":"x"}'], ["{}"]),
    ({"type": "object", "properties": {"a": False}}, ["{}"], ['{"a":1}']),
    ({"type": "object", "required": ["a"]}, ['{"a":1}'], ["{}"]),
    ({"type": "object", "maxProperties": 1}, ["{}", '{"a":1}'], ['{"a":1,"b":2}']),
    ({"type": "object", "patternProperties": {"^a": WORD}, "additionalProperties": False}, ['{"ab":"x"}'], ['{"b":1}']),
    ({"properties": {"a": {"type": "integer"}}}, ['{"a":1}', "3"], ['{"a":"x"}']),
    ({"anyOf": [{"type": "integer"}, WORD]}, ["1", '"a"'], ["true"]),
    ({"oneOf": [{"type": "integer"}, WORD]}, ["1", '"a"'], ["true"]),
    ({"allOf": [{"type": "integer"}, {"minimum": 3}, {"multipleOf": 2}]}, ["4"], ["2", "5"]),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, ["1"], ['"a"']),
    ({"$ref": "#/definitions/a", "minimum": 3, "definitions": {"a": {"type": "integer"}}}, ["3"], ["2"]),
    ({"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}, ['{"next":{}}'], ["1"]),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "const": 3}, ["3"], ["4"]),
    ({"type": "object", "properties": {"$schema": WORD, "not": WORD}, "required": ["not"]}, ['{"not":"a"}'], ["{}"]),
    ({"type": "object", "x-guidance": {"whitespace_flexible": True, "lenient": True}}, ["{}"], ["{ }"]),
    ({"type": "integer", "title": "t", "default": 1, "examples": [2], "x-order": 1, "nullable": True}, ["1"], ["null"]),
    ({"enum": [f"value {i}" for i in range(20_000)]}, ['"value 19999"'], ['"value 20000"']),
]

REFUSED: list[tuple[Any, str]] = [
    (False, "no JSON"),
    (5, "must be an object"),
    ({"type": "text"}, "text"),
    ({"enum": []}, "anyOf is empty"),
    ({"type": "integer", "minimum": 3, "maximum": 1}, "greater than"),
    ({"allOf": [{"type": "integer"}, WORD]}, "incompatible types"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "required"),
    ({"$ref": "#"}, "no text satisfies"),
    ({"$ref": "https://example.com/a.json"}, "example.com"),
    ({"$ref": "#/$defs/missing"}, "missing"),
    ({"not": {}}, "not"),
    ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": {"type": "integer"}}, "contains"),
    ({"type": "array", "prefixItems": [{}], "unevaluatedItems": False}, "unevaluatedItems"),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
    ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
    ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"$dynamicRef": "#x"}, "dynamicRef"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"type": "string", "pattern": "^(?=a)"}, "look-around"),
    ({"type": "string", "pattern": "\\bfoo"}, "lookaround"),
    ({"type": "string", "pattern": "(a)\\1"}, "backreferences"),
    ({"type": "string", "pattern": "("}, "regex"),
    ({"type": "string", "format": "phone"}, "phone"),
    ({"type": "integer", "format": "int32"}, "int32"),
    ({"type": "string", "contentEncoding": "base64"}, "contentEncoding"),
    ({"type": "integer", "minimum": 2**53 + 1}, "integers beyond"),
    ({"const": [2**60]}, "integers beyond"),
    ({"enum": ["a", {"b\x01": 1}]}, "control characters"),
    ({"properties": {"a": {"$schema": "http://json-schema.org/draft-04/schema#", "contains": {}}}}, "contains"),
    ({"$ref": "#/x/y", "x": {"y": {"contentEncoding": "base64"}}}, "contentEncoding"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
]


def constraint(schema: Any) -> Constraint:
    return Constraint(kind="json_schema", text=json.dumps(schema))


def compiled(schema: Any) -> LLMatcher:
    return matcher(grammar(constraint(schema)), bytewise())


def accepts(schema: Any, text: str) -> bool:
    state, data = compiled(schema), [*text.encode()]
    return state.try_consume_tokens(data) == len(data) and state.is_accepting()


@pytest.mark.parametrize(("schema", "right", "wrong"), ENFORCED, ids=[json.dumps(case[0])[:70] for case in ENFORCED])
def test_a_schema_means_what_it_says(schema: Any, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right if not accepts(schema, text)] == []
    assert [text for text in wrong if accepts(schema, text)] == []


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=[json.dumps(case[0])[:70] for case in REFUSED])
def test_what_cannot_be_enforced_is_an_error_with_a_reason(schema: Any, reason: str) -> None:
    with pytest.raises(ConstraintError, match=reason):
        check(constraint(schema))


@pytest.mark.parametrize("schema", [case[0] for case in ENFORCED], ids=[json.dumps(case[0])[:70] for case in ENFORCED])
def test_whatever_is_sampled_is_valid(schema: Any) -> None:
    chance = random.Random(0)
    plain = {key: value for key, value in schema.items() if key != "$schema"} if isinstance(schema, dict) else schema
    if isinstance(plain, dict) and plain.get("exclusiveMinimum") is True:  # of an old version
        plain = {"type": "number", "exclusiveMinimum": 3}
    if isinstance(plain, dict) and isinstance(plain.get("items"), list):
        plain = {"type": "array", "prefixItems": plain["items"], "items": plain["additionalItems"]}
    of_shape = isinstance(plain, dict) and plain.get("format") in OF_SHAPE
    validator = jsonschema_rs.Draft202012Validator(plain, validate_formats=not of_shape)
    start = compiled(schema)
    texts = [text for _ in range(WALKS) if (text := walk(start.deep_copy(), chance)) is not None]
    assert [text for text in texts if not validator.is_valid(json.loads(text))] == []


def walk(state: LLMatcher, chance: random.Random) -> str | None:
    """Return a text of a constraint, or None if it becomes long."""
    data = bytearray()
    for _ in range(STEPS):
        if state.is_stopped():
            return data.decode()
        mask = int.from_bytes(state.compute_bitmask(), "little")
        allowed = [token for token in range(END + 1) if mask >> token & 1]
        assert allowed
        token = END if END in allowed and chance.random() < 0.3 else chance.choice(allowed)
        if token == END:
            return data.decode()
        assert state.consume_token(token)
        data.append(token)
    return None


def test_an_object_may_have_thousands_of_optional_properties() -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(2000)}}
    assert accepts(schema, '{"p7":true,"p1999":false}')
    assert not accepts(schema, '{"p7":5}')
