"""Images as 8-bit arrays and PNG files, and files that appear whole."""

from __future__ import annotations

import os
import stat

import numpy as np
import pytest
import torch
from PIL import Image

from fastddim import files, images


@pytest.fixture
def batch():
    return np.random.default_rng(0).integers(0, 256, (5, 3, 4, 1), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_to_uint8_rounds_to_the_nearest_level(dtype):
    x = torch.linspace(-1.2, 1.2, 4002, dtype=torch.float64).to(dtype)
    levels = images.to_uint8(x.reshape(2, 3, 23, 29)).transpose(0, 3, 1, 2).ravel()
    exact = (x.double().clamp(-1, 1) + 1) * 127.5
    assert np.abs(levels - exact.numpy()).max() <= 0.5


def test_to_uint8_puts_channels_last():
    x = torch.full((2, 3, 4, 5), -1.0)
    x[1, 2, 3, 4] = 1.0
    assert np.argwhere(images.to_uint8(x)).tolist() == [[1, 3, 4, 2]]


def test_to_uint8_clamps_infinity():
    x = torch.tensor([-torch.inf, torch.inf]).reshape(1, 1, 1, 2)
    assert images.to_uint8(x).ravel().tolist() == [0, 255]


def test_to_uint8_names_the_image_with_a_nan():
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 1, 0] = torch.nan
    with pytest.raises(ValueError, match="expected no NaN, got one in image 1"):
        images.to_uint8(x)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 2, 2), ValueError, r"\[N, C, H, W\], got shape \(1, 2, 2\)"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int64), TypeError, "got torch.int64"),
        (np.zeros((1, 1, 2, 2)), TypeError, "expected a floating-point tensor, got float64"),
    ],
)
def test_to_uint8_refuses(x, error, message):
    with pytest.raises(error, match=f"x: .*{message}"):
        images.to_uint8(x)


def test_from_uint8_is_the_inverse():
    levels = np.arange(256, dtype=np.uint8).reshape(2, 8, 4, 4)
    x = images.from_uint8(levels)
    assert (x.shape, x.dtype) == ((2, 4, 8, 4), torch.float32)
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    assert np.array_equal(images.to_uint8(x), levels)


def test_from_uint8_refuses():
    with pytest.raises(TypeError, match="images: expected a uint8 array, got float64"):
        images.from_uint8(np.zeros((1, 2, 2, 1)))
    with pytest.raises(ValueError, match=r"images: expected \[N, H, W, C\], got shape \(2, 2\)"):
        images.from_uint8(np.zeros((2, 2), dtype=np.uint8))


def test_grid_fills_rows_and_leaves_the_background(batch):
    sheet = images.grid(batch, 3, padding=1, background=7)
    assert sheet.shape == (2 * 4 + 1, 3 * 5 + 1, 1)
    expected = np.full_like(sheet, 7)
    for i, image in enumerate(batch):
        top, left = 1 + i // 3 * 4, 1 + i % 3 * 5
        expected[top : top + 3, left : left + 4] = image
    assert np.array_equal(sheet, expected)


def test_grid_enlarges_pixels(batch):
    sheet = images.grid(batch[:1], scale=3, padding=0)
    assert np.array_equal(sheet, np.kron(batch[0], np.ones((3, 3, 1), dtype=np.uint8)))


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (9, 3, 3)])
def test_grid_is_about_square(count, rows, columns):
    sheet = images.grid(np.zeros((count, 2, 2, 3), dtype=np.uint8), padding=0)
    assert sheet.shape == (2 * rows, 2 * columns, 3)


def test_grid_is_no_wider_than_its_images(batch):
    assert images.grid(batch, 100, padding=0).shape == (3, 20, 1)


@pytest.mark.parametrize("name", ["columns", "scale", "padding"])
def test_grid_refuses(batch, name):
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= .*, got -1"):
        images.grid(batch, **{name: -1})


def test_grid_of_nothing_is_refused(batch):
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        images.grid(batch[:0])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    images.save_png(tmp_path / "a.png", image)
    assert np.array_equal(images.load_png(tmp_path / "a.png", (channels, 5, 7)), image)
    with Image.open(tmp_path / "a.png") as file:
        assert (file.format, file.mode) == ("PNG", {1: "L", 3: "RGB"}[channels])


def test_save_png_refuses_other_channels(tmp_path):
    with pytest.raises(ValueError, match=r"x: expected 1 \(grey\) or 3 \(RGB\) channels, got 4"):
        images.save_png(tmp_path / "a.png", np.zeros((2, 2, 4), dtype=np.uint8))
    assert not list(tmp_path.iterdir())


def test_load_png_converts_grey_and_colour(tmp_path):
    Image.new("RGB", (3, 2), (90, 90, 90)).save(tmp_path / "rgb.png")
    Image.new("RGBA", (3, 2), (1, 2, 3, 0)).save(tmp_path / "rgba.png")
    Image.new("1", (3, 2), 1).save(tmp_path / "bits.png")
    assert (images.load_png(tmp_path / "rgb.png", (1, 2, 3)) == 90).all()
    assert (images.load_png(tmp_path / "rgba.png", (3, 2, 3)) == (1, 2, 3)).all()
    assert (images.load_png(tmp_path / "bits.png", (3, 2, 3)) == 255).all()


def test_load_png_refuses_what_does_not_fit(tmp_path):
    Image.new("L", (3, 2)).save(tmp_path / "a.png")
    Image.new("I;16", (3, 2)).save(tmp_path / "deep.png")
    Image.new("L", (3, 2)).save(tmp_path / "jpeg.png", format="JPEG")
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:45])
    for name, shape, message in (
        ("a.png", (1, 3, 2), "expected an image of 2x3 pixels, got 3x2"),
        ("a.png", (2, 2, 3), "shape: expected 1 or 3 channels, got 2"),
        ("deep.png", (1, 2, 3), "expected 8 bits a channel, got mode I;16"),
        ("jpeg.png", (1, 2, 3), "expected a PNG image"),
        ("text.png", (1, 2, 3), "expected a PNG image"),
        ("cut.png", (1, 2, 3), "expected a PNG image"),
    ):
        with pytest.raises(ValueError, match=message):
            images.load_png(tmp_path / name, shape)
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        images.load_png(tmp_path / "missing.png", (1, 2, 3))


def test_atomic_file_keeps_its_name_back_until_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_atomic_file_leaves_nothing_of_an_interrupted_write(tmp_path, error):
    kept, never = tmp_path / "kept.txt", tmp_path / "never.txt"
    kept.write_text("old")

    def write_half(path):
        with files.atomic_file(path) as file:
            file.write(b"half")
            raise error

    for path in (kept, never):
        with pytest.raises(error):
            write_half(path)
    assert kept.read_text() == "old"
    assert list(tmp_path.iterdir()) == [kept]


def test_atomic_file_has_the_permissions_of_any_new_file(tmp_path):
    with files.atomic_file(tmp_path / "a.txt"):
        pass
    (tmp_path / "b.txt").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_atomic_file_follows_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder/target")
    with files.atomic_file(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder/target").read_text() == "new"


def test_atomic_file_replaces_ordinary_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="expected an ordinary file"):
            files.check_writable(path)
    assert (tmp_path / "pipe").is_fifo()


def test_check_writable_says_why_not_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot be written: .*missing/a\.png"):
        files.check_writable(tmp_path / "missing/a.png")
    files.check_writable(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def frames_of(path):
    with Image.open(path) as file:
        assert (file.format, file.info["loop"]) == ("GIF", 0)
        shown = []
        for i in range(file.n_frames):
            file.seek(i)
            pixels = np.array(file.convert("RGB"), dtype=np.uint8)
            shown.append((pixels, file.info["duration"]))
    return shown


def test_save_png_writes_a_tensor_as_it_is(tmp_path):
    x = torch.linspace(-1.2, 1.2, 60).reshape(3, 4, 5)
    images.save_png(tmp_path / "a.png", x)
    assert np.array_equal(
        images.load_png(tmp_path / "a.png", (3, 4, 5)), images.to_uint8(x[None])[0]
    )


@pytest.mark.parametrize("levels", [False, True])
def test_save_png_writes_several_as_a_grid(tmp_path, levels):
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = images.to_uint8(x) if levels else x
    images.save_png(tmp_path / "a.png", given)
    sheet = images.grid(images.to_uint8(x), scale=8)
    assert np.array_equal(images.load_png(tmp_path / "a.png", (1, *sheet.shape[:2])), sheet)
    images.save_png(tmp_path / "a.png", given, columns=5, scale=1)
    sheet = images.grid(images.to_uint8(x), 5)
    assert np.array_equal(images.load_png(tmp_path / "a.png", (1, *sheet.shape[:2])), sheet)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(8, 8), ValueError, r"\[C, H, W\] or \[B, C, H, W\], got shape \(8, 8\)"),
        (torch.zeros(4, 8, 8), ValueError, r"1 \(grey\) or 3 \(RGB\) channels, got 4"),
        (torch.full((1, 2, 2), torch.nan), ValueError, "no NaN"),
        (
            torch.zeros(1, 8, 8, dtype=torch.uint8),
            TypeError,
            r"a floating-point tensor .* in \[-1, 1\], or a uint8 array .*, got torch.uint8",
        ),
        (np.zeros((8, 8, 1)), TypeError, ".* got float64"),
        (np.zeros((8, 8), dtype=np.uint8), ValueError, r"\[H, W, C\] or \[B, H, W, C\], got"),
    ],
)
def test_save_png_refuses(tmp_path, x, error, message):
    with pytest.raises(error, match=f"x: expected {message}"):
        images.save_png(tmp_path / "a.png", x)
    assert not list(tmp_path.iterdir())


def test_png_holds_text(tmp_path):
    text = {"seed": "7", "model": "müller/χ.safetensors", "long": "x" * 5000}
    images.save_png(tmp_path / "a.png", torch.zeros(1, 2, 2), text=text)
    assert images.read_text(tmp_path / "a.png") == text
    images.save_png(tmp_path / "a.png", torch.zeros(1, 2, 2))
    assert images.read_text(tmp_path / "a.png") == {}
    (tmp_path / "b.png").write_text("text")
    with pytest.raises(ValueError, match=r"b\.png: expected a PNG image"):
        images.read_text(tmp_path / "b.png")


@pytest.mark.parametrize("levels", [False, True])
def test_gif_shows_each_state_of_grey_images_exactly(tmp_path, levels):
    states = torch.randn(4, 6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = np.stack([images.to_uint8(x) for x in states])
    images.save_gif(tmp_path / "a.gif", drawn if levels else states, columns=3, scale=2)
    shown = frames_of(tmp_path / "a.gif")
    assert [duration for _, duration in shown] == [80, 80, 80, 2000]
    for (pixels, _), batch in zip(shown, drawn, strict=True):
        sheet = images.grid(batch, 3, scale=2)
        assert np.array_equal(pixels, sheet.repeat(3, axis=2))


def test_gif_of_one_image_has_no_frame_around_it(tmp_path):
    states = torch.linspace(-1, 1, 3).reshape(3, 1, 1, 1).expand(3, 1, 8, 8)
    images.save_gif(tmp_path / "a.gif", states, frame_ms=200, last_ms=500)
    shown = frames_of(tmp_path / "a.gif")
    assert [(pixels.shape, duration) for pixels, duration in shown] == [
        ((64, 64, 3), 200),
        ((64, 64, 3), 200),
        ((64, 64, 3), 500),
    ]
    assert [pixels.max() for pixels, _ in shown] == [0, 128, 255]


def test_gif_of_colour_has_the_colours_of_each_frame(tmp_path):
    """A GIF of colour has the colours of each frame: two frames of 256 colours each, which have
    none in common.
    """
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    red, blue = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    red[..., 0], blue[..., 2] = levels, levels
    images.save_gif(tmp_path / "a.gif", np.stack([red, blue]), scale=1)
    (first, _), (second, _) = frames_of(tmp_path / "a.gif")
    assert np.abs(first.astype(int) - red).max() <= 1
    assert np.abs(second.astype(int) - blue).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame_ms": 25}, r"frame_ms: expected a multiple of 10 in \[20, 60000\], got 25"),
        ({"last_ms": 0}, "last_ms: expected a multiple of 10"),
        ({"scale": 0}, "scale: expected an integer >= 1, got 0"),
    ],
)
def test_gif_refuses_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        images.save_gif(tmp_path / "a.gif", torch.zeros(2, 1, 4, 4), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("trajectory", "message"),
    [
        (torch.zeros(1, 4, 4), r"expected \[F, C, H, W\] or \[F, B, C, H, W\], got shape"),
        (torch.zeros(0, 1, 4, 4), "expected at least one frame, got none"),
        (torch.zeros(2, 4, 8, 8), r"expected 1 \(grey\) or 3 \(RGB\) channels, got 4"),
    ],
)
def test_gif_refuses_trajectories(tmp_path, trajectory, message):
    with pytest.raises(ValueError, match=f"trajectory: {message}"):
        images.save_gif(tmp_path / "a.gif", trajectory)
    assert not list(tmp_path.iterdir())
