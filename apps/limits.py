"""Everything that bounds what a visitor may send and ask for, in one place."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits of the app; what goes beyond is refused with a message that names the limit.

    Args:
        photos: pictures of one training job. `photo_bytes`: of one picture's file. `photo_pixels`: width × height of one picture.
        file_bytes: of one uploaded file: an adapter, or a zip of a dataset; and of all files that are uploaded at once.
        request_bytes: of any other request. `logins`: tries to log in, of all visitors, in a minute.
        disk_free: bytes that uploads leave free on the disk.
        adapter_files: adapters that one user keeps.
        zip_files: pictures in a zip. `zip_bytes`: of all of them unpacked. `zip_depth`: folders above a picture.
        drawings: sketches that are sent but not yet used, of all visitors. `drawing_bytes`: of one. `layers`: of one.
        text: characters of a prompt, a caption or a name.
        adapters: at once on one picture.
        pictures: of one request. `side`: of a picture, in pixels. `steps`: of drawing one.
        epochs: of teaching a classifier. `batch`: pictures in one of its steps.
        check_seconds: of a look at a run before it starts.
        waiting: requests for pictures that wait for their turn. `jobs`: training jobs of one user that wait for theirs.
        sessions: open pages whose values are remembered, of all visitors; each takes about 1 MiB. Those used longest ago go.
    """

    photos: int = 64
    photo_bytes: int = 32 * MIB
    photo_pixels: int = 50_000_000
    file_bytes: int = 1024 * MIB
    request_bytes: int = 1 * MIB
    logins: int = 60
    disk_free: int = 2048 * MIB
    adapter_files: int = 100
    zip_files: int = 10_000
    zip_bytes: int = 2048 * MIB
    zip_depth: int = 6
    drawings: int = 64
    drawing_bytes: int = 8 * MIB
    layers: int = 8
    text: int = 1000
    adapters: int = 8
    pictures: int = 16
    side: int = 1024
    steps: int = 100
    epochs: int = 1000
    batch: int = 512
    check_seconds: int = 300
    waiting: int = 64
    jobs: int = 8
    sessions: int = 64


LIMITS = Limits()
