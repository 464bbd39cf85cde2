"""`dynamo validate` on configurations of the picker."""

from dynamo_cli.validate_command import checked

GOOD = """apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins: [{type: queue-scorer}, {type: openai-parser}]
"""


def test_a_configuration_of_the_picker_is_read_as_the_picker_would() -> None:
    report = checked(GOOD, "c.yaml")
    assert report.ok
    assert report.checked == ["EndpointPickerConfig"]
    assert report.notes == ["plugin openai-parser: requests are parsed by their path"]


def test_its_mistakes_have_lines() -> None:
    report = checked(GOOD.replace("queue-scorer", "queue-scorrer"), "c.yaml")
    (problem,) = report.problems
    assert (problem.line, problem.path) == (3, "plugins[0].type")
    assert "queue-scorer" in problem.expected
