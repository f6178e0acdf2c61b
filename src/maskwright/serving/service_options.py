"""The options of the service, with the help of `maskwright serve`."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from maskwright.errors import MaskwrightError

MAX_PIXELS = 178_956_970  # the largest image that maskwright decodes as a whole

_SUFFIXES = (".safetensors", ".onnx", ".xml", ".pkl", ".pth", ".pt", ".bin")


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """The options of the service that need no resolving."""

    host: str = "127.0.0.1"
    """Address to listen on. One that other machines can reach needs a token."""
    port: int = 8000
    """Port to listen on; 0 is any free one."""
    device: str | None = None
    """cpu, cuda, mps, ...; default: the accelerator of this machine."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Mixed-precision type of the network."""
    max_batch: int | None = None
    """Images of one size per forward pass; default: 1 on a CPU, 8 on an accelerator."""
    max_wait_ms: float = 5.0
    """Time for which an image waits for others of its size, in milliseconds."""
    max_queue: int = 64
    """Requests that may be waiting; more are refused with status 503."""
    max_pixels: int = 2**25
    """Largest image, height x width."""
    max_bytes: int = 32 * 2**20
    """Largest body of a request."""
    timeout: float = 60.0
    """Seconds within which a body must arrive, and within which its answer must be ready."""
    allow_origin: tuple[str, ...] = ()
    """Origin of web pages that may use the service, such as https://example.org; may be repeated."""
    label_studio_files: str | None = None
    """Folder that Label Studio serves as local files (LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT)."""
    label_studio_media: str | None = None
    """Folder of Label Studio's uploads, which has the folder `upload`."""


@dataclass(frozen=True, kw_only=True)
class ServiceOptions(ServiceSettings):
    """Options of the service; `maskwright serve` has an option for each."""

    models: dict[str, str]
    """Checkpoint, exported file, folder or published model, by the name in the URL."""
    token: str | None = field(default=None, repr=False)
    """Clients must send it; None is no token."""
    allow_open: bool = False
    """Listen on any address without a token."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check(self) -> None:
        """Check values and security.

        Raises:
            MaskwrightError: a value is out of range, or the service would be open to other machines without a token.
        """
        smallest = {"max_batch": 1, "max_wait_ms": 0, "max_queue": 1, "max_pixels": 1, "max_bytes": 1, "port": 0}
        for name, limit in smallest.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise MaskwrightError(f"found {value}, expected at least {limit}", where=_flag(name))
        if self.port > 65535:
            raise MaskwrightError(f"found {self.port}, expected 0..65535", where="--port")
        if self.timeout <= 0:
            raise MaskwrightError(f"found {self.timeout:g}, expected more than 0", where="--timeout")
        for name in ("label_studio_files", "label_studio_media"):
            folder = getattr(self, name)
            if folder is not None and not os.path.isdir(folder):
                raise MaskwrightError(f"{folder} is not a folder", where=_flag(name))
        if self.max_pixels > MAX_PIXELS:
            raise MaskwrightError(f"found {self.max_pixels:,}, expected at most {MAX_PIXELS:,}", where="--max-pixels")
        if self.token is not None and (not self.token.isascii() or not self.token.isprintable() or not self.token):
            raise MaskwrightError("is empty, or has characters other than printable ASCII", where="--token")
        if not self.is_loopback and self.token is None and not self.allow_open:
            raise MaskwrightError(
                f"{self.host} can be reached from other machines, and there is no token",
                where="--host",
                remedy="set MASKWRIGHT_TOKEN or --token, or add --no-token to let anybody use the service",
            )


def name_models(models: tuple[str, ...]) -> dict[str, str]:
    """Return the source of each model by its name: NAME=SOURCE, or a source whose name is its stem.

    Raises:
        MaskwrightError: there is no model, two have one name, or a name does not fit into a URL.
    """
    if not models:
        raise MaskwrightError("no model to serve", remedy="name checkpoints, as FILE or NAME=FILE")
    named: dict[str, str] = {}
    for item in models:
        name, separator, source = item.partition("=")
        if not separator or Path(item).exists():
            name, source = _stem(item), item
        if not name.isascii() or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise MaskwrightError(
                "a model's name may have only letters, digits, '-', '_' and '.'", where=item, remedy="use NAME=FILE"
            )
        if name in named:
            raise MaskwrightError(f"two models have the name {name}", where=item, remedy="use NAME=FILE")
        named[name] = source
    return named


def _stem(source: str) -> str:
    """Return the name without the suffix of a weight file or an exported file."""
    path = Path(source)
    return path.stem if path.suffix in _SUFFIXES else path.name


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
