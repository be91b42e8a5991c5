"""Curation's decoding: what becomes of each kind of file."""

from __future__ import annotations

import http.server
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from curate_frames import reasons_of, rows_of
from curate_steps import after_read
from daft import col, lit
from media_files import encoded, picture, png_claiming, video
from PIL import Image

from xray.curate import files, media
from xray.data.clean import looks
from xray.data.errors import DataError
from xray.data.shards import decode_stored, encode

FAST: dict[str, Any] = {"num_workers": 0, "max_side": 24}


def decoded(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> dict[str, dict[str, Any]]:
    """Decode rows in this process."""
    frame, context = after_read(folder, rows, **{**FAST, **settings})
    return rows_of(media.decode(frame, context))


def animation(images: list[Image.Image], format: str = "GIF", **options: Any) -> bytes:
    return encoded(images[0], format, save_all=True, append_images=images[1:], **options)


def test_what_stays_and_what_goes_and_why(tmp_path: Path) -> None:
    good = encoded(picture(1), "PNG")
    contents = {
        "good": good,
        "large": encoded(picture(2, 300), "JPEG"),
        "cut": good[:-80],
        "text": b"<html>not found</html>",
        "empty": b"",
        "bomb": png_claiming(20_990, 29_700),
        "blank": encoded(Image.new("RGB", (24, 24), "white"), "PNG"),
        "clip": video(12),
        "broken": video(12)[:700],
    }
    rows: list[dict[str, Any]] = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        rows.append({"id": name, "url": str(tmp_path / name), "media": ""})
    rows.append({"id": "gone", "url": str(tmp_path / "gone"), "media": ""})
    rows.append({"id": "folder", "url": str(tmp_path), "media": ""})
    rows.append({"id": "none", "url": "", "media": "image"})
    found = decoded(tmp_path, rows, max_frames=4)
    assert {id: row["reason"] for id, row in found.items()} == {
        **dict.fromkeys(("good", "large", "clip")),
        **dict.fromkeys(("cut", "text", "empty", "bomb", "broken"), "the file cannot be decoded"),
        **dict.fromkeys(("gone", "folder"), "the file cannot be fetched"),
        "blank": "the picture is of one colour",
        "none": "there is no file",
    }
    assert found["gone"]["detail"] == "No such file or directory"
    assert "623403000 pixels is above the cap" in found["bomb"]["detail"]
    assert found["text"]["detail"] == "the file is no image or video of a known format"
    for name in ("cut", "gone", "blank", "none"):
        assert [found[name][key] for key in ("data", "pixels", "width", "phash", "frame_hashes")] == [None] * 5
    kinds = {id: (row["media"], row["frames"], row["width"], row["height"]) for id, row in found.items()}
    assert kinds["good"] == ("image", 1, 24, 24)
    assert kinds["large"] == ("image", 1, 24, 24)
    assert kinds["clip"] == ("clip", 4, 24, 24)


def test_measures_are_those_of_the_frames_that_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(1), "PNG"))
    moving = [picture(number) for number in (1, 2, 3, 4)]
    (tmp_path / "b.webp").write_bytes(animation(moving, "WEBP", lossless=True))
    rows = [{"id": name, "url": str(tmp_path / name), "media": ""} for name in ("a.png", "b.webp")]
    found = decoded(tmp_path, rows)
    for name, frames in (("a.png", moving[:1]), ("b.webp", moving)):
        row, pixels = found[name], np.stack([np.asarray(frame) for frame in frames])
        assert np.array_equal(decode_stored(row["data"], row["frames"]), pixels)
        assert row["extension"] == {"a.png": "png", "b.webp": "webp"}[name]
        assert (row["data_size"], row["pixels"]) == (len(row["data"]), looks(pixels).pixels)
        assert row["phash"] == looks(pixels).shape
        assert row["frame_hashes"] == [looks(frame[None]).shape for frame in pixels]
        colours = np.frombuffer(row["colours"], np.uint8).reshape(3, 16, 16, 3)
        chosen = [0, 0, 0] if name == "a.png" else [0, 2, 3]
        assert np.array_equal(colours, [looks(pixels[index][None]).colours[0] for index in chosen])


def test_animations_are_stills_where_the_sample_says_so_and_clips_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(animation([picture(1), picture(2), picture(3)]))
    (tmp_path / "v.mp4").write_bytes(video(6))
    rows = [
        {"id": f"{name} {kind}", "url": str(tmp_path / name), "media": kind}
        for name in ("a.gif", "v.mp4")
        for kind in ("image", "clip", "")
    ]
    found = decoded(tmp_path, rows, max_frames=3)
    kinds = {id: (row["media"], row["frames"]) for id, row in found.items()}
    for name in ("a.gif", "v.mp4"):
        assert kinds[f"{name} clip"] == kinds[f"{name} "] == ("clip", 3)
    assert kinds["a.gif image"] == ("image", 1)
    assert found["v.mp4 image"]["reason"] == "the picture is of one colour"  # each of its frames is
    first = decode_stored(found["a.gif "]["data"], 3)[:1]
    assert np.array_equal(decode_stored(found["a.gif image"]["data"], 1), first)


def test_clips_that_this_package_has_stored_are_clips_again(tmp_path: Path) -> None:
    frames = np.stack([np.asarray(picture(number, 32)) for number in range(8)])
    stored, _ = encode(frames, "clip")
    (tmp_path / "strip").write_bytes(stored)
    kinds = {"as it is": (8, "clip", 32, 8), "smaller": (8, "clip", 16, 4), "still": (8, "image", 32, 8)}
    for name, (strip, kind, max_side, max_frames) in kinds.items():
        row = {"id": name, "url": str(tmp_path / "strip"), "strip": strip, "media": kind}
        found = decoded(tmp_path / name, [row], max_side=max_side, max_frames=max_frames)[name]
        count = 1 if name == "still" else max_frames
        assert (found["media"], found["frames"], found["height"]) == ("clip" if count > 1 else "image", count, max_side)
        if name != "smaller":
            assert np.array_equal(decode_stored(found["data"], count), frames[:count])
    row = {"id": "wrong", "url": str(tmp_path / "strip"), "strip": 7, "media": "clip"}
    found = decoded(tmp_path / "wrong", [row])["wrong"]
    assert found["reason"] == "the file cannot be decoded"
    assert found["detail"] == "a strip of 256 rows does not hold 7 frames of equal height"


def test_a_clip_in_which_nothing_moves_is_an_image(tmp_path: Path) -> None:
    still, noise = np.asarray(picture(1, 64)).astype(int), np.random.default_rng(0)
    noisy = [np.clip(still + noise.integers(-2, 3, still.shape), 0, 255) for _ in range(4)]
    dot = [still.copy() for _ in range(4)]
    for number, shown in enumerate(dot):
        shown[8 * number : 8 * number + 6, 30:36] = 255  # under one hundredth of the picture moves
    clips = {
        "equal": [still, still + (still < 255), still, still],
        "noisy": noisy,
        "dot": dot,
        "late": [*noisy[:3], 255 - still],
    }
    for name, frames in clips.items():
        images = [Image.fromarray(shown.astype(np.uint8)) for shown in frames]
        (tmp_path / name).write_bytes(animation(images, "WEBP", lossless=True))
    rows = [{"id": name, "url": str(tmp_path / name), "media": "clip"} for name in clips]
    frame, context = after_read(tmp_path, rows, **{**FAST, "max_side": 64})
    found = rows_of(media.decode(frame, context))
    assert {id: (row["media"], row["frames"], row["reason"]) for id, row in found.items()} == {
        "equal": ("image", 1, None),
        "noisy": ("image", 1, None),
        "dot": ("clip", 4, None),
        "late": ("clip", 4, None),
    }
    assert context.facts["static_clips"] == {"count": 2, "examples": ["noisy", "equal"]}


def test_bytes_of_a_table_and_of_a_shard(tmp_path: Path) -> None:
    pictures = [encoded(picture(number), "PNG") for number in range(3)]
    (tmp_path / "shard").write_bytes(b"x" * 100 + pictures[1] + b"y" * 100)
    inside: dict[str, Any] = {"url": str(tmp_path / "shard"), "offset": 100, "size": len(pictures[1]), "bytes": None}
    rows: list[dict[str, Any]] = [
        {"id": "table", "bytes": pictures[0]},
        {"id": "shard", **inside},
        {"id": "past", **inside, "offset": 300},
        {"id": "url", "url": f"file://{tmp_path / 'shard'}", "offset": 100, "size": len(pictures[1]), "bytes": None},
        {"id": "none", "bytes": None},
        {"id": "empty", "bytes": b""},
    ]
    found = decoded(tmp_path, rows)
    assert {id: row["reason"] for id, row in found.items()} == {
        **dict.fromkeys(("table", "shard", "url")),
        "past": "the file cannot be fetched",
        "none": "there is no file",
        "empty": "the file cannot be decoded",
    }
    assert found["past"]["detail"] == f"it is cut off: {len(pictures[1]) - 100} of {len(pictures[1])} bytes are there"
    assert "bytes" not in found["table"]
    assert np.array_equal(decode_stored(found["table"]["data"], 1)[0], np.asarray(picture(0)))
    for name in ("shard", "url"):
        assert np.array_equal(decode_stored(found[name]["data"], 1)[0], np.asarray(picture(1)))


def kill_decoding_processes() -> None:
    for children in Path("/proc/self/task").glob("*/children"):
        for number in children.read_text().split():
            if b"udf_worker" in Path("/proc", number, "cmdline").read_bytes():
                os.kill(int(number), signal.SIGKILL)


class Flaky(http.server.BaseHTTPRequestHandler):
    """Answers each path as its name says, and counts."""

    asked: ClassVar[Counter[str]] = Counter()
    content = b""

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        if self.path.startswith("/twice") and self.asked[self.path] <= 2:
            self.send_error(503)
            return
        if self.path.startswith("/kill"):
            kill_decoding_processes()
            return
        if self.path.startswith("/never"):
            self.send_error(503)
            return
        if self.path.startswith("/gone"):
            self.send_error(404)
            return
        body = self.content
        wanted = self.headers.get("Range")
        if wanted and "ranges" in self.path:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            body = body[first : last + 1]
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) + 10 * self.path.startswith("/short")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(files, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(Flaky, "asked", Counter())
    monkeypatch.setattr(Flaky, "content", encoded(picture(1), "PNG"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_addresses_are_tried_again_and_then_counted(tmp_path: Path, server: str) -> None:
    size = len(Flaky.content)
    Flaky.content = b"x" * 7 + Flaky.content
    part = {"offset": 7, "size": size}
    rows: list[dict[str, Any]] = [
        {"id": name, "url": f"{server}/{name}", **part}
        for name in ("twice", "never", "gone", "plain", "ranges", "short")
    ]
    rows.append({"id": "whole", "url": f"{server}/whole"})
    rows.append({"id": "short whole", "url": f"{server}/short2"})
    rows.append({"id": "nobody", "url": "http://127.0.0.1:9/x.png"})
    rows.append({"id": "unknown", "url": "nowhere://x.png"})
    found = decoded(tmp_path, rows, retries=2)
    assert {id: row["reason"] for id, row in found.items()} == {
        **dict.fromkeys(("twice", "plain", "ranges", "short")),
        **dict.fromkeys(("never", "gone", "nobody", "unknown", "short whole"), "the file cannot be fetched"),
        "whole": "the file cannot be decoded",  # its first bytes are no picture's
    }
    assert Flaky.asked == Counter(
        {"/twice": 3, "/never": 3, "/gone": 1, "/plain": 1, "/ranges": 1, "/short": 1, "/short2": 3, "/whole": 1}
    )
    assert found["never"]["detail"] == "HTTP 503 Service Unavailable"
    assert found["gone"]["detail"] == "HTTP 404 Not Found"
    assert found["nobody"]["detail"] == "Connection refused"
    assert "nowhere" in found["unknown"]["detail"]
    once = decoded(tmp_path / "once", [{"id": "twice", "url": f"{server}/twice2"}], retries=1)
    assert once["twice"]["reason"] == "the file cannot be fetched"


def test_files_above_the_cap_are_not_read(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_BYTES", 100)
    (tmp_path / "large").write_bytes(Flaky.content)
    places = [str(tmp_path / "large"), f"file://{tmp_path / 'large'}", f"{server}/large"]
    found = files.fetch_all([files.Place(url) for url in places] + [files.Place("x", 0, 101)], 0)
    assert all(isinstance(answer, str) and "above the cap of 100" in answer for answer in found)


def test_a_source_without_media_passes(tmp_path: Path) -> None:
    frame, context = after_read(tmp_path, [{"caption": "a"}, {"caption": "b"}], has_media=False)
    found = rows_of(media.decode(frame, context))
    assert len(found) == 2
    for row in found.values():
        assert [row[name] for name in ("reason", "width", "frames", "pixels", "extension")] == [None] * 5
    frame, context = after_read(tmp_path / "none", [{}], **FAST)
    nothing = media.decode(frame.where(col("id") == lit("no such")), context)
    assert nothing.to_pylist() == []
    assert {"data", "colours", "frame_hashes", "pixels"} <= set(nothing.column_names)


def test_processes_and_partitions_change_nothing(tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        (tmp_path / f"{number}").write_bytes(encoded(picture(number), "PNG"))
        rows.append({"id": f"{number:02d}", "url": str(tmp_path / f"{number}"), "media": ""})
    frame, context = after_read(tmp_path / "one", rows, **FAST)
    alone = rows_of(media.decode(frame, context))
    frame, context = after_read(tmp_path / "two", rows, partitions=5, **{**FAST, "num_workers": 2})
    assert rows_of(media.decode(frame, context)) == alone
    assert reasons_of(media.decode(*after_read(tmp_path / "three", rows[:1], **FAST))) == {"00": None}


def test_a_killed_decoding_process_is_an_error_that_says_what_to_lower(tmp_path: Path, server: str) -> None:
    frame, context = after_read(tmp_path, [{"url": f"{server}/kill"}], num_workers=1)
    with pytest.raises(DataError, match=r"a decoding process was killed.*lower max_pixels or num_workers"):
        media.decode(frame, context)
