"""Tables on disk: plain and compressed files have the same rows; damaged and oversized files raise an error."""

import re

import pytest
import zstandard

from posmask.errors import DamagedFolder
from posmask.results.rows import Row, read_rows, write_rows

ROWS = [
    Row("open", "open", "width", "forward", seed, "order_accuracy", f"task=ä, b;k={k}", 0.1 + seed / 3, 0.05, 0.2, k)
    for seed in range(3)
    for k in (1, 5)
]


@pytest.fixture
def plain(tmp_path):
    write_rows(tmp_path / "results.csv", ROWS)
    return (tmp_path / "results.csv").read_bytes()


def test_compressed_and_plain_tables_have_the_same_rows(tmp_path, plain):
    (tmp_path / "results.csv.zst").write_bytes(zstandard.ZstdCompressor(level=19).compress(plain))
    assert read_rows(tmp_path / "results.csv.zst") == read_rows(tmp_path / "results.csv") == ROWS


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda packed: packed[:-5], id="truncated"),
        pytest.param(lambda packed: packed[:5], id="header only"),
        pytest.param(lambda packed: b"", id="empty"),
        pytest.param(lambda packed: b"cell,mask\n", id="not compressed"),
        pytest.param(lambda packed: packed + b"more", id="trailing bytes"),
        pytest.param(lambda packed: packed[:20] + bytes(20) + packed[40:], id="overwritten"),
    ],
)
def test_a_damaged_compressed_table_raises_an_error(tmp_path, plain, damage):
    path = tmp_path / "results.csv.zst"
    path.write_bytes(damage(zstandard.ZstdCompressor(level=19, write_checksum=True).compress(plain)))
    with pytest.raises(
        DamagedFolder, match=rf"^{re.escape(str(path))} cannot be decompressed \(.+\): restore the file"
    ):
        read_rows(path)


def test_a_compressed_table_with_other_columns_raises_an_error(tmp_path):
    path = tmp_path / "results.csv.zst"
    path.write_bytes(zstandard.compress(b"nothing\n1\n"))
    with pytest.raises(DamagedFolder, match=r"is not a table of posmask's"):
        read_rows(path)
