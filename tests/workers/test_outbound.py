"""What somebody else's URL can make this machine do: call public addresses over https, and nothing else."""

from __future__ import annotations

import datetime
import re
import ssl
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.receivers import plain_answer, receiving
from workers.outbound import ForbiddenAddress, Guard

PUBLIC = "93.184.215.14"
INSIDE = {
    "this machine": ["127.0.0.1", "127.1", "127.0.1", "0x7f.0.0.1", "0x7f000001", "2130706433", "0"],
    "this machine, in IPv6": ["[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"],
    "this machine, translated": ["[::127.0.0.1]", "[2002:7f00:1::]", "[64:ff9b::7f00:1]"],
    "its network": ["10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.1.1", "100.64.0.1", "[fd00::1]", "[fec0::1]"],
    "a cloud's metadata": ["169.254.169.254", "0xa9fea9fe", "[fe80::a9fe:a9fe]", "[fd00:ec2::254]", "100.100.100.200"],
    "no host at all": ["0.0.0.0", "255.255.255.255", "224.0.0.1", "240.0.0.1", "192.0.2.1", "198.18.0.1", "[ff02::1]"],
}
WHERE = [(host, what) for what, hosts in INSIDE.items() for host in hosts]


def leads_to(*addresses: str) -> Callable[[str, int], Sequence[str]]:
    return lambda host, port: addresses


@pytest.mark.parametrize(("host", "what"), WHERE)
def test_an_address_inside_is_refused_however_it_is_written(host: str, what: str) -> None:
    with pytest.raises(ForbiddenAddress, match="no public address"):
        Guard().check(f"https://{host}/hook")


ADDRESSES = [host.strip("[]") for host, _ in WHERE if host.startswith("[") or re.fullmatch(r"[1-9]\d*(\.\d+){3}", host)]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_name_that_leads_inside_is_refused_when_it_is_called(address: str) -> None:
    with pytest.raises(ForbiddenAddress, match=r"hook\.example leads to"):
        Guard(resolve=leads_to(PUBLIC, address)).addresses("hook.example", 443)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://hook.example/", "only https"),
        ("ftp://hook.example/", "only https"),
        ("file:///etc/passwd", "only https"),
        ("gopher://hook.example:70/_", "only https"),
        ("//hook.example/", "only https"),
        ("https://", "only https"),
        ("https:///path", "only https"),
        ("https://hook.example:22/", "only the ports 443 and 8443"),
        ("https://hook.example:80/", "only the ports"),
        ("https://user:secret@hook.example/", "name or password"),
        ("https://hook.example@127.0.0.1/", "name or password"),
        ("https://hook.example\\@127.0.0.1/", "plain characters"),
        ("https://hook.example/#fragment", "fragment"),
        ("https://hook.example/\r\nHost: other", "plain characters"),
        ("https://hook.example/a b", "plain characters"),
        ("https://①②⑦.0.0.1/", "plain characters"),
        ("https://hook.example:999999/", "only the ports"),
        ("https://0177.0.0.1/", "not a URL"),
        ("https://[::1/", "not a URL"),
        ("https://hook.example/" + "a" * 2000, "at most 2,000"),
    ],
)
def test_other_forms_are_refused_in_words(url: str, why: str) -> None:
    with pytest.raises(ForbiddenAddress, match=why):
        Guard().check(url)


@pytest.mark.parametrize(
    "url", ["https://hook.example", "https://hook.example:8443/a?b=c", f"https://{PUBLIC}/", "https://[2606:4700::1]/"]
)
def test_public_addresses_are_called(url: str) -> None:
    assert Guard().check(url).scheme == "https"
    assert Guard(resolve=leads_to(PUBLIC, "2606:4700::1")).addresses("hook.example", 443) == [PUBLIC, "2606:4700::1"]


def test_an_administrator_may_open_an_intranet() -> None:
    guard = Guard(["Hooks.intranet", "10.1.0.0/16", "::1"], resolve=leads_to("10.1.2.3"))
    guard.check("http://hooks.intranet:8080/")
    guard.check("http://10.1.2.3:9/")
    guard.check("http://[::1]:9/")
    assert guard.addresses("other.example", 443) == ["10.1.2.3"]
    for url in (
        "http://other.example/",
        "http://hooks.intranet:99999/",
        "https://10.2.0.1/",
        "https://x.hooks.intranet:8080/",
    ):
        with pytest.raises(ForbiddenAddress):
            guard.check(url)
    for entry in ("10.1.0.0/33", "http://hooks.intranet", "", "host:80"):
        with pytest.raises(ValueError, match="neither"):
            Guard([entry])


def client(guard: Guard, **bounds: float) -> httpx2.Client:
    transport = guard.transport(**bounds)  # type: ignore[arg-type]
    return httpx2.Client(transport=transport, trust_env=False, timeout=60, follow_redirects=False)


def test_a_name_is_looked_up_once_and_that_address_is_called() -> None:
    answers = [["127.0.0.1"], ["127.9.9.9"]]
    guard = Guard(["hook.example"], resolve=lambda host, port: answers.pop(0))
    with receiving() as received, client(guard) as http:
        assert http.post(f"http://hook.example:{received.port}/a", content=b"x").status_code == 200
    assert answers == [["127.9.9.9"]]
    assert received.requests[0][1]["host"] == f"hook.example:{received.port}"


def test_a_name_that_leads_elsewhere_the_second_time_is_looked_at_again() -> None:
    answers = [[PUBLIC], ["127.0.0.1"]]
    guard = Guard(resolve=lambda host, port: answers.pop(0))
    assert guard.addresses("hook.example", 443) == [PUBLIC]
    with client(guard) as http, pytest.raises(ForbiddenAddress, match=r"hook\.example leads to no public"):
        http.post("https://hook.example/a")


def test_a_redirect_goes_through_the_same_door() -> None:
    guard = Guard(["hook.example"], resolve=leads_to("127.0.0.1"))
    with receiving() as received, client(guard) as http:
        received.answer = lambda handler: plain_answer(handler, 307, [("Location", "http://169.254.169.254/")])
        url = f"http://hook.example:{received.port}/"
        assert http.post(url).status_code == 307
        with pytest.raises(ForbiddenAddress, match="no public address"):
            http.post(url, follow_redirects=True)


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with receiving() as received, client(Guard(["127.0.0.1"])) as http:
        assert http.post(f"http://127.0.0.1:{received.port}/").status_code == 200


def test_an_answer_that_trickles_or_never_ends_is_left() -> None:
    def trickle(handler: BaseHTTPRequestHandler) -> None:
        for _ in range(2000):
            try:
                handler.wfile.write(b"HTTP/1.1 200 OK\r\n"[:1])
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.05)

    def flood(handler: BaseHTTPRequestHandler) -> None:
        try:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 10**6)
        except OSError:
            return

    with receiving() as received:
        url = f"http://127.0.0.1:{received.port}/"
        received.answer = trickle
        began = time.monotonic()
        with client(Guard(["127.0.0.1"]), seconds=0.3) as http, pytest.raises(httpx2.TimeoutException):
            http.post(url)
        assert time.monotonic() - began < 20
        received.answer = flood
        with client(Guard(["127.0.0.1"]), most_bytes=64_000) as http, pytest.raises(httpx2.ReadError, match="too long"):
            http.post(url)


def _certificate(folder: Path, name: str) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / f"{name}.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return file


def test_tls_is_with_the_name_though_an_address_was_dialled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _certificate(tmp_path, "hook.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    guard = Guard(["hook.example", "wrong.example"], resolve=leads_to("127.0.0.1"))
    with receiving(context) as received, client(guard) as http:
        assert http.post(f"https://hook.example:{received.port}/").status_code == 200
        with pytest.raises(httpx2.ConnectError, match="certificate"):
            http.post(f"https://wrong.example:{received.port}/")
    assert len(received.requests) == 1
