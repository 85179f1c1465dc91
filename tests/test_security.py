"""Every promise of SECURITY.md has tests, which are named here; those that have no place elsewhere are here."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from mlx_mtp.server import guard
from mlx_mtp.server.app import make_app
from mlx_mtp.server.registry import Models
from mlx_mtp.server.settings import ServerOptions
from tests.support.server import entry, running

ROOT = Path(__file__).parents[1]
ASIDE = ("Security", "What is trusted")
"""Sections that promise nothing: how to report, and decisions."""

PROOFS = {
    "Only safetensors are read": "test_checkpoint.test_only_pickle_files",
    "No code of a checkpoint is run": "test_security.test_no_code_of_a_checkpoint_is_run",
    "Chat templates run in a sandbox": "test_text.test_a_template_can_do_no_harm "
    "test_sandbox.test_what_grows_without_end_is_refused test_sandbox.test_what_runs_without_end_is_stopped",
    "Files are checked": "test_damaged_files.test_random_damage_to_the_header_of_a_model "
    "test_damaged_files.test_the_length_of_a_header_has_a_bound test_damaged_files.test_sizes_that_no_model_has "
    "test_damaged_files.test_json_that_is_nested_too_deeply_for_whoever_copies_it",
    "No name in a file leads out": "test_damaged_files.test_an_index_names_files_of_its_folder "
    "test_damaged_files.test_an_index_names_plain_files test_damaged_files.test_checksums_are_of_files_in_the_folder",
    "Names of control tokens": "test_messages.test_a_control_token_that_is_spelt_out_is_text",
    "Only `/v1/completions`": "test_server_openai.test_plain_completion_uses_no_chat_template",
    "Tool calls are parsed": "test_tools.test_calls_must_fit_the_declared_tools test_tools.test_what_is_no_call",
    "A request that can't be used": "test_server_siege.test_bodies_that_hurt_parsers_are_refused_in_one_line "
    "test_server_siege.test_requests_that_are_nearly_right_are_answered_or_refused "
    "test_server_siege.test_every_response_is_one_that_the_document_has",
    "So does one that has failed": "test_server_openai.test_a_failure_while_decoding_is_told_without_details "
    "test_server_models.test_a_load_that_fails_is_told_without_its_reason",
    "A request that two programs": "test_server_siege.test_requests_that_two_programs_may_read_differently_are_refused",
    "No request gets a part": "test_server_siege.test_a_flood_is_refused_and_every_answer_is_its_own "
    "test_server_siege.test_requests_in_one_packet_are_answered_in_their_order",
    "The server refuses requests from pages": "test_server_safety.test_without_cors_no_page_may_read_answers",
    "It refuses requests under another name": "test_server_safety.test_other_names_and_other_pages_are_refused "
    "test_server_siege.test_requests_under_another_name_or_several_are_refused",
    "Its own page loads": "test_server_safety.test_the_page_loads_nothing_from_elsewhere",
    "The server binds to 127.0.0.1": "test_server_safety.test_the_command_serves_until_it_is_told_to_end "
    "test_server_safety.test_wrong_use_is_exit_code_2",
    "A key opens everything": "test_server_safety.test_a_key_opens_everything_but_the_health_check",
    "Keys are compared": "test_security.test_keys_are_compared_in_constant_time",
    "There is no TLS": "test_security.test_there_is_no_tls",
    "A full queue refuses": "test_server_siege.test_a_flood_is_refused_and_every_answer_is_its_own "
    "test_server_safety.test_a_full_queue_is_said_and_empties_again",
    "An answer has a time limit": "test_server_safety.test_an_answer_that_takes_too_long_ends_with_what_it_has",
    "A client that leaves": "test_server_openai.test_a_client_that_leaves_frees_its_rows "
    "test_server_models.test_a_client_that_leaves_during_a_load_gives_its_place_back "
    "test_server_siege.test_a_client_that_closes_its_half_of_the_connection_has_left "
    "test_server_siege.test_clients_that_ask_and_leave_at_once_leave_nothing_behind",
    "A thousand that say nothing": "test_server_siege.test_a_thousand_connections_that_say_nothing_keep_no_one_out",
    "Their number has a limit": "test_server_siege.test_connections_beyond_the_limit_are_refused_until_others_end",
    "A client that sends its request slowly": "test_server_siege.test_a_client_that_sends_slowly_is_cut_off "
    "test_server_siege.test_a_stream_that_nobody_reads_ends_and_stalls_no_other",
    "The bytes of a request's head": "test_server_siege.test_heads_and_framing_without_an_end_are_cut_off "
    "test_server_safety.test_large_bodies_and_long_prompts_are_refused "
    "test_server_siege.test_large_bodies_that_come_together_are_limited_in_all",
    "A stream that nobody reads": "test_server_siege.test_a_stream_that_nobody_reads_ends_and_stalls_no_other",
    "Models that are loaded": "test_server_models.test_the_kv_of_models_that_are_loaded_together_fits_in_memory "
    "test_server_models.test_running_answers_keep_their_kv_when_another_model_is_asked_for",
    "When the server is told to end": "test_server_safety.test_the_command_serves_until_it_is_told_to_end "
    "test_server_siege.test_answers_that_are_too_long_when_the_server_ends_have_a_proper_end",
    "Logs hold addresses": "test_security.test_logs_have_no_prompts_and_no_texts",
    "A prompt's KV stays": "test_server_openai.test_a_prompt_that_was_seen_before_is_cached",
    "Each has a list of SHA-256 sums": "test_security.test_releases_have_checksums_and_a_list_of_packages",
}
"""The tests behind each sentence, by how it begins."""


def promises() -> list[str]:
    """The sentences of SECURITY.md, without those of `ASIDE`, and without the headings of list items."""
    found: list[str] = []
    for section in re.split(r"^#+ ", (ROOT / "SECURITY.md").read_text("utf-8"), flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        if title not in ASIDE:
            for paragraph in re.split(r"\n\n|^- ", text, flags=re.MULTILINE):
                whole = re.sub(r"^\*\*.*?\*\*", "", " ".join(paragraph.split())).strip()
                found += re.split(r"(?<=\.)\s+(?=[A-Z])", whole) if whole else []
    return found


def test_every_promise_is_proved_by_tests_that_exist():
    unproved = [it for it in promises() if sum(it.startswith(begin) for begin in PROOFS) != 1]
    assert not unproved
    gone = [begin for begin in PROOFS if not any(it.startswith(begin) for it in promises())]
    assert not gone
    for name in {name for names in PROOFS.values() for name in names.split()}:
        file, _, function = name.partition(".")
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text("utf-8"))
        assert function in [it.name for it in tree.body if isinstance(it, ast.FunctionDef)], name


def test_no_code_of_a_checkpoint_is_run():
    """What runs code that it is given is in no module, and in no option of the libraries that read files."""
    running_code = {"eval", "exec", "compile", "__import__", "trust_remote_code", "pickle", "marshal", "shelve", "dill"}
    for file in [*(ROOT / "mlx_mtp").rglob("*.py"), *(ROOT / "weights_convert").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names: Sequence[str | None] = ()
            if isinstance(node, ast.Call):
                names = [node.func.id if isinstance(node.func, ast.Name) else None, *(it.arg for it in node.keywords)]
            elif isinstance(node, ast.Import):
                names = [it.name for it in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not running_code & {*names}, f"{file}:{node.lineno}"


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch):
    compared = []
    compare = guard.secrets.compare_digest

    def noted(given: bytes, key: bytes) -> bool:
        compared.append((given, key))
        return compare(given, key)

    monkeypatch.setattr(guard.secrets, "compare_digest", noted)
    key = "key ö"
    with running(make_app(Models([entry()]), ServerOptions(api_key=key))) as url:
        for given, status in ((key, 200), ("k", 401), ("key", 401)):
            headers = {"Authorization": b"Bearer " + given.encode()}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
    assert compared == [(given.encode(), key.encode()) for given in (key, "k", "key")]


def test_there_is_no_tls():
    with running(make_app(Models([entry()]))) as url, pytest.raises(httpx.ConnectError):
        httpx.get(url.replace("http:", "https:"))


def test_logs_have_no_prompts_and_no_texts(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    said = "Tell me about the xylophone."
    with running(make_app(Models([entry()]))) as url:
        body = {"messages": [{"role": "user", "content": said}], "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        text = answer.json()["choices"][0]["message"]["content"]
        httpx.post(f"{url}/v1/chat/completions", json=body | {"temperature": said})
        httpx.post(f"{url}/v1/chat/completions", json=body | {"xylophone": 1})
    assert "/v1/chat/completions" in caplog.text
    assert text.strip()
    assert text.strip() not in caplog.text
    assert "xylophone" not in caplog.text


def test_releases_have_checksums_and_a_list_of_packages():
    steps = (ROOT / ".github" / "workflows" / "release.yml").read_text("utf-8")
    published = steps[steps.index("\n  publish:") :]
    assert "sha256sum" in published
    assert "cyclonedx-py environment" in steps
    assert "sha256sums.txt" in published
    assert "sbom" in steps
