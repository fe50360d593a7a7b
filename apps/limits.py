"""Limits on uploads and requests of users."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits of the app; a request beyond them is rejected with a message that names the limit.

    Args:
        photos: images of one training job. `photo_bytes`: size of one image file. `photo_pixels`: width × height of one image.
        file_bytes: size of one uploaded file (an adapter, or a zip of a dataset), and of all files of one upload.
        request_bytes: size of any other request. `logins`: login attempts per minute over all users.
        disk_free: bytes that uploads must leave free on the disk. `cache_bytes`: of the cache of uploaded and displayed files.
        adapter_files: adapters stored per user.
        zip_files: images in a zip. `zip_bytes`: their total size unpacked. `zip_depth`: maximum path depth of an image.
        table_bytes: size of a table of labels in a zip.
        sketches: uploaded but not yet used, over all users. `sketch_bytes`, `layers`: of one sketch.
        text: characters of a prompt, a caption or a name. `config_text`: of options written as a config file.
        adapters: active at once.
        gallery_images: generated images kept per user. `gallery_bytes`: their total size.
        images: generated per request. `side`: of an image, in pixels. `steps`: sampling steps.
        epochs: of classifier training. `batch`: its batch size.
        check_seconds: timeout of the check before a run.
        waiting: queued generation requests. `jobs`: unfinished training jobs per user.
        sessions: open pages whose state is kept, over all users; each takes about 1 MiB, and the least recently used are dropped.
    """

    photos: int = 64
    photo_bytes: int = 32 * MIB
    photo_pixels: int = 50_000_000
    file_bytes: int = 1024 * MIB
    request_bytes: int = 1 * MIB
    logins: int = 60
    disk_free: int = 2048 * MIB
    cache_bytes: int = 4096 * MIB
    adapter_files: int = 100
    zip_files: int = 10_000
    zip_bytes: int = 2048 * MIB
    zip_depth: int = 6
    table_bytes: int = 16 * MIB
    sketches: int = 64
    sketch_bytes: int = 8 * MIB
    layers: int = 8
    text: int = 1000
    config_text: int = 16_000
    adapters: int = 8
    gallery_images: int = 500
    gallery_bytes: int = 1024 * MIB
    images: int = 16
    side: int = 1024
    steps: int = 100
    epochs: int = 1000
    batch: int = 512
    check_seconds: int = 300
    waiting: int = 64
    jobs: int = 8
    sessions: int = 64


LIMITS = Limits()
