"""Writes stories.jsonl and the same texts as Parquet files, and files that are refused: python make.py (pyarrow 26)"""

import json
import pathlib

import pyarrow
import pyarrow.parquet

FOLDER = pathlib.Path(__file__).parent
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "Zoë's", "hat"]
STORIES = [" ".join(WORDS[(i * i + number) % len(WORDS)] for i in range(10 + number % 23)) for number in range(60)]
ROWS = len(STORIES)


def write(name, texts, kind=None, nullable=True, **options):
    """A table with a nested column before the texts and a number after them."""
    meta = [{"source": {"page": number}, "tags": ["a"] * (number % 3)} for number in range(len(texts))]
    arrays = [pyarrow.array(meta), pyarrow.array(texts, kind), pyarrow.array(range(len(texts)))]
    fields = zip(("meta", "text", "id"), arrays)
    schema = pyarrow.schema([pyarrow.field(field, array.type, nullable or field != "text") for field, array in fields])
    table = pyarrow.Table.from_arrays(arrays, schema=schema)
    pyarrow.parquet.write_table(table, FOLDER / f"{name}.parquet", store_schema=False, **options)


string = pyarrow.string()
(FOLDER / "stories.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES))
# Not nullable, not compressed, no dictionary, checksums.
write("plain", STORIES, string, False, compression="none", use_dictionary=False, write_page_checksum=True)
# The default: snappy and dictionaries.
write("snappy", STORIES, string, row_group_size=16)
write("zstd", STORIES, string, compression="zstd", data_page_version="2.0", data_page_size=200, write_batch_size=8, row_group_size=40)
# Of pandas' categories; other encodings.
write("gzip", pyarrow.array(STORIES).dictionary_encode(), compression="gzip", row_group_size=7, data_page_version="2.0")
options = {"use_dictionary": False, "compression": "zstd"}
write("delta", STORIES, pyarrow.large_string(), column_encoding={"text": "DELTA_BYTE_ARRAY"}, **options)
write("lengths", STORIES, string, column_encoding={"text": "DELTA_LENGTH_BYTE_ARRAY"}, **options)
# Refused.
write("brotli", STORIES[:2], string, compression="brotli")
write("null", STORIES[:41] + [None] + STORIES[:20], string, row_group_size=20)
write("empty", STORIES[:3] + [""], string)
write("bytes", [b"a", b"b"])
write("none", [], string)
