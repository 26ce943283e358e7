import numpy as np
import pandas as pd
import pytest

from imgshared.data.manifest import read_cells, read_manifest
from imgshared.types import InputError


def write(folder, text, files=("a.tif", "b.tif"), name="m.csv"):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / name).write_text(text)
    return folder / name


def test_columns_are_found_and_the_rest_are_labels(tmp_path):
    path = write(tmp_path, "File,Mask,Donor,channels,dose,drug\na.tif,b.tif,01,DNA;LaminB1,3,x\nb.tif,,02,DNA,4,\n")
    manifest = read_manifest(path)
    first, second = manifest.rows
    assert (first.image, first.path, first.mask) == ("a", tmp_path / "a.tif", tmp_path / "b.tif")
    assert second.mask is None
    assert (first.group, second.group) == ("01", "02")  # as written, not numbers
    assert (first.channels, second.channels) == (("DNA", "LaminB1"), ("DNA",))
    assert list(manifest.labels) == ["Donor", "dose", "drug"]
    assert manifest.labels.loc["b", "dose"] == 4


def test_named_columns_win(tmp_path):
    path = write(tmp_path, "path,raw,donor,batch\nx,a.tif,g,1\ny,b.tif,g,2\n")
    manifest = read_manifest(path, image_column="raw", group_column="batch")
    assert [r.image for r in manifest.rows] == ["a", "b"]
    assert [r.group for r in manifest.rows] == ["1", "2"]


def test_parquet(tmp_path):
    write(tmp_path, "")
    pd.DataFrame({"path": ["a.tif", "b.tif"], "patient": [1, 2]}).to_parquet(tmp_path / "m.parquet")
    assert [r.group for r in read_manifest(tmp_path / "m.parquet").rows] == ["1", "2"]


def test_wells_of_two_plates_are_two_groups(tmp_path):
    path = write(tmp_path, "file,Metadata_Plate,Metadata_Well\na.tif,P1,A01\nb.tif,P2,A01\n")
    assert [r.group for r in read_manifest(path).rows] == ["P1_A01", "P2_A01"]


def test_cell_painting_files_are_channels(tmp_path):
    text = "FileName_DNA,PathName_DNA,FileName_ER,PathName_ER,Metadata_Well\nd.tif,x,e.tif,x,A01\n"
    (row,) = read_manifest(write(tmp_path, text, ("x/d.tif", "x/e.tif"))).rows
    assert row.files == (("DNA", tmp_path / "x/d.tif"), ("ER", tmp_path / "x/e.tif"))
    assert (row.image, row.group) == ("d", "A01")


def test_no_group_column_makes_each_image_a_group(tmp_path):
    manifest = read_manifest(write(tmp_path, "image\na.tif\nb.tif\n"))
    assert [r.group for r in manifest.rows] == ["a", "b"]
    assert manifest.group_column is None


def test_image_ids_stay_unique(tmp_path):
    files = ("p1/a.tif", "p2/a.tif", "p2/c.tif")
    manifest = read_manifest(write(tmp_path, "image\n" + "\n".join(files), files))
    assert [r.image for r in manifest.rows] == ["p1/a.tif", "p2/a.tif", "c"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, r"m\.csv is empty"),
        ("image,group\n", {}, r"m\.csv holds no rows"),
        ("picture,group\na.tif,1\n", {}, r"m\.csv has no image column.*It has: picture, group"),
        (
            "image,group\na.tif,1\n",
            {"mask_column": "groop"},
            r"no column 'groop'. Did you mean 'group'\?.*image, group",
        ),
        ("image\na.tif\nb.tif\n./a.tif\n", {}, r"1 image\(s\) occur in more than one row: \./a\.tif"),
        ("image,mask\na.tif,m1.tif\nc.tif,\n", {}, r"names 2 file\(s\) that do not exist: .*m1\.tif, .*c\.tif"),
        ("image,group\na.tif,\nb.tif,1\n", {}, r"row 1 has no 'group'"),
        ("image,label\na.tif,7\n", {}, r"imgshared writes label itself"),
        ("image,_index\na.tif,7\n", {}, r"imgshared writes _index itself: rename"),
        ("image,um/px\na.tif,7\n", {}, r"m\.csv: no column of a store can be named 'um/px': rename it, without /"),
        ("image,dose, dose\na.tif,7,8\n", {}, r"m\.csv has two columns 'dose': rename one"),
    ],
)
def test_errors_name_the_culprit(tmp_path, text, options, message):
    with pytest.raises(InputError, match=message):
        read_manifest(write(tmp_path, text), **options)


def test_missing_and_unreadable_tables(tmp_path):
    with pytest.raises(InputError, match=r"no table at .*none\.csv"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"m\.parquet is neither"):
        read_manifest(write(tmp_path, "text", name="m.parquet"))
    (tmp_path / "b.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(InputError, match=r"b\.csv"):
        read_manifest(tmp_path / "b.csv")


@pytest.mark.parametrize("key", ["d/a.ome.tif", "a.ome.tif", "a"])
def test_cells_match_images_by_any_of_their_names(tmp_path, key):
    rows = read_manifest(write(tmp_path, "image\nd/a.ome.tif\n", ("d/a.ome.tif",))).rows
    table = read_cells(write(tmp_path, f"roi,label,type\n{key},3,T\n{key},5,B\nother,1,T\n", (), "c.csv"), rows)
    columns, known = table.join("a", np.array([5, 4, 3]))
    assert columns["type"].tolist()[::2] == ["B", "T"]
    assert known.tolist() == [True, False, True]
    assert table.unmatched == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roi,label\nz,1\n", r"no 'roi' is an image of the manifest: 'z' here, 'a\.tif' there"),
        ("roi,label\na,1\na,1\n", r"cell 1 of image 'a' has more than one row"),
        ("roi,label\na,x\n", r"column 'label' must hold the integer labels"),
        ("roi,type\na,x\n", r"c\.csv has no label column.*It has: roi, type. Name yours with cells_label_"),
        ("roi,label,area_px\na,1,2\n", r"imgshared writes area_px itself"),
        ("roi,label,N/C\na,1,2\n", r"c\.csv: no column of a store can be named 'N/C': rename"),
    ],
)
def test_cell_table_errors(tmp_path, text, message):
    rows = read_manifest(write(tmp_path, "image\na.tif\n")).rows
    with pytest.raises(InputError, match=message):
        read_cells(write(tmp_path, text, (), "c.csv"), rows)


def test_a_name_of_several_images_is_ambiguous_in_a_table_of_cells(tmp_path):
    files = ("a/i.ome.tif", "b/i.ome.tif", "c.tif")
    rows = read_manifest(write(tmp_path, "image\n" + "\n".join(files), files)).rows
    for name in ("i.ome.tif", "i"):
        table = write(tmp_path, f"image,label,type\nc,1,T\n{name},1,T\n", (), "c.csv")
        with pytest.raises(
            InputError, match=rf"'{name}' is ambiguous, .* 2 of .* write a/i\.ome\.tif or b/i\.ome\.tif"
        ):
            read_cells(table, rows)
    table = read_cells(write(tmp_path, "image,label,type\nc,1,T\na/i.ome.tif,1,B\n", (), "c.csv"), rows)
    assert table.join("a/i.ome.tif", np.array([1]))[0]["type"].tolist() == ["B"]
    assert not table.join("b/i.ome.tif", np.array([1]))[1].any()


def test_classes_called_none_are_classes_and_numbers_stay_numbers(tmp_path):
    drugs, doses = ("None", "null", "N/A", "", "NA"), ("0.5", "", "nan", "NA", "2")
    text = "\n".join(f"{i}.tif,{drug},{dose}" for i, (drug, dose) in enumerate(zip(drugs, doses, strict=True)))
    labels = read_manifest(write(tmp_path, "image,drug,dose\n" + text, [f"{i}.tif" for i in range(5)])).labels
    assert labels["drug"].tolist()[:3] == ["None", "null", "N/A"]
    assert labels["drug"].isna().tolist() == [False] * 3 + [True] * 2
    assert labels["dose"].dtype == np.float64
    assert labels["dose"].isna().tolist() == [False, True, True, True, False]


PLATES = ("p1/d.tif", "p2/d.tif", "p2/e.tif")


def test_cell_painting_files_of_two_plates_have_the_same_names(tmp_path):
    text = "FileName_DNA,PathName_DNA,Metadata_Plate,Metadata_Well\nd.tif,p1,P1,A01\nd.tif,p2,P2,A01\n"
    rows = read_manifest(write(tmp_path, text, PLATES)).rows
    assert [(r.image, r.group) for r in rows] == [("p1/d.tif", "P1_A01"), ("p2/d.tif", "P2_A01")]
    assert [r.path for r in rows] == [tmp_path / "p1/d.tif", tmp_path / "p2/d.tif"]


def test_cell_painting_images_may_lack_the_first_channel_but_not_all(tmp_path):
    text = "FileName_DNA,PathName_DNA,FileName_ER,PathName_ER\nd.tif,p1,,\n,,e.tif,p2\n"
    rows = read_manifest(write(tmp_path, text, PLATES)).rows
    assert [(r.image, r.files) for r in rows] == [
        ("d", (("DNA", tmp_path / "p1/d.tif"),)),
        ("e", (("ER", tmp_path / "p2/e.tif"),)),
    ]
    with pytest.raises(InputError, match="row 3 has no 'FileName_DNA or FileName_ER'"):
        read_manifest(write(tmp_path, text + ",p1,,p1\n", PLATES))
