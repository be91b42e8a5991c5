"""Safe decoding of images and clips from untrusted bytes.

What a file claims is checked before its pixels are touched: only named formats are tried, by signature,
and a size above the pixel cap is refused from the header alone. Whatever a decoder raises on hostile
bytes becomes one `DecodeError`. Results are RGB uint8, upright (EXIF orientation applied), with
transparency composed onto white.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xray.data.errors import DecodeError

if TYPE_CHECKING:
    import av
    from PIL import Image

MAX_PIXELS = 64_000_000  # of one frame: 8,000 x 8,000
MAX_CLIP_FRAMES = 9_000  # five minutes at 30 frames a second; longer videos are to be cut into clips first
ORIENTATION = 0x0112  # of EXIF
IMAGE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")


@dataclass(frozen=True)
class Media:
    """Decoded pixels.

    Attributes:
        frames: uint8 (T, H, W, 3); an image has T = 1.
        kind: "image" or "clip".
        width: of the file before any shrinking, in pixels, upright.
        height: likewise.
        lossy: the file's format is lossy (JPEG or a video).
    """

    frames: np.ndarray
    kind: str
    width: int
    height: int
    lossy: bool = False


def decode(
    data: bytes,
    *,
    max_side: int | None = None,
    max_frames: int | None = None,
    max_pixels: int = MAX_PIXELS,
    still: bool = False,
    trim: bool = False,
) -> Media:
    """Decode the bytes of an image, an animated GIF or WebP, or a video (MP4, WebM, Matroska, AVI).

    Args:
        data: the whole file.
        max_side: shrink so that the longer side is at most this many pixels; None keeps the size.
        max_frames: keep at most this many frames, evenly spread over the clip; None keeps all.
        max_pixels: refuse frames with more pixels than this, before decoding them.
        still: decode only the first frame of an animation.
        trim: cut the fully transparent margins of an image, before shrinking; a clip keeps them.

    Returns:
        `Media` with uint8 (T, H, W, 3) frames.

    Raises:
        DecodeError: unknown format, damaged or truncated file, or above a cap.
    """
    try:
        container = _video_container(data)
        if container is not None:
            return _decode_video(data, container, max_side, max_frames, max_pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, checked here, and of harmless damage
            return _decode_image(data, max_side, max_frames, max_pixels, still, trim)
    except DecodeError:
        raise
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        detail = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(f"the file cannot be decoded: {detail}") from error


def spread(count: int, wanted: int) -> list[int]:
    """The indices of `wanted` frames spread evenly over `count`, each in the middle of its share, in order.

    Fewer frames than wanted gives every index once.
    """
    if wanted >= count:
        return list(range(count))
    return [(2 * step + 1) * count // (2 * wanted) for step in range(wanted)]


def shrink(frames: np.ndarray, max_side: int) -> np.ndarray:
    """Frames, uint8 (T, H, W, 3), whose longer side is at most `max_side` pixels; smaller ones as they are."""
    from PIL import Image

    if max(frames.shape[1:3]) <= max_side:
        return frames
    return np.stack([_upright_rgb(Image.fromarray(frame), max_side) for frame in frames])


def _video_container(data: bytes) -> str | None:
    """FFmpeg's name of the container by signature, or None.

    FFmpeg is never left to guess: its playlist formats can open other files and network addresses.
    """
    if data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis", b"heic", b"mif1"):
        return "mov,mp4,m4a,3gp,3g2,mj2"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska,webm"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    return None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DecodeError(f"a frame of {width} x {height} pixels is above the cap of {max_pixels} pixels")
    if width < 1 or height < 1:
        raise DecodeError(f"a frame of {width} x {height} pixels holds nothing")


def _decode_image(
    data: bytes, max_side: int | None, max_frames: int | None, max_pixels: int, still: bool, trim: bool
) -> Media:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:  # Pillow's own guard, by its own threshold
        size = "".join(re.findall(r"size \((\d+) pixels", str(error))) or "too many"
        raise DecodeError(f"a frame of {size} pixels is above the cap of {max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        raise DecodeError("the file is no image or video of a known format") from error
    with image:
        width, height = image.size
        _check_size(width, height, max_pixels)
        if image.getexif().get(ORIENTATION, 1) >= 5:  # orientations 5 to 8 swap the sides
            width, height = height, width
        lossy = image.format == "JPEG"
        count = getattr(image, "n_frames", 1) if image.format in ("GIF", "WEBP") and not still else 1
        if count > 1:
            _check_frame_count(count)
            chosen = spread(count, max_frames or count)
            frames = [_upright_rgb(frame, max_side) for frame in _seek(image, chosen)]
            return Media(np.stack(frames), "clip", width, height)
        if lossy and max_side is not None:
            image.draft("RGB", (2 * max_side, 2 * max_side))
        image.load()
        return Media(_upright_rgb(image, max_side, trim)[None], "image", width, height, lossy)


def _check_frame_count(count: int) -> None:
    if count > MAX_CLIP_FRAMES:
        raise DecodeError(f"a clip of {count} frames is above the cap of {MAX_CLIP_FRAMES}; cut it into clips")


def _seek(image: Image.Image, indices: Iterable[int]) -> Iterator[Image.Image]:
    for index in indices:
        image.seek(index)
        image.load()
        yield image


def _upright_rgb(image: Image.Image, max_side: int | None, trim: bool = False) -> np.ndarray:
    """One Pillow frame as uint8 (H, W, 3): shrunk, upright, transparency on white."""
    from PIL import Image, ImageOps

    if image.getexif().get(ORIENTATION, 1) != 1:  # Pillow copies even what stands upright
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    transparent = image.has_transparency_data
    image = image.convert("RGBA" if transparent else "RGB")
    if trim and transparent:
        box = image.getchannel("A").getbbox()
        if box != (0, 0, *image.size):
            image = image.crop(box)
    if max_side is not None and max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC, reducing_gap=3.0)
    if transparent:
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground.convert("RGB")
    return np.array(image)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16- and 32-bit grey scaled to 8 bits; Pillow's own conversion clips instead of scaling."""
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    values = np.where(np.isfinite(values), values, 0.0)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        values = (values - low) * (255.0 / max(high - low, 1e-12))
    elif image.mode.startswith("I;16") or values.max() > 255:
        values = values / 257.0
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _decode_video(data: bytes, container: str, max_side: int | None, max_frames: int | None, max_pixels: int) -> Media:
    import av

    with av.open(io.BytesIO(data), format=container.split(",")[0], mode="r") as video:
        if not video.streams.video:
            raise DecodeError("the file holds no video stream")
        stream = video.streams.video[0]
        _check_size(stream.codec_context.width, stream.codec_context.height, max_pixels)
        declared = stream.frames
        _check_frame_count(declared)
        # Matroska says no number of frames, but how long the whole file is, sound and all.
        seconds = (video.duration or 0) / av.time_base if len(video.streams) == 1 and not declared else 0.0
        stream.thread_type = "SLICE"
        sampler = _Sampler(max_frames, max_side, max_pixels)
        for frame in video.decode(stream):
            sampler.add(frame)
    if sampler.count == 0:
        raise DecodeError("the video holds no frame that can be decoded")
    if sampler.count < 0.9 * declared:
        raise DecodeError(f"the video is truncated: {sampler.count} of {declared} frames can be decoded")
    if sampler.last_second < 0.8 * seconds - 1.0:
        raise DecodeError(f"the video is truncated: {sampler.last_second:.1f} of {seconds:.1f} seconds can be decoded")
    return Media(sampler.frames(), "clip", *sampler.size, lossy=True)


class _Sampler:
    """Evenly spread frames of a stream whose length is not known, in bounded memory.

    Every `stride`-th frame is held; past four times the wanted number every other one goes and the stride
    doubles.
    """

    def __init__(self, max_frames: int | None, max_side: int | None, max_pixels: int) -> None:
        self.max_frames, self.max_side, self.max_pixels = max_frames, max_side, max_pixels
        self.held: list[np.ndarray] = []
        self.size = (0, 0)  # width and height of the first frame, upright
        self.count = 0
        self.last_second = 0.0
        self.stride = 1

    def add(self, frame: av.VideoFrame) -> None:
        if self.count % self.stride == 0:
            _check_size(frame.width, frame.height, self.max_pixels)
            image = frame.to_image()
            if frame.rotation:
                image = image.rotate(frame.rotation, expand=True)
            if not self.held:
                self.size = image.size
            elif image.size != self.size:  # a stream may change its size on the way
                image = image.resize(self.size)
            self.held.append(_upright_rgb(image, self.max_side))
        self.count += 1
        self.last_second = max(self.last_second, frame.time or 0.0)
        _check_frame_count(self.count)
        if self.max_frames and len(self.held) > 4 * self.max_frames:
            self.held, self.stride = self.held[::2], self.stride * 2

    def frames(self) -> np.ndarray:
        """The wanted frames, uint8 (T, H, W, 3)."""
        return np.stack([self.held[index] for index in spread(len(self.held), self.max_frames or len(self.held))])
