import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
import yaml

from imgshared.build import build_method
from imgshared.config import (
    ApolloConfig,
    CutConfig,
    CycleGanConfig,
    EvaluateConfig,
    Experiment,
    LinearConfig,
    MvaeConfig,
    Pix2pixConfig,
    PredictConfig,
    PrepareConfig,
    RegressionConfig,
    SegmentConfig,
    SimulateConfig,
    TranslatorConfig,
    dump,
    keys,
    load,
    validate,
)
from imgshared.data.panel import Panel
from imgshared.data.prepare import prepare
from imgshared.data.segment import SegmentSettings, length_px
from imgshared.data.simulate import simulate
from imgshared.types import Batch, InputError

CONFIGS = Path(__file__).parents[1] / "configs"
DATA = "data=cells.zarr"
TRANSLATOR = ["method.name=translator"]


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        (Experiment, [], "the command line: the key 'data' is missing"),
        (Experiment, [DATA, "seeed=1"], "unknown key 'seeed'. Did you mean 'seed'?"),
        (Experiment, [DATA, "method.chanels=[1]"], "unknown key 'method.chanels'. Did you mean 'method.channels'?"),
        (Experiment, [DATA, "trian.batch_size=4"], "unknown key 'trian'. Did you mean 'train'?"),
        (Experiment, [DATA, "lr_latent=1"], "unknown key 'lr_latent'. Did you mean 'method.lr_latent'?"),
        (Experiment, [DATA, "floats=3"], "unknown key 'floats'."),
        (Experiment, [DATA, "xyz=3"], "unknown key 'xyz'."),
        (Experiment, [DATA, "seed=many"], "seed = 'many': Input should be a valid integer"),
        (Experiment, [DATA, "train.batch_size=0"], "train.batch_size = 0: Input should be greater than or equal to 1"),
        (Experiment, [DATA, "train=fast"], "train = 'fast': Input should be a dictionary"),
        (Experiment, [DATA, "train.precision=fp16"], "train.precision = 'fp16': Input should be 'auto', "),
        (Experiment, [DATA, "method.channels=[8,a]"], "method.channels.1 = 'a': Input should be a valid integer"),
        (Experiment, [DATA, "method.name=apolo"], "method.name = 'apolo' is none of apollo, translator"),
        (Experiment, [DATA, "method.name=[1]"], "method.name = '[1]' is none of apollo, translator"),
        (Experiment, [DATA, *TRANSLATOR, "method.weights.ful=1"],
         "unknown key 'method.weights.ful'. Did you mean 'method.weights.full'?"),
        (Experiment, [DATA, *TRANSLATOR, "method.weights.full=-1"],
         "method.weights.full = -1: Input should be greater than or equal to 0"),
        (Experiment, [DATA, *TRANSLATOR, "method.weights.full=.inf"],
         "method.weights.full = inf: Input should be a finite number"),
        (Experiment, [DATA, "method.lr_latent=.nan"], "method.lr_latent = nan: Input should be a finite number"),
        (Experiment, [DATA, *TRANSLATOR, "method.translation_from=1"],
         "method.translation_from = 1: Input should be less than 1"),
        (Experiment, [DATA, *TRANSLATOR, "method.hide=.nan"], "method.hide = nan: Input should be a finite number"),
        (Experiment, [DATA, "method.name=linear", "method.sigmas=[-1]"], "method.sigmas.0 = -1: Input should be gr"),
        (Experiment, [DATA, *TRANSLATOR, "method.hide=2"], "method.hide = 2: Input should be less than or equal to 1"),
        (Experiment, [DATA, *TRANSLATOR, "method.shared_fraction=1"],
         "method.shared_fraction = 1: Input should be less than 1"),
        (Experiment, [DATA, *TRANSLATOR, "method.head=cauchy"], "method.head = 'cauchy': Input should be 'mean', "),
        (Experiment, [DATA, *TRANSLATOR, "method.weights=1"], "method.weights = 1: Input should be a dictionary"),
        (Experiment, [DATA, "method.weights.full=1"], "unknown key 'method.weights'"),
        (Experiment, [DATA, *TRANSLATOR, "method.adversarial=wgan"],
         "method.adversarial = 'wgan': Input should be 'lsgan'"),
        (Experiment, [DATA, *TRANSLATOR, "method.agreement=cosine"],
         "method.agreement = 'cosine': Input should be 'infonce' or 'triplet'"),
        (Experiment, [DATA, "method.name=cut", "method.nce_weight=-1"],
         "method.nce_weight = -1: Input should be greater than or equal to 0"),
        (Experiment, [DATA, "method.name=pix2pix", "method.l1_weight=-1"],
         "method.l1_weight = -1: Input should be greater than or equal to 0"),
        (Experiment, [DATA, "method.name=cyclegan", "method.cycle_weight=-1"],
         "method.cycle_weight = -1: Input should be greater than or equal to 0"),
        (Experiment, [DATA, "method.name=mvae", "method.beta=-1"],
         "method.beta = -1: Input should be greater than or equal to 0"),
        (Experiment, [DATA, "method.name=cut", "method.nce_wait=1"],
         "unknown key 'method.nce_wait'. Did you mean 'method.nce_weight'?"),
        (Experiment, [DATA, "train.ema=1"], "train.ema = 1: Input should be less than 1"),
        (Experiment, [DATA, "train.balance=panel"], "train.balance = 'panel': Input should be 'cells' or 'panels'"),
        (Experiment, [DATA, "split.val=2"], "split.val = 2: Input should be less than 1"),
        (Experiment, [DATA, "split.val=[[a]]"], "split.val.0 = ['a']: Input should be a valid string"),
        (Experiment, [DATA, "seed=true"], "seed = 'true': Input should be a valid integer"),
        (Experiment, [DATA, "method={name: cut, width: 8, name: linear}"],
         "(the key 'name' stands in line 1 and again in line 1: keep one)"),
        (Experiment, [DATA, "seed"], "'seed' is not key=value"),
        (Experiment, [DATA, "markers=[DNA"], "markers: cannot read '[DNA'"),
        (Experiment, [DATA, "seed=2", "seed.deeper=1"], "seed.deeper: seed is a value, not a section"),
        (PrepareConfig, ["segment.smooth=3"], "segment.smooth = 3 is no length"),
        (PrepareConfig, ["segment.min_diameter=10"], "segment.min_diameter = 10 is no length: write it with its unit"),
        (PrepareConfig, ["channels=DNA"], "channels = 'DNA' is one value where a list belongs: write [DNA]"),
        (EvaluateConfig, ["labels=drug"], "labels = 'drug' is one value where a list belongs: write [drug]"),
        (Experiment, [DATA, "split.test=D6"], "split.test = 'D6' is one value where a list belongs: write [D6]"),
        (PrepareConfig, ["crop_px=4"], "crop_px = 4: Input should be greater than or equal to 8"),
        (EvaluateConfig, ["classifiers=[features,forest]"], "classifiers.1 = 'forest': Input should be "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(kind, overrides, message):
    with pytest.raises(InputError) as error:
        load(kind, None, overrides)
    assert message in str(error.value)


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(InputError) as error:
        load(Experiment, None, ["seed=a", "train.batch_size=0"])
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1, 2", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"", "holds no keys"),
        (b"- 1\n- 2\n", "holds no keys"),
        (
            b"data: a\nmethod: {name: cut}\nseed: 1\nmethod: {name: linear}\n",
            "is not YAML: the key 'method' stands in line 2 and again in line 4: keep one",
        ),
        (
            b"data: a\nmethod:\n  name: cut\n  width: 8\n  'width': 9\n",
            "is not YAML: the key 'width' stands in line 4 ",
        ),
    ],
)
def test_files_that_are_no_configuration_are_named(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"bad\.yaml {message}"):
        load(Experiment, path)


def test_no_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no configuration at .*none\.yaml"):
        load(Experiment, tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"cannot read the configuration .*: Is a directory"):
        load(Experiment, tmp_path)


def test_the_file_is_named_where_its_key_is_wrong(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("data: x\nsed: 1\n")
    with pytest.raises(InputError, match=r"my\.yaml: unknown key 'sed'. Did you mean 'seed'\?"):
        load(Experiment, path)


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: x\nmethod: {lr_decoder: 2e-4, norm_weight: 1E3, lr_latent: 3.50}\n")
    method = load(Experiment, path, ["method.lr_encoder=5e-5", "split.val=1e-1"]).method
    assert (method.lr_decoder, method.norm_weight, method.lr_latent, method.lr_encoder) == (2e-4, 1e3, 3.5, 5e-5)
    assert load(Experiment, path, ["split.val=1e-1"]).split.val == 0.1
    assert load(Experiment, path, ["split.val=0.150"]).split.val == 0.15
    assert load(Experiment, path, ["seed=007"]).seed == 7


@pytest.mark.parametrize("margin", ["0", "1", "-0.1", "1.5"])
def test_a_margin_outside_0_to_1_is_refused(margin):
    with pytest.raises(InputError, match="margin"):
        load(EvaluateConfig, None, [f"margin={margin}"])
    assert load(EvaluateConfig, None, ["margin=0.01"]).margin == 0.01


def test_methods_are_told_apart_by_name():
    assert load(Experiment, None, [DATA]).method == ApolloConfig()
    assert load(Experiment, None, [DATA, "method.lr_latent=3"]).method == ApolloConfig(lr_latent=3)  # without a name
    for kind in (
        LinearConfig,
        RegressionConfig,
        Pix2pixConfig,
        CutConfig,
        CycleGanConfig,
        MvaeConfig,
        TranslatorConfig,
    ):
        name = kind().name
        assert load(Experiment, None, [DATA, f"method.name={name}"]).method == kind()
        experiment = validate(Experiment, {"data": "x", "method": kind()}, "test")
        assert experiment.method == kind()
        assert validate(Experiment, yaml.safe_load(dump(experiment)), "test") == experiment


def test_a_mistake_in_one_method_is_not_answered_with_the_keys_of_another():
    with pytest.raises(InputError) as error:
        load(Experiment, None, [DATA, *TRANSLATOR, "method.encoder_epochs=3", "method.shared_dim=3"])
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert all("apollo" not in line and "Did you mean 'method.shared_dim'" not in line for line in lines)


NAMES = "[7, 01, 010, 0x1F, 1_0, 1:30, 1.50, 0.00001, 1e5, '08', yes, No, True, false, on, 2024-01-01, G1]"


def test_names_stay_the_text_that_was_written(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"data: x\nsplit: {{val: {NAMES}, by: 03}}\nunstained: {{01: [yes], 1: [no]}}\n")
    written = tuple(NAMES.strip("[]").replace("'", "").split(", "))
    found = load(Experiment, path, [f"split.test={NAMES}"])
    assert (found.split.val, found.split.test, found.split.by) == (written, written, "03")
    assert found.unstained == {"01": ("yes",), "1": ("no",)}
    assert load(EvaluateConfig, None, ["label_values=[yes,no]"]).label_values == ("yes", "no")
    assert load(Experiment, None, [DATA, "split.by=on", "split.test=[01,02]"]).split.test == ("01", "02")


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("On", True), ("true", True), ("False", False), ("0", False)]
)
def test_yes_and_no_are_true_and_false_where_that_is_asked(text, value):
    assert load(PrepareConfig, None, [f"qc={text}"]).qc is value


def test_null_is_nothing_and_merge_keys_work(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: x\nmarkers: ~\nsplit: {by: a, seed: 2}\nmethod: {name: linear, sources: null}\n")
    found = load(Experiment, path, ["split.stratify=", "method.sources=null"])
    assert (found.markers, found.method.sources, found.split.stratify, found.split.seed) == (None, None, None, 2)
    path.write_text("segment: {<<: {smooth: 2 px, split: 3 px}, split: 4 px}\n")
    assert load(PrepareConfig, path).segment == SegmentConfig(smooth="2 px", split="4 px")


def test_overrides_win_over_the_file_and_reach_into_sections(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: x\nseed: 1\nmethod: {latent_epochs: 3}\n")
    config = load(
        Experiment, path, ["seed=2", "method.encoder_epochs=9", "train.patience=1", "markers=[DNA, Lamin B1]"]
    )
    assert (config.seed, config.method.latent_epochs, config.method.encoder_epochs) == (2, 3, 9)
    assert config.train.patience == 1
    assert config.markers == ("DNA", "Lamin B1")
    assert load(Experiment, path, ["seed=2", "seed=3"]).seed == 3


@pytest.mark.parametrize(
    "config",
    [
        validate(Experiment, {"data": "x", "split": {"test": ["1e5", "µ"]}, "method": {"lr_latent": "2e-5"}}, "test"),
        PrepareConfig(aliases={"LaminB1": ("LMNB1", "1")}, pixel_size_um=0.25, segment=SegmentConfig(smooth="0.5 um")),
        SimulateConfig(cells=10),
        validate(
            Experiment,
            {"data": "x", "method": {"name": "translator", "weights": {"cycle": "1e-1"}, "head": "laplace"}},
            "test",
        ),
        validate(Experiment, {"data": "x", "method": {"name": "cut", "source": "P1"}, "train": {"ema": 0.9}}, "test"),
        PredictConfig(markers=("P1",)),
        EvaluateConfig(labels=("drug",)),
    ],
)
def test_dump_is_read_back(tmp_path, config):
    path = tmp_path / "dumped.yaml"
    path.write_text(dump(config))
    assert load(type(config), path) == config


def test_keys_are_dotted_and_complete():
    found = set(keys(Experiment))
    assert {"data", "split", "split.by", "method.lr_latent", "train.batch_size"} <= found
    assert {"method.weights.patch_nce", "method.sigmas", "train.balance"} <= found
    assert "method.weights.patch_nce" not in set(keys(Experiment, chosen={"cut"}))
    assert "segment.smooth" in set(keys(PrepareConfig))


def test_lengths_accept_both_micro_signs():
    for text in ("6 um", "6um", "6 µm", "6 μm", "12 px", "1.5 px"):
        assert length_px(validate(PrepareConfig, {"segment": {"smooth": text}}, "test").segment.smooth, 0.5) > 0


def defaults_of(function):
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY and p.name not in ("overwrite", "progress")
    }


def plain(config):
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def test_defaults_are_those_of_the_functions():
    assert plain(SimulateConfig()) == defaults_of(simulate)
    assert plain(SegmentConfig()) == plain(SegmentSettings())
    ours, theirs = plain(PrepareConfig()), defaults_of(prepare)
    assert ours.pop("segment") == SegmentConfig()
    assert theirs.pop("segment") is None
    assert ours.pop("aliases") == {}
    assert theirs.pop("aliases") is None
    assert ours == theirs


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path):
    kinds = {"prepare": PrepareConfig, "evaluate": EvaluateConfig, "predict": PredictConfig, "simulate": SimulateConfig}
    config = load(kinds.get(path.name.split("_")[0], Experiment), path)
    if isinstance(config, Experiment):  # and builds, and takes a step in each stage
        crop_px = max(64, 4 * 2 ** len(getattr(config.method, "channels", ())))
        method = build_method(config.method, Panel(("DNA", "P"), "DNA"), crop_px)
        measured = torch.ones(4, 2, dtype=torch.bool)
        method.prepare(measured, seed=0)
        batch = Batch(torch.arange(4), torch.rand(4, 2, crop_px, crop_px), measured)
        for stage in method.stages:
            method.start(stage)
            for player, groups in stage.groups.items():
                method.turn(player)
                loss = method.loss(batch, player).total
                assert loss.isfinite()
                if groups:
                    loss.backward()
    else:
        assert config != type(config)()  # it says something


def test_there_are_configurations_to_ship():
    assert (CONFIGS / "apollo.yaml").exists()


@pytest.mark.parametrize("pattern", ["{channel}.tif", "*_{channel}.png", "{channel}_[0-9].tif"])
def test_text_that_is_no_yaml_is_taken_as_it_was_typed(pattern):
    assert load(PrepareConfig, None, [f"pattern={pattern}"]).pattern == pattern
