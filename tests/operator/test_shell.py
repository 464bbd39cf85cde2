"""Finding a script's last command; what a real shell makes of the words is the judge."""

import shutil
import subprocess

import pytest
from dynamo_operator.render.shell import launch, quoted, split
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("script", "before", "words"),
    [
        ("python3 -m dynamo.vllm --model m", "", ["--model", "m"]),
        ("exec python3 -m dynamo.vllm", "", []),
        ("exec  /usr/bin/python3.12  -m  dynamo.vllm -x", "", ["-x"]),
        ("ulimit -l unlimited\npython3 -m dynamo.vllm \\\n  --a '{\"b\": 1}'\n",
         "ulimit -l unlimited\n", ["--a", '{"b": 1}']),
        ("test -r f || exit 1\nA=b python -m dynamo.vllm --c=d",
         "test -r f || exit 1\nA=b ", ["--c=d"]),
        ("cd /x && exec python3 -m dynamo.vllm --m \"$M\"", "cd /x && ", ["--m", None]),
        ("python3 -m dynamo.vllm ${M} $(NAME)", "", [None, None]),
    ],
)  # fmt: skip
def test_the_last_simple_command_is_found(
    script: str, before: str, words: list[str | None]
) -> None:
    found = launch(script)
    assert found is not None
    assert found.before == before
    assert found.module == "dynamo.vllm"
    assert [word.value for word in found.words] == words


@pytest.mark.parametrize(
    "script",
    [
        "python3 -m dynamo.vllm --model m | tee log",
        "python3 -m dynamo.vllm --model m &",
        "python3 -m dynamo.vllm --model m > log",
        "python3 -m dynamo.vllm --model `cat name`",
        "python3 -m dynamo.vllm --model $(cat name)",
        'python3 -m dynamo.vllm --model "$(cat name)"',
        "python3 -m dynamo.vllm --model *.bin",
        "python3 -m dynamo.vllm --model m # the small one",
        "python3 -m dynamo.vllm --model m\necho done",
        "if true; then\npython3 -m dynamo.vllm\nfi",
        "cat <<EOF\npython3 -m dynamo.vllm\nEOF",
        "echo 'run\npython3 -m dynamo.vllm'",
        "python3 -m dynamo.vllm --model 'm",
        "echo python3 -m dynamo.vllm",
        "vllm serve m",
    ],
)
def test_anything_else_is_left_alone(script: str) -> None:
    assert launch(script) is None


def test_the_rewritten_script_runs_the_command_in_the_shells_place() -> None:
    found = launch("true && python3 -m dynamo.vllm --model \"$M\" --x 'a b'")
    assert found is not None
    script = found.script("dynamo worker vllm", list(found.words))
    assert script == "true && exec dynamo worker vllm --model \"$M\" --x 'a b'"


fragment = st.sampled_from(
    ["a", "--b=c", " ", "  ", "\t", "\\\n", "'d e'", '"f g"', '"\\$h"', "'i\"j'", "\\ ", "\\'",
     '"k\'l"', "{m:1}", "n#o", "$", "$P", "&", "=", "~", "''", '""', '"q\\z"', "\n"]
)  # fmt: skip


def shell_words(text: str) -> list[str] | None:
    script = "set -- " + text + '\nfor w\ndo printf "%s\\0" "$w"\ndone'
    done = subprocess.run(
        [shutil.which("sh") or "/bin/sh", "-c", script], capture_output=True, check=False
    )
    return done.stdout.decode().split("\0")[:-1] if done.returncode == 0 else None


@settings(max_examples=150, deadline=None)
@given(st.lists(fragment, max_size=8).map("".join))
def test_words_are_those_of_a_real_shell(text: str) -> None:
    words = split(text)
    if words is None or any(word.value is None for word in words):
        return
    assert [word.value for word in words] == shell_words(text)
    rewritten = " ".join(word.raw for word in words)
    assert [word.value for word in split(rewritten) or []] == [word.value for word in words]


@given(st.text())
def test_quoting_gives_one_word_with_that_value(value: str) -> None:
    word = quoted(value)
    assert word.value == value
    assert [w.value for w in split(word.raw) or []] == [value]
