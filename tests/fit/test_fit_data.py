"""Rows come out of every kind of file as they went in, and what cannot be learnt is refused."""

import gzip
import struct
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from rkl.fit import fit_to_samples, read_data
from rkl.flows import Coupling, draw, latent
from rkl.flows.architectures import Scaled
from rkl.flows.files import write_samples
from rkl.flows.standardise import Units

ROWS = np.random.default_rng(0).normal(size=(60, 3))
LABELS = np.arange(60) % 3


class Items(Dataset):
    """The items of a list."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def idx(path, array, code):
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def written(kind, folder):
    """A file of this kind with ROWS in it, and what to say of its labels."""
    path = folder / f"data.{kind}"
    if kind == "npy":
        np.save(path, ROWS)
        np.save(folder / "labels.npy", LABELS)
        return path, str(folder / "labels.npy")
    if kind == "npz":
        np.savez(path, data=ROWS, labels=LABELS)
        return path, None
    if kind == "csv":
        lines = ["a,b,c,kind"]
        lines += [
            ",".join(map(repr, map(float, r))) + f",k{k}"
            for r, k in zip(ROWS, LABELS, strict=True)
        ]
        path.write_text("\n".join(lines) + "\n")
        return path, "kind"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        columns = dict(zip("abc", ROWS.T, strict=True)) | {"kind": LABELS}
        parquet.write_table(pyarrow.table(columns), path)
        return path, "kind"
    return idx(path, ROWS, 14), str(idx(folder / "labels.idx", LABELS.astype("u1"), 8))


@pytest.mark.parametrize("kind", ["npy", "npz", "csv", "parquet", "idx", "idx.gz"])
def test_rows_and_labels_come_out_of_a_file_as_they_went_in(kind, tmp_path):
    path, labels = written(kind, tmp_path)
    data = read_data(path, labels)
    assert torch.equal(data.values, torch.from_numpy(ROWS))
    assert data.condition.argmax(1).tolist() == LABELS.tolist()
    assert len(data.classes) == 3
    assert data.step == 0


@pytest.mark.parametrize("kind", ["npz", "csv", "parquet"])
def test_labels_that_a_file_does_not_have_are_named_beside_those_it_has(kind, tmp_path):
    path, _labels = written(kind, tmp_path)
    with pytest.raises(ValueError, match="it has no (column|array) 'species'; it has (a, b|data)"):
        read_data(path, "species")


@pytest.mark.parametrize("change", ["cut", "null", "words"])
def test_a_parquet_file_without_numbers_is_refused_by_its_place(change, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path, _labels = written("parquet", tmp_path)
    cells = {"null": [None, *ROWS[1:, 0]], "words": ["x", *ROWS[1:, 0].astype(str)]}
    if change == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        parquet.write_table(pyarrow.table({"a": cells[change], "b": ROWS[:, 1]}), path)
    told = {
        "cut": "Parquet",
        "null": "column a: 1 of 60 cells are missing, the first of them in row 1",
        "words": "column a, row 1, holds",
    }
    with pytest.raises(ValueError, match=f"data.parquet cannot be read: .*{told[change]}"):
        read_data(path)


def test_a_csv_without_a_header_is_all_numbers(tmp_path):
    path = tmp_path / "data.csv"
    np.savetxt(path, ROWS, delimiter=",", fmt="%.18g")
    assert torch.equal(read_data(path).values, torch.from_numpy(ROWS))


def test_a_folder_of_images_is_read_with_its_classes(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (24, 6, 5), dtype=np.uint8)
    for i, image in enumerate(pixels):
        folder = tmp_path / f"class{i % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    data = read_data(tmp_path)
    assert data.event_shape == (1, 6, 5)
    assert data.classes == ("class0", "class1")
    assert torch.equal(data.values[0, 0], torch.from_numpy(pixels[0]).float())
    assert data.step == 1


def test_idx_images_are_dequantised(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 4), dtype=np.uint8)
    data = read_data(idx(tmp_path / "images-idx3-ubyte", pixels, 8))
    assert (data.event_shape, data.step) == ((4, 4), 1)


@pytest.mark.parametrize("batched", [True, False], ids=["loader", "dataset"])
def test_a_dataset_of_torch_is_read_with_its_labels(batched):
    dataset = TensorDataset(torch.from_numpy(ROWS), torch.from_numpy(LABELS))
    data = read_data(DataLoader(dataset, batch_size=7) if batched else dataset)
    assert torch.equal(data.values, torch.from_numpy(ROWS))
    assert data.condition.argmax(1).tolist() == LABELS.tolist()


class Stream(IterableDataset):
    """The items of a list, one after the other."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_labels_of_a_dataset_may_be_words_and_a_stream_has_no_length():
    words = [f"class {it}" for it in LABELS]
    items = list(zip(torch.from_numpy(ROWS), words, strict=True))
    for source in (Items(items), DataLoader(Items(items), batch_size=7), Stream(items)):
        data = read_data(source)
        assert data.classes == ("class 0", "class 1", "class 2")
        assert data.condition.argmax(1).tolist() == LABELS.tolist()
        assert torch.equal(data.values, torch.from_numpy(ROWS))


def test_a_dataset_may_yield_images_of_pil_with_their_channels_first():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 6, 3), dtype=np.uint8)
    data = read_data(Items([(Image.fromarray(it), 0) for it in pixels]), dequantise=True)
    assert np.array_equal(data.values.numpy(), np.moveaxis(pixels, -1, 1))
    grey = read_data(Items([Image.fromarray(it[..., 0]) for it in pixels]), dequantise=True)
    assert np.array_equal(grey.values.numpy(), pixels[..., 0])
    with pytest.raises(TypeError, match="data: a Dataset must yield tensors.*; got a dict"):
        read_data(Items([{"x": it} for it in ROWS]))


def test_masked_rows_of_a_list_or_a_dataset_are_refused():
    rows = [np.ma.masked_greater(row, ROWS.max() - 1e-9) for row in ROWS]
    items = list(zip(rows, LABELS, strict=True))
    for source in (rows, Items(rows), Items(items)):
        with pytest.raises(ValueError, match=f"data: 1 of {ROWS.size:,} numbers are masked"):
            read_data(source)


def test_a_batch_of_levels_is_spread_evenly_over_a_step():
    levels = torch.randint(0, 4, (400, 2)) / 4
    data = read_data(levels, dequantise=True)
    assert data.step == 0.25
    torch.manual_seed(0)
    batch = data.batch(4000).values
    rest = (batch + 0.125).remainder(0.25) / 0.25
    assert rest.mean().item() == pytest.approx(0.5, abs=0.02)  # 8,000 uniforms: error 0.003
    assert rest.var().item() == pytest.approx(1 / 12, abs=0.005)
    mean, deviation = data.centre_and_spread()
    torch.testing.assert_close(batch.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(batch.std(0), deviation, atol=0.01, rtol=0)


def drawn_levels(columns, rows=600, seed=0):
    """Rows with each of these levels about as often as the others."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.choice(it, rows) for it in columns], 1)


RANGE = np.arange(150)
LEVELS = {
    "unequally far apart": ([np.array([0, 0.3, 1.0])] * 2, [0.3, 0.3]),
    "in single precision": ([(100 + RANGE / 100).astype(np.float32)] * 2, [0.01, 0.01]),
    "in half a cent": ([RANGE / 200, -RANGE / 200], [0.005, 0.005]),
    "integers": ([np.arange(7), np.arange(0, 60, 10)], [1, 10]),
    "many columns": ([np.arange(6)] * 15 + [np.arange(0, 60, 10)] * 2, [1] * 15 + [10] * 2),
    "pixels in few shades": ([np.arange(8) / 8] * 30 + [np.array([0, 2, 4]) / 8], [1 / 8] * 31),
}


@pytest.mark.parametrize("named", LEVELS)
def test_samples_get_back_onto_the_levels_of_the_data(named):
    columns, steps = LEVELS[named]
    rows = drawn_levels(columns)
    data = read_data(rows, dequantise=True)
    assert data.step_of_columns().tolist() == pytest.approx(steps, rel=1e-5)
    units = Units.of_rows(data)
    torch.manual_seed(1)
    spread = data.values + 0.99 * (data.spread().values - data.values)  # no end is rounded over
    back = units.to_levels(spread)
    assert torch.equal(back, data.values)
    far = torch.tensor([-1e6, 1e6]).to(back)[:, None].expand(2, len(columns))
    ends = torch.stack([data.values.amin(0), data.values.amax(0)])
    assert torch.equal(units.to_levels(far), ends)
    loaded = Units.of_state(units.state_dict())
    assert torch.equal(loaded.to_levels(spread), data.values)


def test_levels_that_are_computed_are_those_of_the_numbers_they_stand_for():
    """0.1 + 0.2 is not 0.3: one level has several floats, whose gap is no step."""
    items = np.random.default_rng(0).integers(1, 6, (800, 2, 3))
    rows = items @ np.array([0.1, 0.2, 0.3])
    assert len(np.unique(rows)) > 25
    data = read_data(rows, dequantise=True)
    assert data.step_of_columns().tolist() == pytest.approx([0.1, 0.1], rel=1e-9)
    back = Units.of_rows(data).to_levels(data.spread().values)
    assert len(back.unique()) == 25
    torch.testing.assert_close(back, data.values, atol=1e-12, rtol=0)


def test_continuous_values_over_many_decades_are_not_levels():
    rows = np.exp(8 * np.random.default_rng(0).standard_normal((500, 2)))
    assert not read_data(rows, dequantise=True).step.any()


def test_rows_to_evaluate_may_be_few_or_alike():
    step = torch.zeros(3)
    assert len(read_data(ROWS[:1], step=step)) == 1
    assert len(read_data(with_constant()[:, 1:], step=step)) == len(ROWS)
    with pytest.raises(ValueError, match="at least 1 row; got 0"):
        read_data(ROWS[:0], step=step)


def test_the_rows_held_out_are_none_of_those_trained_on():
    train, held_out = read_data(ROWS).split(0.1, seed=3)
    assert (len(train), len(held_out)) == (54, 6)
    rows = {tuple(row) for row in train.values.tolist()}
    assert not rows & {tuple(row) for row in held_out.values.tolist()}
    again = read_data(ROWS).split(0.1, seed=3)
    assert torch.equal(again[1].values, held_out.values)


def test_standardised_data_keep_their_density_in_the_users_units():
    far = 1e6 + 1e-3 * torch.from_numpy(ROWS)  # single precision would lose all of it
    shift, scale = read_data(far).centre_and_spread()
    torch.manual_seed(0)
    flow = Scaled(Coupling(2, (8,)).build((3,)), shift, scale)
    inner = (far - shift) / scale
    torch.testing.assert_close(inner.std(0), torch.ones(3, dtype=torch.float64))
    normal = torch.distributions.Normal(shift, scale)  # an untrained coupling is the identity
    torch.testing.assert_close(
        flow().log_prob(far).double(), normal.log_prob(far).sum(-1), atol=1e-4, rtol=0
    )
    value, log_q = draw(latent(flow(), temperature=0.5), (20,))
    cooled = torch.distributions.Normal(shift, scale / 2)
    torch.testing.assert_close(log_q.double(), cooled.log_prob(value).sum(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["samples.npy", "samples.csv"])
def test_samples_that_are_written_can_be_read(name, tmp_path):
    write_samples(tmp_path / name, ROWS)
    torch.testing.assert_close(read_data(tmp_path / name).values, torch.from_numpy(ROWS))


def test_parquet_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install"):
        read_data(tmp_path / "data.parquet")


def frame():
    pandas = pytest.importorskip("pandas")
    columns = {"height": ROWS[:, 0], "weight": ROWS[:, 1], "kind": LABELS}
    return pandas.DataFrame(columns).assign(member=np.arange(60) % 3 == 0, age=np.arange(60))


def test_a_data_frame_has_its_labels_in_a_column_and_pandas_own_types():
    plain = frame()
    data = read_data(plain, labels="kind")
    assert data.columns == ("height", "weight", "member", "age")
    assert data.classes == tuple(sorted(set(map(str, LABELS))))
    expected = plain.drop(columns="kind").astype("float64").to_numpy()
    np.testing.assert_array_equal(data.values.numpy(), expected)
    assert "column member: true and false were read as 1 and 0" in data.notes
    own = read_data(plain.convert_dtypes(), labels="kind")  # Float64, boolean, Int64
    assert torch.equal(own.values, data.values)
    assert own.classes == data.classes


def test_a_column_of_a_data_frame_that_cannot_be_read_is_named():
    plain = frame()
    words = plain.assign(kind=[f"of {it}" for it in LABELS])
    with pytest.raises(TypeError, match="column kind must hold numbers; got .* labels='kind'"):
        read_data(words)
    with pytest.raises(ValueError, match="labels: data has no column 'kinds'; it has height"):
        read_data(plain, labels="kinds")
    gaps = plain.drop(columns="kind").convert_dtypes()
    gaps.loc[7, "age"] = None
    with pytest.raises(ValueError, match="row 7; column age there holds nan"):
        read_data(gaps)


def test_a_constant_column_of_levels_has_a_density_once_it_is_spread():
    pixels = np.random.default_rng(0).integers(0, 17, size=(60, 20)).astype(float)
    pixels[:, 3] = 0.0  # as the corners of scikit-learn's digits
    data = read_data(pixels, dequantise=True)
    fitted = fit_to_samples(Coupling(1, (4,)), data, steps=2)
    samples = fitted.flow.to_levels(fitted.flow().sample((50,)))
    assert fitted.log_density.value.isfinite()
    assert (samples[:, 3] == 0).all()


def test_settings_of_reading_are_refused_where_the_data_have_been_read():
    data = read_data(ROWS)
    for setting in ({"labels": LABELS}, {"dequantise": True}):
        with pytest.raises(ValueError, match="give them to read_data"):
            fit_to_samples(Coupling(1, (4,)), data, steps=1, **setting)


def with_nan():
    rows = ROWS.copy()
    rows[7, 1] = np.nan
    return rows


def with_constant():
    return np.hstack([ROWS, np.ones((60, 1))])


REFUSED = {
    "nan": (lambda: read_data(with_nan()), "the first of them row 7"),
    "constant column": (lambda: read_data(with_constant()), "1 constant columns: 3"),
    "constant images": (lambda: read_data(torch.full((30, 4, 4), 0.3)), "constant"),
    "too few rows": (lambda: read_data(ROWS[:5]), "at least 20 rows; got 5"),
    "a vector": (lambda: read_data(ROWS[:, 0]), "rows, \\*event"),
    "integers": (lambda: read_data(np.arange(100).reshape(50, 2)), "say dequantise=True"),
    "grey levels as floats": (
        lambda: read_data(torch.randint(0, 256, (200, 28, 28)) / 255),
        "levels 0.0039",
    ),
    "labels of another length": (lambda: read_data(ROWS, LABELS[:5]), "one for each of 60"),
    "continuous labels": (lambda: read_data(ROWS, ROWS[:, 0]), "labels must be classes"),
    "as many classes as rows": (lambda: read_data(ROWS, list(range(60))), "too many"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learnt_is_refused_with_the_reason(case):
    make, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        make()


BROKEN = {
    "data.npy": b"\x93NUMPY\x01\x00 torn",
    "data.npz": b"PK\x03\x04 torn",
    "ragged.csv": b"1,2\n3\n",
    "words.csv": b"a,b\n1,x\n",
    "empty.csv": b"",
    "data.idx": b"\0\0\x08\x02\0\0\0\x09\0\0\0\x09short",
    "data.gz": b"\x1f\x8b torn",
    "data.txt": b"no numbers at all",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_corrupt_file_is_one_clear_error(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read_data(tmp_path / name)


def test_a_corrupt_image_and_images_of_two_sizes_are_named(tmp_path):
    from PIL import Image

    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    Image.new("L", (4, 6)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"of one size; .*b\.png"):
        read_data(tmp_path)
    (tmp_path / "b.png").write_bytes(b"\x89PNG torn")
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        read_data(tmp_path)


def test_a_file_that_is_not_there_and_a_source_of_no_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.npy"):
        read_data(tmp_path / "nowhere.npy")
    with pytest.raises(TypeError, match="a path"):
        read_data(5)
    with pytest.raises(ValueError, match="holds no images"):
        read_data(tmp_path)


def test_rows_may_stand_in_a_list():
    rows = np.random.default_rng(0).normal(size=(30, 2))
    assert torch.equal(read_data(rows.tolist()).values, torch.from_numpy(rows))
    with pytest.raises(ValueError, match="data must"):
        read_data([[0.1, 0.2]] * 29 + [[0.1]])
    with pytest.raises((TypeError, ValueError), match="data"):
        read_data([["a", "b"]] * 30)
