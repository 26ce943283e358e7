import dataclasses
import errno
import json
import math
import struct

import pytest
import torch
from safetensors.torch import save_file

from imgshared.data.normalise import Normaliser
from imgshared.data.panel import Panel
from imgshared.data.split import Split
from imgshared.data.store import CellStore
from imgshared.training import checkpoint
from imgshared.training.checkpoint import Contract, load, save
from imgshared.types import InputError

CONTRACT = Contract(
    Panel(("DNA", "P1", "P2"), "DNA", {"P1": ("protein one", "p-1")}),
    16,
    0.5,
    "uint16",
    False,
    Normaliser("arcsinh", 5.0, (0.0, 1.0, 2.0), (3.0, 4.0, 5.0)),
    Split("group", ("g0",), ("g1",), ("g2", "g3")),
    "abc",
)
TREE = {
    "model": {"net.weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
    "position": {"step": 3, "best": math.inf, "done": False, "name": None},
    "tables": {},
    "optimizers": {"g": {"state": {"0": {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}},
    "counts": torch.tensor([], dtype=torch.int64),
}


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "last.safetensors", TREE, CONTRACT)
    return tmp_path / "last.safetensors"


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[key])
        elif isinstance(value, torch.Tensor):
            assert value.dtype == b[key].dtype
            assert torch.equal(value, b[key])
        else:
            assert value == b[key]


def test_nested_trees_come_back(path):
    tree, contract = load(path)
    assert_same(TREE, tree)
    assert contract == CONTRACT
    assert not list(path.parent.glob("*.partial"))


def test_a_transposed_tensor_is_written_as_it_looks(tmp_path):
    weight = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    save(tmp_path / "a.safetensors", {"w": weight, "v": weight[0].mT}, CONTRACT)
    tree, _ = load(tmp_path / "a.safetensors")
    assert torch.equal(tree["w"], weight)
    assert torch.equal(tree["v"], weight[0].mT)


def test_one_changed_byte_in_any_tensor_is_found(path):
    whole = path.read_bytes()
    begin = 8 + struct.unpack("<Q", whole[:8])[0]
    assert begin < len(whole)
    for position in range(begin, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(InputError, match="damaged or was changed after training"):
            load(path)


def test_one_changed_byte_in_the_header_is_found(path):
    whole = path.read_bytes()
    begin = 8 + struct.unpack("<Q", whole[:8])[0]
    for position in range(begin):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(InputError, match=r"last\.safetensors"):
            load(path)


def test_bytes_read_as_another_type_are_found(path):
    whole = path.read_bytes()
    assert whole.count(b'"dtype":"F32"') == 2
    path.write_bytes(whole.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    with pytest.raises(InputError, match="damaged or was changed after training"):
        load(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"last\.safetensors is not a whole imgshared checkpoint"):
        load(path)


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(InputError, match="no checkpoint at"):
        load(path)
    path.write_text("not a checkpoint")
    with pytest.raises(InputError, match="not a whole imgshared checkpoint"):
        load(path)
    for metadata in (None, {"imgshared": "{}"}, {"imgshared": "[]"}, {"imgshared": "{not json"}):
        save_file({"a": torch.zeros(2)}, path, metadata)
        with pytest.raises(InputError, match="not a whole imgshared checkpoint"):
            load(path)


def test_another_format_is_refused_with_both_versions(path, monkeypatch):
    written = checkpoint.FORMAT
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    with pytest.raises(InputError, match=rf"checkpoint format {written} \(imgshared 0.* reads format 99: train again"):
        load(path)


def test_a_full_disk_keeps_the_previous_checkpoint(path, monkeypatch):
    def full(tensors, target, metadata):
        target.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"cannot write .*last\.safetensors: .*No space left.* The last one"):
        save(path, {"model": {"w": torch.zeros(3)}}, CONTRACT)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.safetensors"]


def test_the_contract_is_plain_json():
    assert Contract.from_dict(json.loads(json.dumps(CONTRACT.to_dict()))) == CONTRACT
    unknown = dataclasses.replace(CONTRACT, pixel_size_um=None)
    assert Contract.from_dict(json.loads(json.dumps(unknown.to_dict()))) == unknown


@pytest.fixture
def store(tmp_path, arrays, write_store):
    def make(*, order=(0, 1, 2), names=("DNA", "P1", "P2"), aliases=None, dtype="uint16", **info):
        images, measured, masks, obs = arrays
        order = list(order)
        panel = Panel(tuple(names[c] for c in order), names[0], aliases or {})
        return CellStore(
            write_store(
                tmp_path / "s.zarr", images[:, order].astype(dtype), measured[:, order], masks, obs, panel=panel, **info
            )
        )

    return make


def test_a_store_that_keeps_the_contract_passes_and_order_is_mended(store):
    assert CONTRACT.check(store()) == [0, 1, 2]
    assert CONTRACT.check(store(order=(2, 0, 1))) == [1, 2, 0]
    assert CONTRACT.check(store(pixel_size_um=0.505)) == [0, 1, 2]  # the same objective
    more = store(order=(2, 1, 0), names=("DNA", "P1", "P2"))
    assert dataclasses.replace(CONTRACT, panel=Panel(("DNA", "P2"), "DNA")).check(more) == [2, 0]


def test_markers_are_found_by_the_aliases_of_either_side(store):
    assert CONTRACT.check(store(names=("DNA", "Protein One", "P2"))) == [0, 1, 2]  # the model's alias
    assert CONTRACT.check(store(names=("DNA", "LMN", "P2"), aliases={"LMN": ("P1",)})) == [0, 1, 2]  # the store's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("DNA", "P1", "CD3")}, r"lacks the marker\(s\) P2 that .* it holds DNA, P1, CD3"),
        ({"order": (0, 2)}, r"lacks the marker\(s\) P1 "),
        ({"crop_px": 32}, r"crop size \(px\) is 32, the model was trained with 16: prepare with crop_px=16"),
        ({"pixel_size_um": 0.65}, r"pixel size \(um\) is 0.65, .* with 0.5: prepare with pixel_size_um=0.5"),
        ({"pixel_size_um": None}, r"pixel size \(um\) is None"),
        ({"dtype": "float32"}, "dtype is float32, the model was trained with uint16"),
        (
            {"mask_neighbours": True},
            "mask_neighbours is True, .* trained with False: prepare with mask_neighbours=fals",
        ),
    ],
)
def test_the_broken_term_is_named(store, changes, message):
    with pytest.raises(InputError, match=message):
        CONTRACT.check(store(**changes))


def test_a_model_of_masked_cells_takes_no_others(store):
    masked = dataclasses.replace(CONTRACT, mask_neighbours=True)
    assert masked.check(store(mask_neighbours=True)) == [0, 1, 2]
    with pytest.raises(InputError, match=r"s\.zarr: mask_neighbours is False, .* prepare with mask_neighbours=true"):
        masked.check(store())
