"""What transformers calls a quantization config: a Scheme, how codes are chosen, and what stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    from lowbit.formats import Format, Scheme

VERSION = 1  # of the directory, see docs/formats.md


class LowbitConfig(QuantizationConfigMixin):
    """quantization_config of from_pretrained, and of the config.json of a lowbit directory.

    scheme: a lowbit.Scheme, or what Scheme.parse reads: "int4-g64", "w4a16", a Format, a mapping
    method: how codes are chosen when a model of floats is loaded: a method that needs no calibration, such as
        "rtn" or "hqq"; see docs/methods.md. Calibrated ones are for `lowbit quantize`.
    modules_to_not_convert: patterns (fnmatch) of modules that stay in floats, such as "lm_head" or "*.gate"
    version: of the directory that it was read from

    A lowbit.Scheme may be given in its place. Raises UnsupportedError for other versions and unknown keys.
    """

    def __init__(
        self,
        scheme: Scheme | Format | Mapping[str, Any] | str = "int4-g64",
        method: str = "rtn",
        modules_to_not_convert: Sequence[str] | None = None,
        version: int = VERSION,
        quant_method: str = "lowbit",
        **unknown: Any,
    ):
        from lowbit.formats import Scheme

        if quant_method != "lowbit" or unknown:
            found = f"keys {sorted(unknown)}" if unknown else f"quant_method={quant_method!r}"
            raise UnsupportedError(
                f"LowbitConfig: {found}; known are scheme, method, modules_to_not_convert and version, with "
                "quant_method='lowbit'"
            )
        if version != VERSION or isinstance(version, bool):
            raise UnsupportedError(
                f"LowbitConfig: version {str(version)[:60]} of the format, this program reads {VERSION}; "
                "quantize again or update lowbit"
            )
        if isinstance(modules_to_not_convert, str):
            raise RequestError(
                f"LowbitConfig: modules_to_not_convert={modules_to_not_convert!r}; give a list of patterns"
            )
        self.quant_method = "lowbit"  # type: ignore[assignment]
        self.scheme = Scheme.parse(scheme)
        self.method = method
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.version = version

    @classmethod
    def of(cls, value: Any) -> LowbitConfig:
        """The config of what a user may give: one of these, or a Scheme, or what Scheme.parse reads."""
        return value if isinstance(value, cls) else cls(value)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds, as `lowbit quantize` writes it."""
        fields: dict[str, Any] = {
            "quant_method": "lowbit",
            "version": self.version,
            "scheme": self.scheme.to_dict(),
        }
        if self.method != "rtn":
            fields["method"] = self.method
        if self.modules_to_not_convert:
            fields["modules_to_not_convert"] = list(self.modules_to_not_convert)
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
