"""Images: the pixels, and every way in which a file can be refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moiie_megatron.data.encode.images import ImageLoader, normalize
from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.families.registry import vision_family
from tests.helpers.user_errors import user_error

MEAN = (0.5, 0.25, 0.75)


def loader(root: Path, size: int = 8, mode: str = "square", **options: int) -> ImageLoader:
    return ImageLoader(root, size, mode, MEAN, **options)  # type: ignore[arg-type]


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_same_size_keeps_the_pixels(tmp_path: Path) -> None:
    pixels = photo(8, 8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for mode in ("square", "pad"):
        loaded = loader(tmp_path, mode=mode).load("a.png")
        assert loaded.dtype == torch.uint8
        assert torch.equal(loaded, torch.from_numpy(pixels).permute(2, 0, 1))


def test_square_is_bicubic(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.fromarray(photo(20, 30)).save(tmp_path / "deep" / "a.png")
    expected = Image.fromarray(photo(20, 30)).resize((8, 8), Image.Resampling.BICUBIC)
    loaded = loader(tmp_path).load("deep/a.png")
    assert np.array_equal(loaded.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_pad_centres_on_the_mean_colour(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 8, 3), 255, np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(np.full((8, 4, 3), 255, np.uint8)).save(tmp_path / "high.png")
    wide = loader(tmp_path, mode="pad").load("wide.png")
    expected = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    for channel, value in enumerate((127, 63, 191)):
        expected[channel, :2] = expected[channel, 6:] = value
    assert torch.equal(wide, expected)
    assert torch.equal(loader(tmp_path, mode="pad").load("high.png"), expected.transpose(1, 2))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(photo(8, 8)).convert(mode)
    name = "a.jpg" if mode == "CMYK" else "a.png"
    image.save(tmp_path / name)
    loaded = loader(tmp_path).load(name)
    with Image.open(tmp_path / name) as again:
        assert np.array_equal(loaded.permute(1, 2, 0).numpy(), np.asarray(again.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = loader(tmp_path).load("a.png")
    assert loaded[2].flatten().tolist() == [4 * i for i in range(64)]
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(BadRecord, match="a.tiff .*floating-point"):
        loader(tmp_path).load("a.tiff")


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise by 90 degrees
    Image.fromarray(photo(8, 8)).save(tmp_path / "a.png", exif=exif)
    expected = np.rot90(photo(8, 8), k=-1)
    assert np.array_equal(loader(tmp_path).load("a.png").permute(1, 2, 0).numpy(), expected)


def test_paths_may_leave_the_root_where_that_is_allowed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.fromarray(photo(8, 8)).save(tmp_path / "a.png")
    (root / "up").symlink_to(tmp_path)
    images = loader(root, allow_outside=True)
    for path in ("up/a.png", "../a.png", str(tmp_path / "a.png")):
        assert images.load(path).shape == (3, 8, 8)
    with pytest.raises(BadRecord, match="does not exist"):
        images.load(str(tmp_path / "b.png"))


def test_paths_stay_inside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    for place in (tmp_path, root / "in"):
        Image.fromarray(photo(8, 8)).save(place / "a.png")
    (root / "out.png").symlink_to(tmp_path / "a.png")
    (root / "up").symlink_to(tmp_path)
    (root / "fine.png").symlink_to(root / "in" / "a.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    images = loader(root)
    assert images.load("fine.png").shape == (3, 8, 8)
    for path, message in [
        ("../a.png", "not a relative path"),
        ("in/../in/a.png", "not a relative path"),
        (str(root / "in" / "a.png"), "not a relative path"),
        ("in/a.png\0", "not a relative path"),
        ("out.png", "a link out of"),
        ("up/a.png", "a link out of"),
        ("none.png", "does not exist"),
        ("in", "does not exist"),
        ("", "does not exist"),
        ("loop.png", "cannot be read|does not exist"),
        ("x" * 5000, "cannot be read"),
    ]:
        with pytest.raises(BadRecord, match=message):
            images.load(path)
    with user_error(tmp_path / "none"):
        loader(tmp_path / "none")


def test_all_images_of_a_sample(tmp_path: Path) -> None:
    for i in range(2):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    images = loader(tmp_path)
    both = images.load_all(["1.png", "0.png"])
    assert both.shape == (2, 3, 8, 8) and both.dtype == torch.uint8
    assert both[:, 0, 0, 0].tolist() == [1, 0]
    assert images.load_all([]).shape == (0, 3, 8, 8)
    with pytest.raises(BadRecord, match="none.png"):
        images.load_all(["1.png", "none.png"])


def test_damaged_files(tmp_path: Path) -> None:
    Image.fromarray(photo(64, 64)).save(tmp_path / "a.jpg")
    Image.fromarray(photo(64, 64)).save(tmp_path / "a.png")
    for name in ("a.jpg", "a.png"):
        whole = (tmp_path / name).read_bytes()
        for keep in (0, 3, 30, len(whole) // 2):
            (tmp_path / f"cut-{name}").write_bytes(whole[:keep])
            with pytest.raises(BadRecord, match=f"image cut-{name} cannot be read"):
                loader(tmp_path).load(f"cut-{name}")
    broken = bytearray((tmp_path / "a.png").read_bytes())
    broken[60:90] = b"\0" * 30
    (tmp_path / "broken.png").write_bytes(broken)
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("broken.png", "page.eps"):
        with pytest.raises(BadRecord, match="cannot be read"):
            loader(tmp_path).load(name)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size; the pixels are not there."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = b"IDAT" + zlib.compress(b"\0" * 99)
    end = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return b"\x89PNG\r\n\x1a\n" + chunk + end


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_decompression_bombs_are_not_decoded(tmp_path: Path, side: int) -> None:
    """PIL warns about the first and raises for the second."""
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    with pytest.raises(BadRecord, match="bomb.png cannot be read .*decompression bomb"):
        loader(tmp_path).load("bomb.png")


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_own_pixel_limit_counts_the_pixels_of_the_picture(tmp_path: Path, mode: str) -> None:
    Image.fromarray(photo(4, 32)).save(tmp_path / "a.png")
    assert loader(tmp_path, mode=mode, max_pixels=128).load("a.png").shape == (3, 8, 8)
    with pytest.raises(BadRecord, match="32 x 4 needs 128 pixels, more than 127"):
        loader(tmp_path, mode=mode, max_pixels=127).load("a.png")


def test_long_pictures_are_resized_before_they_are_padded(tmp_path: Path) -> None:
    """The same pixels as of the padded square, but for rounding."""
    side = 30
    small = Image.fromarray(photo(30, 2))
    small.resize((600, 9000), Image.Resampling.BICUBIC).save(tmp_path / "a.bmp")
    got = loader(tmp_path, size=side, mode="pad").load("a.bmp").numpy().astype(int)
    with Image.open(tmp_path / "a.bmp") as image:
        square = Image.new("RGB", (9000, 9000), tuple(int(255 * m) for m in MEAN))
        square.paste(image, (4200, 0))
    want = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    bars = np.arange(side) // 2 != 7  # columns 14 and 15 are the picture
    assert (got[:, :, bars].reshape(3, -1) == np.array([[127], [63], [191]])).all()
    assert np.abs(got - want).mean() < 2


def test_a_line_of_pixels(tmp_path: Path) -> None:
    """Its padded square would have 10**12 pixels."""
    Image.new("RGB", (10**6, 1), "red").save(tmp_path / "a.png")
    line = loader(tmp_path, mode="pad").load("a.png")
    assert line[:, 3].T.unique(dim=0).tolist() == [[255, 0, 0]]
    assert line[0].float().mean() == pytest.approx((255 + 7 * 127) / 8)


def test_normalize() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 1, 1)
    siglip = vision_family("siglip").statistics
    out = normalize(images, siglip.mean, siglip.std)
    assert out.shape == (2, 3, 1, 1) and out.dtype == torch.float32
    torch.testing.assert_close(out[1].flatten(), torch.tensor([-1.0, 128 / 127.5 - 1, 1.0]))
    clip = vision_family("clip").statistics
    blue = (1.0 - 0.40821073) / 0.27577711
    assert normalize(images, clip.mean, clip.std)[0, 2].item() == pytest.approx(blue, rel=1e-6)
    assert normalize(images[:0], clip.mean, clip.std).shape == (0, 3, 1, 1)
