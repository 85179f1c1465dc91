"""OpenAI's interface, through `llm`, a program that people use: it is pointed at the server as docs/server.md says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_mtp

SETTINGS = """
- model_id: mine
  model_name: demo
  api_base: {address}/v1
  supports_schema: true
"""


@pytest.fixture
def folder(address: str, tmp_path: Path) -> Path:
    (tmp_path / "extra-openai-models.yaml").write_text(SETTINGS.format(address=address))
    return tmp_path


def llm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LLM_USER_PATH": str(folder)}
    command = [sys.executable, "-m", "llm", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_conversation_has_the_texts_of_the_same_calls_in_python(folder: Path, lm: mlx_mtp.MTPModel):
    messages = []
    streamed, whole = ["-m", "mine"], ["--continue", "--no-stream"]
    for question, how in (("What is the capital of France?", streamed), ("And of Spain?", whole)):
        messages.append({"role": "user", "content": question})
        direct = lm.generate(messages, temperature=0, max_tokens=400)
        done = llm(folder, *how, "-o", "temperature", "0", question)
        assert done.stdout == f"{direct.text}\n", done.stderr
        messages.append({"role": "assistant", "content": direct.text})


def test_an_answer_keeps_to_a_json_schema(folder: Path):
    done = llm(folder, "-m", "mine", "-o", "temperature", "0", "--schema", "yes bool", "Is the sky blue?")
    assert isinstance(json.loads(done.stdout)["yes"], bool), done.stderr


def test_an_error_is_the_servers(folder: Path):
    settings = folder / "extra-openai-models.yaml"
    settings.write_text(settings.read_text().replace("model_name: demo", "model_name: gpt-4"))
    done = llm(folder, "-m", "mine", "Hi")
    assert done.returncode != 0
    assert "there is no model 'gpt-4'" in done.stderr
