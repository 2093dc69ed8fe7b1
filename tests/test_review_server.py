from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import automatch
from automatch.review_server import ReviewServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ReviewServer]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    mapping = automatch.propose_mapping(model, {f"old.{key}": torch.zeros_like(value) for key, value in model.state_dict().items()})
    with ReviewServer(mapping, tmp_path / "mapping.json") as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.close()
        thread.join()


def ask(server: ReviewServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    result = (answer.status, answer.read().decode(), dict(answer.getheaders()))
    connection.close()
    return result


def save(server: ReviewServer, decisions: Any, **headers: str) -> tuple[int, str]:
    body = decisions if isinstance(decisions, bytes) else json.dumps(decisions)
    status, text, _ = ask(server, "POST", f"/{server.token}/save", body, **{"Content_Type": "application/json", **headers})
    return status, text


def test_the_page_is_served_under_its_token_alone(server: ReviewServer) -> None:
    status, page, headers = ask(server, "GET", f"/{server.token}/")
    assert status == 200
    assert "connect-src 'self'" in page.replace("&#39;", "'")
    assert not any(name.lower().startswith("access-control") for name in headers)
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Frame-Options"] == "DENY"
    for path in ("/", "/favicon.ico", f"/{server.token}", f"/{server.token[:-1]}x/", f"/{server.token}/../", f"/{server.token}/save"):
        assert ask(server, "GET", path)[0] == 404


def test_it_listens_on_this_machine_alone(server: ReviewServer) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert server._server.socket.getsockname()[0] == "127.0.0.1"
    assert server._server.socket.family == socket.AF_INET


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "0.0.0.0"])
def test_a_rebound_name_is_refused(server: ReviewServer, host: str) -> None:
    assert ask(server, "GET", f"/{server.token}/", Host=host)[0] == 403
    assert save(server, {}, Host=host)[0] == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1"])
def test_another_origin_is_refused(server: ReviewServer, origin: str) -> None:
    assert save(server, {}, Origin=origin)[0] == 403
    assert not server.path.exists()


def test_a_form_cannot_send_decisions(server: ReviewServer) -> None:
    assert save(server, {}, Content_Type="text/plain")[0] == 415
    assert not server.path.exists()


def test_decisions_are_written_as_a_mapping(server: ReviewServer) -> None:
    status, text = save(server, {"decisions": [["0.bias", None, None]]}, Origin=f"http://127.0.0.1:{server.port}")
    assert (status, json.loads(text)["message"]) == (200, f"Saved {server.path}")
    written = automatch.KeyMapping.load(server.path)
    assert "0.bias" in written.missing_keys
    assert written == automatch.KeyMapping.from_dict(server.mapping.to_dict())


def test_every_save_starts_from_the_proposal(server: ReviewServer) -> None:
    save(server, {"decisions": [["0.bias", None, None]]})
    save(server, {"decisions": []})
    assert automatch.KeyMapping.load(server.path) == automatch.KeyMapping.from_dict(server.original.to_dict())


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"decisions": [["nowhere", null, null]]}', b"\xff", b"[" * 100_000])
def test_bad_decisions_write_nothing(server: ReviewServer, body: bytes) -> None:
    status, text = save(server, body)
    assert status == 400
    assert json.loads(text)["message"]
    assert not server.path.exists()


def test_a_body_too_large_is_not_read(server: ReviewServer) -> None:
    assert save(server, b"", Content_Length=str(2**40))[0] == 413


def test_a_folder_that_is_gone_is_reported(server: ReviewServer) -> None:
    server.path = server.path / "gone" / "mapping.json"
    status, text = save(server, {})
    assert status == 400
    assert "cannot write" in json.loads(text)["message"]
