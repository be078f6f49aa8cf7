"""scripts/serve.py as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from serve.session import Session
from tests.conftest import ROOT
from tests.model.glm_common import train_sentencepieces
from tests.serve.live import WAIT, wait_until
from tests.tiny_run import glm_nodes, write_run

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_server_for_others_draws_a_token_and_ends_when_told(tmp_path: Path) -> None:
    nodes = glm_nodes(train_sentencepieces(tmp_path / "tokenizer.model"), tmp_path / "chatglm3", endless=True)
    write_run(tmp_path / "run", nodes)
    expected, _ = Session.load(tmp_path / "run", device="cpu").chat(None, "图片", temperature=0, max_new_tokens=8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "scripts/serve.py", "--model", tmp_path / "run", "--device", "cpu", "--host", "0.0.0.0",
               "--port", str(port), "--no-page"]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/health", timeout=WAIT).status_code == 200
        except httpx.ConnectError:
            return False

    try:
        wait_until(answers)
        (token,) = re.findall(r"as the password\): (\S+)", log.read_text())
        say = {"model": "run", "messages": [{"role": "user", "content": "图片"}], "max_tokens": 8, "temperature": 0}
        with pytest.raises(openai.AuthenticationError, match="asks for a token"):
            openai.OpenAI(base_url=f"{url}/v1", api_key="x", timeout=WAIT).chat.completions.create(**say)  # type: ignore[call-overload]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=token, timeout=WAIT)
        assert client.chat.completions.create(**say).choices[0].message.content == expected  # type: ignore[call-overload]
        process.send_signal(signal.SIGINT)
        process.wait(WAIT)
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--no-page", "serve: there is no folder nowhere"),
        ("--max-tokens 0", "serve: --max-tokens is 0; a conversation takes more"),
        ("--token-file nothing", "serve: --token-file nothing cannot be read"),
        ("--port 99999", "argument --port: 99999 is no port"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    options: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.serve import main

    monkeypatch.setattr(sys, "argv", ["serve.py", "--model", "nowhere", *options.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    said = f"{ended.value.code}" if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert expected in said
