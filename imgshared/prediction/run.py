"""A trained run, opened for prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from imgshared.build import build_trained
from imgshared.config import Experiment
from imgshared.config import load as load_config
from imgshared.data.normalise import Normaliser
from imgshared.data.panel import Panel
from imgshared.data.split import Split
from imgshared.data.store import CellStore
from imgshared.methods.base import Method
from imgshared.training.checkpoint import Contract, load
from imgshared.training.devices import is_there, make_fabric
from imgshared.training.folder import best_path, last_path
from imgshared.types import InputError, Prediction


@dataclass(frozen=True)
class Run:
    """A run folder's configuration, contract and best weights, on the device.

    Attributes
    ----------
    panel, split, normaliser
        Those of the contract, by their short names.
    """

    path: Path
    checkpoint: Path
    experiment: Experiment
    contract: Contract
    method: Method
    fabric: Fabric

    @property
    def results(self) -> Path:
        """Where predictions and evaluations go unless they are told: the run folder; beside an exported file."""
        return self.path.with_suffix("") if self.path.is_file() else self.path

    @property
    def seeds(self) -> list[int]:
        """The seeds of the training, several of an ensemble."""
        return list(self.experiment.ensemble) or [self.experiment.seed]

    @property
    def title(self) -> str:
        """The method's name and seeds, for a reader."""
        name, seeds = self.experiment.method.name, ", ".join(map(str, self.seeds))
        return f"an ensemble of {name}, seeds {seeds}" if self.experiment.ensemble else f"{name}, seed {seeds}"

    @property
    def panel(self) -> Panel:
        """The model's markers."""
        return self.contract.panel

    @property
    def split(self) -> Split:
        """Which groups trained the model."""
        return self.contract.split

    @property
    def normaliser(self) -> Normaliser:
        """Raw intensities to the model's and back."""
        return self.contract.normaliser

    @property
    def source_channel(self) -> int:
        """The first stain that is predicted from in the method's usual question."""
        return self.source_channels[0]

    @property
    def source_channels(self) -> tuple[int, ...]:
        """Places of `sources` in the model's panel."""
        return tuple(self.method.sources or (self.panel.chromatin_index,))

    @property
    def sources(self) -> tuple[str, ...]:
        """The stains that are predicted from in the method's usual question: what it is bound to, else chromatin."""
        return tuple(self.panel.markers[c] for c in self.source_channels)

    def training_store(self, why: str) -> CellStore:
        """Open the store that trained the model.

        Raises
        ------
        InputError
            Where it is not there or has changed; says `why` it is needed.
        """
        path = self.experiment.data
        store = CellStore(path) if path.exists() else None
        if store is None or store.data_hash != self.contract.data_hash:
            state = "is not there" if store is None else "has changed since"
            raise InputError(f"the store {path}, which trained {self.path}, {state}: {why}")
        return store

    def source_mask(self, names: Sequence[str] | None = None) -> Tensor:
        """Return the channels that the method is given, (C,) bool: the named ones, or those of its usual question.

        Raises
        ------
        InputError
            For an unknown name, or others than the sources that the method is bound to.
        """
        bound = self.method.sources
        wanted = self.panel.indices(names) if names else list(bound or [self.panel.chromatin_index])
        if bound is not None and set(wanted) != set(bound):
            ours = ", ".join(self.panel.markers[c] for c in bound)
            raise InputError(
                f"{self.experiment.method.name} predicts from {ours}, as it was trained, not from "
                f"{', '.join(names or ())}: leave out sources=..., or train with other method.sources; apollo, mvae "
                "and translator take any subset"
            )
        mask = torch.zeros(len(self.panel), dtype=torch.bool)
        mask[wanted] = True
        return mask

    def target_channels(self, names: Sequence[str] | None, given: Tensor) -> list[int]:
        """Return the channels to predict: the named ones, or every protein that the method predicts and is not `given`.

        Parameters
        ----------
        given
            (C,) bool, see `source_mask`.

        Raises
        ------
        InputError
            For an unknown name, or where nothing is left.
        """
        if names:
            return list(dict.fromkeys(self.panel.indices(names)))
        known = range(len(self.panel)) if self.method.targets is None else self.method.targets
        rest = [c for c in known if not given[c] and c != self.panel.chromatin_index]
        if not rest:
            raise InputError(
                "every protein is a source, so nothing is left to predict: name markers=... or fewer sources=..."
            )
        return rest

    def translate(self, images: Tensor, given: Tensor, targets: Sequence[int]) -> Prediction:
        """Ask the method, see `Method.translate`.

        Raises
        ------
        InputError
            Where it predicts something that is no number.
        """
        found = self.method.translate(images, given, targets)
        if not found.mean.isfinite().all():
            raise InputError(
                f"{self.checkpoint} predicts values that are no numbers: its training diverged, or the images are "
                "far from what it learnt. Choose another checkpoint, or train again with a smaller learning rate"
            )
        return found

    def refuse_crops_alone(self) -> None:
        """Refuse images of another size than the training crops to a model that knows no other, or no neighbours.

        Raises
        ------
        InputError
            Names the methods that do, or says how to prepare crops that show neighbours.
        """
        if not self.method.any_size:
            raise InputError(
                f"{self.experiment.method.name} predicts crops of {self.contract.crop_px} px alone: use `predict` on a "
                "store of crops, or train translator, regression, pix2pix, cut, cyclegan or linear"
            )
        if self.contract.mask_neighbours:
            raise InputError(
                f"{self.path} was trained on cells without their neighbours (mask_neighbours=true), and an image shows "
                "these: use `predict` on a store that was prepared so, or train on one with mask_neighbours=false"
            )

    def refuse_sharp(self, wanted: bool) -> None:
        """Refuse to give a sharp output that the method has not.

        Raises
        ------
        InputError
            Says which training gives one.
        """
        if wanted and not self.method.sharp:
            raise InputError(
                f"sharp=true: this {self.experiment.method.name} predicts the mean alone; train translator with "
                "method.weights.sharp and method.weights.adversarial above 0"
            )


def load_run(path: str | Path, *, checkpoint: str = "best") -> Run:
    """Open a run folder for prediction.

    Parameters
    ----------
    path
        The run folder.
    checkpoint
        "best" (least held-out loss; the end of the training where no held-out loss tells better) or "last".

    Raises
    ------
    InputError
        Where there is no run, no such checkpoint (training has not got there), or a damaged one.
    """
    path = Path(path)
    if not (path / "config.yaml").exists():
        raise InputError(f"no run at {path}: a run folder holds config.yaml and checkpoints/")
    experiment = load_config(Experiment, path / "config.yaml")
    file = {"best": best_path, "last": last_path}[checkpoint](path)
    if not file.exists() and checkpoint == "best" and last_path(path).exists():
        raise InputError(
            f"{path} has no best checkpoint yet, its training was interrupted: continue it with "
            "`imgshared train ... --resume`"
        )
    tree, contract = load(file)
    method = build_trained(experiment, contract.panel, contract.crop_px)
    try:
        method.load_state_dict(tree["model"] | tree.get("ema", {}))  # `best` holds the average already
    except RuntimeError as error:
        raise InputError(
            f"{path / 'config.yaml'} was changed after training, {file} does not fit it: {error}"
        ) from error
    wish = experiment.train.accelerator
    # trained on a GPU, opened where there is none
    fabric = make_fabric(wish if is_there(wish) else "auto", experiment.train.precision)
    method.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    method.eval()
    nn.Module.requires_grad_(method, False)
    return Run(path, file, experiment, contract, method, fabric)
