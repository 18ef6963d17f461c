"""A real Redis or Valkey for a test: started on a free port, killed, hung, started again, and gone without a trace."""
from __future__ import annotations

import ipaddress
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import mkdtemp

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from ports import free_port
from redis.connection import Connection

from recsys.lake.redis_server import Server

PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server") or "redis-server"
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
MEMORY = Path("/dev/shm")  # a kill of the process leaves what was written there, as on a disk, and no test waits for the disk


@dataclass
class RedisProcess:
    "A server that can be stopped and started; by default as the event log wants it."

    options: tuple[str, ...] = DURABLE
    port: int = 0
    folder: Path = Path()
    process: subprocess.Popen | None = None

    def __enter__(self) -> RedisProcess:
        self.port, self.folder = self.port or free_port(), Path(mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    @property
    def url(self) -> str: return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        ports = () if "--tls-port" in self.options else ("--port", str(self.port))
        self.process = subprocess.Popen([PROGRAM, "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder), *ports, *self.options], stdout=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not self._answers():
            assert time.monotonic() < until and self.process.poll() is None, "no redis"
            time.sleep(0.01)

    def _answers(self) -> bool:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", self.port)): return False
        if "--tls-port" in self.options: return True
        connection = Connection(port=self.port, socket_timeout=5)
        try: return Server.tell(connection, ("PING",)) == [b"PONG"]
        except Exception: return False  # noqa: BLE001  it loads its file
        finally: connection.disconnect()

    def ask(self, *words: str) -> object:
        connection = Connection(port=self.port, socket_timeout=5)
        try: return Server.tell(connection, words)[0]
        finally: connection.disconnect()

    def hang(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        "kill -9"
        if self.process:
            self.process.kill()
            self.process.wait()


def tls(folder: Path, port: int, user: str) -> tuple[str, ...]:
    "Options of a server that speaks TLS only and knows one user (a line of an ACL file); the authority is `ca.pem` of the folder."
    key, day = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis of a test")])
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
            .not_valid_before(day - timedelta(days=1)).not_valid_after(day + timedelta(days=1)).add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False).sign(key, hashes.SHA256()))
    ca, private, users = folder / "ca.pem", folder / "key.pem", folder / "users.acl"
    ca.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    users.write_text(f"user default off\nuser {user}\n")
    return ("--port", "0", "--tls-port", str(port), "--tls-cert-file", str(ca), "--tls-key-file", str(private), "--tls-ca-cert-file", str(ca),
            "--tls-auth-clients", "no", "--aclfile", str(users))
