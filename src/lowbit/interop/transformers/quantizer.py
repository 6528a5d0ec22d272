"""The HfQuantizer that transformers calls while it loads a model whose quantization config is lowbit's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer

from lowbit.errors import UnsupportedError
from lowbit.interop.transformers.config import LowbitConfig

if TYPE_CHECKING:
    import torch

    from lowbit.interop.transformers.places import Model

_FILES = ("lowbit.json", "config.json", "model.safetensors")


class LowbitQuantizer(HfQuantizer):
    """Loads lowbit directories, and quantizes models of floats when they have been loaded.

    transformers makes the modules, without the weights that lowbit holds; the values come from the directory
    by lowbit's own reader, which checks them and maps them into memory.
    """

    requires_calibration = False
    required_packages: tuple[str, ...] = ()
    quantization_config: LowbitConfig

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(LowbitConfig.of(quantization_config), **kwargs)
        self._checkpoint: Any = None
        self._taken: Any = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        _check_devices(kwargs.get("device_map"))

    def update_device_map(self, device_map: Any) -> Any:
        """ "auto" would take a GPU where there is one."""
        return {"": "cpu"} if device_map == "auto" else device_map

    def _process_model_before_weight_loading(
        self, model: Model, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Model:
        if not self.pre_quantized:
            return model
        from lowbit.interop.transformers.convert import vacate
        from lowbit.model.lowbit_checkpoint import LowbitCheckpoint

        self._checkpoint = LowbitCheckpoint(_directory(model, checkpoint_files))
        self._taken = vacate(model, self._checkpoint, self.quantization_config)
        # What transformers finds in the files and misses in the model is no news: all comes from `fill`.
        model._keys_to_ignore_on_load_missing = {"."}
        model._keys_to_ignore_on_load_unexpected = {"."}
        return model

    def _process_model_after_weight_loading(self, model: Model, **kwargs: Any) -> Model:
        from lowbit.interop.transformers.convert import fill, quantize_model

        if not self.pre_quantized:
            return quantize_model(model, self.quantization_config)
        for name in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
            model.__dict__.pop(name, None)
        checkpoint, taken = self._checkpoint, self._taken
        self._checkpoint = self._taken = None
        return fill(model, checkpoint, taken)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """transformers 4: see _process_model_before_weight_loading."""
        return [] if self.pre_quantized else missing_keys

    def update_unexpected_keys(self, model: Any, unexpected_keys: list[str], prefix: str) -> list[str]:
        return [] if self.pre_quantized else unexpected_keys

    def _dequantize(self, model: Model, dtype: torch.dtype | None = None) -> Model:
        from lowbit.interop.transformers.convert import dequantize_model

        return dequantize_model(model, dtype)

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """transformers' own writer knows no packed weights; models carry a save_pretrained of their own."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Weights are codes. Gradients pass through to inputs, for prompts and adapters."""
        return False


def _check_devices(device_map: Any) -> None:
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    for device in devices:
        kind = getattr(device, "type", device)
        if kind not in (None, "cpu", "auto", "sequential", "balanced", "balanced_low_0"):
            raise UnsupportedError(
                f"from_pretrained: device_map names {device!r}; lowbit's kernels in transformers run on the "
                "CPU: leave device_map away or give 'cpu'"
            )


def _directory(model: Model, checkpoint_files: list[str] | None) -> Path:
    """The folder with lowbit.json; from a hub transformers has fetched only the weights and the config."""
    name = model.config.name_or_path
    folder = Path(checkpoint_files[0]).parent if checkpoint_files else Path(name)
    if (folder / _FILES[0]).is_file() or Path(name).is_dir():
        return folder
    from huggingface_hub import hf_hub_download

    # A file of the hub's cache lies in a folder named after its commit.
    revision = folder.name if checkpoint_files else getattr(model.config, "_commit_hash", None)
    paths = [hf_hub_download(name, file, revision=revision) for file in _FILES]
    return Path(paths[0]).parent
