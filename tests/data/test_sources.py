"""Where examples come from: kinds of files, folders, patterns, the hub; and what is no data."""

import csv
import datetime
import gzip
import io
import json
import types
from importlib import resources

import pyarrow
import pyarrow.parquet
import pytest
from helpers import bucket
from helpers.files import write_lines
from helpers.records import example

from promptkd_jax.data.reading import parsers
from promptkd_jax.data.reading.record_stream import read_corpus, read_records
from promptkd_jax.data.reading.sources import source_digest
from promptkd_jax.infra.errors import DataError

GOOD = {"instruction": "a", "output": "b"}
TEXTS = [
    {"instruction": f"say {i}", "input": 'two\nlines, "quoted"' if i % 2 else "", "output": "é"}
    for i in range(8)
]
RECORDS = [example(text["instruction"], text["input"], ("é",)) for text in TEXTS]


def read(path, **how):
    return read_records(str(path), **{"need": "response"} | how)


def fault_of(path, **how):
    with pytest.raises(DataError) as error:
        read(path, **how)
    assert str(path) in str(error.value)
    return str(error.value).replace(str(path), "FILE")


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def table(records):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


def separated(folder, mark):
    with (folder / "table").open("w", newline="") as file:
        writer = csv.DictWriter(file, TEXTS[0], delimiter=mark)
        writer.writeheader()
        writer.writerows(TEXTS)
    return (folder / "table").read_bytes()


def compressed(content, codec):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


# Kinds of files


@pytest.mark.parametrize("codec", ["", "gz", "zst"])
@pytest.mark.parametrize(
    "kind", ["jsonl", "one.json", "many.json", "csv", "tsv", "parquet", "crlf.csv"]
)
def test_one_set_in_every_kind_of_file(tmp_path, monkeypatch, kind, codec):
    """Also where a file comes in pieces that end within words and characters."""
    content = {
        "jsonl": lambda: lines(*TEXTS),
        "one.json": lambda: json.dumps(TEXTS, ensure_ascii=False).encode("utf-8-sig"),
        "many.json": lambda: json.dumps(TEXTS, indent=2).encode(),
        "csv": lambda: separated(tmp_path, ",").replace(b"\r\n", b"\n"),
        "crlf.csv": lambda: b"\xef\xbb\xbf" + separated(tmp_path, ";"),
        "tsv": lambda: separated(tmp_path, "\t"),
        "parquet": lambda: table(TEXTS),
    }[kind]()
    path = tmp_path / f"set.{kind}{codec and '.' + codec}"
    path.write_bytes(
        compressed(content, {"gz": "gzip", "zst": "zstd"}[codec]) if codec else content
    )
    for size in (2**16, 7, 1):
        monkeypatch.setattr(parsers, "_CHUNK", size)
        assert list(read(path)) == RECORDS


@pytest.mark.parametrize("kind", ["jsonl", "one.json", "many.json", "csv"])
def test_no_file_has_to_fit_into_memory(kind):
    """The first example comes when little has been read of the rest."""
    many = TEXTS * 20_000
    content = {
        "jsonl": lambda: lines(*many),
        "one.json": lambda: json.dumps(many).encode(),
        "many.json": lambda: json.dumps(many, indent=2).encode(),
        "csv": lambda: b"instruction,output\n" + b"a,b\n" * 500_000,
    }[kind]()
    stream = io.BytesIO(content)
    file = types.SimpleNamespace(open=lambda mode: stream)
    examples = parsers.read_file(f"set.{kind}", file, parsers.Faults())
    assert next(examples)[1]["instruction"] in ("a", "say 0")
    assert stream.tell() < 200_000 < len(content) / 5


def test_a_file_is_known_by_its_content(tmp_path):
    for name, content in (
        ("lines.json", lines(*TEXTS)),
        ("table.jsonl", table(TEXTS)),
        ("array", json.dumps(TEXTS).encode()),
        ("lines.jsonl", gzip.compress(lines(*TEXTS[:3])) + gzip.compress(lines(*TEXTS[3:]))),
    ):
        (tmp_path / name).write_bytes(content)
        assert list(read(tmp_path / name)) == RECORDS


def test_lines_may_have_marks_and_blanks_and_end_at_newlines_alone(tmp_path):
    path = write_lines(
        tmp_path / "some.jsonl",
        b'\xef\xbb\xbf{"instruction": "a", "input": "b\xe2\x80\xa8", "output": "c"}\r',
        b"",
        {"instruction": " d ", "output": ["e", "f"]},
        {"instruction": "g", "input": None, "context": "h", "response": "i"},
        {"instruction": "j", "input": " \n", "output": "k"},
        {"instruction": "l", "context": "\t", "output": "m"},
    )
    assert list(read(path)) == [
        example("a", "b\u2028", ("c",)),
        example(" d ", "", ("e", "f")),
        example("g", "h", ("i",)),
        example("j", "", ("k",)),
        example("l", "", ("m",)),
    ]


@pytest.mark.parametrize("numbers", ["[]", "[ ]", ""])
def test_a_source_without_records_is_an_error(tmp_path, numbers):
    path = tmp_path / "some.json"
    path.write_text(numbers)
    assert "FILE: no records; expected at least one like" in fault_of(path)


# What is wrong


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"instruction": "a" "output": "b"}', ["column 21", "every line is one object"]),
        (b'{"instruction": "a", ', ["column 21", "broken JSON"]),
        (
            b'{"instruction": "a\xff"}',
            ["byte 19", "0xff, 'ÿ' in Latin-1", "save the file as UTF-8"],
        ),
        (b'["a"]', ["found list ['a']", "expected an object like"]),
        (b'{"instruction": ' + b"1" * 5000 + b"}", ["a number of more than 4,300 digits"]),
        (b"[" * 100_000, ["JSON nested too deeply"]),
        ({"prompt": "a"}, ["'instruction' is missing or null (has: 'prompt')"]),
        ({"instruction": 3}, ["'instruction' is int 3", "expected a string"]),
        ({"instruction": " \n"}, ["'instruction' is empty"]),
        (GOOD | {"input": ["x"]}, ["'input' is list ['x']", "expected a string"]),
        (GOOD | {"input": "x", "context": "y"}, ["'input' and 'context'", "keep one"]),
        (GOOD | {"response": "y"}, ["'output' and 'response'", "keep one"]),
        (GOOD | {"output": {"a": 1}}, ["'output' is dict", "a string or a list of strings"]),
        (GOOD | {"output": ["x", 3]}, ["'output[1]' is int 3", "expected a string"]),
        (GOOD | {"output": ["x", " "]}, ["'output[1]' is empty", "give an answer"]),
        (GOOD | {"output": "ab\ud83d"}, ["half a surrogate pair at character 3"]),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path, bad, words):
    path = write_lines(tmp_path / "some.jsonl", GOOD, b"", bad, GOOD)
    fault = fault_of(path, need="nothing")
    assert fault.startswith("FILE:3: ")
    for word in words:
        assert word in fault


def test_the_first_ten_are_told_in_one_error_with_their_number(tmp_path):
    """Those of one fault together."""
    records = [{"instruction": f"{i}" * (i % 2), "output": "b"} for i in range(30)]
    records[7]["output"] = 3
    path = write_lines(tmp_path / "some.jsonl", *records, b"{", b"\xe9 {")
    first, empty, number, rest = fault_of(path).split("\n")
    assert first == "FILE: 18 examples cannot be used:"
    assert empty.startswith("  FILE:1, 3, 5, 7, 9, 11, 13, 15, 17: field 'instruction' is empty")
    assert number.startswith("  FILE:8: field 'output' is int 3")
    assert rest == "  and 8 more"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "`git lfs pull`",
        ),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        ("a.jsonl", b'{"a": "\x00\x01"}', "is binary; what is read: .jsonl"),
        ("a.jsonl", '{"a": "b"}'.encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a.xlsx", b"PK\x03\x04\x14\x00", "zip archive or a spreadsheet"),
        ("a.jsonl.bz2", b"BZh91AY&SY", "bzip2; decompress it"),
        ("a.jsonl.lz4", b"\x04\x22M\x18d", "lz4; decompress it"),
        ("a.7z", b"7z\xbc\xaf'\x1c\0", "a 7-Zip archive"),
        ("a.pkl", b"\x80\x04\x95", "a pickle, which is not read"),
        ("a.png", b"\x89PNG\r\n", "an image; models see text alone"),
        ("a.arrow", b"ARROW1\0\0", "an Arrow file; save it as .parquet"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>", "a web page"),
        ("a.parquet", b'{"instruction": "a"}', "no Parquet file, whatever its name"),
        ("a.parquet", table(TEXTS)[:-20], "damaged Parquet"),
        ("a.jsonl.gz", gzip.compress(lines(*TEXTS) * 99)[:-60], "cannot be read: Truncated"),
        ("a.json", json.dumps(GOOD, indent=2).encode(), "one JSON object over many lines"),
        ("a.json", json.dumps(TEXTS).encode()[:-1], "FILE:1: the JSON array has no end"),
        ("a.json", json.dumps(TEXTS, indent=2).encode()[:-30], "FILE:37 (element 7): broken JSON"),
        ("a.json", b'[\n{"instruction": "a", "output": "b"}\n{}]', "FILE:3: found '{'"),
        ("a.json", b'[{"instruction": "a" "output"}]', "Expecting ',' delimiter near"),
        ("a.json", b'[{"instruction": "a", "output": "b"}] x', "text after the end"),
        ("a.json", b'[\n{"instruction": "a\xe9"}]', "FILE:2: byte 19 of the line is not UTF-8"),
        ("a.json", b"[" * 100_000, "FILE:1 (element 0): JSON nested too deeply"),
        ("a.json", b"[" + b"1" * 5000 + b"]", "a number of more than 4,300 digits"),
        ("a.json", b'["a", "b"]', "2 examples cannot be used"),
        ("a.csv", b"instruction,output\na,b\nc\n", "FILE:3: 1 cells under 2 columns"),
        ("a.csv", b'instruction,output\n"a"b,c\n', "FILE:2: broken CSV"),
        ("a.csv", b"instruction,output\na,\xe9\n", "FILE:2: byte 3 of the line is not UTF-8"),
        ("a.csv", b'instruction,output\n"a\nb",c\n"d', "FILE:4: broken CSV (unexpected end"),
        ("a.csv", b"output,output\na,b\n", "two columns have one name"),
        ("a.txt", b"some text\n", "FILE:1: the fields 'text' are of no known format"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_for_what_it_is(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in fault_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", b"instruction\toutput, or what; is said\tid\na, b\tc\t1\n"),
        ("a.csv", b"instruction;output, or what;id\na, b;c;1\n"),
        ("a.csv", b'\n\ninstruction,output\n\n"a, b",c\n'),
        ("a.csv", b'\xef\xbb\xbfBZhang,instruction,output\n1,"a, b",c\n'),
        ("a.csv", b'arrow1,instruction,output\n1,"a, b",c\n'),
    ],
)
def test_tables_as_people_write_them(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    columns = {"output": "output, or what; is said"} if name == "a.tsv" else ()
    columns = columns or ({"output": "output, or what"} if b";" in content else ())
    (record,) = read(tmp_path / name, columns=columns)
    assert (record.messages[0]["content"], record.references) == ("a, b", ("c",))


def test_what_tables_have_beside_is_kept_as_json_has_it(tmp_path):
    """A fingerprint of records is one of their JSON."""
    day = datetime.date(2026, 11, 27)
    (tmp_path / "a.parquet").write_bytes(table([GOOD | {"day": day, "at": {"days": [day]}}]))
    (record,) = read(tmp_path / "a.parquet")
    assert json.loads(json.dumps(record.extra)) == {
        "day": "2026-11-27",
        "at": {"days": ["2026-11-27"]},
        "instruction": "a",
        "input": "",
    }


def test_rows_of_tables_are_named_by_their_number(tmp_path):
    (tmp_path / "a.parquet").write_bytes(table([*TEXTS[:5], {"instruction": " ", "output": "b"}]))
    assert fault_of(tmp_path / "a.parquet").startswith("FILE row 5: field 'instruction' is empty")


# Folders, patterns, assets, buckets, the hub


def test_a_folder_of_shards_and_a_pattern(tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    (folder / ".cache").mkdir()
    write_lines(folder / "part-1.jsonl", *TEXTS[3:5])
    (folder / "part-0.jsonl.gz").write_bytes(gzip.compress(lines(*TEXTS[:3])))
    write_lines(folder / "part-2.jsonl", b'{"a', *TEXTS[:1])
    for ignored in ("README.md", "dataset_infos.json", ".cache/part-9.jsonl"):
        (folder / ignored).write_text("{")
    assert f"{folder}/part-2.jsonl:1: broken JSON" in fault_of(folder).replace("FILE", str(folder))
    (folder / "part-2.jsonl").unlink()
    write_lines(folder / "more" / "part-2.jsonl", *TEXTS[5:])
    sources = (folder, f"{folder}/", folder / "**" / "part-*", f"{tmp_path}/s*s/**/*.jsonl*")
    for source in sources:
        assert list(read(source)) == RECORDS[5:] + RECORDS[:5]  # more/ comes first
    monkeypatch.chdir(tmp_path)
    assert list(read("shards/part-?.jsonl*")) == RECORDS[:5]
    assert "FILE: no file matches this (looked from /" in fault_of("shards/none-*")
    write_lines(folder / "others.csv", b"a,b")
    assert "several kinds (.csv, .jsonl); say which" in fault_of(folder)


def test_sources_in_a_bucket(monkeypatch):
    run, _ = bucket.make(monkeypatch)
    folder = run.parent / "data"
    (folder / "part-1.jsonl").write_bytes(lines(*TEXTS[4:]))
    (folder / "part-0.parquet").write_bytes(table(TEXTS[:4]))
    assert list(read(folder / "part-0.parquet")) == RECORDS[:4]
    assert list(read(folder / "part-*")) == RECORDS
    assert "several kinds" in fault_of(folder)
    assert "a pattern has no **" in fault_of(folder / "**" / "part-*")
    (folder / "part-0.parquet").unlink()
    assert list(read(folder)) == RECORDS[4:]
    assert "FILE: no such file" in fault_of(folder / "part-2.jsonl")


def test_an_absent_file_is_an_error():
    for name in ("nowhere/a.jsonl", "nowhere/a.csv.gz", "a.parquet"):
        assert fault_of(name).startswith("FILE: no such file (looked from /")


def test_a_file_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "data" / "assets").mkdir(parents=True)
    write_lines(tmp_path / "data" / "assets" / "some.jsonl", GOOD, {"instruction": ""})
    monkeypatch.setattr(resources, "files", {"promptkd_jax": tmp_path}.__getitem__)
    with pytest.raises(DataError, match=r"^package:some\.jsonl:2: field 'instruction'"):
        read("package:some.jsonl", need="nothing")
    with pytest.raises(DataError, match=r"no 'other\.jsonl'; it has \['some\.jsonl'\]"):
        read("package:other.jsonl", need="nothing")


def test_an_unknown_file_of_the_real_package_is_an_error():
    with pytest.raises(DataError, match=r"promptkd_jax/data/assets has no 'none\.jsonl'"):
        read("package:none.jsonl", need="nothing")


def test_a_folder_of_which_some_files_are_named_by_splits_is_asked_about(tmp_path):
    """`datasets` would read those alone."""
    for name in ("train-a", "chat-b"):
        write_lines(tmp_path / f"{name}.jsonl", GOOD)
    fault = fault_of(tmp_path)
    assert "such as train-a.jsonl, beside others, such as chat-b.jsonl; say which" in fault
    assert len(read(f"{tmp_path}/*.jsonl")) == 2


def test_a_digest_is_of_all_that_is_read(tmp_path):
    file = write_lines(tmp_path / "part-1.jsonl", GOOD)
    assert source_digest(file) == source_digest(file)
    found = {source_digest(str(tmp_path)), source_digest(f"{tmp_path}/part-*.jsonl")}
    assert found == {source_digest(file)}
    write_lines(tmp_path / "part-2.jsonl", GOOD)
    two = source_digest(str(tmp_path))
    (tmp_path / "part-2.jsonl").unlink()
    write_lines(tmp_path / "part-1.jsonl", GOOD, GOOD)
    digests = {*found, two, source_digest(file), source_digest("synthetic:dev")}
    assert len(digests) == 4
    with pytest.raises(DataError, match="no such file"):
        source_digest(str(tmp_path / "none.jsonl"))


def test_a_data_set_in_the_layout_of_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dolly"
    folder.mkdir()
    rows = [
        {"instruction": "a", "context": "b", "response": "c"},
        {"instruction": "d", "context": "", "response": None},
        {"instruction": "", "context": "", "response": "e"},
    ]
    write_lines(folder / "test.jsonl", *rows)
    records = read(folder, split="test[:2]", need="nothing")
    assert list(records) == [example("a", "b", ("c",)), example("d", "", ())]
    assert read(folder, split="test[:2]").unanswered == 1
    digests = [source_digest(str(folder), split=split) for split in ("test[:2]", "test[:1]")]
    assert digests == [source_digest(str(folder), split="test[:2]"), digests[1]]
    assert len(set(digests)) == 2
    assert "dolly (split 'test') row 2: field 'instruction' is e" in fault_of(
        folder, split="test"
    ).replace("FILE", str(folder))
    assert "reading split 'dev' of" in (fault := fault_of(folder, split="dev"))
    assert "failed: Unknown split" in fault


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("some/set", {}),
        ("some/set:main", {"name": "main"}),
        ("some/set@v1.0", {"revision": "v1.0"}),
        ("some/set:20-en@refs/pr/1", {"name": "20-en", "revision": "refs/pr/1"}),
    ],
)
def test_a_hub_id_is_read_without_running_its_code(monkeypatch, source, named):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(**kwargs):
        calls.append(kwargs)
        raise datasets.exceptions.DatasetNotFoundError("is not on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=f"{source}: no such file, .* is not on the Hub"):
        read(source, split="train[:9]", need="nothing")
    assert calls == [{"path": "some/set", "split": "train[:9]"} | named]


# A corpus


def test_documents_of_a_text_end_at_newlines_alone(tmp_path):
    path = tmp_path / "some.txt"
    path.write_bytes("\ufeffone\u2028two three\u0085four\x0cfive\n\n last\r\n".encode())
    assert list(read_corpus(str(path))) == ["one\u2028two three\u0085four\x0cfive", "last"]
    (tmp_path / "some.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_corpus(str(tmp_path / "some.txt.gz")))[1:] == ["last"]


def test_a_text_in_latin_1_is_named_by_its_lines(tmp_path):
    path = tmp_path / "some.txt"
    path.write_bytes("first line\ndéjà vu\nété\n".encode("latin-1"))
    with pytest.raises(DataError) as error:
        list(read_corpus(str(path)))
    for words in ("some.txt:2: byte 2 of", "'é' in Latin-1", "some.txt:3: byte 1 of", "UTF-8"):
        assert words in str(error.value)


def test_a_corpus_comes_from_the_same_sources(tmp_path):
    documents = [{"text": "a b", "content": "A"}, {"text": "", "content": "B"}]
    (tmp_path / "a.parquet").write_bytes(table(documents))
    (tmp_path / "b.json").write_text(json.dumps(documents))
    write_lines(tmp_path / "c.jsonl", *documents)
    for name in ("a.parquet", "b.json", "c.jsonl", "?.jsonl"):
        path = str(tmp_path / name)
        assert list(read_corpus(path)) == ["a b"]
        assert list(read_corpus(path, columns={"text": "content"})) == ["A", "B"]
    write_lines(tmp_path / "c.jsonl", {"text": 3}, {"content": "A"})
    with pytest.raises(DataError) as error:
        list(read_corpus(str(tmp_path / "c.jsonl")))
    assert "2 examples cannot be used" in str(error.value)
    assert "c.jsonl:1: field 'text' is int 3" in str(error.value)
    assert "c.jsonl:2: found dict" in str(error.value)
    write_lines(tmp_path / "c.jsonl", {"text": ""})
    with pytest.raises(DataError, match="no text; expected documents such as"):
        list(read_corpus(str(tmp_path / "c.jsonl")))
