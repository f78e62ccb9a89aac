"""Tables of tuned configs: what lies in the user's cache, and what tuning writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from halimede.errors import KernelError
from halimede.kernels import tuning
from halimede.kernels.target import TARGETS
from halimede.kernels.tune_journal import update_table_file
from halimede.kernels.tuning import (
    KernelConfig,
    pick_config,
    read_table,
    table_json,
    tables_in,
    tuned_bucket,
    tuned_sizes,
    user_table_path,
)

SM_90 = TARGETS["sm_90"]


def config(block: int, **options: int) -> KernelConfig:
    return KernelConfig({"BLOCK": block}, num_warps=1, num_stages=1, options=options)


# --- the user's table


def _write_table(folder: Path, content: dict[str, Any]) -> None:
    path = user_table_path(folder, "sm_90")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))


def _line(block: int, name: str = "BLOCK") -> dict[str, Any]:
    return {"blocks": {name: block}, "num_warps": 1, "num_stages": 1}


def test_a_table_in_the_cache_goes_before_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {"k": {"a": ((16, config(1)), (64, config(2))), "b": ((16, config(3)),)}}
    monkeypatch.setattr(tuning, "tuned_table", lambda name: shipped)
    _write_table(tmp_path, {"k": {"a": {"64": _line(20), "256": _line(30)}, "c": {"1": _line(40)}}})

    def blocks(key: str, *sizes: int) -> list[int]:
        return [pick_config("k", SM_90, key, n, lambda: config(0)).blocks["BLOCK"] for n in sizes]

    assert blocks("a", 1, 17, 65) == [1, 2, 2]
    with tables_in(tmp_path):
        assert (blocks("a", 1, 17, 65), blocks("b", 1), blocks("c", 9)) == ([1, 20, 30], [3], [40])
        assert set(tuned_sizes(SM_90)) == {1, 2, 16, 17, 64, 65, 256, 257}
        assert {tuned_bucket("k", SM_90, size) for size in (1, 2, 300)} == {1, 16, 256}
    with tables_in(tmp_path / "other"):
        assert blocks("a", 65) == [2]
    assert blocks("c", 9) == [0]


def test_a_table_for_an_older_kernel_is_told_and_not_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write_table(tmp_path, {"k": {"a": {"64": _line(20, "SIZE")}}})
    with tables_in(tmp_path):
        assert pick_config("k", SM_90, "a", 1, lambda: config(7)) == config(7)
    assert "has blocks SIZE for k, which has BLOCK now" in caplog.text


def test_a_damaged_table_in_the_cache_is_named(tmp_path: Path) -> None:
    _write_table(tmp_path, {"k": []})
    with tables_in(tmp_path), pytest.raises(KernelError, match=r"tuned/sm_90\.json is not a table"):
        pick_config("k", SM_90, "a", 1, lambda: config(7))


def test_a_table_is_written_with_a_line_for_each_entry(tmp_path: Path) -> None:
    table = {"k": {"b": ((1, config(1)),), "a": ((2, config(2, waves_per_eu=3)), (16, config(3)))}}
    (tmp_path / "t.json").write_text(table_json(table))
    assert read_table(tmp_path / "t.json") == table
    lines = (tmp_path / "t.json").read_text().splitlines()
    assert lines[:3] == [
        "{",
        ' "k": {',
        '  "a": {',
    ]
    assert (
        '   "2": {"blocks": {"BLOCK": 2}, "num_stages": 1, "num_warps": 1, "options": {"waves_per_eu": 3}},'
        in lines
    )
    assert json.loads(table_json({})) == {}


# --- the table that comes out


def test_a_table_keeps_what_it_has_and_takes_what_is_better(tmp_path: Path) -> None:
    path = tmp_path / "tuned" / "sm_90.json"
    update_table_file(path, {("k", "a", 16): (config(1), False)})
    assert read_table(path) == {}
    update_table_file(path, {("k", "a", 16): (config(1), False), ("k", "a", 64): (config(2), True)})
    update_table_file(path, {("k", "b", 16): (config(3), True)})
    assert read_table(path) == {"k": {"a": ((16, config(1)), (64, config(2))), "b": ((16, config(3)),)}}
    # As good as before without a table, so there is none for it any more.
    update_table_file(path, {("k", "b", 16): (config(0), False)})
    update_table_file(path, {("k", "a", 16): (config(0), False)})
    assert read_table(path) == {"k": {"a": ((16, config(0)), (64, config(2)))}}
    path.write_text("{")
    with pytest.raises(KernelError, match="is not a table"):
        update_table_file(path, {})


def test_a_table_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelError, match="cannot be written"):
        update_table_file(tmp_path / "file" / "sm_90.json", {})
