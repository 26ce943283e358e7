"""A trained method as one file that needs no imgshared: raw intensities in, raw intensities out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from imgshared.config import ExportConfig, dump
from imgshared.methods.maps import MapMethod, size_of
from imgshared.methods.paired import PairedMethod
from imgshared.prediction.run import Run
from imgshared.types import InputError

ENDS = (".onnx", ".pt2")
KEY = "imgshared"  # of the metadata
LARGEST = 4096  # px, of what is declared; runtimes do not enforce it


class Drawing(nn.Module):
    """Draw stains from stains: (B, S, Y, X) raw intensities to (B, T, Y, X), normalisation included.

    Parameters
    ----------
    run
        Its method is translator or regression, whose drawing has no choices that depend on the data.
    sources, targets
        Channels of the model.
    sharp
        The sharp output in place of the mean.
    """

    def __init__(self, run: Run, sources: Sequence[int], targets: Sequence[int], *, sharp: bool = False) -> None:
        super().__init__()
        self.method, self.sharp = run.method, sharp
        self.sources, self.targets = tuple(sources), tuple(targets)
        # numbers, for a graph makes no choices by tensors
        self.heeded = self.method.stacking[list(targets)].tolist() if isinstance(self.method, MapMethod) else []
        self.given, self.drawn = (run.normaliser.select(channels) for channels in (sources, targets))

    def forward(self, raw: Tensor) -> Tensor:
        """Normalise, draw, invert."""
        return self.drawn.inverse(self._draw(self.given.forward(raw)))

    def _draw(self, images: Tensor) -> Tensor:
        if isinstance(self.method, MapMethod):
            return self._translate(self.method, images)
        assert isinstance(self.method, PairedMethod)
        known = [self.sources.index(source) for source in self.method.sources]  # it learnt them in this order
        mean = self.method.predict(images[:, known]).mean
        return mean[:, [self.method.targets.index(t) for t in self.targets]]

    def _translate(self, method: MapMethod, images: Tensor) -> Tensor:
        net, size = method.network, size_of(images)
        stains = [net.encode_as(images[:, k : k + 1], channel) for k, channel in enumerate(self.sources)]
        fused = net.fuse_stains(stains, self.sources)
        trunk, alone, chromatin = net.shared_path(fused.shared), None, method.panel.chromatin_index
        if len(stains) > 1 and chromatin in self.sources:
            own = net.fuse_stains([stains[self.sources.index(chromatin)]], [chromatin])
            alone = net.shared_path(own.shared)
        texture = net.texture_trunk(fused.shared) if self.sharp else None
        out = []
        for target, heeded in zip(self.targets, self.heeded, strict=True):
            channels = torch.full((images.shape[0],), target, device=images.device)
            mean, _ = net.decode(trunk, channels, size)
            if alone is not None and heeded < 1:
                mean = torch.lerp(net.decode(alone, channels, size)[0], mean, heeded)
            out.append(mean if texture is None else net.sharpen(mean, texture, channels))
        return torch.cat(out, 1)


def export(run: Run, out: Path, config: ExportConfig | None = None) -> Path:
    """Write a run's prediction as ONNX (``.onnx``) or as a PyTorch program (``.pt2``, `torch.export`).

    The graph takes (B, S, Y, X) float32 raw intensities of the sources, of any B, and Y and X that are multiples of
    ``multiple``, to (B, T, Y, X) raw intensities. The metadata, under the key ``imgshared``, is JSON: `sources`,
    `targets` and `multiple`, the contract (markers, aliases, pixel size, dtype, normaliser), configuration, version,
    and the checkpoint's SHA-256.

    Raises
    ------
    InputError
        For a method that cannot be exported, an unknown ending, a file that exists, or where onnx is not installed.
    """
    config = config or ExportConfig()
    if out.suffix not in ENDS:
        raise InputError(f"{out} ends in neither {' nor '.join(ENDS)}: that says which format to write")
    if out.exists():
        raise InputError(f"{out} exists already: choose another name, or remove it")
    name = run.experiment.method.name
    if not list(run.method.parameters()):
        raise InputError(f"{run.path} is an exported file, or a closed form: export a trained translator or regression")
    if run.experiment.ensemble:
        raise InputError(f"{run.path} is an ensemble: export one of its members")
    if name not in ("translator", "regression"):
        raise InputError(f"{name} cannot be exported: translator and regression can")
    run.refuse_sharp(config.sharp)
    given = run.source_mask(config.sources)
    sources, targets = given.nonzero()[:, 0].tolist(), run.target_channels(config.markers, given)
    if set(sources) & set(targets):
        raise InputError("a stain is predicted from others: name markers=... that are not among the sources")
    device = next(run.method.parameters()).device
    drawing = Drawing(run, sources, targets, sharp=config.sharp).to("cpu").eval()
    try:
        about = json.dumps(_about(run, sources, targets, multiple_of(run)))
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f"{out.name}.partial")
        _write(drawing, len(sources), multiple_of(run), partial, out.suffix, about)
        partial.replace(out)
    finally:
        drawing.to(device)
    return out


def multiple_of(run: Run) -> int:
    """What both sides of an image must be a multiple of."""
    return max([1, *(m for module in run.method.modules() if isinstance(m := getattr(module, "multiple", 1), int))])


def _write(drawing: Drawing, sources: int, multiple: int, path: Path, ending: str, about: str) -> None:
    example = torch.zeros(2, sources, 3 * multiple, 4 * multiple)
    sides = [multiple * Dim(name, min=1, max=LARGEST // multiple) for name in ("rows", "columns")]
    shapes = ({0: Dim("batch", min=1, max=LARGEST), 2: sides[0], 3: sides[1]},)
    with torch.no_grad():
        program = torch.export.export(drawing, (example,), dynamic_shapes=shapes, strict=False)
    if ending == ".pt2":
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={KEY: about})
        return
    try:
        import onnx
        import onnxscript  # noqa: F401, what torch.onnx writes with
    except ImportError as error:
        raise InputError("onnx and onnxscript are not installed: pip install 'imgshared[onnx]'") from error
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells of every node that it leaves as it is
    written = torch.onnx.export(program, dynamo=True, input_names=["raw"], output_names=["predicted"], verbose=False)
    assert written is not None
    model = written.model_proto
    model.metadata_props.append(onnx.StringStringEntryProto(key=KEY, value=about))
    onnx.save(model, path)


def _about(run: Run, sources: Sequence[int], targets: Sequence[int], multiple: int) -> dict[str, Any]:
    return {
        "version": version("imgshared"),
        "sources": [run.panel.markers[c] for c in sources],
        "targets": [run.panel.markers[c] for c in targets],
        "multiple": multiple,
        "contract": run.contract.to_dict(),
        "config": dump(run.experiment),
        "checkpoint_sha256": hashlib.sha256(run.checkpoint.read_bytes()).hexdigest(),
    }
