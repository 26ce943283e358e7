"""A run that was exported to ONNX, opened for prediction: no weights of ours, the same contract."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from imgshared.config import Experiment, validate
from imgshared.data.normalise import Normaliser
from imgshared.data.panel import Panel
from imgshared.methods.base import Method, Stage
from imgshared.models.pyramid import pad_to_multiple
from imgshared.prediction.export import KEY
from imgshared.prediction.run import Run
from imgshared.training.checkpoint import Contract
from imgshared.training.devices import make_fabric
from imgshared.types import Batch, InputError, LossTerms, Prediction


class OnnxMethod(Method):
    """A graph that draws `targets` from `sources`; it predicts and does nothing else.

    Parameters
    ----------
    session
        Of onnxruntime.
    panel, normaliser
        Of the contract.
    about
        The file's metadata.
    """

    any_size = True
    sources: tuple[int, ...]
    targets: tuple[int, ...]

    def __init__(self, session: Any, panel: Panel, normaliser: Normaliser, about: dict[str, Any]) -> None:
        super().__init__()
        self.session, self.panel, self.multiple = session, panel, int(about["multiple"])
        self.sources, self.targets = (tuple(panel.indices(about[name])) for name in ("sources", "targets"))
        self.given, self.drawn = (normaliser.select(channels) for channels in (self.sources, self.targets))

    def translate(self, images: Tensor, measured: Tensor, targets: Sequence[int]) -> Prediction:
        """Predict stains that the file predicts, from its sources; a source asked for is returned as it is.

        Raises
        ------
        InputError
            For a stain that the file does not predict.
        """
        known = (*self.sources, *self.targets)
        lacking = [self.panel.markers[t] for t in targets if t not in known]
        if lacking:
            ours = ", ".join(self.panel.markers[t] for t in self.targets)
            raise InputError(f"this file does not predict {', '.join(lacking)}, but {ours}: markers=[...]")
        given = torch.where(measured[:, list(self.sources), None, None], images[:, list(self.sources)].float(), 0)
        raw = pad_to_multiple(self.given.inverse(given), self.multiple)
        name = self.session.get_inputs()[0].name
        (found,) = self.session.run(None, {name: np.ascontiguousarray(raw.cpu().numpy(), np.float32)})
        predicted = torch.from_numpy(found[..., : images.shape[2], : images.shape[3]]).to(images.device)
        drawn = torch.cat([given, self.drawn.forward(predicted)], 1)
        return Prediction(drawn[:, [known.index(t) for t in targets]])

    @property
    def stages(self) -> Sequence[Stage]:
        """None: it does not learn."""
        return ()

    def loss(self, batch: Batch, player: str) -> LossTerms:
        """Refuse: it does not learn."""
        raise InputError("an exported file cannot be trained: train the run that it was exported from")

    def validate(self, batch: Batch) -> LossTerms:
        """Refuse: it does not learn."""
        return self.loss(batch, "")


def load_onnx(path: Path) -> Run:
    """Open a file that `export` wrote.

    Raises
    ------
    InputError
        Where it is missing, damaged, not of imgshared or of one with another contract, or onnxruntime is not installed.
    """
    if not path.exists():
        raise InputError(f"no model at {path}")
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("onnxruntime is not installed: pip install 'imgshared[onnx]'") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
    except Exception as error:  # onnxruntime's own kinds
        raise InputError(f"{path} is damaged or no ONNX file ({error})") from error
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    if text is None:
        raise InputError(f"{path} carries no contract of imgshared: only files of `imgshared export` can be used")
    about = json.loads(text)
    experiment: Experiment = validate(Experiment, yaml.safe_load(about["config"]), str(path))
    try:
        contract = Contract.from_dict(about["contract"])
    except KeyError as error:
        raise InputError(
            f"{path} was exported by an imgshared ({about['version']}) whose contract lacks {error}: export it again"
        ) from error
    method = OnnxMethod(session, contract.panel, contract.normaliser, about).eval()
    return Run(path, path, experiment, contract, method, make_fabric("cpu", "float32"))
