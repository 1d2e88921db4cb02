"""Redis is reached by every way REDIS_URL can say, and by none that it should not; messages are whole or absent."""

from __future__ import annotations

import contextlib
import datetime
import logging
import resource
import ssl
from pathlib import Path
from urllib.parse import quote, urlsplit

import kombu
import kombu.exceptions
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.cli import main
from tests.chaos.proxy import Proxy
from tests.services import running_redis
from workers.celery_app import make_celery
from workers.jobs import JobStore
from workers.queue import Queue
from workers.settings import Settings

SECRET = "p@ss/wörd:#1?"


def is_reachable(tmp_path: Path, url: str) -> bool:
    settings = Settings(data=tmp_path / "data", redis_url=url)
    store = JobStore(settings)
    queue = Queue(store, make_celery(settings))
    try:
        return queue.broker_is_reachable()
    finally:
        store.close()


def certificate(folder: Path) -> ssl.SSLContext:
    """A server's side of TLS for 127.0.0.1, and `folder / "ca.pem"`, by which it is known."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    lifetime = now - datetime.timedelta(days=1), now + datetime.timedelta(days=1)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), *lifetime)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")
    return context


def test_every_way_to_reach_redis(tmp_path: Path) -> None:
    with running_redis(tmp_path / "r", password=SECRET) as url:
        port, password = urlsplit(url).port, quote(SECRET, safe="")
        assert port is not None and is_reachable(tmp_path, url)
        assert not is_reachable(tmp_path, f"redis://:wrong@127.0.0.1:{port}/0")
        assert not is_reachable(tmp_path, f"redis://127.0.0.1:{port}/0")
        assert is_reachable(tmp_path, f"unix://:{password}@{tmp_path}/r/redis?db=1")
        with Proxy(port, certificate(tmp_path)) as wire:
            ca = f"ssl_ca_certs={tmp_path}/ca.pem"
            assert is_reachable(tmp_path, f"rediss://:{password}@localhost:{wire.port}/0?{ca}")
            assert not is_reachable(tmp_path, f"rediss://:{password}@localhost:{wire.port}/0"), "nobody vouches for it"
            assert not is_reachable(tmp_path, f"rediss://:{password}@127.0.0.1:{wire.port}/0?{ca}"), "for another name"


@pytest.mark.parametrize("end", ["ack_log_error", "reject_log_error"])
def test_a_message_that_redis_is_not_told_of_keeps_no_other_from_its_worker(tmp_path: Path, end: str) -> None:
    with contextlib.ExitStack() as stack:
        with running_redis(tmp_path / "r") as url:
            app = make_celery(Settings(data=tmp_path / "data", redis_url=url))
            connection = stack.enter_context(app.connection_for_read())
            channel = connection.default_channel
            channel.basic_qos(0, 1, False)
            queue, got = kombu.Queue("work", channel=channel), list[kombu.Message]()
            queue.declare()
            stack.enter_context(kombu.Consumer(channel, [queue], on_message=got.append))
            app.send_task("work", queue=queue)
            connection.drain_events(timeout=60)
            assert got and not channel.qos.can_consume()
        getattr(got[0], end)(logging.getLogger("quiet"), connection.connection_errors)
        assert channel.qos.can_consume()


def test_a_message_that_the_disk_has_no_room_for_is_not_there_at_all(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    settings.prepare()
    app = make_celery(settings)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue("work")
        queue.put({"a": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(kombu.exceptions.ChannelError):
                queue.put({"a": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        queue.put({"a": 3})
        got = [queue.get(timeout=60).payload["a"] for _ in range(2)]
        assert sorted(got) == [1, 3] and not list((tmp_path / "broker" / "queue").iterdir())


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize(
    ("name", "url", "said"),
    [
        ("REDIS_URL", f"amqp://me:{quote(SECRET)}@host", "it is like redis://:password@host:6379/0"),
        ("DATABASE_URL", f"mysql://me:{quote(SECRET)}@host/db", "is not known here; it is like postgresql://"),
        ("DATABASE_URL", f"postgresql://me:{quote(SECRET, safe='')}@127.0.0.1:1/db", "Connection refused"),
    ],
)
def test_what_cannot_be_meant_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str, url: str, said: str
) -> None:
    monkeypatch.setenv(name, url)
    extra = ["--port", "0"] if command == "serve" else []
    result = CliRunner().invoke(main, [command, "--data", str(tmp_path), *extra])
    assert result.exit_code == 1 and result.output.startswith("error: "), result.output
    assert name in result.output or "postgresql://me:***@127.0.0.1:1/db" in result.output
    assert said in result.output and "Traceback" not in result.output
    assert SECRET not in result.output and quote(SECRET) not in result.output
