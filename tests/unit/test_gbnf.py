"""Translation of GBNF: the texts that llguidance accepts are those that the grammar describes."""

from __future__ import annotations

import pytest
from llguidance import LLMatcher

from worker.chat.constraint import bytewise, matcher
from worker.chat.gbnf import GbnfError, to_lark


def accepts(grammar: str, text: str) -> bool:
    compiled = matcher(LLMatcher.grammar_from_lark(to_lark(grammar, {})), bytewise())
    data = [*text.encode()]
    return compiled.try_consume_tokens(data) == len(data) and compiled.is_accepting()


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        ('root ::= [a-z]+ "a"', ["aa", "ba", "aaa"], ["a", "ab"]),
        ('root ::= ("a" "b" | "ab" "c") "d"?', ["ab", "abd", "abc", "abcd"], ["a", "abb"]),
        ('root ::= "" | x\nx ::= "b" x | "b"', ["", "b", "bbb"], ["a"]),
        ('root ::= [^"\\\\\\n]{2}', ["éa", "\t'"], ['"a', "\\a", "\na", "a", "aaa"]),
        (r'root ::= "\x41\u00e9\U0001f600\t\"\\"', ['Aé\U0001f600\t"\\'], ["A"]),
        ("root ::= [a\\]b-]+", ["]-ab"], ["c", "\\\\"]),
        ('root ::= "a"{2} "b"{1,} "c"{0,2}', ["aab", "aabbcc"], ["aa"]),
        ('root ::= ( # a comment\n  "a" |\n  "b"\n)* .', ["x", "ab\n"], ["", "\0"]),
        ("root ::= x y # one\n\nx-1 ::= [0-9]\nx ::= x-1\ny ::= x-1 | x", ["12"], ["1"]),
        ('root ::= ("a"*)* ("b"?)+', ["", "aab"], ["ba"]),
    ],
)
def test_a_grammar_describes_the_same_texts(grammar: str, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right if not accepts(grammar, text)] == []
    assert [text for text in wrong if accepts(grammar, text)] == []


def test_a_control_token_stands_for_its_text() -> None:
    assert "<[7]>" in to_lark('root ::= "x<call>"', {"<call>": 7})
    assert to_lark("root ::= <[7]> <call>", {"<call>": 7}).count("<[7]>") == 2


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("", "no rule 'root'"),
        ('start ::= "a"', "no rule 'root'"),
        ("root ::= other", "no rule 'other'"),
        ('root = "a"', "'::='"),
        ('root ::= "a', "end of a literal"),
        ("root ::= [a", "end of a literal"),
        ("root ::= []", "empty"),
        ("root ::= [z-a]", "before it begins"),
        (r'root ::= "\q"', "not a character"),
        (r'root ::= "\ud800"', "not a character"),
        ('root ::= "a"{3,2}', "repetition"),
        ('root ::= "a"{9999}', "repetition"),
        ('root ::= ("a"', "expected '\\)'"),
        ("root ::= " + "(" * 70, "levels"),
        ('root ::= "a" )', "end of the line"),
        ("root ::= !<[5]>", "negated"),
        ("\x00", "name of a rule"),
    ],
)
def test_what_is_no_grammar_is_refused(grammar: str, reason: str) -> None:
    with pytest.raises(GbnfError, match=reason):
        to_lark(grammar, {})
