"""Fetching public sets with stand-ins for apt-get, npm and dpkg-deb, and unpacking hostile archives."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from media_files import encoded, picture

from xray import data
from xray.curate.demo_set import prepare_demo
from xray.data import archives, emoji, openclipart, sources
from xray.data.folder import read_folder

FAKE_CLIENT = """#!{python} -SE
import os, pathlib, shutil, sys
here = pathlib.Path({here!r})
words = sys.argv[1:]
with open(here / "calls", "a") as log:
    log.write({name!r} + " " + " ".join(words) + "\\n")
spec = words[-1] if {name!r} == "apt-get" else next((word for word in words if "@" in word), "")
if {name!r} == "dpkg-deb":
    sys.stdout.buffer.write(open(words[-1], "rb").read())
    sys.exit(0)
if words[-1] == "update":
    (here / "lists").write_text("")
    sys.exit(0)
if {name!r} == "apt-get" and (here / "needs lists").exists() and not (here / "lists").exists():
    sys.exit("E: Unable to locate package " + spec)
if (here / "broken").exists() and (here / "broken").read_text() in spec:
    pathlib.Path("half-a-file.tgz").write_bytes(b"partial")
    sys.exit("npm error network is down\\nnpm error more")
for offer in sorted((here / "offers").iterdir()):
    if spec.replace("/", "+") == offer.name.split("=")[0]:
        shutil.copy(offer, offer.name.split("=")[1])
        sys.exit(0)
sys.exit("E: no such package")
"""


class Registry:
    """Stand-in clients on PATH, what they offer and what they were asked."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, clients: tuple[str, ...]) -> None:
        self.root, self.cache = root / "registry", root / "cache"
        (self.root / "offers").mkdir(parents=True)
        (self.root / "bin").mkdir()
        for name in clients:
            script = self.root / "bin" / name
            script.write_text(FAKE_CLIENT.format(python=sys.executable, here=str(self.root), name=name))
            script.chmod(0o755)
        monkeypatch.setenv("PATH", str(self.root / "bin"))

    def offer(self, package: str, file: str, files: dict[str, bytes]) -> None:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz" if file.endswith("tgz") else "w") as tar:
            for name, body in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
        (self.root / "offers" / f"{package.replace('/', '+')}={file}").write_bytes(content.getvalue())

    def calls(self) -> list[str]:
        """The calls since the last question."""
        log = self.root / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def fetched(self) -> list[str]:
        return [call for call in self.calls() if call.startswith(("npm pack", "apt-get download"))]


EMOJI = {
    "1f600": "grinning face",
    "1f44b": "waving hand",
    "1f44b-1f3fb": "waving hand: light skin tone",
    "00a9-fe0f": "copyright",
}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry(tmp_path, monkeypatch, ("npm", "apt-get", "dpkg-deb"))
    names = [
        {"hexcode": "1F600", "label": EMOJI["1f600"], "tags": ["face", "happy"], "group": 0},
        {
            "hexcode": "1F44B",
            "label": EMOJI["1f44b"],
            "tags": ["hello"],
            "group": 1,
            "skins": [{"hexcode": "1F44B-1F3FB", "label": EMOJI["1f44b-1f3fb"]}],
        },
        {"hexcode": "00A9", "label": EMOJI["00a9-fe0f"]},
    ]
    groups = {"groups": [{"order": 0, "message": "smileys"}, {"order": 1, "message": "people"}]}
    made.offer(
        "emojibase-data@17.0.0",
        "emojibase-data-17.0.0.tgz",
        {
            "package/en/data.json": json.dumps(names).encode(),
            "package/en/messages.json": json.dumps(groups).encode(),
            "package/zz/data.json": b"[]",
        },
    )
    for part, name in enumerate(EMOJI, 1):
        frames = [picture(10 * part + step) for step in range(3)]
        made.offer(
            f"@lobehub/fluent-emoji-anim-{part}@1.0.0",
            f"lobehub-fluent-emoji-anim-{part}-1.0.0.tgz",
            {
                f"package/assets/{name}.webp": encoded(
                    frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True
                ),
                "package/README.md": b"",
            },
        )
    svg = "<svg><dc:title>{}</dc:title><rdf:li>Animal_kind</rdf:li><rdf:li></rdf:li><rdf:li>A &amp; B</rdf:li></svg>"
    base = "./usr/share/openclipart"
    stems = {"animals/cat_artist_01": "A Cat", "animals/big/dog_02": "A Dog", "unsorted/thing": "Thing"}
    made.offer(
        "openclipart-png",
        "openclipart-png_1%3a0.18_all.deb",
        {f"{base}/png/{stem}.png": encoded(picture(len(stem)), "PNG") for stem in stems},
    )
    made.offer(
        "openclipart-svg",
        "openclipart-svg_1%3a0.18_all.deb",
        {f"{base}/svg/{stem}.svg": svg.format(title).encode() for stem, title in stems.items()},
    )
    return made


def fetch(name: str, registry: Registry) -> Path:
    return data.fetch(name, registry.cache, progress=False)


def test_emoji_are_fetched_named_and_not_fetched_again(registry: Registry) -> None:
    folder = fetch("fluent-emoji-anim", registry)
    assert len(registry.fetched()) == 5
    records = {record.path.stem: record for record in read_folder(folder).records}
    assert {stem: record.caption.split(", ")[0] for stem, record in records.items()} == EMOJI
    assert records["1f600"].caption == "grinning face, happy"
    assert records["1f44b-1f3fb"].tags == ["hello"]
    assert records["1f44b-1f3fb"].label == "people"
    assert records["1f44b"].identity == records["1f44b-1f3fb"].identity != records["1f600"].identity
    assert fetch("fluent-emoji-anim", registry) == folder
    assert registry.calls() == []


def test_openclipart_is_fetched_and_described(registry: Registry) -> None:
    folder = fetch("openclipart", registry)
    row = json.loads((folder / "metadata.jsonl").read_text().splitlines()[1])
    assert row == {
        "file_name": "animals/cat_artist_01.png",
        "caption": "A Cat",
        "tags": ["Animal_kind", "A & B"],
        "label": "animals",
        "source": "openclipart",
    }
    records = {record.path.stem: record for record in read_folder(folder).records}
    assert records["cat_artist_01"].caption == "A Cat"
    assert records["cat_artist_01"].tags == ["animal kind", "a & b"]
    assert {stem: record.label for stem, record in records.items()} == {
        "cat_artist_01": "animals",
        "dog_02": "animals",
        "thing": "",
    }
    assert Counter(call.split()[0] for call in registry.calls()) == {"apt-get": 2, "dpkg-deb": 2}
    version = json.loads((registry.cache / "downloads/openclipart-png_1%3a0.18_all.deb.json").read_text())
    assert version["version"] == "1:0.18"


def test_a_broken_fetch_goes_on_with_what_is_missing(registry: Registry) -> None:
    (registry.root / "broken").write_text("anim-3")
    with pytest.raises(data.SourceUnavailable, match=r"anim-3 cannot be fetched: npm failed \(npm error network"):
        fetch("fluent-emoji-anim", registry)
    assert len(registry.fetched()) == 4
    assert not list(registry.cache.rglob("half-a-file.tgz"))
    (registry.root / "broken").unlink()
    fetch("fluent-emoji-anim", registry)
    assert [call.split("@")[1].split()[0] for call in registry.fetched()] == [
        "lobehub/fluent-emoji-anim-3",
        "lobehub/fluent-emoji-anim-4",
    ]


@pytest.mark.parametrize("harm", ["flip", "cut", "no record", "bad record"])
def test_a_harmed_download_is_fetched_again(harm: str, registry: Registry) -> None:
    folder = fetch("emojibase", registry)
    path = registry.cache / "downloads" / "emojibase-data-17.0.0.tgz"
    record = path.with_name(path.name + ".json")
    whole = path.read_bytes()
    if harm == "flip":
        path.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    elif harm == "cut":
        path.write_bytes(whole[:-1])
    elif harm == "no record":
        record.unlink()
    else:
        record.write_text("{")
    registry.calls()
    assert fetch("emojibase", registry) == folder
    assert len(registry.fetched()) == 1
    assert path.read_bytes() == whole
    assert fetch("emojibase", registry) == folder
    assert registry.calls() == []


def test_an_unfinished_folder_is_made_anew(registry: Registry) -> None:
    folder = fetch("emojibase", registry)
    (folder / sources.COMPLETE).unlink()
    (folder / "en" / "data.json").write_text("half")
    registry.calls()
    fetch("emojibase", registry)
    assert registry.calls() == []
    assert len(emoji.read_names(folder)) == 4


def test_a_folder_from_another_download_is_made_anew(registry: Registry) -> None:
    folder = fetch("emojibase", registry)
    (registry.cache / "downloads" / "emojibase-data-17.0.0.tgz").unlink()
    names = json.loads((folder / "en" / "data.json").read_text())
    registry.offer(
        "emojibase-data@17.0.0",
        "emojibase-data-17.0.0.tgz",
        {
            "package/en/data.json": json.dumps(names[:1]).encode(),
            "package/en/messages.json": (folder / "en" / "messages.json").read_bytes(),
        },
    )
    assert len(emoji.read_names(fetch("emojibase", registry))) == 1


def test_wordnet_is_fetched_with_its_licence(registry: Registry) -> None:
    shipped = {"wordnet/data.noun": b"cat", "wordnet/noun.exc": b"", "doc/wordnet-base/copyright": b"Princeton"}
    others = {"doc/wordnet-base/AUTHORS": b"", "wordnet/old/data.noun": b"dog", "man/man5/wndb.5WN.gz": b""}
    registry.offer(
        "wordnet-base",
        "wordnet-base_1%3a3.0-37_all.deb",
        {f"./usr/share/{name}": body for name, body in {**shipped, **others}.items()},
    )
    found = {path.name: path.read_bytes() for path in fetch("wordnet", registry).iterdir() if path.name[0] != "."}
    assert found == {name.split("/")[-1]: body for name, body in shipped.items()}


def test_apt_without_lists_updates_its_own(registry: Registry) -> None:
    (registry.root / "needs lists").write_text("")
    fetch("openclipart", registry)
    calls = registry.calls()
    updates = [call for call in calls if call.endswith(" update")]
    assert updates
    assert all(f"Dir::State::Lists={registry.cache}" in call for call in updates)
    assert not any("AllowUnauthenticated" in call or "--allow" in call for call in calls)


@pytest.mark.parametrize(
    ("name", "client"), [("openclipart", "apt-get"), ("fluent-emoji-anim", "npm"), ("emojibase", "npm")]
)
def test_a_missing_client_is_named(name: str, client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(data.SourceUnavailable, match=f"^{client} is not on PATH, which fetches"):
        fetch(name, Registry(tmp_path, monkeypatch, ()))


def test_a_missing_unpacker_and_a_damaged_package(registry: Registry) -> None:
    (registry.root / "bin" / "dpkg-deb").rename(registry.root / "dpkg-deb")
    with pytest.raises(data.SourceUnavailable, match="dpkg-deb is not on PATH"):
        fetch("openclipart", registry)
    (registry.root / "offers" / "emojibase-data@17.0.0=emojibase-data-17.0.0.tgz").write_bytes(b"no archive")
    with pytest.raises(data.DataError, match="is no whole tar archive"):
        fetch("emojibase", registry)
    assert not (registry.cache / "emojibase").exists()


def test_unknown_sources_and_unwritable_caches(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="'openclip' is unknown; did you mean 'openclipart'"):
        fetch("openclip", registry)
    with pytest.raises(data.DataError, match="known are openclipart"):
        fetch("zzz", registry)
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match="cannot be written"):
        data.fetch("emojibase", tmp_path / "file" / "cache", progress=False)


def demo_set(registry: Registry, out: Path) -> data.Dataset:
    made = prepare_demo(out, registry.cache, max_side=24, max_frames=3, progress=False)
    assert made.folder == out
    return data.Dataset(out, None)


def test_the_demo_takes_what_can_be_reached(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xray.curate.demo_set.GENERATED_FOR_ONE", 30)
    everything = demo_set(registry, tmp_path / "all")
    assert Counter(everything.column("source")) == {"openclipart": 3, "fluent-emoji-anim": 4}
    said = capsys.readouterr().err
    assert "going on without wordnet" in said, "this registry has none"
    assert said.count("going on without") == 1
    registry.calls()
    demo_set(registry, tmp_path / "all")
    assert registry.calls() == []
    with pytest.raises(data.DataError, match="holds another dataset"):
        prepare_demo(tmp_path / "all", registry.cache, max_side=32, max_frames=3)

    (registry.root / "bin" / "npm").unlink()
    (registry.cache / "downloads" / "emojibase-data-17.0.0.tgz").unlink()
    partly = demo_set(registry, tmp_path / "partly")
    assert Counter(partly.column("source")) == {"openclipart": 3, "generated": 30}
    said = capsys.readouterr().err
    assert "going on without fluent-emoji-anim: npm is not on PATH" in said
    assert "without openclipart" not in said


def test_the_demo_falls_back_to_generated_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xray.curate.demo_set.GENERATED_FOR_ONE", 30)
    everything = demo_set(Registry(tmp_path, monkeypatch, ()), tmp_path / "out")
    assert set(everything.column("source")) == {"generated"}
    assert set(everything.column("media")) == {"image", "clip"}
    assert len(everything) == 60
    said = capsys.readouterr().err
    assert "without openclipart" in said
    assert "without fluent-emoji-anim" in said


def test_entities_of_entities_and_broken_svg_are_read() -> None:
    svg = b"<svg <dc:title>&amp;eacute;toile_du &lt;b&gt;\n nord</dc:title> <rdf:li>\xff#Star</rdf:li>"
    assert openclipart._title_and_tags(svg) == ("étoile_du <b> nord", ["\ufffd#Star"])
    assert openclipart._title_and_tags(b"") == ("", [])


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("1f44b", "1F44B-1F3FF", True),
        ("2764-fe0f", "2764", True),
        ("1f468-200d-1f373", "1f469-1f3fd-200d-1f373", True),
        ("1f3c3-200d-2640-fe0f", "1f3c3-1f3fb", True),
        ("1f3f4-e0067_e0062_e0065_e006e_e0067", "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", True),
        ("23-fe0f-20e3", "0023-20E3", True),
        ("1f3fb", "1f3fc", False),
        ("1f600", "1f601", False),
    ],
)
def test_identity_of_emoji(first: str, second: str, same: bool) -> None:
    assert (emoji.identity(first) == emoji.identity(second)) is same


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    made.size = 4 if kind == tarfile.REGTYPE else 0
    return made


def test_archives_never_write_outside_their_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    hostile = [
        member("../x"),
        member("a/../../x"),
        member("/x"),
        member(str(outside / "x")),
        member("link", tarfile.SYMTYPE, str(outside)),
        member("hard", tarfile.LNKTYPE, "../x"),
        member("device", tarfile.CHRTYPE),
        member("pipe", tarfile.FIFOTYPE),
        member("back\\..\\x"),
        member("new\nline"),
        member(".."),
    ]
    honest = [member("good/file"), member("link/x"), member("./dot")]  # link/x would go through the link
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        for entry in hostile + honest:
            tar.addfile(entry, io.BytesIO(b"data") if entry.isreg() else None)
    target = tmp_path / "target"
    target.mkdir()
    with archives.open_tar(path) as tar:
        refused = archives.unpack(tar, target, lambda name: name)
    written = {found.relative_to(target).as_posix() for found in target.rglob("*") if found.is_file()}
    assert written == {"good/file", "link/x", "dot"}
    assert not any(found.is_symlink() for found in target.rglob("*"))
    assert len(refused) == len(hostile)
    assert not any(outside.iterdir())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hostile.tar", "outside", "target"]


def test_a_cut_archive_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "cut.tgz"
    with tarfile.open(path, "w:gz") as tar:
        entry = tarfile.TarInfo("noise")
        entry.size = 100_000
        tar.addfile(entry, io.BytesIO(os.urandom(entry.size)))
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(data.DataError, match="is no whole tar archive"), archives.open_tar(path) as tar:
        list(archives.files(tar))


def test_import_is_light() -> None:
    heavy = ["av", "imagehash", "pyarrow", "scipy", "tokenizers"]
    code = f"import sys, xray.data; print([name for name in {heavy} if name in sys.modules])"
    found: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
