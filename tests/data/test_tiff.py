"""Images of several files are read whole or not at all; what is missing or damaged is named."""

import os
import uuid
import warnings

import numpy as np
import pytest
import tifffile

from imgshared.data.prepare import prepare
from imgshared.data.readers import open_image
from imgshared.data.windows import windows
from imgshared.types import InputError

NAMES = ("DNA", "LaminB1", "CD45")
AT = slice(7, 50), slice(20, 61)
OME = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{}">{}</OME>'


def pixels():
    return np.random.default_rng(0).integers(1, 4000, (3, 64, 80)).astype(np.uint16)


def image_xml(k, data, planes):
    """The OME metadata of an image; `planes` are (channel, file, UUID, page)."""
    channels = "".join(f'<Channel ID="Channel:{k}:{c}" Name="{n}" SamplesPerPixel="1"/>' for c, n in enumerate(NAMES))
    places = "".join(
        f'<TiffData FirstC="{c}" IFD="{page}" PlaneCount="1"><UUID FileName="{file}">{number}</UUID></TiffData>'
        for c, file, number, page in planes
    )
    return (
        f'<Image ID="Image:{k}"><Pixels ID="Pixels:{k}" DimensionOrder="XYCZT" Type="uint16" SizeX="{data.shape[2]}" '
        f'SizeY="{data.shape[1]}" SizeC="3" SizeZ="1" SizeT="1">{channels}{places}</Pixels></Image>'
    )


def write_set(folder, data, **options):
    """An image as Bio-Formats writes it, a file a channel, each with the metadata of all."""
    ids = [f"urn:uuid:{uuid.uuid4()}" for _ in NAMES]
    files = [f"s_{name}.ome.tif" for name in NAMES]
    xml = image_xml(0, data, list(zip(range(3), files, ids, [0] * 3, strict=True)))
    for file, own, plane in zip(files, ids, data, strict=True):
        tifffile.imwrite(folder / file, plane, description=OME.format(own, xml), metadata=None, **options)
    return [folder / file for file in files]


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (32, 32)}, {"byteorder": ">"}])
@pytest.mark.parametrize("opened", [0, 1])
def test_an_image_of_several_files_is_read_right(tmp_path, options, opened):
    data = pixels()
    path = write_set(tmp_path, data, **options)[opened]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # tifffile warns where it must open a file again
        image = open_image(path)
        assert (image.channels, image.shape) == (NAMES, data.shape)
        np.testing.assert_array_equal(image.read(), data)
        np.testing.assert_array_equal(image.read(["CD45"]), data[2:])
        with windows(image, ["CD45", "DNA"]) as read:
            np.testing.assert_array_equal(read(*AT), data[[2, 0]][:, AT[0], AT[1]])


def test_a_missing_file_is_named(tmp_path):
    files = write_set(tmp_path, pixels())
    image = open_image(files[0])
    files[2].unlink()
    for use in (lambda: open_image(files[0]), image.read, lambda: windows(image, ["DNA"]).__enter__()):
        with pytest.raises(InputError, match=r"s_DNA.* one of 3 files .* 1 of them not beside it: s_CD45\.ome\.tif"):
            use()


@pytest.mark.parametrize("fraction", [0.05, 0.9])
def test_a_truncated_file_of_several_is_named(tmp_path, fraction):
    files = write_set(tmp_path, pixels())
    os.truncate(files[1], int(files[1].stat().st_size * fraction))
    with pytest.raises(InputError, match=r"s_LaminB1\.ome\.tif is truncated"):
        open_image(files[0])


def test_a_file_of_another_size_is_named(tmp_path):
    files, other = write_set(tmp_path, pixels()), tmp_path / "other"
    other.mkdir()
    xml = tifffile.tiffcomment(files[1])
    tifffile.imwrite(files[1], pixels()[1, :50], description=xml, metadata=None)
    with pytest.raises(InputError, match=r"s_LaminB1\.ome\.tif holds 50 x 80 pixels of uint16, the rest .* 64 x 80"):
        open_image(files[0])


def test_planes_that_only_the_metadata_know_are_refused(tmp_path):
    data, own = pixels(), f"urn:uuid:{uuid.uuid4()}"
    xml = OME.format(own, image_xml(0, data, [(c, "a.ome.tif", own, c) for c in range(3)]))
    tifffile.imwrite(tmp_path / "a.ome.tif", data[:2], description=xml, metadata=None, photometric="minisblack")
    with pytest.raises(InputError, match=r"a\.ome\.tif lacks 1 of the 3 planes that its metadata promise"):
        open_image(tmp_path / "a.ome.tif")


def test_a_file_that_was_renamed_is_whole(tmp_path):
    data, own = pixels(), f"urn:uuid:{uuid.uuid4()}"
    xml = OME.format(own, image_xml(0, data, [(c, "old.ome.tif", own, c) for c in range(3)]))
    tifffile.imwrite(tmp_path / "new.ome.tif", data, description=xml, metadata=None, photometric="minisblack")
    np.testing.assert_array_equal(open_image(tmp_path / "new.ome.tif").read(), data)


def test_another_image_is_not_taken_for_that_of_the_file(tmp_path):
    """Micro-Manager writes the positions to a file each, and of all of them into each."""
    data, ids = pixels(), [f"urn:uuid:{uuid.uuid4()}" for _ in range(2)]
    files = ["p0.ome.tif", "p1.ome.tif"]
    both = "".join(image_xml(k, data, [(c, files[k], ids[k], c) for c in range(3)]) for k in range(2))
    for k, file in enumerate(files):
        xml = OME.format(ids[k], both)
        tifffile.imwrite(tmp_path / file, data + k, description=xml, metadata=None, photometric="minisblack")
    np.testing.assert_array_equal(open_image(tmp_path / "p0.ome.tif").read(), data)
    with pytest.raises(InputError, match=r"p1\.ome\.tif: the first image of its metadata lies in other files \(p0"):
        open_image(tmp_path / "p1.ome.tif")


def write_images(path, *images):
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for data in images:
            tiff.write(data, photometric="rgb" if data.shape[-1] == 3 else "minisblack")
    return path


def test_a_file_of_several_images_is_refused(tmp_path):
    path = write_images(tmp_path / "a.ome.tif", pixels(), pixels()[:, :50], pixels())
    with pytest.raises(InputError, match=r"a\.ome\.tif holds 3 images, .* only the first .*bfconvert -series 1 a\.ome"):
        open_image(path, names=NAMES)


def test_the_label_and_overview_of_a_scanner_are_no_images_of_cells(tmp_path):
    label, overview = np.zeros((20, 30, 3), np.uint8), pixels()[0, :20]
    path = write_images(tmp_path / "a.ome.tif", pixels(), label, overview)
    np.testing.assert_array_equal(open_image(path, names=NAMES).read(), pixels())


def test_two_files_of_an_image_are_not_two_images_of_a_manifest(tmp_path):
    first, second, _ = write_set(tmp_path, pixels())
    (tmp_path / "m.csv").write_text(f"image,group\n{first.name},d1\n{second.name},d2\n")
    with pytest.raises(InputError, match=r"m\.csv: s_DNA\.ome\.tif and s_LaminB1\.ome\.tif are one image.* keep one"):
        prepare(tmp_path / "m.csv", tmp_path / "out.zarr")
