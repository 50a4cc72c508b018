"""Files are read as they were meant, or refused by name: nothing is dropped, cut or guessed."""

import csv
import gzip
import io
import re
import zipfile

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from rkl import cli
from rkl.fit import read_data
from rkl.flows.files import write_samples
from rkl.metrics.samples import read_both
from rkl.readers import as_floats, class_names, natural_order, read, read_columns, read_labels

TABLES = {  # the text, and what stands in it
    "utf-8 mark, no names": ("\ufeff0.5,2\n1.5,4\n", None, [[0.5, 2], [1.5, 4]]),
    "utf-8 mark, names": ("\ufeffa,b\n1.5,4\n", "ab", [[1.5, 4]]),
    "tabs": ("a\tb\n1\t2\n3\t4\n", "ab", [[1, 2], [3, 4]]),
    "blanks": ("  1   2\n 30  4 \n", None, [[1, 2], [30, 4]]),
    "bars": ("a|b\n1|2\n", "ab", [[1, 2]]),
    "decimal commas": ("a;b\n1,5;2\n0,25;4\n", "ab", [[1.5, 2], [0.25, 4]]),
    "quoted decimal commas": ('a,b\n"1,5","2"\n"0,25","4"\n', "ab", [[1.5, 2], [0.25, 4]]),
    "separator by Excel": ("sep=;\n1;2\n3;4\n", None, [[1, 2], [3, 4]]),
    "carriage returns": ("1,2\r3,4\r", None, [[1, 2], [3, 4]]),
    "windows": ("a,b\r\n1,2\r\n", "ab", [[1, 2]]),
    "comments": ("# one\n1 2\n# two\n3 4\n", None, [[1, 2], [3, 4]]),
    "names in a comment": ("# a b\n1 2\n3 4\n", "ab", [[1, 2], [3, 4]]),
    "index of pandas": (",a,b\n0,1,2\n1,3,4\n", "ab", [[1, 2], [3, 4]]),
    "index above numbered columns": (",0,1\n0,5,6\n1,7,8\n", "01", [[5, 6], [7, 8]]),
    "quoted numbers as names": ('"0","1"\n5,6\n7,8\n', "01", [[5, 6], [7, 8]]),
    "all cells quoted": ('"5","6"\n"7","8"\n', None, [[5, 6], [7, 8]]),
    "index kept by pandas": ("Unnamed: 0,a\n7,1\n3,3\n", "a", [[1], [3]]),
    "row names of R": ('"a" "b"\n"1" 1 2\n"2" 3 4\n', "ab", [[1, 2], [3, 4]]),
    "years as names": (
        "2019,2020\n0.1,-.2\n.3,.4\n",
        ("2019", "2020"),
        [[0.1, -0.2], [0.3, 0.4]],
    ),
    "counted names": ("0,1,2\n.1,.2,.3\n.1,.3,.4\n", "012", [[0.1, 0.2, 0.3], [0.1, 0.3, 0.4]]),
    "a first row of integers": ("5,3\n.1,.2\n", None, [[5, 3], [0.1, 0.2]]),
    "truths": ("a,b\nTrue,1\nFalse,2\n", "ab", [[1, 1], [0, 2]]),
    "separators at the ends": ("a,b\n1,2,\n3,4,\n", "ab", [[1, 2], [3, 4]]),
    "one column": ("1\n2\n", None, [[1], [2]]),
    "a long name": ("a" * 200_000 + ",b\n1,2\n", ("a" * 200_000, "b"), [[1, 2]]),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_is_read_as_it_was_meant(case, tmp_path):
    text, columns, values = TABLES[case]
    (tmp_path / "t.csv").write_bytes(text.encode())
    found = read(tmp_path / "t.csv")
    assert found.values.tolist() == values
    assert found.values.dtype == np.float64
    assert found.columns == tuple(columns or ())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_encoding_gives_the_same_names(encoding, packed, tmp_path):
    raw = "größe,v\n1,2\n".encode(encoding)
    (tmp_path / "no-suffix").write_bytes(gzip.compress(raw) if packed else raw)
    assert read(tmp_path / "no-suffix").columns == ("größe", "v")


REFUSED = {
    "two columns of one name": ("a,b,a\n1,2,3\n", "more than one column is called 'a'"),
    "missing in the first row": ("NA,1.5\n2,3\n", "1 cells are missing, .* column 0, row 1"),
    "empty in the first row": ("a,b\n,1.5\n2,3\n", "1 cells are missing, .* column a, row 1"),
    "missing cells": ("a,b\n1,?\n2,null\n3,4\n", "2 cells are missing, .* column b, row 1"),
    "dashes": ("a,b\n1,2\n-,3\n", "1 cells are missing, .* column a, row 2"),
    "a gap in one column": ("1\n\n3\n", "a cell is missing: .* line 2"),
    "ragged": ("1,2\n3\n", "line 2 has 1 cells; expected 2"),
    "ragged below comments": ("#\na,b\n1,2\n\n3,4,5\n", "line 5 has 3 cells; expected 2"),
    "fewer names": ("a\n0,5\n1,2\n", "line 2 has 2 cells; expected 1"),
    "words": ("a,kind\n1,x\n", "column kind, row 1, holds 'x', .* --labels kind"),
    "dates": ("a,t\n1,2020-01-01\n", "column t, row 1, holds '2020-01-01', .* date"),
    "thousands": ('a,b\n"1,234.5",5\n', "column a, row 1, .* thousands"),
    "thousands or decimals": ("1,234;5\n2,345;6\n", "'1,234' may have a decimal comma or"),
    "halves of decimals": ("0,5\n1,05\n", "'05' looks like the end of a number"),
    "both decimal marks": ("a;b\n1.5;2,5\n", "commas and points are mixed"),
    "years over counts": ("2019,2020\n5,3\n2,7\n", "2019, 2020, may hold names or numbers"),
    "columns that pandas numbered": ("0,1\n5,6\n7,8\n", "0, 1, may hold names or numbers"),
    "more than 53 bits": ("a,b\n9007199254740993,1\n", "9007199254740993 in row 1"),
    "underscores": ("1_000,2\n1,2\n", "'1_000', which is no number"),
    "an unnamed column": (",a\n0.5,1\n0.25,3\n", "first column has no name"),
    "names alone": ("a,b\n", "names, and no rows"),
    "nothing": ("", "it is empty"),
    "zeros": ("a\0b", "zero bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_could_mean_two_things_is_refused_by_name(case, tmp_path):
    text, said = REFUSED[case]
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"data: .*t\.csv cannot be read: .*{said}") as refused:
        read(tmp_path / "t.csv")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("inside", ["# not a comment", "%", "\n\nz", 'a ""#"" b'])
def test_a_quoted_cell_of_several_lines_hides_no_row(inside, tmp_path):
    text = f'a,kind\n1,"x\n{inside}"\n2,"y, ""z"""\n\n# a comment\n3,w\n'
    (tmp_path / "t.csv").write_text(text)
    found = read(tmp_path / "t.csv", labels="kind")
    assert found.values.tolist() == [[1], [2], [3]]
    expected = [row["kind"] for row in csv.DictReader(io.StringIO(text)) if row["a"] in "123"]
    assert list(found.labels) == expected


def test_comments_that_look_like_rows_are_told(tmp_path):
    (tmp_path / "t.csv").write_text("# a, b\na,b\n#1,2\n3,4\n# a comment\n%5,6\n")
    found = read(tmp_path / "t.csv")
    assert found.values.tolist() == [[3, 4]]
    assert found.notes == (
        "2 lines like rows that begin with # or % were taken for comments and left out, '#1,2' "
        "the first of them",
    )


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    values=arrays(
        np.float64,
        st.tuples(st.integers(2, 8), st.integers(2, 4)),
        elements=st.floats(-1e300, 1e300, allow_nan=False).filter(lambda x: x != int(x)),
    ),
    dialect=st.sampled_from([",.", ";.", ";,", "\t.", "\t,", "|."]),
    header=st.booleans(),
    index=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_a_table_that_pandas_wrote_is_read_to_the_same_bits(
    values, dialect, header, index, encoding, end, tmp_path
):
    separator, decimal = dialect
    names = [f"c{i}" for i in range(values.shape[1])]
    pd.DataFrame(values, columns=names).to_csv(
        tmp_path / "t.csv",
        sep=separator,
        decimal=decimal,
        header=header,
        index=index and header,
        encoding=encoding,
        lineterminator=end,
    )
    found = read(tmp_path / "t.csv")
    np.testing.assert_array_equal(found.values, values)
    assert found.columns == (tuple(names) if header else ())


def test_labels_are_the_same_classes_from_every_file(tmp_path):
    rows, kinds = np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 11 + 1
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / "y.npy", kinds)
    np.save(tmp_path / "f.npy", kinds.astype(">f8")[:, None])
    np.savez(tmp_path / "y.npz", labels=kinds)
    words = "\n".join(map(str, kinds))
    (tmp_path / "bare.txt").write_text(words)
    (tmp_path / "named.csv").write_text(f"kind\n{words}\n")
    frame = pd.DataFrame(rows, columns=["u", "v"]).assign(kind=kinds)
    frame.to_csv(tmp_path / "t.csv", index=False)
    expected = tuple(map(str, range(1, 12)))
    found = [read_data(tmp_path / "t.csv", "kind")]
    for name in ("y.npy", "f.npy", "y.npz", "bare.txt", "named.csv"):
        found.append(read_data(tmp_path / "x.npy", str(tmp_path / name)))
        frame[["u", "v"]].to_csv(tmp_path / "u.csv", index=False)
        found.append(read_data(tmp_path / "u.csv", tmp_path / name))
    for data in found:
        assert data.classes == expected
        assert (data.condition.argmax(1).numpy() + 1).tolist() == kinds.tolist()
        assert torch.equal(data.values, torch.from_numpy(rows))
    with pytest.raises(ValueError, match=r"labels: .*y\.npy .* 60 labels; the data have 30 rows"):
        read_labels(tmp_path / "y.npy", rows=30)


def test_classes_are_named_alike_whatever_their_type():
    assert class_names(np.array([True, False]), rows=2) == class_names(["TRUE", "false"], rows=2)
    assert class_names([1.0, 10, "2"], rows=3) == ["1", "10", "2"]
    assert class_names(["01", "1"], rows=2) == ["01", "1"]
    assert sorted(["k10", "k9", "10", "9"], key=natural_order) == ["9", "10", "k9", "k10"]
    with pytest.raises(ValueError, match="2 are missing, first in row 2"):
        class_names(["a", "", None], rows=3)
    with pytest.raises(ValueError, match="classes, one whole number or word"):
        class_names([0.5, 1.0], rows=2)


def test_rows_are_given_the_classes_of_the_fit_by_name():
    rows = np.random.default_rng(0).normal(size=(60, 2))
    known = ("1", "2", "10")
    data = read_data(rows, np.array([10, 2] * 30), classes=known)
    assert data.classes == known
    assert data.condition[:2].tolist() == [[0, 0, 1], [0, 1, 0]]
    with pytest.raises(ValueError, match="of the classes 1, 2, 10; got 3"):
        read_data(rows, np.array([10, 3] * 30), classes=known)


@pytest.mark.parametrize("kind", [">f8", ">f4", ">i4", "<f2", "g", "u2", "i8", "b1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_of_any_kind_keeps_its_numbers(kind, order, tmp_path):
    array = np.asarray(np.arange(12).reshape(4, 3) % 5, kind, order=order)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", x=array)
    for name in ("a.npy", "a.npz"):
        found = read(tmp_path / name).values
        assert found.dtype.isnative
        np.testing.assert_array_equal(as_floats(found), array.astype(float))
        torch.from_numpy(as_floats(found))


def test_integers_are_kept_exactly_or_refused():
    times = 1_700_000_000 + np.random.default_rng(0).integers(0, 600, (3000, 2))
    values = read_data(times, dequantise=True).values
    assert values.dtype == torch.float64
    np.testing.assert_array_equal(values.numpy(), times)
    with pytest.raises(ValueError, match="integer 9007199254740993 in row 1 .* 53 bits"):
        read_data(np.full((30, 2), 2**53 + 1), dequantise=True)


def test_large_floats_are_no_levels():
    noise = np.random.default_rng(0).normal(size=(400, 2))
    for values in ((5e7 + 1e4 * noise).astype(np.float32), 1e20 * (1 + noise / 10)):
        data = read_data(values)
        assert data.step == 0
        np.testing.assert_array_equal(data.values.numpy(), values)
    with pytest.raises(ValueError, match="levels 1 apart"):
        read_data(np.round(1e6 * noise))


def npy_header(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f8", "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(re.sub("_(?=[a-z]+$)", ".", name), content)
    return file.getvalue()


ARRAYS_REFUSED = {
    "two petabytes": ("a.npy", npy_header((2**20, 2**28)) + b"\0" * 80, "promises"),
    "a text in an archive": ("a.npz", zipped(readme_txt="hello"), "no arrays; it has readme.txt"),
    "no array in an archive": ("a.npz", zipped(x_npy=b"hello"), "array x"),
    "a workbook": ("a.npz", zipped(**{"[Content_Types]_xml": "<x/>"}), "workbook of Excel"),
    "a pickle of torch": ("a.pt", zipped(**{"a/data_pkl": b"\x80\x02."}), "torch.save"),
    "a pickle": ("a.npy", b"\x80\x04N.", "pickle"),
    "old NetCDF": ("a.nc", b"CDF\x01" + b"\0" * 40, "NetCDF 3"),
    "no NetCDF": ("a.nc", b"u,v\n1,2\n", "is no .nc file"),
}


@pytest.mark.parametrize("case", ARRAYS_REFUSED)
def test_files_of_no_arrays_are_refused_by_name(case, tmp_path):
    name, content, said = ARRAYS_REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"data: .*{name} cannot be read: .*{said}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.full((30, 2), 1j), "complex"),
        (np.full((30, 2), "a"), "words"),
        (np.full((30, 2), "2020", "M8[s]"), "dates"),
        (np.ma.masked_greater(np.arange(60.0).reshape(30, 2), 50), "9 of 60 numbers are masked"),
    ],
)
def test_what_is_no_number_is_refused_by_its_kind(array, said):
    with pytest.raises((TypeError, ValueError), match=f"data: .*{said}"):
        read_data(array)


def test_one_of_several_arrays_is_chosen_by_name(tmp_path):
    one, two = np.random.default_rng(0).normal(size=(2, 30, 2))
    np.savez(tmp_path / "a.npz", one=one, two=two)
    with pytest.raises(ValueError, match="it has one, two. Choose one by FILE:NAME"):
        read(tmp_path / "a.npz")
    np.testing.assert_array_equal(read(f"{tmp_path / 'a.npz'}:two").values, two)
    with pytest.raises(ValueError, match="no array 'three'; it has one, two"):
        read(f"{tmp_path / 'a.npz'}:three")
    fields = np.zeros(30, [("u", "f8"), ("n", "i4")])
    fields["u"], fields["n"] = one[:, 0], np.arange(30)
    np.save(tmp_path / "fields.npy", fields)
    found = read(tmp_path / "fields.npy")
    assert found.columns == ("u", "n")
    np.testing.assert_array_equal(found.values, np.stack([one[:, 0], np.arange(30)], 1))


def test_netcdf_is_read_with_its_packing_and_no_other_file(tmp_path):
    rows = np.arange(60.0).reshape(30, 2)
    packed = {"rows": {"scale_factor": 0.5, "dtype": ">i4", "_FillValue": -1}}
    xr.Dataset({"rows": (("i", "j"), rows)}).to_netcdf(
        tmp_path / "a.nc", engine="h5netcdf", encoding=packed
    )
    np.testing.assert_array_equal(read(tmp_path / "a.nc").values, rows)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["x"] = h5py.ExternalLink(str(tmp_path / "a.nc"), "rows")
    (tmp_path / "raw").write_bytes(rows.tobytes())
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_dataset(
            "x", (30, 2), "f8", external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)]
        )
    with pytest.raises(ValueError, match=r"b\.h5 .* /x is a link to another file"):
        read(tmp_path / "b.h5")
    with pytest.raises(ValueError, match=r"c\.h5 .* /x keeps its numbers in another file"):
        read(tmp_path / "c.h5")


def test_parquet_of_every_type_is_read_or_refused_by_column(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"u": [0.5, 1.5], "n": [1, 2], "k": pd.Categorical(["a", "b"])})
    frame.to_parquet(tmp_path / "t.parquet")
    found = read(tmp_path / "t.parquet", labels="k")
    assert found.values.tolist() == [[0.5, 1], [1.5, 2]]
    assert list(found.labels) == ["a", "b"]
    for column, said in [
        ([[1.0], [2.0]], "column bad holds list"),
        ([1.0, None], "column bad: 1 of 2 cells are missing"),
        (pd.to_datetime(["2020-01-01", "2020-01-02"]), "column bad holds dates"),
        (["a", "b"], "column bad, row 1, holds 'a'"),
        (["1", "2"], "column bad holds numbers as text, such as '1'"),
    ]:
        frame[["u"]].assign(bad=column).to_parquet(tmp_path / "bad.parquet")
        with pytest.raises(ValueError, match=said):
            read(tmp_path / "bad.parquet")


def test_an_index_in_parquet_is_no_column_of_the_data(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"u": [0.5, 1.5]})
    words = frame.set_axis(["p", "q"])
    levels = pd.MultiIndex.from_product([[0, 1], [7]], names=["chain", "draw"])
    for table, said in (
        (words, "__index_level_0__"),
        (words.rename_axis("id"), "id"),
        (frame.set_axis(levels), "chain, draw"),
    ):
        table.to_parquet(tmp_path / "t.parquet")
        found = read(tmp_path / "t.parquet")
        assert found.columns == ("u",)
        assert found.values.tolist() == [[0.5], [1.5]]
        assert found.notes == (f"its index ({said}) was left out",)
    kept = read_columns(tmp_path / "t.parquet").columns
    assert {name: it.tolist() for name, it in kept.items()} == {
        "u": [0.5, 1.5], "chain": [0, 1], "draw": [7, 7],
    }  # fmt: skip


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)


def test_images_keep_their_depth_and_grey_stays_one_channel(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (5, 4), dtype=np.uint16)
    opaque = Image.fromarray(PIXELS[..., 0]).convert("LA")
    palette = Image.fromarray(PIXELS[..., 0]).convert("P")
    floats = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    cases = {
        "deep.png": (Image.fromarray(deep), deep),
        "deep.tif": (Image.fromarray(deep), deep),
        "float.tif": (Image.fromarray(floats), floats),
        "alpha.png": (opaque, PIXELS[..., 0]),
        "palette.png": (palette, np.asarray(palette.convert("L"))),
        "equal.png": (Image.fromarray(PIXELS[..., :1].repeat(3, 2)), PIXELS[..., 0]),
        "bits.png": (Image.fromarray(PIXELS[..., 0] > 127), (PIXELS[..., 0] > 127) * 255),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        np.testing.assert_array_equal(read(tmp_path / name).values[0, 0], expected, name)
    Image.fromarray(PIXELS).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read(tmp_path / "rgb.png").values[0], PIXELS.transpose(2, 0, 1))


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    found = read(tmp_path / "a.png")
    np.testing.assert_array_equal(found.values[0].transpose(1, 2, 0), np.rot90(PIXELS, -1))
    assert "EXIF" in found.notes[0]


def test_images_that_would_lose_something_are_refused_by_name(tmp_path, monkeypatch):
    import struct
    import zlib

    def refused(name, said):
        with pytest.raises(ValueError, match=rf"{name}.* {said}"):
            read(tmp_path / name)

    image = Image.fromarray(PIXELS)
    image.save(tmp_path / "many.gif", save_all=True, append_images=[Image.new("RGB", (4, 5))])
    refused("many.gif", "has 2 frames")
    image.save(tmp_path / "many.tif", save_all=True, append_images=[image])
    refused("many.tif", "has 2 frames")
    clear = image.convert("RGBA")
    clear.putpixel((0, 0), (1, 2, 3, 0))
    clear.save(tmp_path / "clear.png")
    refused("clear.png", "is transparent in places")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    refused("cmyk.tif", "is of mode CMYK")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    refused("torn.png", "cannot be read")

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    rows = b"".join(b"\0" + bytes(24) for _ in range(5))  # 4 x 5 colours of 16 bits each
    head = struct.pack(">IIBBBBB", 4, 5, 16, 2, 0, 0, 0)
    png = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    refused("deep.png", "has 16 bits in each of several channels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    image.save(tmp_path / "bomb.png")
    refused("bomb.png", "cannot be read")


def test_a_bomb_of_gzip_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("rkl.readers.EXPANDED_BYTES", 1000)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"0" * 10**6))
    with pytest.raises(ValueError, match="expands to more than"):
        read(tmp_path / "t.csv.gz")
    np.savez_compressed(tmp_path / "z.npz", x=np.zeros((1000, 1000)))
    with pytest.raises(ValueError, match="x expands from"):
        read(tmp_path / "z.npz")


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_samples_in_a_table_keep_every_bit_and_their_names(kind, tmp_path):
    values = (1.7e9 + np.random.default_rng(0).normal(size=(50, 2))).astype(kind)
    write_samples(tmp_path / "s.csv", values, ("a, b", "c"))
    found = read(tmp_path / "s.csv")
    np.testing.assert_array_equal(found.values.astype(kind), values)
    assert found.columns == ("a, b", "c")


def test_samples_of_integers_and_of_a_table_are_compared_by_name(tmp_path):
    times = 1_700_000_000 + np.random.default_rng(0).integers(0, 600, (100, 2))
    np.save(tmp_path / "real.npy", times)
    both, _notes = read_both(tmp_path / "real.npy", tmp_path / "real.npy")
    np.testing.assert_array_equal(both["real"].numpy(), times)
    frame = pd.DataFrame(times, columns=["a", "b"])
    frame.to_csv(tmp_path / "real.csv", index=False)
    frame[["b", "a"]].to_csv(tmp_path / "fake.csv")
    both, notes = read_both(tmp_path / "real.csv", tmp_path / "fake.csv")
    assert torch.equal(both["real"], both["fake"])
    assert "index" in notes[0]
    frame.rename(columns={"a": "c"}).to_csv(tmp_path / "fake.csv", index=False)
    with pytest.raises(ValueError, match="must have the columns of"):
        read_both(tmp_path / "real.csv", tmp_path / "fake.csv")


def test_evaluate_gives_rows_their_classes_by_name(tmp_path, monkeypatch, capsys):
    def run(line, code=0):
        assert cli.main(line.split()) == code
        return capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    kinds = np.repeat(np.arange(1, 11), 10)
    rows = np.random.default_rng(0).normal(size=(100, 2)) * 0.3 + 3 * kinds[:, None]
    np.save("x.npy", rows)
    np.save("y.npy", kinds)
    frame = pd.DataFrame(rows, columns=["u", "v"]).assign(kind=kinds)
    frame.to_csv("t.csv", index=False)
    run("fit --data t.csv --labels kind --steps 4 --out RUN")
    said = [
        run(f"evaluate RUN {data}").out
        for data in ("--data t.csv --labels kind", "--data x.npy --labels y.npy")
    ]
    assert said[0] == said[1]
    assert "log-density" in said[0]
    frame[kinds > 5].to_csv("some.csv", index=False)
    run("evaluate RUN --data some.csv --labels kind")
    frame.assign(kind=kinds + 1).to_csv("other.csv", index=False)
    assert "got 11" in run("evaluate RUN --data other.csv --labels kind", code=2).err
    run("sample RUN -n 5 --condition 10 --out s.csv")
    assert read("s.csv").columns == ("u", "v")
