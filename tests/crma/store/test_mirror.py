"""crma.store.mirror: a copy is always a whole, sound state of its source."""

import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from mirrored import ADDRESS, FolderSource, contents, mirrored
from published import BASE, SHAPE, WEIGHTS, dying, make_backbone, make_lora, publish
from published import publish_backbone as publish_backbone_in
from signing_keys import make_keys
from tiny import FORMAT, PROVENANCE, flip_bit

from crma.core.errors import NotFound, ReadOnlyStore, SourceUnavailable
from crma.core.files import to_json
from crma.store.adapter_store import AdapterStore
from crma.store.channels import CHANNELS, Channels
from crma.store.mirror import Mirror
from crma.store.signature import signature_path
from crma.store.signing import sign_versions
from crma.store.source import Source


@pytest.fixture
def writer(tmp_path: Path) -> AdapterStore:
    """A store that somebody writes: two tasks, and the backbone of one of them."""
    store = AdapterStore(tmp_path / "writer")
    publish(store, "medical", backbone=publish_backbone_in(store).digest)
    publish(store, "legal", 1)
    return store


@pytest.fixture
def copy(writer: AdapterStore, tmp_path: Path) -> AdapterStore:
    """A copy of it, all of whose files are listed at every look."""
    return mirrored(writer.root, tmp_path / "copy", list_every_s=0)


def copy_again(store: AdapterStore) -> list[str]:
    """What keeps the copy from being whole."""
    assert store.mirror is not None
    return [each.message for each in store.mirror.copy()]


def test_a_copy_has_the_bytes_of_its_source(writer: AdapterStore, copy: AdapterStore) -> None:
    (writer.root / "README.md").write_text("not of the format")
    (writer.root / "question_sets").mkdir()
    (writer.root / "question_sets" / "public.jsonl").write_text("{}\n")
    assert copy_again(copy) == []
    expected = contents(writer.root)
    del expected["README.md"]
    assert contents(copy.root) == expected
    assert copy.verify(base=BASE, shape=SHAPE) == []


def test_a_version_is_fetched_once_and_a_look_at_nothing_new_is_one_question(
    writer: AdapterStore, tmp_path: Path
) -> None:
    source = FolderSource(writer.root)
    mirror = Mirror(source, tmp_path / "copy")
    mirror.copy()
    assert source.asked == {"file": 1, "files": 1, "read": 1 + 3 * 3}
    source.asked.clear()
    mirror.copy()
    assert source.asked == {"file": 1}
    publish(writer, "legal", 2)
    source.asked.clear()
    mirror.copy()
    assert source.asked == {"file": 1, "files": 1, "read": 1 + 3}
    source.asked.clear()
    Mirror(source, tmp_path / "copy").copy()  # another process, or the next start
    assert source.asked == {"file": 1, "files": 1, "read": 1}


def test_a_version_that_does_not_serve_comes_when_all_is_listed_again(
    writer: AdapterStore, tmp_path: Path
) -> None:
    publish(writer, "legal", 2, serve=False)
    copy = mirrored(writer.root, tmp_path / "copy", list_every_s=0)
    publish(writer, "legal", 3, serve=False)
    copy_again(copy)
    assert copy.task_versions("legal") == ("v1", "v2", "v3")


# What is not taken ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS, "manifest.json"])
def test_a_tampered_object_is_refused_by_name_and_what_served_goes_on(
    writer: AdapterStore, copy: AdapterStore, name: str
) -> None:
    before = copy.channels()
    file = publish(writer, "legal", 5).path / name
    flip_bit(file)
    for _ in range(2):
        (problem,) = copy_again(copy)
        assert problem.startswith(f"{ADDRESS}/tasks/legal/v2: {name}: ")
        assert copy.channels() == before
        assert copy.task_versions("legal") == ("v1",)
        assert copy.verify(base=BASE, shape=SHAPE) == []
    flip_bit(file)
    assert copy_again(copy) == []
    assert copy.channels() == writer.channels()


def test_what_was_refused_is_not_fetched_again_until_it_changes(
    writer: AdapterStore, tmp_path: Path
) -> None:
    flip_bit(writer.task("legal").path / WEIGHTS)
    source = FolderSource(writer.root)
    mirror = Mirror(source, tmp_path / "copy", list_every_s=0)
    assert len(mirror.copy()) == 1
    source.asked.clear()
    assert len(mirror.copy()) == 1
    assert source.asked == {"file": 1, "files": 1, "read": 1}  # the channels


def test_a_version_of_another_folder_is_refused(writer: AdapterStore, copy: AdapterStore) -> None:
    shutil.copytree(writer.task("legal").path, writer.root / "tasks" / "legal" / "v7")
    (problem,) = copy_again(copy)
    assert "manifest.json: Describes another folder" in problem


def test_an_object_that_is_too_large_is_refused_unread(
    writer: AdapterStore, copy: AdapterStore
) -> None:
    entry = publish(writer, "legal", 5)
    os.truncate(entry.path / WEIGHTS, 5 * 2**30)  # no room is taken: the file has a hole
    (problem,) = copy_again(copy)
    assert problem.startswith(f"{ADDRESS}/tasks/legal/v2/{WEIGHTS}: Too large")


def test_of_a_first_copy_with_a_tampered_task_the_others_serve(
    writer: AdapterStore, tmp_path: Path
) -> None:
    flip_bit(writer.task("legal").path / WEIGHTS)
    copy = mirrored(writer.root, tmp_path / "copy")
    assert copy.mirror is not None
    assert [each.message.split(": ")[0] for each in copy.mirror.problems] == [
        f"{ADDRESS}/tasks/legal/v1"
    ]
    assert copy.task("medical").load(SHAPE).pairs
    with pytest.raises(NotFound):
        copy.task("legal")


def test_no_object_is_written_outside_the_copy(tmp_path: Path) -> None:
    files = MemoryFileSystem()
    hostile = (
        "tasks/../../evil/v1/manifest.json",
        "tasks/a/v1/../../../evil",
        "tasks/a/v01/manifest.json",
        "backbones/../evil/v1/manifest.json",
        "signatures/tasks/../../../evil/v1.json",
        "question_sets/../../evil.jsonl",
        "channels.json/../../evil",
    )
    try:
        for name in hostile:
            files.pipe(f"/bucket/{name}", b"{}")
        files.pipe(f"/bucket/{CHANNELS}", to_json(Channels()))
        root = tmp_path / "below" / "copy"
        assert Mirror(Source(ADDRESS, files, "/bucket"), root).copy() == ()
    finally:
        files.store.clear()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {
        root / CHANNELS,
        root / ".lock",
    }


# A source that is away, or half there ---------------------------------------------------------


def test_a_copy_goes_on_while_its_source_is_away(writer: AdapterStore, tmp_path: Path) -> None:
    copy = mirrored(writer.root, tmp_path / "copy")
    before = contents(copy.root)
    away = writer.root.rename(tmp_path / "away")
    assert copy.mirror is not None
    for _ in range(2):
        (problem,) = copy.mirror.copy()
        assert isinstance(problem, SourceUnavailable)
        assert problem.message.startswith(f"{ADDRESS}/{CHANNELS} cannot be read")
    assert contents(copy.root) == before
    away.rename(writer.root)
    assert copy_again(copy) == []


def test_a_source_that_goes_away_in_the_middle_is_begun_again(
    writer: AdapterStore, copy: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(writer, "legal", 2)
    publish(writer, "medical", 3)
    read = FolderSource.read
    left = count(4, -1)

    def read_some(self: FolderSource, name: str) -> bytes:
        if next(left) <= 0:
            raise SourceUnavailable("gone", field="store", value=name)
        return read(self, name)

    before = copy.channels()
    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "read", read_some)
        assert copy_again(copy) == ["gone"]
    assert copy.channels() == before
    assert copy.verify(base=BASE, shape=SHAPE) == []
    assert copy_again(copy) == []
    assert copy.channels() == writer.channels()


def test_a_damaged_channels_file_changes_nothing(writer: AdapterStore, copy: AdapterStore) -> None:
    before = contents(copy.root)
    (writer.root / CHANNELS).write_text("{")
    (problem,) = copy_again(copy)
    assert problem.startswith(f"{ADDRESS}: {CHANNELS}: Not valid JSON")
    assert contents(copy.root) == before


def test_a_folder_that_cannot_be_written_is_a_problem(writer: AdapterStore, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (problem,) = Mirror(FolderSource(writer.root), tmp_path / "file" / "copy").copy()
    assert "cannot be written" in problem.message


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_arrives_in_whatever_order_only_whole_sound_states_serve(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A store is put into a bucket file by file, while it changes, and files are damaged there."""
    folder = tmp_path_factory.mktemp("arriving")
    writer = AdapterStore(folder / "writer")
    publish(writer, "legal", 0)
    publish(writer, "legal", 1)
    bucket = Path(shutil.copytree(writer.root, folder / "bucket"))
    copy = mirrored(bucket, folder / "copy", list_every_s=0)
    states = [writer.channels()]
    for seed in range(2, 10):
        step = data.draw(st.sampled_from(["change", "arrive", "arrive", "arrive", "damage"]))
        if step == "change":
            states.append(_change(data, writer, seed))
        elif step == "arrive":
            _arrive(data, writer.root, bucket)
        else:
            _damage(data, bucket)
        copy_again(copy)
        assert copy.channels() in states
        assert copy.verify(base=BASE, shape=SHAPE) == []
    shutil.rmtree(bucket)
    shutil.copytree(writer.root, bucket)
    assert copy_again(copy) == []
    assert copy.channels() == writer.channels()
    assert contents(copy.root) == contents(writer.root)


def _change(data: st.DataObject, writer: AdapterStore, seed: int) -> Channels:
    """The writer publishes a version, lets another one serve, or removes one."""
    kind = data.draw(st.sampled_from(["publish", "serve", "remove"]))
    versions = writer.task_versions("legal")
    idle = [version for version in versions if version != writer.channels().tasks["legal"]]
    if kind == "publish" or not idle:
        publish(writer, data.draw(st.sampled_from(["legal", "new"])), seed)
    elif kind == "serve":
        writer.set_serving({"tasks/legal": data.draw(st.sampled_from(idle))})
    else:
        writer.remove_task("legal", data.draw(st.sampled_from(idle)))
    return writer.channels()


def _arrive(data: st.DataObject, there: Path, bucket: Path) -> None:
    """Some files of the writer's store arrive as they are now, or go."""
    now = contents(there)
    before = contents(bucket)
    different = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
    if not different:
        return
    for name in data.draw(st.lists(st.sampled_from(different), max_size=4)):
        path = bucket / name
        if name in now:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(now[name])
        else:
            path.unlink(missing_ok=True)


def _damage(data: st.DataObject, bucket: Path) -> None:
    """A bit of an object changes."""
    weights = sorted(bucket.rglob(WEIGHTS))
    flip_bit(data.draw(st.sampled_from(weights)))


def test_a_process_that_dies_while_it_copies_leaves_nothing_half_done(
    writer: AdapterStore, tmp_path: Path
) -> None:
    """What is here after its death is sound, and the next process brings the rest."""
    for step in count(1):
        root = tmp_path / f"copy-{step}"
        with dying(step, at=("rename", "replace", "mkdir", "rmdir")):
            mirrored(writer.root, root)
            break
        assert AdapterStore(root).verify(base=BASE) == []
        copy = mirrored(writer.root, root)
        assert contents(copy.root) == contents(writer.root)
    assert step > 6
    assert contents(root) == contents(writer.root)


# What follows ---------------------------------------------------------------------------------


def test_what_is_removed_there_is_removed_here_but_not_what_serves(
    writer: AdapterStore, copy: AdapterStore
) -> None:
    publish(writer, "legal", 2)
    publish(writer, "legal", 3)
    copy_again(copy)
    writer.remove_task("legal", "v1")
    shutil.rmtree(writer.task("legal").path)  # by mistake
    assert copy_again(copy) == []
    assert copy.task_versions("legal") == ("v2", "v3")


def test_signatures_come_change_and_go(writer: AdapterStore, tmp_path: Path) -> None:
    keys = make_keys(tmp_path, "own")
    sign_versions(writer, keys.private)
    copy = mirrored(writer.root, tmp_path / "copy", keys.public, list_every_s=0)
    assert copy.verify(base=BASE) == []
    place = "tasks/legal/v1"
    sign_versions(writer, make_keys(tmp_path, "other").private, [place])
    copy_again(copy)
    (problem,) = copy.verify(base=BASE)
    assert problem.message.startswith(f"{place}: not signed by the key")
    signature_path(writer.root, place).unlink()
    copy_again(copy)
    (problem,) = copy.verify(base=BASE)
    assert "it has no signature" in problem.message


# Nobody else writes ---------------------------------------------------------------------------


def test_a_copy_is_never_changed_by_anything_but_its_mirror(
    copy: AdapterStore, tmp_path: Path
) -> None:
    before = contents(copy.root)
    key = make_keys(tmp_path, "own").private
    origin = {"base": BASE, **PROVENANCE}
    changes: list[Callable[[], object]] = [
        lambda: copy.publish_task(
            "new", make_lora(), backbone=None, prompt_format=FORMAT, **origin
        ),
        lambda: copy.publish_backbone(make_backbone(), lineage=(), **origin),
        lambda: copy.import_peft(copy.task("legal").path, "new", BASE),
        lambda: copy.set_serving({"tasks/legal": None}),
        lambda: copy.roll_back("tasks/legal"),
        lambda: copy.remove_task("legal"),
        lambda: sign_versions(copy, key),
    ]
    for change in changes:
        with pytest.raises(ReadOnlyStore, match=f"{ADDRESS} is read from here"):
            change()
    assert contents(copy.root) == before
