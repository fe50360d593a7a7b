"""Views of rendered models: positions and colors in the image, seeds, and selection of models."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from veneer.base_models.pretraining.data import obj_models, photo_packages, rendered_models
from veneer.base_models.pretraining.data.icon_sets import Pixels

LOW, HIGH = np.array([1.0, -2.0, 0.5]), np.array([3.0, -1.0, 1.3])
QUADRANTS = np.array([[[220, 40, 40], [40, 220, 40]], [[40, 40, 220], [220, 220, 40]]], np.uint8)
"""Colors of the texture, the first row at the top (v from 0.5 to 1)."""
MATERIALS = "newmtl paper\nKd 0 0 0\nmap_Kd paper.png\nnewmtl glass\nKd 0.2 0.9 0.2\nd 0.4\n"


def box(material: str = "paper") -> str:
    """A box from LOW to HIGH; every face has the whole texture, u and v along its first and second free axis."""
    corners = [(x, y, z) for x in (LOW[0], HIGH[0]) for y in (LOW[1], HIGH[1]) for z in (LOW[2], HIGH[2])]
    lines = [
        "mtllib box.mtl",
        *("v {:g} {:g} {:g}".format(*corner) for corner in corners),
        "vt 0 0",
        "vt 1 0",
        "vt 1 1",
        "vt 0 1",
    ]
    lines.append(f"usemtl {material}")
    for axis in range(3):
        first, second = (2 ** (2 - free) for free in range(3) if free != axis)
        for side in (0, 2 ** (2 - axis)):
            face = [side, side + first, side + first + second, side + second]
            lines.append("f " + " ".join(f"{vertex + 1}/{k + 1}" for k, vertex in enumerate(face)))
    return "\n".join(lines) + "\n"


def files(model: str) -> dict[str, bytes]:
    png = io.BytesIO()
    Image.fromarray(QUADRANTS.repeat(32, 0).repeat(32, 1)).save(png, "PNG")
    return {"set/box.obj": model.encode(), "set/box.mtl": MATERIALS.encode(), "set/paper.png": png.getvalue()}


@pytest.fixture(scope="module")
def studio() -> rendered_models.Studio:
    pytest.importorskip("vtkmodules", reason="needs vtk")
    try:
        return rendered_models.Studio()
    except RuntimeError as error:
        pytest.skip(str(error))


def cast(pose: rendered_models.Pose, pixels: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Ray casting through the pixels of the cropped view: hits of the box, and their colors."""
    center, radius = (LOW + HIGH) / 2, np.linalg.norm(HIGH - LOW) / 2
    a, e = np.radians([pose.azimuth, pose.elevation])
    turn = np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(e), -np.sin(e)], [0, np.sin(e), np.cos(e)]])
    world_to_camera = tilt @ turn
    distance = radius / np.sin(np.arctan(12 / pose.focal_length))
    corners = np.array([[(LOW, HIGH)[(k >> axis) & 1][axis] for axis in range(3)] for k in range(8)])
    seen = (corners - center) @ world_to_camera.T - [0, 0, distance]
    image = seen[:, :2] / -seen[:, 2:]
    middle, side = (image.min(0) + image.max(0)) / 2, (image.max(0) - image.min(0)).max()
    steps = ((np.arange(pixels) + 0.5) / pixels - 0.5) * side
    x, y = np.meshgrid(middle[0] + steps, middle[1] - steps)
    rays = np.stack([x, y, -np.ones_like(x)], -1) @ world_to_camera
    origin = center + world_to_camera.T @ [0, 0, distance]
    near, far = np.sort([(LOW - origin) / rays, (HIGH - origin) / rays], axis=0)
    hit = near.max(-1) < far.min(-1)
    axis = near.argmax(-1)
    uv = (origin + near.max(-1)[..., None] * rays - LOW) / (HIGH - LOW)
    u = np.where(axis == 0, uv[..., 1], uv[..., 0])
    v = np.where(axis == 2, uv[..., 1], uv[..., 2])
    return hit, QUADRANTS[(v < 0.5).astype(int), (u > 0.5).astype(int)]


@pytest.mark.parametrize("pose", [rendered_models.Pose(), rendered_models.Pose(205, 37, 28), rendered_models.Pose(-70, 6, 105)])
def test_rendered_box_matches_the_projection(studio: rendered_models.Studio, pose: rendered_models.Pose) -> None:
    studio.place(obj_models.read_model(files(box()), "set/box.obj"))
    view = studio.shoot(pose)
    hit, color = cast(pose)
    assert ((view[..., 3] > 127) == hit).mean() > 0.985
    assert set(np.unique(view[..., 3])) - {0, 255}, "edges are anti-aliased"
    inside = hit & (view[..., 3] == 255)
    bright, expected = view[inside][:, :3].astype(float), color[inside].astype(float)
    shade = bright.max(1) / expected.max(1)
    error = np.abs(bright - shade[:, None] * expected).max(1)
    assert (error < 40).mean() > 0.93  # the rest lies on the borders of the quadrants
    assert 0.4 < np.quantile(shade, 0.05) < shade.max() < 1.25


def test_model_rotation(studio: rendered_models.Studio) -> None:
    studio.place(obj_models.read_model(files(box()), "set/box.obj", "0 0 1 0 1 0 -1 0 0"))
    turned = studio.shoot(rendered_models.Pose(azimuth=90))
    studio.place(obj_models.read_model(files(box()), "set/box.obj"))
    assert np.abs(turned.astype(int) - studio.shoot(rendered_models.Pose(azimuth=0))).max() <= 2


def test_transparent_material(studio: rendered_models.Studio) -> None:
    studio.place(obj_models.read_model(files(box("glass")), "set/box.obj"))
    alpha, red, green = (studio.shoot(rendered_models.Pose())[64, 64, k] / 255 for k in (3, 0, 1))
    assert alpha == pytest.approx(1 - 0.6**2, abs=0.03)  # two walls
    assert green > 3 * red > 0


def test_face_formats() -> None:
    head = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
    forms = ("1/1 2/2 3/3 4/4", "1/1/1 2/2/2 3/3/3 4/4/4", "1//1 2//2 3//3 4//4", "1 2 3 4")
    model = head + "".join(f"f {form}\r\n" for form in forms)
    (part,) = obj_models.read_model({"a.obj": model.encode()}, "a.obj")
    assert part.index.tolist() == [[0, 1, 2], [0, 2, 3]] * 4
    quad = [[[0, 0], [1, 0], [1, 1]], [[0, 0], [1, 1], [0, 1]]]
    assert part.uv.tolist() == quad * 2 + [[[0, 0]] * 3] * 4
    assert part.color == (0.8, 0.8, 0.8)


@pytest.fixture
def debian(tmp_path: Path) -> Path:
    for package in photo_packages.DEBIAN:
        (tmp_path / "debian" / package).mkdir(parents=True)
    folder = tmp_path / "debian/sweethome3d-furniture/usr/share/sweethome3d/furniture"
    folder.mkdir(parents=True)
    names = {1: "Box", 2: "Mannequin male"} | dict.fromkeys((3, 4), "Oak box")
    for catalog in photo_packages.CATALOGS:
        entries = names if catalog == "Scopia" else {}
        lines = [f"name#{k}={name}\nicon#{k}=/set/i.png\nmodel#{k}=/set/box.obj" for k, name in entries.items()]
        with zipfile.ZipFile(folder / f"{catalog}.sh3f", "w") as archive:
            archive.writestr("PluginFurnitureCatalog.properties", f"id={catalog}\n" + "\n".join(lines) + "\n")
            for path, content in files(box()).items():
                archive.writestr(path, content)
    return tmp_path / "debian"


@pytest.mark.usefixtures("studio")
def test_views_are_reproducible(debian: Path) -> None:
    (word, name, one), *_ = rendered_models.render(debian, ["Scopia"])
    again, other = (next(rendered_models.render(debian, ["Scopia"], seed))[2] for seed in (0, 1))
    assert (word, name, one.shape) == ("box", "Box", (1 + rendered_models.VIEWS, 128, 128, 4))
    assert np.array_equal(one, again)
    assert np.array_equal(one[0], other[0])  # the default pose
    assert all(not np.array_equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))
    assert len({view.tobytes() for view in one}) == len(one)


@pytest.mark.usefixtures("studio")
def test_loaded_views_are_cached_without_duplicates(debian: Path, tmp_path: Path) -> None:
    views = rendered_models.load(tmp_path / "node_modules", tmp_path / "views.npz")
    assert (views.words, views.names) == (["box"], ["Box"])
    assert views.rgba.shape == (1, rendered_models.VIEWS, 128, 128, 4)
    assert views.rgba.dtype == np.uint8
    again = rendered_models.load(tmp_path / "missing/node_modules", tmp_path / "views.npz")
    assert np.array_equal(again.rgba, views.rgba)


def test_choose_excludes_empty_models_and_duplicates() -> None:
    def square(red: int, side: int = 64) -> Pixels:
        image: Pixels = np.zeros((128, 128, 4), np.uint8)
        image[:side, :side] = (red, 90, 90, 255)
        return image

    images = np.stack([square(0), square(3), square(200), square(9, 8), square(0)])
    assert rendered_models.choose(["box", "box", "box", "box", "cube"], images) == [0, 2, 4]
    crowd = np.stack([square(255 * (k % 2), 32 + 4 * k) for k in range(20)])
    kept = rendered_models.choose(["box"] * 20, crowd)
    assert len(kept) == rendered_models.MOST
    assert {0, 19} <= set(kept)  # the first one and the one most unlike it


def test_poses_of_a_flat_model(studio: rendered_models.Studio) -> None:
    panel = box().replace(f" {HIGH[2]:g}\n", f" {LOW[2] + 0.01:g}\n")
    studio.place(obj_models.read_model(files(panel), "set/box.obj"))
    for pose in rendered_models.poses(studio, np.random.default_rng(3), 12):
        assert abs(np.cos(np.radians(pose.azimuth))) > 0.2
        assert rendered_models.ELEVATION[0] <= pose.elevation <= rendered_models.ELEVATION[1]
