"""ModelViews of furniture models: textured OBJ models rendered from all sides as cut-outs."""

from __future__ import annotations

import ctypes
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import photo_packages
from .icon_sets import PIXELS, Pixels
from .obj_models import Array, MeshPart, make_actor, read_model

VIEWS = 8
SUPERSAMPLING = 3
ELEVATION = (5.0, 40.0)
"""Degrees above the horizon."""
FOCAL_LENGTH = (28.0, 110.0)
"""Millimeters, for a sensor 24 mm high that the bounding sphere of the model fills."""
FRONT = 0.75
"""Fraction of the views from the front half."""
MOST = 12
"""Largest number of models per word."""
NEAR = 0.03
"""Mean difference of premultiplied colors (0 to 1) below which two models of a word count as copies."""
COVERAGE = 0.03
"""Least fraction of the pixels that a model covers."""
THIN = 0.5
"""Shorter over longer side of a view, relative to the default pose, below which a pose is sampled again."""
EXPOSURE = 1.2
"""Factor of all colors, which makes white materials (0.8 by default) look white."""
EXCLUDED = {
    "Oriental rug": "its texture is not in the catalog",
    "Pedestrian railing": "the bars in its texture blur into a panel",
    "Wood bank": "has no texture coordinates, and renders black",
}
"""Name of a model -> why it is excluded."""


@dataclass(frozen=True)
class ModelViews:
    """Models seen from several sides: `rgba` (n, views, 128, 128, 4), and the caption word and the name of each model."""

    rgba: Pixels
    words: list[str]
    names: list[str]


@dataclass(frozen=True)
class Pose:
    """A camera (angles in degrees, 0 azimuth looks at the front) and a light, whose direction is relative to the camera."""

    azimuth: float = 30.0
    elevation: float = 20.0
    focal_length: float = 50.0
    light: tuple[float, float, float] = (-0.5, 1.0, 1.0)
    ambient: float = 0.45

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Pose:
        """A random pose; the light comes from in front and above."""
        side = rng.uniform(-90, 90) + 180 * (rng.random() >= FRONT)
        focal_length = np.exp(rng.uniform(*np.log(FOCAL_LENGTH)))
        light = (rng.uniform(-1.2, 1.2), rng.uniform(0.3, 1.3), 1.0)
        return cls(side, rng.uniform(*ELEVATION), float(focal_length), light, rng.uniform(0.35, 0.55))


class Studio:
    """An offscreen renderer of models.

    Needs vtk and one of the libraries that it renders with when there is no display: EGL or OSMesa, both of Mesa (Debian:
    libegl1 with libgl1-mesa-dri, or libosmesa6).

    Raises:
        RuntimeError: Neither library can be loaded.
    """

    def __init__(self, pixels: int = PIXELS) -> None:
        import vtkmodules.vtkRenderingOpenGL2  # noqa: F401 (registers the window)
        from vtkmodules.vtkCommonCore import vtkObject
        from vtkmodules.vtkRenderingCore import vtkLight, vtkRenderer, vtkRenderWindow

        vtkObject.GlobalWarningDisplayOff()  # a warning that there is no display
        self.pixels = pixels
        self.window: Any = vtkRenderWindow()
        if self.window.IsA("vtkOSOpenGLRenderWindow") and not _has_osmesa():  # VTK would crash
            raise RuntimeError("turntable: no OpenGL without a display; install libegl1 and libgl1-mesa-dri, or libosmesa6")
        self.window.SetOffScreenRendering(True)
        self.window.SetSize(SUPERSAMPLING * pixels, SUPERSAMPLING * pixels)
        self.window.SetMultiSamples(0)
        self.window.SetAlphaBitPlanes(True)
        self.renderer = vtkRenderer()
        self.renderer.SetBackground(0, 0, 0)
        self.renderer.SetBackgroundAlpha(0)
        self.renderer.SetAutomaticLightCreation(False)
        self.renderer.SetUseDepthPeeling(True)
        self.renderer.SetMaximumNumberOfPeels(6)
        self.window.AddRenderer(self.renderer)
        self.light = vtkLight()
        self.light.SetLightTypeToCameraLight()
        self.renderer.AddLight(self.light)

    def place(self, parts: Sequence[MeshPart]) -> None:
        """Replaces the model in the scene."""
        self.renderer.RemoveAllViewProps()
        self.actors = [make_actor(part) for part in parts]
        for actor in self.actors:
            self.renderer.AddActor(actor)
        used = np.unique(np.concatenate([part.index.ravel() for part in parts]))
        self.points = parts[0].vertices[used]
        self.center = (self.points.min(0) + self.points.max(0)) / 2
        self.radius = float(np.linalg.norm(self.points - self.center, axis=1).max())

    def frame(self, pose: Pose) -> tuple[float, Array, Array]:
        """Distance of the camera, and the corners (2,) of the image of the model in units of the focal length."""
        distance = self.radius * float(np.hypot(1, pose.focal_length / 12))
        right, up, back = axes(pose)
        offset = self.points - self.center
        image = offset @ np.stack([right, up], 1) / (distance - offset @ back)[:, None]
        return distance, image.min(0), image.max(0)

    def shoot(self, pose: Pose) -> Pixels:
        """The model in this pose, RGBA (pixels, pixels, 4), cropped to the model and centered in a square."""
        from vtkmodules.util.numpy_support import vtk_to_numpy
        from vtkmodules.vtkCommonCore import vtkUnsignedCharArray

        distance, low, high = self.frame(pose)
        half = 1.02 * float((high - low).max()) / 2
        camera = self.renderer.GetActiveCamera()
        camera.SetFocalPoint(*self.center)
        camera.SetPosition(*(self.center + distance * axes(pose)[2]))
        camera.SetViewUp(0, 1, 0)
        camera.SetViewAngle(2 * np.degrees(np.arctan(half)))
        camera.SetWindowCenter(*((low + high) / 2 / half))
        camera.SetClippingRange(distance - 1.01 * self.radius, distance + 1.01 * self.radius)
        self.light.SetPosition(*pose.light)
        for actor in self.actors:
            actor.GetProperty().SetAmbient(pose.ambient)
            actor.GetProperty().SetDiffuse(1.05 - pose.ambient)
        self.window.Render()
        side = SUPERSAMPLING * self.pixels
        values = vtkUnsignedCharArray()
        self.window.GetRGBACharPixelData(0, 0, side - 1, side - 1, 0, values)
        return _cut_out(vtk_to_numpy(values).reshape(side, side, 4)[::-1], self.pixels)


def _has_osmesa() -> bool:
    for version in ("8", "6"):
        try:
            ctypes.CDLL(f"libOSMesa.so.{version}")
        except OSError:
            continue
        return True
    return False


def axes(pose: Pose) -> Array:
    """The right, up and backward axis of the camera."""
    azimuth, elevation = np.radians([pose.azimuth, pose.elevation])
    right = [np.cos(azimuth), 0, -np.sin(azimuth)]
    back = [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
    return np.stack([right, np.cross(back, right), back])


def _cut_out(premultiplied: Pixels, side: int) -> Pixels:
    rows, columns = (np.flatnonzero((premultiplied[..., 3] > 16).any(axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros((side, side, 4), np.uint8)
    part = premultiplied[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = part.shape[:2]
    square = np.zeros((max(height, width),) * 2 + (4,), np.uint8)
    top, left = (len(square) - height) // 2, (len(square) - width) // 2
    square[top : top + height, left : left + width] = np.minimum(part, part[..., 3:])
    image = Image.frombuffer("RGBa", square.shape[1::-1], square.tobytes(), "raw", "RGBa", 0, 1)
    view = np.array(image.resize((side, side), Image.Resampling.BOX).convert("RGBA"))
    view[..., :3] = expose(view[..., :3])
    return view


def expose(color: Pixels) -> Pixels:
    """Colors times `EXPOSURE`."""
    return np.minimum(EXPOSURE * np.arange(256) + 0.5, 255).astype(np.uint8)[color]


def poses(studio: Studio, rng: np.random.Generator, count: int = VIEWS) -> list[Pose]:
    """Random poses of the current model, without edge-on poses of flat models."""
    least = THIN * _slimness(studio, Pose())
    sampled: list[Pose] = []
    while len(sampled) < count:
        pose = Pose.sample(rng)
        if _slimness(studio, pose) >= least:
            sampled.append(pose)
    return sampled


def _slimness(studio: Studio, pose: Pose) -> float:
    """Shorter over longer side of the image of the model."""
    _, low, high = studio.frame(pose)
    return float((high - low).min() / (high - low).max())


def render(debian: Path, catalogs: Sequence[str] = photo_packages.CATALOGS, seed: int = 0) -> Iterator[tuple[str, str, Pixels]]:
    """Word, name and images (1 + views, 128, 128, 4) of every model; the first image has the default pose."""
    studio = Studio()
    for catalog in catalogs:
        with zipfile.ZipFile(debian / f"sweethome3d-furniture/usr/share/sweethome3d/furniture/{catalog}.sh3f") as archive:
            for entry in photo_packages.catalog(archive):
                if entry["name"] in EXCLUDED:
                    continue
                folder = entry["model"].rpartition("/")[0] + "/"
                files = {path: archive.read(path) for path in archive.namelist() if path.startswith(folder)}
                studio.place(read_model(files, entry["model"], entry.get("modelRotation", "")))
                rng = np.random.default_rng((seed, zlib.crc32(entry["model"].encode())))
                images = [studio.shoot(pose) for pose in (Pose(), *poses(studio, rng))]
                yield entry["word"], entry["name"], np.stack(images)


def choose(words: Sequence[str], images: Pixels) -> list[int]:
    """Indices of the models to keep, selected by their images (n, 128, 128, 4) in one pose; see `COVERAGE`, `MOST`, `NEAR`."""
    features = np.stack([_feature(image) for image in images])
    visible = images[..., 3].mean((1, 2)) > 255 * COVERAGE
    kept: list[int] = []
    for word in dict.fromkeys(words):
        rows = [i for i in range(len(words)) if visible[i] and words[i] == word]
        distance = np.full(len(rows), np.inf)
        for _ in range(min(MOST, len(rows))):
            if distance.max() < NEAR:
                break
            best = int(distance.argmax())
            kept.append(rows[best])
            distance = np.minimum(distance, np.abs(features[rows] - features[rows[best]]).mean(1))
    return sorted(kept)


def _feature(image: Pixels) -> Array:
    """Premultiplied colors (0 to 1) at a quarter of the resolution."""
    color = image / 255
    color[..., :3] *= color[..., 3:]
    side = len(image) // 4
    return np.asarray(color.reshape(side, 4, side, 4, 4).mean((1, 3)).ravel())


def load(modules: Path, cache: Path) -> ModelViews:
    """ModelViews of the furniture models; kept in `cache` (an .npz). `modules` as for `photo_packages.load`."""
    if not cache.is_file():
        save(list(render(photo_packages.fetch(modules.parent))), cache)
    saved = np.load(cache)
    return ModelViews(saved["rgba"], [str(word) for word in saved["words"]], [str(name) for name in saved["names"]])


def save(models: Sequence[tuple[str, str, Pixels]], cache: Path) -> None:
    """Saves the selected models of `render`."""
    words, names, images = zip(*models, strict=True)
    kept = choose(words, np.stack([image[0] for image in images]))
    rgba = np.stack([images[i][1:] for i in kept])
    np.savez(cache, rgba=rgba, words=np.array(words)[kept], names=np.array(names)[kept])
