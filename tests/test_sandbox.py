"""Chat templates from strangers take no more time and memory than they may, and fail with one line (sandbox.py)."""

from __future__ import annotations

import resource
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from mlx_mtp.errors import CheckpointError, MTPError, PromptError
from mlx_mtp.text import sandbox
from mlx_mtp.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import write_tokenizer

USER: dict[str, Any] = {"role": "user", "content": "Hi <b> you"}
LIST, TEXT = "{% set x = range(99999) | list %}", "{% set x = 'é' * 999999 %}"
DOUBLE = "{%% set ns = namespace(x=%s) %%}{%% for _ in range(80) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"


def with_template(folder: Path, template: str) -> Tokenizer:
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.from_folder(folder)


@pytest.fixture
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)


@pytest.mark.parametrize("template", [
    '{{ "%999999999d" % 1 }}', '{{ "%*d" % (999999999, 1) }}', '{{ "%999999999d" | format(1) }}',
    '{{ "{:999999999}".format(1) }}', '{{ "{:{}}".format(1, 999999999) }}',
    '{{ "{x:999999999}".format_map({"x": 1}) }}',
    '{{ "x" * 10**9 }}', '{{ 10**9 * "x" }}', "{{ [0] * 10**9 }}", "{{ (0,) * 10**9 }}", "{{ 10**5000 }}",
    "{{ 2**(10**9) }}", DOUBLE % ("7", "ns.x * ns.x"), DOUBLE % ("'x'", "ns.x + ns.x"), DOUBLE % ("'x'", "ns.x ~ ns.x"),
    DOUBLE % ("[1]", "ns.x + ns.x"), DOUBLE % ("[1]", "[ns.x, ns.x]"), DOUBLE % ("1", "(ns.x, ns.x)"),
    DOUBLE % ("1", "{'a': ns.x, 'b': ns.x}"), DOUBLE % ("1", "dict(a=ns.x, b=ns.x)"),
    DOUBLE % ("[1]", "(ns.x * 2) | batch(2) | list"), DOUBLE % ("'x'", "[ns.x, ns.x] | join"),
    DOUBLE % ("'x'", "ns.x | replace('x', 'xx')"), DOUBLE % ("'x'", "ns.x.replace('x', 'xx')"),
    DOUBLE % ("'x'", "'%s%s' % (ns.x, ns.x)"), DOUBLE % ("'x'", "'{0}{0}'.format(ns.x)"),
    DOUBLE % ("'x'", "'%s%s' | format(ns.x, ns.x)"), DOUBLE % ("'x'", "''.join([ns.x, ns.x])"),
    DOUBLE % ("[1]", "[ns.x, ns.x] | sum(start=[])"), DOUBLE % ("'x'", "ns.x.translate({120: 'xx'})"),
    "{% set ns = namespace(x='x') %}{% for _ in range(80) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}{{ ns.x }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}"
    "{% endmacro %}{{ m(99) }}",
    "{{ 'x' | center(10**9) }}", "{{ 'x'.center(10**9) }}", "{{ 'x'.zfill(10**9) }}", "{{ 'x'.ljust(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}", "{{ 'x\nx' | indent(10**9) }}", "{{ [1] | tojson(indent=10**9) }}",
    "{{ (('\n' * 10**6) | indent(9999)) | length }}", "{{ ('a' * 10**6).replace('a', 'b' * 10**6) | length }}",
    "{{ (1).to_bytes(10**9, 'big') }}", "{{ range(10**9) | list }}", "{{ 'x' | list | batch(10**9, 0) | list }}",
    "{{ ('x' * 10**6).join(range(10**5)) }}", "{{ range(10**5) | map('string') | join('x' * 10**6) }}",
    "{{ ([('x' * 10**6)] * 10**5) | map('upper') | list | length }}", "{{ lipsum(10**9) }}",
    "{% set s = 'x' * 30000000 %}" + "".join(f"{{% set s{i} = s[1:] %}}" for i in range(20)),
])  # fmt: skip
def test_what_grows_without_end_is_refused(tmp_path: Path, template: str):
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(MTPError) as raised:
        with_template(tmp_path, template).chat([USER])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert time.thread_time() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000, "kB"


@pytest.mark.parametrize("template", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for a in [range(99999)] recursive %}{% for b in a %}{{ loop(a) }}{% endfor %}{% endfor %}",
    LIST + "{{ [" + "-1 in x, " * 2000 + "] }}", LIST + "{% set y = x[:] %}{{ [" + "x > y, " * 500 + "] }}",
    LIST + "{{ x | select('in', x[::-1]) | list }}", LIST + "{{ x | reject('in', x) | first }}",
    LIST + "{{ x" + " | select('odd') | map('abs')" * 60 + " | list }}",
    TEXT + "{{ x.rfind('b' + x) }}", TEXT + "{{ x.rsplit('b' + x) }}", TEXT + "{{ x.strip('b' + x[:-1] + 'c') }}",
    "{% set x = ('<a>' * 300000) | safe %}{{ x.striptags() }}", TEXT + "{{ x | tojson(ensure_ascii=true) }}",
    TEXT + "{{ x | urlencode }}", TEXT + "{{ (x ~ 'a').encode('punycode') }}",
])  # fmt: skip
def test_what_runs_without_end_is_stopped(little_time: None, tmp_path: Path, template: str):
    begin = time.thread_time()
    with pytest.raises(PromptError) as raised:
        with_template(tmp_path, template).chat([USER])
    assert "\n" not in str(raised.value) and time.thread_time() - begin < 1


@pytest.mark.parametrize("template", [
    "{% break %}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% for %}", "{{ x | nothing }}",
    "{% if x %}" * 200 + "{% endif %}" * 200, "{{ x }}" * 20_000,
])  # fmt: skip
def test_a_template_that_is_none_is_a_broken_checkpoint(tmp_path: Path, template: str):
    with pytest.raises(CheckpointError, match="is broken") as raised:
        with_template(tmp_path, template).chat([USER])
    assert "\n" not in str(raised.value)


def test_what_templates_do_every_day_still_works(tmp_path: Path):
    template = (
        "{% set ns = namespace(n=0, text='') %}{% for m in messages[0:] %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.text = ns.text ~ m.role ~ ': ' + m['content'] | trim ~ '\n' %}{% endfor %}{{ ns.text }}"
        "{{ ns.n * 2 }}"
        "{{ '%s=%d' % ('a', 5) }} {{ '%02d' | format(7) }} {{ '{:>3}'.format('x') }} {{ 2**10 }} {{ '-' * 3 }} "
        "{{ [1, 2] + [3] }} {{ [{'a': 1}, {'a': 2}] | map(attribute='a') | join(', ') }} {{ [1, 2] | sum }} "
        "{{ [{'a': 1}, {'a': 2}] | join('+', attribute='a') }} {{ 'a,b'.split(',') | last }} "
        "{{ [[1]] | sum(start=[]) }} "
        "{{ ns }} {{ 'x' | indent(2, true) }} {{ 'ab'.replace('a', 'c') }} {{ ', '.join(['x', 'y']) }} {{ 7 % 4 }} "
        "{% for k, v in {'b': 1}.items() %}{{ k }}{{ v }}{{ loop.last }}{% endfor %} {{ (1, 2)[0] }} {{ 'é' | tojson }}"
    )
    rendered = with_template(tmp_path, template).render([USER])
    assert rendered == (
        'user: Hi <b> you\n2a=5 07   x 1024 --- [1, 2, 3] 1, 2 3 1+2 b [1] <namespace>   x cb x, y 3 b1True 1 "é"'
    )


def test_long_conversations_are_not_too_much(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    call = {"function": {"name": "f", "arguments": {"a": "x" * 100}}}
    turn = [
        {"role": "user", "content": "x" * 300}, {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "y" * 300}, {"role": "assistant", "content": "z" * 300},
    ]  # fmt: skip
    assert tokenizer.prompt(turn * 1000 + turn[:1]).count("<|turn>") == 2002
    assert len(tokenizer.prompt([{"role": "user", "content": "x" * 4_000_000}])) > 4_000_000


def test_templates_that_look_back_over_long_conversations(little_time: None, tmp_path: Path):
    """The published template does: the time limit grows with the number of messages, as its time does."""
    template = (
        "{% for m in messages %}{% set ns = namespace(role='') %}{% for i in range(loop.index0 - 1, -1, -1) %}"
        "{% if not ns.role and messages[i].role != 'tool' %}{% set ns.role = messages[i].role %}{% endif %}{% endfor %}"
        "{{ ns.role }} {% endfor %}"
    )
    roles = with_template(tmp_path, template).render([USER] * 1000).split()
    assert roles == ["user"] * 999


def test_warnings_of_python_about_a_template_are_not_shown(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_template(tmp_path, "a{% if false %}{{ 1[0] }}{{ 1(2) }}{% endif %}").render([USER]) == "a"
