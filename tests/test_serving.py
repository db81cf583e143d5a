"""`posmask serve` shows only its page, and answers broken requests without a traceback."""

import http.client
import socket
import struct
import time

import pytest

from posmask.cli import commands
from posmask.report import serving


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "report"
    (folder / "data").mkdir(parents=True)
    (folder / "index.html").write_text("<html>the page</html>")
    (folder / "data" / "cell-0.gz").write_bytes(b"data")
    return folder


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "id_rsa").write_text("PRIVATE KEY")
    return tmp_path / "id_rsa"


def get(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in {"Host": f"127.0.0.1:{port}", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    return response.status, response.read()


def test_no_link_leads_out_of_the_folder(folder, secret, serve):
    for within in ("sub/index.html", "sub/index.htm", "key.txt", "data/key"):
        (folder / within).parent.mkdir(exist_ok=True)
        (folder / within).symlink_to(secret)
    (folder / "up").symlink_to(folder.parent)
    port = serve(folder)
    for path in ("/sub/", "/sub", "/sub/index.html", "/sub/index.htm", "/key.txt", "/data/key", "/up/id_rsa", "/up/"):
        status, content = get(port, path)
        assert b"PRIVATE KEY" not in content
        assert status in (301, 404), path
    assert get(port, "/") == (200, b"<html>the page</html>")
    assert get(port, "/data/cell-0.gz") == (200, b"data")


def test_a_page_that_is_a_link_is_served_only_to_its_own_folder(folder, secret, serve):
    (folder / "index.html").unlink()
    (folder / "index.html").symlink_to(secret)
    status, content = get(serve(folder), "/")
    assert (status, b"PRIVATE KEY" in content) == (404, False)


BROKEN = ["/%00", "/%00.html", "/data/%00", "/" + "a" * 5000, "/%ff%fe", "/data/../../%2e%2e/etc/passwd", "//", "/?%00"]


@pytest.mark.parametrize("as_file", [False, True])
def test_broken_requests_get_an_answer_without_a_traceback(folder, serve, capfd, as_file):
    port = serve(folder / "index.html" if as_file else folder)
    for path in BROKEN:
        status, content = get(port, path)
        assert status in (200, 301, 400, 404), path
        assert status != 200 or b"the page" in content
    for date in ("99999999", "Mon, 99 Foo 99999 99:99:99 GMT"):
        assert get(port, "/", **{"If-Modified-Since": date})[0] in (200, 400)
    time.sleep(0.05)
    assert capfd.readouterr().err == ""


def test_aborted_connections_print_nothing(folder, serve, capfd):
    (folder / "large").write_bytes(bytes(3_000_000))
    port = serve(folder)
    host = f"Host: 127.0.0.1:{port}\r\n\r\n".encode()
    beginnings = [
        b"",
        b"GET",
        b"GET / HTTP/1.1\r\n",
        b"GET /large HTTP/1.1\r\n" + host,
        b"\x16\x03\x01\x00",
        b"\0" * 99,
    ]
    for beginning in beginnings * 10:
        client = socket.create_connection(("127.0.0.1", port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends a reset
        client.sendall(beginning)
        client.close()
    assert get(port, "/")[0] == 200
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_a_silent_client_is_disconnected(folder, serve, monkeypatch):
    port = serve(folder)
    assert serving._Handler.timeout is not None
    monkeypatch.setattr(serving._Handler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        assert client.recv(1) == b""


@pytest.mark.parametrize("port", ["taken", "99999", "-1", "65536"])
def test_an_impossible_port_is_named(folder, monkeypatch, capsys, port):
    with socket.create_server(("127.0.0.1", 0)) as other:
        if port == "taken":
            port = str(other.getsockname()[1])
        monkeypatch.setattr("sys.argv", ["posmask", "serve", str(folder), "--port", port])
        with pytest.raises(SystemExit) as exit:
            commands.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert port in error
    assert "disk" not in error
    assert "Traceback" not in error
