import pytest

from imgshared.data.panel import Panel, guess_chromatin
from imgshared.types import InputError

PANEL = Panel(("LaminB1", "DAPI", "CD3"), "DAPI", {"LaminB1": ("LMNB1",)})


def test_names_and_aliases_find_channels():
    assert PANEL.indices(["cd3", "lmnb1", "DAPI"]) == [2, 0, 1]
    assert PANEL.chromatin_index == 1
    assert PANEL.proteins == ("LaminB1", "CD3")
    assert len(PANEL) == 3


def test_unknown_marker_names_the_nearest():
    with pytest.raises(InputError, match=r"no marker 'LaminB2'.*Did you mean 'LaminB1'\?"):
        PANEL.index("LaminB2")


def test_one_name_for_two_markers():
    with pytest.raises(InputError, match="'DNA' and 'dna' both answer to the name 'dna'"):
        Panel(("DNA", "dna"), "DNA")
    with pytest.raises(InputError, match="'cd3'"):
        Panel(("DNA", "CD3", "X"), "DNA", {"X": ("cd3",)})


def test_chromatin_must_be_a_marker():
    with pytest.raises(InputError, match=r"'DAP' is not among .*Did you mean 'DAPI'"):
        Panel(("DAPI", "CD3"), "DAP")


@pytest.mark.parametrize(
    ("markers", "found"),
    [
        (["CD3", "Hoechst 33342"], "Hoechst 33342"),
        (["DNA1", "x"], "DNA1"),
        (["CD3"], None),
        (["H3", "DAPI"], "DAPI"),
        (["H3"], "H3"),
    ],
)
def test_guess_chromatin(markers, found):
    assert guess_chromatin(markers) == found
