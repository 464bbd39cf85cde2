"""Chat templates: what they may do, what their syntax tells, what is cut off."""

from __future__ import annotations

from datetime import datetime

import pytest
from dynamo_epp.tokenize import NotExact
from dynamo_epp.tokenize.template import ChatTemplate


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source).render({"messages": [], **variables})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),  # trimmed blocks
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),  # no HTML escapes
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        (
            "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "13",
        ),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}x{{ 1 }}{% endgeneration %}y", "x1y"),
        ("{{ 'a' * 3 }}{{ '%03d' % 7 }}{{ 2 ** 10 }}{{ 'b' | center(5) }}|", "aaa0071024  b  |"),
        ("{{ missing }}|{{ missing is defined }}", "|False"),
    ],
)
def test_rendering(source: str, expected: str) -> None:
    assert render(source) == expected


def test_a_date_is_printed_and_the_time_of_day_is_not() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == datetime.now().strftime("%d %b %Y")
    with pytest.raises(NotExact, match="time of day"):
        render("{{ strftime_now('%H:%M') }}")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content }}", "UndefinedError"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ 'a' * 100000000 }}", "repeats"),
        ("{{ 10 ** 10000000 }}", "too large"),
        ("{{ '%100000000d' % 1 }}", "wide"),
        ("{{ '%*d' % (100000000, 1) }}", "wide"),
        ("{{ '%100000000d' | format(1) }}", "wide"),
        ("{{ 'a' | center(100000000) }}", "too much"),
        ("{% for i in range(1000000) %}{% endfor %}", "OverflowError"),
    ],
)
def test_what_raises_is_not_exact(source: str, reason: str) -> None:
    with pytest.raises(NotExact, match=reason):
        render(source)


def test_a_template_that_does_not_compile_says_so() -> None:
    with pytest.raises(NotExact, match="does not compile"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "string"),
        ("{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% for c in m['content'] %}{% endfor %}{% endfor %}", "openai"),
        (
            "{% for m in messages[1:] %}{% for c in m.content | list %}{% endfor %}{% endfor %}",
            "openai",
        ),
        (
            "{% set rest = messages %}{% for m in rest %}{% for c in m.content %}{% endfor %}"
            "{% endfor %}",
            "openai",
        ),
        ("{% for content in x %}{% endfor %}{% for c in content %}{% endfor %}", "openai"),
        ("{% macro f(content) %}{% for c in content %}{% endfor %}{% endmacro %}", "string"),
        (
            "{% macro f(x) %}{% for c in x %}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ f(m.content) }}{% endfor %}",
            "openai",
        ),
        (
            "{% macro f(x) %}{% for c in x %}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ f(x=m['content']) }}{% endfor %}",
            "openai",
        ),
        ("{% for m in messages %}{% for k, v in m.items() %}{% endfor %}{% endfor %}", "string"),
        ("{% for i, m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}", "string"),
        ("{% for m in other %}{% for c in m.content %}{% endfor %}{% endfor %}", "string"),
    ],
)
def test_content_format(source: str, expected: str) -> None:
    assert ChatTemplate(source).content_format == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}", True),
        ("{% macro f(x) %}{% for c in x %}{% endfor %}{% endmacro %}{{ f(messages) }}", True),
        ("{% macro f(x) %}{{ g(x) }}{% endmacro %}{% macro g(x) %}1{% endmacro %}{{ f(1) }}", True),
        ("{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}", False),
        (
            "{% macro f(x) %}{{ g(x) }}{% endmacro %}{% macro g(x) %}{{ f(x) }}{% endmacro %}"
            "{{ f(1) }}",
            False,
        ),
        ("{% for i in range(9) %}{% endfor %}", False),
        ("{% for m in messages recursive %}{{ loop(m) }}{% endfor %}", False),
        (
            "{% for a in x %}{% for b in x %}{% for c in x %}{% for d in x %}"
            "{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
            False,
        ),
        (
            "{% macro f(x) %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}{% endmacro %}"
            "{% for c in x %}{% for d in x %}{{ f(x) }}{% endfor %}{% endfor %}",
            False,
        ),
    ],
)
def test_bounded(source: str, expected: bool) -> None:
    assert ChatTemplate(source).bounded is expected
