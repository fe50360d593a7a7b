"""Reading of textured OBJ models, and conversion for VTK."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .icon_sets import Pixels

CREASE = 50.0
"""Angle between faces in degrees above which their edge is rendered sharp instead of smooth."""

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MeshPart:
    """The triangles of one material: `index` (m, 3) into `vertices` (n, 3), texture coordinates `uv` (m, 3, 2), surface."""

    vertices: Array
    index: Indices
    uv: Array
    color: tuple[float, float, float]
    opacity: float
    texture: Pixels | None


def read_model(files: Mapping[str, bytes], path: str, rotation: str = "") -> list[MeshPart]:
    """The parts of an OBJ model.

    Args:
        files: The model, its MTL files and its textures, by path.
        path: The OBJ file, whose indices must be absolute.
        rotation: Turns the model upright and to the front: a 3x3 matrix, row by row.
    """
    text = files[path].replace(b"\r", b"")
    vertices = _numbers(re.findall(rb"^v\s+(\S+\s+\S+\s+\S+)", text, re.MULTILINE)).reshape(-1, 3)
    if rotation:
        vertices = vertices @ np.array(rotation.split(), float).reshape(3, 3).T
    uv = np.append(_numbers(re.findall(rb"^vt\s+(\S+\s+\S+)", text, re.MULTILINE)), [0, 0]).reshape(-1, 2)
    materials: dict[str, dict[str, Any]] = {}
    for library in re.findall(rb"^mtllib\s+(.*?)\s*$", text, re.MULTILINE):
        materials |= read_materials(files, path.rpartition("/")[0], library.decode("latin-1"))
    faces: dict[str, list[Indices]] = defaultdict(list)
    pieces = re.split(rb"^usemtl\b[ \t]*(.*?)\s*$", text, flags=re.MULTILINE)
    for name, piece in zip([b"", *pieces[1::2]], pieces[::2], strict=True):
        if lines := re.findall(rb"^f\s+(.*?)\s*$", piece, re.MULTILINE):
            faces[name.decode("latin-1")].append(_triangles(lines))
    same = _merge(vertices)
    default: dict[str, Any] = {"color": (0.8, 0.8, 0.8), "opacity": 1.0, "texture": None}
    parts = []
    for name, triangles in faces.items():
        index = np.concatenate(triangles)
        surface = default | materials.get(name, {})
        parts.append(MeshPart(vertices, same[index[..., 0]], uv[index[..., 1]], **surface))
    return parts


def _numbers(texts: Sequence[bytes]) -> Array:
    return np.fromstring(b" ".join(texts).decode("latin-1"), sep=" ")


def _triangles(lines: Sequence[bytes]) -> Indices:
    """Faces as fans of triangles (m, 3, 2): indices from 0 of the vertex and the texture coordinate (-1: none)."""
    text = b"\n".join(lines).replace(b"//", b"/0/")
    counts = np.array([len(line.split()) for line in lines])
    if text.count(b"/") != 2 * counts.sum():
        text = re.sub(rb"(?<!\S)(\d+)(?!\S)", rb"\1/0", text)
        text = re.sub(rb"(?<!\S)(\d+/\d+)(?!\S)", rb"\1/0", text)
    corners = _numbers([text.replace(b"/", b" ")]).astype(np.int64).reshape(-1, 3)[:, :2] - 1
    fans = np.maximum(counts - 2, 0)
    first = np.repeat(np.cumsum(counts) - counts, fans)
    step = np.arange(fans.sum()) - np.repeat(np.cumsum(fans) - fans, fans)
    return corners[np.stack([first, first + step + 1, first + step + 2], 1)]


def _merge(vertices: Array) -> Indices:
    """For every vertex the index of the first one at the same position."""
    bits = np.ascontiguousarray(vertices, np.float32).view(np.uint32).astype(np.uint64)
    keys = (
        (bits[:, 0] * np.uint64(0x9E3779B97F4A7C15))
        ^ (bits[:, 1] * np.uint64(0xC2B2AE3D27D4EB4F))
        ^ (bits[:, 2] << np.uint64(17))
    )
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], np.int64)


def read_materials(files: Mapping[str, bytes], folder: str, library: str) -> dict[str, dict[str, Any]]:
    """Material -> color, opacity and texture, whose colors stand instead of the material's; empty if the file is missing."""
    materials: dict[str, dict[str, Any]] = {}
    current: dict[str, Any] = {}
    for line in files.get(f"{folder}/{library}", b"").decode("latin-1").splitlines():
        key, _, rest = line.strip().partition(" ")
        if key == "newmtl":
            current = materials.setdefault(rest.strip(), {})
        elif key == "Kd":
            current["color"] = tuple(float(value) for value in rest.split()[:3])
        elif key == "d":
            current["opacity"] = float(rest.split()[-1])
        elif key == "map_Kd" and f"{folder}/{rest.strip()}" in files:
            with Image.open(io.BytesIO(files[f"{folder}/{rest.strip()}"])) as image:
                texture = image.convert("RGBA")
            texture.thumbnail((512, 512))
            current["texture"] = np.asarray(texture)
    return materials


def make_actor(part: MeshPart) -> Any:
    """A vtkActor of the part; a texture replaces its color."""
    from vtkmodules.util.numpy_support import numpy_to_vtk
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkRenderingCore import vtkActor, vtkPolyDataMapper, vtkTexture

    mapper = vtkPolyDataMapper()
    mapper.SetInputData(_mesh(part))
    actor = vtkActor()
    actor.SetMapper(mapper)
    surface = actor.GetProperty()
    surface.SetColor(*(part.color if part.texture is None else (1, 1, 1)))
    surface.SetOpacity(part.opacity)
    surface.SetSpecular(0.12)
    surface.SetSpecularPower(24)
    if part.texture is not None:
        height, width = part.texture.shape[:2]
        image = vtkImageData()
        image.SetDimensions(width, height, 1)
        opaque = bool((part.texture[..., 3] == 255).all())
        values = np.ascontiguousarray(part.texture[::-1, :, : 3 if opaque else 4]).reshape(width * height, -1)
        image.GetPointData().SetScalars(numpy_to_vtk(values, deep=True))
        texture = vtkTexture()
        texture.SetInputData(image)
        texture.SetRepeat(True)
        texture.SetInterpolate(True)
        texture.SetMipmap(True)
        actor.SetTexture(texture)
    return actor


def _mesh(part: MeshPart) -> Any:
    """Triangles with their own corners; normals are smooth over edges below `CREASE`."""
    from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray, vtk_to_numpy
    from vtkmodules.vtkCommonCore import vtkPoints
    from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkPolyData
    from vtkmodules.vtkFiltersCore import vtkPolyDataNormals

    def triangles(vertices: Array, index: Indices) -> Any:
        points, cells, mesh = vtkPoints(), vtkCellArray(), vtkPolyData()
        points.SetData(numpy_to_vtk(np.ascontiguousarray(vertices, np.float32), deep=True))
        cells.SetData(3, numpy_to_vtkIdTypeArray(index.astype(np.int64).ravel(), deep=True))
        mesh.SetPoints(points)
        mesh.SetPolys(cells)
        return mesh

    used, index = np.unique(part.index, return_inverse=True)
    smooth = vtkPolyDataNormals()
    smooth.SetInputData(triangles(part.vertices[used], index))
    smooth.SetFeatureAngle(CREASE)
    smooth.SetConsistency(False)
    smooth.Update()
    split = smooth.GetOutput()
    corner = vtk_to_numpy(split.GetPolys().GetConnectivityArray())
    normals = vtk_to_numpy(split.GetPointData().GetNormals())[corner]
    mesh = triangles(part.vertices[part.index.ravel()], np.arange(len(corner)))
    mesh.GetPointData().SetNormals(numpy_to_vtk(normals, deep=True))
    mesh.GetPointData().SetTCoords(numpy_to_vtk(np.ascontiguousarray(part.uv.reshape(-1, 2), np.float32), deep=True))
    return mesh
